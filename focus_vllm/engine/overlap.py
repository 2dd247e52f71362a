"""Route, and list what decodes attend to, beside the layer's other work.

Routing one token takes 4 us and a few multiprocessors of an H200's 132, its list a few more. In a CUDA graph
the layer need not wait for them: `beside` captures them on other streams and `rejoin` has the layer's wait,
for routing after the QKV projection and for lists not before attention.
"""

from __future__ import annotations

import contextlib
import enum
import functools
from collections.abc import Iterator

import torch


class Beside(enum.Enum):
    """What is captured on a stream of its own."""

    ROUTING = enum.auto()
    LISTS = enum.auto()


@functools.cache
def _stream(device: torch.device, what: Beside) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def beside(device: torch.device, what: Beside) -> Iterator[None]:
    """Capture what is launched inside on its stream, after the current one's work so far.

    Outside a capture, change nothing.
    """
    if not _captured(device):
        yield
        return
    stream = _stream(device, what)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def rejoin(device: torch.device, what: Beside) -> None:
    """Have the current stream wait for what `beside` captured."""
    if _captured(device):
        torch.cuda.current_stream(device).wait_stream(_stream(device, what))
