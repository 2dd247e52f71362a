"""What must not bring a real focus-serve down, and how it behaves when something does."""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
from drains import body, in_background, post, until
from prometheus_client.parser import text_string_to_metric_families

from loadtest.serving import FOCUS_SERVE, Server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

MODEL = "focus-demo"
STALL = 5.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose engine the last test kills."""
    log = tmp_path_factory.mktemp("faults") / "log.txt"
    settings = {"FOCUS_STALL_SECONDS": str(STALL), "FOCUS_LOG_FORMAT": "json"}
    server = Server(FOCUS_SERVE, log, settings, port=8110)
    try:
        server.wait_until_ready()
        assert post(server.url, body(tokens=2)).status_code == 200  # the first one compiles
        yield server
    finally:
        server.kill()


def value(server: Server, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(server.get("/metrics"))
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def idle(server: Server) -> bool:
    """Whether the engine has nothing to do, as vLLM itself says."""
    return value(server, "vllm:num_requests_running") == value(server, "vllm:num_requests_waiting") == 0


def log_line(server: Server, request_id: str) -> dict[str, Any]:
    """Return what the log says of a request; it is written after the response has been sent."""

    def find() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("request_id") == request_id]

    until(find, seconds=5)
    (line,) = find()
    return line


def engine(server: Server) -> psutil.Process:
    children = psutil.Process(server.process.pid).children(recursive=True)
    (process,) = (child for child in children if "EngineCore" in " ".join(child.cmdline()))
    return process


def leave(server: Server, content: dict[str, Any], after: Callable[[httpx.Response], Any]) -> None:
    """Post `content` and close the connection when `after` returns."""
    url = f"{server.url}/v1/completions"
    with (
        contextlib.suppress(httpx.TransportError),
        httpx.stream("POST", url, json=content, timeout=0.3) as response,
    ):
        after(response)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_gone_in_prefill_frees_the_engine_and_counts_as_an_abort(
    server: Server, stream: bool
) -> None:
    labels = {"phase": "queue_or_prefill", "cause": "client"}
    before = value(server, "focus_requests_aborted_total", **labels)
    long = body(seed=1 + stream, length=30_000, stream=stream)

    def wait(response: httpx.Response) -> None:
        for _ in response.iter_raw():  # nothing comes before httpx's own time is over
            raise AssertionError("a token before the prefill")

    leave(server, long, wait)
    left = time.monotonic()
    until(lambda: idle(server) and value(server, "focus_requests_aborted_total", **labels) == before + 1, 2)
    # The engine has time for others, which it would not have had for the rest of 30,000 tokens.
    assert post(server.url, body(seed=10 + stream, tokens=1)).status_code == 200
    assert time.monotonic() - left < 5


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_gone_while_decoding_frees_the_engine_and_counts_as_an_abort(
    server: Server, stream: bool
) -> None:
    labels = {"phase": "decode", "cause": "client"}
    before = value(server, "focus_requests_aborted_total", **labels)
    decoded = value(server, "vllm:generation_tokens_total")

    def wait(response: httpx.Response) -> None:
        next(response.iter_raw())

    leave(server, body(seed=20 + stream, tokens=30_000, stream=stream), wait)
    until(lambda: idle(server) and value(server, "focus_requests_aborted_total", **labels) == before + 1, 2)
    assert 0 < value(server, "vllm:generation_tokens_total") - decoded < 10_000
    time.sleep(0.3)
    still = value(server, "vllm:generation_tokens_total")
    time.sleep(0.3)
    assert value(server, "vllm:generation_tokens_total") == still


def test_json_that_killed_the_engine_is_a_400_and_the_engine_lives(server: Server) -> None:
    headers = {"Content-Type": "application/json"}
    for path, prompt in (
        ("/v1/completions", '"prompt": "a"'),
        ("/v1/chat/completions", '"messages": [{"role": "user", "content": "a"}]'),
    ):
        for field in ("structured_outputs", "metadata", "vllm_xargs"):
            nested = '{"json":' * 900 + "1" + "}" * 900
            text = f'{{"model": "{MODEL}", {prompt}, "max_tokens": 1, "{field}": {nested}}}'
            assert httpx.post(server.url + path, content=text, headers=headers).status_code == 400
        for number in ("9" * 25, "9" * 5000, "[" + "9" * 25 + "]", "1e400", "-1e400", "NaN"):
            for field in ("top_k", "seed", "max_tokens", "stop_token_ids", "temperature", "priority"):
                text = f'{{"model": "{MODEL}", {prompt}, "max_tokens": 1, "{field}": {number}}}'
                status = httpx.post(server.url + path, content=text, headers=headers, timeout=60).status_code
                assert status < 500, (path, field, number)
        for text in (b'{"prompt": "\xff\xfe"}', b"{", b"", b"[" * 10**6, b'{"prompt": "\\ud800"}'):
            assert httpx.post(server.url + path, content=text, headers=headers).status_code == 400
        for field, given in (
            ("structured_outputs", "3"),
            ("stop", '"\\ud800"'),
            ("bad_words", '["\\udfff"]'),
        ):
            text = f'{{"model": "{MODEL}", {prompt}, "{field}": {given}}}'
            refused = httpx.post(server.url + path, content=text, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, 400), field
    assert post(server.url, body(seed=30)).status_code == 200


def test_an_input_that_vllm_stumbles_over_is_a_400(server: Server) -> None:
    result = {
        "type": "function_call_output",
        "id": "a",
        "call_id": "a",
        "status": "completed",
        "created_by": None,
    }
    answer = {"type": "message", "role": "assistant", "id": "a", "status": "completed", "content": []}
    for item, reason in (
        ({"type": "item_reference", "id": "a"}, "'role' is missing"),
        ({**result, "output": [{"type": "input_text", "text": "a"}]}, "cannot read a part"),
        (answer, "out of range"),
        ({**answer, "content": [{"type": "refusal", "refusal": "a"}]}, "no attribute 'text'"),
    ):
        for stream in (False, True):
            messages = [{"role": "user", "content": "a"}, item]
            content = {"model": MODEL, "input": messages, "max_output_tokens": 1, "stream": stream}
            refused = httpx.post(f"{server.url}/v1/responses", json=content, timeout=60)
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (400, 400), item
            assert reason in error["message"]


def test_metrics_answer_within_100_ms_under_load(server: Server) -> None:
    stop = threading.Event()

    def load(seed: int) -> None:
        while not stop.is_set():
            post(server.url, body(seed=100 + seed, length=500, tokens=50, stream=True))

    threads = [in_background(lambda seed=seed: load(seed)) for seed in range(8)]  # type: ignore[misc]
    until(lambda: value(server, "vllm:num_requests_running") > 4, seconds=10)
    times = []
    with httpx.Client(base_url=server.url) as client:
        for _ in range(20):
            started = time.monotonic()
            assert client.get("/metrics").status_code == 200
            times.append(time.monotonic() - started)
            time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert statistics.median(times) < 0.1, times


def test_a_short_prompt_is_answered_while_long_ones_prefill(server: Server) -> None:
    done: list[float] = []

    def ask(seed: int) -> None:
        assert post(server.url, body(seed, length=12_000, tokens=1)).status_code == 200
        done.append(time.monotonic())

    threads = [in_background(lambda seed=seed: ask(seed)) for seed in (60, 61)]  # type: ignore[misc]
    until(lambda: value(server, "focus_inflight_prompt_tokens") == 24_000, seconds=10)
    assert post(server.url, body(seed=62, tokens=1)).status_code == 200
    assert done == []
    for thread in threads:
        thread.join(120)
    assert len(done) == 2


def test_the_model_is_listed_with_its_adapter(server: Server) -> None:
    (model,) = json.loads(server.get("/v1/models"))["data"]
    assert model["id"] == MODEL
    assert model["adapter"] == json.loads(server.get("/focus/info"))["adapter"]


def test_every_request_is_one_json_line_without_its_prompt(server: Server) -> None:
    marked = {"model": MODEL, "prompt": "xylophonic marmalade", "max_tokens": 3, "ignore_eos": True}
    post(server.url, marked, headers={"X-Request-Id": "find-me"})
    line = log_line(server, "find-me")
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["prompt_tokens"] > 2, line["tokens"]) == (True, 3)
    assert 0 < line["first_token_seconds"] <= line["seconds"]
    assert line["time"].startswith("20")
    assert "xylophonic" not in server.log.read_text()


def test_tokens_are_counted_once_where_vllm_repeats_them(server: Server) -> None:
    content = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 30, "ignore_eos": True}}
    url, headers = f"{server.url}/inference/v1/generate", {"X-Request-Id": "count-me"}
    assert httpx.post(url, json=content, headers=headers, timeout=60).status_code == 200
    line = log_line(server, "count-me")
    assert (line["prompt_tokens"], line["tokens"]) == (3, 30)


def test_an_engine_that_does_not_move_fails_livez_until_it_does(server: Server) -> None:
    process = engine(server)
    process.send_signal(signal.SIGSTOP)
    try:
        waiting = in_background(lambda: post(server.url, body(seed=40)))
        until(lambda: httpx.get(f"{server.url}/livez", timeout=10).status_code == 503, STALL + 5)
        assert "not made a step" in httpx.get(f"{server.url}/livez").json()["reason"]
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        assert httpx.get(f"{server.url}/startupz").status_code == 200
    finally:
        process.send_signal(signal.SIGCONT)
    waiting.join(30)
    assert httpx.get(f"{server.url}/livez").status_code == 200


def test_a_killed_engine_fails_requests_and_probes_and_ends_the_server(server: Server) -> None:
    answers: list[Any] = []

    def ask(seed: int) -> None:
        try:
            with httpx.stream(
                "POST",
                f"{server.url}/v1/completions",
                json=body(seed, tokens=20_000, stream=bool(seed % 2)),
                timeout=60,
            ) as response:
                answers.append((response.status_code, response.read().decode()))
        except httpx.TransportError as error:
            answers.append((None, str(error)))

    before = value(server, "vllm:num_requests_running")
    threads = [in_background(lambda seed=seed: ask(seed)) for seed in range(50, 54)]  # type: ignore[misc]
    until(lambda: value(server, "vllm:num_requests_running") == before + 4, seconds=10)
    engine(server).kill()
    killed = time.monotonic()

    def dead() -> bool:
        try:
            return httpx.get(f"{server.url}/livez", timeout=5).status_code == 503
        except httpx.TransportError:
            return True

    until(dead, seconds=10)
    for thread in threads:
        thread.join(30)
    assert len(answers) == 4
    for status, text in answers:
        # A stream had begun with 200: it ends in an error, not as if it were complete.
        assert status in (500, None) or ("error" in text and '"finish_reason":"length"' not in text)
    assert server.process.wait(timeout=30) == 1
    assert time.monotonic() - killed < 40
