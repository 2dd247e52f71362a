"""The alerts, in promtool: each fires on its series and is silent on the opposite ones."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml
from debian import promtool

from deploy.monitoring import alerts

JOB = 'job="focus-serve",instance="a"'
OK = f'focus_http_requests_total{{{JOB},route="/v1/completions",code="200"}}'
FAILED = f'focus_http_requests_total{{{JOB},route="/v1/completions",code="500"}}'
REFUSED = f'focus_http_requests_total{{{JOB},route="/v1/completions",code="503"}}'
PROBES = f'focus_http_requests_total{{{JOB},route="/readyz",code="500"}}'
STEP = f'focus_engine_last_step_timestamp_seconds{{{JOB},engine="0"}}'
RUNNING = f'vllm:num_requests_running{{{JOB},engine="0",model_name="m"}}'
WAITING = f'vllm:num_requests_waiting{{{JOB},engine="0",model_name="m"}}'
KV = f'vllm:kv_cache_usage_perc{{{JOB},engine="0",model_name="m"}}'
PREEMPTIONS = f'vllm:num_preemptions_total{{{JOB},engine="0",model_name="m"}}'
FINISHED = f'focus_requests_finished_total{{{JOB},prompt_bucket="0-1k"}}'
GOOD, MISSED = (
    f'focus_slo_requests_total{{{JOB},model_name="m",objective="ttft",prompt_bucket="0-1k",result="{result}"}}'
    for result in ("good", "bad")
)
CANDIDATE, SELECTED = (
    f'focus_attn_{name}_tokens_total{{{JOB},phase="decode"}}' for name in ("candidate", "selected")
)
FALLBACK, SHORT = (
    f'focus_attn_fallback_total{{{JOB},phase="decode",reason="{reason}"}}'
    for reason in ("layout", "dense_below")
)
REPLICAS, LIMIT = (
    f'kube_horizontalpodautoscaler_{name}{{namespace="n",horizontalpodautoscaler="keda-hpa-focus-serve"}}'
    for name in ("status_current_replicas", "spec_max_replicas")
)

Series = dict[str, str]


def lag(late: int) -> Series:
    """Return an event loop of which `late` in 60 wake-ups are more than a second late."""
    counts = {"0.01": 60 - late, "10": 60, "+Inf": 60}
    return {
        f'focus_event_loop_lag_seconds_bucket{{{JOB},le="{le}"}}': f"0+{count}x60"
        for le, count in counts.items()
    }


FIRING = 'count by (alertname) (ALERTS{alertname="%s",alertstate="firing"})'
# Alert: the minute to look at, series that make it fire, series that are nearly as bad and do not.
CASES: dict[str, tuple[int, Series, Series]] = {
    "FocusTargetDown": (10, {f"up{{{JOB}}}": "0x10"}, {f"up{{{JOB}}}": "0x6 1x4"}),
    "FocusMetricsAbsent": (15, {f"up{{{JOB}}}": "1x15"}, {f"focus_build_info{{{JOB}}}": "1x15"}),
    "FocusEngineStalled": (10, {STEP: "0x10", RUNNING: "1x10"}, {STEP: "0x10", RUNNING: "0x10"}),
    "FocusNotReady": (15, {f"focus_ready{{{JOB}}}": "0x15"}, {f"focus_ready{{{JOB}}}": "0x9 1 0x5"}),
    "FocusEventLoopLag": (20, lag(3), lag(0)),
    "FocusDrainStuck": (20, {f"focus_draining{{{JOB}}}": "1x20"}, {f"focus_draining{{{JOB}}}": "0x8 1x12"}),
    "FocusWorkerStatsStale": (
        10,
        {f"focus_worker_stats_age_seconds{{{JOB}}}": "310+60x10"},
        {f"focus_worker_stats_age_seconds{{{JOB}}}": "290x10"},
    ),
    "FocusHighErrorRatio": (
        25,
        {OK: "0+90x30", FAILED: "0+10x30"},
        {OK: "0+96x30", FAILED: "0+4x30", REFUSED: "0+90x30", PROBES: "0+90x30"},
    ),
    "FocusCriticalErrorRatio": (15, {OK: "0+70x30", FAILED: "0+30x30"}, {OK: "0+81x30", FAILED: "0+19x30"}),
    "FocusIncompleteStreams": (
        25,
        {OK: "0+90x30", f'focus_stream_incomplete_total{{{JOB},kind="abort"}}': "0+2x30"},
        {OK: "0+90x30", f'focus_stream_incomplete_total{{{JOB},kind="disconnect"}}': "0+2x30"},
    ),
    "FocusRejectionsHigh": (
        25,
        {OK: "0+90x30", REFUSED: "0+10x30", f'focus_rejected_total{{{JOB},reason="tokens"}}': "0+10x30"},
        {OK: "0+90x30", REFUSED: "0+10x30", f'focus_rejected_total{{{JOB},reason="draining"}}': "0+10x30"},
    ),
    "FocusAbortSpike": (
        25,
        {FINISHED: "0+60x30", f'focus_requests_aborted_total{{{JOB},cause="client"}}': "0+20x30"},
        {FINISHED: "0+60x30", f'focus_requests_aborted_total{{{JOB},cause="shutdown"}}': "0+20x30"},
    ),
    "FocusSLOFastBurn": (70, {GOOD: "0+80x80", MISSED: "0+20x80"}, {GOOD: "0+90x80", MISSED: "0+10x80"}),
    "FocusSLOSlowBurn": (420, {GOOD: "0+90x440", MISSED: "0+10x440"}, {GOOD: "0+995x440", MISSED: "0+5x440"}),
    "FocusQueueSaturated": (20, {WAITING: "1x20"}, {WAITING: "9x10 0 9x9"}),
    "FocusKVSaturated": (20, {KV: "0.99x20", WAITING: "1x20"}, {KV: "0.99x20", WAITING: "0x20"}),
    "FocusPreemptionStorm": (25, {PREEMPTIONS: "0+10x30"}, {PREEMPTIONS: "0+5x30"}),
    "FocusAutoscalerAtMax": (20, {REPLICAS: "4x20", LIMIT: "4x20"}, {REPLICAS: "3x20", LIMIT: "4x20"}),
    "FocusDenseFallback": (25, {FALLBACK: "0+1x30"}, {FALLBACK: "5x30", SHORT: "0+20x30"}),
    "FocusKeptFractionDrift": (
        330,
        {CANDIDATE: "0+100x340", SELECTED: "0+20x200 4000+40x140"},
        {CANDIDATE: "0+100x340", SELECTED: "0+20x200 4000+25x140"},
    ),
}


def test_every_alert_fires_and_every_alert_stays_silent(tmp_path: Path) -> None:
    tests = []
    for name, (minute, firing, silent) in CASES.items():
        for series, samples in ((firing, [{"labels": f'{{alertname="{name}"}}', "value": 1}]), (silent, [])):
            tests.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": key, "values": values} for key, values in series.items()],
                    "promql_expr_test": [
                        {
                            "expr": FIRING % name,
                            "eval_time": f"{minute}m",
                            "exp_samples": samples,
                        }
                    ],
                }
            )
    path = tmp_path / "tests.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "rule_files": [str(alerts.FOLDER / "alerts.yaml")],
                "evaluation_interval": "1m",
                "tests": tests,
            }
        )
    )
    run = subprocess.run([promtool(), "test", "rules", path], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alert_has_a_case_and_a_runbook() -> None:
    (groups,) = yaml.safe_load((alerts.FOLDER / "alerts.yaml").read_text()).values()
    named = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert {rule["alert"] for rule in named} == set(CASES)
    runbooks = (alerts.FOLDER / "runbooks.md").read_text()
    for rule in named:
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert Path(path) == Path("deploy/monitoring/runbooks.md")
        assert anchor == rule["alert"].lower()
        assert f"\n## {rule['alert']}\n" in runbooks


def test_the_committed_alerts_are_those_that_python_generates() -> None:
    for path, text in alerts.files().items():
        assert path.read_text() == text, "run python -m deploy.monitoring.alerts"
