"""How much of an engine step a prompt takes, as vLLM's scheduler is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from focus_vllm.engine.steps import share_steps

pytestmark = pytest.mark.vllm
DECODING = SimpleNamespace(num_computed_tokens=70, num_prompt_tokens=64)
PREFILLING = SimpleNamespace(num_computed_tokens=4096, num_prompt_tokens=32_000)
NEW = SimpleNamespace(num_computed_tokens=0, num_prompt_tokens=64)


@pytest.fixture(autouse=True)
def _shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def schedule(self: Any, throttle_prefills: bool = False) -> int:
        return int(self.scheduler_config.long_prefill_token_threshold)

    monkeypatch.setattr(Scheduler, "schedule", schedule)
    share_steps(most=3)
    share_steps(most=100)  # changes nothing any more


def threshold(running: list[Any], waiting: list[Any], given: int = 0, chunked: bool = True) -> int:
    config = SimpleNamespace(long_prefill_token_threshold=given, enable_chunked_prefill=chunked)
    scheduler: Any = SimpleNamespace(
        scheduler_config=config, running=running, waiting=waiting, max_num_scheduled_tokens=2048
    )
    used: Any = AsyncScheduler.schedule(scheduler, throttle_prefills=True)
    assert config.long_prefill_token_threshold == given
    return int(used)


@pytest.mark.parametrize(
    ("running", "waiting", "expected"),
    [
        ([], [PREFILLING], 0),
        ([PREFILLING], [], 0),
        ([PREFILLING], [NEW], 1024),
        ([PREFILLING, DECODING], [], 1024),
        ([PREFILLING] * 2, [NEW], 682),
        ([PREFILLING] * 3 + [DECODING] * 9, [], 512),
        ([PREFILLING] * 9, [NEW] * 9, 512),
        ([DECODING] * 9, [NEW], 2048),
    ],
)
def test_prompts_share_a_step_and_leave_one_share_unless_one_is_alone(
    running: list[Any], waiting: list[Any], expected: int
) -> None:
    assert threshold(running, waiting) == expected


def test_a_threshold_of_the_user_or_whole_prompts_stay_as_they_are() -> None:
    assert threshold([PREFILLING], [NEW], given=100) == 100
    assert threshold([PREFILLING], [NEW], chunked=False) == 0
