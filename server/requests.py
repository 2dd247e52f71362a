"""What vLLM's own statistics leave out: requests under way, and those that are given up."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from server.metrics import RequestMetrics
from server.stat_logger import FocusStatLogger

LAG_INTERVAL = 0.5
"""Seconds between two looks at the event loop."""


class RequestWatch:
    """Sees every request on its way to the engine and back, through the client's own methods."""

    def __init__(self, client: Any, stat_logger: FocusStatLogger) -> None:
        """Put itself in front of `generate`, `abort` and `shutdown` of vLLM's AsyncLLM `client`."""
        self._client = client
        self._model_name = stat_logger.model_name
        self._metrics = stat_logger.metrics
        self._progress = stat_logger.progress
        self._stopping = False
        self._decoding: set[str] = set()
        self._generate, self._abort, self._shutdown = client.generate, client.abort, client.shutdown
        client.generate, client.abort, client.shutdown = self.generate, self.abort, self.shutdown

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """Do what vLLM's method does, and count a request that does not come to its end."""
        num_tokens = _prompt_tokens(prompt)
        started = time.monotonic()
        key = object()
        finished = decoding = False
        cause = None
        self._metrics.change_inflight(num_tokens)
        self._progress.submit(key)
        outputs = self._generate(prompt, sampling_params, request_id, *args, **kwargs)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    decoding = decoding or any(completion.token_ids for completion in output.outputs)
                    finished = output.finished
                    if finished and any(each.finish_reason == "abort" for each in output.outputs):
                        cause = self._cause()
                    yield output
        except (asyncio.CancelledError, GeneratorExit):
            cause = cause if finished else self._cause()
            raise
        except (EngineDeadError, EngineGenerateError):
            cause = "error"
            for internal_id in self._client.output_processor.external_req_ids.get(request_id, ()):
                self._note_phase(internal_id)
            raise
        finally:
            self._progress.end(key)
            self._metrics.change_inflight(-num_tokens)
            decoding = decoding or request_id in self._decoding
            self._decoding.discard(request_id)
            if cause:
                phase = "decode" if decoding else "queue_or_prefill"
                self._metrics.abort(
                    self._model_name, num_tokens, phase, cause, elapsed=time.monotonic() - started
                )

    async def abort(self, request_id: Any, internal: bool = False) -> None:
        """Do what vLLM's method does, which forgets how far the request was."""
        if internal:
            self._note_phase(request_id)
        await self._abort(request_id, internal=internal)

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Do what vLLM's method does; whatever ends from now on was not given up by its client."""
        self._stopping = True
        self._shutdown(*args, **kwargs)

    def _cause(self) -> str:
        return "shutdown" if self._stopping else "client"

    def _note_phase(self, internal_id: str) -> None:
        # Without streaming there is no output before the last, so only vLLM's state tells the phase.
        processor = self._client.output_processor
        parent = processor.parent_requests.get(internal_id)
        for child in parent.child_requests if parent else [internal_id]:
            state = processor.request_states.get(child)
            if state is not None and not state.is_prefilling:
                self._decoding.add(state.external_req_id)


async def watch_event_loop(metrics: RequestMetrics) -> None:
    """Measure how late this process's event loop is, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_INTERVAL
        await asyncio.sleep(LAG_INTERVAL)
        metrics.lag(loop.time() - due)


def _prompt_tokens(prompt: Any) -> int:
    """Return the length of a rendered prompt; 0 if it is raw text, which vLLM's server never passes."""
    token_ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    return len(token_ids) if token_ids is not None else 0
