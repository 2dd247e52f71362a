"""The gate before a real uvicorn: keys, limits, time, what is refused, and what is written down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from stub_server import StubServer, stub_server

from server.endpoints import FocusEndpointPlugin
from server.gate import Gate, Refused
from server.keys import make_key
from server.launch import GATE

IDS = {"prompt": [1, 2, 3]}


def post(server: StubServer, body: Any = IDS, **options: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=20, **options)


def error(response: httpx.Response) -> str:
    """Return the message of an OpenAI error body."""
    (content,) = response.json().values()
    assert list(response.json()) == ["error"]
    assert set(content) == {"message", "type", "param", "code"}
    assert content["code"] == response.status_code
    return str(content["message"])


def silence(server: StubServer, seconds: float) -> None:
    """Let the stub's engine keep the next first token to itself for so long."""
    server.call(server.engine.prefilled.clear)
    loop = server.app.state.loop
    loop.call_soon_threadsafe(loop.call_later, seconds, server.engine.prefilled.set)


def until(condition: Callable[[], Any], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def connect(server: StubServer, body: Any = IDS, receive_buffer: int = 0) -> socket.socket:
    """Post `body` over a bare connection, from which nothing is read."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, int(port)))
    text = json.dumps(body)
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(text)}\r\n\r\n{text}".encode()
    )
    return connection


@pytest.fixture
def server() -> Iterator[StubServer]:
    with stub_server() as running:
        yield running


class Log(logging.Handler):
    """Keeps what the server's own loggers say."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def text(self) -> str:
        return "\n".join(record.getMessage() for record in self.records)


@pytest.fixture
def log() -> Iterator[Log]:
    logger, handler = logging.getLogger("vllm.focus_serve"), Log()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)


@contextlib.contextmanager
def waiting(server: StubServer, *bodies: Any) -> Iterator[list[socket.socket]]:
    """Leave requests waiting for their first token."""
    server.call(server.engine.prefilled.clear)
    before = len(server.engine.states)
    connections = [connect(server, body) for body in bodies]
    until(lambda: len(server.engine.states) == before + len(bodies))
    try:
        yield connections
    finally:
        server.call(server.engine.prefilled.set)
        for connection in connections:
            connection.close()


# Keys


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """Write a file of two keys and return them."""
    made = {name: make_key(name) for name in ("alice", "bob")}
    (tmp_path / "keys.toml").write_text("\n".join(line for _, line in made.values()))
    return {name: key for name, (key, _) in made.items()}


