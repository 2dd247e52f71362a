"""Which adapter to serve with: a file, a folder of them or a Hugging Face repository."""

from __future__ import annotations

import re
from pathlib import Path

from focus_vllm.adapter import AdapterError, BaseModel, load_adapter, read_base_model
from server.errors import LaunchError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def choose_adapter(source: str, model: BaseModel) -> Path:
    """Return the adapter file for `model`, completely checked.

    Args:
        source: A file, a folder whose only adapter for `model` is taken, or a Hugging Face
            repository `owner/name` (downloaded, then treated as a folder).
        model: The model that will be served.

    Raises:
        LaunchError: There is no such adapter, more than one, or it must not be used with `model`.
    """
    path = _locate(source)
    if path.is_dir():
        path = _pick(path, source, model)
    try:
        adapter = load_adapter(path)
    except AdapterError as error:
        raise LaunchError(str(error)) from error
    if reasons := adapter.base_model.mismatches(model):
        raise LaunchError(str(AdapterError(path, reasons)))
    return path.resolve()


def _locate(source: str) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    if path.suffix == ".safetensors" or not REPOSITORY.fullmatch(source):
        raise LaunchError(
            f"no adapter at {source!r}: --adapter takes a file, a folder of adapters, "
            "a Hugging Face repository (owner/name), or none to serve without Focus"
        )
    return _download(source)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Model weights that share the repository are not wanted, and may be huge.
        folder = snapshot_download(
            repository, allow_patterns=["*.safetensors"], ignore_patterns=["model*.safetensors"]
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise LaunchError(
            f"there is no file or folder {repository!r}, and the Hugging Face repository of that name "
            f"cannot be read: {reason}"
        ) from error
    return Path(folder)


def _pick(folder: Path, source: str, model: BaseModel) -> Path:
    fitting: list[Path] = []
    refused: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            reasons = read_base_model(path).mismatches(model)
        except AdapterError as error:
            reasons = error.reasons
        if reasons:
            refused.append(f"  {path.name}: " + "; ".join(reasons))
        else:
            fitting.append(path)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(path.name for path in fitting)
        raise LaunchError(
            f"{source!r} has {len(fitting)} adapters for {model.name!r}: {names}; "
            "give --adapter the file of one"
        )
    found = "\n".join([":", *refused]) if refused else ", nor any other .safetensors file"
    raise LaunchError(f"{source!r} has no adapter for {model.name!r}{found}")
