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
from server.versions import installed_versions

NO_ADAPTER = "none"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `focus-serve` and return its exit status: 2 if the server must not start."""
    options, vllm_arguments = _parser().parse_known_args(argv)
    try:
        return _run(options, vllm_arguments)
    except LaunchError as error:
        sys.stderr.write(f"focus-serve: {error}\n")
        return 2


def _run(options: argparse.Namespace, vllm_arguments: list[str]) -> int:
    from server.launch import peek, plan_launch, serve
    from server.models import describe_model, read_aliases, resolve_model

    if options.version:
        sys.stdout.writelines(f"{name} {version}\n" for name, version in installed_versions().items())
        return 0
    aliases = read_aliases(options.alias_file)
    if options.list_models:
        sys.stdout.writelines(f"{name}\t{model}\n" for name, model in sorted(aliases.items()))
        return 0
    model = resolve_model(options.model, aliases)
    source = _adapter_source(options)
    adapter = None
    if source:
        from server.adapters import choose_adapter

        peeked = peek(vllm_arguments)
        adapter = choose_adapter(source, describe_model(model, peeked.revision, peeked.trust_remote_code))
    launch = plan_launch(model, adapter, options.additional_config, vllm_arguments, os.environ)
    if options.dry_run:
        sys.stdout.write(launch.command() + "\n")
        return 0
    serve(launch)
    return 0


def _adapter_source(options: argparse.Namespace) -> str | None:
    from server.models import DEMO, DEMO_ADAPTER

    if options.adapter == NO_ADAPTER:
        return None
    if options.adapter is None and options.model != DEMO:
        raise LaunchError(
            f"--model {options.model} needs an adapter: give --adapter a file, a folder or a Hugging Face "
            "repository with one made for it (focus-vllm train makes one), "
            f"or --adapter {NO_ADAPTER} to serve without Focus"
        )
    return options.adapter or str(DEMO_ADAPTER)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="focus-serve",
        description="Serve a model over vLLM's OpenAI API with Focus attention; "
        "without arguments, the embedded demo.",
        epilog="Every other argument goes to `vllm serve`; see `vllm serve --help=all`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", default="demo", help="alias, folder or Hugging Face name (default: the embedded demo)"
    )
    parser.add_argument(
        "--adapter",
        help="file, folder or Hugging Face repository with an adapter made for the model; "
        f"{NO_ADAPTER}: serve without Focus",
    )
    parser.add_argument("--alias-file", type=Path, help="TOML file with a table [models] of more aliases")
    parser.add_argument(
        "--additional-config",
        "--additional_config",
        type=_json_object,
        default={},
        help="vLLM's, as JSON; Focus's own part is added",
    )
    parser.add_argument("--list-models", action="store_true", help="print the aliases and exit")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the vLLM command and exit"
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
