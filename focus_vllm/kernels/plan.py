"""How a step's prefill chunks are cut up: worked out on the host from lengths alone, once for all layers."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from focus_vllm.config import FocusConfig

KEY_TILE = 1024
QUERY_TILE = 128
COPY_TILE = 32
BLOCK_QUERIES = 1024
"""Queries per block where a query attends to several groups; a multiple of QUERY_TILE."""
EVERYTHING = 2**30
MAX_LISTS = 32
"""Lists that one tile of keys is sorted into at once."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SeparateQueries(FocusConfig):
    """Settings of routers with query centroids: a token's groups as a query say nothing of those as a key."""

    @classmethod
    def of(cls, config: FocusConfig) -> SeparateQueries:
        """Return the same settings."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


class Far(enum.Enum):
    """Which keys FlashAttention reads from lists; the near kernel evaluates the mask on the rest."""

    GROUP = "group"
    """key_k = top_k = 1, the same group. A chunk's queries of a group are the tail of their group's list, so
    one causal call covers every same-group pair, near ones too."""
    BLOCK = "block"
    """Queries in blocks; of every list they need a block reads what lies before its window."""
    NOTHING = "nothing"
    """Too many different lists: the near kernel evaluates the mask on every key."""


def far_mode(config: FocusConfig) -> Far:
    """Return how prefill is divided for these settings."""
    if config.key_k == config.top_k == 1 and not isinstance(config, SeparateQueries):
        return Far.GROUP
    if config.key_k == 1 or math.comb(config.num_groups, config.top_k) <= MAX_LISTS:
        return Far.BLOCK
    return Far.NOTHING


def signatures(config: FocusConfig) -> list[int]:
    """Return, for each list of far keys, the bitmask of groups whose keys it holds.

    With key_k = 1 the groups' lists are disjoint, and a query reads those of its top_k groups. Otherwise
    a key would come twice, so there is a list for every set of top_k groups, and a query reads one.
    """
    if far_mode(config) is Far.NOTHING:
        return []
    size = 1 if config.key_k == 1 else config.top_k
    return [
        sum(1 << group for group in groups)
        for groups in itertools.combinations(range(config.num_groups), size)
    ]


def expected_keys(config: FocusConfig, num_keys: int) -> int:
    """Return how many of `num_keys` keys a routed query attends to if groups are balanced."""
    none_shared = math.comb(config.num_groups - config.key_k, config.top_k)
    share = 1 - none_shared / math.comb(config.num_groups, config.top_k)
    always = min(config.sink + config.window + 1, num_keys)
    return always + round(share * (num_keys - always))


def lists_per_query(config: FocusConfig) -> int:
    """Return how many lists a query reads, and so how many rows it has among the sorted queries."""
    return config.top_k if config.key_k == 1 else 1


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive queries of one request, all at positions >= dense_below."""

    request: int
    """Row of the block table."""
    token: int
    """Index of the first query in the batch."""
    position: int
    """Its position in the request."""
    num_queries: int


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """One request's prefill queries of a step: positions [begin, end)."""

    request: int
    token: int
    """Index of the first in the batch."""
    begin: int
    end: int

    def num_dense(self, dense_below: int) -> int:
        """Return how many, from the first on, attend to every earlier key."""
        return max(min(self.end, dense_below) - self.begin, 0)

    def routed(self, dense_below: int) -> Segment | None:
        """Return the rest; None if there is none."""
        skip = self.num_dense(dense_below)
        count = self.end - self.begin - skip
        return Segment(self.request, self.token + skip, self.begin + skip, count) if count else None


@dataclasses.dataclass(frozen=True, slots=True)
class DenseQueries:
    """A batch's prefill queries at positions below `dense_below`, as sequences of one stock call.

    The queries between them are sequences without keys: FlashAttention writes zeros, the routed call
    overwrites them.
    """

    cu_seqlens_q: torch.Tensor
    """`[num_sequences + 1]`, int32, from the first prefill query on."""
    seqused_k: torch.Tensor
    """`[num_sequences]`, int32."""
    requests: torch.Tensor
    """`[num_sequences]`, int32: rows of the block table."""
    max_seqlen_q: int


def dense_queries(chunks: Sequence[Chunk], dense_below: int, device: torch.device) -> DenseQueries | None:
    """Return the dense part of a step's prefill chunks, which follow one another; None if it is empty."""
    lengths, used, requests = [], [], []
    for chunk in chunks:
        dense = chunk.num_dense(dense_below)
        for count, keys in ((dense, chunk.begin + dense), (chunk.end - chunk.begin - dense, 0)):
            if count:
                lengths.append(count)
                used.append(keys)
                requests.append(chunk.request)
    if not any(used):
        return None
    starts = np.concatenate([[0], np.cumsum(lengths)])
    cu_seqlens_q, *parts = to_device([starts, np.array(used), np.array(requests)], device)
    return DenseQueries(cu_seqlens_q, parts[0], parts[1], max(lengths))


