"""Prefill: each group's slots in order of position, and each chunk's queries sorted by group.

Two launches over tiles of keys and tiles of queries: one counts the members of every group in a tile, one
places them behind the counts of the tiles before it.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from focus_vllm.config import FocusConfig
from focus_vllm.kernels.plan import (
    BLOCK_QUERIES,
    EVERYTHING,
    FIELDS,
    KEY_TILE,
    QUERY_TILE,
    Far,
    PrefillPlan,
    far_mode,
)

COUNT_ROWS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class GroupLists:
    """What FlashAttention needs to read a wave's far keys."""

    slots: torch.Tensor
    """`[num_segments * num_groups, max_keys]`, int32: each segment's slots by group."""
    cu_seqlens_q: torch.Tensor
    """`[num_blocks * num_groups + 1]`, int32: where each (block, group) starts among the sorted queries."""
    seqused_k: torch.Tensor
    """`[num_blocks * num_groups]`, int32: how much of its list each (block, group) reads."""
    row_of: torch.Tensor
    """`[num_tokens * top_k]`, int32: the sorted rows of each of the batch's queries."""


@triton.jit
def _members(groups, padded_groups: tl.constexpr):
    group = tl.arange(0, padded_groups)
    return (groups.to(tl.int32)[:, None] >> group[None, :]) & 1


