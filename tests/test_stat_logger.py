"""The stat logger on vLLM's own statistics, and the watch over requests on an engine that can be steered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm.v1.engine import FinishReason
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, SchedulerStats

from server.metrics import RequestMetrics
from server.objectives import Objectives
from server.requests import RequestWatch
from server.stat_logger import FocusStatLogger, focus_stat_logger

MODEL = {"model_name": "m"}


class Metrics:
    """A registry with the metrics of one process, and short ways to read it."""

    def __init__(self, **environ: str) -> None:
        self.registry = CollectorRegistry()
        self.requests = RequestMetrics(Objectives.read(environ), self.registry)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"focus_{name}", labels)

    def latency(self, name: str, bucket: str) -> tuple[float | None, float | None]:
        where = {**MODEL, "engine": "0", "prompt_bucket": bucket}
        return self.value(f"request_{name}_count", **where), self.value(f"request_{name}_sum", **where)

    def slo(self, objective: str, bucket: str) -> tuple[float | None, ...]:
        where = {**MODEL, "objective": objective, "prompt_bucket": bucket}
        return tuple(self.value("slo_requests_total", **where, result=result) for result in ("good", "bad"))


def stat_logger(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> FocusStatLogger:
    monkeypatch.setattr("server.stat_logger.request_metrics", lambda: metrics.requests)
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=1, _api_process_rank=0),
        model_config=SimpleNamespace(served_model_name="m", max_model_len=8192),
    )
    return FocusStatLogger(config, [0])


def finished(**changes: Any) -> IterationStats:
    values: dict[str, Any] = {
        "finish_reason": FinishReason.LENGTH,
        "e2e_latency": 4.0,
        "num_prompt_tokens": 3000,
        "num_cached_tokens": 1000,
        "num_generation_tokens": 5,
        "queued_time": 0.5,
        "prefill_time": 1.0,
        "decode_time": 2.0,
        "mean_time_per_output_token": 0.5,
    }
    stats = IterationStats()
    stats.finished_requests.append(FinishedRequestStats(**{**values, **changes}))
    return stats


def test_a_finished_request_is_counted_in_the_bucket_of_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    logger = stat_logger(metrics, monkeypatch)
    logger.record(SchedulerStats(), finished())
    expected = {"ttft": 2, "tpot": 0.5, "e2e": 4, "queue": 0.5, "prefill": 1}
    for name, seconds in expected.items():
        assert metrics.latency(f"{name}_seconds", "1k-8k") == (1, seconds)
        assert metrics.latency(f"{name}_seconds", "0-1k") == (0, 0)
    assert metrics.latency("prefill_tokens_per_second", "1k-8k") == (1, 2000)
    where = {**MODEL, "engine": "0", "prompt_bucket": "1k-8k"}
    assert metrics.value("requests_finished_total", **where, finish_reason="length") == 1
    assert metrics.value("requests_finished_total", **where, finish_reason="stop") == 0


def test_targets_grow_with_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(FOCUS_SLO_TTFT="1+1/1k", FOCUS_SLO_TPOT="0.4", FOCUS_SLO_E2E="4")
    logger = stat_logger(metrics, monkeypatch)
    logger.record(None, finished(num_prompt_tokens=1024))  # TTFT 2 of 2, TPOT 0.5 of 0.4, e2e 4 of 4
    logger.record(None, finished(num_prompt_tokens=1023))  # TTFT 2 of 1.999
    assert metrics.slo("ttft", "0-1k") == (1, 1)
    assert metrics.slo("tpot", "0-1k") == (0, 2)
    assert metrics.slo("e2e", "0-1k") == (2, 0)


def test_what_has_no_meaning_is_not_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    logger = stat_logger(metrics, monkeypatch)
    logger.record(None, finished(num_generation_tokens=1))
    assert metrics.latency("ttft_seconds", "1k-8k")[0] == 1
    assert metrics.latency("tpot_seconds", "1k-8k")[0] == 0
    logger.record(None, finished(num_cached_tokens=3000))
    assert metrics.latency("prefill_tokens_per_second", "1k-8k")[0] == 1
    logger.record(None, finished(finish_reason=FinishReason.ABORT, num_generation_tokens=0))
    assert metrics.latency("ttft_seconds", "1k-8k")[0] == 2
    where = {**MODEL, "engine": "0", "prompt_bucket": "1k-8k", "finish_reason": "abort"}
    assert metrics.value("requests_finished_total", **where) == 1


def test_every_step_is_a_heartbeat_even_without_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    logger = stat_logger(metrics, monkeypatch)
    client = SimpleNamespace(logger_manager=SimpleNamespace(stat_loggers=[object(), logger]))
    assert focus_stat_logger(client) is logger
    before = logger.progress.last_step
    logger.record(SchedulerStats(num_running_reqs=2, num_waiting_reqs=1, num_skipped_waiting_reqs=3), None)
    assert (logger.progress.running, logger.progress.waiting) == (2, 4)
    assert before < (first := logger.progress.last_step)
    logger.record(None, None)
    assert first < logger.progress.last_step
    assert (logger.progress.running, logger.progress.waiting) == (2, 4)
    assert metrics.value("engine_last_step_timestamp_seconds", engine="0")


class SteeredEngine:
    """Yields what it is told to, and keeps state as vLLM's output processor does."""

    def __init__(self) -> None:
        self.outputs: asyncio.Queue[Any] = asyncio.Queue()
        self.state = SimpleNamespace(is_prefilling=True, external_req_id="r")
        self.output_processor = SimpleNamespace(
            request_states={"r-1": self.state}, parent_requests={}, external_req_ids={"r": ["r-1"]}
        )
        self.closed = 0

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **_: Any
    ) -> AsyncGenerator[Any, None]:
        try:
            while True:
                output = await self.outputs.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.finished:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            await self.abort("r-1", internal=True)
            raise
        finally:
            self.closed += 1

    async def abort(self, request_id: str, internal: bool = False) -> None:
        self.output_processor.request_states.clear()

    def shutdown(self, timeout: float | None = None) -> None:
        self.timeout = timeout


