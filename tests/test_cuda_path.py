"""The CUDA backend without a GPU: a slow FlashAttention, Triton's interpreter, made-up batches."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernels import DEVICE, SlowFlashAttention, assert_matches_definition, batch_of, settings

from focus_vllm.config import FocusConfig
from loadtest.paged import PagedBatch

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
    def get_simultaneous(self, *sizes: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
        return [
            torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype, device=DEVICE)
            for shape, dtype in sizes
        ]


def split(backend: Any, batch: PagedBatch, config: FocusConfig | None) -> Any:
    builder = object.__new__(backend.FocusFlashAttentionMetadataBuilder)
    builder.focus_config = config
    builder.device = torch.device(DEVICE)
    builder.num_heads_q, builder.num_heads_kv = batch.query.shape[1], batch.cache.shape[2]
    builder.first_decode = torch.arange(9, dtype=torch.int32, device=DEVICE)
    builder.vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048, max_num_seqs=8),
        model_config=SimpleNamespace(max_model_len=1024),
    )
    common = SimpleNamespace(
        max_seq_len=max(batch.seq_lens),
        max_query_len=max(batch.query_lens),
        num_reqs=len(batch.seq_lens),
        num_actual_tokens=sum(batch.query_lens),
        query_start_loc_cpu=torch.tensor(batch.query_start_loc),
        seq_lens_cpu_upper_bound=torch.tensor(batch.seq_lens),
    )
    return builder._split(common)


def forward(backend: Any, batch: PagedBatch) -> torch.Tensor:
    slots = torch.cat([
        batch.slots(request)[-queries:] for request, queries in enumerate(batch.query_lens)
    ])  # fmt: skip
    impl = object.__new__(backend.FocusFlashAttentionImpl)
    impl.num_heads, impl.head_size = batch.query.shape[1:]
    impl.num_kv_heads = batch.cache.shape[2]
    impl.scale, impl.logits_soft_cap, impl.kv_cache_dtype = impl.head_size**-0.5, 0, "auto"
    impl.focus = SimpleNamespace(
        config=batch.config, key_groups=batch.store[slots], query_groups=batch.query_groups, store=batch.store
    )
    batch.store[slots] = 0
    metadata = SimpleNamespace(
        num_actual_tokens=len(batch.query),
        block_table=batch.block_table,
        seq_lens=torch.tensor(batch.seq_lens, dtype=torch.int32, device=DEVICE),
        slot_mapping=slots,
        max_num_splits=0,
        focus=split(backend, batch, batch.config),
    )
    out = torch.full_like(batch.query, float("nan"))
    impl.forward(SimpleNamespace(), batch.query, None, None, batch.cache.transpose(1, 2), metadata, out)
    return out


@pytest.fixture
def stand_ins(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FlashAttention3", lambda scores, _: SlowFlashAttention(scores))
    monkeypatch.setattr(backend, "current_workspace_manager", Workspace)


@pytest.mark.parametrize("groups", ["1/1", "1/2", "2/2"])
@pytest.mark.usefixtures("stand_ins")
def test_batch_of_decodes_and_dense_and_routed_chunks_follows_the_definition(backend, groups):
    batch = batch_of(settings(groups, dense_below=100), **LENGTHS)
    out = forward(backend, batch)
    assert_matches_definition(batch, out, from_position=0)


@pytest.mark.usefixtures("stand_ins")
def test_batch_of_decodes_alone_follows_the_definition(backend):
    batch = batch_of(settings("1/1", dense_below=100), seq_lens=[30, 700, 101], query_lens=[1, 1, 1])
    out = forward(backend, batch)
    assert_matches_definition(batch, out, from_position=0)


def test_batch_below_dense_below_is_left_to_vllm(backend):
    batch = batch_of(settings("1/1", dense_below=100), seq_lens=[30, 100], query_lens=[1, 100])
    assert split(backend, batch, batch.config) is None


def test_layers_without_focus_are_left_to_vllm(backend):
    batch = batch_of(settings("1/1", dense_below=0), seq_lens=[30, 100], query_lens=[1, 100])
    assert split(backend, batch, None) is None
