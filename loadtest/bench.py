"""One cell of a load test: requests of one kind by `vllm bench serve`, and what the server's metrics say."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import io
import json
import logging
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

PHASES = ("queue", "prefill", "decode")


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """What is sent: the same for every side."""

    scenario: str
    """grid, rate, beside, alone or turns."""
    length: int
    """Prompt tokens."""
    requests: int
    concurrency: int | None = None
    """Requests at a time; None: as many as come."""
    rate: float | None = None
    """Requests per second, Poisson; None: as fast as `concurrency` allows."""
    output_tokens: int = 64
    seed: int = 0
    history: int = 0
    """Of the prompt, tokens that every cell of its scenario begins with."""

    @property
    def name(self) -> str:
        """Return what a reader knows it by."""
        return f"{self.scenario} {self.length} x {self.concurrency or f'{self.rate:g}/s'}"

    @property
    def salt(self) -> str:
        """Return what keeps the prefix cache from knowing a prompt of another cell, unless it is meant to."""
        if self.history:
            return f"loadtest-{self.scenario}-{self.seed}"
        return f"loadtest-{self.scenario}-{self.length}-{self.concurrency}-{self.rate}-{self.seed}"


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One request as its client saw it, in seconds."""

    prompt_tokens: int
    output_tokens: int
    start: float
    ttft: float
    e2e: float
    error: str

    @property
    def tpot(self) -> float | None:
        """Return the mean time per token after the first."""
        if self.output_tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.output_tokens - 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What came of a cell on one side."""

    side: str
    cell: Cell
    duration: float
    requests: list[Request]
    metrics: dict[str, float | None]
    """Of the server, during the cell; see `Metrics.difference`."""

    @property
    def answered(self) -> list[Request]:
        """Return the requests that were answered."""
        return [request for request in self.requests if not request.error]

    def quantile(self, what: str, fraction: float) -> float | None:
        """Return a quantile of `ttft`, `tpot` or `e2e` over the answered requests, in seconds."""
        values = sorted(value for request in self.answered if (value := getattr(request, what)) is not None)
        return values[min(len(values) - 1, int(fraction * len(values)))] if values else None


class Metrics:
    """A look at a server's /metrics."""

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        """Read `url`/metrics now."""
        # The counters of keys read follow the workers when they are asked for.
        with contextlib.suppress(OSError):
            _get(f"{url}/focus/info", headers)
        self.sums: dict[str, float] = {}
        self.kv_tokens: int | None = None
        for family in text_string_to_metric_families(_get(f"{url}/metrics", headers)):
            for sample in family.samples:
                if sample.name == "vllm:cache_config_info":
                    blocks, size = (sample.labels[name] for name in ("num_gpu_blocks", "block_size"))
                    self.kv_tokens = int(blocks) * int(size)
                phase = sample.labels.get("phase", "")
                name = f"{sample.name}/{phase}" if phase else sample.name
                self.sums[name] = self.sums.get(name, 0.0) + sample.value

    def difference(self, before: Metrics) -> dict[str, float | None]:
        """Return what happened since `before`: fractions, counts, and mean seconds per request by phase."""

        def grown(name: str) -> float:
            return self.sums.get(name, 0.0) - before.sums.get(name, 0.0)

        def ratio(part: str, whole: str) -> float | None:
            return grown(part) / grown(whole) if grown(whole) else None

        return {
            "prefix_hits": ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
            "preemptions": grown("vllm:num_preemptions_total"),
            "prompt_tokens": grown("vllm:prompt_tokens_total"),
            "keys_read_prefill": ratio(
                "focus_attn_selected_tokens_total/prefill", "focus_attn_candidate_tokens_total/prefill"
            ),
            "keys_read_decode": ratio(
                "focus_attn_selected_tokens_total/decode", "focus_attn_candidate_tokens_total/decode"
            ),
            **{
                phase: ratio(
                    f"vllm:request_{phase}_time_seconds_sum", f"vllm:request_{phase}_time_seconds_count"
                )
                for phase in PHASES
            },
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A server to send to."""

    url: str
    model: str
    tokenizer: str
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Return what goes with every request."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @classmethod
    def at(cls, url: str, tokenizer: str | None = None, api_key: str | None = None) -> Target:
        """Ask the server for its model; its tokenizer is the model's unless given."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        model = json.loads(_get(f"{url}/v1/models", headers))["data"][0]
        return cls(url, model["id"], tokenizer or model["root"], api_key)


def run(target: Target, side: str, cells: Sequence[Cell], seconds: float | None = None) -> list[Result]:
    """Run cells, all at the same time, and return one result for each.

    Raises:
        TimeoutError: They took longer than `seconds`, and were given up.
        RuntimeError: The server answered nothing at all.
    """
    before = Metrics(target.url, target.headers)
    with _watching(target) as peak:
        raw = asyncio.run(asyncio.wait_for(_run_all(target, cells), seconds))
    difference = {**Metrics(target.url, target.headers).difference(before), **peak}
    results = [
        Result(side, cell, found["duration"], _requests(found), difference)
        for cell, found in zip(cells, raw, strict=True)
    ]
    for result in results:
        if not result.answered:
            raise RuntimeError(f"{target.url} answered no request: {result.requests[0].error}")
    return results


def summary(result: Result) -> dict[str, Any]:
    """Return a cell's figures, for a line of JSON; times in seconds, medians unless they say otherwise."""
    answered = result.answered
    tokens = [request.prompt_tokens for request in answered]
    return {
        "side": result.side,
        **dataclasses.asdict(result.cell),
        "prompt_tokens": median(tokens),
        "completed": len(answered),
        "failed": len(result.requests) - len(answered),
        "duration": result.duration,
        "requests_per_second": len(answered) / result.duration,
        **{
            f"{what}_{name}": result.quantile(what, fraction)
            for what in ("ttft", "tpot", "e2e")
            for name, fraction in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
        },
        **{f"server_{name}": value for name, value in result.metrics.items()},
    }


def engine_tpot(row: dict[str, Any]) -> float:
    """Return a cell's time per token after the first by the engine's own clock, in seconds; 0 if unknown."""
    seconds: float = row["server_decode"] or 0.0
    tokens: int = max(row["output_tokens"] - 1, 1)
    return seconds / tokens


async def _run_all(target: Target, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    from vllm.benchmarks import serve
    from vllm.tokenizers import cached_get_tokenizer

    # Else it is loaded again for every cell, which takes seconds if it is large.
    serve.get_tokenizer = cached_get_tokenizer  # type: ignore[attr-defined]
    logging.getLogger("vllm").setLevel(logging.ERROR)
    # Its report goes to stdout; the figures come back as well.
    with contextlib.redirect_stdout(io.StringIO()):
        return list(await asyncio.gather(*(serve.main_async(_arguments(target, cell)) for cell in cells)))


def _arguments(target: Target, cell: Cell) -> argparse.Namespace:
    """Return the arguments of `vllm bench serve`."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = [
        *("--backend", "openai", "--endpoint", "/v1/completions", "--base-url", target.url),
        *("--model", target.model, "--tokenizer", target.tokenizer),
        *("--dataset-name", "random", "--num-prompts", str(cell.requests), "--seed", str(cell.seed)),
        *("--random-input-len", str(cell.length - cell.history), "--random-prefix-len", str(cell.history)),
        *("--random-output-len", str(cell.output_tokens)),
        *("--extra-body", json.dumps({"cache_salt": cell.salt, "temperature": 0})),
        # The check would send the first prompt beforehand, and leave it in the prefix cache.
        *("--ready-check-timeout-sec", "0", "--save-detailed", "--disable-tqdm", "--ignore-eos"),
    ]
    if cell.concurrency:
        arguments += ["--max-concurrency", str(cell.concurrency)]
    if cell.rate:
        arguments += ["--request-rate", str(cell.rate)]
    for name, value in target.headers.items():
        arguments += ["--header", f"{name}={value}"]
    parser = FlexibleArgumentParser()  # type: ignore[no-untyped-call]
    add_cli_args(parser)
    namespace: argparse.Namespace = parser.parse_args(arguments)
    return namespace


def _requests(raw: dict[str, Any]) -> list[Request]:
    columns = (raw[name] for name in ("input_lens", "output_lens", "start_times", "ttfts", "itls", "errors"))
    return [
        Request(prompt, output, start, ttft, ttft + sum(itls), error or "")
        for prompt, output, start, ttft, itls, error in zip(*columns, strict=True)
    ]


@contextlib.contextmanager
def _watching(target: Target, interval: float = 0.5) -> Iterator[dict[str, float]]:
    """Keep the peaks of the server's gauges."""
    gauges = {"vllm:kv_cache_usage_perc": "kv_peak", "vllm:num_requests_running": "running_peak"}
    peak = dict.fromkeys(gauges.values(), 0.0)
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(interval):
            with contextlib.suppress(OSError):
                for family in text_string_to_metric_families(_get(f"{target.url}/metrics", target.headers)):
                    if name := gauges.get(family.name):
                        peak[name] = max(peak[name], *(sample.value for sample in family.samples))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _get(url: str, headers: dict[str, str] | None = None) -> str:
    request = urllib.request.Request(url, headers=headers or {})
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(response.read().decode())
