"""The CUDA attention backend: vLLM's FlashAttention, over lists of slots where a layer is routed.

Decodes come first in a batch (`reorder_batch_threshold`) and take one FlashAttention call over lists that are
built on the device, so batches of decodes alone run in full CUDA graphs. Prefill chunks are cut at
`dense_below`: queries before it go through the stock call, the rest through `prefill_attention`. A batch
whose requests are all shorter than `dense_below` is stock vLLM's, bit by bit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides, is_quantized_kv_cache
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.workspace import current_workspace_manager

from focus_vllm.config import FocusConfig
from focus_vllm.engine.flash import FlashAttention3
from focus_vllm.engine.state import LayerFocus
from focus_vllm.kernels.attention import (
    DecodeScratch,
    PrefillScratch,
    decode_attention,
    decode_scratch_shapes,
    prefill_attention,
)
from focus_vllm.kernels.near import GROUP_BITS, Cache, NearKeys, Scores, near_tile
from focus_vllm.kernels.plan import (
    BLOCK_QUERIES,
    Chunk,
    DenseQueries,
    PrefillPlan,
    dense_queries,
    list_capacity,
    near_keys,
    plan_waves,
)
from focus_vllm.kernels.store import write_store
from focus_vllm.kernels.warmup import compile_kernels

LIST_BYTES = 256 * 2**20
"""What decode lists may take: 64 requests of 1M tokens or 512 of 128K in one FlashAttention call. Beyond that
a step takes several. Prefill's group lists use the same memory."""


class FocusFlashAttentionBackend(FlashAttentionBackend):
    """vLLM's FlashAttention backend with routed layers."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FocusFlashAttentionImpl]:
        return FocusFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FocusFlashAttentionMetadataBuilder]:
        return FocusFlashAttentionMetadataBuilder


@dataclasses.dataclass(frozen=True, slots=True)
class Capacity:
    """Sizes of the scratch buffers, which vLLM's workspace holds for all layers."""

    lists: int
    rows: int
    near: int
    max_num_reqs: int
    max_model_len: int

    @classmethod
    def of(cls, config: FocusConfig, vllm_config: VllmConfig) -> Capacity:
        """Return what any step of this engine fits in."""
        scheduler, max_model_len = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
        tokens = scheduler.max_num_batched_tokens
        rows = max(tokens, BLOCK_QUERIES * config.top_k)
        return cls(
            lists=list_capacity(config, max_model_len, 0),
            rows=rows,
            near=near_keys(config, rows),
            max_num_reqs=scheduler.max_num_seqs,
            max_model_len=max_model_len,
        )

    def prefill(self, query: torch.Tensor, out: torch.Tensor, num_kv_heads: int) -> PrefillScratch:
        """Return the buffers of a prefill."""
        shape = (self.rows, query.shape[1], query.shape[2])
        near = (self.near, num_kv_heads, query.shape[2])
        lists, sorted_query, sorted_out, *copies = current_workspace_manager().get_simultaneous(
            ((self.lists,), torch.int32),
            (shape, query.dtype),
            (shape, out.dtype),
            (near, out.dtype),
            (near, out.dtype),
            ((self.near, GROUP_BITS), out.dtype),
        )
        return PrefillScratch(lists, sorted_query, sorted_out, NearKeys(*copies))

    def decode(self, first_decode: torch.Tensor) -> DecodeScratch:
        """Return the buffers of a decode."""
        shapes = decode_scratch_shapes(self.max_num_reqs, self.max_model_len, LIST_BYTES)
        lists, counts, list_lens = current_workspace_manager().get_simultaneous(
            *((shape, torch.int32) for shape in shapes)
        )
        return DecodeScratch(lists, counts, list_lens, first_decode)


@dataclasses.dataclass(frozen=True, slots=True)
class FocusBatch:
    """How routed layers split a batch."""

    num_decodes: int
    dense: DenseQueries | None
    waves: list[PrefillPlan]
    first_decode: torch.Tensor
    """`[max_num_reqs + 1]`, int32: 0, 1, 2, ..."""
    capacity: Capacity


