"""A real Prometheus scrapes focus-serve under load: do its figures agree with what the clients saw?

    python -m loadtest.scrape --requests 200 --api-servers 1 2 --output scrape.json

Starts focus-serve with the embedded demo and a Prometheus that scrapes it every second, sends streamed
completions of four length buckets, and compares counts and mean latencies as Prometheus gives them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from loadtest.client import Answer, closed_loop, random_prompt
from loadtest.serving import FOCUS_SERVE, Server, apart, free_port, on_one_core, serving

BUCKETS = "256,1k,4k"
LENGTHS = {"0-256": (40, 200), "256-1k": (300, 900), "1k-4k": (1200, 3600), "4k+": (4500, 6500)}
MAX_TOKENS = 8
HISTOGRAMS = ("ttft_seconds", "tpot_seconds", "e2e_seconds", "queue_seconds", "prefill_seconds")

PRESENT = (
    *(f"focus_request_{name}_bucket" for name in (*HISTOGRAMS, "prefill_tokens_per_second")),
    "focus_requests_finished_total",
    "focus_requests_aborted_total",
    "focus_slo_requests_total",
    "focus_http_requests_total",
    "focus_http_inflight",
    "focus_rejected_total",
    "focus_stream_incomplete_total",
    "focus_inflight_prompt_tokens",
    "focus_engine_last_step_timestamp_seconds",
    "focus_draining",
    "focus_ready",
    "focus_event_loop_lag_seconds_bucket",
    "focus_attn_candidate_tokens_total",
    "focus_attn_selected_tokens_total",
    "focus_attn_fallback_total",
    "focus_worker_stats_age_seconds",
    "focus_build_info",
    "focus_adapter_info",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:num_requests_running",
)
"""Series that must be there after any load."""


class Prometheus:
    """A running Prometheus server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the instant vector of a PromQL expression."""
        parameters = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{parameters}", timeout=30) as response:
            return list(json.load(response)["data"]["result"])

    def by(self, label: str, expression: str) -> dict[str, float]:
        """Return the values of an instant vector by one of its labels."""
        return {each["metric"].get(label, ""): float(each["value"][1]) for each in self.query(expression)}

    def wait_for_scrapes(self, count: int = 2) -> None:
        """Wait until that many more scrapes of every target have succeeded.

        Raises:
            TimeoutError: They do not.
        """
        deadline = time.monotonic() + 60
        before = self._scrapes()
        while (now := self._scrapes()) < before + count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Prometheus has scraped {now} times, not {before + count}")
            time.sleep(0.2)

    def _scrapes(self) -> float:
        return sum(self.by("instance", "count_over_time(up[1h]) * on(instance) (up == 1)").values())


@contextlib.contextmanager
def scraping(
    binary: str, targets: Sequence[str], interval: str = "1s", rules: Sequence[Path] = ()
) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes `targets` (`host:port`), and evaluates `rules`, until the block ends."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "prometheus.yml"
        settings = {
            "global": {"scrape_interval": interval, "evaluation_interval": interval},
            "rule_files": [str(path.resolve()) for path in rules],
            "scrape_configs": [
                {"job_name": "focus-serve", "static_configs": [{"targets": list(targets)}]},
            ],
        }
        config.write_text(json.dumps(settings))
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=error",
            ]
        )
        try:
            prometheus = Prometheus(port)
            deadline = time.monotonic() + 60
            while True:
                try:
                    if prometheus.query("up == 1"):
                        break
                except OSError:
                    pass
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"Prometheus does not scrape {targets}")
                time.sleep(0.2)
            yield prometheus
        finally:
            process.terminate()
            process.wait(timeout=30)


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One length bucket: the clients' figures and Prometheus's."""

    bucket: str
    client_requests: int
    counts: dict[str, float]
    """Growth of each histogram's count, and of `finished`."""
    client_seconds: dict[str, float]
    """Mean ttft and e2e."""
    server_seconds: dict[str, float]

    def disagreements(self, relative: float = 0.1, absolute: float = 0.02) -> list[str]:
        """Return what differs: a count at all, a mean latency by more than both tolerances (seconds)."""
        found = [
            f"{self.bucket}: {name} counts {count:g} of {self.client_requests} requests"
            for name, count in self.counts.items()
            if count != self.client_requests
        ]
        for name, client in self.client_seconds.items():
            server = self.server_seconds[name]
            if abs(server - client) > max(relative * client, absolute):
                found.append(f"{self.bucket}: {name} is {server:.4f} s, clients saw {client:.4f} s")
        return found


