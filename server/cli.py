"""`focus-serve`: vLLM's OpenAI server with Focus attention."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.errors import LaunchError
from server.keys import make_key
from server.settings import Settings, flag, read_settings
from server.versions import installed_versions

NO_ADAPTER = "none"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `focus-serve` and return its exit status: 2 if the server must not start."""
    options, vllm_arguments = _parser().parse_known_args(argv)
    flags = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    try:
        return _run(options, flags, vllm_arguments)
    except LaunchError as error:
        sys.stderr.write(f"focus-serve: {error}\n")
        return 2


def _run(options: argparse.Namespace, flags: dict[str, Any], vllm_arguments: list[str]) -> int:
    from server.launch import peek, plan_launch, serve
    from server.models import describe_model, read_aliases, resolve_model

    if options.make_key:
        key, line = make_key(options.make_key)
        sys.stdout.write(line + "\n")
        sys.stderr.write(f"The key, which is not kept anywhere: {key}\n")
        return 0
    settings = read_settings(flags, options.focus_config)
    if options.version:
        sys.stdout.writelines(f"{name} {version}\n" for name, version in installed_versions().items())
        return 0
    aliases = read_aliases(settings.alias_file)
    if options.list_models:
        sys.stdout.writelines(f"{name}\t{model}\n" for name, model in sorted(aliases.items()))
        return 0
    model = resolve_model(settings.model, aliases)
    source = _adapter_source(settings)
    adapter = None
    if source:
        from server.adapters import choose_adapter

        peeked = peek(vllm_arguments)
        adapter = choose_adapter(source, describe_model(model, peeked.revision, peeked.trust_remote_code))
    launch = plan_launch(model, adapter, options.additional_config, vllm_arguments, os.environ, settings)
    if options.dry_run:
        sys.stdout.write(launch.command() + "\n")
        sys.stderr.writelines(f"{name} = {value!r}\n" for name, value in settings)
        return 0
    return serve(launch)


def _adapter_source(settings: Settings) -> str | None:
    from server.models import DEMO, DEMO_ADAPTER

    if settings.adapter == NO_ADAPTER:
        return None
    if settings.adapter is None and settings.model != DEMO:
        raise LaunchError(
            f"--model {settings.model} needs an adapter: give --adapter a file, a folder or a Hugging Face "
            "repository with one made for it (focus-vllm train makes one), "
            f"or --adapter {NO_ADAPTER} to serve without Focus"
        )
    return settings.adapter or str(DEMO_ADAPTER)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="focus-serve",
        description="Serve a model over vLLM's OpenAI API with Focus attention; "
        "without arguments, the embedded demo.",
        epilog="Settings can also be FOCUS_* variables (FOCUS_MAX_BODY_MB=8). "
        "Every other argument goes to `vllm serve`; see `vllm serve --help=all`.",
        allow_abbrev=False,
    )
    for name, field in Settings.model_fields.items():
        shown = "" if field.default is None else f" (default: {field.default})"
        parser.add_argument(
            flag(name),
            dest=name,
            default=argparse.SUPPRESS,
            help=f"{field.description}{shown}",
            action="store_true" if field.annotation is bool else "store",
        )
    parser.add_argument("--focus-config", type=Path, metavar="FILE", help="TOML file of the settings above")
    parser.add_argument(
        "--additional-config",
        "--additional_config",
        type=_json_object,
        default={},
        help="vLLM's, as JSON; Focus's own part is added",
    )
    parser.add_argument(
        "--make-key", metavar="NAME", help="print a new API key, and its line for --api-key-file, and exit"
    )
    parser.add_argument("--list-models", action="store_true", help="print the aliases and exit")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the vLLM command and the settings and exit",
    )
    parser.add_argument("--version", action="store_true", help="print what is installed and exit")
    return parser


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


if __name__ == "__main__":
    sys.exit(main())
