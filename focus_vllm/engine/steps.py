"""How much of an engine step a prompt may take, so that whoever comes next need not wait for its end."""

from __future__ import annotations

import functools
from typing import Any

VARIABLE = "FOCUS_SHARED_PREFILLS"


def share_steps(most: int) -> None:
    """Have vLLM's scheduler leave room in its steps; calling it again changes nothing.

    vLLM gives a step to the requests that run before those that wait, so that a long prefill is alone until
    it is done. From now on a step is divided evenly among the prompts that prefill, `most` of them at most,
    and one share stays free. A request that is alone takes whole steps. A `--long-prefill-token-threshold`,
    which cuts every prompt to the same size, alone or not, stays in force.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    schedule = Scheduler.schedule
    if hasattr(schedule, "focus"):
        return

    @functools.wraps(schedule)
    def schedule_with_room(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.scheduler_config
        if config.long_prefill_token_threshold or not config.enable_chunked_prefill:
            return schedule(self, *args, **kwargs)
        config.long_prefill_token_threshold = _share(self, most)
        try:
            return schedule(self, *args, **kwargs)
        finally:
            config.long_prefill_token_threshold = 0

    schedule_with_room.focus = True  # type: ignore[attr-defined]
    Scheduler.schedule = schedule_with_room  # type: ignore[method-assign]


def _share(scheduler: Any, most: int) -> int:
    """Return how many tokens one prompt may take of the next step; 0: all of them."""
    if len(scheduler.running) + len(scheduler.waiting) < 2:
        return 0
    prefilling = sum(each.num_computed_tokens < each.num_prompt_tokens for each in scheduler.running)
    return int(scheduler.max_num_scheduled_tokens // (min(prefilling, most) + 1))
