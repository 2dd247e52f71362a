"""Prefill: each list's slots in order of position, and each chunk's queries sorted by list.

A list holds the keys of one group, or of any of several groups: `plan.signatures`. Two launches over tiles
of keys and tiles of queries: one counts the members of every list in a tile, one places them behind the
counts of the tiles before it.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from focus_vllm.config import FocusConfig
from focus_vllm.kernels.launch import Launcher
from focus_vllm.kernels.plan import (
    BLOCK_QUERIES,
    EVERYTHING,
    FIELDS,
    KEY_TILE,
    QUERY_TILE,
    Far,
    PrefillPlan,
    far_mode,
    index_sizes,
    lists_per_query,
    padded_lists,
    signatures,
)

COUNT_ROWS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class GroupLists:
    """What FlashAttention needs to read a wave's far keys."""

    slots: torch.Tensor
    """`[num_segments * num_lists, max_keys]`, int32: each segment's slots by list."""
    counts: torch.Tensor
    """`[num_tiles, padded_lists]`, int32: members of each list in a tile of keys, then of queries."""
    cu_seqlens_q: torch.Tensor
    """`[num_blocks * num_lists + 1]`, int32: where each (block, list) starts among the sorted queries."""
    seqused_k: torch.Tensor
    """`[num_blocks * num_lists]`, int32: how much of its list each (block, list) reads."""
    row_of: torch.Tensor
    """`[num_tokens * lists_per_query]`, int32: the sorted rows of each of the batch's queries."""


@triton.jit
def key_members(groups, signatures, padded_lists: tl.constexpr):
    """Return `[num_keys, padded_lists]`: 1 where a list holds a key."""
    signature = tl.load(signatures + tl.arange(0, padded_lists))
    return ((groups.to(tl.int32)[:, None] & signature[None, :]) != 0).to(tl.int32)


@triton.jit
def query_members(groups, signatures, padded_lists: tl.constexpr, one_list: tl.constexpr):
    """Return `[num_queries, padded_lists]`: 1 where a query reads a list."""
    signature = tl.load(signatures + tl.arange(0, padded_lists))
    shared = groups.to(tl.int32)[:, None] & signature[None, :]
    member = (shared == signature[None, :]) & (signature != 0)[None, :] if one_list else shared != 0
    return member.to(tl.int32)


