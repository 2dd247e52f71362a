"""The CPU attention backend: vLLM's own for dense queries, `kernels.sdpa` for routed ones.

vLLM's CPU kernels keep keys transposed in tiles whose layout depends on the instruction set, so a
token's key cannot be read alone. A Focus page therefore has two halves of equal size: the stock page,
then every token's keys and values again as a row `[num_kv_heads, 2 * head_size]`. vLLM accounts
for both: the same memory holds half as many tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
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
    slots: torch.Tensor
    """`[seq_len]`, int64: the KV slot of every position up to the last query."""
    row_ids: torch.Tensor
    """`[seq_len]`, int64: where in `_rows` each position's keys and values are."""
    phase: str
    """"prefill" or "decode"."""


@dataclasses.dataclass(frozen=True, slots=True)
class DenseQueries:
    """The batch's queries at positions below `dense_below`."""

    rows: torch.Tensor
    """`[num_dense]`, int64: where they are in the batch."""
    metadata: CPUAttentionMetadata
    pairs: dict[str, int]
    """(query, key) pairs by phase."""


@dataclasses.dataclass
class FocusCPUMetadata(CPUAttentionMetadata):
    """vLLM's metadata of the whole batch, and how routed layers split it."""

    new_slots: torch.Tensor | None = None
    """`[num_actual_tokens]`, int64: `slot_mapping` without padding."""
    new_row_ids: torch.Tensor | None = None
    """`[num_actual_tokens]`, int64: where in `_rows` the new tokens go."""
    dense: DenseQueries | None = None
    routed: list[RoutedQueries] = dataclasses.field(default_factory=list)


class FocusCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits each batch at `dense_below`, once for all layers."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        context = vllm_config.compilation_config.static_forward_context
        focuses = [context[name].impl.focus for name in layer_names]
        configs = [focus.config for focus in focuses if focus is not None]
        self.dense_below = configs[0].dense_below if configs else None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FocusCPUMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        fields = {field.name: getattr(stock, field.name) for field in dataclasses.fields(stock)}
        if self.dense_below is None:
            return FocusCPUMetadata(**fields)
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        seq_lens = common_attn_metadata.seq_lens.tolist()
        spans = [
            _Span(row, seq_len - (next_row - row), seq_len)
            for row, next_row, seq_len in zip(starts[:-1], starts[1:], seq_lens, strict=True)
        ]
        new_slots = stock.slot_mapping[: stock.num_actual_tokens].long()
        return FocusCPUMetadata(
            **fields,
            new_slots=new_slots,
            new_row_ids=_row_ids(new_slots, self.block_size),
            dense=self._dense(common_attn_metadata, spans, stock),
            routed=self._routed(common_attn_metadata, spans),
        )

    def _routed(self, common: CommonAttentionMetadata, spans: list[_Span]) -> list[RoutedQueries]:
        assert self.dense_below is not None
        routed = []
        offsets = torch.arange(self.block_size)
        for span, blocks in zip(spans, common.block_table_tensor, strict=False):
            begin = max(span.begin, self.dense_below)
            if begin >= span.end:
                continue
            num_blocks = -(-span.end // self.block_size)
            slots = (blocks[:num_blocks, None].long() * self.block_size + offsets).view(-1)[: span.end]
            rows = slice(span.row + begin - span.begin, span.row + span.end - span.begin)
            routed.append(RoutedQueries(rows, slots, _row_ids(slots, self.block_size), span.phase))
        return routed

    def _dense(
        self, common: CommonAttentionMetadata, spans: list[_Span], stock: CPUAttentionMetadata
    ) -> DenseQueries | None:
        assert self.dense_below is not None
        ends = [min(span.end, self.dense_below) for span in spans]
        chosen = [i for i, span in enumerate(spans) if ends[i] > span.begin]
        if not chosen:
            return None
        lengths = torch.tensor([ends[i] - spans[i].begin for i in chosen])
        pairs = {"prefill": 0, "decode": 0}
        for i in chosen:
            pairs[spans[i].phase] += _causal_pairs(spans[i].begin, ends[i])
        rows = torch.cat([
            torch.arange(spans[i].row, spans[i].row + ends[i] - spans[i].begin) for i in chosen
        ])  # fmt: skip
        if len(rows) == stock.num_actual_tokens:
            return DenseQueries(rows, stock, pairs)
        query_start_loc = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        seq_lens = torch.tensor([ends[i] for i in chosen], dtype=torch.int32)
        metadata = super().build(
            0,
            common.replace(
                query_start_loc=query_start_loc,
                query_start_loc_cpu=query_start_loc,
                seq_lens=seq_lens,
                num_reqs=len(chosen),
                num_actual_tokens=len(rows),
                max_query_len=int(lengths.max()),
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=common.block_table_tensor[chosen],
            ),
        )
        return DenseQueries(rows, metadata, pairs)


@dataclasses.dataclass(frozen=True, slots=True)
class _Span:
    """One request in the batch: its first row, and the positions [begin, end) of its queries."""

    row: int
    begin: int
    end: int

    @property
    def phase(self) -> str:
        return "decode" if self.end - self.begin == 1 and self.begin > 0 else "prefill"


def _causal_pairs(begin: int, end: int) -> int:
    """Count the (query, key) pairs of dense causal attention for queries at [begin, end)."""
    return (end * (end + 1) - begin * (begin + 1)) // 2


class FocusCPUImpl(CPUAttentionBackendImpl):
    """One attention layer; dense, exactly as vLLM's, until `focus` is set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.focus: LayerFocus | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(layer, key, value, _stock_half(kv_cache), slot_mapping)

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
        stock = _stock_half(kv_cache)
        if self.focus is None:
            return super().forward(layer, query, key, value, stock, attn_metadata, output, *scales)
        self._store(self.focus, key, value, kv_cache, attn_metadata)
        dense = attn_metadata.dense
        if dense is not None:
            for phase, pairs in dense.pairs.items():
                self.focus.counts.add(phase, pairs, pairs)
            if not attn_metadata.routed:
                return super().forward(layer, query, key, value, stock, dense.metadata, output, *scales)
            part = query[dense.rows]
            output[dense.rows] = super().forward(
                layer, part, key, value, stock, dense.metadata, torch.empty_like(part), *scales
            )
        for queries in attn_metadata.routed:
            output[queries.rows] = self._attend(self.focus, query[queries.rows], queries, kv_cache)
        return output

    def _store(
        self,
        focus: LayerFocus,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FocusCPUMetadata,
    ) -> None:
        """Keep the new tokens' groups, and their keys and values as rows."""
        num_slots = kv_cache.shape[0] * kv_cache.shape[2]
        if focus.store is None or len(focus.store) != num_slots:
            focus.store = torch.zeros(num_slots, dtype=focus.key_groups.dtype)
        assert attn_metadata.new_slots is not None
        assert attn_metadata.new_row_ids is not None
        num_tokens = len(attn_metadata.new_slots)
        focus.store.index_copy_(0, attn_metadata.new_slots, focus.key_groups[:num_tokens])
        rows = torch.cat([key[:num_tokens], value[:num_tokens]], dim=-1)
        _rows(kv_cache).index_copy_(0, attn_metadata.new_row_ids, rows)

    def _attend(
        self, focus: LayerFocus, query: torch.Tensor, queries: RoutedQueries, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        assert focus.store is not None
        keys = PagedKeys(_rows(kv_cache), queries.row_ids, focus.store.index_select(0, queries.slots))
        output, pairs = focus_sdpa(
            query, focus.query_groups[queries.rows], keys, focus.config, self.scale, self.logits_soft_cap
        )
        seq_len = len(queries.slots)
        focus.counts.add(queries.phase, _causal_pairs(seq_len - len(query), seq_len), pairs)
        return output


def _stock_half(kv_cache: torch.Tensor) -> torch.Tensor:
    """Return vLLM's half of each page, `[num_blocks, num_kv_heads, block_size, 2 * head_size]`."""
    num_blocks, num_kv_heads, block_size, content = kv_cache.shape
    halves = kv_cache.view(num_blocks, 2, num_kv_heads, block_size, content // 2)
    return halves[:, 0]


def _rows(kv_cache: torch.Tensor) -> torch.Tensor:
    """Return all pages as rows `[num_blocks * 2 * block_size, num_kv_heads, 2 * head_size]`."""
    num_blocks, num_kv_heads, block_size, content = kv_cache.shape
    return kv_cache.view(num_blocks * 2 * block_size, num_kv_heads, content // 2)


def _row_ids(slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return where in `_rows` the tokens at `slots` are."""
    return slots + (slots // block_size + 1) * block_size
