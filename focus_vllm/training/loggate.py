"""The log-gate objective: soft membership that tends to the mask that is served."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

from focus_vllm.config import FocusConfig
from focus_vllm.routing import sinkhorn

SINKHORN_ITERATIONS = 10
MIN_GATE = 1e-6


@dataclasses.dataclass(slots=True)
class LogGate:
    """One layer in training: far scores get log(g_i . g_j), near pairs and sinks attend as usual.

    g is the Sinkhorn assignment of the batch's tokens. As assignments sharpen, the gate tends to 0 for
    tokens that share a group and to minus infinity for the others: the mask with key_k = top_k = 1.
    `dense_below` plays no part: every position learns to be routed.
    """

    config: FocusConfig
    projection: torch.Tensor
    """W_g, `[hidden_size, group_dim]`, float32, trained."""
    centroids: torch.Tensor
    """C, `[num_groups, group_dim]`, float32, trained."""
    scores: torch.Tensor | None = None
    """Of the last batch, divided by the temperature: `[batch, num_tokens, num_groups]`, float32."""

    def observe(self, hidden: torch.Tensor) -> None:
        """Score `hidden`'s tokens against the centroids."""
        scores = hidden.float() @ self.projection @ self.centroids.T
        self.scores = scores / self.config.temperature

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float
    ) -> torch.Tensor:
        """Attend with the gate added to the scores, in the dtype of `query`."""
        bias = self._bias().to(query.dtype)[:, None]
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        if not softcap:
            if bias.requires_grad and not query.requires_grad:
                # CUDA's SDPA keeps what its backward pass needs only if an input other than the mask has one.
                query = query.detach().requires_grad_()
            return functional.scaled_dot_product_attention(query, key, value, bias, scale=scale)
        scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap)) + bias
        return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value

    def _bias(self) -> torch.Tensor:
        """What is added to the scores, `[batch, num_tokens, num_tokens]`, float32."""
        assert self.scores is not None
        batch, num_tokens, num_groups = self.scores.shape
        assignment, _ = sinkhorn(self.scores.reshape(-1, num_groups), SINKHORN_ITERATIONS)
        assignment = assignment.view(batch, num_tokens, num_groups)
        gate = (assignment @ assignment.transpose(1, 2)).clamp_min(MIN_GATE).log()
        i = torch.arange(num_tokens, device=gate.device)[:, None]
        j = torch.arange(num_tokens, device=gate.device)[None, :]
        near = (i - j <= self.config.window) | (j < self.config.sink)
        return gate.masked_fill(near, 0.0).masked_fill(j > i, float("-inf"))
