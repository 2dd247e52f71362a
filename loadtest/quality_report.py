"""Turn the results of loadtest.quality into tables and a plot.

    python -m loadtest.quality_report results.jsonl --out docs/quality

prints Markdown, and writes `frontier.png` into the folder. Figures over several seeds are mean and standard
deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MARKERS = "osD^vP*X"
TEXTS = ("books", "wikipedia")


def read_results(path: Path) -> list[Row]:
    """Return the units of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def frontier(results: Sequence[Row]) -> list[Row]:
    """Return one row per way to attend: what it reads and what it loses against dense, over the seeds."""
    dense = next(row for unit in results if unit["kind"] == "dense" for row in unit["rows"])
    groups: dict[str, list[Row]] = {}
    for unit in results:
        if unit["kind"] not in ("adapter", "tuned", "local", "yardsticks"):
            continue
        for measured in unit["rows"]:
            groups.setdefault(_name(unit, measured), []).append(measured)
    rows: list[Row] = []
    for name, found in groups.items():
        row: Row = {"name": name, "seeds": len(found), "local": name.startswith("local")}
        for text in TEXTS:
            row[f"{text}.far"] = statistics.mean(part[text]["far_pairs"] for part in found)
        row["keys"] = statistics.mean(part["books"]["keys_per_query"] for part in found)
        for text in TEXTS:
            gaps = [100 * (part[text]["perplexity"] / dense[text]["perplexity"] - 1) for part in found]
            recalls = [part[text]["recall"] - dense[text]["recall"] for part in found]
            row[f"{text}.ppl"], row[f"{text}.recall"] = _spread(gaps), _spread(recalls)
        rows.append(row)
    return sorted(rows, key=lambda row: row["keys"])


def _name(unit: Row, row: Row) -> str:
    if "serve" in row:
        return ", ".join([unit["name"], *(f"{key}={value}" for key, value in row["serve"].items())])
    return f"{row['way']} ({unit['name']})" if unit["kind"] == "yardsticks" else str(row["way"])


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def frontier_table(rows: Sequence[Row]) -> str:
    """Lay out the frontier as Markdown: perplexity in % over dense, recall in nats over dense."""
    lines = [
        "| attention | seeds | keys per query "
        "| books: far pairs | PPL | recall | Wikipedia: far pairs | PPL | recall |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"], str(row["seeds"]), f"{row['keys']:.0f}"]
        for text in TEXTS:
            (gap, gap_spread), (recall, recall_spread) = row[f"{text}.ppl"], row[f"{text}.recall"]
            several = row["seeds"] > 1
            cells.append(f"{row[f'{text}.far']:.1%}")
            cells.append(f"{gap:+.2f} ± {gap_spread:.2f} %" if several else f"{gap:+.2f} %")
            cells.append(f"{recall:+.3f} ± {recall_spread:.3f}" if several else f"{recall:+.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def length_table(results: Sequence[Row]) -> str:
    """Lay out perplexity by length as Markdown, each as the gap to dense in percent."""
    rows = [
        (_name(unit, row), row["long"]["perplexity_by_length"])
        for unit in results
        for row in unit.get("rows", [])
        if "long" in row
    ]
    dense = dict(rows)["dense"]
    lines = ["| attention | " + " | ".join(dense) + " |", "|---" * (len(dense) + 1) + "|"]
    for name, lengths in rows:
        gaps = (f"{100 * (lengths[size] / dense[size] - 1):+.2f} %" for size in dense)
        cells = (f"{value:.2f}" for value in dense.values()) if name == "dense" else gaps
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def probe_table(results: Sequence[Row]) -> str:
    """Lay out retrieval tasks as Markdown: NLL of the answer, share of its tokens that come first."""
    rows = [
        (_name(unit, row), row["books"]["probes"])
        for unit in results
        for row in unit.get("rows", [])
        if row["books"]["probes"]
    ]
    tasks = list(rows[0][1])
    lines = ["| attention | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for name, scores in rows:
        cells = (f"{scores[task]['nll']:.3f}, {scores[task]['accuracy']:.0%}" for task in tasks)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def claims_table(results: Sequence[Row]) -> str:
    """Lay out fine-tuning, LoRA and training from scratch as Markdown: perplexity before and after."""
    lines = [
        "| training | books | Wikipedia | code | largest group |",
        "|---|---|---|---|---|",
    ]
    for unit in results:
        if "before" not in unit:
            continue
        cells = (f"{unit['before'][text]:.2f} -> {unit['after'][text]:.2f}" for text in (*TEXTS, "code"))
        shares = unit.get("training", {}).get("dominance", {}).values()
        largest = f"{max(shares):.1%}" if shares else ""
        lines.append(f"| {unit['id']} | " + " | ".join(cells) + f" | {largest} |")
    return "\n".join(lines) + "\n"


def plot_frontier(rows: Sequence[Row], path: Path) -> None:
    """Draw loss against dense over keys per query, with the local windows as a line.

    A colour is what was trained, a shape is how it is served.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    parts = [row["name"].partition(", top_k=") for row in rows if not row["local"]]
    trained, served = (list(dict.fromkeys(part[place] for part in parts)) for place in (0, 2))
    for axes, part, label in zip(
        figure.subplots(1, 2),
        ("ppl", "recall"),
        ("perplexity, % over dense", "recall, nats over dense"),
        strict=True,
    ):
        windows = [row for row in rows if row["local"]]
        middles = [row[f"books.{part}"][0] for row in windows]
        axes.plot([row["keys"] for row in windows], middles, "k.-", label="local windows")
        for row in rows:
            if not row["local"]:
                middle, spread = row[f"books.{part}"]
                name, _, serving = row["name"].partition(", top_k=")
                marker = MARKERS[served.index(serving) % len(MARKERS)]
                colour = f"C{trained.index(name)}"
                axes.errorbar(row["keys"], middle, spread, fmt=marker, color=colour, label=row["name"])
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set(xlabel="keys per query", ylabel=label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
    figure.savefig(path, dpi=120)


def report(results: Sequence[Row], folder: Path) -> str:
    """Return all tables that the results allow, and write the plot."""
    parts = []
    if any(unit["kind"] == "dense" for unit in results):
        rows = frontier(results)
        folder.mkdir(parents=True, exist_ok=True)
        plot_frontier(rows, folder / "frontier.png")
        parts += [frontier_table(rows), length_table(results), probe_table(results)]
    if any("before" in unit for unit in results):
        parts.append(claims_table(results))
    return "\n".join(parts)


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", required=True, type=Path, help="folder for the plot")
    given = parser.parse_args(words)
    sys.stdout.write(report([unit for path in given.results for unit in read_results(path)], given.out))


if __name__ == "__main__":
    main()
