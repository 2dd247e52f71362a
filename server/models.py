"""Which model to serve: the embedded demo, an alias, a folder or a Hugging Face name."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from focus_vllm.adapter import BaseModel
from server.errors import LaunchError

DEMO = "demo"
# The adapter lies beside the model's folder: inside it, vLLM would take it for a shard of the model.
DEMO_FOLDER = Path(str(resources.files("focus_vllm"))) / "demo" / "model"
DEMO_ADAPTER = DEMO_FOLDER.parent / "focus.safetensors"


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """A model to serve."""

    location: str
    """What vLLM loads: a folder or a Hugging Face name."""
    served_names: tuple[str, ...] = ()
    """Names for requests' `model` field; empty: vLLM's default, `location`."""


def read_aliases(path: Path | None = None) -> dict[str, str]:
    """Return alias -> model: the built-in ones, overlaid with those of `path`.

    Raises:
        LaunchError: `path` is not a TOML file with one table `[models]` of strings.
    """
    aliases = _read_table(Path(str(resources.files("server"))) / "aliases.toml")
    return aliases | _read_table(path) if path else aliases


def resolve_model(name: str, aliases: Mapping[str, str]) -> Model:
    """Return the model behind `name`; a name that is no alias is taken as it is."""
    if name == DEMO:
        return Model(str(DEMO_FOLDER), ("focus-demo",))
    if name in aliases:
        return Model(aliases[name], (name, aliases[name]))
    return Model(name)


def describe_model(model: Model, revision: str | None = None, trust_remote_code: bool = False) -> BaseModel:
    """Read the shape of a model from its configuration, downloading that file if needed.

    Raises:
        LaunchError: There is no readable configuration.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            model.location, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"cannot read the configuration of model {model.location!r}: {_first_line(error)}\n"
            "give --model an alias (focus-serve --list-models), a folder or a Hugging Face name"
        ) from error
    return BaseModel.from_config(model.location, config)


def _read_table(path: Path) -> dict[str, str]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchError(f"cannot read the alias file {str(path)!r}: {error}") from error
    models = content.get("models")
    if set(content) != {"models"} or not isinstance(models, dict):
        raise LaunchError(f"alias file {str(path)!r} has {sorted(content)}, expected one table [models]")
    if wrong := sorted(name for name, model in models.items() if not isinstance(model, str)):
        raise LaunchError(f"alias file {str(path)!r}: the model of {wrong} is not a string")
    return models


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
