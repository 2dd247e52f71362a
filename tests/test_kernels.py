"""The GPU path against the definition, without a GPU: Triton's interpreter and a slow FlashAttention."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from focus_vllm.config import FocusConfig
from focus_vllm.kernels import decode_lists, listed
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
from focus_vllm.kernels.listed import ListedAttention, Partial
from focus_vllm.kernels.near import GROUP_BITS, NearKeys, Scores, near_tile
from focus_vllm.kernels.plan import (
    BLOCK_QUERIES,
    Chunk,
    Segment,
    SeparateQueries,
    dense_queries,
    index_capacity,
    list_capacity,
    lists_per_query,
    near_keys,
    plan_waves,
    signatures,
)
from focus_vllm.kernels.routing import device_weight, num_stages, route_into
from focus_vllm.kernels.store import address_of, write_stores
from focus_vllm.kernels.warmup import compile_kernels
from focus_vllm.reference import decode_mask, focus_mask
from focus_vllm.routing import mask_dtype, route
from loadtest.paged import PagedBatch, SlowFlashAttention, make_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def out_dtype_of(batch: PagedBatch) -> torch.dtype:
    if batch.query.element_size() > 1:
        return batch.query.dtype
    return torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no bfloat16


def slow_flash_attention_of_whole_pages(scores: Scores) -> GatheredAttention:
    """One that refuses page size 1, with room for the tests' batches."""
    return GatheredAttention(SlowFlashAttention(scores, PAGE), None)  # type: ignore[arg-type]


def prefill_scratch(batch: PagedBatch, lists: int, rows: int, near: int) -> PrefillScratch:
    _, num_heads, head_size = batch.query.shape
    out_dtype = out_dtype_of(batch)
    sizes = (
        [(rows, num_heads, head_size)] + [(near, batch.cache.shape[2], head_size)] * 2 + [(near, GROUP_BITS)]
    )
    out, *copies = (torch.full(size, float("nan"), dtype=out_dtype, device=DEVICE) for size in sizes)
    query = torch.full((rows, num_heads, head_size), float("nan"), dtype=batch.query.dtype, device=DEVICE)
    slots = torch.full((lists,), -(2**31), dtype=torch.int32, device=DEVICE)
    index = index_capacity(batch.config, max(batch.seq_lens), len(batch.query), rows, near)
    indices = torch.full((index,), -(2**31), dtype=torch.int32, device=DEVICE)
    return PrefillScratch(slots, indices, query, out, NearKeys(*copies))


def decode_scratch(num_requests: int, longest: int, list_bytes: int) -> DecodeScratch:
    shapes = decode_scratch_shapes(num_requests, longest, list_bytes)
    buffers = [torch.full(shape, -(2**31), dtype=torch.int32, device=DEVICE) for shape in shapes]
    starts = torch.arange(len(buffers[1]) + 1, dtype=torch.int32, device=DEVICE)
    return DecodeScratch(*buffers, starts, Progress.zeros(num_requests, torch.device(DEVICE)))


