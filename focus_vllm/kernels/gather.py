"""Prefill over lists where FlashAttention cannot read pages of one slot: copy the keys into pages first."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from focus_vllm.kernels.attention import FlashAttention, Sequences
from focus_vllm.kernels.launch import Launcher, repeatable

PAGE = 16


@dataclasses.dataclass(frozen=True, slots=True)
class GatherScratch:
    """Buffers that every layer uses in turn."""

    keys: torch.Tensor
    """`[num_pages, PAGE, num_kv_heads, head_size]`, the cache's dtype."""
    values: torch.Tensor
    table: torch.Tensor
    """int32: a row of pages for each FlashAttention sequence."""


@triton.jit(do_not_specialize=["lists_stride", "num_rows"])
def _gather_kernel(
    paged_keys, paged_values, keys, values, slot_stride, head_stride, lists, lists_stride, used, first_page,
    num_rows, num_kv_heads: tl.constexpr, head_size: tl.constexpr, padded_size: tl.constexpr,
    page: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.full([], 0, tl.int32)
    # Lists lie one behind the other: this page belongs to the last that starts at it or before it.
    for start in range(0, num_rows, rows):
        at = start + tl.arange(0, rows)
        row += tl.sum(
            (tl.load(first_page + at, mask=at < num_rows, other=2**30) <= index).to(tl.int32), axis=0
        )
    row -= 1
    entry = (index - tl.load(first_page + row)) * page + tl.arange(0, page)
    inside = entry < tl.load(used + row)
    slot = tl.load(lists + row.to(tl.int64) * lists_stride + entry, mask=inside, other=0).to(tl.int64)
    channel = tl.arange(0, padded_size)
    mask = inside[:, None] & (channel < head_size)[None, :]
    source = slot[:, None] * slot_stride + head * head_stride + channel[None, :]
    target = (index.to(tl.int64) * page + tl.arange(0, page))[:, None] * num_kv_heads + head
    target = target * head_size + channel[None, :]
    tl.store(paged_keys + target, tl.load(keys + source, mask=mask, other=0), mask=mask)
    tl.store(paged_values + target, tl.load(values + source, mask=mask, other=0), mask=mask)


_launch_gather = Launcher(_gather_kernel)


@dataclasses.dataclass(frozen=True, slots=True)
class GatheredAttention:
    """The path's `FlashAttention` by way of one that reads pages of PAGE slots."""

    attention: FlashAttention
    scratch: GatherScratch

    @repeatable
    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        sequences: Sequences,
    ) -> torch.Tensor:
        if keys.shape[1] == 1:  # else already in pages
            used, table_rows = sequences.seqused_k, sequences.table_rows
            if table_rows is not None:  # sequences that share a list read its first keys
                used = used.new_zeros(len(sequences.block_table))
                used.scatter_reduce_(0, table_rows.long(), sequences.seqused_k, "amax")
            num_pages = (used + (PAGE - 1)) // PAGE
            first_page = (num_pages.cumsum(0) - num_pages).int()
            self._gather(keys, values, sequences.block_table, used, first_page, sequences.max_seqlen_k)
            pages = triton.cdiv(sequences.max_seqlen_k, PAGE)
            shape = (len(sequences.seqused_k), pages)
            table = self.scratch.table[: shape[0] * shape[1]].view(shape)
            first_page = first_page if table_rows is None else first_page[table_rows]
            nth = torch.arange(pages, dtype=torch.int32, device=query.device)
            torch.add(first_page[:, None], nth[None, :], out=table)
            keys, values = self.scratch.keys, self.scratch.values
            sequences = sequences._replace(block_table=table, table_rows=None)
        return self.attention(query, keys, values, out, sequences)

    def _gather(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        lists: torch.Tensor,
        used: torch.Tensor,
        first_page: torch.Tensor,
        max_keys: int,
    ) -> None:
        pages, page, num_kv_heads, head_size = self.scratch.keys.shape
        grid = (min(pages, len(lists) * triton.cdiv(max_keys, page)), num_kv_heads)
        # As bytes: a copy needs no arithmetic, which not every GPU has for FP8.
        pairs = (self.scratch.keys, self.scratch.values, keys, values)
        paged_keys, paged_values, keys, values = (part.view(_bits(part)) for part in pairs)
        _launch_gather(
            grid,
            paged_keys, paged_values, keys, values, keys.stride(0), keys.stride(2), lists, lists.stride(0),
            used, first_page, len(lists), num_kv_heads=num_kv_heads, head_size=head_size,
            padded_size=triton.next_power_of_2(head_size), page=page, rows=32,
        )  # fmt: skip


def _bits(tensor: torch.Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]


def gather_shapes(num_lists: int, segments: int, blocks: int, max_model_len: int) -> tuple[int, int]:
    """Return how many pages and table entries serve any call of prefill.

    Args:
        num_lists: Lists of disjoint keys for each segment.
        segments: Most segments in a wave, whose keys together are at most `max_model_len`.
        blocks: Most query blocks in a wave, one more for each segment included.
        max_model_len: Longest request.
    """
    longest = triton.cdiv(max_model_len, PAGE)
    return longest + num_lists * segments, num_lists * (blocks * longest + segments)