def output(*tokens: int, finish_reason: str | None = None) -> Any:
    completion = SimpleNamespace(token_ids=list(tokens), finish_reason=finish_reason)
    return SimpleNamespace(outputs=[completion], finished=finish_reason is not None)


class Request:
    """A client's request to a watched engine."""

    def __init__(self, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, length: int = 2000) -> None:
        self.engine: Any = SteeredEngine()
        self.metrics = metrics
        self.logger = stat_logger(metrics, monkeypatch)
        self.watch = RequestWatch(self.engine, self.logger)
        self.stream = self.engine.generate({"prompt_token_ids": [1] * length}, None, "r", priority=1)
        self.received: list[Any] = []
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for each in self.stream:
            self.received.append(each)

    async def give_up(self) -> None:
        await asyncio.sleep(0.01)
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task

    def aborted(self) -> dict[tuple[str, str], float]:
        return {
            (sample.labels["phase"], sample.labels["cause"]): sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "focus_requests_aborted_total" and sample.value
        }


def test_a_request_that_finishes_is_under_way_until_then_and_no_abort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        request = Request(metrics := Metrics(), monkeypatch)
        await asyncio.sleep(0.01)
        assert metrics.value("inflight_prompt_tokens") == 2000
        assert request.logger.progress.stalled > 0
        request.engine.outputs.put_nowait(output(1))
        request.engine.outputs.put_nowait(output(2, finish_reason="length"))
        await request.task
        assert len(request.received) == 2
        assert metrics.value("inflight_prompt_tokens") == 0
        assert request.logger.progress.stalled == 0
        assert request.aborted() == {}
        assert request.engine.closed == 1

    asyncio.run(run())


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("decoding", [True, False])
def test_a_client_that_leaves_is_an_abort_in_the_phase_it_left_in(
    monkeypatch: pytest.MonkeyPatch, streaming: bool, decoding: bool
) -> None:
    async def run() -> None:
        request = Request(Metrics(), monkeypatch)
        request.engine.state.is_prefilling = not decoding
        if streaming and decoding:
            request.engine.outputs.put_nowait(output(1))
        await request.give_up()
        assert request.aborted() == {("decode" if decoding else "queue_or_prefill", "client"): 1}
        assert request.metrics.value("inflight_prompt_tokens") == 0
        assert request.engine.closed == 1

    asyncio.run(run())


def test_all_choices_of_one_request_are_one_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        request = Request(Metrics(), monkeypatch)
        processor = request.engine.output_processor
        processor.parent_requests["r-1"] = SimpleNamespace(child_requests={"0_r-1", "1_r-1"})
        decoding = SimpleNamespace(is_prefilling=False, external_req_id="r")
        processor.request_states = {"0_r-1": request.engine.state, "1_r-1": decoding}
        await request.give_up()
        assert request.aborted() == {("decode", "client"): 1}

    asyncio.run(run())


def test_a_stream_that_is_closed_between_tokens_frees_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        request = Request(Metrics(), monkeypatch)
        await request.give_up()
        stream = request.engine.generate({"prompt_token_ids": [1]}, None, "r")
        request.engine.outputs.put_nowait(output(1))
        await anext(stream)
        await stream.aclose()
        assert request.engine.closed == 2
        assert request.aborted() == {("queue_or_prefill", "client"): 1, ("decode", "client"): 1}

    asyncio.run(run())


def test_a_stop_of_the_server_is_no_clients_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        request = Request(Metrics(), monkeypatch)
        await asyncio.sleep(0.01)
        request.engine.shutdown(timeout=7)
        assert request.engine.timeout == 7
        request.engine.outputs.put_nowait(output(finish_reason="abort"))
        await request.task
        assert request.aborted() == {("queue_or_prefill", "shutdown"): 1}

    asyncio.run(run())


def test_a_dead_engine_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        request = Request(Metrics(), monkeypatch)
        request.engine.state.is_prefilling = False
        request.engine.outputs.put_nowait(EngineDeadError())
        with pytest.raises(EngineDeadError):
            await request.task
        assert request.aborted() == {("decode", "error"): 1}

    asyncio.run(run())


def test_a_request_that_vllm_refuses_is_no_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        request = Request(Metrics(), monkeypatch)
        request.engine.outputs.put_nowait(ValueError("too long"))
        with pytest.raises(ValueError, match="too long"):
            await request.task
        assert request.aborted() == {}
        assert request.metrics.value("inflight_prompt_tokens") == 0

    asyncio.run(run())


def test_who_gives_up_after_the_target_was_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        for target, expected in (("0.000001", (0, 1)), ("60", (0, 0))):
            request = Request(metrics := Metrics(FOCUS_SLO_TTFT=target), monkeypatch)
            await request.give_up()
            assert metrics.slo("ttft", "1k-8k") == expected

    asyncio.run(run())
