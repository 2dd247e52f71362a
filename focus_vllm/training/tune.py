"""Which layers to leave dense, and which window: the best mask for a number of keys, from measured losses."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from focus_vllm.adapter import Adapter
from focus_vllm.config import FocusConfig
from focus_vllm.routing import Router
from focus_vllm.training.hf import attach

VERIFIED = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One configuration and what it loses."""

    window: int
    top_k: int
    dense_layers: tuple[int, ...]
    keys_per_query: float
    """Mean over positions and all layers that can be routed, dense ones included."""
    predicted: float
    """Sum over routed layers of the loss when that layer alone is routed, in nats per token."""
    measured: float | None = None
    """Divergence of the predictions from the dense model's, in nats per token; None if not measured."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What `tune` found."""

    adapter: Adapter
    """The given adapter with the best configuration; without the routers of dense layers."""
    choices: list[Choice]
    """Best first: the measured ones by their loss, then the others by prediction."""
    layer_losses: Mapping[tuple[int, int], Mapping[int, float]]
    """By window and top_k: the divergence when only that layer is routed, by layer."""


def tune(
    model: PreTrainedModel,
    adapter: Adapter,
    sequences: torch.Tensor,
    keys_per_query: float,
    windows: Sequence[int],
    top_ks: Sequence[int],
) -> Tuning:
    """Find the window, `top_k` and dense layers that lose least within a budget of keys.

    Each layer is routed alone, under each window and top_k, and the divergence of the model's predictions
    from the dense model's is measured. For each window and top_k, the layers that lose most stay dense, as
    many as the budget allows. The most promising configurations are then measured as a whole.

    Args:
        model: The adapter's base model.
        adapter: Routers for the layers to choose among.
        sequences: `[count, num_tokens]`, int64. Spans that repeat earlier text make retrieval count.
        keys_per_query: The target, in keys per query and layer at the sequences' length.
        windows: To choose from, in tokens.
        top_ks: To choose from.

    Raises:
        ValueError: No configuration is within the budget.
    """
    settings = [
        dataclasses.replace(adapter.config, window=window, top_k=top_k, dense_below=0, dense_layers=())
        for window, top_k in itertools.product(windows, top_ks)
    ]
    losses: dict[tuple[int, int], Mapping[int, float]] = {}
    choices: list[Choice] = []
    for config in settings:
        loss, keys = _layer_losses(model, config, adapter.layers, sequences)
        losses[config.window, config.top_k] = loss
        choices += _within_budget(config, loss, keys, sequences.shape[1], keys_per_query)
    if not choices:
        raise ValueError(
            f"no window in {list(windows)} with top_k in {list(top_ks)} reads {keys_per_query:g} keys "
            f"per query or fewer at {sequences.shape[1]} tokens"
        )
    choices.sort(key=lambda choice: choice.predicted)
    measured = [_measured(model, adapter, choice, sequences) for choice in choices[:VERIFIED]]
    measured.sort(key=lambda choice: choice.measured or 0.0)
    best = measured[0]
    config = dataclasses.replace(
        adapter.config, window=best.window, top_k=best.top_k, dense_layers=best.dense_layers
    )
    kept = {index: router for index, router in adapter.layers.items() if index not in best.dense_layers}
    record = {**adapter.training, "tuned_for_keys_per_query": keys_per_query}
    tuned = dataclasses.replace(adapter, config=config, layers=kept, training=record)
    return Tuning(adapter=tuned, choices=measured + choices[VERIFIED:], layer_losses=losses)


def _within_budget(
    config: FocusConfig, loss: Mapping[int, float], keys: Mapping[int, float], num_tokens: int, target: float
) -> Iterator[Choice]:
    """Leave the layers dense that lose most, as many as fit; at least one stays routed."""
    dense_keys = (num_tokens + 1) / 2
    by_loss = sorted(loss, key=lambda index: -loss[index])
    for count in range(len(by_loss) - 1, -1, -1):
        routed = by_loss[count:]
        mean = (sum(keys[index] for index in routed) + count * dense_keys) / len(by_loss)
        if mean <= target:
            yield Choice(
                window=config.window,
                top_k=config.top_k,
                dense_layers=tuple(sorted(by_loss[:count])),
                keys_per_query=mean,
                predicted=sum(loss[index] for index in routed),
            )
            return


def _layer_losses(
    model: PreTrainedModel, config: FocusConfig, layers: Mapping[int, Router], sequences: torch.Tensor
) -> tuple[dict[int, float], dict[int, float]]:
    """Return by layer the divergence when it alone is routed, and its keys per query."""
    losses = dict.fromkeys(layers, 0.0)
    keys = dict.fromkeys(layers, 0.0)
    for row in sequences:
        dense = _logprobs(model, row)
        for index, router in layers.items():
            with attach(model, config, {index: router}) as attached:
                losses[index] += _divergence(dense, _logprobs(model, row)) / len(sequences)
                kept, _, always = attached[index].pairs()
            keys[index] += (kept + always) / sequences.numel()
    return losses, keys


def _measured(model: PreTrainedModel, adapter: Adapter, choice: Choice, sequences: torch.Tensor) -> Choice:
    config = dataclasses.replace(
        adapter.config, window=choice.window, top_k=choice.top_k, dense_below=0, dense_layers=()
    )
    layers = {index: router for index, router in adapter.layers.items() if index not in choice.dense_layers}
    loss = 0.0
    for row in sequences:
        dense = _logprobs(model, row)
        with attach(model, config, layers):
            loss += _divergence(dense, _logprobs(model, row)) / len(sequences)
    return dataclasses.replace(choice, measured=loss)


@torch.no_grad()
def _logprobs(model: PreTrainedModel, row: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    logits: torch.Tensor = model(input_ids=row[None].to(device), use_cache=False).logits[0]
    return logits.float().log_softmax(dim=-1)


def _divergence(dense: torch.Tensor, other: torch.Tensor) -> float:
    """Kullback-Leibler divergence of `other` from `dense`, in nats per token."""
    return functional.kl_div(other, dense, reduction="batchmean", log_target=True).item()
