"""What made an adapter: versions, commit, data, command. File names only, never where they lie."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import focus_vllm
from focus_vllm.training.data import file_sha256


def describe_run(argv: Sequence[str], data: Path, device: torch.device) -> dict[str, Any]:
    """Return the training record's entries about the run as a whole.

    Args:
        argv: The command line's words; paths in it are reduced to names.
        data: The text file.
        device: Where it ran.
    """
    record: dict[str, Any] = {
        "command": " ".join([Path(argv[0]).name, *(_without_folder(word) for word in argv[1:])]),
        "data": data.name,
        "data_sha256": file_sha256(data),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {
            "focus_vllm": focus_vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if commit := _git_commit():
        record["commit"] = commit
    return record


def _without_folder(word: str) -> str:
    name, separator, value = word.partition("=")
    if separator and name.startswith("--"):
        return f"{name}={_without_folder(value)}"
    return Path(word).resolve().name if Path(word).is_absolute() or Path(word).exists() else word


def _git_commit() -> str | None:
    """Return the commit of the checkout that focus_vllm runs from, if it is one."""
    root = Path(focus_vllm.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
