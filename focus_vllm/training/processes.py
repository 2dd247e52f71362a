"""The processes that train together, as `accelerate launch` started them; one if it did not."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Return accelerate's view of this process and those beside it: GPUs if there are any, else CPUs."""
    return PartialState(cpu=not torch.cuda.is_available())
