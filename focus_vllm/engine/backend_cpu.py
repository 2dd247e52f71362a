"""The CPU attention backend: vLLM's own for dense queries, `kernels.sdpa` for routed ones.

vLLM's CPU kernels keep keys transposed in tiles whose layout depends on the instruction set, so a token's
key cannot be read alone. The cache therefore has two halves of equal size: vLLM's own, exactly as without
Focus, and one where every token's keys and values can be kept again as a row `[num_kv_heads, 2 * head_size]`.
vLLM accounts for both: the same memory holds half as many tokens. Rows are written when a routed query first
needs them, so prompts below `dense_below` pay nothing for them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm import _custom_ops as ops
from vllm.config import CompilationMode
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from focus_vllm.engine.deferred import DeferredRouting
from focus_vllm.engine.state import LayerFocus
from focus_vllm.kernels.sdpa import PagedKeys, focus_sdpa

IntArray = npt.NDArray[np.int64]


class FocusCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend with routed layers."""

    @staticmethod
    def get_impl_cls() -> type[FocusCPUImpl]:
        return FocusCPUImpl

    @staticmethod
    def get_builder_cls() -> type[FocusCPUMetadataBuilder]:
        return FocusCPUMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return num_blocks, num_kv_heads, block_size, 4 * head_size

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return dataclasses.replace(spec, state_content_bytes=2 * spec.state_content_size_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class RoutedQueries:
    """One request's queries at positions from `dense_below` on."""

    rows: slice
    """Where they are in the batch."""
    new: slice
    """Where all of the request's new tokens are, those below `dense_below` included."""
    slots: torch.Tensor
    """`[seq_len]`, int64: the KV slot of every position up to the last query."""
    phase: str
    """"prefill" or "decode"."""


@dataclasses.dataclass(frozen=True, slots=True)
class DenseQueries:
    """The queries at positions below `dense_below` in a batch that has others too."""

    rows: torch.Tensor
    """`[num_dense]`, int64: where they are in the batch."""
    metadata: CPUAttentionMetadata


@dataclasses.dataclass
class FocusCPUMetadata(CPUAttentionMetadata):
    """vLLM's metadata of the whole batch, and how routed layers split it."""

    new_slots: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """`[num_actual_tokens]`, int64: `slot_mapping` without padding."""
    deferred: bool = False
    """Whether the new tokens' groups are stored later."""
    dense: DenseQueries | None = None
    routed: list[RoutedQueries] = dataclasses.field(default_factory=list)
    unpack: list[int] = dataclasses.field(default_factory=list)
    """Blocks that routed queries read and that have no rows yet."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Spans:
    """Each request's new tokens: their first row in the batch, and their positions [begin, end)."""

    rows: IntArray
    begins: IntArray
    ends: IntArray
    decodes: npt.NDArray[np.bool_]
    """Which requests decode; the others prefill."""

    @classmethod
    def of(cls, common: CommonAttentionMetadata) -> _Spans:
        starts = common.query_start_loc_cpu.numpy().astype(np.int64)
        ends = common.seq_lens.numpy().astype(np.int64)
        begins = ends - np.diff(starts)
        return cls(starts[:-1], begins, ends, (ends - begins == 1) & (begins > 0))


def _causal_pairs(begin: Any, end: Any) -> Any:
    """Count the (query, key) pairs of dense causal attention for queries at [begin, end)."""
    return (end * (end + 1) - begin * (begin + 1)) // 2


class FocusCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits each batch at `dense_below`, once for all layers, and knows which blocks have rows."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        context = vllm_config.compilation_config.static_forward_context
        impls = [context[name].impl for name in layer_names]
        self.layers: list[LayerFocus] = [impl.focus for impl in impls if impl.focus is not None]
        self.dense_below = self.layers[0].config.dense_below if self.layers else 0
        eager = vllm_config.compilation_config.mode == CompilationMode.NONE
        assert isinstance(self.dtype, torch.dtype)
        self.deferred = DeferredRouting(self.layers, self.dtype) if self.layers and eager else None
        # A block's tokens are written in order, so each step either keeps this true or makes it false.
        self.has_rows = torch.zeros(vllm_config.cache_config.num_gpu_blocks, dtype=torch.bool)
        self.any_rows = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FocusCPUMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = FocusCPUMetadata(**vars(stock))
        if not self.layers:
            return metadata
        metadata.new_slots = slots = stock.slot_mapping[: stock.num_actual_tokens].long()
        if common_attn_metadata.max_seq_len <= self.dense_below:
            self._dense_step(metadata, common_attn_metadata)
            return metadata
        if self.deferred:
            self.deferred.flush()
        spans = _Spans.of(common_attn_metadata)
        routed = spans.ends > self.dense_below
        without_rows = torch.from_numpy(np.repeat(~routed, spans.ends - spans.begins))
        self.has_rows[slots[without_rows] // self.block_size] = False
        metadata.routed, metadata.unpack = self._routed(common_attn_metadata, spans, routed)
        metadata.dense = self._dense(common_attn_metadata, spans)
        self._count_dense(spans)
        return metadata

    def _dense_step(self, metadata: FocusCPUMetadata, common: CommonAttentionMetadata) -> None:
        """Prepare for a batch without routed queries: what a small model does thousands of times a second."""
        slots = metadata.new_slots
        if self.any_rows:
            self.has_rows[slots // self.block_size] = False
        if common.max_query_len > 1:
            self._count_dense(_Spans.of(common))
        else:
            self._count("decode", int(common.seq_lens.sum()), len(common.seq_lens))
            if self.deferred and self.deferred.begin_step(slots):
                metadata.deferred = True
                return
        if self.deferred:
            self.deferred.flush()

    def _count_dense(self, spans: _Spans) -> None:
        ends = np.clip(self.dense_below, spans.begins, spans.ends)
        pairs, queries = _causal_pairs(spans.begins, ends), ends - spans.begins
        for phase, chosen in (("prefill", ~spans.decodes), ("decode", spans.decodes)):
            self._count(phase, int(pairs[chosen].sum()), int(queries[chosen].sum()))

    def _count(self, phase: str, pairs: int, queries: int) -> None:
        pairs *= len(self.layers)
        counts = self.layers[0].counts
        counts.add(phase, pairs, pairs)
        counts.dense_queries[phase] += queries * len(self.layers)

    def _routed(
        self, common: CommonAttentionMetadata, spans: _Spans, routed: np.ndarray
    ) -> tuple[list[RoutedQueries], list[int]]:
        self.any_rows = True
        queries, unpack = [], []
        offsets = torch.arange(self.block_size)
        for request in np.flatnonzero(routed):
            row, begin, end = (int(values[request]) for values in (spans.rows, spans.begins, spans.ends))
            blocks = common.block_table_tensor[request, : -(-end // self.block_size)].long()
            self.has_rows[blocks[-(-begin // self.block_size) :]] = True  # all of them are new
            unpack += blocks[~self.has_rows[blocks]].tolist()
            self.has_rows[blocks] = True
            first = max(begin, self.dense_below)
            queries.append(
                RoutedQueries(
                    new=slice(row, row + end - begin),
                    rows=slice(row + first - begin, row + end - begin),
                    slots=(blocks[:, None] * self.block_size + offsets).view(-1)[:end],
                    phase="decode" if spans.decodes[request] else "prefill",
                )
            )
        return queries, unpack

    def _dense(self, common: CommonAttentionMetadata, spans: _Spans) -> DenseQueries | None:
        ends = np.clip(self.dense_below, spans.begins, spans.ends)
        lengths = ends - spans.begins
        chosen = np.flatnonzero(lengths)
        if not len(chosen):
            return None
        rows = np.concatenate([np.arange(spans.rows[i], spans.rows[i] + lengths[i]) for i in chosen])
        query_start_loc = torch.from_numpy(np.append(0, lengths[chosen].cumsum()).astype(np.int32))
        metadata = super().build(
            0,
            common.replace(
                query_start_loc=query_start_loc,
                query_start_loc_cpu=query_start_loc,
                seq_lens=torch.from_numpy(ends[chosen].astype(np.int32)),
                num_reqs=len(chosen),
                num_actual_tokens=len(rows),
                max_query_len=int(lengths.max()),
                max_seq_len=int(ends[chosen].max()),
                block_table_tensor=common.block_table_tensor[chosen],
            ),
        )
        return DenseQueries(torch.from_numpy(rows), metadata)


class FocusCPUImpl(CPUAttentionBackendImpl):
    """One attention layer; dense, exactly as vLLM's, until `focus` is set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.focus: LayerFocus | None = None
        self._cache: _Cache | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(layer, key, value, self._halves(kv_cache).stock, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FocusCPUMetadata | None,  # type: ignore[override]
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend, dense below `dense_below` and routed from there; shapes as in the parent class."""
        scales = (output_scale, output_block_scale)
        if attn_metadata is None:  # profiling
            return super().forward(layer, query, key, value, kv_cache, None, output, *scales)
        focus, cache = self.focus, self._halves(kv_cache)
        if focus is None:
            return super().forward(layer, query, key, value, cache.stock, attn_metadata, output, *scales)
        slots, dense = attn_metadata.new_slots, attn_metadata.dense
        assert focus.store is not None
        if not attn_metadata.deferred:
            focus.store.index_copy_(0, slots, focus.key_groups[: len(slots)])
        if not attn_metadata.routed:
            return super().forward(layer, query, key, value, cache.stock, attn_metadata, output, *scales)
        if dense is not None:
            part = query[dense.rows]
            output[dense.rows] = super().forward(
                layer, part, key, value, cache.stock, dense.metadata, torch.empty_like(part), *scales
            )
        cache.unpack(attn_metadata.unpack, self.isa)
        for queries in attn_metadata.routed:
            new = queries.new
            cache.rows.index_copy_(0, slots[new], torch.cat([key[new], value[new]], dim=-1))
        for queries in attn_metadata.routed:
            output[queries.rows] = self._attend(focus, query[queries.rows], queries, cache)
        return output

    def _halves(self, kv_cache: torch.Tensor) -> _Cache:
        if self._cache is None or self._cache.whole is not kv_cache:
            self._cache = _Cache.of(kv_cache)
            if self.focus is not None:
                self.focus.store = torch.zeros(len(self._cache.rows), dtype=self.focus.key_groups.dtype)
        return self._cache

    def _attend(
        self, focus: LayerFocus, query: torch.Tensor, queries: RoutedQueries, cache: _Cache
    ) -> torch.Tensor:
        assert focus.store is not None
        keys = PagedKeys(cache.rows, queries.slots, focus.store.index_select(0, queries.slots))
        output, pairs = focus_sdpa(
            query, focus.query_groups[queries.rows], keys, focus.config, self.scale, self.logits_soft_cap
        )
        seq_len = len(queries.slots)
        focus.counts.add(queries.phase, _causal_pairs(seq_len - len(query), seq_len), pairs)
        return output


@dataclasses.dataclass(frozen=True, slots=True)
class _Cache:
    """One layer's KV cache as its two halves."""

    whole: torch.Tensor
    """As vLLM allocated it."""
    stock: torch.Tensor
    """`[num_blocks, num_kv_heads, block_size, 2 * head_size]`, in the layout of vLLM's kernels."""
    rows: torch.Tensor
    """`[num_slots, num_kv_heads, 2 * head_size]`."""

    @classmethod
    def of(cls, whole: torch.Tensor) -> _Cache:
        num_blocks, num_kv_heads, block_size, content = whole.shape
        stock, rows = whole.view(2, num_blocks, num_kv_heads, block_size, content // 2)
        return cls(whole, stock, rows.view(num_blocks * block_size, num_kv_heads, content // 2))

    def unpack(self, blocks: list[int], isa: str) -> None:
        """Write the rows of `blocks`."""
        num_blocks, num_kv_heads, block_size, content = self.stock.shape
        order = _row_order(self.stock.dtype, block_size, content // 2, isa)
        bits = torch.int16 if self.stock.itemsize == 2 else torch.int32  # NumPy has no bfloat16
        packed = self.stock.view(bits).view(num_blocks, num_kv_heads, -1).numpy()
        rows = self.rows.view(bits).view(num_blocks, block_size, num_kv_heads, content).numpy()
        for block in blocks:
            rows[block] = packed[block].take(order, axis=1).swapaxes(0, 1)


@functools.cache
def _row_order(dtype: torch.dtype, block_size: int, head_size: int, isa: str) -> IntArray:
    """Return where a block of vLLM's layout has each element of its rows.

    Found by having vLLM store numbers that say where they came from, so it holds for any instruction set.

    Returns:
        `[block_size, 2 * head_size]`, int64 offsets within one head's block.
    """
    base = 256  # every integer below is exact in bfloat16
    source = torch.arange(block_size * 2 * head_size).view(block_size, 1, 2 * head_size)
    digits = []
    for digit in (source % base, source // base):
        key, value = digit.to(dtype).chunk(2, dim=-1)
        key_block, value_block = block = torch.zeros(2, 1, 1, block_size, head_size, dtype=dtype)
        slots = torch.arange(block_size)
        ops.cpu_attn_reshape_and_cache(
            key.contiguous(), value.contiguous(), key_block, value_block, slots, isa
        )
        digits.append(block.view(-1).long())
    return (digits[0] + base * digits[1]).argsort().view(block_size, 2 * head_size).numpy()