@dataclasses.dataclass
class FocusFlashAttentionMetadata(FlashAttentionMetadata):
    """vLLM's metadata and, unless every query of the batch is dense, how routed layers split it."""

    focus: FocusBatch | None = None


class FocusFlashAttentionMetadataBuilder(FlashAttentionMetadataBuilder):
    """Splits each batch on the host, once for all layers, from lengths that vLLM has there."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    supports_update_block_table = False

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        context = vllm_config.compilation_config.static_forward_context
        focuses = [context[name].impl.focus for name in layer_names]
        configs = [focus.config for focus in focuses if focus is not None]
        self.focus_config = configs[0] if configs else None
        scheduler, graphs = vllm_config.scheduler_config, vllm_config.compilation_config
        most = max(scheduler.max_num_seqs, graphs.max_cudagraph_capture_size or 0)
        self.first_decode = torch.arange(most + 1, dtype=torch.int32, device=device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FocusFlashAttentionMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        fields = {field.name: getattr(stock, field.name) for field in dataclasses.fields(stock)}
        return FocusFlashAttentionMetadata(**fields, focus=self._split(common_attn_metadata))

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def _split(self, common: CommonAttentionMetadata) -> FocusBatch | None:
        config = self.focus_config
        # At capture max_seq_len is max_model_len: a graph takes the routed path whatever its dummy lengths.
        if config is None or common.max_seq_len <= config.dense_below:
            return None
        capacity = Capacity.of(config, self.vllm_config)
        num_decodes, num_prefills, _, _ = split_decodes_and_prefills(common, 1)
        if num_prefills == 0:
            return FocusBatch(num_decodes, None, [], self.first_decode, capacity)
        chunks = _prefill_chunks(common, num_decodes)
        waves = plan_waves(
            [routed for chunk in chunks if (routed := chunk.routed(config.dense_below))],
            config,
            near_tile(self.num_heads_q // self.num_heads_kv),
            capacity.lists,
            capacity.rows,
            capacity.near,
            self.device,
        )
        dense = dense_queries(chunks, config.dense_below, self.device)
        return FocusBatch(num_decodes, dense, waves, self.first_decode, capacity)


def _prefill_chunks(common: CommonAttentionMetadata, num_decodes: int) -> list[Chunk]:
    # Exact for prefills; decodes, for which it is a bound, are not looked at.
    assert common.seq_lens_cpu_upper_bound is not None
    starts = common.query_start_loc_cpu.tolist()
    ends = common.seq_lens_cpu_upper_bound.tolist()
    return [
        Chunk(
            request, starts[request], ends[request] - (starts[request + 1] - starts[request]), ends[request]
        )
        for request in range(num_decodes, common.num_reqs)
        if starts[request + 1] > starts[request]
    ]


class FocusFlashAttentionImpl(FlashAttentionImpl):
    """One attention layer; vLLM's own until `focus` is set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.focus: LayerFocus | None = None
        self.vllm_config = get_current_vllm_config_or_none()
        self.reserved = False

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        focus = self.focus
        if focus is None:
            return
        num_slots = kv_cache.shape[0] * kv_cache.shape[2]
        if focus.store is None or len(focus.store) != num_slots:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the group store must exist before a CUDA graph is captured: run an eager step"
                )
            focus.store = torch.zeros(num_slots, dtype=focus.key_groups.dtype, device=kv_cache.device)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As vLLM's; see `FlashAttentionImpl.forward` for shapes."""
        if self.focus is not None and attn_metadata is None and not self.reserved:
            self._reserve(layer, query, output)
            self.reserved = True
        self._store_groups(attn_metadata)
        if self.focus is None or attn_metadata is None or attn_metadata.focus is None:
            stock: torch.Tensor = super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
            return stock
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("Focus does not fuse output quantization")
        num_tokens = attn_metadata.num_actual_tokens
        self._forward_focus(
            layer,
            self.focus,
            query[:num_tokens],
            kv_cache,
            attn_metadata,
            attn_metadata.focus,
            output[:num_tokens],
        )
        return output

    def _store_groups(self, metadata: FocusFlashAttentionMetadata | None) -> None:
        """Store the groups of this step's tokens, unless all are decodes, whose lists' kernel stores them."""
        if self.focus is None or metadata is None or self.focus.store is None:
            return
        if metadata.focus is None or metadata.focus.waves or metadata.focus.dense is not None:
            write_store(self.focus.store, metadata.slot_mapping, self.focus.key_groups)

    def _reserve(self, layer: Any, query: torch.Tensor, output: torch.Tensor) -> None:
        """While vLLM measures memory, take the scratch buffers, which are then counted, and compile."""
        assert self.focus is not None
        assert self.vllm_config is not None
        if self.vllm_flash_attn_version != 3:
            raise RuntimeError(
                f"Focus needs FlashAttention 3, which runs on Hopper GPUs; this layer has version "
                f"{self.vllm_flash_attn_version}"
            )
        capacity = Capacity.of(self.focus.config, self.vllm_config)
        first_decode = torch.arange(2, dtype=torch.int32, device=query.device)
        scratch = capacity.decode(first_decode), capacity.prefill(query, output, self.num_kv_heads)
        quantized = is_quantized_kv_cache(self.kv_cache_dtype)
        compile_kernels(
            self.focus.config,
            query,
            output,
            self.num_kv_heads,
            current_platform.fp8_dtype() if quantized else output.dtype,
            self._scores(layer),
            prefill=scratch[1],
            decode=scratch[0],
        )

    def _cache(self, kv_cache: torch.Tensor, block_table: torch.Tensor) -> Cache:
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        pages = kv_cache.transpose(1, 2).view(num_blocks * block_size, 1, num_kv_heads, 2 * self.head_size)
        keys, values = self._split_heads(pages)
        return Cache(keys, values, block_table, block_size)

    def _split_heads(self, pages: torch.Tensor) -> list[torch.Tensor]:
        """Split `[num_pages, page_size, num_kv_heads, 2 * head_size]` as vLLM's own forward does."""
        if is_quantized_kv_cache(self.kv_cache_dtype):
            pages = pages.view(current_platform.fp8_dtype())
        return [
            canonicalize_singleton_dim_strides(part) for part in torch.split(pages, self.head_size, dim=-1)
        ]

    def _scores(self, layer: Any) -> Scores:
        softcap = float(self.logits_soft_cap or 0.0)
        if not is_quantized_kv_cache(self.kv_cache_dtype):
            return Scores(self.scale, softcap)
        return Scores(self.scale, softcap, layer._q_scale, layer._k_scale, layer._v_scale)

    def _forward_focus(
        self,
        layer: Any,
        focus: LayerFocus,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: FlashAttentionMetadata,
        batch: FocusBatch,
        output: torch.Tensor,
    ) -> None:
        assert focus.store is not None
        scores = self._scores(layer)
        attention = FlashAttention3(scores, metadata.max_num_splits)
        cache = self._cache(kv_cache, metadata.block_table)
        if batch.num_decodes:
            decodes = slice(0, batch.num_decodes)
            decode_attention(
                attention,
                query[decodes],
                output[decodes],
                metadata.slot_mapping,
                focus.key_groups,
                focus.query_groups,
                focus.store,
                cache,
                metadata.seq_lens,
                focus.config,
                batch.capacity.decode(batch.first_decode),
            )
        if batch.dense is not None:
            pages = kv_cache.transpose(1, 2)
            attention(
                query[batch.num_decodes :],
                *self._split_heads(pages),
                out=output[batch.num_decodes :],
                block_table=metadata.block_table,
                table_rows=batch.dense.requests,
                cu_seqlens_q=batch.dense.cu_seqlens_q,
                seqused_k=batch.dense.seqused_k,
                max_seqlen_q=batch.dense.max_seqlen_q,
                max_seqlen_k=focus.config.dense_below,
                causal=True,
            )
        if batch.waves:
            prefill_attention(
                attention,
                batch.waves,
                query,
                output,
                focus.query_groups,
                focus.store,
                cache,
                focus.config,
                scores,
                batch.capacity.prefill(query, output, self.num_kv_heads),
            )
