"""Grafana dashboards of focus-serve, as JSON files beside this one.

python -m deploy.monitoring.dashboards
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
SLO_TARGET = 0.99
"""Fraction of requests that shall meet their objective."""

Panel = dict[str, Any]

WHERE = 'namespace=~"$namespace",job=~"$job",instance=~"$instance"'
BUCKET = 'prompt_bucket=~"$bucket"'
WINDOW = "[$__rate_interval]"


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Return the summed rate of a counter."""
    selected = ",".join(filter(None, [WHERE, where]))
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (rate({metric}{{{selected}}}{WINDOW}))"


def quantile(q: float, histogram: str, by: str = "", where: str = "") -> str:
    """Return a quantile of a histogram."""
    buckets = rate(f"{histogram}_bucket", by=",".join(filter(None, ["le", by])), where=where)
    return f"histogram_quantile({q}, {buckets})"


def mean(histogram: str, by: str = "", where: str = "") -> str:
    """Return the mean of a histogram's values."""
    return f"{rate(histogram + '_sum', by, where)} / {rate(histogram + '_count', by, where)}"


def gauge(metric: str, function: str, by: str = "") -> str:
    """Return a gauge, aggregated by a PromQL function."""
    return f"{function} by ({by}) ({metric}{{{WHERE}}})" if by else f"{function} ({metric}{{{WHERE}}})"


def burn(window: str, by: str, where: str = "") -> str:
    """Return how many times faster than allowed the error budget goes."""
    bad = ",".join(filter(None, [WHERE, where, 'result="bad"']))
    every = ",".join(filter(None, [WHERE, where]))
    return (
        f"sum by ({by}) (rate(focus_slo_requests_total{{{bad}}}[{window}])) "
        f"/ sum by ({by}) (rate(focus_slo_requests_total{{{every}}}[{window}])) / {1 - SLO_TARGET:.4g}"
    )


def panel(
    title: str, queries: dict[str, str], unit: str = "short", kind: str = "timeseries", **options: Any
) -> Panel:
    """Return a panel; `queries` maps a legend, in Grafana's {{label}} form, to its PromQL."""
    custom: dict[str, Any] = {}
    if kind == "timeseries":
        custom = {"fillOpacity": 10, "showPoints": "never", **options.pop("custom", {})}
    targets = []
    for number, (legend, expression) in enumerate(queries.items()):
        target: dict[str, Any] = {
            "refId": chr(ord("A") + number),
            "expr": expression,
            "legendFormat": legend,
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
        }
        if kind == "heatmap":
            target["format"] = "heatmap"
        if kind in ("table", "stat"):
            target["instant"] = True
        if kind == "table":
            target["format"] = "table"
        targets.append(target)
    return {
        "title": title,
        "type": kind,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}} if kind == "timeseries" else {},
        **options,
    }


def stacked(title: str, queries: dict[str, str], unit: str) -> Panel:
    """Return a panel whose series add up."""
    return panel(title, queries, unit, custom={"stacking": {"mode": "normal"}, "fillOpacity": 60})


def overview() -> list[Panel]:
    """Is it up, is it fast, is it full."""
    answered = rate("focus_http_requests_total", where='route=~"/v1/.+"')
    failed = rate("focus_http_requests_total", where='route=~"/v1/.+",code=~"5.."')
    broken = rate("focus_stream_incomplete_total", where='kind!="disconnect"')
    return [
        panel("Servers up", {"up": gauge("up", "sum")}, kind="stat"),
        panel(
            "Objectives met, last day",
            {
                "{{objective}}": (
                    f'sum by (objective) (increase(focus_slo_requests_total{{{WHERE},result="good"}}[1d])) '
                    f"/ sum by (objective) (increase(focus_slo_requests_total{{{WHERE}}}[1d]))"
                )
            },
            "percentunit",
            kind="stat",
        ),
        panel(
            "KV cache, fullest engine",
            {"used": gauge("vllm:kv_cache_usage_perc", "max")},
            "percentunit",
            kind="stat",
        ),
        panel(
            "Keys read",
            {
                "{{phase}}": (
                    f"{rate('focus_attn_selected_tokens_total', 'phase')} "
                    f"/ {rate('focus_attn_candidate_tokens_total', 'phase')}"
                )
            },
            "percentunit",
            kind="stat",
        ),
        panel(
            "Requests finished",
            {"{{finished_reason}}": rate("vllm:request_success_total", "finished_reason")},
            "reqps",
        ),
        panel(
            "Tokens",
            {"prompt": rate("vllm:prompt_tokens_total"), "generated": rate("vllm:generation_tokens_total")},
            "short",
        ),
        panel(
            "Errors, of requests",
            {
                "5xx": f"({failed} or vector(0)) / {answered}",
                "broken streams": f"{broken} / {answered}",
            },
            "percentunit",
        ),
        panel(
            "95th percentile",
            {
                "first token": quantile(0.95, "focus_request_ttft_seconds"),
                "whole request": quantile(0.95, "focus_request_e2e_seconds"),
            },
            "s",
        ),
        panel(
            "Time per output token",
            {
                "p95": quantile(0.95, "focus_request_tpot_seconds"),
                "p50": quantile(0.5, "focus_request_tpot_seconds"),
            },
            "s",
        ),
        panel(
            "Requests in the engine",
            {
                "running": gauge("vllm:num_requests_running", "sum"),
                "waiting": gauge("vllm:num_requests_waiting", "sum"),
            },
        ),
        panel("Preemptions", {"preemptions": rate("vllm:num_preemptions_total")}, "ops"),
        panel(
            "Prefix cache hits, of prompt tokens",
            {
                "hit": f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}",
            },
            "percentunit",
        ),
    ]


