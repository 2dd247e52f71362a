"""Routing on the device: a chunk's hidden states to its tokens' groups, in one kernel."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from focus_vllm.kernels.launch import Launcher, launches_early

TOKENS = 16
CHANNELS = 256
PART = 2
"""Tiles of channels that are added up before they are added to the sum of those before.

The same for every number of tokens: a token's products are then added up in the same order whatever it is
batched with, and its groups cannot depend on the batch. One H200, 2026-11-26, 8 groups, hidden size 4096:
3.7 us for one token, 8.0 by one program; 22.7 for 8192. With twice as many tiles 4.3 and 30.3. Not one
tile: Triton makes a product and an addition one operation, which rounds otherwise.
"""
WARPS = 2
STAGES = 4
"""Parts that one program has under way."""
SPLIT_TOKENS = 256
"""Up to which number of tokens each part has a program of its own."""


def device_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a router's weight as `route_into` reads it: two halves that add up to it, for the tensor cores.

    With bfloat16 that keeps 16 bits of every weight; the hidden states have 8.

    Args:
        weight: `[num_groups, hidden_size]`, float32; or two of them, `[2, num_groups, hidden_size]`.
        dtype: Of the hidden states. float32 keeps the weight whole.

    Returns:
        `[2 * padded_groups, hidden_size]` in `dtype`: the rounded weight, then what rounding left. Of two
        weights, both.
    """
    if weight.dim() == 3:
        return torch.stack([device_weight(part, dtype) for part in weight])
    padded = _padded(len(weight))
    halves = torch.zeros(2, padded, weight.shape[1], dtype=dtype, device=weight.device)
    halves[0, : len(weight)] = weight.to(dtype)
    halves[1, : len(weight)] = (weight - weight.to(dtype).float()).to(dtype)
    return halves.flatten(0, 1)


@functools.cache
def _padded(num_groups: int) -> int:
    padded: int = triton.next_power_of_2(num_groups)
    return max(8, padded)


@triton.jit
def _best_groups(scores, num_groups: tl.constexpr, k: tl.constexpr):
    group = tl.arange(0, scores.shape[1])
    # One integer orders by score, then by lower group: a float's bits order like an integer's once negative
    # ones are turned around.
    bits = scores.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) * 32 + (31 - group)[None, :]
    lowest: tl.constexpr = -(2**62)
    order = tl.where((group < num_groups)[None, :], order, lowest)
    chosen = tl.zeros([scores.shape[0]], tl.int32)
    for _ in tl.static_range(k):
        best = tl.max(order, axis=1)
        order = tl.where(order == best[:, None], lowest, order)
        chosen = chosen | (1 << (31 - (best & 31)).to(tl.int32))
    return chosen


