"""Focus attention on the CPU, from PyTorch's scaled dot product attention.

A query's pairs are of two kinds. *Near* ones, within the window or with a sink, do not depend on groups:
blocks of consecutive queries attend under a band. *Far* ones depend on groups alone, so queries with the
same signature share one list of keys and differ only in how long a prefix of it they see. The two kinds are
disjoint and merge by their log-sum-exp.
"""

from __future__ import annotations

import dataclasses

import torch

from focus_vllm.config import FocusConfig

# Short blocks waste time packing keys, long ones on pairs that the mask then removes. Of 128, 256 and 512,
# these were best at 32K tokens, 8 heads of 32, window 512 (Xeon with AMX, one thread, 2026-11-22).
NEAR_BLOCK = 128
FAR_BLOCK = 256


@dataclasses.dataclass(frozen=True, slots=True)
class PagedKeys:
    """One sequence's keys and values, wherever they are in a paged cache."""

    rows: torch.Tensor
    """`[num_rows, num_kv_heads, 2 * head_size]`: a token's keys and values side by side."""
    row_ids: torch.Tensor
    """`[seq_len]`, int64: the row of each position."""
    groups: torch.Tensor
    """`[seq_len]`: bitmask G of each position."""

    def take(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `[num_kv_heads, len(positions), head_size]`."""
        rows = self.rows.index_select(0, self.row_ids[positions]).transpose(0, 1)
        key, value = rows.chunk(2, dim=-1)
        return key, value


def focus_sdpa(
    query: torch.Tensor,
    query_groups: torch.Tensor,
    keys: PagedKeys,
    config: FocusConfig,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, int]:
    """Focus attention of one sequence's last `len(query)` tokens, all at or above `dense_below`.

    Args:
        query: `[num_queries, num_heads, head_size]`.
        query_groups: `[num_queries]`, bitmask Q.
        keys: The whole sequence, the queries' own tokens included.
        config: The mask's settings.
        scale: Factor on the scores.
        softcap: Scores become softcap * tanh(score / softcap); 0 leaves them.

    Returns:
        The output, of the shape and dtype of `query`, and how many (query, key) pairs it read.
    """
    if len(query) == 1:
        return _decode(query, query_groups, keys, config, scale, softcap)
    near, near_lse, near_pairs = _near(query, keys, config, scale, softcap)
    far, far_lse, far_pairs = _far(query, query_groups, keys, config, scale, softcap)
    if far_pairs == 0:
        return near, near_pairs
    share = torch.sigmoid(far_lse - near_lse)[..., None]
    return torch.lerp(near.float(), far.float(), share).to(query.dtype), near_pairs + far_pairs


def _decode(
    query: torch.Tensor,
    query_groups: torch.Tensor,
    keys: PagedKeys,
    config: FocusConfig,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, int]:
    wanted = keys.groups & query_groups
    wanted[: config.sink] = 1
    wanted[max(0, len(wanted) - 1 - config.window) :] = 1
    positions = wanted.nonzero().squeeze(1)
    key, value = keys.take(positions)
    return attend(query, key, value, scale, softcap)[0], len(positions)


def _near(
    query: torch.Tensor, keys: PagedKeys, config: FocusConfig, scale: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Attend to the window and the sinks."""
    seq_len, first = len(keys.row_ids), len(keys.row_ids) - len(query)
    output = torch.empty_like(query)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    pairs = 0
    for start in range(first, seq_len, NEAR_BLOCK):
        end = min(start + NEAR_BLOCK, seq_len)
        sinks = min(config.sink, end)
        positions = torch.arange(max(start - config.window, sinks), end)
        positions = torch.cat([torch.arange(sinks), positions])
        distance = torch.arange(start, end)[:, None] - positions
        mask = (distance >= 0) & ((distance <= config.window) | (positions < config.sink))
        rows = slice(start - first, end - first)
        key, value = keys.take(positions)
        output[rows], lse[rows] = attend(query[rows], key, value, scale, softcap, mask)
        pairs += int(mask.sum())
    return output, lse, pairs


def _far(
    query: torch.Tensor,
    query_groups: torch.Tensor,
    keys: PagedKeys,
    config: FocusConfig,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Attend to the keys that share a group, before the window and after the sinks."""
    first = len(keys.row_ids) - len(query)
    output = torch.zeros_like(query)
    lse = query.new_full(query.shape[:2], float("-inf"), dtype=torch.float32)
    pairs = 0
    for signature in query_groups.unique():
        members = (keys.groups[config.sink :] & signature).nonzero().squeeze(1) + config.sink
        rows = (query_groups == signature).nonzero().squeeze(1)
        lengths = torch.searchsorted(members, rows + (first - config.window))
        rows, lengths = rows[lengths > 0], lengths[lengths > 0]
        if not len(rows):
            continue
        key, value = keys.take(members[: lengths[-1]])
        for block, seen in zip(rows.split(FAR_BLOCK), lengths.split(FAR_BLOCK), strict=True):
            longest = int(seen[-1])
            mask = torch.arange(longest) < seen[:, None]
            output[block], lse[block] = attend(
                query[block], key[:, :longest], value[:, :longest], scale, softcap, mask
            )
        pairs += int(lengths.sum())
    return output, lse, pairs


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with log-sum-exp, every head of a KV group reading the same keys.

    Args:
        query: `[num_queries, num_heads, head_size]`.
        key: `[num_kv_heads, num_keys, head_size]`.
        value: `[num_kv_heads, num_keys, head_size]`.
        scale: Factor on the scores.
        softcap: See `focus_sdpa`.
        mask: `[num_queries, num_keys]`, bool, or None for all; each query needs one key.

    Returns:
        Output `[num_queries, num_heads, head_size]` and float32 `[num_queries, num_heads]`.
    """
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = len(key)
    repeats = num_heads // num_kv_heads
    # A KV head's query heads become rows of one product, so that its keys are packed once.
    rows = query.view(num_queries, num_kv_heads, repeats, head_size).permute(1, 2, 0, 3)
    rows = rows.reshape(1, num_kv_heads, repeats * num_queries, head_size)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf")).repeat(repeats, 1)
    output, lse = (
        _softcapped(rows, key[None], value[None], scale, softcap, bias)
        if softcap
        else torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, key[None], value[None], attn_mask=None if bias is None else bias[None, None], scale=scale
        )
    )
    output = output.reshape(num_kv_heads, repeats, num_queries, head_size).permute(2, 0, 1, 3)
    lse = lse.view(num_kv_heads, repeats, num_queries).permute(2, 0, 1)
    return output.reshape(query.shape), lse.reshape(num_queries, num_heads)


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with a soft cap on the scores, which PyTorch's CPU kernel lacks."""
    scores = softcap * torch.tanh(torch.matmul(query, key.mT).float() * (scale / softcap))
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(dim=-1)
    weights = torch.exp(scores - lse[..., None]).to(value.dtype)
    return torch.matmul(weights, value), lse

