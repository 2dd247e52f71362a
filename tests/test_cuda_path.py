"""The CUDA backend without a GPU: a slow FlashAttention, Triton's interpreter, made-up batches."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernels import (
    DEVICE,
    GROUPS,
    SHAPES,
    assert_matches_definition,
    batch_of,
    out_dtype_of,
    settings,
)

from focus_vllm.config import FocusConfig
from focus_vllm.engine.overlap import Beside
from focus_vllm.engine.settings import FocusUnsupportedError
from focus_vllm.engine.state import AttentionCounts, LayerFocus
from focus_vllm.kernels import decode_lists
from focus_vllm.kernels.decode_lists import Progress
from focus_vllm.kernels.near import Scores
from focus_vllm.kernels.plan import SeparateQueries
from focus_vllm.kernels.store import address_of
from focus_vllm.reference import focus_mask
from loadtest.paged import PagedBatch, SlowFlashAttention

LENGTHS = {"seq_lens": [30, 700, 90, 250, 400], "query_lens": [1, 1, 90, 200, 60]}
"""Two decodes, then a chunk that is all dense, one that crosses dense_below and one that is all routed."""


@pytest.fixture(scope="module")
def backend() -> Iterator[Any]:
    extension = types.ModuleType("vllm.vllm_flash_attn")
    with pytest.MonkeyPatch.context() as patch:
        vllm = importlib.import_module("vllm")
        patch.setitem(sys.modules, extension.__name__, extension)
        patch.setattr(vllm, "vllm_flash_attn", extension, raising=False)
        yield importlib.import_module("focus_vllm.engine.backend_cuda")


class Workspace:
    """vLLM's scratch memory, full of garbage."""

    def get_simultaneous(self, *sizes: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
        tensors = [torch.empty(shape, dtype=dtype, device=DEVICE) for shape, dtype in sizes]
        for tensor in tensors:
            tensor.view(torch.uint8).fill_(255)  # NaN, or -1
        return tensors


DRAFTS = {"seq_lens": [30, 700, 102, 300, 250, 400], "query_lens": [1, 4, 4, 3, 200, 60]}
"""Decodes with up to three drafts, one of which crosses dense_below, then two chunks."""
VLLM_CONFIG = SimpleNamespace(
    scheduler_config=SimpleNamespace(max_num_batched_tokens=2048, max_num_seqs=8),
    model_config=SimpleNamespace(max_model_len=1024, dtype=torch.float32),
)


def metadata_of(
    backend: Any,
    batch: PagedBatch,
    config: FocusConfig | None,
    slots: torch.Tensor,
    capacity: Any = None,
    most_drafts: int = 0,
) -> Any:
    """What the builder adds to vLLM's metadata; on the host a decode's drafts all count as accepted."""
    builder = object.__new__(backend.FocusFlashAttentionMetadataBuilder)
    builder.focus_config, builder.capacity = config, capacity
    builder.device = torch.device(DEVICE)
    builder.num_heads_q, builder.num_heads_kv = batch.query.shape[1], batch.cache.shape[2]
    builder.first_decode = torch.arange(129, dtype=torch.int32, device=DEVICE)
    builder.progress = Progress.zeros(128, builder.device)
    builder.reorder_batch_threshold = 1 + most_drafts
    bounds = [
        length + most_drafts * (queries <= 1 + most_drafts)
        for length, queries in zip(batch.seq_lens, batch.query_lens, strict=True)
    ]
    seq_lens = torch.tensor(batch.seq_lens, dtype=torch.int32, device=DEVICE)
    common = SimpleNamespace(
        max_seq_len=max(bounds),
        max_query_len=max(batch.query_lens),
        num_reqs=len(batch.seq_lens),
        num_actual_tokens=sum(batch.query_lens),
        query_start_loc=torch.tensor(batch.query_start_loc, dtype=torch.int32, device=DEVICE),
        query_start_loc_cpu=torch.tensor(batch.query_start_loc),
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=torch.tensor(bounds),
    )
    focus = builder._split(common)
    return SimpleNamespace(
        num_actual_tokens=len(batch.query),
        block_table=batch.block_table,
        seq_lens=seq_lens,
        slot_mapping=slots,
        max_num_splits=32,
        scheduler_metadata=torch.tensor(len(batch.seq_lens)),
        focus=focus,
        dense_pairs=backend._dense_pairs(common, config.dense_below, focus, 1 + most_drafts)
        if config
        else (0, 0),
    )


def layer_of(backend: Any, batch: PagedBatch, slots: torch.Tensor, **changes: Any) -> Any:
    """A routed layer whose router chose the batch's groups."""
    impl = object.__new__(backend.FocusFlashAttentionImpl)
    impl.num_heads, impl.head_size = batch.query.shape[1:]
    impl.num_kv_heads = batch.cache.shape[2]
    impl.scale, impl.logits_soft_cap, impl.kv_cache_dtype = impl.head_size**-0.5, 0, "auto"
    impl.vllm_flash_attn_version, impl.vllm_config, impl.capacity = 3, VLLM_CONFIG, None
    impl.listed = impl.tensors = None
    counts = AttentionCounts(totals=torch.zeros(4, dtype=torch.int64, device=DEVICE))
    key_groups = batch.store[slots]
    batch.store[slots] = 0
    impl.focus = LayerFocus(
        config=batch.config,
        weight=torch.empty(0),
        bias=torch.empty(2, 0) if isinstance(batch.config, SeparateQueries) else torch.empty(0),
        key_groups=key_groups,
        query_groups=batch.query_groups,
        counts=counts,
        store=batch.store,
        address=address_of(batch.store, key_groups),
    )
    for name, value in changes.items():
        setattr(impl, name, value)
    return impl


def new_slots(batch: PagedBatch) -> torch.Tensor:
    return torch.cat([
        batch.slots(request)[-queries:] for request, queries in enumerate(batch.query_lens)
    ])  # fmt: skip


def forward(
    backend: Any,
    batch: PagedBatch,
    layer: Any = None,
    most_drafts: int = 0,
    metadata: Any = None,
    **changes: Any,
) -> tuple[torch.Tensor, dict[str, dict[str, int]]]:
    """Run a routed layer; return its output and what it counted."""
    slots = new_slots(batch)
    impl = layer_of(backend, batch, slots, **changes)
    if metadata is None:
        metadata = metadata_of(backend, batch, batch.config, slots, impl.scratch_capacity(), most_drafts)
    out = torch.full_like(batch.query, float("nan"), dtype=out_dtype_of(batch))
    cache = batch.cache.transpose(1, 2)
    if cache.dtype.itemsize == 1:
        cache = cache.view(torch.uint8)  # as vLLM keeps FP8
    impl.forward(layer, batch.query, None, None, cache, metadata, out)
    counts = impl.focus.counts.read()
    assert counts.pop("dense_queries") == {"prefill": 0, "decode": 0}, "not counted here"
    return out, counts


class Scheduled(SlowFlashAttention):
    """Takes vLLM's schedule, here the number of its sequences, for as many sequences only."""

    def __init__(self, scores: Scores, num_splits: int, schedule: torch.Tensor | None = None) -> None:
        super().__init__(scores)
        self.schedule = schedule

    def __call__(self, *args: Any) -> torch.Tensor:
        assert self.schedule is None or len(args[-1].seqused_k) == self.schedule
        return super().__call__(*args)


@pytest.fixture
def stand_ins(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_lists, "PROGRAMS", 32)  # the interpreter runs them one after another
    monkeypatch.setattr(backend, "FlashAttention3", Scheduled)
    monkeypatch.setattr(backend, "FlashAttention2", lambda scores: SlowFlashAttention(scores, 16))
    monkeypatch.setattr(backend, "current_workspace_manager", Workspace)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.parametrize("groups", ["1/1", "1/2", "2/2"])
@pytest.mark.usefixtures("stand_ins")
def test_batch_of_decodes_and_dense_and_routed_chunks_follows_the_definition(backend, groups):
    batch = batch_of(settings(groups, dense_below=100), **LENGTHS)
    out, counts = forward(backend, batch)
    assert_matches_definition(batch, out, from_position=0)
    assert counts == pairs_by_phase(batch)


@pytest.mark.parametrize("window", [64, 3])
@pytest.mark.parametrize("groups", ["1/1", "1/2", "2/2"])
@pytest.mark.usefixtures("stand_ins")
def test_drafts_are_verified_by_the_definition_however_many_the_host_thinks_were_accepted(
    backend, groups, window
):
    batch = batch_of(settings(groups, dense_below=100, window=window), **DRAFTS)
    stored = batch.store.clone()
    out, counts = forward(backend, batch, most_drafts=3)
    assert_matches_definition(batch, out, from_position=0)
    assert counts == pairs_by_phase(batch, most_drafts=3)
    assert torch.equal(batch.store, stored)


@pytest.mark.parametrize("seq_lens", [[30, 700, 102], [30, 50, 61]])
@pytest.mark.usefixtures("stand_ins")
def test_what_a_graph_captured_of_drafts_serves_later_batches_that_are_padded(backend, seq_lens):
    """A replayed graph keeps what Python did at capture; only the contents of vLLM's buffers are new."""
    captured = batch_of(settings("1/1", dense_below=100), seq_lens=[1024] * 4, query_lens=[4] * 4)
    batch = batch_of(captured.config, seq_lens=seq_lens, query_lens=[4] * 3)
    slots = torch.cat([new_slots(batch), torch.full((4,), -1, device=DEVICE)])

    def padded(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, values[:4]])

    impl = layer_of(backend, batch, new_slots(batch))
    impl.focus.key_groups, impl.focus.query_groups = map(padded, (impl.focus.key_groups, batch.query_groups))
    impl.focus.address = address_of(batch.store, impl.focus.key_groups)
    metadata = metadata_of(backend, captured, batch.config, slots, impl.scratch_capacity(), most_drafts=3)
    assert not metadata.focus.waves
    metadata.focus.query_start_loc.copy_(torch.tensor([0, 4, 8, 12, 12]))
    metadata.seq_lens.copy_(torch.tensor([*seq_lens, 0]))
    metadata.block_table = captured.block_table.zero_()
    metadata.block_table[:3, : batch.block_table.shape[1]] = batch.block_table
    stored, out = batch.store.clone(), torch.full_like(padded(batch.query), float("nan"))
    stored[new_slots(batch)] = impl.focus.key_groups[:12]
    impl.forward(None, padded(batch.query), None, None, batch.cache.transpose(1, 2), metadata, out)
    assert_matches_definition(batch, out[:12], from_position=0)
    assert torch.equal(batch.store, stored)
    counts = {name: counted["decode"] for name, counted in impl.focus.counts.read().items()}
    assert counts == {"dense_queries": 0} | {
        name: counted["decode"] for name, counted in pairs_by_phase(batch, most_drafts=3).items()
    }


