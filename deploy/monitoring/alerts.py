"""Alerts on focus-serve, for Prometheus and for its operator; runbooks.md says what to do about each.

python -m deploy.monitoring.alerts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
SLO_TARGET = 0.99
"""Fraction of requests that shall meet their objective."""
STALL_SECONDS = 300
"""No step of the engine for this long, with requests running, is a stall; focus-serve's --stall-seconds."""
DRAIN_SECONDS = 600
"""Longest a drain may take; focus-serve's --drain-timeout."""

JOB = 'job=~".*focus-serve.*"'
API = f'{JOB},route=~"/v1/.+"'
HTTP = f"focus_http_requests_total{{{API}}}"
MODEL = "namespace, job"
INSTANCE = f"{MODEL}, instance"
ENGINE = f"{INSTANCE}, engine"
OBJECTIVE = f"{MODEL}, model_name, objective"

Rule = dict[str, Any]


def ratio(part: str, whole: str, window: str, by: str = MODEL) -> str:
    """Return the rate of one counter as a fraction of another's."""
    return f"sum by ({by}) (rate({part}[{window}])) / sum by ({by}) (rate({whole}[{window}]))"


def enough(counter: str, window: str, by: str = MODEL) -> str:
    """Return a condition that keeps a handful of requests from alerting."""
    return f"sum by ({by}) (increase({counter}[{window}])) > 20"


def recordings() -> list[Rule]:
    """Return the fraction of requests that missed their objective, over the windows that burn alerts use."""
    every, missed = (f"focus_slo_requests_total{{{JOB}{more}}}" for more in ("", ',result="bad"'))
    return [
        {"record": f"focus:slo_missed:ratio_{window}", "expr": ratio(missed, every, window, OBJECTIVE)}
        for window in ("5m", "30m", "1h", "6h", "3d")
    ]


def burn(long: str, short: str, factor: float) -> str:
    """Return the condition that the error budget goes, and still goes, `factor` times faster than allowed."""
    limit = f"{factor * (1 - SLO_TARGET):.4g}"
    return f"focus:slo_missed:ratio_{long} > {limit} and focus:slo_missed:ratio_{short} > {limit}"


def alert(name: str, expression: str, severity: str, summary: str, after: str | None = None) -> Rule:
    """Return a rule; `page` wakes somebody, `ticket` waits for the morning."""
    return {
        "alert": name,
        "expr": expression,
        **({"for": after} if after else {}),
        "labels": {"severity": severity},
        "annotations": {
            "summary": summary,
            "runbook": f"deploy/monitoring/runbooks.md#{name.lower()}",
        },
    }


def server_alerts() -> list[Rule]:
    """Return what is wrong with a process."""
    step = f"max by ({ENGINE}) (focus_engine_last_step_timestamp_seconds{{{JOB}}})"
    loop_lag = f"sum by ({INSTANCE}, le) (rate(focus_event_loop_lag_seconds_bucket{{{JOB}}}[5m]))"
    return [
        alert(
            "FocusTargetDown", f"up{{{JOB}}} == 0", "page", "{{ $labels.instance }} cannot be scraped", "2m"
        ),
        alert(
            "FocusMetricsAbsent", f"absent(focus_build_info{{{JOB}}})", "page", "No focus-serve runs", "10m"
        ),
        alert(
            "FocusEngineStalled",
            f"time() - {step} > {STALL_SECONDS} "
            f"and max by ({ENGINE}) (vllm:num_requests_running{{{JOB}}}) > 0",
            "page",
            "{{ $labels.instance }}: requests run, the engine does not step",
            "1m",
        ),
        alert(
            "FocusNotReady",
            f"min by ({INSTANCE}) (focus_ready{{{JOB}}}) == 0",
            "page",
            "{{ $labels.instance }} is up and takes no requests",
            "10m",
        ),
        alert(
            "FocusEventLoopLag",
            f"histogram_quantile(0.99, {loop_lag}) > 1",
            "ticket",
            "{{ $labels.instance }}: the API server is {{ $value | humanizeDuration }} late",
            "10m",
        ),
        alert(
            "FocusDrainStuck",
            f"max by ({INSTANCE}) (focus_draining{{{JOB}}}) == 1",
            "ticket",
            "{{ $labels.instance }} has been draining for longer than it may",
            f"{DRAIN_SECONDS // 60 + 5}m",
        ),
        alert(
            "FocusWorkerStatsStale",
            f"max by ({INSTANCE}) (focus_worker_stats_age_seconds{{{JOB}}}) > {STALL_SECONDS}",
            "ticket",
            "{{ $labels.instance }}: the workers' figures are {{ $value | humanizeDuration }} old",
            "5m",
        ),
    ]


