"""The endpoint plugin and its metrics, against an engine that only answers for its workers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from focus_vllm.config import FocusConfig
from server.endpoints import FocusEndpointPlugin, curl_line
from server.errors import LaunchError
from server.metrics import GateMetrics
from server.stats import StatsPoller

Scenario = Callable[[httpx.AsyncClient], Awaitable[None]]


class FakeEngine:
    """Answers `collective_rpc` as two tensor-parallel workers do."""

    def __init__(self, rank: int = 0) -> None:
        parallel_config = SimpleNamespace(_api_process_rank=rank, _api_process_count=1)
        model_config = SimpleNamespace(served_model_name="focus-demo", max_model_len=8192)
        self.vllm_config = SimpleNamespace(parallel_config=parallel_config, model_config=model_config)
        info = {
            "adapter": "some/where/focus.safetensors",
            "sha256": "0123456789abcdef" * 4,
            "base_model": "demo-10m",
            "routed_layers": [1, 2],
            "dense_layers": [0],
            "config": FocusConfig(num_groups=4, dense_layers=(0,)).to_dict(),
        }
        self.infos: list[dict[str, Any] | None] = [info, info]
        self.stats = {
            "candidate_tokens": {"prefill": 0, "decode": 0},
            "selected_tokens": {"prefill": 0, "decode": 0},
            "dense_queries": {"prefill": 0, "decode": 0},
        }
        self.error: Exception | None = None
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.running = self.most_running = 0

    def read_keys(self, phase: str, candidate: int, selected: int) -> None:
        self.stats["candidate_tokens"][phase] += candidate
        self.stats["selected_tokens"][phase] += selected

    errored = False
    output_processor = SimpleNamespace(request_states={})
    generate = add_request = shutdown = None

    async def collective_rpc(self, method: str, timeout: float | None = None) -> list[Any]:
        if self.error:
            raise self.error
        if method == "focus_info":
            return self.infos
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        await self.may_answer.wait()
        self.running -= 1
        return [self.stats, self.stats]


def focus_arguments(**changes: Any) -> Namespace:
    values = {
        "additional_config": {"focus": {"adapter": "focus.safetensors"}},
        "served_model_name": ["focus-demo"],
        "model": "folder",
        "host": None,
        "port": 8000,
        "uds": None,
        "ssl_certfile": None,
        "api_key": None,
    }
    return Namespace(**{**values, **changes})


def serve(
    scenario: Scenario,
    engine: FakeEngine,
    registry: CollectorRegistry | None = None,
    arguments: Namespace | None = None,
) -> None:
    """Do what vLLM does with an endpoint plugin, then play a client."""

    async def run() -> None:
        app = FastAPI()
        plugin = FocusEndpointPlugin(registry or CollectorRegistry())
        plugin.attach_router(app)
        await plugin.init_state(engine, app.state, arguments or focus_arguments())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            await scenario(client)

    asyncio.run(run())


def test_info_says_what_runs_and_how_much_was_read() -> None:
    engine = FakeEngine()

    async def scenario(client: httpx.AsyncClient) -> None:
        info = (await client.get("/focus/info")).json()
        assert info["attention"] == "focus"
        assert info["adapter"] == {
            "file": "focus.safetensors",
            "sha256": "0123456789ab",
            "base_model": "demo-10m",
        }
        assert (info["routed_layers"], info["dense_layers"]) == ([1, 2], [0])
        assert info["config"] == FocusConfig(num_groups=4, dense_layers=(0,)).to_dict()
        assert info["keys_read"] == {"prefill": None, "decode": None}
        assert set(info["versions"]) == {"focus_vllm", "vllm", "torch"}
        engine.read_keys("prefill", 800, 200)
        info = (await client.get("/focus/info")).json()
        assert info["keys_read"] == {"prefill": 0.25, "decode": None}

    serve(scenario, engine)


def test_layers_of_pipeline_parallel_workers_are_listed_together() -> None:
    engine = FakeEngine()
    first = engine.infos[0]
    assert first is not None
    engine.infos = [first, {**first, "routed_layers": [3], "dense_layers": [4]}]

    async def scenario(client: httpx.AsyncClient) -> None:
        info = (await client.get("/focus/info")).json()
        assert (info["routed_layers"], info["dense_layers"]) == ([1, 2, 3], [0, 4])

    serve(scenario, engine)


def test_counters_follow_the_first_worker_without_counting_twice() -> None:
    engine, registry = FakeEngine(), CollectorRegistry()

    def value(name: str, phase: str) -> float | None:
        return registry.get_sample_value(name, {"phase": phase})

    async def scenario(client: httpx.AsyncClient) -> None:
        assert value("focus_attn_candidate_tokens_total", "decode") == 0
        for _ in range(2):
            engine.read_keys("prefill", 800, 200)
            engine.read_keys("decode", 30, 10)
            await client.get("/focus/info")
            await client.get("/focus/info")
        assert value("focus_attn_candidate_tokens_total", "prefill") == 1600
        assert value("focus_attn_selected_tokens_total", "prefill") == 400
        assert value("focus_attn_candidate_tokens_total", "decode") == 60
        assert value("focus_attn_selected_tokens_total", "decode") == 20

    serve(scenario, engine, registry)


def test_counters_grow_without_anybody_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOCUS_STATS_INTERVAL", "0.01")
    engine, registry = FakeEngine(), CollectorRegistry()

    async def scenario(client: httpx.AsyncClient) -> None:
        engine.read_keys("decode", 30, 10)
        await asyncio.sleep(0.2)
        assert registry.get_sample_value("focus_attn_selected_tokens_total", {"phase": "decode"}) == 10
        engine.error = RuntimeError("engine is busy")
        await asyncio.sleep(0.1)
        engine.error = None
        engine.read_keys("decode", 30, 10)
        await asyncio.sleep(0.2)
        assert registry.get_sample_value("focus_attn_selected_tokens_total", {"phase": "decode"}) == 20

    serve(scenario, engine, registry)


def test_build_and_adapter_are_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOCUS_COMMIT", "abc1234")
    registry = CollectorRegistry()

    async def scenario(client: httpx.AsyncClient) -> None:
        versions = (await client.get("/focus/info")).json()["versions"]
        build = {"version": versions["focus_vllm"], "vllm": versions["vllm"], "commit": "abc1234"}
        assert registry.get_sample_value("focus_build_info", build) == 1
        adapter = {"adapter": "focus.safetensors", "sha256": "0123456789ab", "base_model": "demo-10m"}
        assert registry.get_sample_value("focus_adapter_info", adapter) == 1

    serve(scenario, FakeEngine(), registry)


def test_only_the_first_of_several_api_servers_counts() -> None:
    registry = CollectorRegistry()

    async def scenario(client: httpx.AsyncClient) -> None:
        assert (await client.get("/focus/info")).json()["attention"] == "focus"

    serve(scenario, FakeEngine(rank=1), registry)
    assert not [metric.name for metric in registry.collect() if metric.name.startswith("focus_attn")]


def test_one_call_to_the_workers_at_a_time_and_info_does_not_wait_for_it_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.endpoints.STATS_TIMEOUT", 0.05)
    monkeypatch.setenv("FOCUS_STATS_INTERVAL", "0.01")
    engine = FakeEngine()

    async def scenario(client: httpx.AsyncClient) -> None:
        engine.read_keys("prefill", 10, 5)
        await client.get("/focus/info")
        engine.read_keys("prefill", 10, 0)
        engine.may_answer.clear()
        answers = await asyncio.gather(*(client.get("/focus/info") for _ in range(5)))
        assert [answer.json()["keys_read"]["prefill"] for answer in answers] == [0.5] * 5
        assert answers[0].json()["keys_read_age_seconds"] >= 0.04
        engine.may_answer.set()
        assert (await client.get("/focus/info")).json()["keys_read"]["prefill"] == 0.25

    serve(scenario, engine)
    assert engine.most_running == 1


def test_a_poller_reports_a_failed_read_and_goes_on() -> None:
    async def run() -> None:
        engine = FakeEngine()
        poller = StatsPoller(engine, None)
        engine.error = RuntimeError("engine is busy")
        assert not await poller.refresh(timeout=1)
        engine.error = None
        assert await poller.refresh(timeout=1)

    asyncio.run(run())


async def nothing(_: httpx.AsyncClient) -> None:
    return


def test_a_worker_without_focus_stops_the_start() -> None:
    engine = FakeEngine()
    engine.infos[1] = None
    with pytest.raises(LaunchError, match="off in 1 of 2 workers"):
        serve(nothing, engine)


def test_workers_that_do_not_know_focus_stop_the_start() -> None:
    engine = FakeEngine()
    engine.error = RuntimeError("'Worker' object has no attribute 'focus_info'")
    with pytest.raises(LaunchError, match="no attribute 'focus_info'"):
        serve(nothing, engine)


def test_without_an_adapter_info_says_dense_and_asks_no_worker() -> None:
    engine, registry = FakeEngine(), CollectorRegistry()
    engine.error = AssertionError("a worker was asked")

    async def scenario(client: httpx.AsyncClient) -> None:
        info = (await client.get("/focus/info")).json()
        assert (info["attention"], info["adapter"], info["routed_layers"]) == ("dense", None, [])

    serve(scenario, engine, registry, focus_arguments(additional_config={}))
    assert "focus_adapter_info" not in {sample.name for each in registry.collect() for sample in each.samples}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "curl http://localhost:8000/v1/completions "),
        ({"host": "0.0.0.0"}, "curl http://localhost:8000/"),
        ({"host": "::1", "port": 9}, "curl 'http://[::1]:9/"),
        ({"host": "10.0.0.7", "ssl_certfile": "c.pem"}, "curl https://10.0.0.7:8000/"),
        ({"uds": "/run/a b"}, "curl --unix-socket '/run/a b' http://localhost/v1/completions "),
        ({"served_model_name": None}, '"model": "folder"'),
        ({"api_key": ["secret"]}, '-H "Authorization: Bearer $VLLM_API_KEY"'),
    ],
)
def test_curl_line_reaches_the_server(changes: dict[str, Any], expected: str) -> None:
    line = curl_line(focus_arguments(**changes))
    assert expected in line
    assert "secret" not in line


def test_metrics_survive_several_api_server_processes(tmp_path: Path) -> None:
    script = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from server.metrics import FocusMetrics
metrics = FocusMetrics()
metrics.count("prefill", candidate=8, selected=2, dense_queries=3)
metrics.describe(
    {"focus_vllm": "1", "vllm": "2"}, "c", {"file": "f", "sha256": "0", "base_model": "m"}
)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
import sys
sys.stdout.write(generate_latest(registry).decode())
"""
    scraped = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert 'focus_attn_candidate_tokens_total{phase="prefill"} 8.0' in scraped
    assert 'focus_attn_selected_tokens_total{phase="prefill"} 2.0' in scraped
    assert 'focus_attn_fallback_total{phase="prefill",reason="dense_below"} 3.0' in scraped
    assert 'focus_build_info{commit="c",version="1",vllm="2"} 1.0' in scraped
    assert 'focus_adapter_info{adapter="f",base_model="m",sha256="0"} 1.0' in scraped


def test_the_plugin_fits_vllms_contract() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert isinstance(FocusEndpointPlugin(), EndpointPlugin)


def test_the_gate_counts_responses_refusals_and_requests_under_way() -> None:
    registry = CollectorRegistry()
    gate = GateMetrics(registry)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("focus_rejected_total", reason="too_large") == 0
    assert value("focus_stream_incomplete_total", kind="disconnect") == 0
    gate.set_state(ready=True, draining=False)
    gate.started("/v1/completions")
    gate.started("/v1/completions")
    gate.finished("/v1/completions", "POST", 503)
    gate.rejected("queue")
    gate.stream_incomplete("no_done")
    assert value("focus_http_inflight", route="/v1/completions") == 1
    assert value("focus_http_requests_total", route="/v1/completions", method="POST", code="503") == 1
    assert value("focus_rejected_total", reason="queue") == 1
    assert value("focus_stream_incomplete_total", kind="no_done") == 1
    assert (value("focus_ready"), value("focus_draining")) == (1, 0)
