"""The group store: one bitmask for each cached token, at the slot of its key and value."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS = 1024


@triton.jit(do_not_specialize=["num_tokens", "prefill", "decode"])
def _store_kernel(
    store, slot_mapping, key_groups, num_tokens, totals, prefill, decode, tokens: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
    written = slot >= 0
    tl.store(store + slot, tl.load(key_groups + token, mask=written), mask=written)
    if tl.program_id(0) == 0:
        real = tl.load(slot_mapping) >= 0
        tl.atomic_add(totals, prefill.to(tl.int64), mask=real, sem="relaxed")
        tl.atomic_add(totals + 1, prefill.to(tl.int64), mask=real, sem="relaxed")
        tl.atomic_add(totals + 2, decode.to(tl.int64), mask=real, sem="relaxed")
        tl.atomic_add(totals + 3, decode.to(tl.int64), mask=real, sem="relaxed")


def write_store(
    store: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_groups: torch.Tensor,
    totals: torch.Tensor,
    dense_pairs: tuple[int, int] = (0, 0),
) -> None:
    """Store the groups of this step's tokens where vLLM stores their keys and values.

    Args:
        store: `[num_slots]`, the bitmask dtype.
        slot_mapping: `[num_tokens]`, int64; -1 marks padding, which is skipped.
        key_groups: `[>= num_tokens]`, the dtype of `store`.
        totals: `[4]`, int64; see `prefill_attention`.
        dense_pairs: (query, key) pairs of this step's dense prefill and dense decode, which no other kernel
            counts. Added to `totals`, unless the first token is padding: then this is no request's step.
    """
    num_tokens = len(slot_mapping)
    if num_tokens:
        _store_kernel[(triton.cdiv(num_tokens, TOKENS),)](
            store, slot_mapping, key_groups, num_tokens, totals, *dense_pairs, tokens=TOKENS, num_warps=4
        )
