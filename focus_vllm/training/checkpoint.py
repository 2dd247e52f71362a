"""Training progress on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where and how often progress is saved, and whether to go on from there."""

    path: Path
    every: int = 100
    """Steps from one save to the next."""
    resume: bool = False

    def save(
        self,
        step: int,
        seconds: float,
        parameters: list[torch.Tensor],
        optimizer: torch.optim.Optimizer,
        run: Mapping[str, Any],
    ) -> None:
        """Write the state after `step` steps: a reader sees the old file or the new one, never a part.

        `seconds` is how long they took, `run` what a resumed run must repeat, as plain values.
        """
        state = {
            "step": step,
            "seconds": seconds,
            "run": dict(run),
            "parameters": [parameter.detach().cpu() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        try:
            torch.save(state, scratch)
            Path(scratch).replace(self.path)
        finally:
            Path(scratch).unlink(missing_ok=True)

    def load(
        self, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, run: Mapping[str, Any]
    ) -> tuple[int, float]:
        """Bring `parameters` and `optimizer` to the saved state; return the steps and seconds behind it.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no checkpoint, or comes from another run; every difference is listed.
        """
        if not self.path.is_file():
            raise FileNotFoundError(f"no checkpoint at {str(self.path)!r} to resume from")
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            saved_run = state["run"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
            raise ValueError(f"{str(self.path)!r} is not a checkpoint: {error}") from None
        if reasons := [
            f"{name} was {saved_run.get(name)!r} and is {run.get(name)!r}"
            for name in sorted(set(saved_run) | set(run))
            if saved_run.get(name) != run.get(name)
        ]:
            raise ValueError(f"cannot resume from {str(self.path)!r}: " + "; ".join(reasons))
        if len(state["parameters"]) != len(parameters):
            raise ValueError(
                f"cannot resume from {str(self.path)!r}: it holds {len(state['parameters'])} tensors, "
                f"this version of focus-vllm trains {len(parameters)}: start again without --resume"
            )
        with torch.no_grad():
            for parameter, saved in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"]), float(state["seconds"])
