"""What can be set about `focus-serve`: by flag, by FOCUS_* variable, or in a TOML file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from server.errors import LaunchError
from server.objectives import BUCKETS, TARGETS, Objectives

PREFIX = "FOCUS_"
LAUNCHER_ONLY = ("model", "adapter", "alias_file")


class Settings(BaseSettings):
    """Every setting of focus-serve; a flag wins over a variable, and that over the file.

    The server's processes read theirs from the environment, which the launcher completes.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True)

    model: str = Field(default="demo", description="alias, folder or Hugging Face name")
    adapter: str | None = Field(
        default=None,
        description="file, folder or Hugging Face repository with an adapter made for the model; "
        "none: serve without Focus",
    )
    alias_file: Path | None = Field(
        default=None, description="TOML file with a table [models] of more aliases"
    )

    api_key_file: Path | None = Field(
        default=None,
        description="TOML file of API keys (--make-key makes one); without it, everybody may ask",
    )
    public_paths: str = Field(
        default="/livez,/readyz,/startupz,/health,/",
        description="paths that need no key, separated by commas",
    )
    requests_per_minute: int = Field(
        default=0, ge=0, description="of one API key, in each process; 0: no limit"
    )
    tokens_per_minute: int = Field(
        default=0, ge=0, description="prompt and generated, of one API key, in each process; 0: no limit"
    )
    max_queued_requests: int = Field(
        default=1024, ge=1, description="requests without a first token, in each process; more get 503"
    )
    max_queued_tokens: int = Field(
        default=4_000_000, ge=1, description="prompt tokens of those requests, in each process; more get 503"
    )
    shared_prefills: int = Field(
        default=3,
        ge=0,
        description="long prompts beside which an engine step has room for short ones; 0: none",
    )
    max_body_mb: float = Field(
        default=64, gt=0, description="size of a request's body, in MiB; more gets 413"
    )
    request_timeout: float = Field(
        default=3600, gt=0, description="seconds that a request may take as a whole"
    )
    sse_keep_alive: float = Field(
        default=15, ge=0, description="seconds of silence after which a stream gets an empty event; 0: never"
    )
    drain_timeout: int = Field(
        default=120, ge=0, description="seconds that requests under way get to finish when the server stops"
    )
    stall_seconds: float = Field(
        default=300, gt=0, description="seconds without a step of a busy engine after which /livez fails"
    )
    log_format: Literal["text", "json"] = Field(default="text", description="format of the log")
    log_prompts: bool = Field(default=False, description="write the bodies of requests to the log as well")
    stats_interval: float = Field(
        default=5, gt=0, allow_inf_nan=False, description="seconds between two reads of the workers' counters"
    )
    prompt_buckets: str = Field(
        default=BUCKETS, description="bounds of the classes of prompt length in the metrics"
    )
    slo_ttft: str = Field(
        default=TARGETS["ttft"], description="target of the time to the first token, in seconds"
    )
    slo_tpot: str = Field(default=TARGETS["tpot"], description="target of the time per output token")
    slo_e2e: str = Field(default=TARGETS["e2e"], description="target of the time of a whole request")

    def environment(self) -> dict[str, str]:
        """Return FOCUS_* variables that make the server's processes read the same."""
        changed = self.model_dump(mode="json", exclude_defaults=True, exclude=set(LAUNCHER_ONLY))
        return {PREFIX + name.upper(): str(value) for name, value in changed.items()}


def read_settings(flags: Mapping[str, Any], file: Path | None = None) -> Settings:
    """Combine `flags`, the environment and `file`.

    Raises:
        LaunchError: A value is wrong or a name unknown; every one is listed with its remedy.
    """
    known = _read_file(file) if file else {}

    class Sources(Settings):
        model_config = SettingsConfigDict(toml_file=file if known else None, extra="ignore")

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    try:
        settings = Sources(**flags)
        Objectives.read(settings.environment())
        return settings
    except ValidationError as error:
        raise LaunchError("; ".join(_explain(problem, flags, file) for problem in error.errors())) from None


def flag(name: str) -> str:
    """Return the flag of the setting `name`."""
    return "--" + name.replace("_", "-")


def _read_file(file: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchError(f"cannot read the settings file {str(file)!r}: {error}") from error
    if unknown := sorted(set(content) - set(Settings.model_fields)):
        raise LaunchError(
            f"settings file {str(file)!r}: no setting is called {', '.join(unknown)}; "
            f"there are {', '.join(Settings.model_fields)}"
        )
    return content


def _explain(problem: Any, flags: Mapping[str, Any], file: Path | None) -> str:
    name = str(problem["loc"][0])
    variable = PREFIX + name.upper()
    if name in flags:
        place = flag(name)
    else:
        place = variable if os.environ.get(variable) else f"{name} in {str(file)!r}"
    field = Settings.model_fields[name]
    # pydantic says "Input should be greater than 0".
    reason = problem["msg"].removeprefix("Input ")
    return (
        f"{place} is {problem['input']!r}, it {reason}: {field.description} (without it: {field.default!r})"
    )
