"""Does Focus pay for these prompts? An estimate from measured times and the prompts of an access log."""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from loadtest.bench import engine_tpot
from loadtest.charts import tokens
from server.objectives import BUCKETS, PromptBuckets


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """Times of one request at a time, in seconds, by prompt length."""

    source: str
    lengths: tuple[int, ...]
    """Increasing."""
    prefill: tuple[tuple[float, float], ...]
    """Time to the first token, dense and Focus, by length."""
    decode: tuple[tuple[float, float], ...]
    """Time per output token, the same way."""

    @classmethod
    def read(cls, path: Path) -> Measured:
        """Read what `loadtest.engine`, `loadtest.cpu` or `loadtest run` (`cells.jsonl`) wrote.

        Raises:
            ValueError: It is something else, or has not both sides.
        """
        text = path.read_text()
        rows = _cells(text) if path.suffix == ".jsonl" else _result(json.loads(text))
        if not rows:
            raise ValueError(f"{path} has no length that was measured on both sides, one request at a time")
        lengths, prefill, decode = zip(*sorted(rows), strict=True)
        return cls(str(path), lengths, prefill, decode)

    def seconds(self, what: str, length: int) -> tuple[float, float]:
        """Return dense's and Focus's `prefill` or `decode` time for a prompt.

        Interpolated on logarithmic scales between measured lengths. Below and above, the nearest's ratio
        holds; prefill grows in proportion to a shorter prompt, and with the square of a longer one.
        """
        times = self.prefill if what == "prefill" else self.decode
        length = max(length, 1)
        if length <= self.lengths[0]:
            scale = length / self.lengths[0] if what == "prefill" else 1.0
            return times[0][0] * scale, times[0][1] * scale
        if length >= self.lengths[-1]:
            scale = (length / self.lengths[-1]) ** 2 if what == "prefill" else 1.0
            return times[-1][0] * scale, times[-1][1] * scale
        right = bisect_left(self.lengths, length)
        low, high = self.lengths[right - 1], self.lengths[right]
        weight = math.log(length / low) / math.log(high / low)
        dense, focus = (
            math.exp((1 - weight) * math.log(before) + weight * math.log(after))
            for before, after in zip(times[right - 1], times[right], strict=True)
        )
        return dense, focus


@dataclasses.dataclass(frozen=True, slots=True)
class Class:
    """The requests of one class of prompt length; seconds of a server that serves one at a time."""

    name: str
    requests: int
    prefill: tuple[float, float]
    decode: tuple[float, float]

    @property
    def total(self) -> tuple[float, float]:
        """Return dense's and Focus's seconds."""
        return self.prefill[0] + self.decode[0], self.prefill[1] + self.decode[1]


def read_trace(lines: Iterable[str]) -> list[tuple[int, int]]:
    """Return `(prompt_tokens, tokens)` of the requests in focus-serve's JSON log, or any JSON lines like it.

    Raises:
        ValueError: No line has `prompt_tokens`.
    """
    found = []
    for line in lines:
        try:
            fields = json.loads(line)
        except ValueError:
            continue  # a start-up message, or a line cut off by a rotation
        if isinstance(fields, dict) and isinstance(fields.get("prompt_tokens"), int):
            generated = fields.get("tokens") or fields.get("completion_tokens") or 0
            found.append((fields["prompt_tokens"], int(generated)))
    if not found:
        raise ValueError(
            "no line has prompt_tokens: give the log of focus-serve --log-format json, or lines like "
            '{"prompt_tokens": 12000, "tokens": 300}'
        )
    return found


def classify(trace: Sequence[tuple[int, int]], measured: Measured) -> list[Class]:
    """Add up what requests cost, by class of prompt length; classes without requests are left out."""
    buckets = PromptBuckets.parse(BUCKETS)
    classes = []
    for name in buckets.labels:
        members = [request for request in trace if buckets.label(request[0]) == name]
        if members:
            prefill = [measured.seconds("prefill", prompt) for prompt, _ in members]
            decode = [measured.seconds("decode", prompt) for prompt, _ in members]
            generated = [max(number - 1, 0) for _, number in members]
            classes.append(
                Class(
                    name,
                    len(members),
                    (sum(dense for dense, _ in prefill), sum(focus for _, focus in prefill)),
                    (
                        sum(each[0] * number for each, number in zip(decode, generated, strict=True)),
                        sum(each[1] * number for each, number in zip(decode, generated, strict=True)),
                    ),
                )
            )
    return classes