TURNS = {"seq_lens": [30, 700, 400, 163], "query_lens": [1, 1, 20, 51]}
"""Two decodes, then short turns behind cached prompts: with a window of 50, 51 queries are the most."""


@pytest.mark.parametrize("kind", ["1/1", "1/2", "2/2", "own queries"])
@pytest.mark.usefixtures("stand_ins")
def test_short_turns_are_served_like_decodes(backend, monkeypatch, kind):
    monkeypatch.setattr(backend, "FlashAttention3", None)
    config = settings("1/1" if kind == "own queries" else kind, dense_below=100)
    batch = batch_of(SeparateQueries.of(config) if kind == "own queries" else config, **TURNS)
    slots, stored = new_slots(batch), batch.store.clone()
    capacity = layer_of(backend, batch, slots).scratch_capacity()
    focus = metadata_of(backend, batch, batch.config, slots, capacity).focus
    assert focus.short_turns
    assert (focus.num_decodes, focus.num_decode_tokens, focus.waves, focus.dense) == (4, 73, [], None)
    batch.store.copy_(stored)
    out, counts = forward(backend, batch)
    assert_matches_definition(batch, out, from_position=0)
    assert counts == pairs_by_phase(batch, most_drafts=50)
    assert torch.equal(batch.store, stored)


