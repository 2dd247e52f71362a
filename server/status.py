"""The status page at `/`, and the figures that it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from prometheus_client import CollectorRegistry, Metric
from pydantic import BaseModel

from server.progress import EngineProgress

PAGE = Path(__file__).with_name("status.html")
# The page holds nothing secret and loads nothing from elsewhere; its figures come from /focus/status.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
HISTOGRAMS = {"focus_request_ttft_seconds": "ttft", "focus_request_tpot_seconds": "tpot"}


class LatencyHistogram(BaseModel):
    """Cumulative since the start, like Prometheus's."""

    bounds: list[float]
    """Upper bounds in seconds; the last bucket has none."""
    counts: dict[str, list[float]]
    """By prompt-length bucket: requests at most as slow as each bound, then all of them."""
    sums: dict[str, float]
    """By prompt-length bucket: seconds of all requests."""


class KeyCounts(BaseModel):
    """Keys of one phase, summed over queries and routed layers, since the start."""

    candidate: float = 0
    selected: float = 0


class Status(BaseModel):
    """What `GET /focus/status` answers: all API server processes together, cumulative where it counts."""

    model: str
    max_model_len: int
    ready: bool | None = None
    draining: bool = False
    running: int | None = None
    """Requests in the engine's batch."""
    waiting: int | None = None
    """Requests in its queue."""
    inflight_prompt_tokens: float = 0
    finished: float = 0
    aborted: float = 0
    rejected: float = 0
    keys: dict[str, KeyCounts] = {}
    """By phase: prefill, decode."""
    latency: dict[str, LatencyHistogram] = {}
    """ttft and tpot."""


def status_router() -> APIRouter:
    """Return the page and its figures as routes."""
    router = APIRouter()
    router.add_api_route("/", _get_page, response_class=HTMLResponse, include_in_schema=False)
    router.add_api_route("/focus/status", _get_status, response_model=Status, tags=["focus"])
    return router


async def _get_page() -> HTMLResponse:
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=HEADERS)


async def _get_status(request: Request) -> Status:
    """Give the figures of the status page: state, queue, keys read, and latency by prompt length."""
    source: StatusSource = request.app.state.focus_status
    return source.current()


class StatusSource:
    """Reads the figures where Prometheus reads them, so that all API server processes count."""

    def __init__(
        self,
        registry: CollectorRegistry,
        model: str,
        max_model_len: int,
        progress: EngineProgress | None = None,
    ) -> None:
        self._registry = registry
        self._model = model
        self._max_model_len = max_model_len
        self._progress = progress

    def current(self) -> Status:
        """Return the figures as they are now."""
        families = {family.name: family for family in self._registry.collect()}
        status = Status(model=self._model, max_model_len=self._max_model_len)
        if "focus_ready" in families:
            status.ready = bool(_total(families, "focus_ready"))
            status.draining = bool(_total(families, "focus_draining"))
        if self._progress:
            status.running, status.waiting = self._progress.running, self._progress.waiting
        status.inflight_prompt_tokens = _total(families, "focus_inflight_prompt_tokens")
        status.finished = _total(families, "focus_requests_finished")
        status.aborted = _total(families, "focus_requests_aborted")
        status.rejected = _total(families, "focus_rejected")
        for kind in ("candidate", "selected"):
            for sample in _values(families, f"focus_attn_{kind}_tokens"):
                counts = status.keys.setdefault(sample.labels["phase"], KeyCounts())
                setattr(counts, kind, sample.value)
        status.latency = {
            short: _histogram(families[name]) for name, short in HISTOGRAMS.items() if name in families
        }
        return status


def _values(families: dict[str, Metric], name: str) -> Iterable[Any]:
    samples = families[name].samples if name in families else []
    return (sample for sample in samples if sample.name in (name, f"{name}_total"))


def _total(families: dict[str, Metric], name: str) -> float:
    return float(sum(sample.value for sample in _values(families, name)))


def _histogram(family: Metric) -> LatencyHistogram:
    """Add up engines and models, which share the buckets."""
    counts: dict[str, dict[float, float]] = {}
    sums: dict[str, float] = {}
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            of_bucket = counts.setdefault(sample.labels["prompt_bucket"], {})
            bound = float(sample.labels["le"])
            of_bucket[bound] = of_bucket.get(bound, 0) + sample.value
        elif sample.name.endswith("_sum"):
            bucket = sample.labels["prompt_bucket"]
            sums[bucket] = sums.get(bucket, 0) + sample.value
    bounds = sorted({bound for of_bucket in counts.values() for bound in of_bucket} - {math.inf})
    return LatencyHistogram(
        bounds=bounds,
        counts={
            bucket: [of_bucket[bound] for bound in (*bounds, math.inf)]
            for bucket, of_bucket in sorted(counts.items(), key=lambda item: _size(item[0]))
        },
        sums=sums,
    )


def _size(bucket: str) -> float:
    """Order buckets by length: `0-1k` before `1k-8k` before `8k+`."""
    start = bucket.split("-")[0].rstrip("+")
    return float(start.rstrip("km")) * {"k": 1024, "m": 1024**2}.get(start[-1], 1) + bucket.endswith("+")
