"""A real focus-serve with two API server processes under load: Prometheus scrapes it, and it drains."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator

import httpx
import pytest
from debian import prometheus, promtool
from drains import check_drain

from loadtest.scrape import BUCKETS, Prometheus, measure, missing, scraping
from loadtest.serving import FOCUS_SERVE, Server, apart, on_one_core, serving

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [*FOCUS_SERVE, "--api-server-count", "2"]
    environment = {"FOCUS_PROMPT_BUCKETS": BUCKETS, "FOCUS_STATS_INTERVAL": "1", **on_one_core()}
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(command, log, environment) as server, apart(server):
        yield server


@pytest.fixture(scope="module")
def scraped(server: Server) -> Iterator[Prometheus]:
    with scraping(prometheus(), [server.url.removeprefix("http://")]) as running:
        yield running


def test_prometheus_counts_what_the_clients_count_and_agrees_on_their_latency(
    server: Server, scraped: Prometheus
) -> None:
    answers, rows = measure(scraped, server.url, num=24, concurrency=2, seed=random.randrange(2**32))
    assert all(answer.complete for answer in answers)
    assert [row.client_requests for row in rows] == [6] * 4
    assert [problem for row in rows for problem in row.disagreements()] == []
    assert missing(scraped) == []
    (engine,) = scraped.query("time() - focus_engine_last_step_timestamp_seconds")
    assert 0 <= float(engine["value"][1]) < 10


def test_promtool_finds_nothing_to_lint_in_our_metrics(server: Server, scraped: Prometheus) -> None:
    ours = "".join(
        f"{line}\n"
        for line in server.get("/metrics").splitlines()
        if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith("focus_")
    )
    assert ours.count("# TYPE focus_") >= 20
    lint = subprocess.run([promtool(), "check", "metrics"], input=ours, capture_output=True, text=True)
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")


def test_both_api_servers_drain_on_request_under_load(server: Server) -> None:
    check_drain(server, lambda: httpx.post(f"{server.url}/focus/drain").raise_for_status())
