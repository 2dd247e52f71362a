"""Mixed load for a long time: does focus-serve keep its memory, its file descriptors and its word?

    python -m loadtest.soak --minutes 35 --output soak.json

Starts focus-serve with the embedded demo and sends short and long prompts, streamed and not, with one and two
choices, chats, requests that their clients give up before or after the first token, and scrapes of
`/metrics`. Every process's resident memory and file descriptors are sampled; after the warm-up memory must be
flat within 2 %, the descriptors of the idle server the same at the end as then, and no request may fail that
its client did not give up. Linux only.
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
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from loadtest.client import TIMEOUT, complete, random_prompt
from loadtest.serving import FOCUS_SERVE, Server, serving

SAMPLE_SECONDS = 10.0
IDLE_SECONDS = 20.0
"""Long enough for closed connections to be gone."""
WINDOW_SECONDS = 180.0
"""Memory is compared between the first and the last such stretch after the warm-up, or its halves."""
LIMIT = 0.02
SMALL_CACHE = ("--num-gpu-blocks-override", "320")
"""So few that blocks are evicted and used again before the warm-up ends."""
WARM_UP_MINUTES = 5
"""On one core oneDNN's compiled products (`server.launch.PRIMITIVES`), what grows last, take one of them."""
RSS = 21
"""Where /proc/PID/stat has the resident pages, counted after the name."""


