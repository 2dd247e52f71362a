"""Random batches in a paged cache, for tests and measurements of attention: no model, balanced groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from focus_vllm.config import FocusConfig
from focus_vllm.kernels.attention import Sequences
from focus_vllm.kernels.launch import repeatable
from focus_vllm.kernels.near import Cache, Scores
from focus_vllm.kernels.plan import SeparateQueries
from focus_vllm.reference import decode_mask, focus_mask, masked_attention
from focus_vllm.routing import mask_dtype, top_groups


class SlowFlashAttention:
    """FlashAttention's meaning by loops over sequences, where there is no GPU: paged keys, log-sum-exp."""

    def __init__(self, scores: Scores, least_page: int = 1) -> None:
        self.scores = scores
        self.least_page = least_page

    @repeatable
    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        sequences: Sequences,
    ) -> torch.Tensor:
        if keys.shape[1] < self.least_page:
            raise ValueError(f"pages have {keys.shape[1]} slots, at least {self.least_page} are needed")
        scores = self.scores
        scale, value_scale = scores.scale, 1.0
        if scores.q_scale is not None and scores.k_scale is not None and scores.v_scale is not None:
            # FP8 cannot be indexed.
            scale, value_scale = scale * float(scores.q_scale * scores.k_scale), float(scores.v_scale)
            query, keys, values = query.float(), keys.float(), values.float()
        lse = torch.full((query.shape[1], len(query)), float("inf"), device=query.device)
        starts, table_rows = sequences.cu_seqlens_q.tolist(), sequences.table_rows
        assert starts[-1] == len(query) == len(out)
        for sequence, used in enumerate(sequences.seqused_k.tolist()):
            rows = slice(starts[sequence], starts[sequence + 1])
            count = rows.stop - rows.start
            assert count <= sequences.max_seqlen_q
            assert used <= sequences.max_seqlen_k
            if count == 0:
                continue
            row = sequence if table_rows is None else int(table_rows[sequence])
            page_size = keys.shape[1]
            position = torch.arange(used, device=query.device)
            page = sequences.block_table[row, position // page_size].long()
            slots = page * page_size + position % page_size
            mask = torch.ones(count, used, dtype=torch.bool, device=query.device)
            if sequences.causal:
                mask = mask.tril(used - count)
            part, part_lse = masked_attention(
                query[rows],
                keys.flatten(0, 1)[slots],
                values.flatten(0, 1)[slots],
                mask,
                scale,
                scores.softcap,
            )
            out[rows] = (part * value_scale).to(out.dtype)
            lse[:, rows] = part_lse.T.nan_to_num(neginf=float("inf"))
        return lse


@dataclasses.dataclass(frozen=True, slots=True)
class PagedBatch:
    """Requests whose last tokens are this step's queries, their keys and values in permuted blocks."""

    config: FocusConfig
    seq_lens: list[int]
    query_lens: list[int]
    query: torch.Tensor
    """`[sum(query_lens), num_heads, head_size]`."""
    cache: torch.Tensor
    """`[num_blocks, block_size, num_kv_heads, 2 * head_size]`, as vLLM lays it out; unused slots are NaN."""
    block_table: torch.Tensor
    """`[num_requests, max_num_blocks]`, int32."""
    store: torch.Tensor
    """`[num_slots]`, G of every cached token."""
    query_groups: torch.Tensor
    """`[sum(query_lens)]`, Q of this step's tokens."""

    @property
    def query_start_loc(self) -> list[int]:
        """Where each request's queries start in the batch."""
        return [sum(self.query_lens[:index]) for index in range(len(self.query_lens) + 1)]

    @property
    def paged(self) -> Cache:
        """The cache as pages of one slot."""
        head_size = self.query.shape[-1]
        pages = self.cache.flatten(0, 1).unsqueeze(1)
        keys, values = torch.split(pages, head_size, dim=-1)
        return Cache(keys, values, self.block_table, self.cache.shape[1])

    def slots(self, request: int) -> torch.Tensor:
        """Return the slots of a request's tokens in order, `[seq_len]`, int64."""
        block_size = self.cache.shape[1]
        position = torch.arange(self.seq_lens[request], device=self.cache.device)
        return self.block_table[request, position // block_size].long() * block_size + position % block_size

    def reference(self, request: int, rows: slice, scale: float, softcap: float = 0.0) -> torch.Tensor:
        """Return the definition's output for some of a request's queries, `[num_rows, num_heads, head_size]`.

        Args:
            request: Which request.
            rows: Which of its queries, by index among them; contiguous.
            scale: Factor on the scores.
            softcap: See `masked_attention`.
        """
        start = self.query_start_loc[request]
        first, last, _ = rows.indices(self.query_lens[request])
        end = self.seq_lens[request] - self.query_lens[request] + last
        slots = self.slots(request)[:end]
        queries = slice(start + first, start + last)
        groups = self.query_groups[queries], self.store[slots]
        alone = self.query_lens[request] == 1
        mask = (
            decode_mask(*groups, self.config)
            if alone
            else focus_mask(*groups, self.config, end - (last - first))
        )
        pages = self.cache.flatten(0, 1)
        if pages.element_size() == 1:  # FP8 cannot be indexed
            pages = pages.bfloat16()
        num_kv_heads, head_size = self.cache.shape[2], self.query.shape[-1]
        # One key-value head at a time: in float32 a million tokens of all heads would not fit.
        outs = []
        for head, query in enumerate(self.query[queries].chunk(num_kv_heads, dim=1)):
            keys, values = torch.split(pages[slots, head : head + 1], head_size, dim=-1)
            out, _ = masked_attention(query, keys, values, mask, scale, softcap)
            outs.append(out)
        return torch.cat(outs, dim=1)


def make_batch(
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    config: FocusConfig,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: str,
    seed: int,
    block_size: int = 16,
) -> PagedBatch:
    """Draw a batch.

    Args:
        seq_lens: Tokens of each request, this step's included.
        query_lens: This step's tokens of each request.
        config: The mask's settings.
        num_heads: Query heads.
        num_kv_heads: Key-value heads.
        head_size: Channels per head.
        dtype: Of queries, keys and values.
        device: Where.
        seed: Equal seeds give equal batches on one device.
        block_size: Slots per block.

    Returns:
        The batch. Scores are drawn alike for every group, so groups are balanced.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    num_blocks = [-(-length // block_size) for length in seq_lens]
    total = sum(num_blocks) + 3
    order = torch.randperm(total, generator=generator, device=device).int()
    block_table = torch.zeros(len(seq_lens), max(num_blocks), dtype=torch.int32, device=device)
    wide = torch.bfloat16 if dtype.itemsize == 1 else dtype
    cache = torch.full(
        (total, block_size, num_kv_heads, 2 * head_size), float("nan"), dtype=wide, device=device
    )
    store = torch.full((total * block_size,), -1, device=device).to(mask_dtype(config.num_groups))
    first = 0
    query_groups = []
    for request, (length, queries) in enumerate(zip(seq_lens, query_lens, strict=True)):
        blocks = order[first : first + num_blocks[request]]
        first += num_blocks[request]
        block_table[request, : len(blocks)] = blocks
        offset = torch.arange(block_size, device=device)
        slots = (blocks.long()[:, None] * block_size + offset).flatten()[:length]
        cache.view(-1, num_kv_heads, 2 * head_size)[slots] = normal(length, num_kv_heads, 2 * head_size).to(
            wide
        )
        scores = torch.randn(length, config.num_groups, generator=generator, device=device)
        store[slots] = top_groups(scores, config.key_k)
        if isinstance(config, SeparateQueries):
            scores = torch.randn(length, config.num_groups, generator=generator, device=device)
        query_groups.append(top_groups(scores[length - queries :], config.top_k))
    return PagedBatch(
        config=config,
        seq_lens=list(seq_lens),
        query_lens=list(query_lens),
        query=normal(sum(query_lens), num_heads, head_size).to(dtype),
        cache=cache.to(dtype),
        block_table=block_table,
        store=store,
        query_groups=torch.cat(query_groups),
    )