def bearer(key: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {key}"}}


def test_every_route_of_vllm_needs_a_key_but_the_probes(
    tmp_path: Path, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.entrypoints.openai.api_server import build_app
    from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setenv("FOCUS_API_KEY_FILE", str(tmp_path / "keys.toml"))
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--middleware", GATE])
    app = build_app(args, ("generate", "embed", "score"))
    FocusEndpointPlugin(CollectorRegistry()).attach_router(app)
    (tmp_path / "keys.toml").write_text(make_key("bob")[1])  # alice's is revoked
    routes = [
        (method, re.sub(r"{[^}]*}", "x", route.path))
        for route in app.routes
        for method in getattr(route, "methods", None) or ["GET"]
    ]
    assert len(routes) >= 40
    assert {"/metrics", "/tokenize", "/invocations", "/openapi.json", "/focus/drain"} <= {
        path for _, path in routes
    }

    async def ask() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for method, path in [*routes, ("GET", "/x"), ("GET", "/metrics/"), ("POST", "//v1/completions")]:
                for headers in (
                    {},
                    {"Authorization": "Bearer wrong"},
                    {"Authorization": f"Bearer {keys['alice']}"},
                    {"Authorization": f"Basic {keys['bob']}"},
                    {"X-API-Key": ""},
                ):
                    response = await client.request(method, path, headers=headers)
                    # The status page is static, and asks its reader for a key.
                    public = path in ("/livez", "/readyz", "/startupz", "/health", "/")
                    assert (response.status_code == 401) != public, (method, path, headers)
                    if not public and method != "HEAD":
                        assert "API key" in error(response)
                        assert response.headers["www-authenticate"] == "Bearer"

    # The probes' own answers need an engine; that they are asked at all is what counts here.
    app.state.engine_client = type("Engine", (), {"check_health": staticmethod(lambda: asyncio.sleep(0))})()
    asyncio.run(ask())


def test_a_key_opens_every_route_until_it_is_revoked(tmp_path: Path, keys: dict[str, str]) -> None:
    file = tmp_path / "keys.toml"
    with stub_server(api_key_file=file) as server:
        for name in keys:
            assert httpx.get(f"{server.url}/version", **bearer(keys[name])).status_code == 200
            assert post(server, **bearer(keys[name])).status_code == 200
        assert post(server, headers={"X-API-Key": keys["bob"]}).status_code == 200
        lines = file.read_text().splitlines()
        file.write_text(lines[1])
        assert post(server, **bearer(keys["alice"])).status_code == 401
        assert post(server, **bearer(keys["bob"])).status_code == 200
        assert server.value("focus_rejected_total", reason="auth") == 1


def test_a_broken_file_of_keys_changes_nothing_and_is_reported(
    tmp_path: Path, keys: dict[str, str], log: Log
) -> None:
    file = tmp_path / "keys.toml"
    with stub_server(api_key_file=file) as server:
        file.write_text("alice = {sha256 = 'secret that was pasted'}")
        assert post(server, **bearer(keys["bob"])).status_code == 200
        file.unlink()
        assert post(server, **bearer(keys["bob"])).status_code == 200
        key, line = make_key("carol")
        file.write_text(line)
        assert post(server, **bearer(key)).status_code == 200
        assert post(server, **bearer(keys["bob"])).status_code == 401
    assert "alice.sha256 is wrong" in log.text()
    assert "secret that was pasted" not in log.text()


def test_a_browser_may_ask_whether_it_may_ask_without_a_key(tmp_path: Path, keys: dict[str, str]) -> None:
    with stub_server(api_key_file=tmp_path / "keys.toml") as server:
        plain = httpx.options(f"{server.url}/version")
        preflight = httpx.options(
            f"{server.url}/version", headers={"Origin": "http://a", "Access-Control-Request-Method": "GET"}
        )
    assert plain.status_code == 401
    assert preflight.status_code == 405  # vLLM's CORS middleware, which the stub has not, would answer


def test_a_websocket_is_closed_before_it_opens_without_a_key(tmp_path: Path, keys: dict[str, str]) -> None:
    with stub_server(api_key_file=tmp_path / "keys.toml") as server:
        messages: list[Any] = []

        async def send(message: Any) -> None:
            messages.append(message)

        scope = {
            "type": "websocket",
            "path": "/v1/realtime",
            "headers": [(b"authorization", b"Bearer wrong")],
        }
        asyncio.run(server.app(scope, asyncio.Event().wait, send))  # type: ignore[arg-type]
        assert [message["type"] for message in messages] == ["websocket.close"]
        assert server.value("focus_rejected_total", reason="auth") == 1


# Limits


def test_requests_per_minute_are_counted_by_key(tmp_path: Path) -> None:
    (key, line), (other, unlimited) = make_key("slow"), make_key("fast")
    file = tmp_path / "keys.toml"
    file.write_text(line + "\n" + unlimited.replace("}", ", requests_per_minute = 0}"))
    with stub_server(api_key_file=file, requests_per_minute=2) as server:
        assert [post(server, **bearer(key)).status_code for _ in range(3)] == [200, 200, 429]
        refused = post(server, {**IDS, "stream": True}, **bearer(key))
        assert "2 requests per minute for the key 'slow'" in error(refused)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert [post(server, **bearer(other)).status_code for _ in range(4)] == [200] * 4
        assert httpx.get(f"{server.url}/version", **bearer(key)).status_code == 200
        assert server.value("focus_rejected_total", reason="rate_limit") == 2


def test_tokens_per_minute_count_prompts_and_what_was_generated() -> None:
    with stub_server(tokens_per_minute=20) as server:
        assert [post(server).status_code for _ in range(4)] == [200, 200, 200, 200]  # 3 + 3 each
        refused = post(server)
        assert (refused.status_code, "20 tokens per minute" in error(refused)) == (429, True)
        assert server.value("focus_rejected_total", reason="rate_limit") == 1


def test_a_full_queue_is_a_503_before_any_stream_starts() -> None:
    with stub_server(max_queued_requests=2) as server:
        with waiting(server, IDS, {**IDS, "stream": True}):
            for body in (IDS, {**IDS, "stream": True}):
                refused = post(server, body)
                assert refused.status_code == 503
                assert refused.headers["content-type"] == "application/json"
                assert refused.headers["retry-after"] == "1"
                assert "2 requests are waiting" in error(refused)
        until(lambda: not server.engine.states)
        assert post(server).status_code == 200
        assert server.value("focus_rejected_total", reason="queue") == 2


def test_a_queue_full_of_prompt_tokens_refuses_but_takes_one_prompt_of_any_length() -> None:
    with stub_server(max_queued_tokens=100) as server:
        with waiting(server, {"prompt": [5] * 150}):
            assert "150 prompt tokens are waiting" in error(post(server))
        until(lambda: not server.engine.states)
        with waiting(server, {"prompt": [5] * 50}):
            assert post(server, {"prompt": [5] * 120}).status_code == 503
        assert server.value("focus_rejected_total", reason="tokens") == 2


def test_a_request_past_its_first_token_is_no_longer_in_the_queue() -> None:
    with stub_server(max_queued_requests=1) as server:
        # More than the buffers of a connection hold, so it stays under way.
        slow = connect(server, {**IDS, "stream": True, "max_tokens": 500, "text": "x" * 60_000}, 4096)
        until(lambda: server.engine.states and not server.app.state.traffic.queue()[0])
        assert server.app.state.traffic.active == 1
        assert post(server).status_code == 200
        slow.close()


@pytest.mark.parametrize("sizes", [[2**20 + 1], [2**20, 1], [2**19, 2**19, 1]])
def test_the_last_part_of_a_body_counts_too(sizes: list[int]) -> None:
    async def receive() -> dict[str, Any]:
        part = b"x" * sizes.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(sizes)}

    gate = SimpleNamespace(_settings=SimpleNamespace(max_body_mb=1))
    with pytest.raises(Refused, match="the body has over 1 MiB"):
        asyncio.run(Gate._read(gate, receive, declared=0))  # type: ignore[arg-type]


def test_a_body_that_is_too_large_is_a_413(server: StubServer) -> None:
    def chunks(size: int) -> Iterator[bytes]:
        yield b'{"prompt": [1], "x": "'
        for _ in range(size // 2**16):
            yield b"x" * 2**16
        yield b'"}'

    with stub_server(max_body_mb=1) as server:
        for content in (b" " * (2**20 + 1), chunks(2**20 + 2**17)):
            refused = httpx.post(f"{server.url}/v1/completions", content=content, timeout=20)
            assert (refused.status_code, error(refused)) == (413, "the body has over 1 MiB")
        headers = {"Content-Type": "application/json"}
        fits = httpx.post(f"{server.url}/v1/completions", content=chunks(2**19), headers=headers)
        assert fits.status_code == 200
        assert server.value("focus_rejected_total", reason="too_large") == 2
        assert len(server.engine.seen) == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"prompt": "\xff\xfe"}', "utf-8"),
        (b'{"prompt": [1], "stop": "\\ud800"}', "utf-8"),
        (b'{"prompt": [1], "seed": ' + b"9" * 30 + b"}", "more than 64 bits"),
        (b'{"prompt": [1], "seed": ' + b"-9" + b"9" * 5000 + b"}", "more than 64 bits"),
        (b'{"prompt": [1], "a": ' + b"[" * 150 + b"]" * 150 + b"}", "over 100 levels"),
        (b'{"prompt": [1], "a": ' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"}", "over 100 levels"),
        (b'{"prompt": [1], "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
    ],
)
def test_json_that_would_break_the_engine_is_a_400(server: StubServer, body: bytes, reason: str) -> None:
    headers = {"Content-Type": "application/json"}
    refused = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert refused.status_code == 400
    assert reason in error(refused)
    assert server.engine.seen == []


