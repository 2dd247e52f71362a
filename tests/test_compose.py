"""The compose files, as Docker would read them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose
from debian import promtool

from deploy.monitoring import dashboards

COMPOSE = Path(__file__).parents[1] / "deploy/compose"
VARIABLE = re.compile(r"\$\{(\w+)[^}]*\}")


def services(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((COMPOSE / name).read_text())["services"])


@pytest.mark.parametrize("name", ["compose.yaml", "gpu.yaml"])
def test_the_file_follows_the_compose_specification(name: str) -> None:
    text = VARIABLE.sub(r"/\1", (COMPOSE / name).read_text()).replace("/GPUS", "1")
    assert "focus-serve" in PyCompose.from_yaml(text).service_names()
    with pytest.raises(Exception, match="shm_sice"):
        PyCompose.from_yaml(text.replace("shm_size", "shm_sice"))


def test_every_mounted_file_is_in_the_repository() -> None:
    mounts = [
        volume for service in services("compose.yaml").values() for volume in service.get("volumes", [])
    ]
    sources = [source for source, *_ in (mount.split(":") for mount in mounts) if source.startswith(".")]
    assert len(sources) == 5
    for source in sources:
        assert (COMPOSE / source).exists()


def test_nothing_is_open_to_the_network() -> None:
    for service in services("compose.yaml").values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_images_built_are_stages_of_the_dockerfile() -> None:
    stages = [
        line.split()[-1] for line in (COMPOSE / "../../Dockerfile").read_text().splitlines() if "FROM" in line
    ]
    for name in ("compose.yaml", "gpu.yaml"):
        assert services(name)["focus-serve"]["build"]["target"] in stages


def test_prometheus_accepts_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "prometheus.yaml").write_text((COMPOSE / "prometheus.yaml").read_text())
    (tmp_path / "alerts.yaml").write_text((COMPOSE / "../monitoring/alerts.yaml").read_text())
    command = [promtool(), "check", "config", tmp_path / "prometheus.yaml"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_committed_dashboards_are_those_that_python_generates() -> None:
    files = dashboards.files()
    assert set(dashboards.FOLDER.iterdir()) == set(files)
    for path, text in files.items():
        assert path.read_text() == text, "run python -m deploy.monitoring.dashboards"