class Soak:
    """One run against a running server."""

    def __init__(self, server: Server, users: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.errors: list[str] = []
        self.samples: list[dict[str, Any]] = []
        self._server = server
        self._users = users
        self._rng = random.Random(0)
        self._began = time.monotonic()

    async def run(self, warm_up: float, total: float) -> dict[str, Any]:
        """Warm up, look at the idle server, go on until `total` seconds, and look again."""
        await self._load(warm_up)
        await asyncio.sleep(IDLE_SECONDS)
        warm = self.sample()
        started = self.seconds
        await self._load(total - self.seconds)
        await asyncio.sleep(IDLE_SECONDS)
        end = self.sample()
        return self.report(started, warm, end)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def sample(self) -> dict[str, Any]:
        """Return memory and descriptors of the server's processes."""
        processes = {}
        for name, fields in self._server.processes().items():
            with contextlib.suppress(OSError):  # it has just ended
                processes[name] = {
                    "rss": int(fields[RSS]) * os.sysconf("SC_PAGE_SIZE"),
                    "fds": len(list(Path(f"/proc/{name.rpartition(' ')[2]}/fd").iterdir())),
                }
        return {"seconds": round(self.seconds, 1), "processes": processes}

    async def _load(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        connector = aiohttp.TCPConnector(limit=0, force_close=False)
        async with aiohttp.ClientSession(timeout=TIMEOUT, connector=connector) as session:
            await asyncio.gather(
                self._watch(session, until), *(self._user(session, until) for _ in range(self._users))
            )

    async def _watch(self, session: aiohttp.ClientSession, until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(SAMPLE_SECONDS, left))
            self.samples.append(self.sample())
            for path in ("/metrics", "/focus/status"):
                async with session.get(self._server.url + path) as response:
                    self._note(f"GET {path}", "" if response.status == 200 else str(response.status))

    async def _user(self, session: aiohttp.ClientSession, until: float) -> None:
        rng = self._rng
        kinds = (self._stream, self._whole, self._chat, self._give_up)
        while time.monotonic() < until:
            (kind,) = rng.choices(kinds, weights=(6, 3, 2, 2))
            lengths = rng.choice([(8, 200), (200, 1000), (1000, 3000), (3000, 6000)])
            await kind(session, random_prompt(rng.randint(*lengths), rng))

    async def _stream(self, session: aiohttp.ClientSession, prompt: list[int]) -> None:
        answer = await complete(session, self._server.url, prompt, self._rng.randint(2, 40))
        self._note("stream", "" if answer.complete else str(answer))

    async def _whole(self, session: aiohttp.ClientSession, prompt: list[int]) -> None:
        body = {"prompt": prompt, "max_tokens": 8, "n": self._rng.choice([1, 2]), "temperature": 1}
        await self._post(session, "/v1/completions", body)

    async def _chat(self, session: aiohttp.ClientSession, prompt: list[int]) -> None:
        messages = [{"role": "user", "content": "The town had a mill. " * (len(prompt) // 40 + 1)}]
        await self._post(session, "/v1/chat/completions", {"messages": messages, "max_tokens": 8})

    async def _post(self, session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> None:
        try:
            async with session.post(
                self._server.url + path, json={"model": "focus-demo", **body}
            ) as response:
                answer = await response.json()
                reasons = {choice["finish_reason"] for choice in answer.get("choices", [])}
                fine = response.status == 200 and reasons and reasons <= {"stop", "length"}
                self._note(path, "" if fine else f"{response.status} {str(answer)[:300]}")
        except (TimeoutError, aiohttp.ClientError) as failure:
            self._note(path, f"{type(failure).__name__} {failure}")

    async def _give_up(self, session: aiohttp.ClientSession, prompt: list[int]) -> None:
        request = asyncio.create_task(complete(session, self._server.url, prompt, 200))
        await asyncio.wait([request], timeout=self._rng.uniform(0.01, 2))
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            answer = await request
            if answer.error:
                self._note("given up", answer.error)
        self._note("given up", "")

    def _note(self, kind: str, problem: str) -> None:
        self.outcomes[kind] += 1
        if problem:
            self.errors.append(f"{self.seconds:.0f} s: {kind}: {problem}")

    def report(self, started: float, warm: dict[str, Any], end: dict[str, Any]) -> dict[str, Any]:
        """Return what was seen, and what of it is wrong."""
        processes = {}
        problems = list(self.errors)
        window = min(WINDOW_SECONDS, (end["seconds"] - started) / 2)
        for name, at_end in end["processes"].items():
            series = [
                (sample["seconds"], sample["processes"][name]["rss"])
                for sample in self.samples
                if sample["seconds"] > started and name in sample["processes"]
            ]
            early = median([rss for at, rss in series if at <= started + window] or [0])
            late = median([rss for at, rss in series if at > end["seconds"] - window] or [0])
            growth = late / early - 1 if early else float("nan")
            fds = warm["processes"].get(name, {}).get("fds"), at_end["fds"]
            processes[name] = {
                "rss_mib": [round(early / 2**20, 1), round(late / 2**20, 1)],
                "growth": round(growth, 4),
                "idle_fds": fds,
            }
            if not abs(growth) <= LIMIT:
                problems.append(f"{name}: resident memory changed by {100 * growth:.1f} %")
            if fds[0] != fds[1]:
                problems.append(f"{name}: {fds[0]} file descriptors after the warm-up, {fds[1]} at the end")
        gone = set(warm["processes"]) - set(end["processes"])
        problems += [f"{name}: ended" for name in sorted(gone)]
        return {
            "seconds": round(self.seconds),
            "warm_up": round(started),
            "requests": dict(self.outcomes),
            "processes": processes,
            "problems": problems,
            "samples": self.samples,
        }


def main() -> int:
    """Parse the command line, run, and print a table; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--warm-up", type=float, default=WARM_UP_MINUTES, help="minutes, of those")
    parser.add_argument("--users", type=int, default=3)
    parser.add_argument("--api-servers", type=int, default=1)
    parser.add_argument("--adapter", choices=("demo", "none"), default="demo", help="none: vLLM's attention")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--log", type=Path, help="where the server's log goes")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no server is left behind
    command = [*FOCUS_SERVE, "--api-server-count", str(arguments.api_servers), *SMALL_CACHE]
    if arguments.adapter == "none":
        command += ["--adapter", "none"]
    with tempfile.TemporaryDirectory() as folder:
        log = arguments.log or Path(folder) / "log"
        with serving(command, log, {"VLLM_CPU_KVCACHE_SPACE": "1"}) as server:
            soak = Soak(server, arguments.users)
            report = asyncio.run(soak.run(60 * arguments.warm_up, 60 * arguments.minutes))
            status = server.stop()
    if status:
        report["problems"].append(f"exit status {status}")
    report |= {"adapter": arguments.adapter, "cpus": os.cpu_count(), "machine": platform.machine()}
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(f"{sum(report['requests'].values())} requests in {report['seconds']} s\n")
    for name, figures in report["processes"].items():
        before, after = figures["rss_mib"]
        sys.stdout.write(
            f"{name:30} {before:8.1f} -> {after:8.1f} MiB {100 * figures['growth']:+6.2f} %, "
            f"descriptors {figures['idle_fds'][0]} -> {figures['idle_fds'][1]}\n"
        )
    sys.stdout.write("\n".join(report["problems"] or ["nothing wrong"]) + "\n")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