def test_long_numbers_and_many_brackets_within_text_are_fine(server: StubServer) -> None:
    assert post(server, {**IDS, "text": "9" * 50 + "[{" * 500 + "\U0001f600"}).status_code == 200
    assert post(server, {"prompt": [1] * 300, "messages": [[i] for i in range(300)]}).status_code == 200


# Time


def test_a_request_over_its_time_is_a_504_and_frees_the_engine() -> None:
    with stub_server(request_timeout=0.3) as server:
        server.call(server.engine.prefilled.clear)
        refused = post(server)
        assert (refused.status_code, error(refused)) == (504, "the request took longer than 0.3 seconds")
        until(lambda: server.engine.aborted == server.engine.seen)


def test_a_stream_over_its_time_ends_in_an_error_that_the_client_sees() -> None:
    with stub_server(request_timeout=0.3) as server:
        server.call(server.engine.prefilled.clear)
        streamed = post(server, {**IDS, "stream": True})
        assert streamed.status_code == 200
        assert (
            "took longer than 0.3 seconds"
            in json.loads(streamed.text.removeprefix("data: "))["error"]["message"]
        )
        until(lambda: server.engine.aborted == server.engine.seen)
        until(lambda: server.value("focus_stream_incomplete_total", kind="error_event") == 1)


