"""What a measurement was made on and with."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def describe(info: dict[str, Any]) -> dict[str, Any]:
    """Return hardware, software, command and date; `info` is what the servers say of themselves, by side."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "loadtest", *sys.argv[1:]]),
        "commit": commit(),
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "cpu": _cpu(),
        "python": platform.python_version(),
        "servers": info,
    }


def commit() -> str | None:
    """Return what this is a checkout of; FOCUS_COMMIT says it where files were only copied."""
    here = str(Path(__file__).parent)
    return os.environ.get("FOCUS_COMMIT") or _output("git", "-C", here, "describe", "--always", "--dirty")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0] if names else platform.machine()}"


def _output(*command: str) -> str | None:
    if not shutil.which(command[0]):
        return None
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout.strip() or None
