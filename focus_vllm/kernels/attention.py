"""Focus attention over a paged cache: lists, FlashAttention over lists, near part and merge.

FlashAttention is an argument. On a GPU it is the one vLLM ships; anything else with the same meaning serves
where there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from focus_vllm.config import FocusConfig
from focus_vllm.kernels.decode_lists import Progress, build_decode_lists
from focus_vllm.kernels.group_lists import build_group_lists, sort_queries
from focus_vllm.kernels.near import Cache, NearKeys, Scores, near_and_merge
from focus_vllm.kernels.plan import Far, PrefillPlan, far_mode
from focus_vllm.kernels.tally import tally_prefill


class Sequences(NamedTuple):
    """Which keys queries attend to, as FlashAttention takes it."""

    block_table: torch.Tensor
    """`[num_rows, max_num_pages]`, int32; with pages of one slot, lists of slots."""
    table_rows: torch.Tensor | None
    """`[num_sequences]`, int32, the row that each sequence reads; None for the row of its index."""
    cu_seqlens_q: torch.Tensor
    """`[num_sequences + 1]`, int32."""
    seqused_k: torch.Tensor
    """`[num_sequences]`, int32, keys of each."""
    max_seqlen_q: int
    """At least the longest sequence of queries."""
    max_seqlen_k: int
    """At least the most keys."""
    causal: bool
    """Align the sequences' ends and mask; otherwise every query attends to all keys."""


class FlashAttention(Protocol):
    """Variable-length attention over paged keys and values.

    It launches by `Launcher`, or is `repeatable` as a whole.
    """

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        sequences: Sequences,
    ) -> torch.Tensor:
        """Attend, scaled and capped as the layer does.

        Args:
            query: `[num_queries, num_heads, head_size]`.
            keys: `[num_pages, page_size, num_kv_heads, head_size]`.
            values: As `keys`.
            out: `[num_queries, num_heads, head_size]`, written; sequences without keys get zeros.
            sequences: Over pages of one slot, where `keys` are so.

        Returns:
            The log-sum-exp, `[num_heads, num_queries]`, float32; infinite for a query without keys.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillScratch:
    """Buffers that every layer uses in turn."""

    lists: torch.Tensor
    """`[list_capacity]`, int32."""
    index: torch.Tensor
    """`[index_capacity]`, int32."""
    query: torch.Tensor
    """`[row_capacity, num_heads, head_size]`, the query's dtype."""
    out: torch.Tensor
    """`[row_capacity, num_heads, head_size]`, the output's dtype."""
    near: NearKeys


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeScratch:
    """Buffers that every layer uses in turn."""

    lists: torch.Tensor
    """`[num_rows, max_model_len]`, int32; more queries than rows take more than one FlashAttention call."""
    list_lens: torch.Tensor
    """`[num_rows]`, int32."""
    cu_seqlens_q: torch.Tensor
    """`[>= num_rows + 1]`, int32: 0, 1, 2, ..."""
    progress: Progress


def prefill_attention(
    attention: FlashAttention,
    waves: Sequence[PrefillPlan],
    query: torch.Tensor,
    out: torch.Tensor,
    query_groups: torch.Tensor,
    store: torch.Tensor,
    cache: Cache,
    config: FocusConfig,
    scores: Scores,
    scratch: PrefillScratch,
    totals: torch.Tensor,
) -> None:
    """Focus attention of prefill chunks whose queries are all at positions >= dense_below.

    Args:
        attention: FlashAttention.
        waves: From `plan_waves`.
        query: `[num_tokens, num_heads, head_size]`.
        out: `[num_tokens, num_heads, head_size]`; the rows of planned queries are written.
        query_groups: `[>= num_tokens]`, Q of this step's tokens.
        store: `[num_slots]`, G of every cached token, this step's too.
        cache: The layer's keys and values, this step's too.
        config: The mask's settings.
        scores: The layer's scale and softcap.
        scratch: Buffers with the capacities that `plan_waves` was given.
        totals: `[4]`, int64: (query, key) pairs so far, candidates and selected, of prefill and of decode.
    """
    mode = far_mode(config)
    for plan in waves:
        far = lists = None
        if mode is not Far.NOTHING:
            lists = build_group_lists(
                plan, store, query_groups, cache.block_table, cache.block_size, config,
                scratch.lists, scratch.index,
            )  # fmt: skip
            sorted_query = sort_queries(plan, query, lists, config, scratch.query)
            far_out = scratch.out[: len(sorted_query)]
            table_rows = plan.table_rows if mode is Far.BLOCK else None
            sequences = Sequences(
                lists.slots, table_rows, lists.cu_seqlens_q, lists.seqused_k,
                plan.max_queries, plan.max_keys, causal=mode is Far.GROUP,
            )  # fmt: skip
            lse = attention(sorted_query, cache.keys, cache.values, far_out, sequences)
            far = (far_out, lse, lists.row_of)
        tally_prefill(plan, query_groups, store, cache.block_table, cache.block_size, config, lists, totals)
        near_and_merge(plan, query, out, query_groups, store, cache, config, scores, far, scratch.near)


