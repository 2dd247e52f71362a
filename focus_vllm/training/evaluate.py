"""How good an adapter is under the mask that is served: perplexity, retrieval, and what it reads."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from focus_vllm.config import FocusConfig
from focus_vllm.routing import Router
from focus_vllm.training.data import tokenize
from focus_vllm.training.hf import HardMask, attach_layers, prompt_logprobs, routable_layers
from focus_vllm.training.probes import Probe, Score, score_probes
from focus_vllm.training.yardsticks import MassMeter, OracleMask, RandomMask

RECALL_TOKENS = 64
MASS_SEQUENCES = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One way to attend, measured."""

    name: str
    perplexity: float
    """Of the tokens before the repeated span."""
    recall: float
    """Mean negative log-likelihood of the text's last 64 tokens, which repeat a span of its first half."""
    far_pairs: float
    """Share of the pairs beyond window and sinks that attend, mean over layers; 1 if dense.

    Layers are those that could be routed: one that stays dense keeps every pair.
    """
    keys_per_query: float
    """Mean over positions and the same layers."""
    perplexity_by_length: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Of the first so many tokens."""
    probes: Mapping[str, Score] = dataclasses.field(default_factory=dict)
    """By task."""
    mass: float | None = None
    """Share of the dense model's attention that the mask keeps, mean over layers, heads and queries that have
    far keys, of the first sequences; None for dense and the oracle."""
    balance: float | None = None
    """The largest group's share of these tokens, in the worst layer; None without groups."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to attend: the dense model, or a handler for each of some layers."""

    name: str
    config: FocusConfig | None = None
    """The mask's settings; None for dense."""
    handlers: Mapping[int, HardMask | OracleMask] = dataclasses.field(default_factory=dict)


