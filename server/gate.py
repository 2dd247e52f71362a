"""The ASGI middleware in front of vLLM's application: who may ask, how much, and what is written down."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import time
import uuid
from functools import partial
from ipaddress import ip_address
from typing import Any, TypeAlias

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access_log import AccessLog
from server.keys import ANYBODY, Key, Keyring
from server.settings import Settings
from server.traffic import Exchange, Traffic, current

RETRY_SECONDS = 1
"""What a client refused for a full queue is told to wait: a queue moves within seconds."""

BYTES_PER_TOKEN = 4
"""What a prompt is taken for until it is tokenized; English text has a little more."""

MAX_NESTING = 100
"""Levels of a JSON body. 900 made vLLM 0.28's engine process fail to pass the request on, and exit."""

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
DIGITS = bytes.maketrans(b"123456789", b"000000000")
Limits: TypeAlias = list[tuple[str, tuple[RateLimitItem, str, str]]]
"""Of one key: "requests" or "tokens", and what the library calls the window."""

NO_WORK = ("/focus/drain", "/cancel", "/ping")
"""How paths end that are posted to and give the engine nothing to do."""

CANCEL_SECONDS = 2.0
"""What vLLM has to end a request that took too long, and a client to read that it did."""

KEEP_ALIVE = b"\n\n"
"""Empty events: nothing to any client. `vllm bench serve` (0.26, 0.28) loses all that follows a comment."""
ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}


class Refused(Exception):
    """The request goes no further; the client gets `status` and this message."""

    def __init__(self, status: int, message: str, reason: str = "", retry: float | None = None) -> None:
        """Let the client retry after `retry` seconds; count a `reason` that is one of REJECTIONS."""
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry = retry


