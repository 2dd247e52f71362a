"""Every Prometheus object of the server.

Plain counters, gauges and histograms only: custom collectors vanish when several API server processes
share one `/metrics` through PROMETHEUS_MULTIPROC_DIR.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from server.objectives import Objectives

PHASES = ("prefill", "decode")
REJECTIONS = ("auth", "rate_limit", "queue", "tokens", "draining", "too_large")
INCOMPLETE = ("no_done", "abort", "error_event", "disconnect")
ABORT_PHASES = ("queue_or_prefill", "decode")
ABORT_CAUSES = ("client", "shutdown", "error")

TTFT = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1200, 2400)
TPOT = (
    *(0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5),
)
E2E = (0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480, 960, 1920, 3840, 7680)
QUEUE = (0.001, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SPEED = (100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000)
LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class FocusMetrics:
    """What attention read, and what runs."""

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
        self._fallback = Counter(
            "focus_attn_fallback",
            "Queries of routed layers that attended densely.",
            ["phase", "reason"],
            registry=registry,
        )
        self._age = Gauge(
            "focus_worker_stats_age_seconds",
            "How old the workers' figures are.",
            registry=registry,
            multiprocess_mode="max",
        )
        self._build = Gauge(
            "focus_build_info",
            "Always 1; the labels say what runs.",
            ["version", "vllm", "commit"],
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
            self.count(phase, candidate=0, selected=0, dense_queries=0)

    def count(self, phase: str, *, candidate: int, selected: int, dense_queries: int) -> None:
        """Add what attention did since the last call; `phase` is one of PHASES."""
        self._candidate.labels(phase).inc(candidate)
        self._selected.labels(phase).inc(selected)
        self._fallback.labels(phase, "dense_below").inc(dense_queries)

    def set_age(self, seconds: float) -> None:
        """Publish how old the counts are."""
        self._age.set(seconds)

    def describe(
        self, versions: Mapping[str, str], commit: str, adapter: Mapping[str, str] | None = None
    ) -> None:
        """Publish versions (`focus_vllm`, `vllm`), commit and adapter (`file`, `sha256`, `base_model`)."""
        self._build.labels(versions["focus_vllm"], versions["vllm"], commit).set(1)
        if adapter:
            self._adapter.labels(adapter["file"], adapter["sha256"], adapter["base_model"]).set(1)


@dataclasses.dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One request that the engine finished; times in seconds."""

    finish_reason: str
    """vLLM's: stop, length, abort, error, repetition."""
    prompt_tokens: int
    computed_tokens: int
    """Prompt tokens that no cache had."""
    generated_tokens: int
    e2e: float
    queue: float
    prefill: float
    ttft: float
    tpot: float


