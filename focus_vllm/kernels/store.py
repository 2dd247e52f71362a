"""The group store: one bitmask for each cached token, at the slot of its key and value."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from focus_vllm.kernels.launch import Launcher

TOKENS = 1024
GROUPS = {torch.uint8: tl.uint8, torch.int16: tl.int16, torch.int32: tl.int32}


@triton.jit(
    do_not_specialize=["num_tokens", "prefill", "decode"], do_not_specialize_on_alignment=["slot_mapping"]
)
def _store_kernel(
    addresses,
    slot_mapping,
    num_tokens,
    totals,
    prefill: tl.int64,
    decode: tl.int64,
    groups: tl.constexpr,
    tokens: tl.constexpr,
):
    address = addresses + 2 * tl.program_id(1)
    store = tl.load(address).to(tl.pointer_type(groups))
    key_groups = tl.load(address + 1).to(tl.pointer_type(groups))
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
    written = slot >= 0
    tl.store(store + slot, tl.load(key_groups + token, mask=written), mask=written)
    if tl.program_id(0) == 0:
        real = tl.load(slot_mapping) >= 0
        tl.atomic_add(totals, prefill, mask=real, sem="relaxed")
        tl.atomic_add(totals + 1, prefill, mask=real, sem="relaxed")
        tl.atomic_add(totals + 2, decode, mask=real, sem="relaxed")
        tl.atomic_add(totals + 3, decode, mask=real, sem="relaxed")


_launch_store = Launcher(_store_kernel)


def address_of(store: torch.Tensor, key_groups: torch.Tensor) -> torch.Tensor:
    """Return a layer's row of `write_stores`' addresses: `[1, 2]`, int64, on the device of `store`.

    Args:
        store: `[num_slots]`, the bitmask dtype.
        key_groups: `[max_num_tokens]`, the dtype of `store`: this step's tokens.
    """
    return torch.tensor([[store.data_ptr(), key_groups.data_ptr()]], dtype=torch.int64, device=store.device)


def write_stores(
    addresses: torch.Tensor,
    dtype: torch.dtype,
    slot_mapping: torch.Tensor,
    totals: torch.Tensor,
    dense_pairs: tuple[int, int] = (0, 0),
) -> None:
    """Store the groups of this step's tokens where vLLM stores their keys and values, of several layers.

    Args:
        addresses: `[num_layers, 2]`, int64: rows of `address_of`. The tensors must still exist.
        dtype: Theirs.
        slot_mapping: `[num_tokens]`, int64; -1 marks padding, which is skipped.
        totals: `[4]`, int64; see `prefill_attention`.
        dense_pairs: (query, key) pairs of this step's dense prefill and dense decode, which no other kernel
            counts. Added to `totals` for each layer, unless the first token is padding: then this is no
            request's step.
    """
    if num_tokens := slot_mapping.shape[0]:
        grid = (-(-num_tokens // TOKENS), addresses.shape[0])
        _launch_store(
            grid,
            addresses,
            slot_mapping,
            num_tokens,
            totals,
            *dense_pairs,
            groups=GROUPS[dtype],
            tokens=TOKENS,
        )
