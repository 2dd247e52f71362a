"""A real uvicorn with the real gate and lifecycle, around an engine that only sleeps."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from server.endpoints import FocusEndpointPlugin
from server.gate import Gate
from server.settings import Settings


class StubEngine:
    """Speaks as vLLM's AsyncLLM does: first tokens come when `prefilled` is set, the others at once."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(_api_process_rank=1, _api_process_count=1),
            model_config=SimpleNamespace(served_model_name="stub", max_model_len=8192),
        )
        self.states: dict[str, Any] = {}
        self.output_processor = SimpleNamespace(request_states=self.states)
        self.errored = False
        self.prefilled = asyncio.Event()
        self.prefilled.set()
        self.aborted: list[str] = []
        self.seen: list[str] = []
        self.shutdowns: list[float | None] = []

    async def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self.seen.append(request_id)
        self.states[request_id] = SimpleNamespace(
            is_prefilling=True, prompt_len=len(prompt["prompt_token_ids"])
        )

    async def generate(self, prompt: Any, params: int, request_id: str) -> AsyncGenerator[Any, None]:
        await self.add_request(request_id, prompt, params)
        try:
            await self.prefilled.wait()
            self.states[request_id].is_prefilling = False
            for _ in range(params):
                await asyncio.sleep(0)
                yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7])], metrics=None)
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise
        finally:
            del self.states[request_id]

    def shutdown(self, timeout: float | None = None) -> None:
        self.shutdowns.append(timeout)


def application(engine: StubEngine) -> FastAPI:
    app = FastAPI()

    @app.get("/version")
    async def version() -> str:
        return "stub"

    @app.get("/broken")
    async def broken() -> str:
        raise RuntimeError("a bug")

    @app.post("/v1/completions")
    @with_cancellation
    async def completions(body: dict[str, Any], raw_request: Request) -> Any:
        prompt = {"prompt_token_ids": body["prompt"]}
        outputs = engine.generate(prompt, body.get("max_tokens", 3), raw_request.headers["x-request-id"])
        if body.get("stream"):
            return StreamingResponse(_events(outputs, body.get("text", "x")), media_type="text/event-stream")
        return JSONResponse({"text": "x" * len([output async for output in outputs])})

    return app


async def _events(outputs: AsyncIterator[Any], text: str) -> AsyncIterator[str]:
    async for _ in outputs:
        yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
    yield "data: [DONE]\n\n"


class StubServer:
    """The server in a thread of its own; `run` does something in its event loop."""

    def __init__(self, url: str, engine: StubEngine, app: FastAPI, registry: CollectorRegistry) -> None:
        self.url = url
        self.engine = engine
        self.app = app
        self.lifecycle: Any = None
        self._registry = registry

    def value(self, name: str, **labels: str) -> float:
        return self._registry.get_sample_value(name, labels) or 0.0

    def call(self, function: Any, *arguments: Any) -> None:
        self.app.state.loop.call_soon_threadsafe(function, *arguments)


@contextlib.contextmanager
def stub_server(**settings: Any) -> Iterator[StubServer]:
    """Run a server with those settings on a free port."""
    started = threading.Event()
    box: list[Any] = []

    async def main() -> None:
        engine, registry = StubEngine(), CollectorRegistry()
        app = application(engine)
        plugin = FocusEndpointPlugin(registry)
        plugin.attach_router(app)
        app.add_middleware(Gate)
        args = Namespace(additional_config={})
        await plugin.init_state(engine, app.state, args)
        config = uvicorn.Config(app, port=0, log_config=None, log_level="error", backlog=2048)
        server = app.state.server = uvicorn.Server(config)
        app.state.loop = asyncio.get_running_loop()
        box.extend((server, StubServer("", engine, app, registry)))
        box[1].lifecycle = args.focus_lifecycle
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        box[1].url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        started.set()
        await serving

    thread = threading.Thread(target=asyncio.run, args=[main()])
    with mock.patch.dict("os.environ", Settings(**settings).environment()):
        thread.start()
        begun = started.wait(10)
    try:
        assert begun
        yield box[1]
    finally:
        box[0].should_exit = box[0].force_exit = True
        thread.join(10)
        assert not thread.is_alive()
