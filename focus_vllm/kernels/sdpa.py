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
    """`[num_slots, num_kv_heads, 2 * head_size]`: a token's keys and values side by side."""
    slots: torch.Tensor
    """`[seq_len]`, int64: the row of each position."""
    groups: torch.Tensor
    """`[seq_len]`: bitmask G of each position."""

    def take(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `[batch, num_kv_heads, num_keys, head_size]` at `[batch, num_keys]`."""
        rows = self.rows.index_select(0, self.slots[positions].view(-1))
        key, value = rows.view(*positions.shape, *self.rows.shape[1:]).transpose(1, 2).chunk(2, dim=-1)
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
    return _merge(near, near_lse, far, far_lse)[0], near_pairs + far_pairs


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
    positions = wanted.nonzero().view(1, -1)
    output, _ = attend(query[None], *keys.take(positions), scale, softcap)
    return output[0], positions.shape[1]


def _near(
    query: torch.Tensor, keys: PagedKeys, config: FocusConfig, scale: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Attend to the window and the sinks, all blocks in one call: a parallel region each would cost more."""
    seq_len, num_queries = len(keys.slots), len(query)
    first = seq_len - num_queries
    starts = torch.arange(first, seq_len, NEAR_BLOCK)[:, None]
    sinks = torch.arange(min(config.sink, seq_len)).expand(len(starts), -1)
    band = starts + torch.arange(-config.window, NEAR_BLOCK)
    j = torch.cat([sinks, band], dim=1)[:, None]
    i = (starts + torch.arange(NEAR_BLOCK))[:, :, None]
    in_band = (i - j <= config.window) & (j >= config.sink)
    in_band[..., : sinks.shape[1]] = True
    mask = in_band & (j <= i) & (i < seq_len)
    pairs = int(mask.sum())
    mask[..., 0] |= i[..., 0] >= seq_len  # the last block's padding attends to something, not to nothing
    key, value = (part.contiguous() for part in keys.take(j[:, 0].clamp(0, seq_len - 1)))
    blocks = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, len(starts) * NEAR_BLOCK - num_queries))
    output, lse = attend(
        blocks.view(len(starts), NEAR_BLOCK, *query.shape[1:]), key, value, scale, softcap, mask
    )
    return output.flatten(0, 1)[:num_queries], lse.flatten(0, 1)[:num_queries], pairs


def _far(
    query: torch.Tensor,
    query_groups: torch.Tensor,
    keys: PagedKeys,
    config: FocusConfig,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Attend to the keys that share a group, before the window and after the sinks."""
    first = len(keys.slots) - len(query)
    output = torch.zeros_like(query)
    lse = query.new_full(query.shape[:2], float("-inf"), dtype=torch.float32)
    pairs = 0
    for signature in torch.unique(query_groups):
        members = (keys.groups[config.sink :] & signature).nonzero().squeeze(1) + config.sink
        rows = (query_groups == signature).nonzero().squeeze(1)
        lengths = torch.searchsorted(members, rows + (first - config.window))
        rows, lengths = rows[lengths > 0], lengths[lengths > 0]
        if not len(rows):
            continue
        key, value = (part[0].contiguous() for part in keys.take(members[None, : lengths[-1]]))
        for block, seen in zip(torch.split(rows, FAR_BLOCK), torch.split(lengths, FAR_BLOCK), strict=True):
            part = _attend_to_prefixes(query[block], key, value, seen, scale, softcap)
            output[block], lse[block] = part
        pairs += int(lengths.sum())
    return output, lse, pairs


def _attend_to_prefixes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the first `seen` keys, `[num_queries]`, ascending from 1 on.

    What all queries see, nearly everything in a long context, needs no mask, which is costly to make.
    """
    shortest, longest = int(seen[0]), int(seen[-1])
    output, lse = attend(query[None], key[None, :, :shortest], value[None, :, :shortest], scale, softcap)
    rest = seen > shortest
    if longest > shortest:
        mask = torch.arange(shortest, longest) < seen[rest, None]
        key, value = key[None, :, shortest:longest], value[None, :, shortest:longest]
        tail, tail_lse = attend(query[None, rest], key, value, scale, softcap, mask[None])
        output[:, rest], lse[:, rest] = _merge(output[:, rest], lse[:, rest], tail, tail_lse)
    return output[0], lse[0]


def _merge(
    first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention over two disjoint sets of keys from attention over each."""
    share = torch.sigmoid(second_lse - first_lse)[..., None]
    merged = torch.lerp(first.float(), second.float(), share).to(first.dtype)
    return merged, torch.logaddexp(first_lse, second_lse)


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
        query: `[batch, num_queries, num_heads, head_size]`.
        key: `[batch, num_kv_heads, num_keys, head_size]`.
        value: `[batch, num_kv_heads, num_keys, head_size]`.
        scale: Factor on the scores.
        softcap: See `focus_sdpa`.
        mask: `[batch, num_queries, num_keys]`, bool, or None for all; each query needs one key.

    Returns:
        Output `[batch, num_queries, num_heads, head_size]` and float32 `[batch, num_queries, num_heads]`.
    """
    batch, num_queries, num_heads, head_size = query.shape
    num_kv_heads = key.shape[1]
    repeats = num_heads // num_kv_heads
    # A KV head's query heads become rows of one product, so that its keys are packed once.
    rows = query.view(batch, num_queries, num_kv_heads, repeats, head_size).permute(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, num_kv_heads, repeats * num_queries, head_size)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        bias = bias.repeat(1, repeats, 1)[:, None]
    output, lse = (
        _softcapped(rows, key, value, scale, softcap, bias)
        if softcap
        else torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, key, value, attn_mask=bias, scale=scale
        )
    )
    output = output.reshape(batch, num_kv_heads, repeats, num_queries, head_size).permute(0, 3, 1, 2, 4)
    lse = lse.reshape(batch, num_kv_heads, repeats, num_queries).permute(0, 3, 1, 2)
    return output.reshape(query.shape), lse.reshape(batch, num_queries, num_heads)


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
