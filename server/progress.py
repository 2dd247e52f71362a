"""Whether the engine moves: a heartbeat that every API server process sees."""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path
from typing import Any

ENGINE = struct.Struct("=ddd")


class EngineProgress:
    """When the engines last made a step, and what they had to do then.

    The scheduler tells only one API server process of each step, so several of them share a file
    beside the Prometheus client's own. A step that computes no token yet, in a long prefill, counts too.
    """

    def __init__(self, num_engines: int = 1, *, first: bool = True) -> None:
        """Share the file in PROMETHEUS_MULTIPROC_DIR, if that is set.

        Args:
            num_engines: How many engines (data-parallel ranks) there are.
            first: This is the first API server process; it forgets what an earlier run left behind.
        """
        size = num_engines * ENGINE.size
        if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            descriptor = os.open(Path(folder) / "focus_progress", os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(descriptor, size)
            self._memory = mmap.mmap(descriptor, size)
            os.close(descriptor)
        else:
            self._memory = mmap.mmap(-1, size)
        if first:
            self._memory[:] = bytes(size)
        self._started = time.monotonic()
        self._submitted: dict[object, float] = {}

    def record(self, running: int, waiting: int, engine: int = 0) -> None:
        """Note a step of `engine`, after which it had `running` and `waiting` requests."""
        ENGINE.pack_into(self._memory, engine * ENGINE.size, time.monotonic(), running, waiting)

    def touch(self, engine: int = 0) -> None:
        """Note a step of `engine` that another process knows more about."""
        struct.pack_into("=d", self._memory, engine * ENGINE.size, time.monotonic())

    def submit(self, request: object) -> None:
        """Note that a request was handed to the engines."""
        self._submitted[request] = time.monotonic()

    def end(self, request: object) -> None:
        """Note that a request needs no more steps, however it ended."""
        self._submitted.pop(request, None)

    @property
    def last_step(self) -> float:
        """`time.monotonic()` of the last step; before the first one, of the start.

        Of several engines the one counts that has work and has not moved for longest; if none has work,
        the one that moved last.
        """
        steps = [step for step, running, waiting in self._engines() if running or waiting]
        last = min(steps) if steps else max(step for step, _, _ in self._engines())
        return max(last, self._started)

    @property
    def running(self) -> int:
        """Requests in the engines' batches."""
        return sum(int(running) for _, running, _ in self._engines())

    @property
    def waiting(self) -> int:
        """Requests in the engines' queues."""
        return sum(int(waiting) for _, _, waiting in self._engines())

    @property
    def stalled(self) -> float:
        """Seconds that the engines have had work without making a step; 0 if they have none.

        A request handed over since the last step is work that no engine has reported yet. One from
        before that may only wait for a client that reads slowly.
        """
        last = self.last_step
        unseen = [since for since in self._submitted.values() if since > last]
        if self.running or self.waiting:
            return time.monotonic() - last
        return time.monotonic() - min(unseen) if unseen else 0.0

    def _engines(self) -> list[tuple[float, float, float]]:
        return list(ENGINE.iter_unpack(self._memory))


def engine_progress(engine_client: Any) -> EngineProgress | None:
    """Return the progress of `engine_client`'s engines; None if Focus's stat logger does not run."""
    from server.stat_logger import focus_stat_logger

    stat_logger = focus_stat_logger(engine_client)
    return stat_logger.progress if stat_logger else None
