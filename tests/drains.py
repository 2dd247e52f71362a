"""What a server must do while it drains, watched by clients that go on asking."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from loadtest.serving import Server, apart

MODEL = "focus-demo"


def body(seed: int = 0, length: int = 20, tokens: int = 12, **more: Any) -> dict[str, Any]:
    """Return a request whose prompt no other has had: one in the prefix cache would need no prefill."""
    prompt = [5 + (seed * 7919 + position * (seed + 3)) % 9000 for position in range(length)]
    return {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **more}


def post(url: str, content: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=content, timeout=120, **options)


def until(condition: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(server: Server) -> float:
    """Return how many requests the engine computes, as vLLM counts them."""
    metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def in_background(function: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def check_drain(server: Server, begin: Callable[[], Any]) -> None:
    """Let clients ask, call `begin`, and see that the server finishes what it has begun, and nothing else."""
    answers: list[tuple[int, httpx.Response]] = []
    cut_off: list[Exception] = []
    gone = threading.Event()

    def ask(seed: int, tokens: int) -> None:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            while not gone.is_set():
                content = body(seed, tokens=tokens, stream=bool(seed % 2))
                response = None
                try:
                    with client.stream("POST", "/v1/completions", json=content) as response:
                        response.read()
                    answers.append((tokens, response))
                    if response.status_code == 503:
                        gone.wait(0.05)  # clients that ask hundreds of times a second take the server's core
                except httpx.ConnectError:
                    gone.set()  # nobody listens any more
                except httpx.TransportError as error:
                    # Between the last answer and the exit a connection may be closed, but never within one.
                    if response:
                        cut_off.append(error)
                seed += 1000

    with apart(server):
        threads = [in_background(lambda seed=seed: ask(seed, 1200 + 50 * seed)) for seed in range(4)]  # type: ignore[misc]
        until(lambda: running(server) == 4, seconds=60)
        threads += [in_background(lambda seed=seed: ask(seed, 2)) for seed in (10, 11)]  # type: ignore[misc]
        until(lambda: len(answers) > 5, seconds=60)
        assert max(tokens for tokens, _ in answers) == 2
        begin()
        assert server.process.wait(timeout=100) == 0
        gone.set()
        for thread in threads:
            thread.join(30)
    complete = [(tokens, answer) for tokens, answer in answers if answer.status_code == 200]
    refused = [answer for _, answer in answers if answer.status_code == 503]
    assert cut_off == []
    assert len(complete) + len(refused) == len(answers)
    assert sum(tokens > 2 for tokens, _ in complete) == 4
    for tokens, answer in complete:
        if answer.headers["content-type"].startswith("text/event-stream"):
            *chunks, done, rest = answer.text.split("\n\n")
            assert (done, rest) == ("data: [DONE]", "")
            assert json.loads(chunks[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        else:
            assert answer.json()["usage"]["completion_tokens"] == tokens
    assert refused
    for answer in refused:
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["message"] == "the server is shutting down"