FIELDS = 10
"""Columns of `PrefillPlan.segments`: Segment's four, then its first key tile, query tile, block, sorted row,
near tile and copied key."""


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Segments that one set of launches serves, and which program works on which."""

    num_segments: int
    num_blocks: int
    num_queries: int
    num_tokens: int
    """Tokens in the batch up to the wave's last: what is indexed by token."""
    num_key_tiles: int
    num_query_tiles: int
    num_near_tiles: int
    num_copy_tiles: int
    max_queries: int
    """Most queries in one FlashAttention sequence, an upper bound."""
    max_keys: int
    """Keys in the longest segment's context: the length of a row of the group lists."""
    segments: torch.Tensor
    """`[num_segments, FIELDS]`, int32."""
    key_tiles: torch.Tensor
    """`[num_key_tiles]`, int32: the segment of each tile of KEY_TILE keys."""
    query_tiles: torch.Tensor
    """`[num_query_tiles]`, int32: the segment of each tile of QUERY_TILE queries."""
    near_tiles: torch.Tensor
    """`[num_near_tiles]`, int32: the segment of each tile of the near kernel."""
    copy_tiles: torch.Tensor
    """`[num_copy_tiles]`, int32: the segment of each tile of COPY_TILE keys copied for the near kernel."""
    table_rows: torch.Tensor
    """`[num_blocks * num_lists]`, int32: the list that each FlashAttention sequence reads."""
    signatures: torch.Tensor
    """`[padded_lists]`, int32: `signatures`, then zeros."""


def plan_waves(
    segments: Sequence[Segment],
    config: FocusConfig,
    near_tile: int,
    list_capacity: int,
    row_capacity: int,
    near_capacity: int,
    device: torch.device,
) -> list[PrefillPlan]:
    """Divide segments into waves whose lists and sorted queries fit the scratch buffers.

    Args:
        segments: In any order.
        config: The mask's settings.
        near_tile: Queries per tile of the near kernel; divides BLOCK_QUERIES.
        list_capacity: Entries that the group lists may take; at least `list_capacity` of the longest context.
        row_capacity: Queries, counted once for each of their groups, that the sorted buffer holds; at least
            BLOCK_QUERIES * lists_per_query.
        near_capacity: Keys that the near kernel's copy holds; at least `near_keys` of BLOCK_QUERIES.
        device: Where the plans go; one copy from pinned memory each.

    Returns:
        The plans, to be run one after another.
    """
    return [
        _plan(wave, config, near_tile, device)
        for wave in _waves(segments, config, list_capacity, row_capacity, near_capacity)
    ]


def _split(segment: Segment, most: int) -> Iterator[Segment]:
    for start in range(0, segment.num_queries, most):
        count = min(most, segment.num_queries - start)
        yield Segment(segment.request, segment.token + start, segment.position + start, count)