def advice(trace: Sequence[tuple[int, int]], measured: Measured) -> str:
    """Return the estimate as text."""
    classes = classify(trace, measured)
    dense, focus = (sum(each.total[side] for each in classes) for side in (0, 1))
    longest = max(prompt for prompt, _ in trace)
    heads = ("prompt", "requests", "of dense time", "first token", "per token", "together")
    out = [
        f"{len(trace)} requests, prompts up to {longest} tokens; measured times: {measured.source}",
        "",
        "".join(f"{head:>15}" for head in heads),
    ]
    for each in classes:
        times = [_times(*seconds) for seconds in (each.prefill, each.decode, each.total)]
        columns = (each.name, str(each.requests), f"{each.total[0] / dense:.1%}", *times)
        out.append("".join(f"{column:>15}" for column in columns))
    out += ["", f"Together {_times(dense, focus)}: {focus / dense:.0%} of the time for the same requests."]
    losing = [each.name for each in classes if each.total[0] < each.total[1]]
    if losing:
        out.append(f"It does not pay for prompts of {', '.join(losing)} tokens: there Focus is slower.")
    if dense <= focus:
        out.append("Do not use Focus for this traffic.")
    elif dense / focus < 1.1:
        out.append("Hardly worth it: the gain is within 10 %.")
    if longest > measured.lengths[-1]:
        out.append(f"Longer ones than {tokens(measured.lengths[-1])} were not measured: its ratio counts.")
    out.append(
        "An estimate: one request at a time, on the hardware, model shape and settings measured; no queue,\n"
        "no batching, no prefix cache. `python -m loadtest run` measures yours."
    )
    return "\n".join(out) + "\n"


def _times(dense: float, focus: float) -> str:
    return f"{dense / focus:.2f}x" if focus else "-"


def _cells(text: str) -> list[tuple[int, tuple[float, float], tuple[float, float]]]:
    """Read single requests; times per token are the engine's, which no slow client stretches.

    Where Focus read every key both sides make the same attention call, and what it gained there is noise.
    """
    sides: dict[int, dict[str, dict[str, Any]]] = {}
    for line in text.splitlines():
        row = json.loads(line)
        single = row["scenario"] == "alone" or (row["scenario"] == "grid" and row["concurrency"] == 1)
        if single and not row["server_prefix_hits"]:
            row["tpot"] = engine_tpot(row)
            sides.setdefault(row["length"], {})[row["side"]] = row
    for rows in sides.values():
        if {"dense", "focus"} <= set(rows) and rows["focus"]["server_keys_read_prefill"] == 1:
            rows["focus"]["ttft_p50"] = max(row["ttft_p50"] for row in rows.values())
    both = {length: rows for length, rows in sides.items() if {"dense", "focus"} <= set(rows)}
    decode = {length: rows for length, rows in both.items() if rows["dense"]["scenario"] != "alone"}
    shortest = decode[min(decode)] if decode else {}
    return [
        # Those that were sent alone, all short, have one token after the first, too few to time.
        (length, _pair(rows, "ttft_p50"), _pair(decode.get(length, shortest), "tpot"))
        for length, rows in both.items()
        if shortest
    ]


def _pair(both: dict[str, dict[str, Any]], what: str) -> tuple[float, float]:
    return both["dense"][what], both["focus"][what]


def _result(result: dict[str, Any]) -> list[tuple[int, tuple[float, float], tuple[float, float]]]:
    if "rows" in result:
        return [
            (row["prompt"], (row["stock_ttft"], row["focus_ttft"]), (row["stock_tpot"], row["focus_tpot"]))
            for row in result["rows"]
            if row["batch"] == 1 and "ttft_ratio" in row
        ]
    stock, focus = result["medians"]["stock"], result["medians"]["focus"]
    return [
        (length, (dense["prefill"], ours["prefill"]), (dense["decode"], ours["decode"]))
        for length, dense, ours in zip(result["lengths"], stock, focus, strict=True)
    ]
