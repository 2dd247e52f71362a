"""Decode: the slots that each query attends to, listed on the device in one launch.

A list is the sinks and the window in order of position, then the far tokens that share a group, latest first.
Only the far part has to be searched. Its programs each count a share of it, the latest tokens first, publish
the count, wait for those of the programs before them, and write behind these. A program waits only for
programs of lower number, which the hardware starts earlier, so the wait ends whatever the grid's size.
Grid and buffers depend on the batch size and the longest possible request alone, so the launch can be
captured in a CUDA graph and replayed as requests grow. Right behind routing it may begin while that runs
(CUDA's programmatic dependent launch) and waits for the groups only after it has loaded what else it needs.

A request has one query, or several where it verifies drafts or is a short turn behind a cached prompt;
each query has a list of its own.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from focus_vllm.config import FocusConfig
from focus_vllm.kernels.launch import Launcher, launches_early

TILE = 512
PROGRAMS = 1024
"""Programs to aim for."""
MOST_PARTS = 256
"""Programs that a query's context is divided among at most.

One H200, 2026-11-25: with 256, routing and lists of one request of 512K take 21 us where with 128 they took
29, and of up to 128K none longer. More programs wait longer for each other.
"""
NO_BUDGET = 2**30


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far the programs of a launch are; all zeros between launches."""

    counts: torch.Tensor
    """`[progress_size]`, int32: one more than each program's count, once it is known."""
    done: torch.Tensor
    """`[num_queries]`, int32: programs that need no more counts."""

    @classmethod
    def zeros(cls, num_queries: int, device: torch.device) -> Progress:
        """Return what launches of up to `num_queries` queries need."""
        size = max(2 * PROGRAMS, 4 * num_queries)
        buffer = torch.zeros(size + num_queries, dtype=torch.int32, device=device)
        return cls(buffer[:size], buffer[size:])


