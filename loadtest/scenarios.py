"""Which cells a load test runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from loadtest.bench import Cell, Request, Result, Target, run

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
    beside: bool
    """Send short requests beside the longest prompt."""
    requests: int
    """Per cell; fewer where prompts are so long that they are more than `tokens`."""
    tokens: int
    output_tokens: int
    seed: int

    def count(self, length: int, concurrency: int) -> int:
        """Return the number of requests of a cell: at least 3, and one for every place."""
        return max(min(self.requests, self.tokens // length), concurrency, 3)

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
                (length, concurrency) for length in self.lengths for concurrency in self.concurrencies
            )
            if kv_tokens is None
            or concurrency == 1
            or (length + self.output_tokens) * concurrency <= kv_tokens
        ]


def run_plan(plan: Plan, target: Target, side: str, kv_tokens: int | None, report: Report) -> None:
    """Run everything on one side; prompts depend on the plan alone."""
    for length in plan.lengths:  # compiles, and grows what grows; not reported
        run(target, side, [Cell("warmup", length, 1, 1, output_tokens=8, seed=plan.seed + 999)])
    for cell in plan.grid(kv_tokens):
        report(*run(target, side, [cell]))
    for number, rate in enumerate(plan.rates):
        length = plan.lengths[len(plan.lengths) // 2]
        cell = Cell("rate", length, plan.requests, rate=rate, output_tokens=plan.output_tokens)
        report(*run(target, side, [dataclasses.replace(cell, seed=plan.seed + 100 + number)]))
    if plan.beside:
        for result in short_beside_long(plan, target, side):
            report(result)
    for cell in conversation(plan):
        report(*run(target, side, [cell]))


def short_beside_long(plan: Plan, target: Target, side: str) -> list[Result]:
    """Send short requests alone, and while the longest prompt prefills; return both, if any met one."""
    short = Cell("alone", SHORT_TOKENS, plan.requests, rate=4, output_tokens=2, seed=plan.seed + 200)
    (alone,) = run(target, side, [short])
    # How many short ones a long one meets is known afterwards only.
    met: list[Request] = []
    for number in range(3):
        long = Cell("long", plan.lengths[-1], 1, 1, output_tokens=2, seed=plan.seed + 300 + number)
        beside = dataclasses.replace(short, scenario="beside", seed=plan.seed + 400 + number)
        long_result, result = run(target, side, [long, beside])
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
