"""The whole path with vLLM's FlashAttention 3 over page-size-1 tables, against the definition.

Blocks are permuted and unused slots are not numbers, as in `loadtest.paged`.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_kernels import decode, own_attention, prefill, settings

from focus_vllm.kernels.gather import GatheredAttention
from focus_vllm.kernels.plan import lists_per_query
from loadtest.paged import PagedBatch, make_batch

pytestmark = pytest.mark.gpu

SHAPES = {
    "32/8 x 128": (32, 8, 128),
    "8/8 x 64": (8, 8, 64),
    "16/1 x 96": (16, 1, 96),
    "8/4 x 256": (8, 4, 256),
    "16/8 x 64": (16, 8, 64),
}
LENGTHS = [1, 15, 16, 17, 1000, 33333]
RAGGED = {
    "chunks at the end": [1, 15, 3, 17, 300, 2500],
    "whole prompts": [1, 15, 16, 17, 1000, 8192],
    "one token each": [1] * 6,
    "edges of a block of queries": [1, 1, 16, 16, 1000, 1025],
}
GROUPS = ["1/1", "1/2", "1/4", "2/2", "2/1", "2/2 of 16"]


def flash(scores):
    from focus_vllm.engine.flash import FlashAttention3

    return FlashAttention3(scores)


def batch_of(groups: str, shape: str, dtype: torch.dtype, lengths: dict[str, list[int]]) -> PagedBatch:
    num_heads, num_kv_heads, head_size = SHAPES[shape]
    return make_batch(
        config=settings(groups, window=200), **lengths, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_size=head_size, dtype=dtype, device="cuda", seed=3,
    )  # fmt: skip


def error_of(
    batch: PagedBatch, out: torch.Tensor, softcap: float = 0.0, scales: tuple[float, float] = (1.0, 1.0)
) -> float:
    difference = norm = 0.0
    for request, start in enumerate(batch.query_start_loc[:-1]):
        queries = batch.query_lens[request]
        for first in {0, queries // 2, max(0, queries - 8)}:
            rows = slice(first, min(first + 8, queries))
            scale = batch.query.shape[-1] ** -0.5 * scales[0]
            expected = batch.reference(request, rows, scale, softcap) * scales[1]
            got = out[start + rows.start : start + rows.stop].float()
            difference += (got - expected).square().sum().item()
            norm += expected.square().sum().item()
    return float((difference / norm) ** 0.5)


def dense_error(batch: PagedBatch, softcap: float = 0.0) -> float:
    """The error of stock FlashAttention against dense attention."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    keys, values = batch.cache.split(batch.query.shape[-1], dim=-1)
    starts, used = (
        torch.tensor(lengths, dtype=torch.int32, device="cuda")
        for lengths in (batch.query_start_loc, batch.seq_lens)
    )
    out = flash_attn_varlen_func(
        q=batch.query, k=keys, v=values, cu_seqlens_q=starts, max_seqlen_q=max(batch.query_lens),
        seqused_k=used, max_seqlen_k=max(batch.seq_lens), causal=True, block_table=batch.block_table,
        fa_version=3, softcap=softcap,
    )  # fmt: skip
    everything = dataclasses.replace(
        batch, config=dataclasses.replace(batch.config, window=max(batch.seq_lens))
    )
    return error_of(everything, out, softcap)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_is_as_exact_as_flash_attention(groups, shape):
    lengths = {"seq_lens": LENGTHS, "query_lens": RAGGED["chunks at the end"]}
    batch = batch_of(groups, shape, torch.bfloat16, lengths)
    out = prefill(batch, flash=flash)
    assert error_of(batch, out) <= 1.5 * dense_error(batch)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("chunks", RAGGED)