def requests(num: int, rng: random.Random) -> list[tuple[list[int], int]]:
    """Return `(prompt, max_tokens)` of `num` requests, spread evenly over the buckets, in random order."""
    ranges = [LENGTHS[bucket] for bucket in LENGTHS]
    made = [(random_prompt(rng.randint(*ranges[i % 4]), rng), MAX_TOKENS) for i in range(num)]
    rng.shuffle(made)
    return made


def measure(
    prometheus: Prometheus, url: str, num: int, concurrency: int, seed: int
) -> tuple[list[Answer], list[Row]]:
    """Send `num` requests to `url`, and return the answers and how the figures compare by bucket."""
    load = requests(num, random.Random(seed))
    prometheus.wait_for_scrapes()
    before = _figures(prometheus)
    answers = asyncio.run(closed_loop(url, load, concurrency))
    prometheus.wait_for_scrapes()
    after = _figures(prometheus)
    rows = []
    for bucket, (low, high) in LENGTHS.items():
        seen = [answer for answer in answers if low <= answer.prompt_tokens <= high]
        grown = {name: after[name].get(bucket, 0) - before[name].get(bucket, 0) for name in after}
        rows.append(
            Row(
                bucket=bucket,
                client_requests=len(seen),
                counts={name: value for name, value in grown.items() if not name.endswith("_sum")},
                client_seconds={
                    "ttft": fmean(answer.ttft for answer in seen),
                    "e2e": fmean(answer.e2e for answer in seen),
                },
                server_seconds={
                    name: grown[f"{name}_sum"] / max(grown[f"{name}_seconds"], 1) for name in ("ttft", "e2e")
                },
            )
        )
    return answers, rows


def missing(prometheus: Prometheus) -> list[str]:
    """Return the names in PRESENT that Prometheus has not."""
    return [name for name in PRESENT if not prometheus.query(f'count({{__name__="{name}"}})')]


def _figures(prometheus: Prometheus) -> dict[str, dict[str, float]]:
    queries = {name: f"focus_request_{name}_count" for name in HISTOGRAMS}
    queries["prefill_tokens_per_second"] = "focus_request_prefill_tokens_per_second_count"
    queries["finished"] = "focus_requests_finished_total"
    queries["slo_ttft"] = 'focus_slo_requests_total{objective="ttft"}'
    queries["ttft_sum"] = "focus_request_ttft_seconds_sum"
    queries["e2e_sum"] = "focus_request_e2e_seconds_sum"
    return {
        name: prometheus.by("prompt_bucket", f"sum by (prompt_bucket) ({expression})")
        for name, expression in queries.items()
    }


def main() -> int:
    """Parse the command line, run, and print a table; 1 if anything disagrees."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--api-servers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prometheus", default=shutil.which("prometheus"), help="default: from PATH")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no server is left behind
    if not arguments.prometheus:
        parser.error("no prometheus on PATH: install the Debian package prometheus, or give --prometheus")
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    problems: list[str] = []
    for api_servers in arguments.api_servers:
        command = [*FOCUS_SERVE, "--api-server-count", str(api_servers)]
        environment = {"FOCUS_PROMPT_BUCKETS": BUCKETS, **on_one_core()}
        with (
            tempfile.TemporaryDirectory() as folder,
            serving(command, Path(folder) / "log", environment) as server,
            apart(server),
        ):
            found, part = _run(server, arguments)
        problems += [f"{api_servers} API servers: {problem}" for problem in found]
        report[f"api_servers_{api_servers}"] = part
    report["problems"] = problems
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write("\n".join(problems or ["everything agrees"]) + "\n")
    return 1 if problems else 0


def _run(server: Server, arguments: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    with scraping(arguments.prometheus, [server.url.removeprefix("http://")]) as prometheus:
        answers, rows = measure(
            prometheus, server.url, arguments.requests, arguments.concurrency, seed=time.time_ns()
        )
        absent = missing(prometheus)
    problems = [f"missing: {name}" for name in absent]
    problems += [f"failed: {answer.error}" for answer in answers if not answer.complete]
    problems += [problem for row in rows for problem in row.disagreements()]
    sys.stdout.write("bucket   requests   counted   TTFT client   TTFT server   e2e client   e2e server\n")
    for row in rows:
        counted = sorted(set(row.counts.values()))
        sys.stdout.write(
            f"{row.bucket:8} {row.client_requests:8} {'/'.join(f'{count:g}' for count in counted):>9}"
            f" {row.client_seconds['ttft']:13.4f} {row.server_seconds['ttft']:13.4f}"
            f" {row.client_seconds['e2e']:12.4f} {row.server_seconds['e2e']:12.4f}\n"
        )
    return problems, {"rows": [dataclasses.asdict(row) for row in rows], "missing": absent}


if __name__ == "__main__":
    sys.exit(main())
