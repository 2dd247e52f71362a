"""From hidden states to groups: the one definition that training and serving share."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Router:
    """What one layer learned."""

    projection: torch.Tensor
    """W_g, `[hidden_size, group_dim]`."""
    centroids: torch.Tensor
    """C, `[num_groups, group_dim]`."""
    potential: torch.Tensor
    """log v, `[num_groups]`: Sinkhorn's column potentials, frozen after training."""
    query_centroids: torch.Tensor | None = None
    """What a token is compared with as a query, `[num_groups, group_dim]`; None takes `centroids`."""
    query_potential: torch.Tensor | None = None
    """Added for queries, `[num_groups]`; None with and only with `query_centroids`."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that there are, by field name."""
        named = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}

    def fold(self, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layer as one matrix product: weight `[num_groups, hidden_size]` and bias `[num_groups]`.

        Both float32. `weight @ h + bias` ranks a token's groups as Sinkhorn's limit does. With query
        centroids, the two have a leading dimension of 2: for keys, then for queries.
        """
        weight = self.centroids.float() @ self.projection.float().T / temperature
        bias = self.potential.float()
        if self.query_centroids is not None and self.query_potential is not None:
            queries = self.query_centroids.float() @ self.projection.float().T / temperature
            weight, bias = torch.stack([weight, queries]), torch.stack([bias, self.query_potential.float()])
        return weight.contiguous(), bias.contiguous()


def mask_dtype(num_groups: int) -> torch.dtype:
    """Return the narrowest integer dtype that holds a bitmask of `num_groups` bits."""
    if num_groups <= 8:
        return torch.uint8
    return torch.int16 if num_groups <= 16 else torch.int32


def top_groups(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return the bitmask of each token's `k` best groups; ties go to the lower group.

    Args:
        scores: `[num_tokens, num_groups]`.
        k: How many groups, 1 to num_groups.

    Returns:
        `[num_tokens]` in `mask_dtype(num_groups)`.
    """
    bit = _bits(scores.shape[-1], scores.device)
    best = scores.argmax(dim=-1, keepdim=True)  # the first of equals
    groups = bit[best[..., 0]]
    for _ in range(k - 1):
        scores = scores.scatter(-1, best, float("-inf"))
        best = scores.argmax(dim=-1, keepdim=True)
        groups = groups | bit[best[..., 0]]
    return groups


@functools.cache
def _bits(num_groups: int, device: torch.device) -> torch.Tensor:
    return (1 << torch.arange(num_groups, device=device)).to(mask_dtype(num_groups))


def route(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, key_k: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's groups from its hidden state alone.

    Args:
        hidden: `[num_tokens, hidden_size]`, the input of the layer's QKV projection, any float dtype.
        weight: `[num_groups, hidden_size]` or `[2, num_groups, hidden_size]`, float32, from `Router.fold`.
        bias: `[num_groups]` or `[2, num_groups]`, float32.
        key_k: Groups per token as a key.
        top_k: Groups per token as a query.

    Returns:
        Bitmasks `(key_groups, query_groups)`, each `[num_tokens]` in `mask_dtype(num_groups)`.
    """
    hidden = hidden.float()
    if bias.dim() == 2:
        keys, queries = (torch.nn.functional.linear(hidden, *part) for part in zip(weight, bias, strict=True))
        return top_groups(keys, key_k), top_groups(queries, top_k)
    scores = torch.nn.functional.linear(hidden, weight, bias)
    key_groups = top_groups(scores, key_k)
    return key_groups, key_groups if top_k == key_k else top_groups(scores, top_k)


def sinkhorn(
    scores: torch.Tensor, iterations: int = 10, start: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced soft assignment of tokens to groups, in log space (arXiv 2604.03260, section 3).

    Each iteration divides by the sums over tokens, then by the sums over groups.

    Args:
        scores: `[..., num_tokens, num_groups]`, already divided by the temperature.
        iterations: 10 are enough while scores are of one order of magnitude; 3 are too few.
        start: Column potentials to begin with, `[..., num_groups]`; None: zeros.

    Returns:
        Assignments of the shape of `scores`, each row summing to 1, and the column potentials
        log v `[..., num_groups]`: the assignment is softmax(scores + log v) per token.
    """
    log_num_tokens = math.log(scores.shape[-2])
    potential = torch.zeros_like(scores[..., 0, :]) if start is None else start
    log_q = (scores + potential[..., None, :]).log_softmax(dim=-1)
    for _ in range(iterations):
        column = log_q.logsumexp(dim=-2) - log_num_tokens
        potential = potential - column
        log_q = (scores + potential[..., None, :]).log_softmax(dim=-1)
    return log_q.exp(), potential
