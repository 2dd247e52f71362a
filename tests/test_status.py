"""The status page and the figures behind it."""

from __future__ import annotations

import asyncio
import re

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from server.metrics import FinishedRequest, FocusMetrics, GateMetrics, RequestMetrics
from server.objectives import Objectives
from server.progress import EngineProgress
from server.status import PAGE, StatusSource, status_router


def request(prompt_tokens: int, ttft: float, tpot: float) -> FinishedRequest:
    return FinishedRequest("length", prompt_tokens, prompt_tokens, 9, 1.0, 0.0, ttft, ttft, tpot)


def get(source: StatusSource, path: str) -> httpx.Response:
    async def run() -> httpx.Response:
        app = FastAPI()
        app.include_router(status_router())
        app.state.focus_status = source
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(run())


def test_status_gives_what_was_counted() -> None:
    registry = CollectorRegistry()
    metrics = RequestMetrics(Objectives.read({"FOCUS_PROMPT_BUCKETS": "512,8k,16k"}), registry)
    metrics.prepare("m", 0, 8192)
    for engine, (length, ttft) in enumerate([(100, 0.3), (400, 0.7), (9000, 40.0)]):
        metrics.finish("m", engine, request(length, ttft, tpot=0.012))
    metrics.abort("m", 100, "decode", "client", elapsed=1)
    metrics.change_inflight(700)
    FocusMetrics(registry).count("prefill", candidate=80, selected=20, dense_queries=3)
    gate = GateMetrics(registry)
    gate.set_state(ready=False, draining=True)
    gate.rejected("queue")
    progress = EngineProgress()
    progress.record(running=2, waiting=3)

    status = get(StatusSource(registry, "m", 8192, progress), "/focus/status").json()
    ttft = status["latency"]["ttft"]
    assert list(ttft["counts"]) == ["0-512", "512-8k", "8k-16k"]
    counts = dict(zip([*ttft["bounds"], "all"], ttft["counts"]["0-512"], strict=True))
    assert (counts[0.25], counts[0.5], counts[1], counts["all"]) == (0, 1, 2, 2)
    assert ttft["sums"]["0-512"] == 1
    assert ttft["counts"]["8k-16k"][-1] == 1
    assert sum(status["latency"]["tpot"]["counts"]["0-512"]) > 0
    assert status["keys"]["prefill"] == {"candidate": 80, "selected": 20}
    assert (status["ready"], status["draining"]) == (False, True)
    assert (status["running"], status["waiting"], status["inflight_prompt_tokens"]) == (2, 3, 700)
    assert (status["finished"], status["aborted"], status["rejected"]) == (3, 1, 1)
    assert (status["model"], status["max_model_len"]) == ("m", 8192)


def test_the_page_loads_nothing_and_sends_nothing_elsewhere() -> None:
    page = get(StatusSource(CollectorRegistry(), "m", 8192), "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in text
