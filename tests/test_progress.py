"""The engine's heartbeat, as liveness needs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.progress import EngineProgress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("server.progress.time.monotonic", clock)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    return clock


def test_an_engine_without_work_never_stalls(clock: Clock) -> None:
    progress = EngineProgress()
    clock.now += 3600
    assert (progress.last_step, progress.stalled) == (1000, 0)
    progress.record(running=0, waiting=0)
    clock.now += 3600
    assert (progress.last_step, progress.stalled) == (4600, 0)


def test_work_without_a_step_is_a_stall_until_the_next_step(clock: Clock) -> None:
    progress = EngineProgress()
    progress.record(running=2, waiting=3)
    assert (progress.running, progress.waiting) == (2, 3)
    clock.now += 40
    assert progress.stalled == 40
    progress.record(running=1, waiting=0)
    assert progress.stalled == 0


def test_a_request_that_no_engine_has_taken_up_is_work(clock: Clock) -> None:
    progress = EngineProgress()
    clock.now += 500
    progress.submit("a")
    clock.now += 7
    progress.submit("b")
    clock.now += 7
    assert progress.stalled == 14
    progress.end("a")
    assert progress.stalled == 7
    progress.end("b")
    assert progress.stalled == 0


def test_a_request_that_only_waits_for_its_client_is_no_work(clock: Clock) -> None:
    progress = EngineProgress()
    progress.submit("slow reader")
    clock.now += 1
    progress.record(running=0, waiting=0)
    clock.now += 3600
    assert progress.stalled == 0


def test_one_stuck_engine_is_not_hidden_by_another(clock: Clock) -> None:
    progress = EngineProgress(num_engines=2)
    progress.record(running=1, waiting=0, engine=0)
    clock.now += 60
    progress.record(running=1, waiting=0, engine=1)
    assert (progress.stalled, progress.running) == (60, 2)
    progress.touch(engine=0)
    assert progress.stalled == 0


def in_another_process(code: str, folder: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", f"from server.progress import EngineProgress\n{code}"],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
        check=True,
    )


def test_processes_share_steps_and_a_new_run_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    progress = EngineProgress()
    time.sleep(0.01)
    before = progress.last_step
    in_another_process("EngineProgress(first=False).record(running=4, waiting=5)", tmp_path)
    assert (progress.running, progress.waiting) == (4, 5)
    assert before < progress.last_step <= time.monotonic()
    in_another_process("EngineProgress(first=True)", tmp_path)
    assert (progress.running, progress.waiting) == (0, 0)
