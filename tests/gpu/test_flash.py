"""The whole path with vLLM's FlashAttention 3 over page-size-1 tables, against the definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_kernels import decode, prefill, settings

from loadtest.paged import PagedBatch, make_batch

pytestmark = pytest.mark.gpu

SHAPES = {
    "32/8 x 128": (32, 8, 128),
    "8/8 x 64": (8, 8, 64),
    "16/1 x 96": (16, 1, 96),
    "8/4 x 256": (8, 4, 256),
}
RAGGED = {"seq_lens": [1, 15, 16, 17, 1000, 33333], "query_lens": [1, 15, 3, 17, 300, 2500]}
LENGTHS = [1, 15, 16, 17, 1000, 33333]


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


@pytest.mark.parametrize("groups", ["1/1", "1/2", "1/4", "2/2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_is_as_exact_as_flash_attention(groups, shape):
    batch = batch_of(groups, shape, torch.bfloat16, RAGGED)
    out = prefill(batch, flash=flash)
    assert error_of(batch, out) <= 1.5 * dense_error(batch)


@pytest.mark.parametrize("groups", ["1/1", "1/2", "1/4", "2/2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_is_as_exact_as_flash_attention(groups, shape):
    batch = batch_of(groups, shape, torch.bfloat16, {"seq_lens": LENGTHS, "query_lens": [1] * len(LENGTHS)})
    assert error_of(batch, decode(batch, flash=flash)) <= 1.5 * dense_error(batch)


@pytest.mark.parametrize("run", [prefill, decode])
def test_softcap_is_as_exact_as_flash_attention(run):
    lengths = {"seq_lens": [3000], "query_lens": [1 if run is decode else 1500]}
    batch = batch_of("1/1", "32/8 x 128", torch.bfloat16, lengths)
    out = run(batch, softcap=20.0, flash=flash)
    assert error_of(batch, out, softcap=20.0) <= 1.5 * dense_error(batch, softcap=20.0)


@pytest.mark.parametrize("run", [prefill, decode])
@pytest.mark.parametrize("groups", ["1/1", "1/2"])
def test_fp8_cache_with_descales_follows_the_definition(run, groups):
    lengths = {"seq_lens": [3000, 700], "query_lens": [1, 1] if run is decode else [1500, 100]}
    batch = batch_of(groups, "32/8 x 128", torch.float8_e4m3fn, lengths)
    scales = tuple(torch.tensor([scale], device="cuda") for scale in (0.5, 1.5, 0.25))
    out = run(batch, flash=flash, scales=scales)
    assert error_of(batch, out, scales=(0.75, 0.25)) < 0.05
