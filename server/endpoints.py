"""The endpoint plugin: what focus-serve adds to vLLM's own API server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import traceback
from argparse import Namespace
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import REGISTRY, CollectorRegistry
from pydantic import BaseModel
from starlette.datastructures import State

from server.errors import LaunchError
from server.lifecycle import Lifecycle
from server.metrics import FocusMetrics, GateMetrics
from server.settings import Settings
from server.stats import StatsPoller, WorkerClient
from server.status import StatusSource, status_router
from server.traffic import Traffic
from server.versions import installed_versions

if TYPE_CHECKING:
    from server.requests import RequestWatch

# vLLM configures handlers for its own logger only.
logger = logging.getLogger("vllm.focus_serve")

STATS_TIMEOUT = 2.0
"""Seconds that /focus/info waits for figures before it gives the last known ones."""
READERS = (
    "solve_dependencies",
    "construct_input_messages",
    "parse_chat_messages",
    "parse_chat_messages_async",
)
"""FastAPI's and vLLM's functions that read what a client sent: what they stumble over is its mistake."""


class AdapterInfo(BaseModel):
    """Which adapter runs."""

    file: str
    sha256: str
    """The first 12 hexadecimal digits."""
    base_model: str


class KeysRead(BaseModel):
    """Mean fraction of the keys dense attention would read that were read; null before the first query."""

    prefill: float | None = None
    decode: float | None = None


class FocusInfo(BaseModel):
    """What `GET /focus/info` answers."""

    attention: Literal["focus", "dense"]
    versions: dict[str, str]
    adapter: AdapterInfo | None = None
    routed_layers: list[int] = []
    dense_layers: list[int] = []
    config: dict[str, Any] | None = None
    """FocusConfig: num_groups (K), key_k, top_k, window, sink, dense_below and the rest."""
    keys_read: KeysRead = KeysRead()
    keys_read_age_seconds: float | None = None
    """How old `keys_read` is: a worker answers between two engine steps."""


class FocusState:
    """What the routes need, made once the engine runs."""

    def __init__(self, info: FocusInfo, poller: StatsPoller | None = None) -> None:
        """Answer with `info`, completed from `poller` unless attention is dense."""
        self._info = info
        self._poller = poller

    @property
    def keys_read(self) -> dict[str, float | None]:
        """Mean fraction of keys read by phase, as of the last time the workers were asked."""
        phases = self._poller.phases if self._poller else {}
        return {phase: stats.fraction for phase, stats in phases.items()}

    async def current_info(self) -> FocusInfo:
        """Return the info with figures as fresh as the engine allows."""
        if self._poller is None:
            return self._info
        await self._poller.refresh(STATS_TIMEOUT)
        age = round(self._poller.age, 3)
        return self._info.model_copy(
            update={"keys_read": KeysRead(**self.keys_read), "keys_read_age_seconds": age}
        )


class FocusEndpointPlugin:
    """vLLM's EndpointPlugin: `/focus/*`, Focus's metrics, and the check that Focus is really on."""

    name = "focus"
    required_tasks = None

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Publish metrics in `registry`; vLLM's `/metrics` shows the default one."""
        self._registry = registry
        # The event loop keeps no strong reference to its tasks.
        self._tasks: list[asyncio.Task[None]] = []
        self._watch: RequestWatch | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes to vLLM's application."""
        router = APIRouter(prefix="/focus", tags=["focus"])
        router.add_api_route("/info", _get_info, response_model=FocusInfo)
        app.include_router(router)
        app.include_router(status_router())
        self._settings = Settings()
        self._traffic = app.state.traffic = Traffic(GateMetrics(self._registry))
        self._lifecycle = Lifecycle(self._traffic, self._settings)
        app.include_router(self._lifecycle.router())
        # vLLM turns ValueError and TypeError into 400, but its checks of a body raise these as well.
        for error in (AssertionError, AttributeError, LookupError):
            app.add_exception_handler(error, _answer_wrong_body)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Check that the workers run Focus, and watch them and the requests from now on.

        Raises:
            LaunchError: An adapter is configured and a worker does not run it.
        """
        info = FocusInfo(attention="dense", versions=installed_versions())
        state.focus = FocusState(info)
        if engine_client is None:
            self._lifecycle.start(None, state, args)
            return
        configured = "focus" in (args.additional_config or {})
        if configured:
            info = await _ask_workers(engine_client)
        # Every API server process reads the same workers: one of them counts.
        metrics = FocusMetrics(self._registry) if _is_first(engine_client) else None
        if metrics:
            adapter = info.adapter.model_dump() if info.adapter else None
            metrics.describe(info.versions, os.environ.get("FOCUS_COMMIT", "unknown"), adapter)
            self._run(_announce(state, args))
        if configured:
            poller = StatsPoller(engine_client, metrics)
            state.focus = FocusState(info, poller)
            if models := getattr(state, "openai_serving_models", None):
                _list_adapter(models, info)
            if metrics:
                self._run(poller.run(self._settings.stats_interval))
        self._watch_requests(engine_client, state)
        self._traffic.watch(engine_client)
        self._lifecycle.start(engine_client, state, args)

    def _watch_requests(self, engine_client: Any, state: State) -> None:
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        from server.requests import RequestWatch, watch_event_loop
        from server.stat_logger import focus_stat_logger, served_name

        stat_logger = focus_stat_logger(engine_client)
        if stat_logger:
            self._watch = RequestWatch(engine_client, stat_logger)
            self._run(watch_event_loop(stat_logger.metrics))
        config = engine_client.vllm_config
        state.focus_status = StatusSource(
            get_prometheus_registry(),
            served_name(config),
            config.model_config.max_model_len,
            stat_logger.progress if stat_logger else None,
        )

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))


async def _get_info(request: Request) -> FocusInfo:
    """Say whether Focus is on, with which adapter, and how much of the context attention reads."""
    focus: FocusState = request.app.state.focus
    return await focus.current_info()


async def _ask_workers(client: WorkerClient) -> FocusInfo:
    try:
        workers: list[dict[str, Any] | None] = await client.collective_rpc("focus_info")
    except Exception as error:
        raise LaunchError(
            f"an adapter is configured, but the workers cannot answer for Focus ({error}): "
            "start the server with focus-serve"
        ) from error
    running = [worker for worker in workers if worker]
    if len(running) < len(workers) or not running:
        raise LaunchError(
            f"an adapter is configured, but Focus is off in {len(workers) - len(running)} of {len(workers)} "
            "workers: install focus-vllm on every host and let VLLM_PLUGINS name 'focus'"
        )
    first = running[0]
    return FocusInfo(
        attention="focus",
        versions=installed_versions(),
        adapter=AdapterInfo(
            file=Path(first["adapter"]).name, sha256=first["sha256"][:12], base_model=first["base_model"]
        ),
        # Pipeline-parallel workers each have some of the layers.
        routed_layers=sorted({layer for worker in running for layer in worker["routed_layers"]}),
        dense_layers=sorted({layer for worker in running for layer in worker["dense_layers"]}),
        config=first["config"],
    )


async def _answer_wrong_body(request: Request, error: Exception) -> JSONResponse:
    names = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    if names.isdisjoint(READERS):
        raise error
    reason = str(error) or "vLLM cannot read a part of it"
    what = f"{reason} is missing" if isinstance(error, KeyError) else reason
    content = {"message": f"the request's body is wrong: {what}", "type": "BadRequestError", "param": None}
    return JSONResponse({"error": {**content, "code": 400}}, 400)


def _list_adapter(models: Any, info: FocusInfo) -> None:
    """Let `/v1/models` name the adapter beside the model, in a field of its own."""
    show = models.show_available_models

    async def show_with_adapter() -> Any:
        answer = await show()
        for card in answer.data:
            if card.parent is None:
                card.adapter = info.adapter and info.adapter.model_dump()
        return answer

    models.show_available_models = show_with_adapter


def _is_first(engine_client: Any) -> bool:
    return bool(engine_client.vllm_config.parallel_config._api_process_rank == 0)


async def _announce(state: State, args: Namespace) -> None:
    # vLLM logs its routes after init_state; the line worth copying comes last.
    while not getattr(getattr(state, "server", None), "started", False):
        await asyncio.sleep(0.05)
    logger.info("Ready. Try: %s", curl_line(args))


def curl_line(args: Namespace) -> str:
    """Return a command for a POSIX shell that completes a sentence on the server started with `args`."""
    body = {
        "model": args.served_model_name[0] if args.served_model_name else args.model,
        "prompt": "Once upon a time",
        "max_tokens": 32,
    }
    command = ["curl", *_address(args), "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    line = shlex.join(command)
    if args.api_key or os.environ.get("VLLM_API_KEY"):
        line += ' -H "Authorization: Bearer $VLLM_API_KEY"'
    return line


def _address(args: Namespace) -> list[str]:
    path = "/v1/completions"
    if args.uds:
        return ["--unix-socket", args.uds, f"http://localhost{path}"]
    host = "localhost" if args.host in (None, "", "0.0.0.0", "::") else args.host
    host = f"[{host}]" if ":" in host else host
    scheme = "https" if args.ssl_certfile else "http"
    return [f"{scheme}://{host}:{args.port}{path}"]
