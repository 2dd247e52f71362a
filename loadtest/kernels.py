"""Attention alone on a GPU: stock FlashAttention against the whole Focus path, over vLLM's paged cache.

    python -m loadtest.kernels --output kernels.json
    python -m loadtest.kernels --output kernels.json --only decode --limit 300     # goes on where it stopped
    python -m loadtest.kernels --smoke                                            # tiny, without a GPU

The Focus side is everything a layer adds or replaces: routing, group store, lists, FlashAttention over lists,
near part, merge and counters. Both sides run in this process on the same tensors. A case is not reported
unless its output agrees with the definition in float32: its relative error may be at most 1.5 times that of
stock FlashAttention against dense attention. "decode+qkv" puts the layer's QKV projection on both sides,
beside which a model routes and lists; "decode+own" has the kernel that attends to lists where there is no
FlashAttention 3. The file is written after every case, and cases that it has are not run
again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from focus_vllm.config import FocusConfig
from focus_vllm.engine.overlap import Beside, beside, mark, rejoin
from focus_vllm.kernels.attention import (
    DecodeScratch,
    FlashAttention,
    PrefillScratch,
    Sequences,
    decode_attention,
    decode_scratch_shapes,
    prefill_attention,
)
from focus_vllm.kernels.decode_lists import Progress, build_decode_lists
from focus_vllm.kernels.listed import ListedAttention
from focus_vllm.kernels.near import GROUP_BITS, NearKeys, Scores, near_tile
from focus_vllm.kernels.plan import (
    BLOCK_QUERIES,
    Segment,
    SeparateQueries,
    index_capacity,
    list_capacity,
    lists_per_query,
    near_keys,
    plan_waves,
)
from focus_vllm.kernels.routing import device_weight, route_into
from focus_vllm.kernels.store import address_of, write_stores
from loadtest.manifest import commit
from loadtest.paged import PagedBatch, SlowFlashAttention, make_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNK = 8192
ERROR_RATIO = 1.5
CHECKED_ROWS = 4
L2_BYTES = 512 * 2**20
"""Working set to rotate through, so that no side reads its cache from the 60 MB L2."""
MAX_SPLITS = 32
"""vLLM's `flash_attn_max_num_splits_for_cuda_graph`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Heads of the layer under test."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128

    def cache_bytes(self, case: Case) -> int:
        """Return what the case's keys and values take, in bfloat16, and a tenth for what else there is."""
        keys = case.batch * case.context * self.num_kv_heads * self.head_size
        return int(1.1 * 2 * keys * torch.bfloat16.itemsize)


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    phase: str
    """"prefill": the last CHUNK queries, or all, of one request. "decode": one query of each request."""
    context: int
    batch: int
    config: FocusConfig

    @property
    def name(self) -> str:
        """What identifies the case in a file of results."""
        config = self.config
        groups = f"{config.num_groups}/{config.key_k}/{config.top_k} below {config.dense_below}"
        own = ", query centroids" if isinstance(config, SeparateQueries) else ""
        return f"{self.phase} {self.batch} x {self.context}, {groups}, budget {config.decode_budget}{own}"

    @property
    def decodes(self) -> bool:
        """Whether every request has one query."""
        return self.phase.startswith("decode")