@pytest.mark.parametrize("why", ["longer than the window", "partly dense", "budget", "many keys", "no room"])
@pytest.mark.usefixtures("stand_ins")
def test_turns_that_lists_would_not_serve_well_are_prefills(backend, monkeypatch, why):
    lengths = {
        "longer than the window": {"seq_lens": [400, 700], "query_lens": [20, 52]},
        "partly dense": {"seq_lens": [400, 119], "query_lens": [20, 20]},
        "no room": {"seq_lens": [400] * 7, "query_lens": [20] * 7},
    }.get(why, TURNS)
    budget = {"decode_budget": 5} if why == "budget" else {}
    batch = batch_of(settings("1/1", dense_below=100, **budget), **lengths)
    slots = new_slots(batch)
    layer = layer_of(backend, batch, slots)
    if why == "many keys":
        # Of 8 groups a query attends to one, the sinks and the window: 98 keys of 400 and 69 of 163.
        keys = 20 * (55 + 43) + 51 * (55 + 14)
        monkeypatch.setattr(backend, "LISTED_BYTES", (keys - 1) * layer._token_bytes())
    capacity = layer.scratch_capacity()
    focus = metadata_of(backend, batch, batch.config, slots, capacity).focus
    assert focus.waves
    assert not focus.short_turns
    assert focus.num_decodes == lengths["query_lens"].count(1)
    if why == "many keys":
        assert capacity.listed_keys == keys - 1