def with_pages(flash: FlashAttention, batch: PagedBatch) -> FlashAttention:
    """Give one that gathers keys the scratch that the batch needs."""
    if not isinstance(flash, GatheredAttention):
        return flash
    config, longest = batch.config, max(batch.seq_lens)
    segments, blocks = len(batch.seq_lens), len(batch.query) // BLOCK_QUERIES + len(batch.seq_lens)
    pages, table = gather_shapes(len(signatures(config)), segments, blocks, longest)
    pages = sum(-(-length // PAGE) + len(signatures(config)) for length in batch.seq_lens)
    shape = (pages, PAGE, batch.cache.shape[2], batch.query.shape[-1])
    copies = (torch.full(shape, float("nan"), dtype=batch.cache.dtype, device=DEVICE) for _ in range(2))
    tables = torch.full((table,), -(2**31), dtype=torch.int32, device=DEVICE)
    return GatheredAttention(flash.attention, GatherScratch(*copies, tables))


def pairs_of(batch: PagedBatch) -> tuple[int, int]:
    """(query, key) pairs of the batch's routed queries: candidates, and those the definition selects."""
    candidates = selected = 0
    for request, start in enumerate(batch.query_start_loc[:-1]):
        queries, length = batch.query_lens[request], batch.seq_lens[request]
        begin = length - queries
        groups = batch.query_groups[start : start + queries]
        skip = 0 if queries == 1 else min(queries, max(0, batch.config.dense_below - begin))
        candidates += sum(range(begin + skip + 1, length + 1))
        keys = batch.store[batch.slots(request)]
        if queries == 1:
            selected += int(decode_mask(groups, keys, batch.config).sum())
        elif skip < queries:
            selected += int(focus_mask(groups, keys, batch.config, begin)[skip:].sum())
    return candidates, selected


def prefill(
    batch: PagedBatch,
    *,
    softcap: float = 0.0,
    row_capacity: int = 8192,
    near_capacity: int | None = None,
    flash: Callable[[Scores], FlashAttention] = SlowFlashAttention,
    scales: tuple[torch.Tensor, ...] = (),
    repeated: Repeated | None = None,
) -> torch.Tensor:
    _, num_heads, head_size = batch.query.shape
    num_kv_heads = batch.cache.shape[2]
    scores = Scores(head_size**-0.5, softcap, *scales)
    starts = batch.query_start_loc
    segments = []
    for request, (length, queries) in enumerate(zip(batch.seq_lens, batch.query_lens, strict=True)):
        skip = max(0, batch.config.dense_below - (length - queries))
        if skip < queries:
            position = length - queries + skip
            segments.append(Segment(request, starts[request] + skip, position, queries - skip))
    capacity = list_capacity(batch.config, max(batch.seq_lens))
    near_capacity = near_keys(batch.config, row_capacity) if near_capacity is None else near_capacity
    tile = near_tile(num_heads // num_kv_heads)
    waves = plan_waves(
        segments, batch.config, tile, capacity, row_capacity, near_capacity, batch.query.device
    )
    scratch = prefill_scratch(batch, capacity, row_capacity, near_capacity)
    out = torch.full_like(batch.query, float("nan"), dtype=out_dtype_of(batch))
    totals = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    attention, cache = with_pages(flash(scores), batch), batch.paged

    def launches() -> None:
        prefill_attention(
            attention, waves, batch.query, out, batch.query_groups, batch.store, cache, batch.config, scores,
            scratch, totals,
        )  # fmt: skip

    fixed = Fixed(cache.keys, cache.values, batch.query_groups, batch.store, totals)
    (repeated or Repeated())(fixed, (batch.query, out, cache.block_table, attention), launches)
    if batch.config.dense_below == 0:
        assert totals.tolist() == [*pairs_of(batch), 0, 0]
    return out


def decode(
    batch: PagedBatch,
    *,
    softcap: float = 0.0,
    list_bytes: int = 2**20,
    flash: Callable[[Scores], FlashAttention] = SlowFlashAttention,
    scales: tuple[torch.Tensor, ...] = (),
    query_start_loc: torch.Tensor | None = None,
) -> torch.Tensor:
    scores = Scores(batch.query.shape[-1] ** -0.5, softcap, *scales)
    scratch = decode_scratch(len(batch.seq_lens), max(batch.seq_lens), list_bytes)
    out = torch.full_like(batch.query, float("nan"), dtype=out_dtype_of(batch))
    seq_lens = torch.tensor(batch.seq_lens, dtype=torch.int32, device=DEVICE)
    slots = torch.stack([batch.slots(request)[-1] for request in range(len(batch.seq_lens))])
    groups = batch.store[slots]
    batch.store[slots] = 0
    totals = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    decode_attention(
        with_pages(flash(scores), batch), batch.query, out, slots, groups, batch.query_groups, batch.store,
        batch.paged, seq_lens, batch.config, scratch, totals, query_start_loc,
    )  # fmt: skip
    assert torch.equal(batch.store[slots], groups)
    assert totals.tolist() == [0, 0, *pairs_of(batch)]
    assert not scratch.progress.counts.any()
    assert not scratch.progress.done.any()
    return out


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after another."""
    if DEVICE == "cpu":
        monkeypatch.setattr(decode_lists, "PROGRAMS", 8)


def assert_matches_definition(
    batch: PagedBatch, out: torch.Tensor, softcap: float = 0.0, from_position: int | None = None
) -> None:
    tolerance = 2e-3 if out.dtype == torch.float32 else 1e-2
    for request, start in enumerate(batch.query_start_loc[:-1]):
        queries = batch.query_lens[request]
        # What `prefill` leaves to the stock call is not in its output.
        first = batch.config.dense_below if from_position is None and queries > 1 else from_position or 0
        skip = min(queries, max(0, first - (batch.seq_lens[request] - queries)))
        if skip == queries:
            continue
        expected = batch.reference(request, slice(skip, queries), batch.query.shape[-1] ** -0.5, softcap)
        got = out[start + skip : start + queries].float()
        error = ((got - expected).norm() / expected.norm()).item()
        assert error < tolerance, f"request {request}: relative error {error}"


CHANGES = [{"sink": 0}, {"window": 0}, {"sink": 70}, {"window": 5000}, {"dense_below": 40}]
SHAPES = {
    "gqa": {"num_heads": 4, "num_kv_heads": 2, "head_size": 64},
    "mha": {"num_heads": 2, "num_kv_heads": 2, "head_size": 32},
    "mqa": {"num_heads": 3, "num_kv_heads": 1, "head_size": 96},
    "more heads than rows": {"num_heads": 71, "num_kv_heads": 1, "head_size": 32},
    "wide": {"num_heads": 2, "num_kv_heads": 1, "head_size": 256},
}
GROUPS = {
    "1/1": (8, 1, 1), "1/2": (8, 1, 2), "1/4": (16, 1, 4), "1/3 of 5": (5, 1, 3),
    "2/2": (8, 2, 2), "2/1": (16, 2, 1), "3/2 of 4": (4, 3, 2), "2/2 of 16": (16, 2, 2),
}  # fmt: skip
"""Groups, key_k and top_k. The last has more sets of groups than there may be lists."""
RAGGED = {"seq_lens": [1, 15, 16, 17, 1000, 1300], "query_lens": [1, 15, 3, 17, 100, 1050]}
SHORTER = {"seq_lens": [1, 15, 16, 17, 300], "query_lens": [1, 15, 3, 17, 150]}


def settings(groups: str, **changes: int) -> FocusConfig:
    num_groups, key_k, top_k = GROUPS[groups]
    defaults = {"window": 50, "sink": 4, "dense_below": 0}
    return FocusConfig(num_groups=num_groups, key_k=key_k, top_k=top_k, **{**defaults, **changes})


def batch_of(
    config: FocusConfig, shape: str = "gqa", dtype: torch.dtype = torch.float32, **lengths
) -> PagedBatch:
    lengths = lengths or RAGGED
    return make_batch(config=config, **lengths, **SHAPES[shape], dtype=dtype, device=DEVICE, seed=7)


@pytest.mark.parametrize("groups", GROUPS)
def test_prefill_of_ragged_chunks_follows_the_definition(groups):
    batch = batch_of(settings(groups), **RAGGED if groups == "1/2" else SHORTER)
    assert_matches_definition(batch, prefill(batch, row_capacity=8192))


@pytest.mark.parametrize("groups", ["1/1", "1/2", "2/2", "2/2 of 16"])
def test_prefill_whose_queries_are_in_other_groups_than_their_keys_follows_the_definition(groups):
    batch = batch_of(SeparateQueries.of(settings(groups)), **SHORTER)
    assert_matches_definition(batch, prefill(batch))


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_follows_the_definition_for_every_head_shape(shape):
    batch = batch_of(settings("1/2"), shape, seq_lens=[400], query_lens=[150])
    assert_matches_definition(batch, prefill(batch))


def test_prefill_in_half_precision_stays_close_to_the_definition():
    batch = batch_of(settings("1/1"), dtype=torch.float16, seq_lens=[300], query_lens=[200])
    assert_matches_definition(batch, prefill(batch))


@pytest.mark.parametrize("groups", ["1/1", "1/2", "2/2"])
def test_prefill_with_softcap_follows_the_definition(groups):
    batch = batch_of(settings(groups), seq_lens=[300], query_lens=[200])
    assert_matches_definition(batch, prefill(batch, softcap=2.0), softcap=2.0)


@pytest.mark.parametrize("groups", ["1/1", "1/2"])
@pytest.mark.parametrize("changes", CHANGES)
def test_prefill_follows_the_definition_at_the_edges_of_the_settings(groups, changes):
    batch = batch_of(settings(groups, **changes), seq_lens=[210, 33], query_lens=[150, 33])
    assert_matches_definition(batch, prefill(batch))


@pytest.mark.parametrize("groups", ["1/1", "1/4"])
def test_prefill_in_several_waves_gives_what_one_wave_gives(groups):
    config = settings(groups)
    batch = batch_of(config, seq_lens=[90, 1100, 300, 80], query_lens=[80, 1050, 20, 7])
    split = prefill(batch, row_capacity=1024 * lists_per_query(config))
    assert_matches_definition(batch, split)


@pytest.mark.parametrize("groups", GROUPS)
def test_one_layers_launches_serve_the_others(groups):
    config, lengths = settings(groups), {"seq_lens": [300, 90], "query_lens": [200, 90]}
    layers = [
        make_batch(config=config, **lengths, **SHAPES["gqa"], dtype=torch.float32, device=DEVICE, seed=seed)
        for seed in range(3)
    ]
    repeated = Repeated()
    for layer in layers:
        assert_matches_definition(layer, prefill(layer, repeated=repeated))
    assert len(repeated._known) == 1


@pytest.mark.parametrize("groups", ["1/1", "1/2", "2/2"])
def test_list_that_ends_on_the_edge_of_a_tile_is_read_whole(groups):
    batch = batch_of(settings(groups), seq_lens=[1024, 2048], query_lens=[20, 20])
    assert_matches_definition(batch, prefill(batch))


def test_chunk_whose_tokens_share_one_group_follows_the_definition():
    batch = batch_of(settings("1/1"), seq_lens=[1100], query_lens=[1060])
    batch.store.fill_(4)
    batch.query_groups.fill_(4)
    assert_matches_definition(batch, prefill(batch))


@pytest.mark.parametrize("groups", GROUPS)
def test_decode_follows_the_definition(groups):
    lengths = [1, 15, 16, 17, 1000, 3333]
    batch = batch_of(settings(groups), seq_lens=lengths, query_lens=[1] * len(lengths))
    assert_matches_definition(batch, decode(batch))


@pytest.mark.parametrize("changes", CHANGES)
def test_decode_follows_the_definition_at_the_edges_of_the_settings(changes):
    batch = batch_of(settings("1/1", **changes), seq_lens=[210, 33, 40, 41], query_lens=[1] * 4)
    assert_matches_definition(batch, decode(batch))


@pytest.mark.parametrize("lengths", [[3000], [700, 90] * 10])
def test_lists_launched_behind_routing_have_its_groups(lengths):
    """On a GPU they begin while it runs."""
    config, count = settings("1/2", window=20), len(lengths)
    batch = batch_of(config, seq_lens=lengths, query_lens=[1] * count)
    weight, bias = torch.randn(8, 4096, device=DEVICE), torch.zeros(8, device=DEVICE)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    slots = [batch.slots(request) for request in range(count)]
    new_slots = torch.stack([of_request[-1] for of_request in slots])
    scratch = decode_scratch(count, max(lengths), 2**30)
    groups, totals = batch.store.new_zeros(2, count), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    for _ in range(100 if DEVICE == "cuda" else 2):
        hidden = torch.randn(count, 4096, device=DEVICE)
        halves = device_weight(weight, hidden.dtype)
        groups.zero_()
        route_into(hidden, halves, bias, groups[0], groups[1], 1, 2)
        build_decode_lists(
            new_slots, groups[0], batch.store, groups[1], batch.block_table, batch.paged.block_size, seq_lens,
            config, scratch.progress, scratch.lists, scratch.list_lens, totals, behind_routing=True,
        )  # fmt: skip
        assert torch.equal(batch.store[new_slots], groups[0])
        for request, of_request in enumerate(slots):
            mask = decode_mask(groups[1, request : request + 1], batch.store[of_request], config)[0]
            listed = scratch.lists[request, : scratch.list_lens[request]].long()
            assert torch.equal(listed.sort().values, of_request[mask].sort().values)


def test_decode_in_several_calls_gives_what_one_call_gives():
    batch = batch_of(settings("1/2"), seq_lens=[210, 33, 500], query_lens=[1] * 3)
    assert torch.equal(decode(batch, list_bytes=1), decode(batch))


@pytest.mark.parametrize("budget", [0, 1, 30, 700])
def test_decode_budget_keeps_the_latest_far_tokens(budget):
    config = settings("1/2", window=10, sink=2, dense_below=40, decode_budget=budget)
    batch = batch_of(config, seq_lens=[3000, 40, 41, 9], query_lens=[1] * 4)
    assert_matches_definition(batch, decode(batch))


def test_decode_mask_with_a_budget_is_the_definitions_mask_without_the_oldest_far_keys():
    config = settings("1/1", window=3, sink=1, decode_budget=2)
    shared = torch.tensor([1, 1, 1, 2, 1, 1, 2, 2, 1, 1])
    mask = decode_mask(shared[-1:], shared, config)
    assert mask.long().tolist() == [[1, 0, 0, 0, 1, 1, 1, 1, 1, 1]]
    everything = dataclasses.replace(config, decode_budget=None)
    assert torch.equal(
        decode_mask(shared[-1:], shared, everything), focus_mask(shared, shared, everything)[-1:]
    )


@pytest.mark.parametrize("shape", ["gqa", "mqa"])
@pytest.mark.parametrize("groups", ["1/1", "1/2"])
def test_prefill_with_copied_keys_follows_the_definition(groups, shape):
    lengths = {"seq_lens": [700, 33], "query_lens": [150, 33]}
    batch = batch_of(settings(groups), shape, **lengths)
    assert_matches_definition(batch, prefill(batch, flash=slow_flash_attention_of_whole_pages))


def own_attention(scores: Scores) -> ListedAttention:
    return ListedAttention(scores, 8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("splits", [4, 64])
def test_decode_without_flash_attention_follows_the_definition(monkeypatch, shape, splits):
    monkeypatch.setattr(listed, "_splits", lambda num_pairs: splits)
    lengths = [1, 15, 64, 65, 300, 1500]
    batch = batch_of(settings("1/2"), shape, seq_lens=lengths, query_lens=[1] * len(lengths))
    for softcap in (0.0, 2.0):
        out = decode(batch, softcap=softcap, flash=own_attention)
        assert_matches_definition(batch, out, softcap)


def test_what_attends_to_lists_returns_their_log_sum_exp_and_leaves_no_trace():
    shape, flash = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64}, own_attention(Scores(0.2))
    keys, values = torch.randn(2, 400, 1, 2, 64, device=DEVICE)
    query = torch.randn(3, 4, 64, device=DEVICE)
    lists = torch.stack([torch.randperm(400, device=DEVICE).int() for _ in range(3)])
    used = torch.tensor([0, 400, 70], dtype=torch.int32, device=DEVICE)
    starts = torch.arange(4, dtype=torch.int32, device=DEVICE)
    results = []
    for attention in (SlowFlashAttention(Scores(0.2)), flash, flash):
        out = torch.full_like(query, float("nan"))
        sequences = Sequences(lists, None, starts, used, 1, 400, causal=True)
        lse = attention(query, keys, values, out, sequences)
        results.append((out, lse))
    (expected, expected_lse), first, second = results
    for out, lse in (first, second):
        assert (out - expected).norm() < 2e-3 * expected.norm()
        assert (lse - expected_lse)[:, 1:].norm() < 2e-3 * expected_lse[:, 1:].norm()
        assert torch.isinf(lse[:, 0]).all()
        assert torch.equal(out, first[0])
    assert not Partial.of(query.device, 8, *shape.values()).done.any()


@pytest.mark.parametrize(
    ("num_groups", "key_k", "top_k"), [(8, 1, 1), (8, 1, 2), (16, 2, 4), (5, 5, 5), (32, 1, 3)]
)
@pytest.mark.parametrize("hidden_size", [320, 1100])
@pytest.mark.parametrize("num_tokens", [1, 15, 33, 300])
def test_routing_kernel_chooses_the_groups_of_the_definition(
    num_groups, key_k, top_k, num_tokens, hidden_size
):
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).half().to(DEVICE)
    weight = torch.randn(num_groups, hidden_size, generator=generator).to(DEVICE)
    bias = torch.randn(num_groups, generator=generator).to(DEVICE)
    keys, queries = (torch.zeros(320, dtype=mask_dtype(num_groups), device=DEVICE) for _ in range(2))
    route_into(hidden, device_weight(weight, hidden.dtype), bias, keys, queries, key_k, top_k)
    expected_keys, expected_queries = route(hidden, weight, bias, key_k, top_k)
    assert torch.equal(keys[:num_tokens], expected_keys)
    assert torch.equal(queries[:num_tokens], expected_queries)
    assert not keys[num_tokens:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_a_token_do_not_depend_on_what_it_is_batched_with(dtype):
    """Not even where two groups' scores are equal but for rounding: one weight is the other backwards."""
    generator = torch.Generator().manual_seed(0)
    size, count = 2560, 300
    half = torch.randn(count, size // 2, generator=generator)
    hidden = torch.cat([half, half.flip(1)], dim=1).to(DEVICE, dtype)
    weight = torch.randn(size, generator=generator).to(dtype).float()
    weight = device_weight(torch.stack([weight, weight.flip(0)]).to(DEVICE), dtype)
    keys, queries = (torch.zeros(count, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    bias = torch.zeros(2, device=DEVICE)
    route_into(hidden, weight, bias, keys, queries, 1, 1)
    assert keys.unique().tolist() == [1, 2]
    for first, last in [(0, 1), (1, 20), (20, 260)]:
        again = torch.zeros_like(keys)
        for _ in range(2):  # the first call leaves nothing behind that the second would see
            route_into(hidden[first:last], weight, bias, again, again, 1, 1)
            assert torch.equal(again[: last - first], keys[first:last])


def test_routing_kernel_compares_queries_with_centroids_of_their_own():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(33, 320, generator=generator).half().to(DEVICE)
    weight = torch.randn(2, 8, 320, generator=generator).to(DEVICE)
    bias = torch.randn(2, 8, generator=generator).to(DEVICE)
    keys, queries = (torch.zeros(33, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    route_into(hidden, device_weight(weight, hidden.dtype), bias, keys, queries, 1, 2)
    expected_keys, expected_queries = route(hidden, weight, bias, 1, 2)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(queries, expected_queries)
    assert ((queries & keys) != 0).float().mean() < 0.5


def test_hidden_states_that_are_not_numbers_still_get_their_number_of_groups():
    hidden = torch.full((3, 64), float("nan"), device=DEVICE)
    weight = device_weight(torch.ones(8, 64, device=DEVICE), hidden.dtype)
    bias = torch.zeros(8, device=DEVICE)
    keys, queries = (torch.zeros(3, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    route_into(hidden, weight, bias, keys, queries, 1, 3)
    assert keys.tolist() == [1] * 3
    assert queries.tolist() == [7] * 3


@pytest.mark.parametrize(
    ("dtype", "num_groups", "hopper", "ada"),
    [
        (torch.bfloat16, 8, 4, 3),
        (torch.bfloat16, 16, 4, 4),
        (torch.float32, 8, 3, 1),
        (torch.float32, 32, 4, 2),
    ],
)
def test_routing_loads_as_many_parts_at_a_time_as_fit(dtype, num_groups, hopper, ada):
    """227 and 99 KiB a block: "Technical Specifications per Compute Capability", CUDA's programming guide."""
    assert num_stages(dtype, num_groups, 227 * 1024) == hopper
    assert num_stages(dtype, num_groups, 99 * 1024) == ada


def test_route_refuses_a_chunk_longer_than_its_buffers():
    hidden, weight, bias = torch.zeros(5, 64), torch.zeros(8, 64), torch.zeros(8)
    short = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="hold 4 tokens, the chunk has 5"):
        route_into(hidden, weight, bias, short, short, 1, 1)


def test_store_is_written_at_the_slots_and_padding_is_skipped():
    store = torch.zeros(50, dtype=torch.uint8, device=DEVICE)
    slots = torch.tensor([7, -1, 49, 0, -1], device=DEVICE)
    groups = torch.tensor([1, 2, 4, 8, 16, 32], dtype=torch.uint8, device=DEVICE)
    totals = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    second, more = torch.zeros_like(store), groups + 1
    addresses = torch.cat([address_of(store, groups), address_of(second, more)])
    write_stores(addresses, store.dtype, slots, totals, (2**33, 5))
    write_stores(addresses[:1], store.dtype, slots[1:2], totals, (7, 7))
    assert totals.tolist() == [2**34, 2**34, 10, 10], "both layers count"
    for each in (store, second):
        assert each.nonzero().flatten().tolist() == [0, 7, 49]
    assert store[[0, 7, 49]].tolist() == [8, 1, 4]
    assert second[[0, 7, 49]].tolist() == [9, 2, 5]


@pytest.mark.parametrize("groups", ["1/1", "1/2", "2/2"])
def test_kernels_are_compiled_without_a_request(groups):
    config = settings(groups, dense_below=2048)
    batch = batch_of(config, seq_lens=[64], query_lens=[64])
    out = torch.full_like(batch.query, float("nan"))
    scratch = prefill_scratch(batch, list_capacity(config, 128), 8192, near_keys(config, 8192))
    decode = decode_scratch(4, 128, 2**20)
    compile_kernels(config, batch.query, out, 2, batch.cache.dtype, Scores(0.1), scratch, decode)
    assert (out == 0).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="looks at calls of the interpreter")
@pytest.mark.parametrize("groups", ["1/1", "1/2", "2/2", "2/2 of 16"])
def test_no_request_has_a_kernel_compiled_that_start_has_not(groups, monkeypatch):
    compiled: set[tuple[object, ...]] = set()

    def run(self, *args, grid, warmup, **kwargs):
        """Note what Triton compiles a kernel for, as its JITFunction does."""
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        free = self.kwargs["do_not_specialize"] or ()
        anywhere = self.kwargs["do_not_specialize_on_alignment"] or ()
        key = [self.fn.__name__]
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                key.append((name, value.dtype, name in anywhere or value.data_ptr() % 16 == 0))
            elif isinstance(value, int) and name not in free and name in self.arg_names:
                constant = self.fn.__annotations__.get(name)
                key.append((name, value if constant or value == 1 else value % 16 == 0))
            else:
                key.append((name, value is None))
        compiled.add(tuple(key))
        return interpret(self, *args, grid=grid, warmup=warmup, **kwargs)

    interpret = InterpretedFunction.run
    monkeypatch.setattr(InterpretedFunction, "run", run)
    config = settings(groups)
    batch = batch_of(config, seq_lens=[64], query_lens=[64])
    out = torch.empty_like(batch.query)
    scratch = prefill_scratch(batch, list_capacity(config, 128), 8192, near_keys(config, 8192))
    compile_kernels(
        config, batch.query, out, 2, batch.cache.dtype, Scores(0.1), scratch, decode_scratch(20, 128, 2**20),
    )  # fmt: skip
    at_start = set(compiled)
    assert len({key[0] for key in at_start}) >= 4
    lengths = {"seq_lens": [100, 150, 300], "query_lens": [61, 1, 83]}
    for count in (1, 2, 3):
        some = {name: values[:count] for name, values in lengths.items()}
        prefill(batch_of(config, **some))
    single = batch_of(config, seq_lens=[70] * 11, query_lens=[1] * 11)
    decode(single, list_bytes=3 * 4 * 70)
    assert compiled - at_start == set()
    starts = torch.arange(12, dtype=torch.int32, device=DEVICE)
    decode(single, list_bytes=3 * 4 * 70, query_start_loc=starts)
    assert compiled - at_start == set()


def test_every_kernel_compiles_for_a_hopper_gpu(tmp_path):
    root = Path(__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(root / "tests" / "compile_for_hopper.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if "registers" in line]
    assert max(int(line[-1]) for line in lines) <= 227 * 1024  # bytes that a program can have
    compiled = {line[0] for line in lines}
    folder = root / "focus_vllm" / "kernels"
    defined = {
        name for path in folder.glob("*.py") for name in re.findall(r"def (_\w+_kernel)\(", path.read_text())
    }
    assert compiled == defined


def test_chunk_is_cut_at_dense_below():
    assert Chunk(2, 10, 0, 100).routed(100) is None
    assert Chunk(2, 10, 0, 100).num_dense(200) == 100
    assert Chunk(2, 10, 30, 100).routed(60) == Segment(2, 40, 60, 40)
    assert Chunk(2, 10, 70, 100).routed(60) == Segment(2, 10, 70, 30)
    assert Chunk(2, 10, 70, 100).num_dense(60) == 0


def test_dense_queries_skip_over_routed_ones():
    chunks = [Chunk(3, 5, 0, 40), Chunk(4, 45, 90, 110), Chunk(5, 65, 200, 230)]
    dense = dense_queries(chunks, 100, torch.device("cpu"))
    assert dense is not None
    assert dense.cu_seqlens_q.tolist() == [0, 40, 50, 60, 90]
    assert dense.seqused_k.tolist() == [40, 100, 0, 0]
    assert dense.requests.tolist() == [3, 4, 4, 5]
    assert dense.max_seqlen_q == 40
    assert dense_queries(chunks[2:], 100, torch.device("cpu")) is None
