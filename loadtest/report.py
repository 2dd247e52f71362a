"""The HTML report of a load test: one file, readable without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from loadtest.bench import PHASES, engine_tpot
from loadtest.charts import bars, lines, short, tokens

SIDES = ("dense", "focus")
P95 = frozenset(f"{side} p95" for side in SIDES)
TPOT = "Time per output token, by the engine's clock"
"""A client that gets the first token late gets the next ones all the sooner. After a prompt of 512K tokens
vLLM's API server takes a quarter of a second to decode the first, and the engine goes on meanwhile."""

Row = dict[str, Any]
Rows = list[Row]

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #111827; max-width: 1180px }
body { margin: 24px auto; padding: 0 16px }
h1 { font-size: 24px } h2 { font-size: 18px; margin-top: 36px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 20px }
figure { margin: 0; border: 1px solid #e5e7eb; border-radius: 6px; padding: 10px }
svg { width: 100%; font: 11px system-ui, sans-serif; fill: #374151 }
svg .title { font-size: 14px; font-weight: 600; fill: #111827 }
svg .grid { stroke: #e5e7eb } svg .reference { stroke: #9ca3af; stroke-dasharray: 2 3 }
svg polyline { fill: none; stroke-width: 2 }
figcaption span { margin-right: 14px; font-size: 12px; white-space: nowrap }
figcaption i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px }
.dashed { background-image: repeating-linear-gradient(90deg, transparent 0 3px, #fff 3px 5px) }
table { border-collapse: collapse; font-size: 13px } th, td { padding: 3px 9px; text-align: right }
th { border-bottom: 1px solid #9ca3af } td { border-bottom: 1px solid #f3f4f6 }
.heat td { min-width: 62px; text-align: center } .scroll { overflow-x: auto }
.problems { background: #fef2f2; border: 1px solid #fca5a5; border-radius: 6px; padding: 8px 16px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: 13px }
dd { margin: 0; word-break: break-word }
"""


def write_report(folder: Path) -> Path:
    """Make `report.html` out of a folder's `cells.jsonl` and `manifest.json`.

    Raises:
        FileNotFoundError: One of the two is missing.
    """
    rows = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "report.html"
    path.write_text(render(rows, manifest))
    return path


def render(rows: Rows, manifest: Mapping[str, Any]) -> str:
    """Return the page."""
    rows = [{**row, "tpot": engine_tpot(row) or row["tpot_p50"]} for row in rows]
    grid = [row for row in rows if row["scenario"] == "grid"]
    single = [row for row in grid if row["concurrency"] == min(each["concurrency"] for each in grid)]
    problems = "".join(f"<li>{escape(problem)}</li>" for problem in manifest["problems"])
    left_out = escape(", ".join(manifest.get("left_out", [])))
    sections = [
        "<h1>Dense against Focus</h1>",
        f"<p>{escape(manifest['title'])}</p>",
        f'<div class="problems"><b>Not to be trusted as it is:</b><ul>{problems}</ul></div>'
        if problems
        else "",
        f"<p>Left out, for there was no time: {left_out}.</p>" if left_out else "",
        "<h2>One request at a time</h2>",
        _charts([*latency_charts(single), quality_chart(manifest)]),
        f"<p>{escape(quality(manifest))}</p>",
        "<h2>Many at a time</h2>",
        heatmap(grid, "ttft_p50", "Time to first token, dense / Focus (above 1 Focus is faster)"),
        heatmap(grid, "tpot", f"{TPOT}, dense / Focus"),
        _charts([concurrency_chart(grid, manifest), *throughput_charts(grid), goodput_chart(rows)]),
        "<h2>Traffic as it comes</h2>",
        _charts([beside_chart(rows), turns_chart(rows)]),
        "<h2>Every cell</h2>",
        table(rows),
        "<h2>How it was measured</h2>",
        "<dl>"
        + "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(text if isinstance(text, str) else json.dumps(text))}</dd>"
            for name, text in manifest.items()
        )
        + "</dl>",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Dense against Focus</title><style>{STYLE}</style>{''.join(sections)}</html>\n"
    )


def latency_charts(rows: Rows) -> list[str]:
    """Return what a prompt's length does."""
    lengths = sorted({row["length"] for row in rows})
    axis: Row = {"log_x": True, "x_ticks": lengths, "format_x": tokens}
    shares = {
        f"{tokens(row['length'])} {row['side']}": _shares({phase: row[f"server_{phase}"] for phase in PHASES})
        for row in sorted(rows, key=lambda row: (row["length"], row["side"]))
    }
    ttft = {f"{side} {q}": _by_length(rows, side, f"ttft_{q}") for side in SIDES for q in ("p50", "p95")}
    tpot = {side: _by_length(rows, side, "tpot", 1000) for side in SIDES}
    kept = {
        phase: [
            (row["length"], value)
            for row in _of(rows, "focus")
            if (value := row[f"server_keys_read_{phase}"])
        ]
        for phase in ("prefill", "decode")
    }
    cache = {side: _by_length(rows, side, "server_kv_peak") for side in SIDES}
    ratios = {
        "time to first token": _ratios(rows, "ttft_p50"),
        "time per output token": _ratios(rows, "tpot"),
    }
    return [
        lines("Time to first token", ttft, "prompt tokens", "seconds", log_y=True, dashed=P95, **axis),
        lines("Speed-up, dense / Focus", ratios, "prompt tokens", "times", reference=1, **axis),
        lines(TPOT, tpot, "prompt tokens", "milliseconds", **axis),
        bars("Where a request's time in the engine goes", shares, "fraction"),
        lines("Keys that Focus reads", kept, "prompt tokens", "fraction of dense", **axis),
        lines("KV cache in use, peak", cache, "prompt tokens", "fraction", **axis),
    ]


def quality_chart(manifest: Mapping[str, Any]) -> str:
    """Return what `focus-vllm evaluate` measured by length, to stand beside the keys read."""
    rows = manifest.get("quality") or []
    gaps = {}
    for row in rows[1:]:
        by_length = row["perplexity_by_length"]
        dense = rows[0]["perplexity_by_length"]
        gaps[row["name"]] = [(int(size), (by_length[size] / dense[size] - 1) * 100) for size in by_length]
    lengths = sorted({length for points in gaps.values() for length, _ in points})
    return lines(
        "Perplexity above dense", gaps, "first tokens of a text", "percent",
        log_x=True, x_ticks=lengths, format_x=tokens,
    )  # fmt: skip


def quality(manifest: Mapping[str, Any]) -> str:
    """Return what the adapter costs in quality, as far as it is known."""
    rows = manifest.get("quality")
    if not rows:
        return (
            "What Focus costs in quality is not known here: measure it with focus-vllm evaluate --json, "
            "and give what that prints as --quality."
        )
    dense, *others = rows
    said = (
        f"{row['name']}: {row['far_pairs']:.1%} of far pairs kept, "
        f"perplexity {row['perplexity'] / dense['perplexity'] - 1:+.2%} against dense, "
        f"negative log-likelihood of a repeated span {row['recall']:.3f} (dense {dense['recall']:.3f})"
        for row in others
    )
    return f"Quality, measured apart by focus-vllm evaluate. {'; '.join(said)}."


def concurrency_chart(rows: Rows, manifest: Mapping[str, Any]) -> str:
    """Return how many at a time met the objectives, of those tried on both sides, and fit in the cache."""
    tried = [{(row["length"], row["concurrency"]) for row in _of(rows, side)} for side in SIDES]
    both = tried[0] & tried[1]
    lengths = sorted({length for length, _ in both})
    series, fit = {}, set()
    for side in SIDES:
        most: dict[int, int] = {}
        for row in _of(rows, side):
            if row["meets_objective"] and (row["length"], row["concurrency"]) in both:
                most[row["length"]] = max(most.get(row["length"], 0), row["concurrency"])
        series[f"{side} within objective"] = [(length, float(most[length])) for length in sorted(most)]
        if room := manifest.get("servers", {}).get(side, {}).get("kv_tokens"):
            fit.add(f"{side} cache holds")
            series[f"{side} cache holds"] = [(length, room / length) for length in lengths]
    return lines(
        "Most requests at a time", series, "prompt tokens", "requests", log_x=True, log_y=True,
        x_ticks=lengths, format_x=tokens, dashed=fit,
    )  # fmt: skip


def throughput_charts(rows: Rows) -> list[str]:
    """Return how latency grows with throughput, one chart for each length."""
    charts = []
    for length in sorted({row["length"] for row in rows}):
        series = {
            f"{side} p95": [
                (row["requests_per_second"], row["ttft_p95"])
                for row in sorted(_of(rows, side), key=lambda row: float(row["concurrency"]))
                if row["length"] == length
            ]
            for side in SIDES
        }
        if any(len(points) > 1 for points in series.values()):
            charts.append(
                lines(f"{tokens(length)}: latency against throughput", series, "requests per second",
                      "p95 to first token, s", log_y=True)
            )  # fmt: skip
    return charts


def goodput_chart(rows: Rows) -> str:
    """Return the requests per second that met their objective, by requests per second sent."""
    rates = [row for row in rows if row["scenario"] == "rate"]
    series = {side: [(row["rate"], row["goodput"]) for row in _of(rates, side)] for side in SIDES}
    lengths = {row["length"] for row in rates}
    return lines(
        f"{tokens(max(lengths, default=0))}: goodput",
        series,
        "requests per second sent",
        "within objective, per second",
    )


def beside_chart(rows: Rows) -> str:
    """Return a short request's time to first token, alone and while a long prompt prefills."""
    groups = {
        f"{side} {name}": {"p50": row["ttft_p50"], "p99 over p50": row["ttft_p99"] - row["ttft_p50"]}
        for side in SIDES
        for scenario, name in (("alone", "alone"), ("beside", "beside"))
        for row in _of(rows, side)
        if row["scenario"] == scenario
    }
    return bars("A short request, alone and beside a long prefill", groups, "seconds to first token")


def turns_chart(rows: Rows) -> str:
    """Return the time to first token by turn of a conversation, whose history is in the prefix cache."""
    turns = [row for row in rows if row["scenario"] == "turns"]
    series = {side: _by_length(turns, side, "ttft_p50") for side in SIDES}
    title = "A conversation, its history in the prefix cache"
    ticks = sorted({row["length"] for row in turns})
    return lines(title, series, "prompt tokens", "seconds to first token", x_ticks=ticks, format_x=tokens)


def heatmap(rows: Rows, what: str, title: str) -> str:
    """Return ratios by length and concurrency; a mark where a side meets the objectives."""
    lengths = sorted({row["length"] for row in rows})
    concurrencies = sorted({row["concurrency"] for row in rows})
    head = "".join(f"<th>{tokens(length)}</th>" for length in lengths)
    body = []
    for concurrency in concurrencies:
        cells = []
        for length in lengths:
            found = {
                row["side"]: row
                for row in rows
                if (row["length"], row["concurrency"]) == (length, concurrency)
            }
            cells.append(_heat(found, what))
        body.append(f"<tr><th>{concurrency}</th>{''.join(cells)}</tr>")
    return (
        f"<h3>{escape(title)}</h3>"
        f'<table class="heat"><tr><th>at a time</th>{head}</tr>{"".join(body)}</table>'
        "<p>&#9679; both sides meet the objective in 95 % of requests, &#9680; Focus alone, &#9681; dense, "
        "&#9675; none; &ndash; not run: no room in the KV cache for so many prompts, or no time.</p>"
    )


def table(rows: Rows) -> str:
    """Return all figures."""
    columns: dict[str, Callable[[Row], Any]] = {
        "side": lambda row: row["side"],
        "scenario": lambda row: row["scenario"],
        "prompt": lambda row: tokens(row["length"]),
        "at a time": lambda row: row["concurrency"],
        "per second": lambda row: row["rate"],
        "answered": lambda row: row["completed"],
        "failed": lambda row: row["failed"],
        "TTFT p50, s": lambda row: row["ttft_p50"],
        "p95": lambda row: row["ttft_p95"],
        "p99": lambda row: row["ttft_p99"],
        "TPOT p50, ms": lambda row: row["tpot_p50"] and row["tpot_p50"] * 1000,
        "the engine's": lambda row: engine_tpot(row) * 1000 or None,
        "requests/s": lambda row: row["requests_per_second"],
        "good/s": lambda row: row["goodput"],
        "cache hits": lambda row: row["server_prefix_hits"],
        "preempted": lambda row: row["server_preemptions"],
        "KV peak": lambda row: row["server_kv_peak"],
        "keys read": lambda row: row["server_keys_read_prefill"],
    }
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(value(row))}</td>" for value in columns.values()) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _heat(found: Mapping[str, Row], what: str) -> str:
    if len(found) < 2 or not all(row[what] for row in found.values()):
        return "<td>&ndash;</td>"
    ratio = found["dense"][what] / found["focus"][what]
    met = tuple(found[side]["meets_objective"] for side in SIDES)
    mark = {
        (True, True): "&#9679;",
        (False, True): "&#9680;",
        (True, False): "&#9681;",
        (False, False): "&#9675;",
    }
    strength = min(abs(ratio - 1) / 2, 1) * 0.6  # a black number must be legible on it
    color = f"rgba(37,99,235,{strength:.2f})" if ratio >= 1 else f"rgba(220,38,38,{strength:.2f})"
    return f'<td style="background:{color}">{ratio:.2f} {mark[met]}</td>'


def _shares(seconds: Mapping[str, float | None]) -> dict[str, float]:
    whole = sum(value or 0.0 for value in seconds.values())
    return {name: (value or 0.0) / whole for name, value in seconds.items()} if whole else {}


def _charts(charts: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _of(rows: Rows, side: str) -> Rows:
    return [row for row in rows if row["side"] == side]


def _by_length(rows: Rows, side: str, what: str, factor: float = 1) -> list[tuple[float, float]]:
    return [
        (row["length"], row[what] * factor)
        for row in sorted(_of(rows, side), key=lambda row: float(row["length"]))
        if row[what] is not None
    ]


def _ratios(rows: Rows, what: str) -> list[tuple[float, float]]:
    dense, focus = (dict(_by_length(rows, side, what)) for side in SIDES)
    return [(length, dense[length] / focus[length]) for length in sorted(dense.keys() & focus.keys())]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return escape(value) if isinstance(value, str) else short(value)