def test_prefill_is_exact_wherever_chunks_end(groups, chunks):
    batch = batch_of(
        groups, "32/8 x 128", torch.bfloat16, {"seq_lens": LENGTHS, "query_lens": RAGGED[chunks]}
    )
    # Rows for one wave of 8,192 queries and for many waves.
    for rows in (8192, 1024):
        out = prefill(batch, flash=flash, row_capacity=rows * lists_per_query(batch.config))
        assert error_of(batch, out) <= 1.5 * dense_error(batch)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_is_as_exact_as_flash_attention(groups, shape):
    batch = batch_of(groups, shape, torch.bfloat16, {"seq_lens": LENGTHS, "query_lens": [1] * len(LENGTHS)})
    assert error_of(batch, decode(batch, flash=flash)) <= 1.5 * dense_error(batch)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_without_flash_attention_is_as_exact(groups, shape):
    batch = batch_of(groups, shape, torch.bfloat16, {"seq_lens": LENGTHS, "query_lens": [1] * len(LENGTHS)})
    out = decode(batch, flash=own_attention)
    assert error_of(batch, out) <= 1.5 * dense_error(batch)
    for _ in range(5):
        assert torch.equal(decode(batch, flash=own_attention), out)


@pytest.mark.parametrize("requests", [1, 3, 40, 300])
def test_decode_lists_of_any_batch_size_are_complete_each_time(requests):
    """The programs of a launch wait for one another: this must end, and leave no trace for the next."""
    lengths = [1 + 997 * index % 9000 for index in range(requests)] + [200_000]
    batch = batch_of(
        "1/2", "16/1 x 96", torch.bfloat16, {"seq_lens": lengths, "query_lens": [1] * len(lengths)}
    )
    first = decode(batch, flash=flash, list_bytes=2**30)
    for _ in range(3):
        assert torch.equal(decode(batch, flash=flash, list_bytes=2**30), first)


@pytest.mark.parametrize("budget", [0, 500])
def test_decode_with_a_budget_is_as_exact_as_flash_attention(budget):
    batch = batch_of(
        "1/1", "32/8 x 128", torch.bfloat16, {"seq_lens": LENGTHS, "query_lens": [1] * len(LENGTHS)}
    )
    batch = dataclasses.replace(batch, config=dataclasses.replace(batch.config, decode_budget=budget))
    assert error_of(batch, decode(batch, flash=flash)) <= 1.5 * dense_error(batch)


@pytest.mark.parametrize("groups", ["1/1", "1/2"])
def test_keys_copied_into_pages_give_what_lists_in_place_give(groups):
    lengths = {"seq_lens": LENGTHS, "query_lens": RAGGED["chunks at the end"]}
    batch = batch_of(groups, "32/8 x 128", torch.bfloat16, lengths)
    copied = prefill(batch, flash=lambda scores: GatheredAttention(flash(scores), None))
    assert error_of(batch, copied) <= 1.5 * dense_error(batch)


@pytest.mark.parametrize(("run", "flash"), [(prefill, flash), (decode, flash), (decode, own_attention)])
def test_softcap_is_as_exact_as_flash_attention(run, flash):
    lengths = {"seq_lens": [3000], "query_lens": [1 if run is decode else 1500]}
    batch = batch_of("1/1", "32/8 x 128", torch.bfloat16, lengths)
    out = run(batch, softcap=20.0, flash=flash)
    assert error_of(batch, out, softcap=20.0) <= 1.5 * dense_error(batch, softcap=20.0)


@pytest.mark.parametrize(("run", "flash"), [(prefill, flash), (decode, flash), (decode, own_attention)])
@pytest.mark.parametrize("groups", ["1/1", "1/2"])
def test_fp8_cache_with_descales_follows_the_definition(run, flash, groups):
    lengths = {"seq_lens": [3000, 700], "query_lens": [1, 1] if run is decode else [1500, 100]}
    batch = batch_of(groups, "32/8 x 128", torch.float8_e4m3fn, lengths)
    scales = tuple(torch.tensor([scale], device="cuda") for scale in (0.5, 1.5, 0.25))
    out = run(batch, flash=flash, scales=scales)
    assert error_of(batch, out, scales=(0.75, 0.25)) < 0.05