def test_a_silent_stream_gets_empty_events_that_openais_client_skips() -> None:
    import openai

    with stub_server(sse_keep_alive=0.1) as server:
        silence(server, 0.55)
        text = post(server, {**IDS, "stream": True}).text
        assert 3 <= len(text) - len(text.lstrip("\n")) <= 12
        assert text.lstrip().startswith("data: ")
        assert text.endswith("data: [DONE]\n\n")
        silence(server, 0.25)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        chunks = list(client.completions.create(model="m", prompt=[1], stream=True))
        assert [chunk.choices[0].text for chunk in chunks] == ["x"] * 3
        assert server.value("focus_stream_incomplete_total", kind="no_done") == 0


def test_vllms_own_benchmark_client_reads_a_stream_that_was_silent() -> None:
    import aiohttp
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_completions

    async def ask(url: str) -> Any:
        request = RequestFuncInput("x", f"{url}/v1/completions", 1, 3, "m")
        async with aiohttp.ClientSession() as session:
            return await async_request_openai_completions(request, session)

    with stub_server(sse_keep_alive=0.1) as server:
        silence(server, 0.35)
        answer = asyncio.run(ask(server.url))
        assert (answer.success, answer.generated_text) == (True, "xxx"), answer.error
        assert answer.ttft >= 0.3


# Clients that leave, are slow, or many


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_first_token_frees_the_engine(
    server: StubServer, stream: bool
) -> None:
    with waiting(server, {**IDS, "stream": stream}) as (connection,):
        connection.close()
        until(lambda: server.engine.aborted == server.engine.seen, seconds=2)
        until(lambda: server.app.state.traffic.active == 0, seconds=2)
    code = "200" if stream else "499"
    labels = {"route": "/v1/completions", "method": "POST", "code": code}
    until(lambda: server.value("focus_http_requests_total", **labels) == 1)
    assert server.value("focus_stream_incomplete_total", kind="disconnect") == int(stream)


def test_a_client_that_leaves_in_the_middle_of_a_stream_frees_the_engine(server: StubServer) -> None:
    connection = connect(server, {**IDS, "stream": True, "max_tokens": 10**9})
    assert b"200 OK" in connection.recv(4096)
    connection.close()
    until(lambda: len(server.engine.aborted) == 1, seconds=2)
    until(lambda: server.app.state.traffic.active == 0, seconds=2)
    assert server.value("focus_http_inflight", route="/v1/completions") == 0


