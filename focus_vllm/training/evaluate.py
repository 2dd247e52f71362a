"""How good an adapter is under the mask that is served: perplexity, retrieval, and what it reads."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from focus_vllm.config import FocusConfig
from focus_vllm.reference import focus_mask
from focus_vllm.routing import Router
from focus_vllm.training.data import tokenize
from focus_vllm.training.hf import QUERY_CHUNK, HardMask, attach, prompt_logprobs, routable_layers

RECALL_TOKENS = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One way to attend, measured."""

    name: str
    perplexity: float
    recall: float
    """Mean negative log-likelihood of a 64-token span that repeats one from the text's first half."""
    far_pairs: float
    """Share of the pairs beyond window and sinks that attend, mean over layers; 1 if dense."""
    keys_per_query: float
    """Mean over positions and layers."""


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


def evaluate_dense(model: PreTrainedModel, sequences: torch.Tensor, seed: int = 0) -> Quality:
    """Measure `model` as it is; see `evaluate_focus`."""
    perplexity, recall = _measure(model, sequences, seed)
    length = sequences.shape[1]
    return Quality(
        name="dense", perplexity=perplexity, recall=recall, far_pairs=1.0, keys_per_query=(length + 1) / 2
    )


def evaluate_focus(
    name: str,
    model: PreTrainedModel,
    config: FocusConfig,
    layers: Mapping[int, Router],
    sequences: torch.Tensor,
    seed: int = 0,
) -> Quality:
    """Measure `model` under the mask of an adapter.

    Args:
        name: What to call it.
        model: A Hugging Face causal language model.
        config: The mask's settings.
        layers: What each routed layer learned.
        sequences: `[count, num_tokens]`, int64, text that was not trained on.
        seed: Of the places that the repeated spans come from.
    """
    with attach(model, config, layers) as attached:
        perplexity, recall = _measure(model, sequences, seed)
        far, keys = _pairs(attached, config)
    return Quality(name=name, perplexity=perplexity, recall=recall, far_pairs=far, keys_per_query=keys)


def evaluate_local(
    model: PreTrainedModel, config: FocusConfig, keys_per_query: float, sequences: torch.Tensor, seed: int = 0
) -> Quality:
    """Measure the baseline without groups: the window that reads `keys_per_query`, and the same sinks."""
    window = window_for(keys_per_query, config, sequences.shape[1])
    local = dataclasses.replace(config, window=window)
    with _ungrouped(model, local, sequences.shape[1]) as attached:
        perplexity, recall = _measure(model, sequences, seed)
        far, keys = _pairs(attached, local)
    return Quality(
        name=f"local window {window} + {config.sink} sinks",
        perplexity=perplexity,
        recall=recall,
        far_pairs=far,
        keys_per_query=keys,
    )


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


@contextlib.contextmanager
def _ungrouped(model: PreTrainedModel, config: FocusConfig, num_tokens: int) -> Iterator[dict[int, HardMask]]:
    """Attach Focus with tokens in no group, so that only window and sinks attend."""
    none = torch.zeros(num_tokens, dtype=torch.uint8)
    hidden_size = model.config.get_text_config().hidden_size
    router = Router(
        torch.zeros(hidden_size, 1), torch.zeros(config.num_groups, 1), torch.zeros(config.num_groups)
    )
    indices = sorted(set(routable_layers(model)) - set(config.dense_layers))
    layers, groups = dict.fromkeys(indices, router), dict.fromkeys(indices, (none, none))
    with attach(model, config, layers, groups) as attached:
        yield attached


def _measure(model: PreTrainedModel, sequences: torch.Tensor, seed: int) -> tuple[float, float]:
    """Return perplexity on `sequences` and recall on copies of them that end in a repeated span."""
    generator = torch.Generator().manual_seed(seed)
    recalls = []
    for row in sequences:
        last_start = len(row) // 2 - RECALL_TOKENS
        start = int(torch.randint(0, max(last_start, 1), (1,), generator=generator))
        repeated = row.clone()
        repeated[-RECALL_TOKENS:] = row[start : start + RECALL_TOKENS]
        recalls.append(-prompt_logprobs(model, repeated)[-RECALL_TOKENS:].mean().item())
    losses = [-prompt_logprobs(model, row).mean().item() for row in sequences]
    return math.exp(sum(losses) / len(losses)), sum(recalls) / len(recalls)


def _pairs(attached: Mapping[int, HardMask], config: FocusConfig) -> tuple[float, float]:
    """Return the share of far pairs kept and the keys per query, over the last sequence that was run."""
    kept = far = keys = queries = 0
    for layer in attached.values():
        assert layer.query_groups is not None
        assert layer.key_groups is not None
        query_groups, key_groups = layer.query_groups[0], layer.key_groups[0]
        nobody = torch.zeros_like(key_groups)
        for start in range(0, len(query_groups), QUERY_CHUNK):
            chunk = query_groups[start : start + QUERY_CHUNK]
            num_keys = start + len(chunk)
            reads = int(focus_mask(chunk, key_groups[:num_keys], config, start).sum())
            always = int(focus_mask(chunk, nobody[:num_keys], config, start).sum())
            causal = len(chunk) * (start + num_keys + 1) // 2
            kept, far = kept + reads - always, far + causal - always
            keys, queries = keys + reads, queries + len(chunk)
    return kept / max(far, 1), keys / queries