class RequestMetrics:
    """Latency, outcome and load of requests, by prompt length."""

    def __init__(self, objectives: Objectives, registry: CollectorRegistry = REGISTRY) -> None:
        self._objectives = objectives
        by_engine = ["model_name", "engine", "prompt_bucket"]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"focus_request_{name}", text, by_engine, registry=registry, buckets=buckets)

        ttft = tuple(sorted({*TTFT, objectives.targets["ttft"].base} - {0}))
        tpot = tuple(sorted({*TPOT, objectives.targets["tpot"].base} - {0}))
        e2e = tuple(sorted({*E2E, objectives.targets["e2e"].base} - {0}))
        self._ttft = histogram("ttft_seconds", "Time to the first token.", ttft)
        self._tpot = histogram("tpot_seconds", "Mean time per token after the first.", tpot)
        self._e2e = histogram("e2e_seconds", "Time to the last token.", e2e)
        self._queue = histogram("queue_seconds", "Time until the scheduler took the request up.", QUEUE)
        self._prefill = histogram("prefill_seconds", "Time from then to the first token.", TTFT)
        self._speed = histogram(
            "prefill_tokens_per_second", "Prompt tokens computed per second of prefill.", SPEED
        )
        self._finished = Counter(
            "focus_requests_finished",
            "Requests that the engine finished.",
            [*by_engine, "finish_reason"],
            registry=registry,
        )
        self._aborted = Counter(
            "focus_requests_aborted",
            "Requests that ended before the engine finished them.",
            ["model_name", "prompt_bucket", "phase", "cause"],
            registry=registry,
        )
        self._slo = Counter(
            "focus_slo_requests",
            "Requests within (good) and beyond (bad) the target for their prompt's length.",
            ["model_name", "objective", "prompt_bucket", "result"],
            registry=registry,
        )
        self._inflight = Gauge(
            "focus_inflight_prompt_tokens",
            "Prompt tokens of the requests under way.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._last_step = Gauge(
            "focus_engine_last_step_timestamp_seconds",
            "Unix time of the engine's last step.",
            ["engine"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._lag = Histogram(
            "focus_event_loop_lag_seconds",
            "How late the API server's event loop ran a timer.",
            registry=registry,
            buckets=LAG,
        )

    def prepare(self, model_name: str, engine: int, max_model_len: int) -> None:
        """Start every series that can be told in advance at zero."""
        for bucket in self._objectives.buckets.up_to(max_model_len):
            where = (model_name, str(engine), bucket)
            for metric in (self._ttft, self._tpot, self._e2e, self._queue, self._prefill, self._speed):
                metric.labels(*where)
            for reason in ("stop", "length"):
                self._finished.labels(*where, reason)
            for phase in ABORT_PHASES:
                for cause in ABORT_CAUSES:
                    self._aborted.labels(model_name, bucket, phase, cause)
            for objective in self._objectives.targets:
                for result in ("good", "bad"):
                    self._slo.labels(model_name, objective, bucket, result)

    def stepped(self, engine: int) -> None:
        """Note a step of the engine."""
        self._last_step.labels(str(engine)).set_to_current_time()

    def finish(self, model_name: str, engine: int, request: FinishedRequest) -> None:
        """Count a finished request; one that was aborted or failed has no latencies worth comparing."""
        where = (model_name, str(engine), self._objectives.buckets.label(request.prompt_tokens))
        self._finished.labels(*where, request.finish_reason).inc()
        if request.finish_reason in ("abort", "error") or not request.generated_tokens:
            return
        self._ttft.labels(*where).observe(request.ttft)
        self._e2e.labels(*where).observe(request.e2e)
        self._queue.labels(*where).observe(request.queue)
        self._prefill.labels(*where).observe(request.prefill)
        if request.computed_tokens and request.prefill > 0:
            self._speed.labels(*where).observe(request.computed_tokens / request.prefill)
        self._judge(model_name, "ttft", request.prompt_tokens, request.ttft)
        self._judge(model_name, "e2e", request.prompt_tokens, request.e2e)
        if request.generated_tokens > 1:
            self._tpot.labels(*where).observe(request.tpot)
            self._judge(model_name, "tpot", request.prompt_tokens, request.tpot)

    def abort(self, model_name: str, prompt_tokens: int, phase: str, cause: str, elapsed: float) -> None:
        """Count a request given up after `elapsed` seconds, in one of ABORT_PHASES for one of ABORT_CAUSES.

        One that was still without a token when its target had passed was slow, whoever gave it up.
        """
        self._aborted.labels(model_name, self._objectives.buckets.label(prompt_tokens), phase, cause).inc()
        if phase == "queue_or_prefill" and elapsed > self._objectives.targets["ttft"].seconds(prompt_tokens):
            self._judge(model_name, "ttft", prompt_tokens, elapsed)

    def change_inflight(self, prompt_tokens: int) -> None:
        """Add to the prompt tokens under way, or take from them."""
        self._inflight.inc(prompt_tokens)

    def lag(self, seconds: float) -> None:
        """Count how late the event loop was."""
        self._lag.observe(seconds)

    def _judge(self, model_name: str, objective: str, prompt_tokens: int, seconds: float) -> None:
        good = seconds <= self._objectives.targets[objective].seconds(prompt_tokens)
        bucket = self._objectives.buckets.label(prompt_tokens)
        self._slo.labels(model_name, objective, bucket, "good" if good else "bad").inc()


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