@triton.jit
def _key_tile(
    pid, key_tiles, segments, store, block_table, block_table_stride, block_size,
    fields: tl.constexpr, padded_groups: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    segment = tl.load(key_tiles + pid)
    row = segments + segment * fields
    request = tl.load(row).to(tl.int64)
    num_keys = tl.load(row + 2) + tl.load(row + 3)
    first_tile = tl.load(row + 4)
    position = (pid - first_tile) * tile + tl.arange(0, tile)
    inside = position < num_keys
    table = block_table + request * block_table_stride
    block = tl.load(table + position // block_size, mask=inside, other=0)
    slot = block * block_size + position % block_size
    member = _members(tl.load(store + slot, mask=inside, other=0), padded_groups)
    return segment, first_tile, position, slot, tl.where(inside[:, None], member, 0)


@triton.jit
def _query_tile(
    tile_index, query_tiles, segments, query_groups,
    fields: tl.constexpr, padded_groups: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    segment = tl.load(query_tiles + tile_index)
    row = segments + segment * fields
    offset = (tile_index - tl.load(row + 5)) * tile
    index = offset + tl.arange(0, tile)
    token = tl.load(row + 1) + index
    inside = index < tl.load(row + 3)
    member = _members(tl.load(query_groups + token, mask=inside, other=0), padded_groups)
    return segment, offset, token, tl.where(inside[:, None], member, 0)


@triton.jit
def _sum_counts(counts, first, last, padded_groups: tl.constexpr, rows: tl.constexpr):
    group = tl.arange(0, padded_groups)
    total = tl.zeros([padded_groups], tl.int32)
    for start in range(first, last, rows):
        row = start + tl.arange(0, rows)
        at = counts + row[:, None] * padded_groups + group[None, :]
        total += tl.sum(tl.load(at, mask=row[:, None] < last, other=0), axis=0)
    return total


@triton.jit
def _count_keys(
    pid, key_tiles, segments, store, block_table, block_table_stride, block_size,
    fields: tl.constexpr, padded_groups: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    _, _, _, _, member = _key_tile(
        pid,
        key_tiles,
        segments,
        store,
        block_table,
        block_table_stride,
        block_size,
        fields,
        padded_groups,
        tile,
    )
    return tl.sum(member, axis=0)


@triton.jit
def _count_queries(
    tile_index, query_tiles, segments, query_groups,
    fields: tl.constexpr, padded_groups: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    _, _, _, member = _query_tile(
        tile_index, query_tiles, segments, query_groups, fields, padded_groups, tile
    )
    return tl.sum(member, axis=0)


@triton.jit(do_not_specialize=["num_key_tiles", "block_table_stride"])
def _count_kernel(
    segments, key_tiles, query_tiles, num_key_tiles, store, query_groups,
    block_table, block_table_stride, block_size, counts,
    fields: tl.constexpr, padded_groups: tl.constexpr, key_tile: tl.constexpr, query_tile: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < num_key_tiles:
        count = _count_keys(
            pid, key_tiles, segments, store, block_table, block_table_stride, block_size,
            fields, padded_groups, key_tile,
        )  # fmt: skip
    else:
        count = _count_queries(
            pid - num_key_tiles, query_tiles, segments, query_groups, fields, padded_groups, query_tile
        )
    tl.store(counts + pid * padded_groups + tl.arange(0, padded_groups), count)


@triton.jit
def _write_keys(
    pid, key_tiles, segments, store, block_table, block_table_stride, block_size,
    counts, lists, lists_stride, seqused_k, window,
    num_groups: tl.constexpr, whole_list: tl.constexpr, block_queries: tl.constexpr,
    fields: tl.constexpr, padded_groups: tl.constexpr, tile: tl.constexpr, count_rows: tl.constexpr,
):  # fmt: skip
    segment, first_tile, position, slot, member = _key_tile(
        pid,
        key_tiles,
        segments,
        store,
        block_table,
        block_table_stride,
        block_size,
        fields,
        padded_groups,
        tile,
    )
    group = tl.arange(0, padded_groups)
    before = _sum_counts(counts, first_tile, pid, padded_groups, count_rows)
    rank = before[None, :] + tl.cumsum(member, axis=0) - member
    list_row = (segment * num_groups + group).to(tl.int64)
    at = lists + list_row[None, :] * lists_stride + rank
    tl.store(at, tl.broadcast_to(slot[:, None], member.shape), mask=member != 0)

    # A block reads what lies before `first_limit + block * block_queries`; the tile that this falls
    # into knows how many members that is.
    row = segments + segment * fields
    start = tl.load(row + 2)
    num_queries = tl.load(row + 3)
    first_block = tl.load(row + 6)
    first_limit = start + num_queries if whole_list else start - window
    tile_start = (pid - first_tile) * tile
    reach = tl.cdiv(tl.maximum(tile_start + tile - first_limit, 0), block_queries)
    high = tl.minimum(reach, tl.cdiv(num_queries, block_queries))
    low = tl.cdiv(tl.maximum(tile_start - first_limit, 0), block_queries)
    low = tl.where(pid == first_tile, 0, low)
    for block in range(low, high):
        limit = first_limit + block * block_queries
        used = before + tl.sum(tl.where((position < limit)[:, None], member, 0), axis=0)
        tl.store(seqused_k + (first_block + block) * num_groups + group, used, mask=group < num_groups)


@triton.jit
def _write_queries(
    pid, query_tiles, num_key_tiles, segments, query_groups, counts, cu_seqlens_q, row_of,
    num_groups: tl.constexpr, top_k: tl.constexpr, block_queries: tl.constexpr,
    fields: tl.constexpr, padded_groups: tl.constexpr, tile: tl.constexpr, count_rows: tl.constexpr,
):  # fmt: skip
    segment, offset, token, member = _query_tile(
        pid - num_key_tiles, query_tiles, segments, query_groups, fields, padded_groups, tile
    )
    row = segments + segment * fields
    num_queries = tl.load(row + 3)
    first_tile = num_key_tiles + tl.load(row + 5)
    block = offset // block_queries
    block_start = block * block_queries
    block_end = tl.minimum(block_start + block_queries, num_queries)
    low = first_tile + block_start // tile
    high = first_tile + tl.cdiv(block_end, tile)
    earlier = _sum_counts(counts, low, pid, padded_groups, count_rows)
    total = earlier + _sum_counts(counts, pid, high, padded_groups, count_rows)
    first_row = tl.load(row + 7) + block_start * top_k
    start = first_row + tl.cumsum(total, axis=0) - total
    rank = (start + earlier)[None, :] + tl.cumsum(member, axis=0) - member
    nth = tl.cumsum(member, axis=1) - member
    at = row_of + token[:, None] * top_k + nth
    tl.store(at, rank, mask=(member != 0) & (nth < top_k))
    if pid == low:
        group = tl.arange(0, padded_groups)
        sequence = (tl.load(row + 6) + block) * num_groups + group
        # The next block writes the same number: its first sequence starts where this one's last ends.
        tl.store(cu_seqlens_q + sequence, start, mask=group < num_groups)
        tl.store(cu_seqlens_q + sequence + 1, start + total, mask=group == num_groups - 1)


@triton.jit(do_not_specialize=["num_key_tiles", "block_table_stride", "lists_stride"])
def _write_kernel(
    segments, key_tiles, query_tiles, num_key_tiles, store, query_groups,
    block_table, block_table_stride, block_size, counts,
    lists, lists_stride, cu_seqlens_q, seqused_k, row_of, window,
    num_groups: tl.constexpr, top_k: tl.constexpr, whole_list: tl.constexpr, block_queries: tl.constexpr,
    fields: tl.constexpr, padded_groups: tl.constexpr, key_tile: tl.constexpr, query_tile: tl.constexpr,
    count_rows: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < num_key_tiles:
        _write_keys(
            pid, key_tiles, segments, store, block_table, block_table_stride, block_size,
            counts, lists, lists_stride, seqused_k, window,
            num_groups, whole_list, block_queries, fields, padded_groups, key_tile, count_rows,
        )  # fmt: skip
    else:
        _write_queries(
            pid, query_tiles, num_key_tiles, segments, query_groups, counts, cu_seqlens_q, row_of,
            num_groups, top_k, block_queries, fields, padded_groups, query_tile, count_rows,
        )  # fmt: skip


@triton.jit
def _sort_kernel(
    query, query_stride, sorted_query, sorted_stride, row_of, segments, query_tiles, width,
    top_k: tl.constexpr, fields: tl.constexpr, query_tile: tl.constexpr, tokens: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    per_tile: tl.constexpr = query_tile // tokens
    tile_index = tl.program_id(0) // per_tile
    row = segments + tl.load(query_tiles + tile_index) * fields
    offset = (tile_index - tl.load(row + 5)) * query_tile + tl.program_id(0) % per_tile * tokens
    index = offset + tl.arange(0, tokens)
    inside = index < tl.load(row + 3)
    token = (tl.load(row + 1) + index).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    mask = inside[:, None] & (column < width)[None, :]
    q = tl.load(query + token[:, None] * query_stride + column[None, :], mask=mask)
    for nth in tl.static_range(top_k):
        to = tl.load(row_of + token * top_k + nth, mask=inside, other=0).to(tl.int64)
        tl.store(sorted_query + to[:, None] * sorted_stride + column[None, :], q, mask=mask)


def build_group_lists(
    plan: PrefillPlan,
    store: torch.Tensor,
    query_groups: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    config: FocusConfig,
    lists: torch.Tensor,
) -> GroupLists:
    """List every group's slots for each of the wave's segments, and rank its queries by group.

    Args:
        plan: The wave.
        store: `[num_slots]`, G of every cached token, this step's too.
        query_groups: `[>= num_tokens]`, Q of this step's tokens.
        block_table: `[num_requests, max_num_blocks]`, int32.
        block_size: Slots per block.
        config: The mask's settings; key_k = 1.
        lists: Scratch, int32, of at least num_segments * num_groups * plan.max_keys entries.

    Returns:
        The lists; `slots` lies in `lists`.
    """
    groups = config.num_groups
    padded = max(2, triton.next_power_of_2(groups))
    rows = plan.num_segments * groups
    slots = lists.flatten()[: rows * plan.max_keys].view(rows, plan.max_keys)
    empty = slots.new_empty
    tiles = plan.num_key_tiles + plan.num_query_tiles
    counts = empty(tiles * padded)
    result = GroupLists(
        slots=slots,
        cu_seqlens_q=empty(plan.num_blocks * groups + 1),
        seqused_k=empty(plan.num_blocks * groups),
        row_of=empty(len(query_groups) * config.top_k),
    )
    work = (plan.segments, plan.key_tiles, plan.query_tiles, plan.num_key_tiles)
    common = (*work, store, query_groups, block_table, block_table.stride(0), block_size, counts)
    sizes = {"fields": FIELDS, "padded_groups": padded, "key_tile": KEY_TILE, "query_tile": QUERY_TILE}
    _count_kernel[(tiles,)](*common, **sizes, num_warps=4)
    whole_list = far_mode(config) is Far.GROUP
    _write_kernel[(tiles,)](
        *common, slots, plan.max_keys, result.cu_seqlens_q, result.seqused_k, result.row_of, config.window,
        num_groups=groups, top_k=config.top_k, whole_list=whole_list,
        block_queries=EVERYTHING if whole_list else BLOCK_QUERIES,
        **sizes, count_rows=COUNT_ROWS, num_warps=4 if padded <= 8 else 8,
    )  # fmt: skip
    return result


def sort_queries(
    plan: PrefillPlan, query: torch.Tensor, lists: GroupLists, config: FocusConfig, scratch: torch.Tensor
) -> torch.Tensor:
    """Copy each query to its row of every group it attends to.

    Args:
        plan: The wave.
        query: `[num_tokens, num_heads, head_size]`; heads contiguous.
        lists: From `build_group_lists`.
        config: The mask's settings.
        scratch: `[>= num_queries * top_k, num_heads, head_size]`, the dtype of `query`.

    Returns:
        `[num_queries * top_k, num_heads, head_size]`, in `scratch`.
    """
    result = scratch[: plan.num_queries * config.top_k]
    width = query.shape[1] * query.shape[2]
    tokens, columns = 8, 1024
    _sort_kernel[(plan.num_query_tiles * (QUERY_TILE // tokens), triton.cdiv(width, columns))](
        query, query.stride(0), result, result.stride(0), lists.row_of, plan.segments, plan.query_tiles,
        width, top_k=config.top_k, fields=FIELDS, query_tile=QUERY_TILE, tokens=tokens, columns=columns,
        num_warps=4,
    )  # fmt: skip
    return result