def long_context() -> list[Panel]:
    """Latency by prompt length, and what long prompts do to short ones."""
    ttft, tpot = "focus_request_ttft_seconds", "focus_request_tpot_seconds"
    return [
        *(
            panel(
                f"Time to first token, p{q * 100:g}",
                {"{{prompt_bucket}}": quantile(q, ttft, "prompt_bucket", BUCKET)},
                "s",
            )
            for q in (0.5, 0.95, 0.99)
        ),
        panel(
            "Time per output token, p50",
            {"{{prompt_bucket}}": quantile(0.5, tpot, "prompt_bucket", BUCKET)},
            "s",
        ),
        panel(
            "Time per output token, p95",
            {"{{prompt_bucket}}": quantile(0.95, tpot, "prompt_bucket", BUCKET)},
            "s",
        ),
        stacked(
            "Where a request's time goes, mean",
            {
                "queue": mean("focus_request_queue_seconds", where=BUCKET),
                "prefill": mean("focus_request_prefill_seconds", where=BUCKET),
                "decode": f"{mean('focus_request_e2e_seconds', where=BUCKET)} - ({mean(ttft, where=BUCKET)})",
            },
            "s",
        ),
        panel(
            "Prefill speed per request, p50",
            {
                "{{prompt_bucket}}": quantile(
                    0.5, "focus_request_prefill_tokens_per_second", "prompt_bucket", BUCKET
                )
            },
            "short",
        ),
        stacked(
            "Requests by prompt length",
            {"{{prompt_bucket}}": rate("focus_requests_finished_total", "prompt_bucket", BUCKET)},
            "reqps",
        ),
        stacked(
            "Who uses prefill: seconds of prefill per second",
            {"{{prompt_bucket}}": rate("focus_request_prefill_seconds_sum", "prompt_bucket", BUCKET)},
            "short",
        ),
        panel(
            "Time to first token",
            {
                "{{le}}": (
                    f"sum by (le) (increase(focus_request_ttft_seconds_bucket{{{WHERE},{BUCKET}}}{WINDOW}))"
                )
            },
            kind="heatmap",
        ),
        panel(
            "Short prompts beside long ones",
            {
                "p95 to first token, prompts below 8k": quantile(
                    0.95, ttft, where='prompt_bucket=~"0-1k|1k-8k"'
                ),
                "prompt tokens in flight": gauge("focus_inflight_prompt_tokens", "sum"),
            },
            "s",
            fieldConfig={
                "defaults": {"unit": "s", "min": 0},
                "overrides": [
                    {
                        "matcher": {"id": "byName", "options": "prompt tokens in flight"},
                        "properties": [
                            {"id": "unit", "value": "short"},
                            {"id": "custom.axisPlacement", "value": "right"},
                        ],
                    }
                ],
            },
        ),
        panel(
            "Requests given up",
            {"{{phase}}, {{cause}}": rate("focus_requests_aborted_total", "phase,cause", BUCKET)},
            "reqps",
        ),
    ]


def focus() -> list[Panel]:
    """What Focus attention reads, and whether it runs."""
    selected, candidate = "focus_attn_selected_tokens_total", "focus_attn_candidate_tokens_total"
    return [
        panel(
            "Keys read, of those dense attention would read",
            {"{{phase}}": f"{rate(selected, 'phase')} / {rate(candidate, 'phase')}"},
            "percentunit",
        ),
        panel(
            "Keys per second",
            {
                "dense would read, {{phase}}": rate(candidate, "phase"),
                "read, {{phase}}": rate(selected, "phase"),
            },
            "short",
        ),
        panel(
            "Fallbacks to dense attention",
            {"{{phase}}, {{reason}}": rate("focus_attn_fallback_total", "phase,reason")},
            "ops",
        ),
        panel(
            "Age of the workers' figures",
            {"{{instance}}": gauge("focus_worker_stats_age_seconds", "max", "instance")},
            "s",
        ),
        panel(
            "Adapters served",
            {"adapter": gauge("focus_adapter_info", "max", "instance,adapter,sha256,base_model")},
            kind="table",
        ),
        panel(
            "Versions served",
            {"version": gauge("focus_build_info", "max", "instance,version,vllm")},
            kind="table",
        ),
    ]


