"""The dashboards without Grafana: a page with the result of every panel's query.

python -m deploy.monitoring.preview --prometheus http://localhost:9090 --minutes 15 --output dashboards.html
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import urllib.parse
import urllib.request
from html import escape
from pathlib import Path
from typing import Any

from deploy.monitoring.dashboards import DASHBOARDS, Panel
from loadtest.charts import lines, short
from loadtest.report import STYLE

EVERYTHING = {"$namespace": ".*", "$job": ".*", "$instance": ".*", "$bucket": ".*"}
POINTS = 120


def substitute(expression: str, rate_interval: str) -> str:
    """Return a panel's PromQL with Grafana's variables filled in."""
    for name, value in {**EVERYTHING, "$__rate_interval": rate_interval}.items():
        expression = expression.replace(name, value)
    return expression


def legend(template: str, labels: dict[str, str]) -> str:
    """Fill in `{{label}}`."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template)


def preview(prometheus: str, minutes: float, rate_interval: str = "1m") -> str:
    """Return the page."""
    body = []
    for title, panels in DASHBOARDS.values():
        figures = [_figure(prometheus, panel, minutes, rate_interval) for panel in panels()]
        body.append(f'<h2>{escape(title)}</h2><div class="charts">{"".join(figures)}</div>')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Dashboards</title>'
        f"<style>{STYLE}</style>{''.join(body)}</html>\n"
    )


def _figure(prometheus: str, panel: Panel, minutes: float, rate_interval: str) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    latest: dict[str, float] = {}
    now = time.time()
    for target in panel["targets"]:
        expression = substitute(target["expr"], rate_interval)
        for found in _query(prometheus, expression, now, minutes):
            labels = found["metric"]
            name = legend(target["legendFormat"], labels)
            if panel["type"] == "table":
                name = ", ".join([name, *(f"{key} {value}" for key, value in labels.items())])
            points = [((moment - now) / 60, float(value)) for moment, value in found["values"]]
            series[name] = [point for point in points if point[1] == point[1]]
            if series[name]:
                latest[name] = series[name][-1][1]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] in ("stat", "table") or not latest:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{short(value)}</td></tr>" for name, value in latest.items()
        )
        rows = rows or "<tr><td>no data</td></tr>"
        return f"<figure><b>{escape(panel['title'])}</b><table>{rows}</table></figure>"
    return lines(panel["title"], series, "minutes", "" if unit == "short" else unit)


def _query(prometheus: str, expression: str, now: float, minutes: float) -> list[dict[str, Any]]:
    parameters = {"query": expression, "start": now - 60 * minutes, "end": now, "step": 60 * minutes / POINTS}
    url = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=60) as response:
        return list(json.load(response)["data"]["result"])


def main() -> int:
    """Parse the command line and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prometheus", default="http://localhost:9090")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.write_text(preview(arguments.prometheus, arguments.minutes))
    sys.stdout.write(f"{arguments.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
