"""Every Prometheus object of the server."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

PHASES = ("prefill", "decode")
REJECTIONS = ("auth", "rate_limit", "queue", "tokens", "draining", "too_large")
INCOMPLETE = ("no_done", "abort", "error_event", "disconnect")


class FocusMetrics:
    """Focus's counters and gauges, beside vLLM's own on `/metrics`.

    Plain counters and gauges only: custom collectors vanish when several API server processes
    share one `/metrics` through PROMETHEUS_MULTIPROC_DIR.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._candidate = Counter(
            "focus_attn_candidate_tokens",
            "Keys that dense attention would have read, summed over queries and routed layers.",
            ["phase"],
            registry=registry,
        )
        self._selected = Counter(
            "focus_attn_selected_tokens",
            "Keys that Focus attention read, summed over queries and routed layers.",
            ["phase"],
            registry=registry,
        )
        self._build = Gauge(
            "focus_build_info",
            "Always 1; the labels say what runs.",
            ["version", "vllm"],
            registry=registry,
            multiprocess_mode="max",
        )
        self._adapter = Gauge(
            "focus_adapter_info",
            "Always 1; the labels say which adapter is served.",
            ["adapter", "sha256", "base_model"],
            registry=registry,
            multiprocess_mode="max",
        )
        for phase in PHASES:
            self.count(phase, candidate=0, selected=0)

    def count(self, phase: str, *, candidate: int, selected: int) -> None:
        """Add keys read since the last call; `phase` is one of PHASES."""
        self._candidate.labels(phase).inc(candidate)
        self._selected.labels(phase).inc(selected)

    def describe(self, versions: Mapping[str, str], adapter: Mapping[str, str]) -> None:
        """Publish versions (`focus_vllm`, `vllm`) and adapter (`file`, `sha256`, `base_model`)."""
        self._build.labels(versions["focus_vllm"], versions["vllm"]).set(1)
        self._adapter.labels(adapter["file"], adapter["sha256"], adapter["base_model"]).set(1)


class GateMetrics:
    """What the middleware counts: every response, its own refusals included."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._requests = Counter(
            "focus_http_requests",
            "HTTP responses by the route's template, refusals by focus-serve itself included.",
            ["route", "method", "code"],
            registry=registry,
        )
        self._inflight = Gauge(
            "focus_http_inflight",
            "HTTP requests under way.",
            ["route"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._rejected = Counter(
            "focus_rejected", "Requests that focus-serve refused.", ["reason"], registry=registry
        )
        self._incomplete = Counter(
            "focus_stream_incomplete",
            "Streams that began with 200 and did not end as they should.",
            ["kind"],
            registry=registry,
        )
        self._draining = Gauge(
            "focus_draining",
            "1 while no new work is taken.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._ready = Gauge(
            "focus_ready",
            "1 while /readyz says yes in every API server process.",
            registry=registry,
            multiprocess_mode="livemin",
        )
        for reason in REJECTIONS:
            self._rejected.labels(reason)
        for kind in INCOMPLETE:
            self._incomplete.labels(kind)

    def started(self, route: str) -> None:
        """Count a request to `route`, a path template of the application, as under way."""
        self._inflight.labels(route).inc()

    def finished(self, route: str, method: str, code: int) -> None:
        """Count the response to a request that was `started`; 499 if the client left before it began."""
        self._inflight.labels(route).dec()
        self._requests.labels(route, method, code).inc()

    def rejected(self, reason: str) -> None:
        """Count a refusal; `reason` is one of REJECTIONS."""
        self._rejected.labels(reason).inc()

    def stream_incomplete(self, kind: str) -> None:
        """Count a broken stream; `kind` is one of INCOMPLETE."""
        self._incomplete.labels(kind).inc()

    def set_state(self, *, ready: bool, draining: bool) -> None:
        """Publish whether this process takes work."""
        self._ready.set(ready)
        self._draining.set(draining)
