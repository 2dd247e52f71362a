"""From resolved model and adapter to a running `vllm serve`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from focus_vllm.adapter import load_adapter
from focus_vllm.engine import steps
from focus_vllm.engine.settings import FocusUnsupportedError, override
from server.errors import LaunchError
from server.keys import read_keys
from server.models import DEMO_FOLDER, Model
from server.settings import Settings

# vLLM configures handlers for its own logger only.
logger = logging.getLogger("vllm.focus_serve.launch")

GATE = "server.gate.Gate"
LOG_CONFIG = Path(str(resources.files("server"))) / "logging.json"
WORKER_EXTENSION = "focus_vllm.engine.worker.FocusWorkerExtension"
ENVIRONMENT = {
    # On CPUs oneDNN compiles each of a layer's products for every number of tokens in a step, some 0.3 MiB
    # each, and keeps the last 1,024. That is what made workers grow, and glibc's heap grew on as new ones
    # replaced them. 128 is what vLLM keeps in each layer, 32 numbers of tokens, for a layer's four products.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    # vLLM looks for n-gram drafts with one thread, but Numba starts as many as there are cores. On CPUs these
    # and PyTorch's wait for each other: 160 ms a token of the demo on two cores, instead of 8.
    "NUMBA_NUM_THREADS": "1",
}
"""What is set unless the user has set it."""
GRAPHS, MOST_GRAPH_TOKENS = "--max-cudagraph-capture-size", "1024"
"""Steps of so many tokens still run in CUDA graphs, twice what vLLM chooses on Hopper. Up to there a GPU
is done with a layer of an 8B model before its host has launched the next, and routing is one more launch.
"""
GRAPH_FLAGS = ("--cudagraph-capture-sizes", "--compilation-config", "-cc")
"""What vLLM takes together with GRAPHS only if both say the same."""
PLUGIN = "focus"
PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins", "vllm.stat_logger_plugins")
OTHER_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """One `vllm serve`: what to run, not yet run."""

    arguments: tuple[str, ...]
    """What follows `vllm serve`."""
    environment: Mapping[str, str]
    """What is added to the environment."""

    def command(self) -> str:
        """Return a line for a POSIX shell that does the same."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(["vllm", "serve", *self.arguments])])


def plan_launch(
    model: Model,
    adapter: Path | None,
    additional_config: Mapping[str, Any],
    vllm_arguments: Sequence[str],
    environ: Mapping[str, str],
    settings: Settings,
) -> Launch:
    """Decide how to start vLLM.

    Args:
        model: The model to serve.
        adapter: A checked adapter file, or None to serve without Focus.
        additional_config: The user's own `--additional-config`.
        vllm_arguments: The user's other arguments; they win over the defaults chosen here.
        environ: The process environment.
        settings: Those of focus-serve.

    Raises:
        LaunchError: The arguments or the environment contradict Focus; every reason is listed.
    """
    reasons = _conflicts(adapter, additional_config, vllm_arguments, environ)
    if reasons := reasons + _key_conflicts(vllm_arguments, environ, settings):
        raise LaunchError("; ".join(reasons))
    config = dict(additional_config)
    # vLLM takes the last of a repeated flag: defaults first, then the user's, then what Focus needs.
    # Of several --middleware the last is outermost: nothing of the user's runs before the gate.
    arguments = [model.location, *_defaults(model, adapter, vllm_arguments, settings), *vllm_arguments]
    arguments += ["--middleware", GATE]
    if adapter:
        config["focus"] = {**config.get("focus", {}), "adapter": str(adapter)}
        arguments += ["--worker-extension-cls", WORKER_EXTENSION]
    if config:
        arguments += ["--additional-config", json.dumps(config)]
    environment = {
        "VLLM_PLUGINS": _plugins(environ.get("VLLM_PLUGINS")),
        **{name: environ.get(name, value) for name, value in ENVIRONMENT.items()},
        **settings.environment(),
    }
    if "--long-prefill-token-threshold" not in _flags(vllm_arguments):  # 0 is a choice as well
        environment[steps.VARIABLE] = str(settings.shared_prefills)
    if settings.log_format == "json":
        environment["VLLM_LOGGING_CONFIG_PATH"] = environ.get("VLLM_LOGGING_CONFIG_PATH", str(LOG_CONFIG))
    if model.location == str(DEMO_FOLDER):
        environment["VLLM_CPU_KVCACHE_SPACE"] = environ.get("VLLM_CPU_KVCACHE_SPACE", "2")
    return Launch(tuple(arguments), environment)


def serve(launch: Launch) -> int:
    """Run vLLM's server in this process until it is stopped; return 1 if its engine died, else 0.

    Raises:
        LaunchError: vLLM is missing or of an untested version, or Focus cannot be loaded.
    """
    os.environ.update(launch.environment)
    _check_installation()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()  # type: ignore[no-untyped-call]
    parser = FlexibleArgumentParser(prog="vllm")  # type: ignore[no-untyped-call]
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    arguments = parser.parse_args(["serve", *launch.arguments])
    command.validate(arguments)
    command.cmd(arguments)
    lifecycle = getattr(arguments, "focus_lifecycle", None)
    return int(lifecycle is not None and lifecycle.engine_failed)