@triton.jit
def _part_products(
    hidden_rows, weight_columns, real, first, hidden_size, tokens: tl.constexpr, padded_groups: tl.constexpr,
    channels: tl.constexpr, part: tl.constexpr,
):  # fmt: skip
    products = tl.zeros([tokens, 2 * padded_groups], tl.float32)
    for tile in tl.static_range(part):
        channel = first + tile * channels + tl.arange(0, channels)
        inside = channel < hidden_size
        h = tl.load(hidden_rows + channel[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        w = tl.load(weight_columns + channel[:, None], mask=inside[:, None], other=0.0)
        products = tl.dot(h, w, products, input_precision="ieee")
    return products


@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["bias", "key_groups", "query_groups"],
)
def _route_kernel(
    hidden, hidden_stride, weight, bias, key_groups, query_groups, num_tokens, hidden_size, sums, done,
    num_groups: tl.constexpr, padded_groups: tl.constexpr, key_k: tl.constexpr, top_k: tl.constexpr,
    tokens: tl.constexpr, channels: tl.constexpr, part: tl.constexpr, parts: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    if early:
        gdc_launch_dependents()  # decode's lists may begin
    tile = tl.program_id(0)
    token = tile * tokens + tl.arange(0, tokens)
    row = tl.arange(0, 2 * padded_groups)
    group = tl.arange(0, padded_groups)
    offset = tl.load(bias + group, mask=group < num_groups, other=0.0)
    real = token < num_tokens
    hidden_rows = hidden + token.to(tl.int64)[:, None] * hidden_stride
    weight_columns = weight + row[None, :] * hidden_size
    total = tl.zeros([tokens, 2 * padded_groups], tl.float32)
    last = True
    if sums is None:
        for first in range(0, hidden_size, part * channels):
            total += _part_products(
                hidden_rows, weight_columns, real, first, hidden_size, tokens, padded_groups, channels, part
            )
    else:
        # The program that is done last adds up what all have found.
        mine = tl.program_id(1)
        products = _part_products(
            hidden_rows, weight_columns, real, mine * part * channels, hidden_size, tokens, padded_groups,
            channels, part,
        )  # fmt: skip
        cell = tl.arange(0, tokens)[:, None] * (2 * padded_groups) + row[None, :]
        size: tl.constexpr = 2 * padded_groups * tokens
        tl.store(sums + (tile * parts + mine) * size + cell, products)
        tl.debug_barrier()
        last = tl.atomic_add(done + tile, 1, sem="acq_rel") == parts - 1
        if last:
            tl.debug_barrier()
            for other in tl.static_range(parts):
                total += tl.load(sums + (tile * parts + other) * size + cell, cache_modifier=".cg")
            tl.store(done + tile, 0)
    if last:
        scores = tl.sum(tl.reshape(total, [tokens, 2, padded_groups]), axis=1)
        scores += offset[None, :]
        # Every token gets exactly k groups, even from hidden states that are not numbers.
        scores = tl.where(scores > -3e38, scores, -3e38) + 0.0
        keys = _best_groups(scores, num_groups, key_k)
        queries = keys if key_k == top_k else _best_groups(scores, num_groups, top_k)
        tl.store(key_groups + token, keys, mask=real)
        tl.store(query_groups + token, queries, mask=real)


def num_stages(dtype: torch.dtype, num_groups: int, shared_memory: int) -> int:
    """Return how many parts are loaded at a time: fewer than on Hopper where shared memory is smaller.

    Args:
        dtype: Of the hidden states.
        num_groups: Groups.
        shared_memory: Bytes that one program can have.
    """
    tile_bytes = _channels(num_groups) * (TOKENS + 2 * _padded(num_groups)) * dtype.itemsize
    return min(STAGES, shared_memory // (PART * tile_bytes))


def _channels(num_groups: int) -> int:
    return max(64, CHANNELS * 8 // _padded(num_groups))  # wider weights take narrower tiles


_launch_route = Launcher(_route_kernel)


@functools.cache
def _stages(device: torch.device, dtype: torch.dtype, num_groups: int) -> int:
    if device.type != "cuda":
        return STAGES
    properties: Any = torch.cuda.get_device_properties(device)
    return num_stages(dtype, num_groups, properties.shared_memory_per_block_optin)


@functools.cache
def _split_buffers(device: torch.device, padded_groups: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return room for all parts' products, and how many parts of each tile of tokens are done: zeros.

    All layers use them, one after the other.
    """
    tiles = -(-SPLIT_TOKENS // TOKENS)
    sums = torch.empty(tiles * parts * TOKENS * 2 * padded_groups, device=device)
    return sums, torch.zeros(tiles, dtype=torch.int32, device=device)


def route_into(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    key_groups: torch.Tensor,
    query_groups: torch.Tensor,
    key_k: int,
    top_k: int,
) -> None:
    """Write each token's groups; what `focus_vllm.routing.route` returns, up to float32 rounding of ties.

    Args:
        hidden: `[num_tokens, hidden_size]`, any float dtype, the last dimension contiguous.
        weight: From `device_weight`, in the dtype of `hidden`.
        bias: `[num_groups]`, float32, or `[2, num_groups]`: keys and queries have their own centroids.
        key_groups: `[>= num_tokens]` in `mask_dtype(num_groups)`; receives G.
        query_groups: As `key_groups`; receives Q.
        key_k: Groups per token as a key.
        top_k: Groups per token as a query.

    Raises:
        ValueError: A buffer is shorter than the chunk, or the dtypes differ.
    """
    num_tokens, hidden_size = hidden.shape
    shortest = min(key_groups.shape[0], query_groups.shape[0])
    if shortest < num_tokens:
        raise ValueError(f"group buffers hold {shortest} tokens, the chunk has {num_tokens}")
    if bias.dim() == 2:
        route_into(hidden, weight[0], bias[0], key_groups, key_groups, key_k, key_k)
        route_into(hidden, weight[1], bias[1], query_groups, query_groups, top_k, top_k)
        return
    num_groups = bias.shape[0]
    if weight.dtype != hidden.dtype:
        raise ValueError(f"the router's weight is {weight.dtype}, the hidden states are {hidden.dtype}")
    if num_tokens == 0:
        return
    stride, padded, channels = hidden.stride(0), _padded(num_groups), _channels(num_groups)
    parts = -(-hidden_size // (PART * channels))
    buffers = _split_buffers(hidden.device, padded, parts)
    split = num_tokens <= SPLIT_TOKENS and parts > 1
    _launch_route(
        (-(-num_tokens // TOKENS), parts if split else 1),
        hidden, stride, weight, bias, key_groups, query_groups, num_tokens, hidden_size,
        *(buffers if split else (None, None)),
        num_groups=num_groups, padded_groups=padded, key_k=key_k, top_k=top_k, tokens=TOKENS,
        channels=channels, part=PART, parts=parts, early=launches_early(hidden.device), num_warps=WARPS,
        num_stages=2 if split else _stages(hidden.device, hidden.dtype, num_groups),
    )  # fmt: skip
