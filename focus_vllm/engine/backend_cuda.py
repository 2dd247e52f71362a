"""The CUDA attention backend: vLLM's FlashAttention, over lists of slots where a layer is routed.

Decodes come first in a batch (`reorder_batch_threshold`) and take one FlashAttention call over lists that are
built on the device, or without FlashAttention 3 one launch of our own, so batches of decodes alone run in
full CUDA graphs. Where a decode has several queries, as with speculative decoding, each of them is a sequence
of its own, of a length that the device finds.
Prefill chunks are cut at `dense_below`: queries before it go through the stock call, the rest through
`prefill_attention`. Where they are so few that launching all that would take longer, the whole batch is
served like decodes, by our own launch. A batch whose requests are all shorter than `dense_below` is stock
vLLM's, bit by bit, save that without FlashAttention 3 decodes in full CUDA graphs are our own kernel's.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides, is_quantized_kv_cache
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.fa_utils import is_fa_version_supported
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
from focus_vllm.engine.flash import FlashAttention2, FlashAttention3
from focus_vllm.engine.overlap import Beside, mark, rejoin
from focus_vllm.engine.settings import FocusUnsupportedError
from focus_vllm.engine.state import LayerFocus
from focus_vllm.kernels.attention import (
    DecodeScratch,
    FlashAttention,
    PrefillScratch,
    Sequences,
    decode_attention,
    decode_scratch_shapes,
    prefill_attention,
)
from focus_vllm.kernels.decode_lists import Progress, build_decode_lists
from focus_vllm.kernels.gather import PAGE, GatheredAttention, GatherScratch, gather_shapes
from focus_vllm.kernels.launch import Fixed, Repeated
from focus_vllm.kernels.listed import ListedAttention
from focus_vllm.kernels.near import GROUP_BITS, Cache, NearKeys, Scores, near_tile
from focus_vllm.kernels.plan import (
    BLOCK_QUERIES,
    Chunk,
    DenseQueries,
    PrefillPlan,
    SeparateQueries,
    dense_queries,
    expected_keys,
    index_capacity,
    list_capacity,
    lists_per_query,
    most_segments,
    near_keys,
    plan_waves,
    signatures,
)
from focus_vllm.kernels.store import address_of, write_stores
from focus_vllm.kernels.warmup import compile_kernels

LIST_BYTES = 256 * 2**20
"""What decode lists may take: 64 requests of 1M tokens or 512 of 128K in one FlashAttention call. Beyond that
a step takes several."""
PREFILL_LIST_BYTES = 64 * 2**20
"""What prefill lists take at least: with 8 groups, chunks of requests of 2M tokens together in one wave."""
LISTED_QUERIES = 128
"""Queries that have room for lists of their own however few requests there may be."""
LISTED_BYTES = 5 * 2**28
"""Keys and values, counted for every query that lists them, up to which prefills are served like decodes.