@pytest.mark.usefixtures("stand_ins")
def test_a_batch_without_drafts_is_not_taken_apart(backend):
    batch = batch_of(settings("1/1", dense_below=100), seq_lens=[30, 700, 101], query_lens=[1, 1, 1])
    slots = new_slots(batch)
    capacity = layer_of(backend, batch, slots).scratch_capacity()
    focus = metadata_of(backend, batch, batch.config, slots, capacity, most_drafts=3).focus
    assert focus.query_start_loc is None
    assert not focus.short_turns, "full CUDA graphs are stock vLLM's below dense_below"
    assert (focus.num_decodes, focus.num_decode_tokens) == (3, 3)
    batch = batch_of(settings("1/1", dense_below=100), seq_lens=[30, 700], query_lens=[1, 3])
    focus = metadata_of(backend, batch, batch.config, new_slots(batch), capacity, most_drafts=3).focus
    assert focus.query_start_loc.tolist() == [0, 1, 4]
    assert (focus.num_decodes, focus.num_decode_tokens) == (2, 4)


@pytest.mark.usefixtures("stand_ins")
def test_quantized_output_is_refused_before_anything_is_written(backend):
    batch = batch_of(settings("1/1", dense_below=100), **LENGTHS)
    slots = new_slots(batch)
    impl = layer_of(backend, batch, slots)
    metadata = metadata_of(backend, batch, batch.config, slots, impl.scratch_capacity())
    stored, out = batch.store.clone(), torch.zeros_like(batch.query)
    for scales in ({"output_scale": torch.ones(1)}, {"output_block_scale": torch.ones(1)}):
        with pytest.raises(NotImplementedError, match="does not quantize attention's output"):
            impl.forward(None, batch.query, None, None, batch.cache.transpose(1, 2), metadata, out, **scales)
    assert torch.equal(batch.store, stored)
    assert not out.any()


