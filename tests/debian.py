"""Programs that are in no Python package: from PATH, or out of a Debian package, unpacked in the venv."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

UNPACKED = Path(sys.prefix) / "debian"


def program(name: str, package: str) -> str:
    """Return the path of a program, after downloading its Debian package if it is nowhere."""
    if found := shutil.which(name):
        return found
    path = UNPACKED / "usr/bin" / name
    UNPACKED.mkdir(exist_ok=True)
    with (UNPACKED / "lock").open("w") as lock, tempfile.TemporaryDirectory() as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            download = ["apt-get", "-o", "APT::Sandbox::User=root", "download", package]
            if subprocess.run(download, cwd=folder, capture_output=True).returncode:
                subprocess.run(["apt-get", "update"], capture_output=True)
                fetched = subprocess.run(download, cwd=folder, capture_output=True, text=True)
                assert fetched.returncode == 0, (
                    f"{name} is not on PATH and cannot be downloaded: install {package}\n{fetched.stderr}"
                )
            (archive,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg-deb", "--extract", archive, UNPACKED], check=True)
    return str(path)


def promtool() -> str:
    """Return Prometheus's checker."""
    return program("promtool", "prometheus")


def prometheus() -> str:
    """Return the Prometheus server."""
    return program("prometheus", "prometheus")
