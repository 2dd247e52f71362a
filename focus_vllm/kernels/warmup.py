"""Compile the kernels before the first request: a run of each on made-up requests."""

from __future__ import annotations

import itertools

import torch

from focus_vllm.config import FocusConfig
from focus_vllm.kernels.attention import (
    DecodeScratch,
    FlashAttention,
    PrefillScratch,
    Sequences,
    decode_attention,
    prefill_attention,
)
from focus_vllm.kernels.decode_lists import build_decode_lists
from focus_vllm.kernels.gather import GatheredAttention, GatherScratch
from focus_vllm.kernels.near import Cache, Scores, near_tile
from focus_vllm.kernels.plan import Segment, plan_waves
from focus_vllm.kernels.routing import SPLIT_TOKENS, route_into
from focus_vllm.kernels.store import address_of, write_stores
from focus_vllm.routing import mask_dtype

QUERIES = 64


def _no_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor, sequences: Sequences
) -> torch.Tensor:
    out.zero_()
    return torch.zeros(query.shape[1], len(query), device=query.device)


def compile_kernels(
    config: FocusConfig,
    query: torch.Tensor,
    out: torch.Tensor,
    num_kv_heads: int,
    cache_dtype: torch.dtype,
    scores: Scores,
    prefill: PrefillScratch,
    decode: DecodeScratch,
    gather: GatherScratch | None = None,
    listed: FlashAttention | None = None,
) -> None:
    """Run prefill and decode, without FlashAttention, on data of the shapes and dtypes to come.

    Args:
        config: The mask's settings.
        query: `[num_tokens, num_heads, head_size]`; overwritten.
        out: `[num_tokens, num_heads, head_size]`; overwritten.
        num_kv_heads: Key-value heads.
        cache_dtype: Of the KV cache.
        scores: The layer's scale and softcap.
        prefill: Buffers.
        decode: Buffers.
        gather: Buffers, where keys that prefill has listed are copied.
        listed: What attends to decode's lists, if it is not FlashAttention.
    """
    attention: FlashAttention = _no_attention
    if gather is not None:
        attention = GatheredAttention(_no_attention, gather)
    count = min(QUERIES, len(query))
    _, num_heads, head_size = query.shape
    block_size = 16
    pages = torch.zeros(block_size, 1, num_kv_heads, 2 * head_size, device=query.device).to(cache_dtype)
    block_table = torch.zeros(1, 2 * QUERIES // block_size, dtype=torch.int32, device=query.device)
    keys, values = torch.split(pages, head_size, dim=-1)
    cache = Cache(keys, values, block_table, block_size)
    dtype = mask_dtype(config.num_groups)
    store = torch.ones(block_size, dtype=dtype, device=query.device)
    bits = torch.tensor((1 << config.top_k) - 1, device=query.device).to(dtype)
    query_groups = bits.expand(len(query)).contiguous()
    query.zero_()
    capacities = (prefill.lists.numel(), len(prefill.query), len(prefill.near.keys) or QUERIES)
    waves = plan_waves(
        [Segment(0, 0, QUERIES, count)],
        config,
        near_tile(num_heads // num_kv_heads),
        *capacities,
        query.device,
    )
    totals = torch.zeros(4, dtype=torch.int64, device=query.device)
    prefill_attention(
        attention, waves, query, out, query_groups, store, cache, config, scores, prefill, totals
    )
    slots = torch.zeros(1, dtype=torch.int64, device=query.device)
    starts = torch.arange(2, dtype=torch.int32, device=query.device)
    for several, behind_routing in itertools.product((None, starts), (False, True)):
        build_decode_lists(
            slots,
            query_groups,
            store,
            query_groups,
            block_table,
            block_size,
            slots.int(),
            config,
            decode.progress,
            decode.lists[:1],
            decode.list_lens[:1],
            totals,
            several,
            behind_routing=behind_routing,
        )
    if listed is not None:
        tensors = query[:1], out[:1], slots, query_groups, query_groups, store, cache
        decode_attention(listed, *tensors, slots.int(), config, decode, totals, listed=True)
    write_stores(address_of(store, query_groups), dtype, slots, totals)


def compile_routing(
    weight: torch.Tensor,
    bias: torch.Tensor,
    key_groups: torch.Tensor,
    query_groups: torch.Tensor,
    key_k: int,
    top_k: int,
) -> None:
    """Route few tokens and many; both kernels are needed soon, by prompts and by decodes.

    Args:
        weight: As `route_into`'s, and all others too.
        bias: The router's.
        key_groups: Overwritten.
        query_groups: Overwritten.
        key_k: Groups per token as a key.
        top_k: Groups per token as a query.
    """
    count = min(SPLIT_TOKENS + 1, len(key_groups))
    hidden = torch.zeros(count, weight.shape[-1], dtype=weight.dtype, device=weight.device)
    for some in (hidden[:1], hidden):
        route_into(some, weight, bias, key_groups, query_groups, key_k, top_k)
