"""Every Prometheus object of the server."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

PHASES = ("prefill", "decode")


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