def near_keys(config: FocusConfig, num_queries: int) -> int:
    """Return how many keys the near kernel needs at most: the sinks, a window and the queries' own."""
    if far_mode(config) is Far.NOTHING:
        return 0
    return -(-(config.sink + config.window + num_queries) // COPY_TILE) * COPY_TILE


def _waves(
    segments: Sequence[Segment],
    config: FocusConfig,
    list_capacity: int,
    row_capacity: int,
    near_capacity: int,
) -> Iterator[list[Segment]]:
    num_lists, copies = len(signatures(config)), lists_per_query(config)
    most = row_capacity // copies // BLOCK_QUERIES * BLOCK_QUERIES
    while near_keys(config, most) > near_capacity:
        most -= BLOCK_QUERIES
    wave: list[Segment] = []
    keys = queries = near = 0
    for piece in (piece for segment in segments for piece in _split(segment, most)):
        end, copied = piece.position + piece.num_queries, near_keys(config, piece.num_queries)
        keys, queries, near = max(keys, end), queries + piece.num_queries, near + copied
        lists = (len(wave) + 1) * num_lists * _row_length(keys)
        full = lists > list_capacity or queries * copies > row_capacity or near > near_capacity
        if wave and full:
            yield wave
            wave, keys, queries, near = [], end, piece.num_queries, copied
        wave.append(piece)
    if wave:
        yield wave


def _row_length(keys: int) -> int:
    return -(-keys // 4) * 4


def list_capacity(config: FocusConfig, max_model_len: int, at_least: int = 0) -> int:
    """Return how many list entries serve any single request, and `at_least`; 0 if there are no lists."""
    num_lists = len(signatures(config))
    return max(num_lists * _row_length(max_model_len), at_least if num_lists else 0)


def index_capacity(
    config: FocusConfig, max_keys: int, max_tokens: int, row_capacity: int, near_capacity: int
) -> int:
    """Return how many int32 of `PrefillScratch.index` serve any wave of any step.

    Args:
        config: The mask's settings.
        max_keys: Of a wave's requests together, which the lists hold.
        max_tokens: Most tokens in a step.
        row_capacity: As `plan_waves`'s.
        near_capacity: As `plan_waves`'s.
    """
    num_lists, copies = len(signatures(config)), lists_per_query(config)
    if not num_lists:
        return 0
    segments = most_segments(config, near_capacity)
    key_tiles = _row_length(max_keys) // KEY_TILE + segments
    query_tiles = row_capacity // copies // QUERY_TILE + segments
    sequences = (row_capacity // copies // BLOCK_QUERIES + segments) * num_lists
    return sum(index_sizes(key_tiles + query_tiles, num_lists, sequences, max_tokens * copies))


def most_segments(config: FocusConfig, near_capacity: int) -> int:
    """Return how many segments a wave can have: each takes its part of the near kernel's copy."""
    return max(1, near_capacity // max(1, near_keys(config, 1)))


def index_sizes(tiles: int, num_lists: int, sequences: int, rows: int) -> list[int]:
    """Return the int32 that counts, cu_seqlens_q, seqused_k and row_of take."""
    sizes = (tiles * padded_lists(num_lists), sequences + 1, sequences, rows)
    return [_aligned(size) for size in sizes]


def padded_lists(num_lists: int) -> int:
    """Return the power of two that holds `num_lists`, at least 2."""
    return max(2, 1 << (num_lists - 1).bit_length()) if num_lists else 2


def _cumulative(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)[:-1]])


def _plan(wave: list[Segment], config: FocusConfig, near_tile: int, device: torch.device) -> PrefillPlan:
    table = np.array([dataclasses.astuple(segment) for segment in wave], dtype=np.int64)
    position, queries = table[:, 2], table[:, 3]
    # One tile more than the keys need: it writes the length of a list that ends on a tile's edge.
    key_tiles = (position + queries) // KEY_TILE + 1
    query_tiles = -(-queries // QUERY_TILE)
    blocks = -(-queries // BLOCK_QUERIES) if far_mode(config) is Far.BLOCK else np.ones_like(queries)
    near_tiles = -(-queries // near_tile)
    copied = np.array([near_keys(config, segment.num_queries) for segment in wave])
    lists = np.array(signatures(config), dtype=np.int64)
    parts = (key_tiles, query_tiles, blocks, queries * lists_per_query(config), near_tiles, copied)
    fields = np.concatenate([table, np.stack([_cumulative(part) for part in parts], axis=1)], axis=1)
    copy_tiles = copied // COPY_TILE
    index = np.arange(len(wave))
    block_segment = np.repeat(index, blocks)
    rows = block_segment[:, None] * len(lists) + np.arange(len(lists))
    arrays = [
        fields,
        *(np.repeat(index, part) for part in (key_tiles, query_tiles, near_tiles, copy_tiles)),
        rows,
        np.pad(lists, (0, padded_lists(len(lists)) - len(lists))),
    ]
    on_device = to_device(arrays, device)
    longest = int(queries.max())
    return PrefillPlan(
        num_segments=len(wave),
        num_blocks=int(blocks.sum()),
        num_queries=int(queries.sum()),
        num_tokens=int((table[:, 1] + queries).max()),
        num_key_tiles=int(key_tiles.sum()),
        num_query_tiles=int(query_tiles.sum()),
        num_near_tiles=int(near_tiles.sum()),
        num_copy_tiles=int(copy_tiles.sum()),
        max_queries=min(longest, BLOCK_QUERIES) if far_mode(config) is Far.BLOCK else longest,
        max_keys=_row_length(int((position + queries).max())),
        segments=on_device[0],
        key_tiles=on_device[1],
        query_tiles=on_device[2],
        near_tiles=on_device[3],
        copy_tiles=on_device[4],
        table_rows=on_device[5],
        signatures=on_device[6],
    )


def to_device(arrays: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copy integer arrays as int32 in one transfer, flattened; the host does not wait for it."""
    sizes = [_aligned(array.size) for array in arrays]
    whole, start = np.zeros(sum(sizes), dtype=np.int32), 0
    for array, size in zip(arrays, sizes, strict=True):
        whole[start : start + array.size] = array.ravel()
        start += size
    flat = torch.from_numpy(whole)
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = torch.split(flat, sizes)
    return [part[: array.size] for part, array in zip(parts, arrays, strict=True)]


def _aligned(size: int) -> int:
    """Round a number of int32 up to whole cache lines.

    Triton compiles a kernel anew for a pointer of another alignment: seconds in the middle of a request.
    """
    return -(-size // 64) * 64
