"""How long a short request waits beside long prompts, by what a long prompt may take of a step.

    python -m loadtest.fairness --output fairness.json

For focus-serve's own division of steps (`shared`), and for each `--long-prefill-token-threshold`, it starts
focus-serve with the embedded demo, lets some prompts of 32,000 tokens prefill, alone and then while it asks
short ones, one after the other.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from loadtest.serving import FOCUS_SERVE, apart, on_one_core, serving

MODEL = "focus-demo"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a line for each case and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--thresholds", nargs="+", default=["shared", "0", "1024"])
    parser.add_argument("--long", type=int, nargs="+", default=[1, 3], help="long prompts at once")
    parser.add_argument("--length", type=int, default=32_000, help="tokens of a long prompt")
    parser.add_argument("--short", type=int, default=64, help="tokens of a short prompt")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    rows = [row for threshold in arguments.thresholds for row in _measure_server(threshold, arguments)]
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


def _measure_server(threshold: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    command = [*FOCUS_SERVE, "--no-enable-prefix-caching"]
    if threshold != "shared":
        command += ["--long-prefill-token-threshold", threshold]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(command, Path(folder) / "log", on_one_core()) as server,
        apart(server),
    ):
        _ttft(server.url, 2 * arguments.short)
        for count in arguments.long:
            row = {"threshold": threshold, **_measure(server.url, count, arguments.length, arguments.short)}
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            rows.append(row)
    return rows


def _measure(url: str, count: int, length: int, short: int) -> dict[str, Any]:
    alone = statistics.median(_ttft(url, short) for _ in range(5))
    long_alone = _ttft(url, length)
    long: list[float] = []
    threads = [threading.Thread(target=lambda: long.append(_ttft(url, length))) for _ in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    times = []
    # A request that was asked when all long prompts had their token waits for none of them.
    while not long:
        times.append(_ttft(url, short))
    for thread in threads:
        thread.join()
    return {
        "long_prompts": count,
        "short_alone": round(alone, 3),
        "short_median": round(statistics.median(times), 3),
        "short_max": round(max(times), 3),
        "short_requests": len(times),
        "long_alone": round(long_alone, 2),
        "first_long": round(min(long), 2),
        "last_long": round(max(long), 2),
    }


def _ttft(url: str, tokens: int) -> float:
    """Return the seconds until the first token of a random prompt."""
    prompt = random.choices(range(5, 9000), k=tokens)
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "ignore_eos": True, "stream": True}
    started = time.monotonic()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as response:
        response.raise_for_status()
        next(line for line in response.iter_lines() if line.startswith("data: "))
        return time.monotonic() - started


if __name__ == "__main__":
    main()
