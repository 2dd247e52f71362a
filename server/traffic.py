"""What is under way in this API server process: every request, and whether new ones are taken."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextvars import ContextVar
from typing import Any

from server.metrics import GateMetrics

DONE_PATHS = ("/v1/completions", "/v1/chat/completions")
"""Where a stream ends in `data: [DONE]`."""


@dataclasses.dataclass(eq=False, slots=True)
class Exchange:
    """One HTTP request and what has become of it."""

    request_id: str
    method: str
    path: str
    started: float = dataclasses.field(default_factory=time.monotonic)
    """`time.monotonic()`."""
    key: str = ""
    """Name of the API key."""
    status: int = 0
    """Of the response; 0 until it starts, 499 if the client left before."""
    is_stream: bool = False
    complete: bool = False
    """The application gave the whole response."""
    prompt_tokens: int = 0
    tokens: int = 0
    """Generated."""
    first_token: float | None = None
    """Seconds from the request to the first token."""
    client_left: bool = False
    timed_out: bool = False
    error: str = ""
    body: str = ""
    """What the log shall show of the request's; empty unless it was asked for."""
    saw_done: bool = False
    saw_abort: bool = False
    saw_error: bool = False
    charge: Callable[[int], object] = lambda tokens: None
    """Takes tokens off the key's allowance."""

    def see(self, chunk: bytes) -> None:
        """Note how a stream goes on."""
        self.saw_done = chunk.endswith(b"[DONE]\n\n")
        self.saw_abort = self.saw_abort or b'"finish_reason":"abort"' in chunk
        self.saw_error = self.saw_error or chunk.startswith((b'data: {"error":', b"event: error"))

    def incomplete(self) -> str:
        """Return why a stream ended too early, one of metrics.INCOMPLETE, or "" if it did not."""
        if not self.is_stream:
            return ""
        if self.client_left:
            return "disconnect"
        if self.saw_error or self.timed_out:
            return "error_event"
        if self.saw_abort:
            return "abort"
        if not self.complete or (self.path in DONE_PATHS and not self.saw_done):
            return "no_done"
        return ""


current: ContextVar[Exchange | None] = ContextVar("current", default=None)
"""The exchange on whose behalf the engine is called."""


class Traffic:
    """The requests for work under way, and the queue: those of them without a first token."""

    def __init__(self, metrics: GateMetrics) -> None:
        """Start with nothing under way."""
        self.metrics = metrics
        self.draining = False
        self._active: set[Exchange] = set()
        # Admitted, not yet known to the engine: the tokens each may have.
        self._pending: dict[Exchange, int] = {}
        self._states: Mapping[str, Any] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> int:
        """Requests for work that have begun and not ended."""
        return len(self._active)

    def queue(self) -> tuple[int, int]:
        """Return how many requests, and how many prompt tokens in them, wait for their first token."""
        prompts = [state.prompt_len for state in self._states.values() if state.is_prefilling]
        return len(prompts) + len(self._pending), sum(prompts) + sum(self._pending.values())

    def begin(self, exchange: Exchange, tokens: int) -> None:
        """Note that `exchange`, with a prompt of about that many tokens, has been admitted."""
        self._active.add(exchange)
        self._pending[exchange] = tokens
        self._idle.clear()

    def end(self, exchange: Exchange) -> None:
        """Forget `exchange`."""
        self._pending.pop(exchange, None)
        self._active.discard(exchange)
        if not self._active:
            self._idle.set()

    async def wait_until_idle(self, timeout: float) -> bool:
        """Wait until nothing is under way; False if something still is after `timeout` seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def watch(self, engine_client: Any) -> None:
        """See from now on what vLLM's `engine_client` does for the exchanges."""
        self._states = engine_client.output_processor.request_states
        generate, add_request = engine_client.generate, engine_client.add_request

        async def watched_add(request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = await add_request(request_id, prompt, *args, **kwargs)
            if exchange := current.get():
                self._pending.pop(exchange, None)
                if isinstance(prompt, dict):
                    tokens = len(prompt.get("prompt_token_ids") or ())
                    exchange.prompt_tokens += tokens
                    exchange.charge(tokens)
            return outputs

        def watched_generate(
            prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
        ) -> AsyncGenerator[Any, None]:
            outputs: AsyncGenerator[Any, None] = generate(prompt, sampling_params, *args, **kwargs)
            exchange = current.get()
            kind = getattr(sampling_params, "output_kind", None)
            cumulative = getattr(kind, "name", "") == "CUMULATIVE"
            return _follow(exchange, outputs, cumulative) if exchange else outputs

        engine_client.add_request, engine_client.generate = watched_add, watched_generate


async def _follow(
    exchange: Exchange, outputs: AsyncGenerator[Any, None], cumulative: bool
) -> AsyncGenerator[Any, None]:
    seen: dict[int, int] = {}
    try:
        async for output in outputs:
            if exchange.first_token is None:
                latency = getattr(output.metrics, "first_token_latency", 0)
                exchange.first_token = latency or time.monotonic() - exchange.started
            # Deltas and the end alone add up; /inference/v1/generate repeats all tokens so far.
            for choice in output.outputs:
                exchange.tokens += len(choice.token_ids)
                if cumulative:
                    exchange.tokens -= seen.get(choice.index, 0)
                    seen[choice.index] = len(choice.token_ids)
            yield output
    finally:
        # vLLM frees the engine when its generator is closed, which must not wait for the collector.
        await outputs.aclose()