@triton.jit
def _slots(block_table, position, inside, block_size):
    block = tl.load(block_table + position // block_size, mask=inside, other=0)
    return block * block_size + position % block_size


@triton.jit
def _groups_at(store, table, position, stop, block_size):
    inside = position < stop
    slot = _slots(table, position, inside, block_size)
    return slot, tl.load(store + slot, mask=inside, other=0).to(tl.int32)


@triton.jit
def _members(groups, wanted):
    return ((groups & wanted) != 0).to(tl.int32)


@triton.jit
def _list_members(out, slots, member, last, budget):
    # The latest first: each one's place is as far from the last as there are members before it.
    index = last - (tl.cumsum(member, axis=0) - member)
    tl.store(out + index, slots, mask=(member != 0) & (index < budget))
    return last - tl.sum(member, axis=0)


# A call for a part of the batch begins anywhere in these.
ROWS = ["slot_mapping", "key_groups", "query_groups", "block_table", "query_start_loc", "seq_lens"]


@triton.jit
def _request_of(query, query_start_loc, num_requests, seq_lens, tile: tl.constexpr):
    lane = tl.arange(0, tile)
    begun = 0
    for first in range(0, num_requests + 1, tile):
        at = first + lane
        starts = tl.load(query_start_loc + at, mask=at <= num_requests, other=2**31 - 1)
        begun += tl.sum((starts <= query).to(tl.int32), axis=0)
    # The last request that has begun; behind the last query's end, which padding is, none.
    request = begun - 1
    real = request < num_requests
    later = tl.load(query_start_loc + request + 1, mask=real, other=0) - 1 - query
    num_keys = tl.load(seq_lens + request, mask=real, other=0) - later
    return tl.where(real, request, 0), tl.where(real, tl.maximum(num_keys, 0), 0)


@triton.jit(
    do_not_specialize=[
        "block_table_stride",
        "num_requests",
        "first_query",
        "lists_stride",
        "budget",
        "parts",
    ],
    do_not_specialize_on_alignment=ROWS,
)
def _list_kernel(
    slot_mapping, key_groups, store, query_groups, block_table, block_table_stride, block_size,
    query_start_loc, num_requests, first_query, seq_lens, counts, done, lists, lists_stride, list_lens,
    totals, dense_below, window, sink, budget, parts, most_parts: tl.constexpr,
    tile: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    part = tl.program_id(1)
    if query_start_loc is None:
        request = row
        num_keys = tl.load(seq_lens + row)
    else:
        request, num_keys = _request_of(first_query + row, query_start_loc, num_requests, seq_lens, tile)
    position = num_keys - 1
    window_start = tl.where(position < dense_below, 0, tl.maximum(position - window, 0))
    num_sinks = tl.minimum(sink, window_start)
    far_start = num_sinks + num_keys - window_start
    table = block_table + request.to(tl.int64) * block_table_stride
    out = lists + row.to(tl.int64) * lists_stride
    lane = tl.arange(0, tile)

    # The far tokens [sink, window_start) in equal shares; those that get none do nothing.
    tiles = tl.cdiv(tl.maximum(window_start - sink, 0), tile)
    each = tl.maximum(tl.cdiv(tiles, parts), 1)
    active = tl.maximum(tl.cdiv(tiles, each), 1)
    stop = window_start - part * each * tile
    start = tl.maximum(stop - each * tile, sink)
    first_slots, first_groups = _groups_at(store, table, start + lane, stop, block_size)

    # What is attended to whatever its group.
    for first in range(window_start + part * tile, num_keys, parts * tile):
        at = first + lane
        slots = _slots(table, at, at < num_keys, block_size)
        tl.store(out + num_sinks + at - window_start, slots, mask=at < num_keys)
    new_slot = tl.load(slot_mapping + row)
    if part == 0:
        for first in range(0, num_sinks, tile):
            at = first + lane
            slots = _slots(table, at, at < num_sinks, block_size)
            tl.store(out + at, slots, mask=at < num_sinks)

    if early:
        gdc_wait()  # for the groups
    wanted = tl.load(query_groups + row).to(tl.int32)
    first_member = _members(first_groups, wanted)
    members = first_member
    for first in range(start + tile, stop, tile):
        _, groups = _groups_at(store, table, first + lane, stop, block_size)
        members += _members(groups, wanted)
    mine = tl.sum(members, axis=0)

    if part < active:
        other = tl.arange(0, most_parts)
        tl.atomic_xchg(counts + row * parts + part, mine + 1, sem="relaxed")
        seen = tl.load(counts + row * parts + other, mask=other < part, other=1, volatile=True)
        while tl.min(seen, axis=0) == 0:
            seen = tl.load(counts + row * parts + other, mask=other < part, other=1, volatile=True)
        before = tl.sum(seen - 1, axis=0)
        if before < budget:
            far = out + far_start
            last = _list_members(far, first_slots, first_member, before + mine - 1, budget)
            for first in range(start + tile, stop, tile):
                slots, groups = _groups_at(store, table, first + lane, stop, block_size)
                last = _list_members(far, slots, _members(groups, wanted), last, budget)
        if part == active - 1:
            length = far_start + tl.minimum(before + mine, budget)
            tl.store(list_lens + row, length)
            tl.atomic_add(totals + 2, num_keys.to(tl.int64), mask=new_slot >= 0, sem="relaxed")
            tl.atomic_add(totals + 3, length.to(tl.int64), mask=new_slot >= 0, sem="relaxed")
        # A program that gets here has read its counts, so the last one may clear them.
        if tl.atomic_add(done + row, 1, sem="relaxed") == active - 1:
            tl.store(counts + row * parts + other, 0, mask=other < active)
            tl.store(done + row, 0)
    if part == 0:
        # A step's tokens are in the windows of all its queries: no program reads what another stores.
        tl.store(store + new_slot, tl.load(key_groups + row), mask=new_slot >= 0)


_launch_list = Launcher(_list_kernel)


def decode_parts(num_queries: int) -> int:
    """Return among how many programs each query's context is divided."""
    parts: int = triton.next_power_of_2(triton.cdiv(PROGRAMS, num_queries))
    return min(MOST_PARTS, max(4, parts))


def build_decode_lists(
    slot_mapping: torch.Tensor,
    key_groups: torch.Tensor,
    store: torch.Tensor,
    query_groups: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    seq_lens: torch.Tensor,
    config: FocusConfig,
    progress: Progress,
    lists: torch.Tensor,
    list_lens: torch.Tensor,
    totals: torch.Tensor,
    query_start_loc: torch.Tensor | None = None,
    first_query: int = 0,
    behind_routing: bool = False,
) -> None:
    """Store the groups of each query's token and list the slots that it attends to.

    Args:
        slot_mapping: `[>= num_queries]`, int64, the tokens' slots; -1 marks padding.
        key_groups: `[>= num_queries]`, G of the tokens.
        store: `[num_slots]`, G of every cached token; the queries' own are written.
        query_groups: `[>= num_queries]`, Q of the queries.
        block_table: `[num_requests, max_num_blocks]`, int32.
        block_size: Slots per block.
        seq_lens: `[num_requests]`, int32, tokens of each request up to and with its last query's; 0 marks
            padding.
        config: The mask's settings.
        progress: Zeros, which it leaves behind.
        lists: `[num_queries, max_model_len]`, int32; receives the slots.
        list_lens: `[num_queries]`, int32; receives how many.
        totals: `[4]`, int64; the last two count the keys there are and the keys listed.
        query_start_loc: `[num_requests + 1]`, int32, where each request's queries begin, if some have
            several, of which the window must have room for all. Queries behind the last are padding. None:
            every request has one query.
        first_query: The first one's number in `query_start_loc`.
        behind_routing: `route_into` of these groups was the stream's last launch, and this one need not wait
            for its end.
    """
    num_queries = len(list_lens)
    parts = decode_parts(num_queries)
    early = behind_routing and launches_early(store.device)
    budget = NO_BUDGET if config.decode_budget is None else config.decode_budget
    _launch_list(
        (num_queries, parts),
        slot_mapping, key_groups, store, query_groups, block_table, block_table.stride(0), block_size,
        query_start_loc, 0 if query_start_loc is None else len(query_start_loc) - 1, first_query, seq_lens,
        progress.counts, progress.done, lists, lists.stride(0), list_lens, totals,
        config.dense_below, config.window, config.sink, budget, parts,
        most_parts=MOST_PARTS, tile=TILE, early=early, launch_pdl=early,
    )  # fmt: skip