class Gate:
    """Pure ASGI: a function middleware of vLLM's would hide from it that a client has gone."""

    def __init__(self, app: ASGIApp) -> None:
        """Read the settings from FOCUS_* variables, as vLLM gives a middleware no arguments.

        Raises:
            LaunchError: The file of API keys is wrong.
        """
        self._app = app
        self._settings = settings = Settings()
        plain = [key for key in [os.environ.get("VLLM_API_KEY")] if key]
        self._keyring = Keyring(settings.api_key_file, plain)
        self._public = {path.strip() for path in settings.public_paths.split(",")}
        self._limiter = FixedWindowRateLimiter(MemoryStorage())
        self._log = AccessLog(settings)
        self._templates: set[str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is allowed."""
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._authenticate(scope, Headers(scope=scope))
            if scope["app"].state.traffic.draining:
                raise _draining()
        except Refused as refused:
            scope["app"].state.traffic.metrics.rejected(refused.reason)
            # Before it is accepted, closing it makes the handshake fail with 403.
            await send({"type": "websocket.close", "code": 1008, "reason": str(refused)})
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        traffic: Traffic = scope["app"].state.traffic
        exchange = Exchange(_request_id(scope), scope["method"], _path(scope))
        response = _Response(send, exchange, self._settings.sse_keep_alive)
        route = self._route(scope)
        traffic.metrics.started(route)
        token = current.set(exchange)
        try:
            await self._serve(scope, receive, response, traffic)
        except Refused as refused:
            if refused.reason:
                traffic.metrics.rejected(refused.reason)
            exchange.error = str(refused)
            await response.refuse(refused)
        except Exception as error:
            # Starlette answers with 500, outside of every middleware.
            exchange.status = exchange.status or 500
            exchange.error = repr(error)
            raise
        finally:
            current.reset(token)
            traffic.end(exchange)
            response.close()
            exchange.charge(exchange.tokens)
            if incomplete := exchange.incomplete():
                traffic.metrics.stream_incomplete(incomplete)
            traffic.metrics.finished(route, exchange.method, exchange.status or 499)
            self._log.write(exchange, scope["app"].state)

    async def _serve(self, scope: Scope, receive: Receive, response: _Response, traffic: Traffic) -> None:
        exchange, headers = response.exchange, Headers(scope=scope)
        exchange.key, key = self._authenticate(scope, headers)
        if exchange.path == "/focus/drain" and not self._keyring.required and not _is_local(scope):
            raise Refused(403, "without API keys, only this machine may stop the server")
        if exchange.method != "POST" or exchange.path.endswith(NO_WORK):
            await self._app(scope, _Receive(receive, exchange), response)
            return
        is_json = "json" in headers.get("content-type", "json")
        limits = self._limits(exchange.key, key)
        length = _declared_length(headers)
        # Once before the body is read, as that may be long, and once after, as that may have taken long.
        self._admit(traffic, limits, length if is_json else 0)
        body = await self._read(receive, length)
        if body is None:
            return
        if is_json:
            check_json(body)
        self._admit(traffic, limits, len(body) if is_json else 0)
        for name, limit in limits:
            if name == "requests":
                self._limiter.hit(*limit)
            else:
                exchange.charge = partial(self._charge, limit)
        traffic.begin(exchange, len(body) // BYTES_PER_TOKEN if is_json else 0)
        if self._settings.log_prompts:
            exchange.body = body.decode(errors="replace")
        deadline = exchange.started + self._settings.request_timeout
        try:
            # The deadline looks to vLLM as if the client had left, for it then frees the engine; what does
            # not look is cancelled.
            async with asyncio.timeout(deadline + CANCEL_SECONDS - time.monotonic()):
                await self._app(scope, _Receive(receive, exchange, body, deadline), response)
        except TimeoutError:
            exchange.timed_out = True
        if exchange.timed_out:
            raise Refused(504, f"the request took longer than {self._settings.request_timeout:g} seconds")

    def _authenticate(self, scope: Scope, headers: Headers) -> tuple[str, Key | None]:
        if not self._keyring.required or _path(scope) in self._public or _is_preflight(scope, headers):
            return ANYBODY, None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        # The second is the header that Anthropic's clients send to /v1/messages.
        secret = secret.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        found = self._keyring.find(secret)
        if not found:
            raise Refused(401, "give a valid API key: Authorization: Bearer KEY", "auth")
        return found

    def _admit(self, traffic: Traffic, limits: Limits, length: int) -> None:
        """Raise Refused if a request with a prompt of `length` bytes cannot be taken now."""
        settings = self._settings
        if traffic.draining:
            raise _draining()
        requests, tokens = traffic.queue()
        if requests >= settings.max_queued_requests:
            raise Refused(503, f"{requests} requests are waiting already", "queue", RETRY_SECONDS)
        # A prompt that alone exceeds the bound is taken when it has the queue for itself.
        if requests and tokens + length // BYTES_PER_TOKEN > settings.max_queued_tokens:
            raise Refused(503, f"{tokens} prompt tokens are waiting already", "tokens", RETRY_SECONDS)
        for name, limit in limits:
            if not self._limiter.test(*limit):
                retry = self._limiter.get_window_stats(*limit).reset_time - time.time()
                message = f"the limit is {limit[0].amount} {name} per minute for the key {limit[2]!r}"
                raise Refused(429, message, "rate_limit", retry)

    def _charge(self, limit: tuple[RateLimitItem, str, str], tokens: int) -> None:
        self._limiter.hit(*limit, cost=tokens)

    def _limits(self, name: str, key: Key | None) -> Limits:
        limits: Limits = []
        for kind in ("requests", "tokens"):
            own = getattr(key, f"{kind}_per_minute", None)
            amount = getattr(self._settings, f"{kind}_per_minute") if own is None else own
            if amount:
                limits.append((kind, (RateLimitItemPerMinute(amount), kind, name)))
        return limits

    async def _read(self, receive: Receive, declared: int) -> bytes | None:
        """Return the whole body, or None if the client left before it was complete."""
        most = int(self._settings.max_body_mb * 2**20)
        chunks: list[bytes] = []
        size, more = 0, True
        while max(size, declared) <= most:
            if not more:
                return b"".join(chunks)
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            more = message.get("more_body", False)
        raise Refused(413, f"the body has over {self._settings.max_body_mb:g} MiB", "too_large")

    def _route(self, scope: Scope) -> str:
        """Return the template of the route, as few values as the metrics can bear."""
        routes = scope["app"].routes
        if self._templates is None:
            self._templates = {route.path for route in routes if hasattr(route, "path")}
        path = _path(scope)
        if path in self._templates:
            return path
        matching = (route for route in routes if route.matches(scope)[0] != Match.NONE)
        return getattr(next(matching, None), "path", "unknown")


class _Receive:
    """Gives the application the body that was read, then what comes, and ends the wait at the deadline."""

    def __init__(
        self, receive: Receive, exchange: Exchange, body: bytes | None = None, deadline: float = math.inf
    ) -> None:
        self._receive = receive
        self._exchange = exchange
        self._body = body
        self._deadline = deadline

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        wait = None if self._deadline == math.inf else self._deadline - time.monotonic()
        try:
            async with asyncio.timeout(wait):
                message = await self._receive()
        except TimeoutError:
            self._exchange.timed_out = True
            return {"type": "http.disconnect"}
        if message["type"] == "http.disconnect" and not self._exchange.complete:
            self._exchange.client_left = True
        return message


class _Response:
    """Sends what the application answers, with what the gate adds to it."""

    def __init__(self, send: Send, exchange: Exchange, interval: float) -> None:
        self.exchange = exchange
        self._send = send
        self._interval = interval
        self._sent_at = 0.0
        self._between_events = True
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, message: Message) -> None:
        exchange = self.exchange
        # What vLLM says to a client that has left, or after the deadline, is for nobody.
        if exchange.timed_out or (exchange.client_left and not exchange.status):
            return
        if message["type"] == "http.response.start":
            exchange.status = message["status"]
            headers = MutableHeaders(raw=list(message.get("headers", ())))
            headers["x-request-id"] = exchange.request_id
            message["headers"] = headers.raw
            exchange.is_stream = headers.get("content-type", "").startswith("text/event-stream")
            if exchange.is_stream and self._interval:
                self._task = asyncio.create_task(self._keep_alive())
        elif message["type"] == "http.response.body":
            exchange.complete = not message.get("more_body")
            if exchange.is_stream and message.get("body"):
                exchange.see(message["body"])
                self._between_events = message["body"].endswith(b"\n\n")
        self._sent_at = math.inf
        await self._send(message)
        self._sent_at = time.monotonic()

    async def refuse(self, refused: Refused) -> None:
        """Say why the request goes no further, in the way that the response allows by now."""
        content = {"message": str(refused), "type": ERROR_TYPES[refused.status], "param": None}
        body = json.dumps({"error": {**content, "code": refused.status}}).encode()
        messages: list[Message] = []
        if not self.exchange.status:
            self.exchange.status = refused.status
            headers = MutableHeaders({"content-type": "application/json", "content-length": str(len(body))})
            headers["x-request-id"] = self.exchange.request_id
            if refused.status == 401:
                headers["www-authenticate"] = "Bearer"
            if refused.retry is not None:
                headers["retry-after"] = str(max(1, math.ceil(refused.retry)))
            messages = [{"type": "http.response.start", "status": refused.status, "headers": headers.raw}]
        elif self.exchange.is_stream:
            body = b"data: " + body + b"\n\n"
        else:
            return  # the server closes a connection whose response is not complete
        messages.append({"type": "http.response.body", "body": body})
        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                for message in messages:
                    await self._send(message)
        except TimeoutError:
            return  # nobody reads

    def close(self) -> None:
        """Send nothing more."""
        if self._task:
            self._task.cancel()

    async def _keep_alive(self) -> None:
        while not self.exchange.complete:
            await asyncio.sleep(min(self._interval, self._interval - (time.monotonic() - self._sent_at)))
            idle = time.monotonic() - self._sent_at >= self._interval
            if idle and self._between_events and not self.exchange.complete:
                await self({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})


def check_json(body: bytes) -> None:
    """Refuse a JSON body that vLLM would answer with 500, or that would stop its engine.

    Raises:
        Refused: It is no UTF-8, not even with its escapes undone, or has an integer of more than 64 bits or
            too many levels.
    """
    try:
        body.decode()
        # Cheap tests first: few bodies have that many brackets or digits, or escapes, and prompts are long.
        nested = body.count(b"[") + body.count(b"{") > MAX_NESTING
        if nested or b"0" * 19 in body.translate(DIGITS) or SURROGATE.search(body):
            value = json.loads(body, parse_int=_int64)
            _check_depth(value)
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(": maximum")[0]
        raise Refused(400, f"the body is not JSON that can be served: {reason}") from None


def _int64(text: str) -> int:
    # Python itself refuses to read one of thousands of digits.
    value = int(text[:40])
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"the integer {text[:40]} has more than 64 bits")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_NESTING):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [
            child for item in containers for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not containers:
            return
    raise ValueError(f"it has over {MAX_NESTING} levels")


def _request_id(scope: Scope) -> str:
    headers = MutableHeaders(scope=scope)
    request_id = headers.get("x-request-id", "")
    if not REQUEST_ID.fullmatch(request_id):
        # vLLM makes its own from this one; without it, the engine's would differ from the log's.
        request_id = headers["x-request-id"] = uuid.uuid4().hex
    return request_id


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    """Whether vLLM's CORS middleware will answer, to a browser that never sends a key with this."""
    return (
        scope.get("method") == "OPTIONS"
        and "access-control-request-method" in headers
        and "origin" in headers
    )


def _is_local(scope: Scope) -> bool:
    host = (scope.get("client") or ("", 0))[0]
    return not host or ip_address(host).is_loopback  # a Unix socket has no address


def _declared_length(headers: Headers) -> int:
    length = headers.get("content-length", "0")
    return int(length) if length.isdecimal() else 0


def _draining() -> Refused:
    return Refused(503, "the server is shutting down", "draining", RETRY_SECONDS)
