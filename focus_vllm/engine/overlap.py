"""Route, and list what decodes attend to, beside the layer's other work.

Routing one token takes 4 us and a few multiprocessors of an H200's 132, its list a few more. In a CUDA graph
the layer need not wait for them: `beside` captures them on another stream and `rejoin` has the layer's wait,
for routing after the QKV projection and for lists not before attention.
"""

from __future__ import annotations

import contextlib
import enum
import functools
from collections.abc import Iterator

import torch


class Beside(enum.Enum):
    """What is captured beside: both on one stream, for lists begin while routing runs."""

    ROUTING = enum.auto()
    LISTS = enum.auto()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@functools.cache
def _end(device: torch.device, what: Beside) -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Capture what is launched inside on a stream of its own, after the current one's work so far.

    Outside a capture, change nothing.
    """
    if not _captured(device):
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def mark(device: torch.device, what: Beside) -> None:
    """Say, inside `beside`, that this is launched."""
    if _captured(device):
        _end(device, what).record(torch.cuda.current_stream(device))


def rejoin(device: torch.device, what: Beside) -> None:
    """Have the current stream wait for what was marked."""
    if _captured(device):
        torch.cuda.current_stream(device).wait_event(_end(device, what))
