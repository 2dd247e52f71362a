"""A server in its own process group, for as long as a measurement needs it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

START_SECONDS = 300
ENGINE = ("VLLM::EngineCor", "VLLM::Worker")
"""How the names of the engine's processes begin, as the kernel cuts them."""
SESSION, UTIME, STIME = 3, 11, 12
"""Where /proc/PID/stat has them, counted after the name."""
FOCUS_SERVE = (sys.executable, "-m", "server.cli")


class Server:
    """A running server that answers `/health`."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], port: int) -> None:
        """Start `command --port PORT`; see `serving`."""
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--port", str(port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment},
            )

    def wait_until_ready(self) -> None:
        """Wait for the first answer.

        Raises:
            RuntimeError: The process stopped, or is not ready in time; with the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)

    def get(self, path: str) -> str:
        """Return the body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return str(response.read().decode())

    def processes(self) -> dict[str, list[str]]:
        """Return the fields of /proc/PID/stat after the name, by "name PID"; on Linux only."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                name, _, rest = (process / "stat").read_text().partition("(")[2].rpartition(")")
                if int(rest.split()[SESSION]) == self.process.pid:
                    found[f"{name} {process.name}"] = rest.split()
        return found

    def cpu_seconds(self, engine: bool) -> float:
        """Return the processor time that the engine's processes have used, or that all others have."""
        ticks = sum(
            int(fields[UTIME]) + int(fields[STIME])
            for name, fields in self.processes().items()
            if name.startswith(ENGINE) == engine
        )
        return ticks / os.sysconf("SC_CLK_TCK")

    def pin(self, engine: int, others: int) -> None:
        """Keep the engine's processes on one core and all others on another."""
        for name in self.processes():
            for thread in Path(f"/proc/{name.rpartition(' ')[2]}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.sched_setaffinity(int(thread.name), {engine if name.startswith(ENGINE) else others})

    def stop(self) -> int:
        """Ask the server to stop; return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)

    def kill(self) -> None:
        """End whatever is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)

    def _answers(self) -> bool:
        try:
            self.get("/health")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
) -> Iterator[Server]:
    """Run a server until the block ends.

    Args:
        command: What to start; `--port` is added.
        log: Where its output goes.
        environment: What is added to this process's.
        port: By default a free one.
    """
    server = Server(command, log, environment or {}, port or free_port())
    try:
        server.wait_until_ready()
        yield server
        server.stop()
    finally:
        server.kill()


def on_one_core() -> dict[str, str]:
    """Return the environment of a server that is to be kept `apart`: its engine has one thread.

    Two OpenMP threads on one core wait for each other without sleeping, and are ten times slower than one.
    """
    return {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0)))}


@contextlib.contextmanager
def apart(*servers: Server) -> Iterator[None]:
    """Keep engines on the first core, and everything else, this process included, on the last one.

    vLLM's engine and worker look for work without sleeping. Where two cores are all there are, whoever shares
    them with both may wait for seconds before the kernel lets it run. The servers must have been started
    with `on_one_core`. Linux only.
    """
    cores = os.sched_getaffinity(0)
    for server in servers:
        server.pin(min(cores), max(cores))
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
