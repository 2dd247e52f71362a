"""What vLLM's scheduler does otherwise: it shares steps among prompts, and looks for no common prefix."""

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


def skip_common_prefixes() -> None:
    """Have schedulers of engines with Focus find no prefix common to all requests; again changes nothing.

    It is for cascade attention, which Focus never uses. While one request runs, or all begin alike, vLLM
    looks at each of its blocks in every step: at a million tokens that takes the host 3 to 7 ms.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    from focus_vllm.engine.settings import focus_option

    initialize = Scheduler.__init__
    if hasattr(initialize, "focus"):
        return

    @functools.wraps(initialize)
    def initialize_without(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        if focus_option(self.vllm_config) is not None:
            groups = len(self.kv_cache_config.kv_cache_groups)
            self.kv_cache_manager.get_num_common_prefix_blocks = lambda running_request_id: [0] * groups

    initialize_without.focus = True  # type: ignore[attr-defined]
    Scheduler.__init__ = initialize_without  # type: ignore[method-assign]


def _share(scheduler: Any, most: int) -> int:
    """Return how many tokens one prompt may take of the next step; 0: all of them."""
    if len(scheduler.running) + len(scheduler.waiting) < 2:
        return 0
    prefilling = sum(each.num_computed_tokens < each.num_prompt_tokens for each in scheduler.running)
    return int(scheduler.max_num_scheduled_tokens // (min(prefilling, most) + 1))