def test_a_slow_reader_holds_up_nobody(server: StubServer) -> None:
    body = {**IDS, "stream": True, "max_tokens": 500, "text": "x" * 60_000}
    slow = connect(server, body, receive_buffer=4096)
    until(lambda: server.engine.states)
    time.sleep(0.2)
    started = time.monotonic()
    assert [post(server).status_code for _ in range(20)] == [200] * 20
    assert time.monotonic() - started < 2
    assert len(server.engine.states) == 1
    slow.close()
    until(lambda: not server.engine.states, seconds=2)


def test_a_thousand_connections_at_once_are_all_answered() -> None:
    async def ask(host: str, port: str) -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return answer

    async def ask_all(url: str) -> list[bytes]:
        host, _, port = url.removeprefix("http://").partition(":")
        return await asyncio.gather(*(ask(host, port) for _ in range(1000)))

    text = json.dumps({**IDS, "stream": True})
    request = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(text)}\r\n\r\n{text}"
    ).encode()
    with stub_server(max_queued_requests=900) as server:
        server.call(server.engine.prefilled.clear)
        server.app.state.loop.call_soon_threadsafe(
            server.app.state.loop.call_later, 4, server.engine.prefilled.set
        )
        answers = asyncio.run(ask_all(server.url))
        complete = [answer for answer in answers if answer.startswith(b"HTTP/1.1 200 ")]
        assert len(complete) == 900
        assert all(b"data: [DONE]\n\n" in answer for answer in complete)
        assert sum(answer.startswith(b"HTTP/1.1 503 ") for answer in answers) == 100
        until(lambda: server.app.state.traffic.active == 0)


# What is written down


@pytest.mark.parametrize(
    ("given", "kept"), [("my-id.1", True), (None, False), ("with space", False), ("x" * 129, False)]
)
def test_the_request_id_is_the_same_for_client_engine_and_log(
    server: StubServer, log: Log, given: str | None, kept: bool
) -> None:
    response = post(server, headers={"X-Request-Id": given} if given else {})
    answered = response.headers["x-request-id"]
    assert (answered == given) == kept
    assert server.engine.seen == [answered]
    until(lambda: log.records)
    assert f"request_id={answered} " in log.text()


def test_the_access_log_is_json_without_the_prompt(log: Log) -> None:
    from server.access_log import json_handler

    with stub_server(log_format="json") as server:
        post(server, {"prompt": [424242], "text": "a secret"})
        httpx.get(f"{server.url}/version")
        httpx.get(f"{server.url}/livez")
        until(lambda: len(log.records) == 2)
    handler = json_handler()
    lines = [json.loads(handler.format(record)) for record in log.records]
    line = lines[0]
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["prompt_tokens"], line["tokens"], line["key"]) == (1, 3, "anybody")
    assert 0 < line["first_token_seconds"] <= line["seconds"] < 5
    assert "424242" not in json.dumps(lines)
    assert "secret" not in json.dumps(lines)
    assert lines[1]["path"] == "/version"


def test_prompts_are_logged_when_asked_for(log: Log) -> None:
    with stub_server(log_prompts=True) as server:
        post(server, {"prompt": [424242]})
        until(lambda: log.records)
    assert "424242" in log.text()


def test_requests_are_counted_by_route_whatever_becomes_of_them(server: StubServer) -> None:
    assert httpx.get(f"{server.url}/broken").status_code == 500
    assert httpx.get(f"{server.url}/nowhere/{'x' * 50}").status_code == 404
    post(server)
    for route, method, code in (
        ("/broken", "GET", "500"),
        ("unknown", "GET", "404"),
        ("/v1/completions", "POST", "200"),
    ):
        until(lambda: server.value("focus_http_requests_total", route=route, method=method, code=code) == 1)  # noqa: B023
        assert server.value("focus_http_inflight", route=route) == 0
