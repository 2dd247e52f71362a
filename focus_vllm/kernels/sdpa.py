"""Focus attention on the CPU, from PyTorch's scaled dot product attention.

The chunk's queries are cut into blocks. For a block that starts at position s, keys before
s - window (*far*) are decided by group membership alone, so the far keys of one query signature
are a prefix of that signature's list; the rest (*near*, and the sinks) gets the mask evaluated.
The two parts are disjoint and merge by their log-sum-exp.
"""

from __future__ import annotations

import dataclasses

import torch

from focus_vllm.config import FocusConfig
from focus_vllm.reference import visible

QUERY_BLOCK = 256


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
    near, near_lse, near_pairs = _near(query, query_groups, keys, config, scale, softcap)
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
    wanted = (keys.groups & query_groups).bool()
    wanted[: config.sink] = True
    wanted[max(0, len(wanted) - 1 - config.window) :] = True
    positions = wanted.nonzero().squeeze(1)
    key, value = keys.take(positions)
    return attend(query, key, value, scale, softcap)[0], len(positions)


def _near_begin(block_start: int, config: FocusConfig) -> int:
    """Return the first key, apart from the sinks, whose mask is evaluated for a block."""
    begin = block_start - config.window
    return begin if begin > config.sink else 0


def _near(
    query: torch.Tensor,
    query_groups: torch.Tensor,
    keys: PagedKeys,
    config: FocusConfig,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    seq_len, first = len(keys.row_ids), len(keys.row_ids) - len(query)
    output = torch.empty_like(query)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    pairs = 0
    for start in range(first, seq_len, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, seq_len)
        begin = _near_begin(start, config)
        positions = torch.arange(begin, end)
        if begin:
            positions = torch.cat([torch.arange(config.sink), positions])
        rows = slice(start - first, end - first)
        mask = visible(
            torch.arange(start, end)[:, None],
            positions[None, :],
            query_groups[rows][:, None],
            keys.groups[positions][None, :],
            config,
        )
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
    seq_len, first = len(keys.row_ids), len(keys.row_ids) - len(query)
    starts = torch.arange(first, seq_len, QUERY_BLOCK)
    begins = torch.tensor([_near_begin(start, config) for start in starts.tolist()])
    output = torch.zeros_like(query)
    lse = query.new_full(query.shape[:2], float("-inf"), dtype=torch.float32)
    pairs = 0
    last = int(begins[-1])
    if last == 0:
        return output, lse, 0
    for signature in query_groups.unique():
        members = (keys.groups[config.sink : last] & signature).nonzero().squeeze(1) + config.sink
        mine = (query_groups == signature).nonzero().squeeze(1)
        key, value = keys.take(members)
        cuts = [*torch.searchsorted(mine, starts - first).tolist(), len(mine)]
        counts = torch.searchsorted(members, begins).tolist()
        for low, high, count in zip(cuts[:-1], cuts[1:], counts, strict=True):
            if high == low or count == 0:
                continue
            rows = mine[low:high]
            output[rows], lse[rows] = attend(
                query[rows], key[:, :count], value[:, :count], scale, softcap
            )
            pairs += (high - low) * count
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
    num_kv_heads, num_keys, _ = key.shape
    repeats = num_heads // num_kv_heads
    grouped = query.view(num_queries, num_kv_heads, repeats, head_size).permute(1, 2, 0, 3)
    key = key[:, None].expand(num_kv_heads, repeats, num_keys, head_size)
    value = value[:, None].expand(num_kv_heads, repeats, num_keys, head_size)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    output, lse = (
        _softcapped(grouped, key, value, scale, softcap, bias)
        if softcap
        else torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            grouped, key, value, attn_mask=None if bias is None else bias[None, None], scale=scale
        )
    )
    return output.permute(2, 0, 1, 3).reshape(query.shape), lse.permute(2, 0, 1).reshape(
        num_queries, num_heads
    )


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