def request_alerts() -> list[Rule]:
    """Return what is wrong with the answers."""
    # 503 is a refusal and has an alert of its own.
    failed = f'focus_http_requests_total{{{API},code=~"5..",code!="503"}}'
    broken = f'focus_stream_incomplete_total{{{JOB},kind!="disconnect"}}'
    refused = f'focus_rejected_total{{{JOB},reason=~"queue|tokens|rate_limit"}}'
    given_up = f'focus_requests_aborted_total{{{JOB},cause="client"}}'
    finished = f"focus_requests_finished_total{{{JOB}}}"
    fraction = "{{ $value | humanizePercentage }} of requests"
    missed = "{{ $labels.objective }}: {{ $value | humanizePercentage }} missed their objective"
    judged = enough(f"focus_slo_requests_total{{{JOB}}}", "1h", OBJECTIVE)
    return [
        alert(
            "FocusHighErrorRatio",
            f"{ratio(failed, HTTP, '10m')} > 0.05 and {enough(HTTP, '10m')}",
            "ticket",
            f"{fraction} fail",
            "10m",
        ),
        alert(
            "FocusCriticalErrorRatio",
            f"{ratio(failed, HTTP, '5m')} > 0.2 and {enough(HTTP, '5m')}",
            "page",
            f"{fraction} fail",
            "5m",
        ),
        alert(
            "FocusIncompleteStreams",
            f"{ratio(broken, HTTP, '10m')} > 0.01 and {enough(HTTP, '10m')}",
            "ticket",
            f"{fraction} end in a broken stream",
            "10m",
        ),
        alert(
            "FocusRejectionsHigh",
            f"{ratio(refused, HTTP, '10m')} > 0.05 and {enough(HTTP, '10m')}",
            "ticket",
            f"{fraction} are refused",
            "10m",
        ),
        alert(
            "FocusAbortSpike",
            f"{ratio(given_up, finished, '10m')} > 0.2 and {enough(finished, '10m')}",
            "ticket",
            "Clients give up: for every finished request, {{ $value | humanize }} are left",
            "10m",
        ),
        alert(
            "FocusSLOFastBurn",
            f"{burn('1h', '5m', 14.4)} and {judged}",
            "page",
            f"{missed}; the month's budget is gone in 2 days",
        ),
        alert(
            "FocusSLOSlowBurn",
            f"({burn('6h', '30m', 6)} or {burn('3d', '6h', 1)}) and {judged}",
            "ticket",
            f"{missed}; the month's budget will not last",
            "15m",
        ),
    ]


def capacity_alerts() -> list[Rule]:
    """Return what is full."""
    replicas, limit = (
        f"kube_horizontalpodautoscaler_{name}" for name in ("status_current_replicas", "spec_max_replicas")
    )
    return [
        alert(
            "FocusQueueSaturated",
            f"min_over_time(sum by ({MODEL}) (vllm:num_requests_waiting{{{JOB}}})[15m:]) > 0",
            "ticket",
            "Requests have waited without a break for 15 minutes",
        ),
        alert(
            "FocusKVSaturated",
            f"max by ({ENGINE}) (vllm:kv_cache_usage_perc{{{JOB}}}) > 0.98 "
            f"and max by ({ENGINE}) (vllm:num_requests_waiting{{{JOB}}}) > 0",
            "ticket",
            "{{ $labels.instance }}: the KV cache is full and requests wait for it",
            "15m",
        ),
        alert(
            "FocusPreemptionStorm",
            f"sum by ({MODEL}) (rate(vllm:num_preemptions_total{{{JOB}}}[10m])) > 0.1",
            "ticket",
            "{{ $value | humanize }} requests a second are thrown out of the KV cache and computed again",
            "10m",
        ),
        alert(
            "FocusAutoscalerAtMax",
            f'{replicas}{{horizontalpodautoscaler=~".*focus-serve.*"}} '
            f">= on (namespace, horizontalpodautoscaler) {limit}",
            "ticket",
            "{{ $labels.horizontalpodautoscaler }} cannot add replicas",
            "15m",
        ),
    ]


def attention_alerts() -> list[Rule]:
    """Return what is wrong with Focus attention."""
    candidate, selected = (f"focus_attn_{name}_tokens_total{{{JOB}}}" for name in ("candidate", "selected"))
    fallback = f'focus_attn_fallback_total{{{JOB},reason!="dense_below"}}'
    lately = ratio(selected, candidate, "1h", f"{MODEL}, phase")
    before = lately.replace("[1h]", "[1d] offset 1h")
    return [
        alert(
            "FocusDenseFallback",
            f"sum by ({MODEL}, reason) (rate({fallback}[10m])) > 0",
            "ticket",
            "Attention falls back to dense: {{ $labels.reason }}",
            "10m",
        ),
        alert(
            "FocusKeptFractionDrift",
            f"abs(({lately}) / ({before}) - 1) > 0.3",
            "ticket",
            "{{ $labels.phase }}: keys read differ by {{ $value | humanizePercentage }} from the day before",
            "1h",
        ),
    ]


def files() -> dict[Path, str]:
    """Return the generated files and what is in them."""
    groups = [
        {"name": f"focus-serve-{name}", "rules": rules()}
        for name, rules in (
            ("recordings", recordings),
            ("server", server_alerts),
            ("requests", request_alerts),
            ("capacity", capacity_alerts),
            ("attention", attention_alerts),
        )
    ]
    operator = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "focus-serve"},
        "spec": {"groups": groups},
    }
    contents = {"alerts.yaml": {"groups": groups}, "prometheusrule.yaml": operator}
    return {
        FOLDER / name: "# Generated by alerts.py.\n" + yaml.safe_dump(content, sort_keys=False, width=110)
        for name, content in contents.items()
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
