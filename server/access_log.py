"""One line for each request, and logs as JSON."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from pythonjsonlogger.json import JsonFormatter
from starlette.datastructures import State

from server.settings import Settings
from server.traffic import Exchange

# vLLM configures handlers for its own logger only.
logger = logging.getLogger("vllm.focus_serve.access")

QUIET_PATHS = ("/livez", "/readyz", "/startupz", "/health", "/metrics", "/focus/status")
"""Asked every few seconds; logged only if something is wrong."""


class AccessLog:
    """Writes who asked for what, and how it went; never what, unless told to."""

    def __init__(self, settings: Settings) -> None:
        """Write in the format of `settings`."""
        self._json = settings.log_format == "json"

    def write(self, exchange: Exchange, state: State) -> None:
        """Log `exchange`, which has ended."""
        if exchange.path in QUIET_PATHS and exchange.status == 200:
            return
        fields = _fields(exchange, state)
        line = f"{exchange.method} {exchange.path} {fields['status']}"
        if self._json:
            logger.info(line, extra=fields)
        else:
            rest = (f"{name}={value}" for name, value in fields.items() if name not in NAMED)
            logger.info("%s %s", line, " ".join(rest))


NAMED = ("method", "path", "status")


def _fields(exchange: Exchange, state: State) -> dict[str, Any]:
    fields = {
        "request_id": exchange.request_id,
        "key": exchange.key,
        "method": exchange.method,
        "path": exchange.path,
        "status": exchange.status or 499,
        "seconds": round(time.monotonic() - exchange.started, 4),
        "prompt_tokens": exchange.prompt_tokens,
        "tokens": exchange.tokens,
        "first_token_seconds": exchange.first_token and round(exchange.first_token, 4),
        "keys_read": _keys_read(state) if exchange.prompt_tokens else None,
        "incomplete": exchange.incomplete(),
        "client_left": exchange.client_left,
        "error": exchange.error,
        "body": exchange.body,
    }
    return {name: value for name, value in fields.items() if value or name in NAMED}


def _keys_read(state: State) -> float | None:
    """Return the fraction of keys that prefill has read lately, of all requests: workers tell no more."""
    focus = getattr(state, "focus", None)
    fraction = focus.keys_read.get("prefill") if focus else None
    return fraction and round(fraction, 4)


def json_handler() -> logging.Handler:
    """Return a handler that writes JSON lines to standard output."""
    # vLLM puts the name of the process before everything that its processes write to sys.stdout.
    handler = logging.StreamHandler(os.fdopen(1, "w", buffering=1, closefd=False))
    format_ = "{asctime}{levelname}{name}{processName}{message}"
    names = {"asctime": "time", "levelname": "level", "name": "logger", "processName": "process"}
    handler.setFormatter(JsonFormatter(format_, style="{", rename_fields=names))
    return handler
