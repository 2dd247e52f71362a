"""Count the keys that routed prefill queries attend to, on the device.

Decodes are counted by the kernel that lists their keys. Both add to `totals`, four int64: candidates and
selected keys of prefill, then of decode.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from focus_vllm.config import FocusConfig
from focus_vllm.kernels.group_lists import COUNT_ROWS, GroupLists, key_members, query_members, sum_counts
from focus_vllm.kernels.launch import Launcher
from focus_vllm.kernels.plan import FIELDS, KEY_TILE, QUERY_TILE, PrefillPlan, padded_lists, signatures

KEYS = 128


@triton.jit
def _groups(key, inside, table, block_size, store):
    block = tl.load(table + key // block_size, mask=inside, other=0)
    return tl.load(store + block * block_size + key % block_size, mask=inside, other=0).to(tl.int32)


@triton.jit
def _sharing(first, limit, wanted, table, block_size, store, keys: tl.constexpr):
    """Count each query's keys in [first, first + keys) before its limit that share a group with it."""
    key = first + tl.arange(0, keys)
    groups = _groups(key, key < tl.max(limit, axis=0), table, block_size, store)
    share = ((wanted[:, None] & groups[None, :]) != 0) & (key[None, :] < limit[:, None])
    return tl.sum(share.to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["block_table_stride"])
def _tally_kernel(
    segments, query_tiles, query_groups, store, block_table, block_table_stride, block_size,
    signatures, counts, totals, window, sink,
    listed: tl.constexpr, fields: tl.constexpr, padded_lists: tl.constexpr, one_list: tl.constexpr,
    key_tile: tl.constexpr, query_tile: tl.constexpr, keys: tl.constexpr, count_rows: tl.constexpr,
):  # fmt: skip
    segment = segments + tl.load(query_tiles + tl.program_id(0)) * fields
    offset = (tl.program_id(0) - tl.load(segment + 5)) * query_tile
    index = offset + tl.arange(0, query_tile)
    inside = index < tl.load(segment + 3)
    start = tl.load(segment + 2)
    position = start + index
    wanted = tl.load(query_groups + tl.load(segment + 1) + index, mask=inside, other=0).to(tl.int32)
    table = block_table + tl.load(segment).to(tl.int64) * block_table_stride
    # Keys [sink, limit) are read if they share a group, all others always.
    limit = tl.where(inside, tl.maximum(position - window, 0), 0)
    selected = tl.where(inside, tl.minimum(position, window + sink) + 1, 0)
    first = 0
    if listed:
        # Every query of the tile may read the keys before the first one's limit: the lists' counts have those
        # of whole tiles, one load gets the rest.
        first = tl.maximum(start + offset - window, 0)
        tiles = first // key_tile
        first_tile = tl.load(segment + 4)
        before = sum_counts(counts, first_tile, first_tile + tiles, padded_lists, count_rows)
        rest = tiles * key_tile + tl.arange(0, key_tile)
        groups = _groups(rest, rest < first, table, block_size, store)
        before += tl.sum(key_members(groups, signatures, padded_lists), axis=0)
        member = query_members(wanted, signatures, padded_lists, one_list)
        selected += tl.sum(member * before[None, :], axis=1)
    for key in range(first, tl.max(limit, axis=0), keys):
        selected += _sharing(key, limit, wanted, table, block_size, store, keys)
    far_sinks = tl.minimum(limit, sink)
    for key in range(0, tl.max(far_sinks, axis=0), keys):
        selected -= _sharing(key, far_sinks, wanted, table, block_size, store, keys)
    candidates = tl.sum(tl.where(inside, position + 1, 0).to(tl.int64), axis=0)
    tl.atomic_add(totals, candidates, sem="relaxed")
    tl.atomic_add(totals + 1, tl.sum(selected.to(tl.int64), axis=0), sem="relaxed")


_launch_tally = Launcher(_tally_kernel)


def tally_prefill(
    plan: PrefillPlan,
    query_groups: torch.Tensor,
    store: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    config: FocusConfig,
    lists: GroupLists | None,
    totals: torch.Tensor,
) -> None:
    """Add a wave's (query, key) pairs to the first two of `totals`.

    Args:
        plan: The wave.
        query_groups: `[>= num_tokens]`, Q of this step's tokens.
        store: `[num_slots]`, G of every cached token, this step's too.
        block_table: `[num_requests, max_num_blocks]`, int32.
        block_size: Slots per block.
        config: The mask's settings.
        lists: From `build_group_lists`; None if there are none.
        totals: `[4]`, int64.
    """
    _launch_tally(
        (plan.num_query_tiles,),
        plan.segments, plan.query_tiles, query_groups, store, block_table, block_table.stride(0), block_size,
        plan.signatures, plan.segments if lists is None else lists.counts, totals,
        config.window, config.sink, listed=lists is not None, fields=FIELDS,
        padded_lists=padded_lists(len(signatures(config))), one_list=config.key_k > 1, key_tile=KEY_TILE,
        query_tile=QUERY_TILE, keys=KEYS, count_rows=COUNT_ROWS, num_warps=8,
    )  # fmt: skip
