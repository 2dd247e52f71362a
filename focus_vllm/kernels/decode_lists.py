"""Decode: the slots that each request's next token attends to, listed on the device.

A list is the sinks, then the far tokens that share a group, then the window, each in order of position.
Only the far part has to be searched: every program counts its share of it, then writes it behind the
counts of the programs before it. Grid and buffers depend on the batch size and the longest possible
request alone, so both launches can be captured in a CUDA graph and replayed as requests grow.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from focus_vllm.config import FocusConfig

# One H200, 2026-11-22, both launches, 1 x 8K / 1 x 128K / 8 x 128K / 32 x 8K: 5.3 / 6.9 / 10.2 / 5.9 us; with
# 1024 and 512 6.3 / 6.4 / 10.8 / 6.9 us, with 2048 and 512 8.3 / 8.6 / 10.6 / 8.9 us.
TILE = 512
PROGRAMS = 1024
"""Programs per launch to aim for."""
NO_BUDGET = 2**30


@triton.jit
def _far_range(seq_lens, row, dense_below, window):
    num_keys = tl.load(seq_lens + row)
    position = num_keys - 1
    window_start = tl.where(position < dense_below, 0, tl.maximum(position - window, 0))
    return num_keys, window_start


@triton.jit
def _share(window_start, sink, part, parts: tl.constexpr, tile: tl.constexpr):
    tiles = tl.cdiv(tl.maximum(window_start - sink, 0), tile)
    each = tl.cdiv(tiles, parts) * tile
    start = sink + part * each
    return start, tl.minimum(start + each, window_start)


@triton.jit
def _slots(block_table, position, inside, block_size):
    block = tl.load(block_table + position // block_size, mask=inside, other=0)
    return block * block_size + position % block_size


@triton.jit(do_not_specialize=["block_table_stride"])
def _count_kernel(
    slot_mapping,
    key_groups,
    store,
    query_groups,
    block_table,
    block_table_stride,
    block_size,
    seq_lens,
    counts,
    dense_below,
    window,
    sink,
    parts: tl.constexpr,
    tile: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    _, window_start = _far_range(seq_lens, row, dense_below, window)
    start, stop = _share(window_start, sink, part, parts, tile)
    wanted = tl.load(query_groups + row).to(tl.int32)
    table = block_table + row.to(tl.int64) * block_table_stride
    count = tl.zeros([tile], tl.int32)
    for first in range(start, stop, tile):
        position = first + tl.arange(0, tile)
        slot = _slots(table, position, position < stop, block_size)
        groups = tl.load(store + slot, mask=position < stop, other=0).to(tl.int32)
        count += ((groups & wanted) != 0).to(tl.int32)
    tl.store(counts + row * parts + part, tl.sum(count, axis=0))
    if part == 0:
        # The new token is in its own window, so this launch does not read what it stores.
        slot = tl.load(slot_mapping + row)
        tl.store(store + slot, tl.load(key_groups + row), mask=slot >= 0)


@triton.jit(do_not_specialize=["block_table_stride", "lists_stride", "budget"])
def _write_kernel(
    store,
    query_groups,
    block_table,
    block_table_stride,
    block_size,
    seq_lens,
    counts,
    lists,
    lists_stride,
    list_lens,
    dense_below,
    window,
    sink,
    budget,
    parts: tl.constexpr,
    tile: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    num_keys, window_start = _far_range(seq_lens, row, dense_below, window)
    start, stop = _share(window_start, sink, part, parts, tile)
    wanted = tl.load(query_groups + row).to(tl.int32)
    table = block_table + row.to(tl.int64) * block_table_stride
    out = lists + row.to(tl.int64) * lists_stride

    each = tl.arange(0, parts)
    count = tl.load(counts + row * parts + each)
    rank = tl.sum(tl.where(each < part, count, 0), axis=0)
    total = tl.sum(count, axis=0)
    dropped = tl.maximum(total - budget, 0)
    num_sinks = tl.minimum(sink, window_start)
    far_start = num_sinks - dropped
    window_out = num_sinks + total - dropped

    lane = tl.arange(0, tile)
    for first in range(start, stop, tile):
        position = first + lane
        slot = _slots(table, position, position < stop, block_size)
        groups = tl.load(store + slot, mask=position < stop, other=0).to(tl.int32)
        member = ((groups & wanted) != 0).to(tl.int32)
        index = rank + tl.cumsum(member, axis=0) - member
        tl.store(out + far_start + index, slot, mask=(member != 0) & (index >= dropped))
        rank += tl.sum(member, axis=0)
    for first in range(window_start + part * tile, num_keys, parts * tile):
        position = first + lane
        slot = _slots(table, position, position < num_keys, block_size)
        tl.store(out + window_out + position - window_start, slot, mask=position < num_keys)
    if part == 0:
        for first in range(0, num_sinks, tile):
            position = first + lane
            slot = _slots(table, position, position < num_sinks, block_size)
            tl.store(out + position, slot, mask=position < num_sinks)
        tl.store(list_lens + row, window_out + num_keys - window_start)


def decode_parts(num_requests: int) -> int:
    """Return among how many programs each request's context is divided."""
    parts: int = triton.next_power_of_2(triton.cdiv(PROGRAMS, num_requests))
    return min(128, max(4, parts))


def build_decode_lists(
    slot_mapping: torch.Tensor,
    key_groups: torch.Tensor,
    store: torch.Tensor,
    query_groups: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    seq_lens: torch.Tensor,
    config: FocusConfig,
    counts: torch.Tensor,
    lists: torch.Tensor,
    list_lens: torch.Tensor,
    budget: int = NO_BUDGET,
) -> None:
    """Store the groups of each request's last token and list the slots that it attends to.

    Args:
        slot_mapping: `[>= num_requests]`, int64, the last tokens' slots; -1 marks padding.
        key_groups: `[>= num_requests]`, G of the last tokens.
        store: `[num_slots]`, G of every cached token; the last tokens' are written.
        query_groups: `[>= num_requests]`, Q of the requests' last tokens.
        block_table: `[num_requests, max_num_blocks]`, int32.
        block_size: Slots per block.
        seq_lens: `[num_requests]`, int32, the last token included; 0 marks padding.
        config: The mask's settings.
        counts: `[>= num_requests * decode_parts(num_requests)]`, int32 scratch.
        lists: `[num_requests, max_model_len]`, int32; receives the slots.
        list_lens: `[num_requests]`, int32; receives how many.
        budget: Most far tokens to keep; the latest are kept.
    """
    num_requests = len(list_lens)
    parts = decode_parts(num_requests)
    common = (store, query_groups, block_table, block_table.stride(0), block_size, seq_lens, counts)
    mask = (config.dense_below, config.window, config.sink)
    grid = (num_requests, parts)
    _count_kernel[grid](slot_mapping, key_groups, *common, *mask, parts=parts, tile=TILE, num_warps=4)
    _write_kernel[grid](
        *common, lists, lists.stride(0), list_lens, *mask, budget, parts=parts, tile=TILE, num_warps=4
    )
