"""Attention in training: soft membership of groups, so that centroids get gradients."""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from focus_vllm.config import FocusConfig
from focus_vllm.routing import Router, sinkhorn

MIN_GATE = 1e-6
# Queries at a time. On one core, demo-10m at 2,048 tokens trains at 2.7 s a step with 128 and at 3.8 s with
# 1024 (2026-11-24); a GPU wants few, large calls.
CPU_QUERIES, GPU_QUERIES = 128, 1024
# The published text leaves lambda open; at 10 a pair of one group is gated by 1.0 and one of two by 0.5.
PAPER_LAMBDA = 10.0
MASS_QUERIES = 512


@dataclasses.dataclass(slots=True)
class Gate(abc.ABC):
    """One layer in training. `dense_below` plays no part: every position learns to be routed."""

    config: FocusConfig
    projection: torch.Tensor
    """W_g, `[hidden_size, group_dim]`, float32, trained."""
    centroids: torch.Tensor
    """C, `[num_groups, group_dim]`, float32, trained."""
    query_centroids: torch.Tensor | None = None
    """What queries are compared with, `[num_groups, group_dim]`, trained; None takes `centroids`."""
    query_potential: torch.Tensor | None = None
    """Added to a query's scores (divided by the temperature), `[num_groups]`, trained; None likewise."""
    top_k: int = 1
    """Groups that a query attends to, softly."""
    sinkhorn_iterations: int = 10
    """0 gives a softmax."""
    sharpness: float = 1.0
    """What the scores are multiplied by."""
    dense: bool = False
    """Attend as the model itself does."""
    measures_mass: bool = False
    """Set `loss` while attending, besides."""
    loss: torch.Tensor | None = None
    """Of the last batch: minus the mean log of the attention that near pairs and the gate keep, over heads
    and some queries that have far keys. The attention is that of the layer's queries and keys, not gated."""
    scores: torch.Tensor | None = None
    """Of the last batch, divided by the temperature: `[batch, num_tokens, num_groups]`, float32."""
    query_scores: torch.Tensor | None = None
    """Likewise, with the queries' own centroids; None without."""
    imbalance: torch.Tensor | None = None
    """Of the last batch: how unevenly the groups share single sequences' keys, a scalar; 0 is evenly.

    Sinkhorn balances the batch, in which a group may hold all sequences of one kind, whole."""
    found: torch.Tensor | None = None
    """Sinkhorn's column potentials of the last batch, `[num_groups]`, float32."""
    start: torch.Tensor = dataclasses.field(init=False)
    """Where Sinkhorn begins, `[num_groups]`, float32: in training, the potentials of the step before.

    From zeros, ten iterations are not enough once scores differ by much: most tokens stay in one group, whose
    pairs no gate weakens, and nothing is learned."""

    def __post_init__(self) -> None:
        """Begin with zeros."""
        self.start = torch.zeros(len(self.centroids), device=self.centroids.device)

    def observe(self, hidden: torch.Tensor) -> None:
        """Score `hidden`'s tokens against the centroids."""
        with torch.autocast(hidden.device.type, enabled=False):
            projected = hidden.float() @ self.projection * (self.sharpness / self.config.temperature)
            self.scores = projected @ self.centroids.T
            if self.query_centroids is not None:
                self.query_scores = projected @ self.query_centroids.T

    @abc.abstractmethod
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float
    ) -> torch.Tensor:
        """Attend, in the dtype of `query`; the model itself attends so if `dense`."""

    def lost_mass(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        query_members: torch.Tensor,
        key_members: torch.Tensor,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        """Return `loss`, given all of `attend`'s queries and keys, and `memberships`."""
        num_tokens, device = query.shape[2], query.device
        # Queries without far keys have nothing to learn.
        rows = torch.arange(min(self.config.window + 1, num_tokens - 1), num_tokens, device=device)
        rows = rows[:: -(-len(rows) // MASS_QUERIES)]
        i, j = rows[:, None], torch.arange(num_tokens, device=device)[None, :]
        scores = attention_scores(query[:, :, rows], key, scale, softcap).float()
        weights = scores.masked_fill(j > i, float("-inf")).softmax(dim=-1)
        always = (i - j <= self.config.window) | (j < self.config.sink)
        gate = (query_members[:, rows] @ key_members.transpose(1, 2)).clamp(max=1.0)
        gate = gate.masked_fill(always, 1.0)
        return -(weights * gate[:, None]).sum(dim=-1).clamp_min(MIN_GATE).log().mean()

    def parameters(self) -> list[torch.Tensor]:
        """Return what is trained."""
        parts = self.projection, self.centroids, self.query_centroids, self.query_potential
        return [part for part in parts if part is not None]

    def router(self, potential: torch.Tensor, query_potential: torch.Tensor | None) -> Router:
        """Return what was learned as the adapter holds it, the sharpness being part of it."""
        queries = self.query_centroids
        return Router(
            self.projection.detach(),
            self.centroids.detach() * self.sharpness,
            potential,
            None if queries is None else queries.detach() * self.sharpness,
            query_potential,
        )

    def calibrated(
        self, scores: torch.Tensor, query_scores: torch.Tensor | None, iterations: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return potentials for a server, to which each token is all there is.

        Args:
            scores: `[num_tokens, num_groups]`, as `scores` of a text.
            query_scores: Likewise.
            iterations: Sinkhorn's.

        Returns:
            What to add to a key's scores, and to a query's; the second None with shared centroids.
        """
        mean = scores.mean(dim=0)
        potential = sinkhorn(scores - mean, iterations, self.start)[1] - mean
        if query_scores is None or self.query_potential is None:
            return potential - potential.mean(), None
        return potential - potential.mean(), self.query_potential * self.sharpness - query_scores.mean(dim=0)

    def memberships(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how much each token of the batch is in each group, as a query and as a key.

        Both `[batch, num_tokens, num_groups]`, float32; rows add up to `top_k` and to 1.
        """
        assert self.scores is not None
        # What all tokens have in common cancels in Sinkhorn's limit, so that nothing else keeps it within
        # bounds; and hidden states have much in common.
        scores = _centred(self.scores.flatten(0, 1))
        keys, potential = sinkhorn(scores, self.sinkhorn_iterations, self.start)
        self.found = potential.detach()
        shares = keys.view_as(self.scores).mean(dim=1)
        self.imbalance = len(potential) * shares.square().sum(dim=-1).mean() - 1
        scores = scores + potential
        if self.query_scores is not None and self.query_potential is not None:
            # Nothing balances queries: with balanced keys, the far pairs kept do not depend on them.
            scores = _centred(self.query_scores.flatten(0, 1)) + self.query_potential * self.sharpness
            queries = scores.softmax(dim=-1)
        else:
            queries = keys
        if self.top_k > 1:
            queries = soft_top_k(scores, self.top_k)
        return queries.view_as(self.scores), keys.view_as(self.scores)

    def near(self, num_queries: int, num_keys: int, start: int, device: torch.device) -> torch.Tensor:
        """Return which pairs attend whatever their groups, `[num_queries, num_keys]`."""
        i = torch.arange(start, start + num_queries, device=device)[:, None]
        j = torch.arange(num_keys, device=device)[None, :]
        return (j <= i) & ((i - j <= self.config.window) | (j < self.config.sink))


@dataclasses.dataclass(slots=True)
class BlockGate(Gate):
    """One that weakens far pairs, a block of queries at a time."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float
    ) -> torch.Tensor:
        """Attend with far pairs gated, in the dtype of `query`; memory grows with the length, not its square.

        Each block of queries is computed again in the backward pass.
        """
        key, value = repeat_heads(query, key, value)
        if self.dense:
            return causal_attention(query, key, value, scale, softcap)
        queries, keys = self.memberships()
        if self.measures_mass and torch.is_grad_enabled():
            self.loss = self.lost_mass(query.detach(), key.detach(), queries, keys, scale, softcap)
        size = CPU_QUERIES if query.device.type == "cpu" else GPU_QUERIES
        chunks = []
        for start in range(0, query.shape[2], size):
            stop = min(start + size, query.shape[2])
            parts = query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop]
            gates = queries[:, start:stop], keys[:, :stop]
            output: torch.Tensor = checkpoint(
                self._attend_chunk, *parts, *gates, start, scale, softcap, use_reentrant=False
            )
            chunks.append(output)
        return torch.cat(chunks, dim=2)

    @abc.abstractmethod
    def _attend_chunk(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_members: torch.Tensor,
        key_members: torch.Tensor,
        start: int,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        """Attend from one block of queries."""


@dataclasses.dataclass(slots=True)
class LogGate(BlockGate):
    """Far scores get log(q_i . g_j), near pairs and sinks attend as usual.

    As assignments sharpen, the gate tends to 0 for a key in one of the query's groups and to minus infinity
    for others: the mask with key_k = 1.
    """

    def _attend_chunk(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_members: torch.Tensor,
        key_members: torch.Tensor,
        start: int,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        bias = self.bias(query_members, key_members, start).to(query.dtype)[:, None]
        if not softcap:
            if bias.requires_grad and not query.requires_grad:
                # CUDA's SDPA keeps what its backward pass needs only if an input other than the mask has one.
                query = query.detach().requires_grad_()
            return functional.scaled_dot_product_attention(query, key, value, bias, scale=scale)
        scores = attention_scores(query, key, scale, softcap) + bias
        return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value

    def bias(self, query_members: torch.Tensor, key_members: torch.Tensor, start: int) -> torch.Tensor:
        """Return what is added to the scores of queries from position `start` on.

        Args:
            query_members: `[batch, num_queries, num_groups]`.
            key_members: `[batch, num_keys, num_groups]`, of all keys up to the last query.
            start: Position of the first query.

        Returns:
            `[batch, num_queries, num_keys]`, float32.
        """
        with torch.autocast(query_members.device.type, enabled=False):
            gate = (query_members @ key_members.transpose(1, 2)).clamp(MIN_GATE, 1.0).log()
        num_queries, num_keys = gate.shape[1:]
        future = _future(num_queries, num_keys, start, gate.device)
        near = self.near(num_queries, num_keys, start, gate.device)
        return gate.masked_fill(near, 0.0).masked_fill(future, float("-inf"))


@dataclasses.dataclass(slots=True)
class PaperGate(BlockGate):
    """The paper's equation 2: far scores are multiplied by sigmoid(lambda g_i . g_j)."""

    def _attend_chunk(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_members: torch.Tensor,
        key_members: torch.Tensor,
        start: int,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        with torch.autocast(query.device.type, enabled=False):
            gate = (PAPER_LAMBDA * (query_members @ key_members.transpose(1, 2))).sigmoid()
        size = *gate.shape[1:], start, gate.device
        scores = (
            attention_scores(query, key, scale, softcap) * gate.masked_fill(self.near(*size), 1.0)[:, None]
        )
        weights = scores.masked_fill(_future(*size), float("-inf")).softmax(dim=-1, dtype=torch.float32)
        return weights.to(value.dtype) @ value


@dataclasses.dataclass(slots=True)
class MassGate(Gate):
    """No backward pass through the model: keep the attention that the dense model pays."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float
    ) -> torch.Tensor:
        """Attend as the model does, and set `loss`."""
        key, value = repeat_heads(query, key, value)
        if not self.dense:
            members = self.memberships()
            self.loss = self.lost_mass(query.detach(), key.detach(), *members, scale, softcap)
        return causal_attention(query, key, value, scale, softcap)


GATES: dict[str, type[Gate]] = {"log-gate": LogGate, "paper": PaperGate, "mass": MassGate}


def soft_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Choose `k` groups softly: sigmoid(score - t), where t makes a row add up to `k`.

    Args:
        scores: `[..., num_groups]`, float32.
        k: Less than num_groups; with as many, everything is chosen.

    Returns:
        Of the same shape; with scores far apart, 1 for the `k` best groups and 0 for the others.
    """
    if k >= scores.shape[-1]:
        return torch.ones_like(scores)
    with torch.no_grad():
        low, high = scores.amin(-1, keepdim=True) - 20.0, scores.amax(-1, keepdim=True) + 20.0
        for _ in range(40):
            middle = (low + high) / 2
            too_many = (scores - middle).sigmoid().sum(-1, keepdim=True) > k
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        threshold = (low + high) / 2
        chosen = (scores - threshold).sigmoid()
        slope = chosen * (1 - chosen)
        share = slope / slope.sum(-1, keepdim=True).clamp_min(1e-12)
    # The threshold's gradient, by the implicit function theorem.
    moved = (share * (scores - scores.detach())).sum(-1, keepdim=True)
    return (scores - threshold - moved).sigmoid()


def repeat_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `key` and `value` with as many heads as `query`, `[batch, num_heads, num_tokens, head_size]`."""
    repeats = query.shape[1] // key.shape[1]
    return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Full causal attention; all three `[batch, num_heads, num_tokens, head_size]`."""
    if not softcap:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    future = _future(query.shape[2], key.shape[2], 0, query.device)
    scores = attention_scores(query, key, scale, softcap).masked_fill(future, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def attention_scores(query: torch.Tensor, key: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    """Return the scaled, softcapped scores, `[..., num_queries, num_keys]`."""
    scores = query @ key.transpose(-1, -2)
    return softcap * torch.tanh(scores * (scale / softcap)) if softcap else scores * scale


def _centred(scores: torch.Tensor) -> torch.Tensor:
    return scores - scores.mean(dim=0)


def _future(num_queries: int, num_keys: int, start: int, device: torch.device) -> torch.Tensor:
    i = torch.arange(start, start + num_queries, device=device)[:, None]
    return torch.arange(num_keys, device=device)[None, :] > i
