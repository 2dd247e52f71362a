"""From the first request to the last: probes, draining, and what happens when the engine dies."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
import time
from argparse import Namespace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State

from server.progress import engine_progress
from server.settings import Settings
from server.traffic import Traffic

# vLLM configures handlers for its own logger only.
logger = logging.getLogger("vllm.focus_serve.lifecycle")

LOOK_SECONDS = 1.0
"""How often the engine is looked at."""

EXIT_SECONDS = 5.0
"""What clients have to read their last bytes when the server stops; then their connections are closed."""


class Lifecycle:
    """Whether this API server process lives, is ready, or is about to stop."""

    def __init__(self, traffic: Traffic, settings: Settings) -> None:
        """Answer for a server whose engine is not there yet."""
        self.engine_failed = False
        self._traffic = traffic
        self._stall_seconds = settings.stall_seconds
        self._engine: Any = None
        self._state: State | None = None
        self._started = False
        self._stopping = False
        self._processes = 1
        self._task: asyncio.Task[None] | None = None

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter(tags=["lifecycle"])
        router.add_api_route("/livez", self._livez)
        router.add_api_route("/readyz", self._readyz)
        router.add_api_route("/startupz", self._startupz)
        # Not in the schema: who tries all that is there would stop the server.
        router.add_api_route(
            "/focus/drain", self._drain, methods=["POST"], status_code=202, include_in_schema=False
        )
        return router

    def start(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Watch `engine_client`, and drain before vLLM stops it."""
        self._state = state
        if engine_client is not None:
            self._engine = engine_client
            self._processes = engine_client.vllm_config.parallel_config._api_process_count
            self._wrap_shutdown(engine_client)
        # With one API server process this is the launcher's own, which takes its exit status from it.
        args.focus_lifecycle = self
        self._started = True
        self._task = asyncio.create_task(self._look())

    def trouble(self) -> str:
        """Return why this process should be restarted, or ""."""
        if self._engine is None:
            return ""
        if self._engine.errored:
            return "the engine has died"
        progress = engine_progress(self._engine)
        if progress and progress.stalled > self._stall_seconds:
            return f"the engine has work and has not made a step for {progress.stalled:.0f} seconds"
        return ""

    def unready(self) -> str:
        """Return why no work should be sent here, or ""."""
        if not self._started:
            return "the engine is not ready yet"
        if self._traffic.draining:
            return "the server is shutting down"
        return self.trouble()

    async def _livez(self) -> JSONResponse:
        """Say whether the engine moves; if it does not, restarting is all that helps."""
        return _probe(self.trouble())

    async def _readyz(self) -> JSONResponse:
        """Say whether work is taken; a full queue is no reason to say no."""
        return _probe(self.unready())

    async def _startupz(self) -> JSONResponse:
        """Say whether the engine has started."""
        return _probe("" if self._started else "the engine is not ready yet")

    async def _drain(self, request: Request) -> dict[str, int]:
        """Stop as with SIGTERM: no new work, requests under way finish, then the server exits with 0."""
        parent = multiprocessing.parent_process()
        # Of several API server processes, the parent stops all.
        pid = parent.pid if self._processes > 1 and parent and parent.pid else os.getpid()
        os.kill(pid, signal.SIGTERM)
        return {"active": self._traffic.active}

    async def _look(self) -> None:
        while not (self._engine and self._engine.errored):
            self._traffic.metrics.set_state(ready=not self.unready(), draining=self._traffic.draining)
            await asyncio.sleep(LOOK_SECONDS)
        self._traffic.metrics.set_state(ready=False, draining=self._traffic.draining)
        if not self._stopping and os.environ.get("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "0") == "0":
            logger.error("The engine has died: requests fail, and the server exits with status 1")
            await asyncio.sleep(EXIT_SECONDS)
            self._exit_now()

    def _wrap_shutdown(self, engine_client: Any) -> None:
        shutdown = engine_client.shutdown
        loop, thread = asyncio.get_running_loop(), threading.get_ident()

        def drain_and_shutdown(timeout: float | None = None) -> None:
            # vLLM calls this in a thread on SIGTERM, and once more when it has stopped serving.
            if self._stopping:
                return shutdown(timeout=timeout)  # type: ignore[no-any-return]
            self._stopping = True
            self.engine_failed = engine_client.errored
            if not self.engine_failed and threading.get_ident() != thread:
                started = time.monotonic()
                asyncio.run_coroutine_threadsafe(self._finish(timeout or 0), loop).result()
                timeout = max(0, (timeout or 0) - (time.monotonic() - started))
            shutdown(timeout=timeout)
            if not loop.is_closed():
                loop.call_soon_threadsafe(loop.call_later, EXIT_SECONDS, self._exit_now)

        engine_client.shutdown = drain_and_shutdown

    async def _finish(self, timeout: float) -> None:
        self._traffic.draining = True
        self._traffic.metrics.set_state(ready=False, draining=True)
        logger.info("Draining: no new work; waiting for %d requests", self._traffic.active)
        if not await self._traffic.wait_until_idle(timeout):
            logger.warning(
                "%d requests have not finished in --shutdown-timeout (%g s) and are cut off",
                self._traffic.active,
                timeout,
            )

    def _exit_now(self) -> None:
        server = getattr(self._state, "server", None)
        if server:
            server.should_exit = server.force_exit = True


def _probe(problem: str) -> JSONResponse:
    return JSONResponse({"ok": not problem, "reason": problem}, 503 if problem else 200)
