"""vLLM's stat-logger plugin: latencies by prompt length, and the engine's heartbeat."""

from __future__ import annotations

import functools
import os
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from server.metrics import FinishedRequest, RequestMetrics
from server.objectives import Objectives
from server.progress import EngineProgress


@functools.cache
def request_metrics() -> RequestMetrics:
    """Return this process's metrics: Prometheus knows each name once, and a process may have two engines."""
    return RequestMetrics(Objectives.read(os.environ))


class FocusStatLogger(AggregateStatLoggerBase):
    """Told by vLLM of every step of the engines whose outputs this process handles.

    vLLM calls its figures unstable, so what may be missing in one of its versions is read with a default.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        parallel = vllm_config.parallel_config
        num_engines = max(parallel.data_parallel_size, *(index + 1 for index in engine_indexes))
        first = getattr(parallel, "_api_process_rank", 0) == 0
        self.progress = EngineProgress(num_engines, first=first)
        self.model_name = served_name(vllm_config)
        self.metrics = request_metrics()
        for engine in engine_indexes:
            self.metrics.prepare(self.model_name, engine, vllm_config.model_config.max_model_len)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take note of one step; `scheduler_stats` is there in one API server process of several."""
        self.metrics.stepped(engine_idx)
        if scheduler_stats is None:
            self.progress.touch(engine_idx)
        else:
            skipped = getattr(scheduler_stats, "num_skipped_waiting_reqs", 0)
            waiting = scheduler_stats.num_waiting_reqs + skipped
            self.progress.record(scheduler_stats.num_running_reqs, waiting, engine_idx)
        for request in getattr(iteration_stats, "finished_requests", []):
            self.metrics.finish(self.model_name, engine_idx, _finished(request))

    def log_engine_initialized(self) -> None:
        """Do nothing: the configuration is in vLLM's own metrics."""


def focus_stat_logger(engine_client: Any) -> FocusStatLogger | None:
    """Return Focus's stat logger of a running AsyncLLM; None if vLLM did not load the plugin."""
    manager = getattr(engine_client, "logger_manager", None)
    loggers = getattr(manager, "stat_loggers", [])
    return next((each for each in loggers if isinstance(each, FocusStatLogger)), None)


def served_name(vllm_config: Any) -> str:
    """Return the name that vLLM's own metrics give the model."""
    name = vllm_config.model_config.served_model_name
    return str(name if isinstance(name, str) else name[0])


def _finished(request: Any) -> FinishedRequest:
    cached = max(getattr(request, "num_cached_tokens", 0), 0)
    return FinishedRequest(
        finish_reason=str(request.finish_reason),
        prompt_tokens=request.num_prompt_tokens,
        computed_tokens=request.num_prompt_tokens - cached,
        generated_tokens=request.num_generation_tokens,
        e2e=request.e2e_latency,
        queue=request.queued_time,
        prefill=request.prefill_time,
        # From arrival, tokenization included; what vLLM calls TTFT, which it does not keep per request.
        ttft=request.e2e_latency - request.decode_time,
        tpot=request.mean_time_per_output_token,
    )