One H200, 2026-11-26, 8B's shape: 64 queries behind 32,768 tokens, 1.2 GB, take 27.1 ms like that and 29.9
with prefill's launches; 256 behind 8,192, 1.6 GB, 23.8 and 22.2; 64 behind 131,072, 4.5 GB, 97 and 89.
"""


def gathers(flash_attn_version: int | None) -> bool:
    """Return whether FlashAttention cannot read lists in place: if it is not version 3, or FOCUS_GATHER=1."""
    return flash_attn_version != 3 or os.environ.get("FOCUS_GATHER") == "1"


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


Buffers = list[tuple[tuple[int, ...], torch.dtype]]


@dataclasses.dataclass(frozen=True, slots=True)
class Capacity:
    """Sizes of the scratch buffers, which vLLM's workspace holds for all layers."""

    lists: int
    index: int
    rows: int
    near: int
    decode_rows: int
    listed_keys: int
    """Most keys of all prefills' queries together to list for each query."""
    max_model_len: int
    gather: tuple[int, int]
    """Pages and table entries; zeros where lists are read in place."""

    @classmethod
    def of(
        cls, config: FocusConfig, vllm_config: VllmConfig, token_bytes: int, copied: bool = False
    ) -> Capacity:
        """Return what any step of this engine fits in.

        Args:
            config: The mask's settings.
            vllm_config: The engine's.
            token_bytes: Bytes of a token's keys and values in one layer.
            copied: Whether keys that prefill has listed are copied.
        """
        scheduler, max_model_len = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
        tokens = scheduler.max_num_batched_tokens
        copies, num_lists = lists_per_query(config), len(signatures(config))
        rows = max(tokens, BLOCK_QUERIES * copies)
        near = near_keys(config, rows)
        most_queries = max(scheduler.max_num_seqs, LISTED_QUERIES)
        (decode_rows, _), _ = decode_scratch_shapes(most_queries, max_model_len, LIST_BYTES)
        lists, gather = list_capacity(config, max_model_len, PREFILL_LIST_BYTES // 4), (0, 0)
        if copied:
            lists = list_capacity(config, max_model_len)  # what is listed is copied
            segments, blocks = most_segments(config, near), rows // copies // BLOCK_QUERIES + 1
            gather = gather_shapes(num_lists, segments, blocks, max_model_len)
        return cls(
            lists=lists,
            index=index_capacity(config, lists // max(num_lists, 1), tokens, rows, near),
            rows=rows,
            near=near,
            decode_rows=decode_rows,
            # A budget is for queries computed alone.
            listed_keys=0 if config.decode_budget is not None else LISTED_BYTES // token_bytes,
            max_model_len=max_model_len,
            gather=gather,
        )

    def prefill_buffers(self, heads: tuple[int, int, int], query: torch.dtype, out: torch.dtype) -> Buffers:
        """Return the buffers of `PrefillScratch`; `heads` is heads, key-value heads and head size."""
        num_heads, num_kv_heads, head_size = heads
        near = (self.near, num_kv_heads, head_size)
        return [
            ((self.lists,), torch.int32),
            ((self.index,), torch.int32),
            ((self.rows, num_heads, head_size), query),
            ((self.rows, num_heads, head_size), out),
            (near, out),
            (near, out),
            ((self.near, GROUP_BITS), out),
        ]

    def decode_buffers(self) -> Buffers:
        """Return the buffers of `DecodeScratch`."""
        return [((self.decode_rows, self.max_model_len), torch.int32), ((self.decode_rows,), torch.int32)]

    def gather_buffers(self, num_kv_heads: int, head_size: int, cache: torch.dtype) -> Buffers:
        """Return the buffers of `GatherScratch`; none where lists are read in place."""
        pages, table = self.gather
        shape = (pages, PAGE, num_kv_heads, head_size)
        return [(shape, cache), (shape, cache), ((table,), torch.int32)] if pages else []


@dataclasses.dataclass(frozen=True, slots=True)
class FocusBatch:
    """How routed layers split a batch."""

    config: FocusConfig
    num_decodes: int
    num_decode_tokens: int
    """As many as decodes, unless there are drafts or prefills are served like decodes."""
    query_start_loc: torch.Tensor | None
    """`[num_decodes + 1]`, int32, if some have several queries."""
    dense: DenseQueries | None
    waves: list[PrefillPlan]
    first_decode: torch.Tensor
    """`[max_num_reqs + 1]`, int32: 0, 1, 2, ..."""
    progress: Progress
    short_turns: bool = False
    """Prefills are served like decodes, by our own kernel: one launch, where FlashAttention makes several and
    takes its time to begin. No full CUDA graph has them."""
    decode: Repeated = dataclasses.field(default_factory=Repeated)
    """What every layer launches for decodes."""
    prefill: Repeated = dataclasses.field(default_factory=Repeated)
    """What every layer launches for `waves`."""


class Stores:
    """The routed layers of a KV cache group, whose tokens have the same slots."""

    def __init__(self, layers: list[LayerFocus]) -> None:
        """`layers` are in the model's order."""
        self.layers = layers
        self._rows: list[torch.Tensor | None] = []
        self._addresses: torch.Tensor | None = None

    def addresses(self) -> torch.Tensor:
        """Return `[num_layers, 2]`, int64, as `write_stores` takes them."""
        rows = [layer.address for layer in self.layers]
        if self._addresses is None or any(new is not old for new, old in zip(rows, self._rows, strict=True)):
            _eager_step_needed()
            self._rows, self._addresses = rows, torch.cat([row for row in rows if row is not None])
        return self._addresses


def _eager_step_needed() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the group store must exist before a CUDA graph is captured: run an eager step")


@dataclasses.dataclass
class FocusFlashAttentionMetadata(FlashAttentionMetadata):
    """vLLM's metadata and, unless every query of the batch is dense, how routed layers split it."""

    focus: FocusBatch | None = None
    dense_pairs: tuple[int, int] = (0, 0)
    """(query, key) pairs of prefill and decode that routed layers leave to the stock call."""
    stores: Stores | None = None
    """What one launch stores the groups of, in a step that is all dense."""


class FocusFlashAttentionMetadataBuilder(FlashAttentionMetadataBuilder):
    """Splits each batch on the host, once for all layers, from lengths that vLLM has there."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        context = vllm_config.compilation_config.static_forward_context
        impls = [context[name].impl for name in sorted(layer_names, key=extract_layer_index)]
        routed = [impl for impl in impls if impl.focus is not None]
        self.focus_config = _config(routed[0].focus) if routed else None
        self.capacity = routed[0].scratch_capacity() if routed else None
        self.stores = Stores([impl.focus for impl in routed])
        scheduler, graphs = vllm_config.scheduler_config, vllm_config.compilation_config
        most = max(scheduler.max_num_seqs, graphs.max_cudagraph_capture_size or 0, LISTED_QUERIES)
        self.first_decode = torch.arange(most + 1, dtype=torch.int32, device=device)
        self.progress = Progress.zeros(most, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FocusFlashAttentionMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        focus, dense_pairs = self._split(common_attn_metadata), (0, 0)
        if self.focus_config is not None:
            dense_pairs = _dense_pairs(
                common_attn_metadata, self.focus_config.dense_below, focus, self.reorder_batch_threshold or 1
            )
        return FocusFlashAttentionMetadata(
            **vars(stock), focus=focus, dense_pairs=dense_pairs, stores=self.stores
        )

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def _split(self, common: CommonAttentionMetadata) -> FocusBatch | None:
        config = self.focus_config
        # At capture max_seq_len is max_model_len: a graph takes the routed path whatever its dummy lengths.
        if config is None or common.max_seq_len <= config.dense_below:
            return None
        num_decodes, num_prefills, _, _ = split_decodes_and_prefills(
            common, self.reorder_batch_threshold or 1
        )
        capacity = self.capacity
        assert capacity is not None
        chunks = _prefill_chunks(common, num_decodes) if num_prefills else []
        short_turns = _few_queries(chunks, config, capacity, common.num_actual_tokens)
        if short_turns:
            num_decodes, chunks = common.num_reqs, []
        decodes = config, num_decodes, *_decode_queries(common, num_decodes)
        if not chunks:
            return FocusBatch(*decodes, None, [], self.first_decode, self.progress, short_turns)
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
        return FocusBatch(*decodes, dense, waves, self.first_decode, self.progress)


def _decode_queries(common: CommonAttentionMetadata, num_decodes: int) -> tuple[int, torch.Tensor | None]:
    """Return how many queries the decodes have and, if some have several, where each one's begin."""
    starts = common.query_start_loc_cpu[: num_decodes + 1]
    if common.max_query_len == 1 or not (starts.diff() > 1).any():
        return num_decodes, None
    # The lengths that go with them are the device's: those on the host count on every draft.
    return int(starts[-1]), common.query_start_loc[: num_decodes + 1]


def _config(focus: LayerFocus) -> FocusConfig:
    return focus.config if focus.bias.dim() == 1 else SeparateQueries.of(focus.config)


def _dense_pairs(
    common: CommonAttentionMetadata, dense_below: int, focus: FocusBatch | None, most_decode_queries: int
) -> tuple[int, int]:
    if common.seq_lens_cpu_upper_bound is None:
        return 0, 0
    if focus is not None and focus.num_decodes == common.num_reqs:  # decodes are counted with their lists
        return 0, 0
    starts = common.query_start_loc_cpu.numpy().astype(np.int64)
    ends = common.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
    queries = starts[1:] - starts[:-1]
    begins, ends = ends - queries, np.minimum(ends, dense_below)
    pairs = np.maximum(ends * (ends + 1) - begins * (begins + 1), 0) // 2
    if focus is not None:
        return int(pairs[focus.num_decodes :].sum()), 0
    decodes = queries <= most_decode_queries
    return int(pairs[~decodes].sum()), int(pairs[decodes].sum())


def _decodes_alone(batch: FocusBatch) -> bool:
    return batch.dense is None and not batch.waves


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


def _few_queries(chunks: list[Chunk], config: FocusConfig, capacity: Capacity, num_tokens: int) -> bool:
    """Return whether prefills are faster with a list for each query, as decodes are served.

    Short turns of a conversation are: the GPU would wait for the host to launch what prefill takes.
    """
    keys = sum((chunk.end - chunk.begin) * expected_keys(config, chunk.end) for chunk in chunks)
    return (
        bool(chunks)
        and keys <= capacity.listed_keys
        and num_tokens <= capacity.decode_rows
        and all(
            chunk.begin >= config.dense_below  # what is dense is left to the stock call
            and chunk.end - chunk.begin <= config.window + 1  # no query's program reads what another's stores
            for chunk in chunks
        )
    )


@dataclasses.dataclass(frozen=True, slots=True)
class LayerTensors:
    """A layer's own tensors, as its launches take them at every step."""

    kv_cache: torch.Tensor
    """vLLM's, of which the keys and values are views."""
    keys: torch.Tensor
    values: torch.Tensor
    key_groups: torch.Tensor
    query_groups: torch.Tensor
    store: torch.Tensor
    address: torch.Tensor
    totals: torch.Tensor
    block_size: int
    fixed: Fixed


def _first(count: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.shape[0] == count else tensor[:count]


def _values(scores: Scores) -> tuple[float | torch.Tensor | None, ...]:
    return scores.scale, scores.softcap, scores.q_scale, scores.k_scale, scores.v_scale


class FocusFlashAttentionImpl(FlashAttentionImpl):
    """One attention layer; vLLM's own until `focus` is set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.focus: LayerFocus | None = None
        self.vllm_config = get_current_vllm_config_or_none()
        self.capacity: Capacity | None = None
        self.reserved = False
        self.listed: FocusBatch | None = None
        self.tensors: LayerTensors | None = None

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
        num_blocks, _, focus.block_size, _ = kv_cache.shape
        num_slots = num_blocks * focus.block_size
        # A tensor's `len` takes four times as long as its shape, and every layer of every prefill comes here.
        if focus.store is None or focus.store.shape[0] < num_slots:
            _eager_step_needed()
            self._new_store(focus, num_slots, kv_cache.device)
        elif focus.store.shape[0] > num_slots:
            focus.store = focus.store[:num_slots]

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
        """As vLLM's; see `FlashAttentionImpl.forward` for shapes.

        Raises:
            NotImplementedError: The output is to be quantized, which vLLM's own FlashAttention refuses alike.
                vLLM does not ask for it where `fused_output_quant_supported` says no, as here; without
                this check the output would be wrong in silence if it did.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("Focus does not quantize attention's output: turn that fusion off")
        if self.focus is not None and attn_metadata is None and not self.reserved:
            self._reserve(layer, query, output)
            self.reserved = True
        self._store_groups(attn_metadata)
        if self.focus is None or attn_metadata is None or attn_metadata.focus is None:
            stock: torch.Tensor = super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
            return stock
        num_tokens = attn_metadata.num_actual_tokens
        self._forward_focus(
            layer,
            self._tensors(self.focus, kv_cache),
            _first(num_tokens, query),
            attn_metadata,
            attn_metadata.focus,
            _first(num_tokens, output),
        )
        return output

    def list_decodes(self, metadata: FocusFlashAttentionMetadata) -> None:
        """Build the lists of a batch of decodes ahead of `forward`: right behind routing, inside `beside`.

        Leaves other batches to `forward`, and lists that do not fit in the scratch buffer together.
        """
        focus, batch = self.focus, metadata.focus
        if focus is None or focus.store is None or batch is None or not _decodes_alone(batch):
            return
        count = batch.num_decode_tokens
        scratch = self._decode_scratch(batch.first_decode, batch.progress)
        if count > len(scratch.lists) or not focus.block_size:
            return
        build_decode_lists(
            metadata.slot_mapping,
            focus.key_groups,
            focus.store,
            focus.query_groups,
            metadata.block_table,
            focus.block_size,
            metadata.seq_lens,
            batch.config,
            scratch.progress,
            scratch.lists,
            scratch.list_lens[:count],
            self._totals(focus),
            batch.query_start_loc,
            behind_routing=True,
        )
        mark(focus.store.device, Beside.LISTS)
        self.listed = batch

    def _new_store(self, focus: LayerFocus, num_slots: int, device: torch.device) -> None:
        focus.store = torch.zeros(num_slots, dtype=focus.key_groups.dtype, device=device)
        focus.address = address_of(focus.store, focus.key_groups)

    def _store_groups(self, metadata: FocusFlashAttentionMetadata | None) -> None:
        """Store the groups of this step's tokens, unless the launches for decodes or waves do.

        Of a dense step nobody reads them until it is over: the last layer stores those of all.
        """
        focus = self.focus
        if focus is None or metadata is None or focus.store is None:
            return
        if metadata.focus is None:
            assert metadata.stores is not None
            if focus is not metadata.stores.layers[-1]:
                return
            addresses = metadata.stores.addresses()
        elif metadata.focus.dense is not None and not metadata.focus.waves:
            assert focus.address is not None
            addresses = focus.address
        else:
            return
        # A graph that is replayed cannot count with this step's numbers.
        pairs = (0, 0) if torch.cuda.is_current_stream_capturing() else metadata.dense_pairs
        write_stores(addresses, focus.store.dtype, metadata.slot_mapping, self._totals(focus), pairs)

    def _totals(self, focus: LayerFocus) -> torch.Tensor:
        assert focus.counts.totals is not None
        return focus.counts.totals

    def _reserve(self, layer: Any, query: torch.Tensor, output: torch.Tensor) -> None:
        """While vLLM measures memory, take the scratch buffers, which are then counted, and compile."""
        assert self.focus is not None
        assert self.vllm_config is not None
        focus, device = self.focus, query.device
        self._check_flash_attention()
        context = self.vllm_config.compilation_config.static_forward_context
        # As many slots as a KV cache could have that filled the GPU: a byte beside the kilobytes of each.
        token_bytes = self._token_bytes() * sum(hasattr(module, "impl") for module in context.values())
        most_slots = torch.cuda.get_device_properties(device).total_memory // token_bytes
        self._new_store(focus, most_slots, device)
        rows = self.scratch_capacity().decode_rows
        start = torch.arange(rows + 1, dtype=torch.int32, device=device), Progress.zeros(rows, device)
        self._decode_scratch(*start)  # the workspace has its final size before it is used
        prefill, gather = self._prefill_scratch(query, output)
        compile_kernels(
            _config(focus),
            query,
            output,
            self.num_kv_heads,
            self._cache_dtype(output.dtype),
            self._scores(layer),
            prefill=prefill,
            decode=self._decode_scratch(*start),
            gather=gather,
            listed=self._own_attention(self._scores(layer)),
        )

    def _check_flash_attention(self) -> None:
        assert self.focus is not None
        version, config = self.vllm_flash_attn_version, self.focus.config
        reasons = []
        if version != 3 and (self.head_size > 256 or not is_fa_version_supported(2)):
            reasons.append(
                "it needs FlashAttention 3 or 2 and heads of at most 256 channels; this layer has "
                f"FlashAttention {version} and heads of {self.head_size}"
            )
        if gathers(version) and config.key_k > 1:
            reasons.append(f"key_k is {config.key_k}: without FlashAttention 3 it must be 1")
        if reasons:
            raise FocusUnsupportedError(reasons)

    def _cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return current_platform.fp8_dtype() if is_quantized_kv_cache(self.kv_cache_dtype) else dtype

    def _token_bytes(self) -> int:
        """Bytes of a token's keys and values in this layer."""
        assert self.vllm_config is not None
        dtype = self.vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        dtype = self._cache_dtype(dtype)
        return 2 * self.num_kv_heads * self.head_size * dtype.itemsize

    def scratch_capacity(self) -> Capacity:
        """Return the sizes of this layer's scratch buffers, which are those of every routed layer."""
        assert self.focus is not None
        assert self.vllm_config is not None
        if self.capacity is None:
            copied = gathers(self.vllm_flash_attn_version)
            self.capacity = Capacity.of(_config(self.focus), self.vllm_config, self._token_bytes(), copied)
        return self.capacity

    def _prefill_scratch(
        self, query: torch.Tensor, out: torch.Tensor
    ) -> tuple[PrefillScratch, GatherScratch | None]:
        capacity, heads = self.scratch_capacity(), (query.shape[1], self.num_kv_heads, query.shape[2])
        cache_dtype = self._cache_dtype(out.dtype)
        tensors = current_workspace_manager().get_simultaneous(
            *capacity.prefill_buffers(heads, query.dtype, out.dtype),
            *capacity.gather_buffers(self.num_kv_heads, self.head_size, cache_dtype),
        )
        (lists, index, sorted_query, sorted_out), near, copies = tensors[:4], tensors[4:7], tensors[7:]
        scratch = PrefillScratch(lists, index, sorted_query, sorted_out, NearKeys(*near))
        return scratch, GatherScratch(*copies) if copies else None

    def _decode_scratch(self, first_decode: torch.Tensor, progress: Progress) -> DecodeScratch:
        buffers = self.scratch_capacity().decode_buffers()
        lists, list_lens = current_workspace_manager().get_simultaneous(*buffers)
        return DecodeScratch(lists, list_lens, first_decode, progress)

    def _attention(
        self,
        scores: Scores,
        num_splits: int,
        gather: GatherScratch | None,
    ) -> FlashAttention:
        in_pages: FlashAttention = (
            FlashAttention3(scores, num_splits)
            if self.vllm_flash_attn_version == 3
            else FlashAttention2(scores)
        )
        return in_pages if gather is None else GatheredAttention(in_pages, gather)

    def _own_attention(self, scores: Scores) -> ListedAttention:
        return ListedAttention(scores, self.scratch_capacity().decode_rows)

    def _tensors(self, focus: LayerFocus, kv_cache: torch.Tensor) -> LayerTensors:
        known = self.tensors
        if known is not None and known.kv_cache is kv_cache and known.store is focus.store:
            return known
        assert focus.store is not None
        assert focus.address is not None
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        pages = kv_cache.transpose(1, 2).view(num_blocks * block_size, 1, num_kv_heads, 2 * self.head_size)
        keys, values = self._split_heads(pages)
        groups = focus.key_groups, focus.query_groups, focus.store, focus.address, self._totals(focus)
        fixed = Fixed(keys, values, *groups)
        self.tensors = LayerTensors(kv_cache, keys, values, *groups, block_size, fixed)
        return self.tensors

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
        tensors: LayerTensors,
        query: torch.Tensor,
        metadata: FocusFlashAttentionMetadata,
        batch: FocusBatch,
        output: torch.Tensor,
    ) -> None:
        scores = self._scores(layer)
        cache = Cache(tensors.keys, tensors.values, metadata.block_table, tensors.block_size)
        count = batch.num_decode_tokens
        if batch.num_decodes:
            self._decode(tensors, metadata, batch, scores, cache, _first(count, query), _first(count, output))
        if batch.dense is not None:
            keys, values = self._split_heads(tensors.kv_cache.transpose(1, 2))
            sequences = Sequences(
                metadata.block_table,
                batch.dense.requests,
                batch.dense.cu_seqlens_q,
                batch.dense.seqused_k,
                batch.dense.max_seqlen_q,
                batch.config.dense_below,
                causal=True,
            )
            attention = self._attention(scores, metadata.max_num_splits, None)
            attention(query[count:], keys, values, output[count:], sequences)
        if batch.waves:
            self._prefill(tensors, metadata, batch, scores, cache, query, output)

    def _decode(
        self,
        tensors: LayerTensors,
        metadata: FocusFlashAttentionMetadata,
        batch: FocusBatch,
        scores: Scores,
        cache: Cache,
        query: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        listed, self.listed = self.listed is batch, None
        if listed:
            rejoin(query.device, Beside.LISTS)
        capacity = self.scratch_capacity()
        one_call = batch.num_decode_tokens <= capacity.decode_rows
        attention: FlashAttention
        if batch.short_turns or any(capacity.gather):
            attention = self._own_attention(scores)
        else:
            # A schedule is for so many sequences, and of any lengths only if the most splits are given.
            one_query_each = _decodes_alone(batch) and batch.query_start_loc is None
            given = one_call and one_query_each and metadata.max_num_splits > 1
            schedule = metadata.scheduler_metadata if given else None
            attention = FlashAttention3(scores, metadata.max_num_splits, schedule)

        def launch() -> None:
            decode_attention(
                attention,
                query,
                output,
                metadata.slot_mapping,
                tensors.key_groups,
                tensors.query_groups,
                tensors.store,
                cache,
                metadata.seq_lens,
                batch.config,
                self._decode_scratch(batch.first_decode, batch.progress),
                tensors.totals,
                batch.query_start_loc,
                listed=listed,
            )

        if one_call:
            batch.decode(tensors.fixed, (query, output, *_values(scores), attention, listed), launch)
        else:
            launch()

    def _prefill(
        self,
        tensors: LayerTensors,
        metadata: FocusFlashAttentionMetadata,
        batch: FocusBatch,
        scores: Scores,
        cache: Cache,
        query: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        gather = self._prefill_scratch(query, output)[1] if any(self.scratch_capacity().gather) else None
        attention = self._attention(scores, metadata.max_num_splits, gather)
        store = tensors.store

        def launch() -> None:
            write_stores(
                tensors.address, store.dtype, metadata.slot_mapping, tensors.totals, metadata.dense_pairs
            )
            prefill_attention(
                attention,
                batch.waves,
                query,
                output,
                tensors.query_groups,
                store,
                cache,
                batch.config,
                scores,
                self._prefill_scratch(query, output)[0],
                tensors.totals,
            )

        batch.prefill(tensors.fixed, (query, output, *_values(scores), attention), launch)