def held_out_sequences(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, count: int
) -> torch.Tensor:
    """Cut up to `count` sequences from the starts of documents, in turn, as many per document as needed.

    Returns:
        `[count or fewer, seq_len]`, int64.

    Raises:
        ValueError: No document is long enough.
    """
    per_document = math.ceil(count / len(documents))
    rows: list[torch.Tensor] = []
    for document in documents:
        # More than enough characters; a token is seldom longer than 8.
        beginning = document[: per_document * seq_len * 8]
        ids = torch.tensor(tokenize(tokenizer, [beginning])[0], dtype=torch.long)
        whole = min(len(ids) // seq_len, per_document)
        rows += list(ids[: whole * seq_len].view(whole, seq_len))
    if not rows:
        raise ValueError(f"no document has seq_len ({seq_len}) tokens")
    return torch.stack(rows[:count])


def dense() -> Way:
    """The model as it is."""
    return Way(name="dense")


def focus(name: str, model: PreTrainedModel, config: FocusConfig, layers: Mapping[int, Router]) -> Way:
    """The mask of an adapter."""
    device = next(model.parameters()).device
    handlers = {}
    for index, router in layers.items():
        weight, bias = router.fold(config.temperature)
        handlers[index] = HardMask(config, weight.to(device), bias.to(device))
    return Way(name=name, config=config, handlers=handlers)


def local(model: PreTrainedModel, config: FocusConfig, keys_per_query: float, num_tokens: int) -> Way:
    """No groups: the window that reads `keys_per_query` keys over `num_tokens` tokens, and the same sinks."""
    indices, layers = _indices(model, config), len(routable_layers(model))
    dense_keys = (num_tokens + 1) / 2 * (layers - len(indices))
    window = window_for((keys_per_query * layers - dense_keys) / len(indices), config, num_tokens)
    return window_alone(model, dataclasses.replace(config, window=window))


def window_alone(model: PreTrainedModel, config: FocusConfig) -> Way:
    """No groups: `config`'s window and sinks."""
    weight, bias = _no_router(model, config)
    nobody = torch.zeros(1, dtype=torch.uint8, device=weight.device)
    masks = {index: HardMask(config, weight, bias, (nobody, nobody)) for index in _indices(model, config)}
    return Way(name=f"local window {config.window} + {config.sink} sinks", config=config, handlers=masks)


def random_groups(model: PreTrainedModel, config: FocusConfig, seed: int = 0) -> Way:
    """Groups drawn for each position of each layer, as many as `config` says."""
    weight, bias = _no_router(model, config)
    masks = {index: RandomMask(config, weight, bias, seed=seed + index) for index in _indices(model, config)}
    return Way(name="random groups", config=config, handlers=masks)


def oracle(model: PreTrainedModel, config: FocusConfig, far_pairs: float) -> Way:
    """The far keys with most attention, as many per query as make `far_pairs` the mean over layers."""
    indices, layers = _indices(model, config), len(routable_layers(model))
    share = (far_pairs * layers - (layers - len(indices))) / len(indices)
    masks = {index: OracleMask(config, share) for index in indices}
    return Way(name=f"oracle, {far_pairs:.1%} of far keys", config=config, handlers=masks)


def _indices(model: PreTrainedModel, config: FocusConfig) -> list[int]:
    return sorted(set(routable_layers(model)) - set(config.dense_layers))


def _no_router(model: PreTrainedModel, config: FocusConfig) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_size = model.config.get_text_config().hidden_size
    weight = torch.zeros(config.num_groups, hidden_size, device=next(model.parameters()).device)
    return weight, weight[:, 0]


def window_for(keys_per_query: float, config: FocusConfig, num_tokens: int) -> int:
    """Return the smallest window that, without groups, reads `keys_per_query` keys or more on average."""
    position = torch.arange(num_tokens, dtype=torch.float64)
    low, high = 0, num_tokens
    while low < high:
        window = (low + high) // 2
        local = torch.minimum(position + 1, torch.tensor(window + 1.0))
        sinks = (position - window).clamp(0, config.sink)
        keys = torch.where(position < config.dense_below, position + 1, local + sinks)
        low, high = (low, window) if keys.mean() >= keys_per_query else (window + 1, high)
    return low


def evaluate(
    model: PreTrainedModel,
    way: Way,
    sequences: torch.Tensor,
    lengths: Sequence[int] = (),
    probes: Mapping[str, Sequence[Probe]] | None = None,
    seed: int = 0,
) -> Quality:
    """Measure one way to attend.

    Args:
        model: A Hugging Face causal language model.
        way: From `dense`, `focus`, `local`, `random_groups` or `oracle`.
        sequences: `[count, num_tokens]`, int64, text that was not trained on.
        lengths: Perplexity is also given for the first so many tokens of each sequence. Every mask is causal,
            so that is the perplexity of a text of that length.
        probes: Retrieval tasks.
        seed: Of the places that the repeated spans come from.

    Raises:
        ValueError: The sequences are too short for a repeated span.
    """
    length = sequences.shape[1]
    if length < 2 * RECALL_TOKENS:
        raise ValueError(f"seq_len ({length}) must be >= {2 * RECALL_TOKENS}: a span of it is repeated")
    generator = torch.Generator().manual_seed(seed)
    losses, recalls, counts = [], [], _Counts(len(routable_layers(model)))
    with attach_layers(model, way.handlers) if way.handlers else contextlib.nullcontext():
        for row in sequences:
            start = int(torch.randint(0, max(length // 2 - RECALL_TOKENS, 1), (1,), generator=generator))
            repeated = row.clone()
            repeated[-RECALL_TOKENS:] = row[start : start + RECALL_TOKENS]
            loss = -prompt_logprobs(model, repeated).double()
            counts.add(way)
            losses.append(loss[:-RECALL_TOKENS])
            recalls.append(loss[-RECALL_TOKENS:].mean().item())
        scores = {task: score_probes(model, given) for task, given in (probes or {}).items()}
    nll = torch.stack(losses)
    return Quality(
        name=way.name,
        perplexity=nll.mean().exp().item(),
        recall=sum(recalls) / len(recalls),
        far_pairs=counts.far_pairs() if way.config else 1.0,
        keys_per_query=counts.keys / counts.queries if way.config else (length + 1) / 2,
        perplexity_by_length={size: nll[:, : size - 1].mean().exp().item() for size in lengths},
        probes=scores,
        mass=_mass(model, way, sequences),
        balance=counts.balance(),
    )


@torch.no_grad()
def _mass(model: PreTrainedModel, way: Way, sequences: torch.Tensor) -> float | None:
    masks = {index: part for index, part in way.handlers.items() if isinstance(part, HardMask)}
    if not masks:
        return None
    meters = {index: MassMeter(mask) for index, mask in masks.items()}
    with attach_layers(model, meters):
        for row in sequences[:MASS_SEQUENCES]:
            model(input_ids=row[None].to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
    kept = [meter.kept / meter.measured for meter in meters.values() if meter.measured]
    return sum(kept) / len(kept) if kept else None


@dataclasses.dataclass(slots=True)
class _Counts:
    """Pairs and tokens of the masks seen so far."""

    num_layers: int
    """That could be routed."""
    kept: int = 0
    far: int = 0
    keys: int = 0
    queries: int = 0
    members: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    """By layer, tokens in each group, `[num_groups]`."""
    tokens: int = 0

    def add(self, way: Way) -> None:
        """Count what the handlers attended to last."""
        if way.config is None:
            return
        for index, handler in way.handlers.items():
            kept, far, always = handler.pairs()
            num_tokens = handler.num_tokens
            everything = far, always
            self.kept, self.far = self.kept + kept, self.far + far
            self.keys, self.queries = self.keys + always + kept, self.queries + num_tokens
            if type(handler) is HardMask and handler.given is None:
                assert handler.key_groups is not None
                bits = torch.arange(handler.config.num_groups, device=handler.key_groups.device)
                inside = (handler.key_groups.flatten()[:, None] >> bits & 1).sum(dim=0).cpu()
                self.members[index] = self.members.get(index, torch.zeros_like(inside)) + inside
        dense = self.num_layers - len(way.handlers)
        far, always = everything
        self.kept, self.far = self.kept + dense * far, self.far + dense * far
        self.keys, self.queries = self.keys + dense * (far + always), self.queries + dense * num_tokens
        self.tokens += num_tokens

    def far_pairs(self) -> float:
        return self.kept / max(self.far, 1)

    def balance(self) -> float | None:
        if not self.members:
            return None
        return max(inside.max().item() for inside in self.members.values()) / self.tokens


def to_json(rows: Sequence[Quality]) -> list[dict[str, Any]]:
    """Return the rows as JSON types."""
    return [dataclasses.asdict(row) for row in rows]
