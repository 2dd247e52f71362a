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
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from focus_vllm.engine.state import LayerFocus
from focus_vllm.kernels.sdpa import PagedKeys, focus_sdpa


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
    """The batch's queries at positions below `dense_below`."""

    rows: torch.Tensor | None
    """`[num_dense]`, int64: where they are in the batch; None if they are all of it."""
    metadata: CPUAttentionMetadata
    pairs: dict[str, int]
    """(query, key) pairs by phase."""


@dataclasses.dataclass
class FocusCPUMetadata(CPUAttentionMetadata):
    """vLLM's metadata of the whole batch, and how routed layers split it."""

    new_slots: torch.Tensor | None = None
    """`[num_actual_tokens]`, int64: `slot_mapping` without padding."""
    dense: DenseQueries | None = None
    routed: list[RoutedQueries] = dataclasses.field(default_factory=list)
    unpack: torch.Tensor | None = None
    """`[num_blocks]`, int64: blocks that routed queries read and that have no rows yet."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Spans:
    """Each request's new tokens: their first row in the batch, and their positions [begin, end)."""

    rows: np.ndarray
    begins: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, common: CommonAttentionMetadata) -> _Spans:
        starts = common.query_start_loc_cpu.numpy().astype(np.int64)
        ends = common.seq_lens.numpy().astype(np.int64)
        return cls(starts[:-1], ends - np.diff(starts), ends)

    @property
    def decodes(self) -> np.ndarray:
        """Which requests decode; the others prefill."""
        return (self.ends - self.begins == 1) & (self.begins > 0)

    def causal_pairs(self, ends: np.ndarray) -> dict[str, int]:
        """Count the (query, key) pairs of dense causal attention for queries at [begin, end), by phase."""
        pairs = (ends * (ends + 1) - self.begins * (self.begins + 1)) // 2
        decodes = self.decodes
        return {"prefill": int(pairs[~decodes].sum()), "decode": int(pairs[decodes].sum())}


class FocusCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits each batch at `dense_below`, once for all layers, and knows which blocks have rows."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        context = vllm_config.compilation_config.static_forward_context
        focuses = [context[name].impl.focus for name in layer_names]
        configs = [focus.config for focus in focuses if focus is not None]
        self.dense_below = configs[0].dense_below if configs else None
        # A block's tokens are written in order, so each step either keeps this true or makes it false.
        self.has_rows = torch.zeros(vllm_config.cache_config.num_gpu_blocks, dtype=torch.bool)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FocusCPUMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = FocusCPUMetadata(**vars(stock))
        if self.dense_below is None:
            return metadata
        metadata.new_slots = slots = stock.slot_mapping[: stock.num_actual_tokens].long()
        spans = _Spans.of(common_attn_metadata)
        routed = spans.ends > self.dense_below
        if not routed.any():
            self.has_rows[slots // self.block_size] = False
            metadata.dense = DenseQueries(None, stock, spans.causal_pairs(spans.ends))
            return metadata
        without_rows = torch.from_numpy(np.repeat(~routed, spans.ends - spans.begins))
        self.has_rows[slots[without_rows] // self.block_size] = False
        metadata.routed, metadata.unpack = self._routed(common_attn_metadata, spans, routed)
        metadata.dense = self._dense(common_attn_metadata, spans, stock)
        return metadata

    def _routed(
        self, common: CommonAttentionMetadata, spans: _Spans, routed: np.ndarray
    ) -> tuple[list[RoutedQueries], torch.Tensor]:
        assert self.dense_below is not None
        queries, unpack = [], []
        offsets = torch.arange(self.block_size)
        for request in np.flatnonzero(routed):
            row, begin, end = (int(values[request]) for values in (spans.rows, spans.begins, spans.ends))
            blocks = common.block_table_tensor[request, : -(-end // self.block_size)].long()
            self.has_rows[blocks[-(-begin // self.block_size) :]] = True  # all of them are new
            unpack.append(blocks[~self.has_rows[blocks]])
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
        return queries, torch.cat(unpack)

    def _dense(
        self, common: CommonAttentionMetadata, spans: _Spans, stock: CPUAttentionMetadata
    ) -> DenseQueries | None:
        ends = np.maximum(np.minimum(spans.ends, self.dense_below), spans.begins)
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
        return DenseQueries(torch.from_numpy(rows), metadata, spans.causal_pairs(ends))


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
        self._store(focus, cache, attn_metadata)
        dense = attn_metadata.dense
        if dense is not None:
            focus.counts.add_dense(dense.pairs)
            if dense.rows is None:
                return super().forward(layer, query, key, value, cache.stock, attn_metadata, output, *scales)
            part = query[dense.rows]
            output[dense.rows] = super().forward(
                layer, part, key, value, cache.stock, dense.metadata, torch.empty_like(part), *scales
            )
        assert attn_metadata.new_slots is not None
        assert attn_metadata.unpack is not None
        cache.unpack(attn_metadata.unpack, self.isa)
        for queries in attn_metadata.routed:
            new = queries.new
            cache.rows[attn_metadata.new_slots[new]] = torch.cat([key[new], value[new]], dim=-1)
        for queries in attn_metadata.routed:
            output[queries.rows] = self._attend(focus, query[queries.rows], queries, cache)
        return output

    def _halves(self, kv_cache: torch.Tensor) -> _Cache:
        if self._cache is None or self._cache.whole is not kv_cache:
            self._cache = _Cache.of(kv_cache)
        return self._cache

    def _store(self, focus: LayerFocus, cache: _Cache, attn_metadata: FocusCPUMetadata) -> None:
        """Keep the new tokens' groups."""
        if focus.store is None or len(focus.store) != len(cache.rows):
            focus.store = torch.zeros(len(cache.rows), dtype=focus.key_groups.dtype)
        slots = attn_metadata.new_slots
        assert slots is not None
        focus.store.index_copy_(0, slots, focus.key_groups[: len(slots)])

    def _attend(
        self, focus: LayerFocus, query: torch.Tensor, queries: RoutedQueries, cache: _Cache
    ) -> torch.Tensor:
        assert focus.store is not None
        keys = PagedKeys(cache.rows, queries.slots, focus.store.index_select(0, queries.slots))
        output, pairs = focus_sdpa(
            query, focus.query_groups[queries.rows], keys, focus.config, self.scale, self.logits_soft_cap
        )
        end, begin = len(queries.slots), len(queries.slots) - len(query)
        candidates = (end * (end + 1) - begin * (begin + 1)) // 2
        focus.counts.add(queries.phase, candidates, pairs)
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

    def unpack(self, blocks: torch.Tensor, isa: str) -> None:
        """Write the rows of `blocks`, `[num]`, int64."""
        num_blocks, num_kv_heads, block_size, content = self.stock.shape
        order = _row_order(self.stock.dtype, block_size, content // 2, isa)
        bits = torch.int16 if self.stock.itemsize == 2 else torch.int32  # NumPy has no bfloat16
        packed = self.stock.view(bits).view(num_blocks, num_kv_heads, -1).numpy()
        rows = self.rows.view(bits).view(num_blocks, block_size, num_kv_heads, content).numpy()
        for block in blocks.tolist():
            rows[block] = packed[block].take(order, axis=1).swapaxes(0, 1)


@functools.cache
def _row_order(dtype: torch.dtype, block_size: int, head_size: int, isa: str) -> np.ndarray:
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
        block = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
        ops.cpu_attn_reshape_and_cache(
            key.contiguous(), value.contiguous(), *block.chunk(2, dim=2), torch.arange(block_size), isa
        )
        digits.append(block.view(-1).long())
    return (digits[0] + base * digits[1]).argsort().view(block_size, 2 * head_size).numpy()
