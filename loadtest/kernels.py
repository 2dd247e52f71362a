"""Attention alone on a GPU: stock FlashAttention against the whole Focus path, over vLLM's paged cache.

    python -m loadtest.kernels --output kernels.json

The Focus side is everything a layer adds or replaces: routing, group store, lists, FlashAttention over lists,
near part and merge. Both sides run in this process on the same tensors. Nothing is reported unless the
output on the same shapes agrees with the definition in float32: its relative error may be at most 1.5 times
that of stock FlashAttention against dense attention.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from focus_vllm.config import FocusConfig
from focus_vllm.kernels.attention import (
    DecodeScratch,
    PrefillScratch,
    decode_attention,
    decode_scratch_shapes,
    prefill_attention,
)
from focus_vllm.kernels.near import GROUP_BITS, NearKeys, Scores, near_tile
from focus_vllm.kernels.plan import BLOCK_QUERIES, Segment, list_capacity, near_keys, plan_waves
from focus_vllm.kernels.routing import device_weight, route_into
from focus_vllm.kernels.store import write_store
from loadtest.paged import PagedBatch, make_batch

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


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    phase: str
    """"prefill": the last CHUNK queries, or all, of one request. "decode": one query of each request."""
    context: int
    batch: int
    config: FocusConfig


class Layer:
    """One attention layer's tensors and both ways to run it."""

    def __init__(self, case: Case, shape: Shape, seed: int) -> None:
        from focus_vllm.engine.flash import FlashAttention3

        self.case = case
        queries = 1 if case.phase == "decode" else min(CHUNK, case.context)
        self.batch = make_batch(
            [case.context] * case.batch, [queries] * case.batch, case.config, **dataclasses.asdict(shape),
            dtype=torch.bfloat16, device="cuda", seed=seed,
        )  # fmt: skip
        self.scale = shape.head_size**-0.5
        self.scores = Scores(self.scale)
        self.attention = FlashAttention3(self.scores, MAX_SPLITS if case.phase == "decode" else 0)
        self.out = torch.empty_like(self.batch.query)
        self.paged = self.batch.paged
        tokens = len(self.batch.query)
        hidden_size = shape.num_heads * shape.head_size
        self.hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(case.config.num_groups, hidden_size, device="cuda")
        self.weight = device_weight(weight, torch.bfloat16)
        self.bias = torch.zeros(case.config.num_groups, device="cuda")
        self.routed = torch.empty(2, tokens, dtype=self.batch.store.dtype, device="cuda")
        starts = self.batch.query_start_loc
        self.slot_mapping = torch.cat([
            self.batch.slots(request)[-queries:] for request in range(case.batch)
        ])  # fmt: skip
        self.new_groups = self.batch.store[self.slot_mapping]
        self.seq_lens = torch.tensor(self.batch.seq_lens, dtype=torch.int32, device="cuda")
        self.cu_seqlens_q = torch.tensor(starts, dtype=torch.int32, device="cuda")
        self.metadata = self._scheduler_metadata(shape) if case.phase == "decode" else None
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
        case, config = self.case, self.case.config
        heads = (shape.num_heads, shape.head_size)
        if case.phase == "decode":
            shapes = decode_scratch_shapes(case.batch, case.context, 2**30)
            buffers = [torch.empty(size, dtype=torch.int32, device="cuda") for size in shapes]
            starts = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda")
            self.decode_scratch = DecodeScratch(buffers[0], buffers[1], buffers[2], starts)
            return
        capacity = list_capacity(config, case.context, 0)
        rows = max(CHUNK, BLOCK_QUERIES * config.top_k)
        queries = len(self.batch.query)
        first = case.context - queries
        self.num_dense = min(max(config.dense_below - first, 0), queries)
        keys = min(config.dense_below, case.context)
        lengths = torch.tensor([keys, 0, self.num_dense], dtype=torch.int32, device="cuda")
        self.dense_lengths = lengths[:1], lengths[1:]
        segment = Segment(0, self.num_dense, first + self.num_dense, queries - self.num_dense)
        segments = [segment] if segment.num_queries else []
        tile = near_tile(shape.num_heads // shape.num_kv_heads)
        copied = near_keys(config, rows)
        self.waves = plan_waves(segments, config, tile, capacity, rows, copied, torch.device("cuda"))
        near_heads = (copied, shape.num_kv_heads, shape.head_size)
        near = (
            torch.empty(size, dtype=torch.bfloat16, device="cuda")
            for size in (near_heads, near_heads, (copied, GROUP_BITS))
        )
        self.prefill_scratch = PrefillScratch(
            torch.empty(capacity, dtype=torch.int32, device="cuda"),
            torch.empty(rows, *heads, dtype=torch.bfloat16, device="cuda"),
            torch.empty(rows, *heads, dtype=torch.bfloat16, device="cuda"),
            NearKeys(*near),
        )

    def dense(self) -> None:
        """Run stock FlashAttention as vLLM calls it."""
        self._stock(len(self.batch.query), self.case.context, self.seq_lens, self.cu_seqlens_q)

    def _stock(self, queries: int, keys: int, seq_lens: torch.Tensor, starts: torch.Tensor) -> None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        key_cache, value_cache = torch.split(self.batch.cache, self.batch.query.shape[-1], dim=-1)
        decode = self.case.phase == "decode"
        flash_attn_varlen_func(
            q=self.batch.query[:queries], k=key_cache, v=value_cache, out=self.out[:queries],
            cu_seqlens_q=starts, max_seqlen_q=1 if decode else queries, seqused_k=seq_lens, max_seqlen_k=keys,
            softmax_scale=self.scale, causal=True, block_table=self.paged.block_table, fa_version=3,
            scheduler_metadata=self.metadata, num_splits=MAX_SPLITS if decode else 0,
        )  # fmt: skip

    def focus(self) -> None:
        """Run everything that a routed layer does."""
        batch, config = self.batch, self.case.config
        if config.dense_below < self.case.context:
            route_into(
                self.hidden,
                self.weight,
                self.bias,
                self.routed[0],
                self.routed[1],
                config.key_k,
                config.top_k,
            )
            if self.case.phase == "prefill":
                write_store(batch.store, self.slot_mapping, self.new_groups)
        if self.case.phase == "decode":
            decode_attention(
                self.attention, batch.query, self.out, self.slot_mapping, self.new_groups, batch.query_groups,
                batch.store, self.paged, self.seq_lens, config, self.decode_scratch,
            )  # fmt: skip
            return
        if self.num_dense:
            keys = min(config.dense_below, self.case.context)
            self._stock(self.num_dense, keys, *self.dense_lengths)
        prefill_attention(
            self.attention, self.waves, batch.query, self.out, batch.query_groups, batch.store, self.paged,
            config, self.scores, self.prefill_scratch,
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


def seconds(run: Callable[[], None], repeats: int, calls: int) -> float:
    """Return the median over `repeats` of the device's time for one of `calls` calls."""
    for _ in range(2):
        run()
    samples = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / calls / 1e3)
    return float(statistics.median(samples))


def graph_of(layers: list[Layer], side: str) -> Callable[[], None]:
    """Capture one pass over the layers."""
    for layer in layers:
        getattr(layer, side)()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            getattr(layer, side)()
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
    if case.phase == "decode":
        bytes_per_layer = layer.batch.cache.numel() * layer.batch.cache.element_size()
        count = min(16, -(-L2_BYTES // bytes_per_layer))
        layers = [layer] + [Layer(case, shape, seed) for seed in range(1, count)]
        calls = max(2, 64 // count)
        times = {side: seconds(graph_of(layers, side), repeats, calls) / count for side in ("dense", "focus")}
    else:
        # Captured too: eager launches take about as long as the shortest of these kernels, and in a model
        # they overlap with other layers' work.
        calls = 2 if case.context > 65536 else 10
        times = {side: seconds(graph_of([layer], side), repeats, calls) for side in ("dense", "focus")}
    config = case.config
    return {
        "phase": case.phase,
        "context": case.context,
        "batch": case.batch,
        "num_groups": config.num_groups,
        "key_k": config.key_k,
        "top_k": config.top_k,
        "window": config.window,
        "dense_below": config.dense_below,
        "dense_us": times["dense"] * 1e6,
        "focus_us": times["focus"] * 1e6,
        "ratio": times["dense"] / times["focus"],
        "dense_error": dense_error,
        "focus_error": focus_error,
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
    kernels = sorted(recording.key_averages(), key=lambda event: -event.device_time_total)
    return [
        {"kernel": event.key[:80], "launches": event.count / calls, "us": event.device_time_total / calls}
        for event in kernels
        if event.device_time_total
    ]


def cases(quick: bool) -> list[Case]:
    """Return the table's lines."""
    one = FocusConfig()
    sweep = [8192, 131072] if quick else [1024, 2048, 4096, 8192, 16384, 65536, 262144, 1048576]
    lines = [Case("prefill", context, 1, one) for context in sweep]
    if not quick:
        routed = FocusConfig(dense_below=0)
        lines += [Case("prefill", context, 1, routed) for context in (2048, 4096, 8192)]
        lines += [Case("decode", context, 1, routed) for context in (2048, 4096)]
    for top_k in (2, 4):
        config = FocusConfig(num_groups=16, top_k=top_k)
        lines += [
            Case("prefill", context, 1, config) for context in ([65536] if quick else [16384, 65536, 262144])
        ]
    for batch, contexts in (
        (1, (8192, 32768, 131072, 524288)),
        (8, (8192, 32768, 131072)),
        (32, (8192, 32768)),
    ):
        lines += [
            Case("decode", context, batch, one) for context in contexts if not quick or context == 32768
        ]
    return lines


def environment() -> dict[str, str]:
    """Return what the numbers depend on."""
    import triton  # type: ignore[import-untyped]
    import vllm

    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": vllm.__version__,
        "commit": commit,
        "command": " ".join(sys.orig_argv),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write in one step."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        json.dump(content, file, indent=1)
    Path(scratch).replace(path)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['phase']:8}{row['context']:>9}{row['batch']:>6}{row['num_groups']:>4}{row['top_k']:>3}{row['dense_below']:>6}"
        f"{row['dense_us']:>12.1f}{row['focus_us']:>12.1f}{row['ratio']:>8.2f}x"
        f"{row['dense_error']:>10.1e}{row['focus_error']:>10.1e}"
    )


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed samples per number; the median is reported"
    )
    parser.add_argument("--quick", action="store_true", help="a few shapes only")
    args = parser.parse_args()
    shape = Shape()
    print(  # noqa: T201
        f"{'phase':8}{'context':>9}{'batch':>6}{'K':>4}{'k':>3}{'below':>6}{'dense us':>12}{'focus us':>12}"
        f"{'ratio':>9}{'dense err':>10}{'focus err':>10}"
    )
    rows = []
    for case in cases(args.quick):
        rows.append(measure(case, shape, args.repeats))
        torch.cuda.empty_cache()
        print(_line(rows[-1]), flush=True)  # noqa: T201
    profiles = {}
    for phase, batch, context in (("decode", 8, 131072), ("prefill", 1, 16384), ("prefill", 1, 262144)):
        name = f"{phase} {batch} x {context}"
        profiles[name] = profile(Case(phase, context, batch, FocusConfig()), shape)
        print(name, *(f"  {k['us']:9.1f} us  {k['kernel']}" for k in profiles[name]), sep="\n")  # noqa: T201
    if args.output:
        content = {"environment": environment(), "shape": dataclasses.asdict(shape), "chunk": CHUNK}
        write_json(args.output, {**content, "rows": rows, "profiles": profiles})


if __name__ == "__main__":
    main()
