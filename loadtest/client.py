"""A client that keeps time: streamed completions of random prompts."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import aiohttp

TIMEOUT = aiohttp.ClientTimeout(total=600)
FIRST_TOKEN, LAST_TOKEN = 5, 16000
"""Ids that stand for text in the demo's vocabulary."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client saw it; times in seconds from before it was sent."""

    prompt_tokens: int
    generated_tokens: int
    ttft: float
    """To the first token."""
    e2e: float
    """To the last token."""
    finish_reason: str | None
    """None if the answer broke off."""
    done: bool
    """The stream ended in `[DONE]`."""
    error: str | None = None
    """What went wrong, the HTTP status first."""

    @property
    def complete(self) -> bool:
        """The answer is whole."""
        return self.error is None and self.done and self.finish_reason in ("stop", "length")


def random_prompt(num_tokens: int, rng: random.Random) -> list[int]:
    """Return token ids that no earlier prompt began with, so that no prefix cache helps."""
    return [rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(num_tokens)]


async def complete(
    session: aiohttp.ClientSession,
    url: str,
    prompt: Sequence[int],
    max_tokens: int,
    model: str = "focus-demo",
    **options: Any,
) -> Answer:
    """Stream one completion of exactly `max_tokens` tokens and take the time."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
        "stream_options": {"include_usage": True},
        **options,
    }
    payload = json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "X-Request-Id": uuid.uuid4().hex}
    first = last = 0.0
    generated, reason, done, error = 0, None, False, None
    started = time.perf_counter()
    try:
        async with session.post(f"{url}/v1/completions", data=payload, headers=headers) as response:
            if response.status != 200:
                error = f"{response.status} {(await response.text())[:500]}"
            async for line in response.content:
                if not line.startswith(b"data: ") or error:
                    continue
                now = time.perf_counter()
                if line.startswith(b"data: [DONE]"):
                    done = True
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    error = f"200 {chunk['error']}"
                    continue
                if chunk.get("usage"):
                    generated = chunk["usage"]["completion_tokens"]
                for choice in chunk["choices"]:
                    first, last = first or now, now
                    reason = choice["finish_reason"] or reason
    except (TimeoutError, aiohttp.ClientError) as failure:
        error = f"{type(failure).__name__} {failure}"
    return Answer(
        prompt_tokens=len(prompt),
        generated_tokens=generated,
        ttft=first - started,
        e2e=last - started,
        finish_reason=reason,
        done=done,
        error=error,
    )


async def closed_loop(
    url: str, requests: Iterable[tuple[Sequence[int], int]], concurrency: int, **options: Any
) -> list[Answer]:
    """Send `(prompt, max_tokens)` requests, `concurrency` of them at a time."""
    waiting = iter(requests)
    answers: list[Answer] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=TIMEOUT, connector=connector) as session:

        async def user() -> None:
            for prompt, max_tokens in waiting:
                answers.append(await complete(session, url, prompt, max_tokens, **options))

        await asyncio.gather(*(user() for _ in range(concurrency)))
    return answers


def percentile(values: Iterable[float], fraction: float) -> float:
    """Return the smallest value that `fraction` of them do not exceed; nan without values."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]
