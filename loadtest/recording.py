"""A load test's folder: every cell and request, the manifest and the report, whole after every cell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from loadtest.bench import Cell, Request, Result, engine_tpot, summary
from loadtest.report import write_report
from loadtest.scenarios import Plan
from server.objectives import Target as Objective

MAX_PREFIX_HITS = 0.01
MAX_LENGTH_ERROR = 0.01
SLOW_CLIENT = 1.5
"""Times the engine's own time per token at which somebody between it and the client is in the way."""

Row = dict[str, Any]


class Recording:
    """What a run has measured so far; whatever ends it, there is a report."""

    def __init__(self, folder: Path, manifest: dict[str, Any], problems: list[str], append: bool) -> None:
        """Begin, or go on with what the folder has.

        Args:
            folder: Is made if need be.
            manifest: As `loadtest.manifest.describe` returns it, with the objectives; may change later.
            problems: Why the figures may mean nothing; doubts about cells are added.
            append: Keep the cells of an earlier run.
        """
        self.folder = folder
        self.manifest = manifest
        self.problems = problems
        self._objectives = [Objective.parse(manifest["objectives"][name]) for name in ("ttft", "tpot")]
        folder.mkdir(parents=True, exist_ok=True)
        if not append:
            for name in ("cells.jsonl", "requests.jsonl"):
                (folder / name).write_text("")

    def add(self, result: Result) -> Row:
        """Write down a cell; return its line."""
        row = {**summary(result), **self._judge(result)}
        self.problems += doubts(row)
        about = {name: row[name] for name in ("side", "scenario", "length", "concurrency", "rate", "seed")}
        with (self.folder / "requests.jsonl").open("a") as requests:
            for number, request in enumerate(result.requests):
                line = {**about, "request": number, **dataclasses.asdict(request), "tpot": request.tpot}
                requests.write(json.dumps(line) + "\n")
        with (self.folder / "cells.jsonl").open("a") as cells:
            cells.write(json.dumps(row) + "\n")
        self.write(ended=False)
        return row

    def write(self, ended: bool) -> Path:
        """Write manifest and report; return the report's path."""
        problems = self.problems if ended else [*self.problems, "the run did not come to its end"]
        manifest = {**self.manifest, "problems": problems}
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        return write_report(self.folder)

    def _judge(self, result: Result) -> Row:
        ttft, tpot = self._objectives

        def good(request: Request) -> bool:
            in_time = request.ttft <= ttft.seconds(request.prompt_tokens)
            return in_time and (request.tpot or 0) <= tpot.seconds(request.prompt_tokens)

        met = sum(good(request) for request in result.answered)
        return {
            "goodput": met / result.duration,
            "meets_objective": met >= 0.95 * len(result.requests),
        }


def earlier(folder: Path, plan: Plan) -> tuple[dict[str, Any], list[Cell]]:
    """Return the manifest of a run that was cut short, and the cells that only its dense side has.

    Problems and cells left out are those of the dense side alone.

    Raises:
        OSError: There was none.
        ValueError: Its plan is another, or it has measured nothing.
    """
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    planned = json.loads(json.dumps(dataclasses.asdict(plan)))
    if differing := [name for name in planned if planned[name] != manifest["plan"].get(name)]:
        raise ValueError(
            "--resume takes the options of the run that it goes on with: "
            + "; ".join(f"{name} was {manifest['plan'].get(name)}, is {planned[name]}" for name in differing)
        )
    measured: dict[str, list[Cell]] = {"dense": [], "focus": []}
    for line in (folder / "cells.jsonl").read_text().splitlines():
        row = json.loads(line)
        cell = Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell)})
        measured[row["side"]].append(cell)
    if not measured["dense"]:
        raise ValueError(f"{folder} has no cell of the dense side to go on from: leave out --resume")
    missing = [cell for cell in measured["dense"] if cell not in measured["focus"]]
    # The prompt that short ones are sent beside is a step of the plan, and no row.
    missing += [plan.long] * any(cell.scenario == "alone" for cell in missing)
    names = {cell.name for cell in missing}
    manifest["left_out"] = [name for name in manifest["left_out"] if name not in names]
    manifest["problems"] = [problem for problem in manifest["problems"] if problem.startswith("dense ")]
    return manifest, missing


def doubts(row: Row) -> list[str]:
    """Return why a cell's figures may mean nothing."""
    where = f"{row['side']} {row['scenario']} {row['length']} x {row['concurrency']}"
    found = []
    if row["scenario"] != "turns":
        if (row["server_prefix_hits"] or 0) > MAX_PREFIX_HITS:
            found.append(
                f"{where}: {row['server_prefix_hits']:.1%} of prompt tokens came from the prefix cache"
            )
        if abs(row["prompt_tokens"] / row["length"] - 1) > MAX_LENGTH_ERROR:
            found.append(f"{where}: prompts have {row['prompt_tokens']:g} tokens")
    if row["failed"]:
        found.append(f"{where}: {row['failed']} requests failed")
    engine, client = engine_tpot(row), row["tpot_p50"] or 0
    if row["scenario"] == "grid" and row["concurrency"] == 1 and client > SLOW_CLIENT * engine:
        found.append(
            f"{where}: the client waited {1000 * client:.1f} ms for a token, of the engine's "
            f"{1000 * engine:.1f}: the API server or the client was slow, not the model"
        )
    return found
