"""Prefill's near part: the whole mask on the keys around each query, merged with what the lists gave.

The keys that a chunk's windows and sinks cover are copied out of their pages first: a few megabytes, and
the kernel then reads them without a table look-up in its inner loop. One program takes a tile of queries of
one key-value head, all the query heads that share it stacked, starts its softmax from FlashAttention's
output and log-sum-exp for the far keys, and goes on with the sinks and the keys from the window's start to
the query. Nothing between the two is written to memory.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from focus_vllm.config import FocusConfig
from focus_vllm.kernels.launch import Launcher
from focus_vllm.kernels.plan import (
    BLOCK_QUERIES,
    COPY_TILE,
    FIELDS,
    Far,
    PrefillPlan,
    far_mode,
    lists_per_query,
)

# One H200, 2026-11-22, 8192 queries, 32/8 heads of 128, window 512, copy included: 313 us; 128 x 64 on 8
# warps 380, 64 x 64 on 4 warps and two stages 354, 128 x 128 on 8 warps 430.
BLOCK_M = 64
BLOCK_N = 32
WARPS = 4
STAGES = 3
LOG2_E = 1.4426950408889634


def near_tile(num_queries_per_kv: int) -> int:
    """Return how many queries one program takes: BLOCK_M rows of them and their heads, a power of two."""
    above: int = triton.next_power_of_2(BLOCK_M // num_queries_per_kv + 1)
    return max(1, above // 2)


@dataclasses.dataclass(frozen=True, slots=True)
class Cache:
    """A layer's paged keys and values as slots."""

    keys: torch.Tensor
    """`[num_slots, 1, num_kv_heads, head_size]`; the cache's dtype."""
    values: torch.Tensor
    """As `keys`, with the same strides."""
    block_table: torch.Tensor
    """`[num_requests, max_num_blocks]`, int32."""
    block_size: int
    """Slots per block."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scores:
    """How a layer turns dot products into scores."""

    scale: float
    softcap: float = 0.0
    q_scale: torch.Tensor | None = None
    """`[1]` or `[num_kv_heads]`, float32: factor of an FP8 query; None for other dtypes."""
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class NearKeys:
    """Scratch: the keys that a wave's near part reads, in order."""

    keys: torch.Tensor
    """`[near_capacity, num_kv_heads, head_size]`, the output's dtype."""
    values: torch.Tensor
    """As `keys`."""
    groups: torch.Tensor
    """`[near_capacity, GROUP_BITS]`, the output's dtype: G as zeros and ones, for a matrix product."""


GROUP_BITS = 32


