"""The Dockerfile, as far as it can be tried without Docker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def stages() -> dict[str, list[list[str]]]:
    """Return the words of every instruction, by stage."""
    found: dict[str, list[list[str]]] = {}
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        words = line.split()
        if words and words[0] == "FROM":
            found[words[-1]] = []
        elif found and words and words[0].isupper():
            list(found.values())[-1].append(words)
    return found


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install as the image does: a wheel from the copied paths alone, into an empty place."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "prefix"))
    for words in stages()["wheel"]:
        if words[0] == "COPY":
            *paths, to = words[1:]
            for path in paths:
                if (ROOT / path).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / path, source / to, ignore=ignored, dirs_exist_ok=True)
                else:
                    shutil.copy(ROOT / path, source / to)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True, timeout=120)
    return target


def focus_serve(prefix: Path, folder: Path, *arguments: str) -> str:
    """Run what ENTRYPOINT names, far from the checkout."""
    run = subprocess.run(
        [sys.executable, "-I", "-c", START, str(prefix), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


# -I keeps the checkout out; its editable installation must not be found either.
START = """
import runpy, sys
prefix = sys.argv.pop(1)
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path.insert(0, prefix)
import server
assert server.__file__.startswith(prefix), server.__file__
sys.argv[0] = f"{prefix}/bin/focus-serve"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_hadolint_has_nothing_to_say() -> None:
    run = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout


def test_what_the_image_installs_serves_the_demo(prefix: Path, tmp_path: Path) -> None:
    command = focus_serve(prefix, tmp_path, "--dry-run")
    assert "vllm serve" in command
    assert str(prefix / "focus_vllm/demo/focus.safetensors") in command


def test_the_documented_command_line_is_understood(prefix: Path, tmp_path: Path) -> None:
    """`docker run focus-serve --model ... --adapter focus.safetensors`, the adapter in the working folder."""
    shutil.copy(ROOT / "focus_vllm/demo/focus.safetensors", tmp_path)
    demo = prefix / "focus_vllm/demo/model"
    command = focus_serve(
        prefix, tmp_path, "--model", str(demo), "--adapter", "focus.safetensors",
        "--tensor-parallel-size", "4", "--dry-run",
    )  # fmt: skip
    assert "--tensor-parallel-size 4" in command
    assert "focus.safetensors" in command


def test_images_run_as_a_user_without_privileges_and_report_their_health() -> None:
    for name in ("cpu", "gpu"):
        end = [words for words in stages()[name] if words[0] in ("USER", "HEALTHCHECK", "ENTRYPOINT")]
        assert [words[0] for words in end] == ["USER", "HEALTHCHECK", "ENTRYPOINT"]
        assert end[0][1] == "10001"


def test_images_know_the_commit_they_were_built_from() -> None:
    for name in ("cpu", "gpu"):
        assert ["ARG", "FOCUS_COMMIT=unknown"] in stages()[name]
        (environment,) = (words for words in stages()[name] if words[0] == "ENV")
        assert "FOCUS_COMMIT=$FOCUS_COMMIT" in environment