@triton.jit
def _key_tile(
    pid, key_tiles, segments, signatures, store, block_table, block_table_stride, block_size,
    fields: tl.constexpr, padded_lists: tl.constexpr, tile: tl.constexpr,
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
    member = key_members(tl.load(store + slot, mask=inside, other=0), signatures, padded_lists)
    return segment, first_tile, position, slot, tl.where(inside[:, None], member, 0)


@triton.jit
def _query_tile(
    tile_index, query_tiles, segments, signatures, query_groups,
    fields: tl.constexpr, padded_lists: tl.constexpr, one_list: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    segment = tl.load(query_tiles + tile_index)
    row = segments + segment * fields
    offset = (tile_index - tl.load(row + 5)) * tile
    index = offset + tl.arange(0, tile)
    token = tl.load(row + 1) + index
    inside = index < tl.load(row + 3)
    groups = tl.load(query_groups + token, mask=inside, other=0)
    member = query_members(groups, signatures, padded_lists, one_list)
    return segment, offset, token, tl.where(inside[:, None], member, 0)


@triton.jit
def sum_counts(counts, first, last, padded_lists: tl.constexpr, rows: tl.constexpr):
    group = tl.arange(0, padded_lists)
    total = tl.zeros([padded_lists], tl.int32)
    for start in range(first, last, rows):
        row = start + tl.arange(0, rows)
        at = counts + row[:, None] * padded_lists + group[None, :]
        total += tl.sum(tl.load(at, mask=row[:, None] < last, other=0), axis=0)
    return total


@triton.jit(do_not_specialize=["num_key_tiles", "block_table_stride"])
def _count_kernel(
    segments, key_tiles, query_tiles, num_key_tiles, signatures, store, query_groups,
    block_table, block_table_stride, block_size, counts,
    fields: tl.constexpr, padded_lists: tl.constexpr, one_list: tl.constexpr, key_tile: tl.constexpr,
    query_tile: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < num_key_tiles:
        keys = _key_tile(
            pid, key_tiles, segments, signatures, store, block_table, block_table_stride, block_size,
            fields, padded_lists, key_tile,
        )  # fmt: skip
        count = tl.sum(keys[4], axis=0)
    else:
        queries = _query_tile(
            pid - num_key_tiles, query_tiles, segments, signatures, query_groups,
            fields, padded_lists, one_list, query_tile,
        )  # fmt: skip
        count = tl.sum(queries[3], axis=0)
    tl.store(counts + pid * padded_lists + tl.arange(0, padded_lists), count)


@triton.jit
def _write_keys(
    pid, key_tiles, segments, signatures, store, block_table, block_table_stride, block_size,
    counts, lists, lists_stride, seqused_k, window,
    num_lists: tl.constexpr, whole_list: tl.constexpr, block_queries: tl.constexpr,
    fields: tl.constexpr, padded_lists: tl.constexpr, tile: tl.constexpr, count_rows: tl.constexpr,
):  # fmt: skip
    segment, first_tile, position, slot, member = _key_tile(
        pid, key_tiles, segments, signatures, store, block_table, block_table_stride, block_size,
        fields, padded_lists, tile,
    )  # fmt: skip
    group = tl.arange(0, padded_lists)
    before = sum_counts(counts, first_tile, pid, padded_lists, count_rows)
    rank = before[None, :] + tl.cumsum(member, axis=0) - member
    list_row = (segment * num_lists + group).to(tl.int64)
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
        tl.store(seqused_k + (first_block + block) * num_lists + group, used, mask=group < num_lists)


@triton.jit
def _write_queries(
    pid, query_tiles, num_key_tiles, segments, signatures, query_groups, counts, cu_seqlens_q, row_of,
    num_lists: tl.constexpr, copies: tl.constexpr, block_queries: tl.constexpr,
    fields: tl.constexpr, padded_lists: tl.constexpr, one_list: tl.constexpr, tile: tl.constexpr,
    count_rows: tl.constexpr,
):  # fmt: skip
    _, offset, token, member = _query_tile(
        pid - num_key_tiles, query_tiles, segments, signatures, query_groups,
        fields, padded_lists, one_list, tile,
    )  # fmt: skip
    row = segments + tl.load(query_tiles + pid - num_key_tiles) * fields
    num_queries = tl.load(row + 3)
    first_tile = num_key_tiles + tl.load(row + 5)
    block = offset // block_queries
    block_start = block * block_queries
    block_end = tl.minimum(block_start + block_queries, num_queries)
    low = first_tile + block_start // tile
    high = first_tile + tl.cdiv(block_end, tile)
    earlier = sum_counts(counts, low, pid, padded_lists, count_rows)
    total = earlier + sum_counts(counts, pid, high, padded_lists, count_rows)
    first_row = tl.load(row + 7) + block_start * copies
    start = first_row + tl.cumsum(total, axis=0) - total
    rank = (start + earlier)[None, :] + tl.cumsum(member, axis=0) - member
    nth = tl.cumsum(member, axis=1) - member
    at = row_of + token[:, None] * copies + nth
    tl.store(at, rank, mask=(member != 0) & (nth < copies))
    if pid == low:
        group = tl.arange(0, padded_lists)
        sequence = (tl.load(row + 6) + block) * num_lists + group
        # The next block writes the same number: its first sequence starts where this one's last ends.
        tl.store(cu_seqlens_q + sequence, start, mask=group < num_lists)
        tl.store(cu_seqlens_q + sequence + 1, start + total, mask=group == num_lists - 1)


@triton.jit(do_not_specialize=["num_key_tiles", "block_table_stride", "lists_stride"])
def _write_kernel(
    segments, key_tiles, query_tiles, num_key_tiles, signatures, store, query_groups,
    block_table, block_table_stride, block_size, counts,
    lists, lists_stride, cu_seqlens_q, seqused_k, row_of, window,
    num_lists: tl.constexpr, copies: tl.constexpr, whole_list: tl.constexpr, block_queries: tl.constexpr,
    fields: tl.constexpr, padded_lists: tl.constexpr, one_list: tl.constexpr, key_tile: tl.constexpr,
    query_tile: tl.constexpr, count_rows: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < num_key_tiles:
        _write_keys(
            pid, key_tiles, segments, signatures, store, block_table, block_table_stride, block_size,
            counts, lists, lists_stride, seqused_k, window,
            num_lists, whole_list, block_queries, fields, padded_lists, key_tile, count_rows,
        )  # fmt: skip
    else:
        _write_queries(
            pid, query_tiles, num_key_tiles, segments, signatures, query_groups, counts, cu_seqlens_q, row_of,
            num_lists, copies, block_queries, fields, padded_lists, one_list, query_tile, count_rows,
        )  # fmt: skip


@triton.jit
def _sort_kernel(
    query, query_stride, sorted_query, sorted_stride, row_of, segments, query_tiles, width,
    copies: tl.constexpr, fields: tl.constexpr, query_tile: tl.constexpr, tokens: tl.constexpr,
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
    for nth in tl.static_range(copies):
        to = tl.load(row_of + token * copies + nth, mask=inside, other=0).to(tl.int64)
        tl.store(sorted_query + to[:, None] * sorted_stride + column[None, :], q, mask=mask)


_launch_count = Launcher(_count_kernel)
_launch_write = Launcher(_write_kernel)
_launch_sort = Launcher(_sort_kernel)


def build_group_lists(
    plan: PrefillPlan,
    store: torch.Tensor,
    query_groups: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    config: FocusConfig,
    lists: torch.Tensor,
    index: torch.Tensor,
) -> GroupLists:
    """List every signature's slots for each of the wave's segments, and rank its queries by list.

    Args:
        plan: The wave.
        store: `[num_slots]`, G of every cached token, this step's too.
        query_groups: `[>= num_tokens]`, Q of this step's tokens.
        block_table: `[num_requests, max_num_blocks]`, int32.
        block_size: Slots per block.
        config: The mask's settings; its `far_mode` is not NOTHING.
        lists: Scratch, int32, of at least num_segments * num_lists * plan.max_keys entries.
        index: Scratch, int32, of `index_capacity`.

    Returns:
        The lists, all in the scratch buffers.
    """
    num_lists, copies = len(signatures(config)), lists_per_query(config)
    padded = padded_lists(num_lists)
    rows, tiles = plan.num_segments * num_lists, plan.num_key_tiles + plan.num_query_tiles
    sequences = plan.num_blocks * num_lists
    sizes = index_sizes(tiles, num_lists, sequences, plan.num_tokens * copies)
    counts, cu_seqlens_q, seqused_k, row_of = torch.split(index[: sum(sizes)], sizes)
    result = GroupLists(
        slots=lists[: rows * plan.max_keys].view(rows, plan.max_keys),
        counts=counts,
        cu_seqlens_q=cu_seqlens_q[: sequences + 1],
        seqused_k=seqused_k[:sequences],
        row_of=row_of,
    )
    work = (plan.segments, plan.key_tiles, plan.query_tiles, plan.num_key_tiles, plan.signatures)
    common = (*work, store, query_groups, block_table, block_table.stride(0), block_size, counts)
    one_list = config.key_k > 1
    tiling: dict[str, Any] = {"fields": FIELDS, "padded_lists": padded, "one_list": one_list}
    tiling |= {"key_tile": KEY_TILE, "query_tile": QUERY_TILE}
    _launch_count((tiles,), *common, **tiling)
    whole_list = far_mode(config) is Far.GROUP
    _launch_write(
        (tiles,),
        *common, result.slots, plan.max_keys, cu_seqlens_q, seqused_k, row_of, config.window,
        num_lists=num_lists, copies=copies, whole_list=whole_list,
        block_queries=EVERYTHING if whole_list else BLOCK_QUERIES,
        **tiling, count_rows=COUNT_ROWS, num_warps=4 if padded <= 8 else 8,
    )  # fmt: skip
    return result


def sort_queries(
    plan: PrefillPlan, query: torch.Tensor, lists: GroupLists, config: FocusConfig, scratch: torch.Tensor
) -> torch.Tensor:
    """Copy each query to its row of every list it reads.

    Args:
        plan: The wave.
        query: `[num_tokens, num_heads, head_size]`; heads contiguous.
        lists: From `build_group_lists`.
        config: The mask's settings.
        scratch: `[>= num_queries * lists_per_query, num_heads, head_size]`, the dtype of `query`.

    Returns:
        `[num_queries * lists_per_query, num_heads, head_size]`, in `scratch`.
    """
    copies = lists_per_query(config)
    result = scratch[: plan.num_queries * copies]
    width = query.shape[1] * query.shape[2]
    tokens, columns = 8, 1024
    _launch_sort(
        (plan.num_query_tiles * (QUERY_TILE // tokens), triton.cdiv(width, columns)),
        query, query.stride(0), result, result.stride(0), lists.row_of, plan.segments, plan.query_tiles,
        width, copies=copies, fields=FIELDS, query_tile=QUERY_TILE, tokens=tokens, columns=columns,
    )  # fmt: skip
    return result