@triton.jit(do_not_specialize=["block_table_stride"])
def _copy_kernel(
    keys, values, groups, cache_keys, cache_values, slot_stride, head_stride,
    block_table, block_table_stride, block_size, store, segments, copy_tiles, window, sink,
    num_kv_heads: tl.constexpr, head_size: tl.constexpr, padded_size: tl.constexpr,
    fields: tl.constexpr, tile: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    segment = segments + tl.load(copy_tiles + tl.program_id(0)) * fields
    head = tl.program_id(1)
    request = tl.load(segment).to(tl.int64)
    start = tl.load(segment + 2)
    end = start + tl.load(segment + 3)
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    index = row - tl.load(segment + 9)
    position = tl.where(index < sink, index, tl.maximum(start - window, 0) + index - sink)
    inside = position < end
    block = tl.load(block_table + request * block_table_stride + position // block_size, mask=inside, other=0)
    slot = block * block_size + position % block_size
    channel = tl.arange(0, padded_size)
    mask = inside[:, None] & (channel < head_size)[None, :]
    source = slot.to(tl.int64)[:, None] * slot_stride + head * head_stride + channel[None, :]
    target = (row.to(tl.int64)[:, None] * num_kv_heads + head) * head_size + channel[None, :]
    written = (channel < head_size)[None, :] & (row >= 0)[:, None]
    # Rows past the end are zeros: a value that is not a number would survive a weight of zero.
    tl.store(
        keys + target,
        tl.load(cache_keys + source, mask=mask, other=0.0).to(keys.dtype.element_ty),
        mask=written,
    )
    tl.store(
        values + target,
        tl.load(cache_values + source, mask=mask, other=0.0).to(keys.dtype.element_ty),
        mask=written,
    )
    if head == 0:
        bit = tl.arange(0, bits)
        member = (tl.load(store + slot, mask=inside, other=0).to(tl.int32)[:, None] >> bit[None, :]) & 1
        tl.store(groups + row[:, None] * bits + bit[None, :], member.to(groups.dtype.element_ty))


@triton.jit
def go_on_with_softmax(scores, v, max_score, total, acc, factor, compute: tl.constexpr):
    """Go on with the softmax; maxima are kept before multiplication by `factor`, which folds into exp2."""
    new_max = tl.maximum(max_score, tl.max(scores, axis=1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max) * factor
    weights = tl.exp2(scores * factor - shift[:, None])
    keep = tl.exp2(max_score * factor - shift)
    total = total * keep + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(compute), v, acc * keep[:, None])
    return new_max, total, acc


@triton.jit
def capped(scores, cap_in, cap_out, has_softcap: tl.constexpr):
    if has_softcap:
        scores = cap_out * (1.0 - 2.0 / (1.0 + tl.exp2(cap_in * scores)))
    return scores


@triton.jit
def _copied_step(
    key, row, stop, low, high, limit, q, query_bits, max_score, total, acc, keys, values, groups, row_stride,
    channel, real_channel, factor, cap_in, cap_out,
    sharing: tl.constexpr, has_softcap: tl.constexpr, compute: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """Visit a tile of copied keys. A query takes those in [low, high), save that with `sharing`

    "excluded": those it shares a group with came from the lists, and `query_bits` are hugely negative;
    "excluded before limit": the same for those before `limit`;
    "included": it also takes earlier ones that it shares a group with.
    """
    inside = key < stop
    at = row.to(tl.int64)[:, None] * row_stride + channel[None, :]
    mask = inside[:, None] & real_channel[None, :]
    bit = tl.arange(0, bits)
    k = tl.load(keys + at, mask=mask, other=0.0)
    key_bits = tl.load(groups + row[:, None] * bits + bit[None, :], mask=inside[:, None], other=0.0)
    v = tl.load(values + at, mask=mask, other=0.0)
    scores = capped(tl.dot(q, tl.trans(k)), cap_in, cap_out, has_softcap)
    taken = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
    if sharing == "excluded":
        scores = tl.dot(query_bits, tl.trans(key_bits), scores)
    elif sharing == "included":
        share = tl.dot(query_bits, tl.trans(key_bits)) != 0.0
        taken = taken | (share & (key[None, :] < high[:, None]))
    else:
        share = tl.dot(query_bits, tl.trans(key_bits)) != 0.0
        taken = taken & ((share == 0) | (key >= limit)[None, :])
    scores = tl.where(taken, scores, float("-inf"))
    return go_on_with_softmax(scores, v, max_score, total, acc, factor, compute)


@triton.jit
def _paged_step(
    key, stop, q, position, wanted, max_score, total, acc,
    keys, values, slot_stride, table, block_size, store, channel, real_channel,
    window, sink, factor, cap_in, cap_out, has_softcap: tl.constexpr, compute: tl.constexpr,
):  # fmt: skip
    """Visit a tile of keys in their pages with the whole mask."""
    inside = key < stop
    block = tl.load(table + key // block_size, mask=inside, other=0)
    slot = block * block_size + key % block_size
    groups = tl.load(store + slot, mask=inside, other=0).to(tl.int32)
    at = slot.to(tl.int64)[:, None] * slot_stride + channel[None, :]
    mask = inside[:, None] & real_channel[None, :]
    k = tl.load(keys + at, mask=mask, other=0.0).to(compute)
    v = tl.load(values + at, mask=mask, other=0.0).to(compute)
    scores = capped(tl.dot(q, tl.trans(k)), cap_in, cap_out, has_softcap)
    distance = position[:, None] - key[None, :]
    allowed = (distance <= window) | (key < sink)[None, :] | ((wanted[:, None] & groups[None, :]) != 0)
    scores = tl.where(allowed & (distance >= 0) & inside[None, :], scores, float("-inf"))
    return go_on_with_softmax(scores, v, max_score, total, acc, factor, compute)


@triton.jit(do_not_specialize=["block_table_stride", "far_lse_stride"])
def _near_kernel(
    query, query_stride, out, out_stride, query_groups, store,
    cache_keys, cache_values, slot_stride, head_stride, block_table, block_table_stride, block_size,
    keys, values, groups, far_out, far_out_stride, far_lse, far_lse_stride, row_of,
    segments, near_tiles, q_scale, k_scale, v_scale, scale_stride,
    window, sink, score_scale, softcap,
    num_queries_per_kv: tl.constexpr, num_kv_heads: tl.constexpr, head_size: tl.constexpr,
    padded_size: tl.constexpr, merged: tl.constexpr, whole_list: tl.constexpr, block_queries: tl.constexpr,
    sink_block: tl.constexpr, penalty: tl.constexpr, has_softcap: tl.constexpr, quantized: tl.constexpr,
    bits: tl.constexpr, fields: tl.constexpr, tile: tl.constexpr, block_m: tl.constexpr,
    block_n: tl.constexpr, log2_e: tl.constexpr,
):  # fmt: skip
    tile_index = tl.program_id(0)
    kv_head = tl.program_id(1)
    segment = segments + tl.load(near_tiles + tile_index) * fields
    first_token = tl.load(segment + 1)
    start = tl.load(segment + 2)
    num_queries = tl.load(segment + 3)
    first = (tile_index - tl.load(segment + 8)) * tile

    row = tl.arange(0, block_m)
    index = first + row // num_queries_per_kv
    real_row = (row < tile * num_queries_per_kv) & (index < num_queries)
    position = start + index
    token = (first_token + index).to(tl.int64)
    head = kv_head * num_queries_per_kv + row % num_queries_per_kv
    channel = tl.arange(0, padded_size)
    real_channel = channel < head_size
    element = real_row[:, None] & real_channel[None, :]
    compute: tl.constexpr = out.dtype.element_ty
    q = tl.load(
        query + token[:, None] * query_stride + head[:, None] * head_size + channel[None, :],
        mask=element,
        other=0.0,
    ).to(compute)
    wanted = tl.load(query_groups + token, mask=real_row, other=0).to(tl.int32)
    if quantized:
        score_scale *= tl.load(q_scale + kv_head * scale_stride) * tl.load(k_scale + kv_head * scale_stride)
        value_scale = tl.load(v_scale + kv_head * scale_stride)
    # tanh by exp2: `capped` returns scores in units of 1 / log2(e), and so does the log-sum-exp below.
    cap_in = 2.0 * log2_e * score_scale / softcap if has_softcap else 0.0
    cap_out = softcap
    factor = log2_e if has_softcap else score_scale * log2_e

    max_score = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    acc = tl.zeros([block_m, padded_size], tl.float32)
    for nth in tl.static_range(merged):
        far_row = tl.load(row_of + token * merged + nth, mask=real_row, other=0).to(tl.int64)
        lse = tl.load(far_lse + head * far_lse_stride + far_row, mask=real_row, other=float("-inf"))
        # FlashAttention's versions disagree on the sign of the infinity for a query without keys.
        empty = (lse == float("-inf")) | (lse == float("inf"))
        lse = tl.where(empty, float("-inf"), lse * (log2_e / factor))
        part = tl.load(
            far_out + far_row[:, None] * far_out_stride + head[:, None] * head_size + channel[None, :],
            mask=element & (empty == 0)[:, None], other=0.0,
        ).to(tl.float32)  # fmt: skip
        if quantized:
            part = part / value_scale
        new_max = tl.maximum(max_score, lse)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) * factor
        keep = tl.exp2(max_score * factor - shift)
        weight = tl.exp2(lse * factor - shift)
        total = total * keep + weight
        acc = acc * keep[:, None] + part * weight[:, None]
        max_score = new_max

    last = start + tl.minimum(first + tile, num_queries)
    after = position + 1
    if merged > 0:
        keys += kv_head * head_size
        values += kv_head * head_size
        stride: tl.constexpr = num_kv_heads * head_size
        copied = tl.load(segment + 9)
        bit = tl.arange(0, bits)
        member = ((wanted[:, None] >> bit[None, :]) & 1).to(tl.float32)
        # Keys before the limit that share a group came from the lists.
        limit = last
        low = start + first - window
        query_bits = (member * penalty).to(compute)
        if not whole_list:
            limit = start + first // block_queries * block_queries - window
            low = limit
            query_bits = member.to(compute)
        if sink_block > 0:
            max_score, total, acc = _copied_step(
                tl.arange(0, sink_block), copied + tl.arange(0, sink_block), tl.minimum(sink, last),
                tl.zeros_like(position), tl.minimum(after, sink), limit, q, query_bits, max_score, total, acc,
                keys, values, groups, stride, channel, real_channel, factor, cap_in, cap_out,
                "excluded" if whole_list else "excluded before limit", has_softcap, compute, bits,
            )  # fmt: skip
        first_row = copied + sink - tl.maximum(start - window, 0)
        for key_start in range(tl.maximum(low, sink), last, block_n):
            max_score, total, acc = _copied_step(
                key_start + tl.arange(0, block_n), first_row + key_start + tl.arange(0, block_n), last,
                position - window, after, limit, q, query_bits, max_score, total, acc,
                keys, values, groups, stride, channel, real_channel, factor, cap_in, cap_out,
                "excluded" if whole_list else "included", has_softcap, compute, bits,
            )  # fmt: skip
    else:
        table = block_table + tl.load(segment).to(tl.int64) * block_table_stride
        for key_start in range(0, last, block_n):
            max_score, total, acc = _paged_step(
                key_start + tl.arange(0, block_n), last, q, position, wanted, max_score, total, acc,
                cache_keys + kv_head * head_stride, cache_values + kv_head * head_stride, slot_stride,
                table, block_size, store, channel, real_channel,
                window, sink, factor, cap_in, cap_out, has_softcap, compute,
            )  # fmt: skip

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if quantized:
        acc = acc * value_scale
    tl.store(
        out + token[:, None] * out_stride + head[:, None] * head_size + channel[None, :],
        acc.to(compute), mask=element,
    )  # fmt: skip


_launch_copy = Launcher(_copy_kernel)
_launch_near = Launcher(_near_kernel)


def near_and_merge(
    plan: PrefillPlan,
    query: torch.Tensor,
    out: torch.Tensor,
    query_groups: torch.Tensor,
    store: torch.Tensor,
    cache: Cache,
    config: FocusConfig,
    scores: Scores,
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    near: NearKeys,
) -> None:
    """Finish the attention of a wave's queries.

    Args:
        plan: The wave, planned with `near_tile`.
        query: `[num_tokens, num_heads, head_size]`; heads contiguous.
        out: `[num_tokens, num_heads, head_size]`; the rows of the wave's queries are written.
        query_groups: `[>= num_tokens]`, Q of this step's tokens.
        store: `[num_slots]`, G of every cached token.
        cache: The layer's keys and values.
        config: The mask's settings.
        scores: The layer's scale and softcap.
        far: What FlashAttention returned for the sorted queries: out `[num_rows, num_heads, head_size]`,
            LSE `[num_heads, num_rows]` and `GroupLists.row_of`. None if `far_mode` is NOTHING.
        near: Scratch; unused without `far`.
    """
    num_heads, head_size = query.shape[1:]
    num_kv_heads = cache.keys.shape[2]
    padded_size = max(16, triton.next_power_of_2(head_size))
    bits = 16 if config.num_groups <= 16 else 32
    strides = (cache.keys.stride(0), cache.keys.stride(2))
    table = (cache.block_table, cache.block_table.stride(0), cache.block_size)
    slots = (cache.keys, cache.values, *strides, *table)
    if far is not None:
        _launch_copy(
            (plan.num_copy_tiles, num_kv_heads),
            near.keys, near.values, near.groups, *slots, store, plan.segments, plan.copy_tiles,
            config.window, config.sink, num_kv_heads=num_kv_heads, head_size=head_size,
            padded_size=padded_size, fields=FIELDS, tile=COPY_TILE, bits=bits,
        )  # fmt: skip
    far_out, far_lse, row_of = far or (out, scores.q_scale, plan.segments)
    _launch_near(
        (plan.num_near_tiles, num_kv_heads),
        query, query.stride(0), out, out.stride(0), query_groups, store, *slots,
        near.keys, near.values, near.groups,
        far_out, far_out.stride(0), far_lse, 0 if far is None else far[1].stride(0), row_of,
        plan.segments, plan.near_tiles, scores.q_scale, scores.k_scale, scores.v_scale,
        0 if scores.q_scale is None or scores.q_scale.numel() == 1 else 1,
        config.window, config.sink, scores.scale, scores.softcap,
        num_queries_per_kv=num_heads // num_kv_heads, num_kv_heads=num_kv_heads, head_size=head_size,
        padded_size=padded_size, merged=0 if far is None else lists_per_query(config),
        whole_list=far_mode(config) is Far.GROUP, block_queries=BLOCK_QUERIES,
        sink_block=0 if config.sink == 0 else max(16, triton.next_power_of_2(config.sink)),
        penalty=-60000.0 if out.dtype == torch.float16 else -1e30,
        has_softcap=scores.softcap > 0, quantized=scores.q_scale is not None, bits=bits,
        fields=FIELDS, tile=near_tile(num_heads // num_kv_heads),
        block_m=max(BLOCK_M, triton.next_power_of_2(num_heads // num_kv_heads)),
        block_n=BLOCK_N if padded_size <= 128 else BLOCK_N // 2,
        log2_e=LOG2_E, num_warps=WARPS, num_stages=STAGES if padded_size <= 128 else 2,
    )  # fmt: skip