@pytest.mark.usefixtures("stand_ins")
def test_layer_with_query_centroids_follows_the_definition(backend):
    batch = batch_of(SeparateQueries.of(settings("1/1", dense_below=100)), **LENGTHS)
    out, counts = forward(backend, batch)
    assert_matches_definition(batch, out, from_position=0)
    assert counts == pairs_by_phase(batch)


@pytest.mark.usefixtures("stand_ins")
def test_batch_of_decodes_alone_follows_the_definition(backend):
    batch = batch_of(settings("1/1", dense_below=100), seq_lens=[30, 700, 101], query_lens=[1, 1, 1])
    out, counts = forward(backend, batch)
    assert_matches_definition(batch, out, from_position=0)
    assert counts == pairs_by_phase(batch)


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 4, 2]])
@pytest.mark.parametrize("attention", ["FlashAttention3", "ListedAttention"])
@pytest.mark.usefixtures("stand_ins")
def test_decodes_listed_ahead_follow_the_definition(backend, monkeypatch, attention, query_lens):
    monkeypatch.setenv("FOCUS_GATHER", "1" if attention == "ListedAttention" else "0")
    batch = batch_of(
        settings("1/1", dense_below=100, window=3), seq_lens=[30, 700, 102], query_lens=query_lens
    )
    stored = batch.store.clone()
    scratch: dict[Any, list[torch.Tensor]] = {}  # what is listed ahead is found again in the same memory

    class KeptWorkspace(Workspace):
        def get_simultaneous(self, *sizes: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
            return scratch.setdefault(sizes, super().get_simultaneous(*sizes))

    class Noted(getattr(backend, attention)):
        def __call__(self, *args: Any) -> torch.Tensor:
            order.append("attention")
            return super().__call__(*args)

    order: list[Any] = []
    monkeypatch.setattr(backend, "rejoin", lambda device, what: order.append(what))
    monkeypatch.setattr(backend, attention, Noted)
    monkeypatch.setattr(backend, "current_workspace_manager", KeptWorkspace)
    slots = new_slots(batch)
    impl = layer_of(backend, batch, slots)
    metadata = metadata_of(backend, batch, batch.config, slots, impl.scratch_capacity(), most_drafts=3)
    impl.list_decodes(metadata)
    assert impl.listed is None, "nobody knows yet how long a block is"
    impl.focus.block_size = batch.cache.shape[1]
    impl.list_decodes(metadata)
    monkeypatch.setattr("focus_vllm.kernels.attention.build_decode_lists", None)
    out = torch.full_like(batch.query, float("nan"))
    impl.forward(None, batch.query, None, None, batch.cache.transpose(1, 2), metadata, out)
    assert_matches_definition(batch, out, from_position=0)
    selected = pairs_by_phase(batch, most_drafts=3)["selected_tokens"]
    assert selected == impl.focus.counts.read()["selected_tokens"]
    assert torch.equal(batch.store, stored)
    assert impl.listed is None
    assert order == [Beside.LISTS, "attention"], "lists may still be under way"


@pytest.mark.usefixtures("stand_ins")
def test_decodes_are_not_listed_ahead_beside_prefills(backend):
    batch = batch_of(settings("1/1", dense_below=100), **LENGTHS)
    slots = new_slots(batch)
    impl = layer_of(backend, batch, slots)
    impl.focus.block_size = batch.cache.shape[1]
    impl.list_decodes(metadata_of(backend, batch, batch.config, slots, impl.scratch_capacity()))
    assert impl.listed is None


@pytest.mark.parametrize(("mode", "listed"), [("NONE", 1), ("FULL", 1), ("PIECEWISE", 0)])
def test_lists_are_not_captured_in_graphs_without_attention(monkeypatch, mode, listed):
    from focus_vllm.engine import attach

    context = SimpleNamespace(
        cudagraph_runtime_mode=attach.CUDAGraphMode[mode], attn_metadata={"layer": "metadata"}
    )
    monkeypatch.setattr(attach, "get_forward_context", lambda: context)
    found: list[str] = []
    attach._list_decodes(SimpleNamespace(layer_name="layer", impl=SimpleNamespace(list_decodes=found.append)))
    assert found == ["metadata"] * listed
    context.attn_metadata = None  # the model runs without requests
    attach._list_decodes(SimpleNamespace(layer_name="layer", impl=None))


def pairs_by_phase(batch: PagedBatch, most_drafts: int = 0) -> dict[str, dict[str, int]]:
    """(query, key) pairs by the definition, decodes being single queries and their drafts."""
    counts = {name: {"prefill": 0, "decode": 0} for name in ("candidate_tokens", "selected_tokens")}
    for request, start in enumerate(batch.query_start_loc[:-1]):
        queries = batch.query_lens[request]
        phase = "decode" if queries <= 1 + most_drafts else "prefill"
        begin = batch.seq_lens[request] - queries
        keys = batch.store[batch.slots(request)]
        mask = focus_mask(batch.query_groups[start : start + queries], keys, batch.config, begin)
        counts["candidate_tokens"][phase] += sum(range(begin + 1, batch.seq_lens[request] + 1))
        counts["selected_tokens"][phase] += int(mask.sum())
    return counts


@pytest.mark.usefixtures("stand_ins")
def test_lists_are_copied_into_pages_where_flash_attention_cannot_read_them(backend):
    batch = batch_of(settings("1/2", dense_below=100), **LENGTHS)
    out, _ = forward(backend, batch, vllm_flash_attn_version=2)
    assert_matches_definition(batch, out, from_position=0)


@pytest.mark.usefixtures("stand_ins")
def test_copying_can_be_forced(backend, monkeypatch):
    batch = batch_of(settings("1/1", dense_below=0), seq_lens=[50], query_lens=[20])
    impl = layer_of(backend, batch, new_slots(batch))
    assert impl._prefill_scratch(batch.query, batch.query)[1] is None
    monkeypatch.setenv("FOCUS_GATHER", "1")
    impl.capacity = None
    assert impl._prefill_scratch(batch.query, batch.query)[1] is not None


@pytest.mark.parametrize(
    ("changes", "version", "expected"),
    [
        ({"key_k": 2, "top_k": 2}, 2, "key_k is 2"),
        ({}, 4, "FlashAttention 4 and heads of 64"),
        ({}, None, "FlashAttention None"),
    ],
)
def test_what_flash_attention_cannot_do_is_refused(backend, monkeypatch, changes, version, expected):
    monkeypatch.setattr(backend, "is_fa_version_supported", lambda number: number == 2 and version == 2)
    batch = batch_of(FocusConfig(dense_below=0, **changes), seq_lens=[5], query_lens=[5])
    impl = layer_of(backend, batch, new_slots(batch), vllm_flash_attn_version=version)
    with pytest.raises(FocusUnsupportedError, match=expected):
        impl._check_flash_attention()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gather", ["0", "1"])
@pytest.mark.usefixtures("stand_ins")
def test_fp8_cache_with_descales_follows_the_definition(backend, monkeypatch, shape, gather):
    monkeypatch.setenv("FOCUS_GATHER", gather)
    lengths = {"seq_lens": [300, 190], "query_lens": [1, 150]}
    batch = batch_of(settings("1/1", dense_below=100), shape, torch.float8_e4m3fn, **lengths)
    scales = {"_q_scale": torch.tensor(0.5), "_k_scale": torch.tensor(1.5), "_v_scale": torch.tensor(0.25)}
    out, _ = forward(backend, batch, SimpleNamespace(**scales), kv_cache_dtype="fp8")
    assert_scaled(batch, out, 0.75, 0.25)


def assert_scaled(batch: PagedBatch, out: torch.Tensor, score_scale: float, value_scale: float) -> None:
    scale = batch.query.shape[-1] ** -0.5 * score_scale
    for request, start in enumerate(batch.query_start_loc[:-1]):
        queries = batch.query_lens[request]
        expected = batch.reference(request, slice(0, queries), scale) * value_scale
        got = out[start : start + queries].float()
        assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.usefixtures("stand_ins")
def test_every_layer_of_a_step_follows_the_definition_with_its_own_tensors(backend, turn):
    lengths = {"seq_lens": [200, 300, 190], "query_lens": [1, 40, 150]}
    if turn:
        lengths = {"seq_lens": [200, 300], "query_lens": [1, 40]}
    batch = batch_of(settings("1/1", dense_below=100), "gqa", torch.float8_e4m3fn, **lengths)
    slots = new_slots(batch)
    capacity = layer_of(
        backend, dataclasses.replace(batch, store=batch.store.clone()), slots
    ).scratch_capacity()
    metadata = metadata_of(backend, batch, batch.config, slots, capacity)
    for q_scale, k_scale, v_scale in [(0.5, 1.5, 0.25), (1.0, 1.5, 0.25), (0.5, 0.5, 0.25), (0.5, 1.5, 2.0)]:
        layer = SimpleNamespace(
            _q_scale=torch.tensor(q_scale), _k_scale=torch.tensor(k_scale), _v_scale=torch.tensor(v_scale)
        )
        out, counts = forward(backend, batch, layer, metadata=metadata, kv_cache_dtype="fp8")
        assert_scaled(batch, out, q_scale * k_scale, v_scale)
        assert counts == pairs_by_phase(batch, most_drafts=39 if turn else 0)
        # The next layer's keys are elsewhere, and its tokens in other groups.
        batch = dataclasses.replace(batch, query=batch.query.clone(), cache=batch.cache.clone())
        old, last = batch.store.int(), batch.config.num_groups - 1
        groups = (old << 1 & (2 << last) - 1 | old >> last).to(batch.store.dtype)
        batch = dataclasses.replace(batch, store=groups, query_groups=groups[slots])
    repeated = metadata.focus.decode, metadata.focus.prefill
    assert [len(launches._known) for launches in repeated] == [1, 1 - turn], "launches were repeated"


@pytest.mark.usefixtures("stand_ins")
def test_layer_whose_cache_or_store_is_another_attends_to_that(backend):
    batch = batch_of(settings("1/1", dense_below=100), seq_lens=[400], query_lens=[20])
    slots = new_slots(batch)
    impl = layer_of(backend, batch, slots)
    metadata = metadata_of(backend, batch, batch.config, slots, impl.scratch_capacity())
    for changes in ({}, {"cache": torch.randn_like(batch.cache)}, {"store": batch.store.flip(0)}):
        batch = dataclasses.replace(batch, **changes)
        impl.focus.store = batch.store
        impl.focus.address = address_of(batch.store, impl.focus.key_groups)
        out = torch.full_like(batch.query, float("nan"))
        impl.forward(None, batch.query, None, None, batch.cache.transpose(1, 2), metadata, out)
        assert_matches_definition(batch, out, from_position=0)


def test_query_centroids_show_in_the_layers_bias(backend):
    batch = batch_of(settings("1/1"), seq_lens=[5], query_lens=[5])
    focus = layer_of(backend, batch, new_slots(batch)).focus
    assert backend._config(focus) is batch.config
    focus.bias = torch.zeros(2, 8)
    assert backend._config(focus) == SeparateQueries.of(batch.config)


@pytest.mark.usefixtures("stand_ins")
def test_groups_of_a_dense_step_are_stored_at_its_end_and_those_of_others_by_every_layer(backend):
    dense = {"seq_lens": [30, 100], "query_lens": [1, 100]}
    mixed = {"seq_lens": [130, 100], "query_lens": [1, 100]}
    for lengths, stored in ((dense, [0, 0, 3]), (mixed, [1, 2, 3])):
        impls = []
        for _ in range(3):
            batch = batch_of(settings("1/1", dense_below=100), **lengths)
            impls.append(layer_of(backend, batch, new_slots(batch)))
            impls[-1].focus.counts = impls[0].focus.counts
        slots = new_slots(batch)
        metadata = metadata_of(backend, batch, batch.config, slots, impls[0].scratch_capacity())
        metadata.stores = backend.Stores([impl.focus for impl in impls])
        done = []
        for impl in impls:
            impl._store_groups(metadata)
            done.append(sum(bool((each.focus.store[slots] != 0).all()) for each in impls))
        assert done == stored
        for impl in impls:
            assert torch.equal(impl.focus.store[slots], impl.focus.key_groups)
        pairs = [count for count in metadata.dense_pairs for _ in range(2)]
        assert impls[0].focus.counts.totals.tolist() == [3 * count for count in pairs]


def test_batch_below_dense_below_is_left_to_vllm(backend):
    batch = batch_of(settings("1/1", dense_below=100), seq_lens=[30, 100], query_lens=[1, 100])
    metadata = metadata_of(backend, batch, batch.config, new_slots(batch))
    assert metadata.focus is None
    assert metadata.dense_pairs == (100 * 101 // 2, 30)


def test_layers_without_focus_are_left_to_vllm(backend):
    batch = batch_of(settings("1/1", dense_below=0), seq_lens=[30, 100], query_lens=[1, 100])
    assert metadata_of(backend, batch, None, new_slots(batch)).focus is None


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("requests", [256, 16])
def test_scratch_buffers_are_as_large_as_documented(backend, groups, copied, requests):
    """docs/performance.md has the formulas, in the letters used here."""
    num_groups, key_k, top_k = GROUPS[groups]
    config = FocusConfig(num_groups=num_groups, key_k=key_k, top_k=top_k)
    length, tokens, heads, kv_heads, size = 131072, 16384, 32, 8, 128
    engine = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens, max_num_seqs=requests),
        model_config=SimpleNamespace(max_model_len=length),
    )
    capacity = backend.Capacity.of(config, engine, 4096, copied)
    lists = {
        "1/1": 8,
        "1/2": 8,
        "1/4": 16,
        "1/3 of 5": 5,
        "2/2": 28,
        "2/1": 16,
        "3/2 of 4": 6,
        "2/2 of 16": 0,
    }
    copies = top_k if key_k == 1 else 1
    rows = max(tokens, 1024 * copies)
    near = -(-(config.sink + config.window + rows) // 32) * 32 if lists[groups] else 0
    index = entries = 0
    if lists[groups]:
        entries = lists[groups] * length if copied else max(lists[groups] * length, 2**24)
        segments, padded = near // 544, {5: 8, 6: 8, 28: 32}.get(lists[groups], lists[groups])
        tiles = entries // lists[groups] // 4 * 4 // 1024 + rows // copies // 128 + 2 * segments
        sequences = (rows // copies // 1024 + segments) * lists[groups]
        parts = (tiles * padded, sequences + 1, sequences, tokens * copies)
        index = sum(-(-part // 64) * 64 for part in parts)
    prefill = 4 * entries + 4 * index + 2 * rows * heads * size * 2
    prefill += 2 * near * kv_heads * size * 2 + near * 32 * 2
    bf16 = torch.bfloat16
    assert nbytes(capacity.prefill_buffers((heads, kv_heads, size), bf16, bf16)) == prefill
    most = min(max(requests, 128), 2**28 // (4 * length))
    assert nbytes(capacity.decode_buffers()) == 4 * max(most, 1) * (length + 1)


def nbytes(buffers: list[tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in buffers)
