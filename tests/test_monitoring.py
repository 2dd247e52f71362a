"""Dashboards and alerts on the figures of focus-serve under load, scraped by a real Prometheus."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from debian import prometheus

from deploy.monitoring import alerts, dashboards
from deploy.monitoring.preview import preview, substitute
from loadtest.__main__ import main as loadtest
from loadtest.advise import read_trace
from loadtest.scrape import Prometheus, scraping
from loadtest.serving import FOCUS_SERVE, serving

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

CLUSTER = "kube_horizontalpodautoscaler"
"""Metrics of Kubernetes, which no focus-serve exports."""
LOAD = [
    *("--lengths", "300", "3000", "--concurrency", "2", "--requests", "6", "--output-tokens", "4"),
    *("--turns", "0", "--beside", "0"),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Path, int]]:
    """Run a load test through one server as both sides; give Prometheus, the report and its exit status."""
    folder = tmp_path_factory.mktemp("monitoring")
    # Objectives that a busy machine meets as well.
    slow = {"FOCUS_SLO_TTFT": "120", "FOCUS_SLO_TPOT": "30", "FOCUS_SLO_E2E": "300"}
    environment = {"FOCUS_STATS_INTERVAL": "0.5", "FOCUS_PROMPT_BUCKETS": "1k,8k", **slow}
    command = [*FOCUS_SERVE, "--log-format", "json"]
    with serving(command, folder / "access.jsonl", environment) as server:
        target = server.url.removeprefix("http://")
        with scraping(prometheus(), [target], rules=[alerts.FOLDER / "alerts.yaml"]) as scraper:
            give_up(server.url)
            status = loadtest(
                ["run", "--output", str(folder), "--dense", server.url, "--focus", server.url, *LOAD]
            )
            scraper.wait_for_scrapes(4)
            yield scraper, folder, status


def give_up(url: str) -> None:
    """Ask for much and leave soon."""
    body = {"model": "focus-demo", "prompt": "Once", "max_tokens": 4000, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(request, timeout=1)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def panels() -> list[tuple[str, str]]:
    """Return `(title, PromQL)` of every query of every dashboard."""
    found = []
    for uid, (_, make) in dashboards.DASHBOARDS.items():
        for item in make():
            for target in item["targets"]:
                found.append(
                    (f"{uid}: {item['title']}, {target['legendFormat']}", substitute(target["expr"], "1m"))
                )
    return found


def operands(expression: Any) -> list[Any]:
    """Return what an alert compares: the parts of its expression that hold before anything is wrong."""
    if isinstance(expression, promql_parser.ParenExpr):
        return operands(expression.expr)
    if isinstance(expression, promql_parser.BinaryExpr) and str(expression.op) in ("and", "or", *COMPARISONS):
        return [*operands(expression.lhs), *operands(expression.rhs)]
    return [] if isinstance(expression, promql_parser.NumberLiteral) else [expression]


COMPARISONS = (">", "<", ">=", "<=", "==", "!=")


def rules() -> list[dict[str, Any]]:
    content = yaml.safe_load((alerts.FOLDER / "alerts.yaml").read_text())
    return [rule for group in content["groups"] for rule in group["rules"]]


def test_every_panel_shows_something_plausible(loaded: tuple[Prometheus, Path, int]) -> None:
    scraper = loaded[0]
    empty, absurd = [], []
    for title, expression in panels():
        values = [float(each["value"][1]) for each in scraper.query(expression)]
        numbers = [value for value in values if value == value]
        if not numbers:
            empty.append(f"{title}: {expression}")
        if any(not -1e-9 <= value < 1e12 for value in numbers) and "budget left" not in title:
            absurd.append(f"{title}: {numbers}")
        if title.startswith("overview: Keys read") and not all(0 < value <= 1 for value in numbers):
            absurd.append(f"{title}: {numbers}")
    assert not empty, "\n".join(empty)
    assert not absurd, "\n".join(absurd)


def test_the_preview_shows_every_panel(loaded: tuple[Prometheus, Path, int]) -> None:
    page = preview(loaded[0].url, minutes=2)
    for _, make in dashboards.DASHBOARDS.values():
        for panel in make():
            assert escape(panel["title"]) in page


def test_panels_agree_with_the_clients(loaded: tuple[Prometheus, Path, int]) -> None:
    scraper, folder, _ = loaded
    found = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    warmups = 2 * (1 + 2)  # on each side the first of all, and one for each length
    (total,) = scraper.query("sum(focus_requests_finished_total{finish_reason='length'})")
    assert float(total["value"][1]) == len(found) + warmups
    (mean,) = scraper.query(
        "sum(focus_request_ttft_seconds_sum{prompt_bucket='1k-8k'}) "
        "/ sum(focus_request_ttft_seconds_count{prompt_bucket='1k-8k'})"
    )
    long = [request["ttft"] for request in found if request["prompt_tokens"] > 1024]
    assert float(mean["value"][1]) == pytest.approx(sum(long) / len(long), rel=0.3)


def test_advice_counts_the_requests_of_the_servers_log(
    loaded: tuple[Prometheus, Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = loaded[1]
    sent = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    with (folder / "access.jsonl").open() as lines:
        trace = read_trace(lines)
    answered = [(prompt, generated) for prompt, generated in trace if generated in (4, 8)]
    assert len(answered) == len(sent) + 2 * (1 + 2)  # warm-ups
    assert sum(prompt for prompt, generated in answered if generated == 4) == sum(
        request["prompt_tokens"] for request in sent
    )
    assert loadtest(["advise", "--trace", str(folder / "access.jsonl")]) == 0
    assert f"{len(trace)} requests" in capsys.readouterr().out


def test_what_every_alert_compares_is_there(loaded: tuple[Prometheus, Path, int]) -> None:
    scraper = loaded[0]
    missing = []
    for rule in rules():
        for operand in operands(promql_parser.parse(rule["expr"])):
            # Values that only come up when something is wrong: any other of the same label will do.
            text = re.sub(r'(code|reason)(=~|!=|=)"[^"]*"', r'\1!=""', operand.prettify())
            # No history of a day.
            text = text.replace(" offset 1h", "")
            if text.startswith("absent(") or CLUSTER in text:
                continue
            if not scraper.query(text):
                missing.append(f"{rule.get('alert', rule.get('record'))}: {text}")
    assert not missing, "\n".join(missing)


def test_a_healthy_server_sets_off_no_alert(loaded: tuple[Prometheus, Path, int]) -> None:
    assert [each["metric"]["alertname"] for each in loaded[0].query('ALERTS{alertstate="firing"}')] == []


def test_a_load_test_finds_cold_prompts_cold_and_warm_ones_warm(loaded: tuple[Prometheus, Path, int]) -> None:
    """The second side sends the first one's prompts with its salts, to the same server."""
    _, folder, status = loaded
    assert status == 1
    for row in rows(folder):
        if row["scenario"] == "grid":
            hits = row["server_prefix_hits"]
            assert hits < 0.01 if row["side"] == "dense" else hits > 0.5
    manifest = json.loads((folder / "manifest.json").read_text())
    assert all("came from the prefix cache" in problem for problem in manifest["problems"])
    for length in (300, 3000):
        assert any(problem.startswith(f"focus grid {length} x 2") for problem in manifest["problems"])


def test_the_report_has_the_figures_of_its_requests(loaded: tuple[Prometheus, Path, int]) -> None:
    _, folder, _ = loaded
    page = (folder / "report.html").read_text()
    requests = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    for row in rows(folder):
        mine = sorted(
            request["ttft"]
            for request in requests
            if all(request[name] == row[name] for name in ("side", "scenario", "length", "concurrency"))
        )
        assert row["completed"] == len(mine) > 0
        assert row["ttft_p50"] == mine[len(mine) // 2]
        assert f"<td>{row['ttft_p50']:.3g}</td>" in page
        assert row["prompt_tokens"] == pytest.approx(row["length"], rel=0.01)