def peek(vllm_arguments: Sequence[str]) -> argparse.Namespace:
    """Read, and leave in place, the vLLM arguments that Focus has to know."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--revision")
    parser.add_argument("--trust-remote-code", "--trust_remote_code", action="store_true")
    parser.add_argument("--worker-extension-cls", "--worker_extension_cls", default="")
    return parser.parse_known_args(vllm_arguments)[0]


def _conflicts(
    adapter: Path | None,
    additional_config: Mapping[str, Any],
    vllm_arguments: Sequence[str],
    environ: Mapping[str, str],
) -> list[str]:
    reasons = []
    if vllm_arguments and not vllm_arguments[0].startswith("-"):
        reasons.append(f"unexpected argument {vllm_arguments[0]!r}: name the model with --model")
    if environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        reasons.append("VLLM_USE_RUST_FRONTEND is set: vLLM's Rust front end loads no plugins; unset it")
    if any(argument.replace("_", "-").startswith("--additional-config.") for argument in vllm_arguments):
        reasons.append("give --additional-config as one JSON object, not by dotted keys")
    focus = additional_config.get("focus", {})
    if not isinstance(focus, dict) or "adapter" in focus or (focus and not adapter):
        reasons.append(f"--additional-config has focus={focus!r}: name the adapter with --adapter")
    elif adapter and focus:
        reasons += _override_problems(adapter, focus)
    extension = peek(vllm_arguments).worker_extension_cls
    if adapter and extension not in ("", WORKER_EXTENSION):
        reasons.append(
            f"--worker-extension-cls {extension}: vLLM takes one, and Focus needs {WORKER_EXTENSION}"
        )
    return reasons


def _key_conflicts(
    vllm_arguments: Sequence[str], environ: Mapping[str, str], settings: Settings
) -> list[str]:
    reasons = []
    names = _flags(vllm_arguments)
    if "--api-key" in names:
        reasons.append(
            "--api-key shows the key to everybody on this machine: put its hash in --api-key-file "
            "(focus-serve --make-key NAME), or the key in VLLM_API_KEY"
        )
    if "--grpc" in names:
        reasons.append("--grpc knows neither keys nor limits: use vllm serve for that")
    if settings.api_key_file:
        if environ.get("VLLM_API_KEY"):
            reasons.append("VLLM_API_KEY is set, so vLLM would refuse the keys of --api-key-file: unset it")
        try:
            read_keys(settings.api_key_file)
        except LaunchError as error:
            reasons.append(str(error))
    return reasons


def _flags(arguments: Sequence[str]) -> set[str]:
    return {argument.partition("=")[0].replace("_", "-") for argument in arguments}


def _override_problems(adapter: Path, overrides: dict[str, Any]) -> list[str]:
    try:
        override(load_adapter(adapter).config, overrides)
    except FocusUnsupportedError as error:
        return error.reasons
    return []


def _defaults(
    model: Model, adapter: Path | None, vllm_arguments: Sequence[str], settings: Settings
) -> list[str]:
    if "--config" in vllm_arguments:  # vLLM puts the file's settings first, so defaults would win over them
        return []
    # The gate writes a better access log.
    defaults = ["--disable-uvicorn-access-log", "--shutdown-timeout", str(settings.drain_timeout)]
    if settings.log_format == "json":
        defaults += ["--log-config-file", str(LOG_CONFIG)]
    if model.served_names:
        defaults += ["--served-model-name", *model.served_names]
    if model.location == str(DEMO_FOLDER):
        # The demo should answer within seconds; compiling it costs more than it gains.
        defaults.append("--enforce-eager")
    elif adapter and not any(flag.partition(".")[0] in GRAPH_FLAGS for flag in _flags(vllm_arguments)):
        defaults += [GRAPHS, MOST_GRAPH_TOKENS]
    return defaults


def _plugins(allowed: str | None) -> str:
    """Return VLLM_PLUGINS with Focus in it and nothing switched off that was on."""
    if allowed is None:
        names = {entry.name for group in OTHER_PLUGIN_GROUPS for entry in entry_points(group=group)}
    else:
        names = {name for name in allowed.split(",") if name}
    return ",".join(sorted(names | {PLUGIN}))


def _check_installation() -> None:
    """Load what vLLM will load by name: it logs and goes on when a plugin cannot be imported."""
    from focus_vllm.engine.plugin import check_vllm_version

    try:
        check_vllm_version()
        for group in PLUGIN_GROUPS:
            found = entry_points(group=group, name=PLUGIN)
            if not found:
                raise LaunchError(f"focus-vllm's entry point in {group} is missing: install it again")
            for entry in found:
                entry.load()
    except ImportError as error:
        raise LaunchError(
            f"cannot load Focus ({error}): install focus-vllm[cpu] or focus-vllm[gpu]"
        ) from error
    except RuntimeError as error:
        raise LaunchError(str(error)) from error
