"""Which cells a load test runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Container, Sequence

from loadtest.bench import Cell, Request, Result, Target, run
from loadtest.capacity import Prefill

SHORT_TOKENS = 256
"""Prompt of the short requests that meet long ones."""
TURN_TOKENS = 1024
"""What a turn of a conversation adds."""

Report = Callable[[Result], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to run; lengths in prompt tokens."""

    lengths: Sequence[int]
    concurrencies: Sequence[int]
    rates: Sequence[float]
    """Requests per second, at the middle one of the lengths."""
    turns: int
    """Of one conversation; 0: none."""
    beside: int
    """Length of the prompt that short requests are sent beside; 0: none."""
    requests: int
    """Per cell; fewer where prompts are so long that they are more than `tokens`."""
    tokens: int
    output_tokens: int
    seed: int
    fewest: int = 3
    """Requests of a cell at least, however long their prompts are."""
    warm_up: int | None = None
    """Longest prompt of which one is sent first and not reported; None: of every length."""

    def count(self, length: int, concurrency: int) -> int:
        """Return the number of requests of a cell: one for every place at least."""
        return max(min(self.requests, self.tokens // length), concurrency, self.fewest)

    @property
    def long(self) -> Cell:
        """Return the prompt that short requests meet."""
        return Cell("long", self.beside, 1, 1, output_tokens=2, seed=self.seed + 300)

    def grid(self, kv_tokens: int | None) -> list[Cell]:
        """Return the cells of lengths and concurrencies whose requests fit in the KV cache together."""
        return [
            Cell(
                "grid",
                length,
                self.count(length, concurrency),
                concurrency,
                output_tokens=self.output_tokens,
                seed=self.seed + number,
            )
            for number, (length, concurrency) in enumerate(
                (length, concurrency) for concurrency in self.concurrencies for length in self.lengths
            )
            if kv_tokens is None
            or concurrency == 1
            or (length + self.output_tokens) * concurrency <= kv_tokens
        ]


class Clock:
    """When one side has to be done, and which cells would not be."""

    def __init__(self, seconds: float | None) -> None:
        """Start now; None: there is time for everything."""
        self._end = None if seconds is None else time.monotonic() + seconds
        self._seconds: dict[int, float] = {}
        """What a request took, with its share of everything around it, by length."""

    def left(self) -> float | None:
        """Return the seconds that are left; None: as many as it takes."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def fits(self, cell: Cell) -> bool:
        """Judge by the cells so far."""
        left = self.left()
        if left is None or not self._seconds:
            return left is None or left > 0
        arriving = cell.requests / cell.rate if cell.rate else 0.0
        return max(cell.requests * self._expected(cell.length), arriving) < left

    def _expected(self, length: int) -> float:
        """Return what a request will take: a l + b l^2, by the two longest of the shorter lengths."""
        known = [(each, self._seconds[each]) for each in sorted(self._seconds) if each <= length][-2:]
        if not known:
            shortest = min(self._seconds)
            return self._seconds[shortest] * length / shortest
        last, seconds = known[-1]
        growth = length / last
        most = seconds * growth**2
        if len(known) == 1:
            return most
        return min(max(Prefill.fit(*zip(*known, strict=True)).seconds(length), seconds * growth), most)

    def took(self, cell: Cell, seconds: float) -> None:
        """Take note of a cell that has ended."""
        if not cell.rate:  # its time is mostly waiting for arrivals
            self._seconds[cell.length] = seconds / cell.requests


Step = tuple[Cell, Callable[[float | None], list[Result]]]
"""A cell, and what measures it, with others that belong to it, within so many seconds."""


def run_plan(
    plan: Plan,
    target: Target,
    side: str,
    kv_tokens: int | None,
    report: Report,
    clock: Clock,
    wanted: Container[Cell] | None = None,
    complain: Callable[[str], None] = lambda problem: None,
) -> tuple[list[Cell], list[Cell]]:
    """Run everything on one side that there is time for; prompts depend on the plan alone.

    Args:
        plan: What to run.
        target: The server.
        side: Its name.
        kv_tokens: What its cache holds.
        report: Called with every result.
        clock: A cell that would outlast it is left out.
        wanted: Cells to run; None: all.
        complain: Called with what went wrong where nothing was answered; the cell counts as left out.

    Returns:
        Cells that were run, and those that there was no time for.
    """
    # Compiles, and grows what grows; not reported. The very first request takes far longer than others of its
    # length: the time of the second, which is another prompt, is what the clock goes by.
    for number, length in enumerate((plan.lengths[0], *plan.lengths)):
        cell = Cell("warmup", length, 1, 1, output_tokens=8, seed=plan.seed + 999 + number)
        if (plan.warm_up is None or length <= plan.warm_up) and clock.fits(cell):
            began = time.monotonic()
            run(target, side, [cell])
            clock.took(cell, time.monotonic() - began)
    done, left_out = [], []
    for cell, measure in _steps(plan, target, side, kv_tokens):
        if wanted is not None and cell not in wanted:
            continue
        began = time.monotonic()
        try:
            results = measure(clock.left()) if clock.fits(cell) else []
        except TimeoutError:
            results = []
        except RuntimeError as failure:
            complain(f"{side} {cell.name}: {failure}")
            results = []
        if not results:
            left_out.append(cell)
            continue
        clock.took(cell, time.monotonic() - began)
        done.append(cell)
        for result in results:
            report(result)
    return done, left_out


def _steps(plan: Plan, target: Target, side: str, kv_tokens: int | None) -> list[Step]:
    """Return everything, fewest tokens at a time first: a run that is cut short has measured most."""

    def alone(cell: Cell) -> Step:
        return cell, lambda seconds: run(target, side, [cell], seconds)

    steps = [*map(alone, plan.grid(kv_tokens)), *map(alone, conversation(plan))]
    if plan.beside:
        long = plan.long
        steps.append((long, lambda seconds: short_beside_long(plan, long, target, side, seconds)))
    for number, rate in enumerate(plan.rates):
        length = plan.lengths[len(plan.lengths) // 2]
        cell = Cell("rate", length, plan.requests, rate=rate, output_tokens=plan.output_tokens)
        steps.append(alone(dataclasses.replace(cell, seed=plan.seed + 100 + number)))
    return sorted(steps, key=lambda step: step[0].length * (step[0].concurrency or 1))


def short_beside_long(
    plan: Plan, long: Cell, target: Target, side: str, seconds: float | None
) -> list[Result]:
    """Send short requests alone, and while a long prompt prefills; return both, if any met one."""
    end = None if seconds is None else time.monotonic() + seconds
    short = Cell("alone", SHORT_TOKENS, plan.requests, rate=4, output_tokens=2, seed=plan.seed + 200)
    (alone,) = run(target, side, [short], seconds)
    # How many short ones a long one meets is known afterwards only.
    met: list[Request] = []
    for number in range(3):
        again = dataclasses.replace(long, seed=long.seed + number)
        beside = dataclasses.replace(short, scenario="beside", seed=plan.seed + 400 + number)
        left = None if end is None else max(0.0, end - time.monotonic())
        long_result, result = run(target, side, [again, beside], left)
        met += [request for request in result.requests if _overlaps(request, long_result.requests[0])]
        if len(met) >= plan.requests / 2:
            break
    return [alone, *([dataclasses.replace(result, requests=met)] if met else [])]


def conversation(plan: Plan) -> list[Cell]:
    """Return cells of one request each, every prompt what the last one began with, and more: as in a chat."""
    return [
        Cell(
            "turns",
            TURN_TOKENS * turn,
            1,
            1,
            output_tokens=plan.output_tokens,
            seed=plan.seed,
            history=TURN_TOKENS * turn - TURN_TOKENS // 32,
        )
        for turn in range(1, plan.turns + 1)
    ]


def _overlaps(short: Request, long: Request) -> bool:
    return long.start <= short.start <= long.start + long.ttft