class Layer:
    """One attention layer's tensors and both ways to run it."""

    def __init__(self, case: Case, shape: Shape, seed: int) -> None:
        self.case = case
        queries = 1 if case.decodes else min(CHUNK, case.context)
        dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
        self.batch = make_batch(
            [case.context] * case.batch, [queries] * case.batch, case.config, **dataclasses.asdict(shape),
            dtype=dtype, device=DEVICE, seed=seed,
        )  # fmt: skip
        self.scale = shape.head_size**-0.5
        self.scores = Scores(self.scale)
        self.out = torch.empty_like(self.batch.query)
        self.paged = self.batch.paged
        tokens = len(self.batch.query)
        hidden_size = shape.num_heads * shape.head_size
        self.hidden = torch.randn(tokens, hidden_size, device=DEVICE, dtype=dtype)
        kinds = (2,) if isinstance(case.config, SeparateQueries) else ()
        weight = torch.randn(*kinds, case.config.num_groups, hidden_size, device=DEVICE)
        self.weight = device_weight(weight, dtype)
        self.bias = torch.zeros(*kinds, case.config.num_groups, device=DEVICE)
        self.routed = torch.empty(2, tokens, dtype=self.batch.store.dtype, device=DEVICE)
        starts = self.batch.query_start_loc
        self.slot_mapping = torch.cat([
            self.batch.slots(request)[-queries:] for request in range(case.batch)
        ])  # fmt: skip
        self.new_groups = self.batch.store[self.slot_mapping]
        self.address = address_of(self.batch.store, self.new_groups)
        self.seq_lens = torch.tensor(self.batch.seq_lens, dtype=torch.int32, device=DEVICE)
        self.cu_seqlens_q = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        self.totals = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        self.projection: torch.Tensor | None = None
        if case.phase == "decode+qkv":
            width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size
            self.projection = torch.randn(hidden_size, width, device=DEVICE, dtype=dtype)
            self.projected = torch.empty(tokens, width, device=DEVICE, dtype=dtype)
        self.metadata = self._scheduler_metadata(shape) if case.decodes and DEVICE == "cuda" else None
        self.attention = _flash_attention(self.scores, MAX_SPLITS if case.decodes else 0, self.metadata)
        if case.phase == "decode+own":
            self.attention = ListedAttention(self.scores, case.batch)
        self._plan(shape)

    def _scheduler_metadata(self, shape: Shape) -> torch.Tensor:
        from vllm.vllm_flash_attn import get_scheduler_metadata

        metadata: torch.Tensor = get_scheduler_metadata(
            batch_size=self.case.batch, max_seqlen_q=1, max_seqlen_k=self.case.context,
            num_heads_q=shape.num_heads, num_heads_kv=shape.num_kv_heads, headdim=shape.head_size,
            cache_seqlens=self.seq_lens, cu_seqlens_q=self.cu_seqlens_q, page_size=self.paged.block_size,
            causal=True, num_splits=MAX_SPLITS,
        )  # fmt: skip
        return metadata

    def _plan(self, shape: Shape) -> None:
        case, config, device = self.case, self.case.config, torch.device(DEVICE)
        heads = (shape.num_heads, shape.head_size)
        if case.decodes:
            shapes = decode_scratch_shapes(case.batch, case.context, 2**30)
            lists, list_lens = (torch.empty(size, dtype=torch.int32, device=DEVICE) for size in shapes)
            starts = torch.arange(case.batch + 1, dtype=torch.int32, device=DEVICE)
            self.decode_scratch = DecodeScratch(lists, list_lens, starts, Progress.zeros(case.batch, device))
            return
        capacity = list_capacity(config, case.context)
        queries = len(self.batch.query)
        rows = max(CHUNK, BLOCK_QUERIES * lists_per_query(config))
        copied = near_keys(config, rows)
        first = case.context - queries
        self.num_dense = min(max(config.dense_below - first, 0), queries)
        keys = min(config.dense_below, case.context)
        lengths = torch.tensor([keys, 0, self.num_dense], dtype=torch.int32, device=DEVICE)
        self.dense_lengths = lengths[:1], lengths[1:]
        segment = Segment(0, self.num_dense, first + self.num_dense, queries - self.num_dense)
        segments = [segment] if segment.num_queries else []
        tile = near_tile(shape.num_heads // shape.num_kv_heads)
        self.waves = plan_waves(segments, config, tile, capacity, rows, copied, device)
        index = index_capacity(config, case.context, queries, rows, copied)
        near_heads = (copied, shape.num_kv_heads, shape.head_size)
        dtype = self.out.dtype
        near = (
            torch.empty(size, dtype=dtype, device=DEVICE)
            for size in (near_heads, near_heads, (copied, GROUP_BITS))
        )
        self.prefill_scratch = PrefillScratch(
            torch.empty(capacity, dtype=torch.int32, device=DEVICE),
            torch.empty(index, dtype=torch.int32, device=DEVICE),
            torch.empty(rows, *heads, dtype=dtype, device=DEVICE),
            torch.empty(rows, *heads, dtype=dtype, device=DEVICE),
            NearKeys(*near),
        )

    def dense(self) -> None:
        """Run stock FlashAttention as vLLM calls it."""
        if self.projection is not None:
            torch.mm(self.hidden, self.projection, out=self.projected)
        self._stock(len(self.batch.query), self.case.context, self.seq_lens, self.cu_seqlens_q)

    def _stock(self, queries: int, keys: int, seq_lens: torch.Tensor, starts: torch.Tensor) -> None:
        key_cache, value_cache = torch.split(self.batch.cache, self.batch.query.shape[-1], dim=-1)
        query, out, longest = self.batch.query[:queries], self.out[:queries], queries
        if self.case.decodes:
            longest = 1
        if DEVICE == "cpu":
            table = self.paged.block_table
            sequences = Sequences(table, None, starts, seq_lens, longest, keys, causal=True)
            SlowFlashAttention(self.scores)(query, key_cache, value_cache, out, sequences)
            return
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        flash_attn_varlen_func(
            q=query, k=key_cache, v=value_cache, out=out, cu_seqlens_q=starts, max_seqlen_q=longest,
            seqused_k=seq_lens, max_seqlen_k=keys, softmax_scale=self.scale, causal=True,
            block_table=self.paged.block_table, fa_version=3, scheduler_metadata=self.metadata,
            num_splits=MAX_SPLITS if self.case.decodes else 0,
        )  # fmt: skip

    def _route(self) -> None:
        config, routed = self.case.config, self.routed
        route_into(self.hidden, self.weight, self.bias, routed[0], routed[1], config.key_k, config.top_k)

    def _route_and_list(self) -> None:
        scratch, device = self.decode_scratch, self.hidden.device
        self._route()
        mark(device, Beside.ROUTING)
        build_decode_lists(
            self.slot_mapping, self.new_groups, self.batch.store, self.batch.query_groups,
            self.paged.block_table, self.paged.block_size, self.seq_lens, self.case.config, scratch.progress,
            scratch.lists, scratch.list_lens, self.totals, behind_routing=True,
        )  # fmt: skip
        mark(device, Beside.LISTS)

    def focus(self) -> None:
        """Run everything that a routed layer does."""
        batch, config, device = self.batch, self.case.config, self.hidden.device
        if self.case.decodes:
            if self.projection is None:
                self._route_and_list()
            else:
                with beside(device):
                    self._route_and_list()
                torch.mm(self.hidden, self.projection, out=self.projected)
                rejoin(device, Beside.ROUTING)
                rejoin(device, Beside.LISTS)
            decode_attention(
                self.attention, batch.query, self.out, self.slot_mapping, self.new_groups, batch.query_groups,
                batch.store, self.paged, self.seq_lens, config, self.decode_scratch, self.totals,
                listed=True,
            )  # fmt: skip
            return
        if config.dense_below < self.case.context:
            self._route()
            write_stores(self.address, batch.store.dtype, self.slot_mapping, self.totals)
        if self.num_dense:
            keys = min(config.dense_below, self.case.context)
            self._stock(self.num_dense, keys, *self.dense_lengths)
        prefill_attention(
            self.attention, self.waves, batch.query, self.out, batch.query_groups, batch.store, self.paged,
            config, self.scores, self.prefill_scratch, self.totals,
        )  # fmt: skip

    def errors(self) -> tuple[float, float]:
        """Return the relative errors of stock and of Focus against their definitions, on sampled queries."""
        results = []
        everything = dataclasses.replace(self.batch.config, window=self.case.context)
        for run, config in ((self.dense, everything), (self.focus, self.batch.config)):
            self.out.fill_(float("nan"))
            run()
            definition = dataclasses.replace(self.batch, config=config)
            results.append(self._error(definition))
        return results[0], results[1]

    def _error(self, definition: PagedBatch) -> float:
        difference = norm = 0.0
        for request in sorted({0, self.case.batch - 1}):
            queries = definition.query_lens[request]
            start = definition.query_start_loc[request]
            for first in {0, queries // 2, max(queries - CHECKED_ROWS, 0)}:
                rows = slice(first, min(first + CHECKED_ROWS, queries))
                expected = definition.reference(request, rows, self.scale)
                got = self.out[start + rows.start : start + rows.stop].float()
                difference += (got - expected).square().sum().item()
                norm += expected.square().sum().item()
        return float((difference / norm) ** 0.5)


def _flash_attention(
    scores: Scores, num_splits: int, scheduler_metadata: torch.Tensor | None
) -> FlashAttention:
    if DEVICE == "cpu":
        return SlowFlashAttention(scores)
    from focus_vllm.engine.flash import FlashAttention3

    return FlashAttention3(scores, num_splits, scheduler_metadata)


def seconds(run: Callable[[], None], repeats: int, calls: int) -> float:
    """Return the median over `repeats` of the device's time for one of `calls` calls."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    for _ in range(2):
        run()
    samples = []
    for _ in range(repeats):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / calls / 1e3)
    return float(statistics.median(samples))


def graph_of(layers: list[Layer], side: str) -> Callable[[], None]:
    """Capture one pass over the layers; without a GPU, return what makes it."""

    def run() -> None:
        for layer in layers:
            getattr(layer, side)()

    if DEVICE == "cpu":
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(case: Case, shape: Shape, repeats: int) -> dict[str, Any]:
    """Check, then time one case."""
    layer = Layer(case, shape, seed=0)
    dense_error, focus_error = layer.errors()
    if not focus_error <= ERROR_RATIO * dense_error:
        raise RuntimeError(
            f"{case}: Focus's relative error {focus_error:.2e} is more than {ERROR_RATIO} times stock's "
            f"{dense_error:.2e}; nothing is reported"
        )
    layers, calls = [layer], 2 if case.context > 65536 else 10
    if case.decodes and DEVICE == "cuda":
        bytes_per_layer = layer.batch.cache.numel() * layer.batch.cache.element_size()
        count = min(16, -(-L2_BYTES // bytes_per_layer))
        layers += [Layer(case, shape, seed) for seed in range(1, count)]
        calls = max(2, 64 // count)
    # Prefill is captured too: eager launches take about as long as the shortest of these kernels, and in a
    # model they overlap with other layers' work.
    times = {
        side: seconds(graph_of(layers, side), repeats, calls) / len(layers) for side in ("dense", "focus")
    }
    candidates, selected = (layer.totals[offset::2].sum().item() for offset in range(2))
    config = case.config
    return {
        "name": case.name,
        "phase": case.phase,
        "context": case.context,
        "batch": case.batch,
        "num_groups": config.num_groups,
        "key_k": config.key_k,
        "top_k": config.top_k,
        "window": config.window,
        "dense_below": config.dense_below,
        "decode_budget": config.decode_budget,
        "dense_us": times["dense"] * 1e6,
        "focus_us": times["focus"] * 1e6,
        "ratio": times["dense"] / times["focus"],
        "dense_error": dense_error,
        "focus_error": focus_error,
        "keys_read": selected / candidates if candidates else None,
    }


def profile(case: Case, shape: Shape) -> list[dict[str, Any]]:
    """Return the Focus path's kernels and their mean time in one call, in microseconds."""
    layer = Layer(case, shape, seed=0)
    layer.focus()
    calls = 5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recording:
        for _ in range(calls):
            layer.focus()
        torch.cuda.synchronize()
    return kernel_table(recording, calls)


def kernel_table(recording: torch.profiler.profile, steps: int) -> list[dict[str, Any]]:
    """Return a recording's kernels, the longest first, with launches and microseconds per step."""
    totals: dict[str, list[float]] = {}
    for event in recording.key_averages():
        if event.device_time_total:  # names that begin alike are added up
            total = totals.setdefault(event.key[:80], [0.0, 0.0])
            total[0] += event.count / steps
            total[1] += event.device_time_total / steps
    return [
        {"kernel": name, "launches": launches, "us": us}
        for name, (launches, us) in sorted(totals.items(), key=lambda item: -item[1][1])
    ]


def cases() -> list[Case]:
    """Return the table's lines, those that must be shown first."""
    one = FocusConfig()
    lines = [
        Case("prefill", context, 1, one)
        for context in (16384, 65536, 262144, 1048576, 4096, 8192, 1024, 2048)
    ]
    decodes = (
        (8, 131072),
        (1, 524288),
        (1, 8192),
        (1, 32768),
        (1, 131072),
        (8, 8192),
        (8, 32768),
        (32, 8192),
        (32, 32768),
        (32, 131072),
        (8, 524288),
        (32, 524288),
    )
    lines += [Case("decode", context, batch, one) for batch, context in decodes]
    lines += [
        Case("decode+qkv", context, batch, one)
        for batch, context in ((1, 8192), (1, 32768), (1, 131072), (8, 131072))
    ]
    lines += [
        Case("decode+own", context, batch, one)
        for batch, context in ((1, 8192), (1, 131072), (1, 524288), (8, 131072), (32, 8192), (32, 131072))
    ]
    for num_groups, key_k, top_k in ((16, 1, 2), (16, 1, 4), (8, 2, 2), (4, 2, 2)):
        config = FocusConfig(num_groups=num_groups, key_k=key_k, top_k=top_k)
        lines += [Case("prefill", context, 1, config) for context in (65536, 16384, 262144)]
        lines += [Case("decode", 131072, 8, config)]
    own = SeparateQueries.of(one)
    lines += [Case("prefill", context, 1, own) for context in (16384, 65536)]
    lines += [Case("decode", 131072, 8, own)]
    lines += [Case("decode", 131072, 8, dataclasses.replace(one, decode_budget=2048))]
    routed = FocusConfig(dense_below=0)
    lines += [Case("prefill", context, 1, routed) for context in (2048, 4096, 8192)]
    return lines


def smoke_cases() -> list[Case]:
    """Return lines that the interpreter can run: every phase and kind of list."""
    one = FocusConfig(window=40, dense_below=100)
    several, sets = (dataclasses.replace(one, key_k=key_k, top_k=2) for key_k in (1, 2))
    kinds = (one, several, sets, SeparateQueries.of(one))
    lines = [Case("prefill", 260, 1, config) for config in kinds]
    return lines + [Case(phase, 300, 2, one) for phase in ("decode", "decode+qkv", "decode+own")]


def environment() -> dict[str, str]:
    """Return what the numbers depend on."""
    import triton  # type: ignore[import-untyped]
    import vllm

    return {
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": vllm.__version__,
        "commit": commit() or "unknown",
        "command": " ".join(sys.orig_argv),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write in one step."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        json.dump(content, file, indent=1)
    Path(scratch).replace(path)


def read_json(path: Path | None) -> dict[str, Any]:
    """Return what an earlier run wrote; empty if there was none."""
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


def _line(row: dict[str, Any]) -> str:
    groups = f"{row['num_groups']}/{row['key_k']}/{row['top_k']}"
    read = "" if row["keys_read"] is None else f"{row['keys_read']:.1%}"
    return (
        f"{row['phase']:13}{row['context']:>9}{row['batch']:>6}{groups:>8}{row['dense_below']:>6}"
        f"{row['dense_us']:>12.1f}{row['focus_us']:>12.1f}{row['ratio']:>8.2f}x"
        f"{row['dense_error']:>10.1e}{row['focus_error']:>10.1e}{read:>8}"
    )


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file to write, and to go on from")
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed samples per number; the median is reported"
    )
    parser.add_argument("--only", choices=["prefill", "decode", "profile"], help="a part of the table")
    parser.add_argument("--limit", type=float, default=540, help="start no case after so many seconds")
    parser.add_argument(
        "--head-size", type=int, default=128, help="channels of the 32 query and 8 key-value heads"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes, in the interpreter if there is no GPU"
    )
    args = parser.parse_args()
    started = time.monotonic()
    shape = Shape(4, 2, 64) if args.smoke else Shape(head_size=args.head_size)
    before = read_json(args.output)
    if (measured := before.get("shape", dataclasses.asdict(shape))) != dataclasses.asdict(shape):
        parser.error(f"{args.output} has times of {measured}, not of {shape}: give another --output")
    rows, profiles = before.get("rows", []), before.get("profiles", {})
    failed: list[str] = []
    content: dict[str, Any] = {
        "environment": environment(),
        "shape": dataclasses.asdict(shape),
        "chunk": CHUNK,
    }
    content |= {"rows": rows, "profiles": profiles, "failed": failed}
    print(  # noqa: T201
        f"{'phase':13}{'context':>9}{'batch':>6}{'K/kk/k':>8}{'below':>6}{'dense us':>12}{'focus us':>12}"
        f"{'ratio':>9}{'dense err':>10}{'focus err':>10}{'read':>8}"
    )
    decodes, prefills = ((8, 131072), (1, 8192), (1, 524288)), (262144, 16384)
    profiled = [] if args.smoke else [
        *(("decode", *case) for case in decodes), *(("prefill", 1, context) for context in prefills)
    ]  # fmt: skip
    work: list[tuple[str, Case]] = [
        ("row", case) for case in (smoke_cases() if args.smoke else cases())
        if args.only is None or case.phase.startswith(args.only)
    ]  # fmt: skip
    if args.only in (None, "profile"):
        work += [("profile", Case(phase, size, batch, FocusConfig())) for phase, batch, size in profiled]
    for kind, case in work:
        if case.name in (profiles if kind == "profile" else {row["name"] for row in rows}):
            continue
        if time.monotonic() - started > args.limit:
            print(f"not run, out of time: {kind} {case.name}")  # noqa: T201
            continue
        if DEVICE == "cuda" and shape.cache_bytes(case) > torch.cuda.mem_get_info()[0]:
            print(f"not run, out of memory: {kind} {case.name}")  # noqa: T201
            continue
        try:
            if kind == "row":
                rows.append(measure(case, shape, args.repeats))
                print(_line(rows[-1]), flush=True)  # noqa: T201
            else:
                profiles[case.name] = profile(case, shape)
                lines = (
                    f"{k['us']:9.1f} us {k['launches']:5.1f}  {k['kernel']}" for k in profiles[case.name]
                )
                print(case.name, *lines, sep="\n  ", flush=True)  # noqa: T201
        except Exception as error:  # noqa: BLE001 - the other cases are still worth having
            failed.append(f"{case.name}: {error}"[:2000])
            print(f"FAILED {case.name}: {error}", flush=True)  # noqa: T201
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        if args.output:
            write_json(args.output, content)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
