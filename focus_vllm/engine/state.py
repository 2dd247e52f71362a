"""What the engine keeps for Focus besides the KV cache."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from focus_vllm.config import FocusConfig

if TYPE_CHECKING:
    from focus_vllm.engine.deferred import DeferredRouting


@dataclasses.dataclass(slots=True)
class AttentionCounts:
    """(query, key) pairs, summed over routed layers and queries, since the engine started."""

    candidate_tokens: dict[str, int] = dataclasses.field(default_factory=lambda: {"prefill": 0, "decode": 0})
    """Pairs that dense attention reads."""
    selected_tokens: dict[str, int] = dataclasses.field(default_factory=lambda: {"prefill": 0, "decode": 0})
    """Pairs that Focus read."""
    dense_queries: dict[str, int] = dataclasses.field(default_factory=lambda: {"prefill": 0, "decode": 0})
    """Queries, not pairs, below `dense_below`, which attend densely; on a GPU they are not counted."""
    totals: torch.Tensor | None = None
    """`[4]`, int64, on a GPU: pairs that kernels counted, candidates and selected of prefill, of decode."""

    def add(self, phase: str, candidate: int, selected: int) -> None:
        """Count one layer's work on some queries; `phase` is "prefill" or "decode"."""
        self.candidate_tokens[phase] += candidate
        self.selected_tokens[phase] += selected

    def read(self) -> dict[str, dict[str, int]]:
        """Return the three fields, with what the kernels have counted up to now; waits for no kernel."""
        counts = [0] * 4 if self.totals is None else _peek(self.totals)
        return {"dense_queries": dict(self.dense_queries)} | {
            name: {phase: pairs[phase] + counts[2 * number + offset] for number, phase in enumerate(pairs)}
            for offset, (name, pairs) in enumerate(
                (("candidate_tokens", self.candidate_tokens), ("selected_tokens", self.selected_tokens))
            )
        }


def _peek(tensor: torch.Tensor) -> list[int]:
    """Read a tensor beside the stream whose kernels write it."""
    if not tensor.is_cuda:
        return tensor.tolist()
    stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        return tensor.tolist()


@dataclasses.dataclass(slots=True)
class LayerFocus:
    """One routed layer; the attention implementation of that layer holds it as `impl.focus`."""

    config: FocusConfig
    weight: torch.Tensor
    """`[num_groups, hidden_size]`, float32, from `Router.fold`."""
    bias: torch.Tensor
    """`[num_groups]`, float32."""
    key_groups: torch.Tensor
    """`[max_num_batched_tokens]`: G of this step's tokens, as routed. A CPU has one for all layers."""
    query_groups: torch.Tensor
    """`[max_num_batched_tokens]`: Q of this step's tokens; one buffer for all layers."""
    counts: AttentionCounts
    """One object for all layers."""
    store: torch.Tensor | None = None
    """`[num_slots]`: G of every cached token, at the slot of its key and value."""
    address: torch.Tensor | None = None
    """`[1, 2]`, int64, on a GPU: where `store` and `key_groups` begin."""
    block_size: int = 0
    """Slots per block, on a GPU, as soon as there is a cache."""
    deferred: DeferredRouting | None = None
    """Takes the tokens that can be routed later, on a CPU."""
    deferred_row: int = 0
    """This layer's number in `deferred`."""


@dataclasses.dataclass(frozen=True, slots=True)
class FocusState:
    """All of Focus in one worker; the model holds it as `model.focus`."""

    adapter: str
    """Path of the adapter file."""
    sha256: str
    """Of the adapter file."""
    base_model: str
    config: FocusConfig
    layers: dict[int, LayerFocus]
    dense_layers: list[int]
    """Attention layers that Focus leaves to vLLM."""
    counts: AttentionCounts
