"""How many keys attention read: fetched from the workers, kept for whoever asks."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol

from server.metrics import PHASES, FocusMetrics

# vLLM configures handlers for its own logger only.
logger = logging.getLogger("vllm.focus_serve.stats")


class WorkerClient(Protocol):
    """The part of vLLM's EngineClient that reaches the workers."""

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a method of every worker and return their results, first worker first."""


@dataclasses.dataclass(frozen=True, slots=True)
class PhaseStats:
    """Cumulative sums over the queries of one phase and the routed layers."""

    candidate: int = 0
    """Keys that dense attention would have read."""
    selected: int = 0
    """Keys that Focus read."""
    dense_queries: int = 0
    """Queries below `dense_below`, which attend densely."""

    @property
    def fraction(self) -> float | None:
        """Mean fraction of keys read; None before the first query."""
        return self.selected / self.candidate if self.candidate else None


class StatsPoller:
    """Reads the workers' `focus_stats`, at most one call at a time.

    A call waits for the engine step that is running, which takes seconds in a long prefill.
    """

    def __init__(self, client: WorkerClient, metrics: FocusMetrics | None) -> None:
        """Feed `metrics`, or none of them where another API server process already does."""
        self.phases: Mapping[str, PhaseStats] = {phase: PhaseStats() for phase in PHASES}
        self._client = client
        self._metrics = metrics
        self._read_at = time.monotonic()
        self._pending: asyncio.Task[None] | None = None

    @property
    def age(self) -> float:
        """Seconds since `phases` was read."""
        return time.monotonic() - self._read_at

    async def refresh(self, timeout: float) -> bool:
        """Read again, or join the read under way; False if it failed or took over `timeout` seconds."""
        if self._pending is None or self._pending.done():
            self._pending = asyncio.create_task(self._read())
        pending = self._pending  # another caller may start the next read while this one waits
        done, _ = await asyncio.wait({pending}, timeout=timeout)
        if done and (error := pending.exception()):
            logger.warning("Cannot read attention statistics: %s", error)
            return False
        return bool(done)

    async def run(self, interval: float) -> None:
        """Refresh every `interval` seconds until cancelled."""
        while True:
            await asyncio.sleep(interval)
            await self.refresh(timeout=interval)
            if self._metrics:
                self._metrics.set_age(self.age)

    async def _read(self) -> None:
        # All tensor-parallel workers count the same keys.
        stats, *_ = await self._client.collective_rpc("focus_stats")
        fresh = {
            phase: PhaseStats(
                stats["candidate_tokens"][phase],
                stats["selected_tokens"][phase],
                stats["dense_queries"][phase],
            )
            for phase in PHASES
        }
        if self._metrics:
            for phase, now in fresh.items():
                before = self.phases[phase]
                self._metrics.count(
                    phase,
                    candidate=now.candidate - before.candidate,
                    selected=now.selected - before.selected,
                    dense_queries=now.dense_queries - before.dense_queries,
                )
        self.phases = fresh
        self._read_at = time.monotonic()
