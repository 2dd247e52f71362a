"""Attention of single queries over lists in one launch.

For short turns, which wait for the host, and for decode where FlashAttention cannot read pages of one slot.
A list is divided among programs, each of which reads its share of the listed keys in place. The one that is
done last puts together what all have found.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from focus_vllm.kernels.attention import Sequences
from focus_vllm.kernels.launch import Launcher
from focus_vllm.kernels.near import LOG2_E, Scores, capped, go_on_with_softmax

# One H200, 2026-11-26, 32/8 heads of 128: 1 x 8K 17.1 us, 8 x 128K 149, 1 x 512K 92, with routing and lists;
# FlashAttention 3 over the same lists 19.0, 153 and 94. 4 warps without stages 21.0, 304 and 183; tiles of 32
# in three stages 17.8, 159 and 97; three stages 17.6, 152 and 93.
TILE = 64
WARPS = 2
STAGES = 2
PROGRAMS = 512
"""Programs to aim for."""
LEAST_SPLITS = 4
MOST_SPLITS = 64
COMBINED = 16
"""Splits that are put together at a time."""


@triton.jit(do_not_specialize=["lists_stride", "splits", "lse_stride"])
def _decode_kernel(
    query, query_stride, out, out_stride, lse, lse_stride, keys, values, slot_stride, head_stride,
    lists, lists_stride, list_lens, splits, partial_out, partial_lse, done,
    q_scale, k_scale, v_scale, scale_stride, score_scale, softcap,
    num_queries_per_kv: tl.constexpr, padded_queries: tl.constexpr, num_kv_heads: tl.constexpr,
    head_size: tl.constexpr, padded_size: tl.constexpr, has_softcap: tl.constexpr, quantized: tl.constexpr,
    block_m: tl.constexpr, tile: tl.constexpr, combined: tl.constexpr, log2_e: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(list_lens + row)
    each = tl.maximum(tl.cdiv(tl.cdiv(length, tile), splits), 1) * tile
    active = tl.maximum(tl.cdiv(length, each), 1)
    if split < active:
        nth = tl.arange(0, block_m)
        real = nth < num_queries_per_kv
        channel = tl.arange(0, padded_size)
        real_channel = channel < head_size
        element = real[:, None] & real_channel[None, :]
        compute: tl.constexpr = out.dtype.element_ty
        head = kv_head * num_queries_per_kv + nth
        at = row.to(tl.int64) * query_stride + head[:, None] * head_size + channel[None, :]
        q = tl.load(query + at, mask=element, other=0.0).to(compute)
        value_scale = 1.0
        if quantized:
            score_scale *= tl.load(q_scale + kv_head * scale_stride)
            score_scale *= tl.load(k_scale + kv_head * scale_stride)
            value_scale = tl.load(v_scale + kv_head * scale_stride)
        cap_in = 2.0 * log2_e * score_scale / softcap if has_softcap else 0.0
        factor = log2_e if has_softcap else score_scale * log2_e

        max_score = tl.full([block_m], float("-inf"), tl.float32)
        total = tl.zeros([block_m], tl.float32)
        acc = tl.zeros([block_m, padded_size], tl.float32)
        slots = lists + row.to(tl.int64) * lists_stride
        keys += kv_head * head_stride
        values += kv_head * head_stride
        stop = tl.minimum((split + 1) * each, length)
        for first in range(split * each, stop, tile):
            entry = first + tl.arange(0, tile)
            inside = entry < stop
            slot = tl.load(slots + entry, mask=inside, other=0).to(tl.int64)
            source = slot[:, None] * slot_stride + channel[None, :]
            mask = inside[:, None] & real_channel[None, :]
            k = tl.load(keys + source, mask=mask, other=0.0).to(compute)
            v = tl.load(values + source, mask=mask, other=0.0).to(compute)
            scores = capped(tl.dot(q, tl.trans(k)), cap_in, softcap, has_softcap)
            scores = tl.where(inside[None, :], scores, float("-inf"))
            max_score, total, acc = go_on_with_softmax(scores, v, max_score, total, acc, factor, compute)

        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        logs = max_score * factor + tl.log2(total)  # -inf without a key
        if active == 1:
            at = row.to(tl.int64) * out_stride + head[:, None] * head_size + channel[None, :]
            tl.store(out + at, (acc * value_scale).to(compute), mask=element)
            tl.store(lse + head * lse_stride + row, logs / log2_e, mask=real)
        else:
            rows = ((row * num_kv_heads + kv_head) * splits + split) * num_queries_per_kv + nth
            at = rows.to(tl.int64)[:, None] * padded_size + channel[None, :]
            tl.store(partial_out + at, acc, mask=real[:, None])
            tl.store(partial_lse + rows, logs, mask=real)
            tl.debug_barrier()
            pair = row * num_kv_heads + kv_head
            if tl.atomic_add(done + pair, 1, sem="acq_rel") == active - 1:
                tl.debug_barrier()
                tl.store(done + pair, 0)
                _combine(
                    pair * splits, active, partial_out, partial_lse, out + row.to(tl.int64) * out_stride,
                    lse + row, lse_stride, kv_head, value_scale,
                    num_queries_per_kv, padded_queries, head_size, padded_size, combined, log2_e,
                )  # fmt: skip


@triton.jit
def _combine(
    first_part, active, partial_out, partial_lse, out, lse, lse_stride, kv_head, value_scale,
    num_queries_per_kv: tl.constexpr, padded_queries: tl.constexpr, head_size: tl.constexpr,
    padded_size: tl.constexpr, combined: tl.constexpr, log2_e: tl.constexpr,
):  # fmt: skip
    nth = tl.arange(0, padded_queries)
    real = nth < num_queries_per_kv
    channel = tl.arange(0, padded_size)
    max_log = tl.full([padded_queries], float("-inf"), tl.float32)
    total = tl.zeros([padded_queries], tl.float32)
    acc = tl.zeros([padded_queries, padded_size], tl.float32)
    for first in range(0, active, combined):
        part = first + tl.arange(0, combined)
        rows = (first_part + part)[:, None] * num_queries_per_kv + nth[None, :]
        mask = (part < active)[:, None] & real[None, :]
        logs = tl.load(partial_lse + rows, mask=mask, other=float("-inf"), cache_modifier=".cg")
        at = rows.to(tl.int64)[:, :, None] * padded_size + channel[None, None, :]
        parts = tl.load(partial_out + at, mask=mask[:, :, None], other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(max_log, tl.max(logs, axis=0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(logs - shift[None, :])
        keep = tl.exp2(max_log - shift)
        total = total * keep + tl.sum(weights, axis=0)
        acc = acc * keep[:, None] + tl.sum(parts * weights[:, :, None], axis=0)
        max_log = new_max
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None] * value_scale
    head = kv_head * num_queries_per_kv + nth
    at = head[:, None] * head_size + channel[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=real[:, None] & (channel < head_size)[None, :])
    tl.store(lse + head * lse_stride, (max_log + tl.log2(total)) / log2_e, mask=real)


_launch_decode = Launcher(_decode_kernel)


def _splits(num_pairs: int) -> int:
    splits: int = triton.next_power_of_2(triton.cdiv(PROGRAMS, num_pairs))
    return min(MOST_SPLITS, max(LEAST_SPLITS, splits))


@dataclasses.dataclass(frozen=True, slots=True)
class Partial:
    """What programs leave for the last one; all layers use it, one after the other."""

    out: torch.Tensor
    """`[num_rows, padded_size]`, float32."""
    lse: torch.Tensor
    """`[num_rows]`, float32."""
    done: torch.Tensor
    """`[num_queries * num_kv_heads]`, int32: how many programs are done; zeros between launches."""

    @classmethod
    @functools.cache
    def of(
        cls, device: torch.device, num_queries: int, num_heads: int, num_kv_heads: int, head_size: int
    ) -> Partial:
        """Return room for up to so many queries."""
        pairs = num_queries * num_kv_heads
        rows = max(pairs * LEAST_SPLITS, 2 * PROGRAMS) * (num_heads // num_kv_heads)
        return cls(
            torch.empty(rows, triton.next_power_of_2(head_size), device=device),
            torch.empty(rows, device=device),
            torch.zeros(pairs, dtype=torch.int32, device=device),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class ListedAttention:
    """The path's `FlashAttention` for sequences of one query, in a kernel of its own."""

    scores: Scores
    most_queries: int

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        sequences: Sequences,
    ) -> torch.Tensor:
        assert sequences.max_seqlen_q == 1
        assert sequences.table_rows is None
        (num_queries, num_heads, head_size), num_kv_heads = query.shape, keys.shape[2]
        partial = Partial.of(query.device, self.most_queries, num_heads, num_kv_heads, head_size)
        lse = torch.empty(num_heads, num_queries, device=query.device)
        splits, scores, group = _splits(num_queries * num_kv_heads), self.scores, num_heads // num_kv_heads
        lists = sequences.block_table
        _launch_decode(
            (num_queries, num_kv_heads, splits),
            query, query.stride(0), out, out.stride(0), lse, lse.stride(0),
            keys, values, keys.stride(0), keys.stride(2),
            lists, lists.stride(0), sequences.seqused_k, splits,
            partial.out, partial.lse, partial.done, scores.q_scale, scores.k_scale, scores.v_scale,
            0 if scores.q_scale is None or scores.q_scale.numel() == 1 else 1, scores.scale, scores.softcap,
            num_queries_per_kv=group, padded_queries=triton.next_power_of_2(group),
            num_kv_heads=num_kv_heads, head_size=head_size, padded_size=partial.out.shape[1],
            has_softcap=scores.softcap > 0, quantized=scores.q_scale is not None,
            block_m=max(16, triton.next_power_of_2(group)), tile=TILE if head_size <= 128 else TILE // 2,
            combined=COMBINED, log2_e=LOG2_E, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        return lse