def slo() -> list[Panel]:
    """Objectives, their error budget, and how fast it goes."""
    bad, every, budget = f'{WHERE},result="bad"', WHERE, f"{1 - SLO_TARGET:.4g}"
    met = rate("focus_slo_requests_total", "objective", 'result="good"')
    return [
        panel(
            "Error budget left, 30 days",
            {
                "{{objective}}": (
                    f"1 - sum by (objective) (increase(focus_slo_requests_total{{{bad}}}[30d])) "
                    f"/ sum by (objective) (increase(focus_slo_requests_total{{{every}}}[30d])) / {budget}"
                )
            },
            "percentunit",
            kind="stat",
        ),
        panel(
            "Objectives met",
            {"{{objective}}": (f"{met} / {rate('focus_slo_requests_total', 'objective')}")},
            "percentunit",
        ),
        *(
            panel(
                f"Budget burnt, {window} (1: exactly used up in 30 days)",
                {"{{objective}}": burn(window, "objective")},
            )
            for window in ("5m", "1h", "6h", "3d")
        ),
        panel(
            "Budget burnt by prompt length, 1h",
            {"{{objective}}, {{prompt_bucket}}": burn("1h", "objective,prompt_bucket", BUCKET)},
        ),
        panel(
            "Requests that missed most, last hour",
            {
                "missed": (
                    f"topk(10, sum by (objective, prompt_bucket, model_name) "
                    f"(increase(focus_slo_requests_total{{{bad}}}[1h])))"
                )
            },
            kind="table",
        ),
    ]


def api_server() -> list[Panel]:
    """What came in over HTTP, what was refused, and how busy the server itself is."""
    return [
        panel("Responses", {"{{route}} {{code}}": rate("focus_http_requests_total", "route,code")}, "reqps"),
        panel("Requests under way", {"{{route}}": gauge("focus_http_inflight", "sum", "route")}),
        panel("Refused", {"{{reason}}": rate("focus_rejected_total", "reason")}, "reqps"),
        panel(
            "Streams that ended early", {"{{kind}}": rate("focus_stream_incomplete_total", "kind")}, "reqps"
        ),
        panel(
            "Event loop lag",
            {
                "p50": quantile(0.5, "focus_event_loop_lag_seconds"),
                "p99": quantile(0.99, "focus_event_loop_lag_seconds"),
            },
            "s",
        ),
        panel(
            "Ready and draining",
            {
                "ready, {{instance}}": gauge("focus_ready", "min", "instance"),
                "draining, {{instance}}": gauge("focus_draining", "max", "instance"),
            },
        ),
        panel(
            "What the autoscaler sees: prompt tokens in flight",
            {"{{instance}}": gauge("focus_inflight_prompt_tokens", "sum", "instance")},
        ),
        panel(
            "Seconds since the engine's last step",
            {
                "{{instance}} {{engine}}": (
                    f"time() - {gauge('focus_engine_last_step_timestamp_seconds', 'max', 'instance,engine')}"
                )
            },
            "s",
        ),
        panel(
            "Instances",
            {
                "ready": gauge("focus_ready", "min", "instance"),
                "running": gauge("vllm:num_requests_running", "sum", "instance"),
                "waiting": gauge("vllm:num_requests_waiting", "sum", "instance"),
                "KV cache": gauge("vllm:kv_cache_usage_perc", "max", "instance"),
            },
            kind="table",
            transformations=[{"id": "joinByField", "options": {"byField": "instance"}}],
        ),
    ]


DASHBOARDS = {
    "overview": ("Focus: overview", overview),
    "long-context": ("Focus: long context", long_context),
    "focus": ("Focus: attention", focus),
    "slo": ("Focus: objectives", slo),
    "api-server": ("Focus: API server", api_server),
}


def dashboard(uid: str, title: str, panels: list[Panel]) -> dict[str, Any]:
    """Lay panels out, stats four and others two in a row, and wrap them in a dashboard."""
    x = y = row = 0
    for number, item in enumerate(panels, start=1):
        width, height = (6, 4) if item["type"] == "stat" else (12, 8)
        if x + width > 24:
            x, y = 0, y + row
            row = 0
        item["id"], item["gridPos"] = number, {"x": x, "y": y, "w": width, "h": height}
        x, row = x + width, max(row, height)
    datasource = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
    variables = [
        _variable("namespace", "label_values(focus_build_info, namespace)"),
        _variable("job", 'label_values(focus_build_info{namespace=~"$namespace"}, job)'),
        _variable(
            "instance", 'label_values(focus_build_info{namespace=~"$namespace",job=~"$job"}, instance)'
        ),
        _variable("bucket", "label_values(focus_request_ttft_seconds_count, prompt_bucket)"),
    ]
    return {
        "uid": f"focus-{uid}",
        "title": title,
        "tags": ["focus-vllm"],
        "schemaVersion": 39,
        "editable": True,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "links": [{"title": "Focus", "type": "dashboards", "tags": ["focus-vllm"], "asDropdown": True}],
        "templating": {"list": [datasource, *variables]},
        "panels": panels,
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "query": query,
        "refresh": 2,
        "sort": 3,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
    }


def files() -> dict[Path, str]:
    """Return the dashboards' files and what is in them."""
    return {
        FOLDER / f"{uid}.json": json.dumps(dashboard(uid, title, panels()), indent=1) + "\n"
        for uid, (title, panels) in DASHBOARDS.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text)