def decode_attention(
    attention: FlashAttention,
    query: torch.Tensor,
    out: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_groups: torch.Tensor,
    query_groups: torch.Tensor,
    store: torch.Tensor,
    cache: Cache,
    seq_lens: torch.Tensor,
    config: FocusConfig,
    scratch: DecodeScratch,
    totals: torch.Tensor,
    query_start_loc: torch.Tensor | None = None,
    listed: bool = False,
) -> None:
    """Focus attention of decodes, each query over a list of its own; also stores the groups of its token.

    Args:
        attention: FlashAttention.
        query: `[num_queries, num_heads, head_size]`.
        out: `[num_queries, num_heads, head_size]`, written.
        slot_mapping: `[>= num_queries]`, int64, the slots of the queries' tokens; -1 marks padding.
        key_groups: `[>= num_queries]`, G of the queries' tokens.
        query_groups: `[>= num_queries]`, Q of the queries.
        store: `[num_slots]`, G of every cached token; the queries' own are written.
        cache: The layer's keys and values, the queries' own too.
        seq_lens: `[num_requests]`, int32, as `build_decode_lists` takes them.
        config: The mask's settings.
        scratch: Buffers.
        totals: As `prefill_attention`'s.
        query_start_loc: As `build_decode_lists` takes it.
        listed: The lists are in `scratch` already, which has room for all, and the groups are stored.
    """
    rows, max_model_len = scratch.lists.shape
    for start in range(0, len(query), rows):
        count = min(rows, len(query) - start)
        part = slice(start, start + count) if len(query) > rows else None
        # Without several queries a request is a row, and each call has its own.
        requests = part if query_start_loc is None else None
        lists, list_lens = scratch.lists[:count], scratch.list_lens[:count]
        if not listed:
            build_decode_lists(
                _part(slot_mapping, part),
                _part(key_groups, part),
                store,
                _part(query_groups, part),
                _part(cache.block_table, requests),
                cache.block_size,
                _part(seq_lens, requests),
                config,
                scratch.progress,
                lists,
                list_lens,
                totals,
                query_start_loc,
                start,
            )
        starts = scratch.cu_seqlens_q[: count + 1]
        sequences = Sequences(lists, None, starts, list_lens, 1, max_model_len, causal=True)
        attention(_part(query, part), cache.keys, cache.values, _part(out, part), sequences)


def _part(tensor: torch.Tensor, part: slice | None) -> torch.Tensor:
    return tensor if part is None else tensor[part]


def decode_scratch_shapes(
    max_num_reqs: int, max_model_len: int, list_bytes: int
) -> tuple[tuple[int, int], tuple[int]]:
    """Return the shapes of `DecodeScratch`'s lists and list_lens; both int32.

    Args:
        max_num_reqs: Most requests in a step.
        max_model_len: Longest request.
        list_bytes: What the lists may take; one row always fits.
    """
    rows = max(1, min(max_num_reqs, list_bytes // (4 * max_model_len)))
    return (rows, max_model_len), (rows,)
