"""Probes, draining and the engine's death, with an engine that only sleeps."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from stub_server import StubServer, stub_server
from test_gate import IDS, connect, error, post, until

from server.progress import EngineProgress


def probe(server: StubServer, name: str) -> tuple[int, str]:
    response = httpx.get(f"{server.url}/{name}")
    assert response.json()["ok"] == (response.status_code == 200)
    return response.status_code, response.json()["reason"]


def shut_down(server: StubServer, timeout: float) -> threading.Thread:
    """Do what vLLM does on SIGTERM."""
    thread = threading.Thread(target=server.engine.shutdown, kwargs={"timeout": timeout})
    thread.start()
    return thread


def test_before_the_engine_is_stopped_running_requests_finish_and_new_ones_are_refused() -> None:
    with stub_server() as server:
        assert [probe(server, name)[0] for name in ("startupz", "readyz", "livez")] == [200] * 3
        server.call(server.engine.prefilled.clear)
        running = connect(server, {**IDS, "stream": True})
        until(lambda: server.engine.states)
        stopping = shut_down(server, timeout=20)
        until(lambda: server.app.state.traffic.draining)
        refused = post(server)
        assert (refused.status_code, error(refused)) == (503, "the server is shutting down")
        assert refused.headers["retry-after"] == "1"
        assert [probe(server, name)[0] for name in ("startupz", "readyz", "livez")] == [200, 503, 200]
        assert httpx.get(f"{server.url}/version").status_code == 200
        assert server.value("focus_draining") == 1
        assert server.value("focus_ready") == 0
        assert server.engine.shutdowns == []
        server.call(server.engine.prefilled.set)
        stopping.join(5)
        (left,) = server.engine.shutdowns
        assert left is not None
        assert 15 < left < 20
        text = b""
        while not text.endswith(b"0\r\n\r\n"):
            text += running.recv(4096)
        assert b"data: [DONE]" in text
        running.close()


def test_a_request_that_does_not_finish_is_cut_off_after_the_drain_timeout() -> None:
    with stub_server() as server:
        server.call(server.engine.prefilled.clear)
        running = connect(server)
        until(lambda: server.engine.states)
        started = time.monotonic()
        shut_down(server, timeout=0.3).join(5)
        assert 0.3 <= time.monotonic() - started < 2
        assert server.engine.shutdowns == [0]
        running.close()
        server.call(server.engine.prefilled.set)


def test_a_dead_engine_fails_livez_and_is_told_to_the_launcher() -> None:
    with stub_server() as server:
        server.engine.errored = True
        assert probe(server, "livez") == (503, "the engine has died")
        assert probe(server, "readyz")[0] == 503
        until(lambda: server.value("focus_ready") == 0)
        server.engine.shutdown()
        assert server.lifecycle.engine_failed


def test_livez_fails_while_a_busy_engine_makes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("server.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = EngineProgress()
    monkeypatch.setattr("server.lifecycle.engine_progress", lambda engine: progress)
    with stub_server(stall_seconds=60) as server:
        progress.record(running=1, waiting=0)
        now[0] += 59
        assert probe(server, "livez")[0] == 200
        now[0] += 2
        status, reason = probe(server, "livez")
        assert (status, "not made a step for 61 seconds" in reason) == (503, True)
        progress.record(running=1, waiting=0)
        assert probe(server, "livez")[0] == 200
        progress.record(running=0, waiting=0)
        now[0] += 1000
        assert probe(server, "livez")[0] == 200


def test_without_keys_only_this_machine_may_stop_the_server() -> None:
    with stub_server() as server:
        answers = [asyncio.run(ask_from(server.app, host)) for host in ("10.0.0.7", "2001:db8::1")]
    assert [answer.status_code for answer in answers] == [403, 403]
    assert "only this machine" in error(answers[0])


async def ask_from(app: FastAPI, host: str) -> httpx.Response:
    transport = httpx.ASGITransport(app, client=(host, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post("/focus/drain")
