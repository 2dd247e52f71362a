"""Route, and list what decodes attend to, beside the QKV projection.

Routing one token takes 7 us and one multiprocessor of an H200's 132, its list a few more; the projection of
an 8B model takes longer. In a CUDA graph they need not wait for each other: `beside` captures them on another
stream and `rejoin` has the first wait for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Capture what is launched inside on the second stream; outside a capture, change nothing."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield
        return
    second = _second_stream(device)
    second.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(second):
        yield


def rejoin(device: torch.device) -> None:
    """Have the current stream wait for what `beside` captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).wait_stream(_second_stream(device))
