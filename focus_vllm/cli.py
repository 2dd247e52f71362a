"""`focus-vllm`: make, measure and look at adapters."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focus_vllm import __version__
from focus_vllm.config import FocusConfig
from focus_vllm.training.settings import CHOICES, TrainSettings

BAD_INPUT = 2
INTERRUPTED = 130

CONFIG_HELP = {
    "num_groups": "groups per layer (K)",
    "group_dim": "width of the space in which tokens are compared with centroids (d_g)",
    "key_k": "groups that a token belongs to when others attend to it",
    "top_k": "groups that a token attends to",
    "window": "tokens back that always attend",
    "sink": "first tokens of the text, which always attend",
    "dense_below": "positions below this attend to everything",
    "temperature": "scores are divided by this (tau)",
}
SETTINGS_HELP = {
    "objective": "what gates far pairs: log-gate, paper, or mass, which needs no backward pass",
    "mass_weight": "times the loss of mass that is added to another objective's (default: 1 for log-gate)",
    "balance_weight": "times the unevenness of groups within single sequences that is added to the loss",
    "target": "what predictions are compared with: the text, or the dense model's own",
    "steps": "optimiser steps",
    "minutes": "stop after so long at the latest; 0: no limit",
    "batch_size": "sequences per forward pass",
    "accumulate": "forward passes per step",
    "seq_len": "tokens per sequence",
    "lr": "AdamW's learning rate at the start",
    "schedule": "how the learning rate goes on",
    "seed": "the same seed gives the same run",
    "precision": "bfloat16 runs the model under autocast",
    "init": "centroids at the start: random, or k-means of hidden states",
    "sinkhorn": "iterations that balance the groups; 0: softmax, to see them collapse",
    "queries": "own: queries have centroids of their own; shared: those of keys, as in the paper",
    "sharpen": "scores grow by this factor in training, so that groups end as hard as they are served",
    "train_top_k": "groups that a query attends to while training; default: --top-k",
    "train_window": "window while training; default: --window",
    "copy_spans": "spans per sequence that repeat earlier text, which teaches retrieval",
    "key_values": "keys per sequence that come back with their value",
    "text_tokens": "most tokens of text to draw sequences from",
    "calibration_tokens": "tokens on which the potentials are calibrated",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 with one line on stderr if the input is bad."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    arguments.words = ["focus-vllm", *words]
    try:
        if arguments.trains:
            _add_settings(arguments)
        # torch and transformers take seconds to import: help and bad settings do without.
        commands = importlib.import_module("focus_vllm.commands")
        getattr(commands, arguments.command)(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        sys.stderr.write(f"focus-vllm {arguments.command}: {message}\n")
        return BAD_INPUT
    return 0


def _add_settings(arguments: argparse.Namespace) -> None:
    """Add `config` and `settings`, checked, and check that the data is there."""
    given = vars(arguments)
    layers = tuple(given["dense_layers"])
    arguments.config = FocusConfig(**{name: given[name] for name in CONFIG_HELP}, dense_layers=layers)
    arguments.settings = TrainSettings(**{name: given[name] for name in SETTINGS_HELP})
    if not arguments.data.is_file():
        raise FileNotFoundError(f"no data file at {str(arguments.data)!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="focus-vllm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"focus-vllm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(_command(commands, "train", "train an adapter for a model", trains=True))
    _add_finetune(_command(commands, "finetune", "train a model's weights with its groups", trains=True))
    _add_evaluate(_command(commands, "evaluate", "measure an adapter under the mask that is served"))
    _add_tune(_command(commands, "tune", "choose window and dense layers for a number of keys"))
    _add_inspect(_command(commands, "inspect", "print what an adapter is and what its groups hold"))
    _add_harness(_command(commands, "harness", "run tasks of lm-evaluation-harness"))
    return parser


def _command(commands: Any, name: str, text: str, trains: bool = False) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(trains=trains)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_training(parser)
    parser.add_argument(
        "--checkpoint-every", type=_positive, default=100, metavar="STEPS", help="save progress"
    )
    parser.add_argument("--resume", action="store_true", help="go on from OUT.checkpoint")
    parser.add_argument("--log-dir", type=Path, help="write TensorBoard logs there")


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    _add_training(parser)
    parser.add_argument("--out-model", required=True, type=Path, help="folder for the trained model")
    parser.add_argument("--weights-lr", type=float, default=1e-4, help="AdamW's, for the weights")
    parser.add_argument(
        "--centroid-steps", type=int, default=0, metavar="STEPS", help="first phase: centroids alone"
    )
    parser.add_argument("--from-scratch", action="store_true", help="start from random weights")
    # Weights learn from the text as it is.
    parser.set_defaults(copy_spans=0, mass_weight=0.0)


def _add_training(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--data", required=True, type=Path, help="UTF-8 text or .xz; NUL separates documents")
    parser.add_argument("--out", required=True, type=Path, help="adapter file to write (.safetensors)")
    parser.add_argument("--base-name", help="model name to record (default: its repository or folder)")
    _add_fields(parser.add_argument_group("what the adapter serves"), FocusConfig, CONFIG_HELP)
    parser.add_argument(
        "--dense-layers", type=int, nargs="*", default=(), metavar="LAYER", help="layers that stay dense"
    )
    _add_fields(parser.add_argument_group("how it is trained"), TrainSettings, SETTINGS_HELP)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--adapter", required=True, type=Path, help="adapter file")
    _add_held_out(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the repeated spans' places")
    parser.add_argument("--top-k", type=_positive, nargs="+", help="try these (default: the adapter's)")
    parser.add_argument("--window", type=int, help="try this (default: the adapter's)")
    parser.add_argument("--dense-below", type=int, help="try this (default: the adapter's)")
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=("local", "random", "oracle"),
        default=["local"],
        help="window and sinks at equal keys; random groups; the far keys with most attention",
    )
    parser.add_argument("--lengths", type=_positive, nargs="*", default=(), help="perplexity at these, too")
    parser.add_argument("--tasks", nargs="*", default=(), metavar="TASK", help="retrieval tasks; all: all")
    parser.add_argument("--probes", type=_positive, default=8, help="texts per task")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the result")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--adapter", required=True, type=Path, help="adapter file")
    parser.add_argument("--out", required=True, type=Path, help="adapter file to write")
    _add_held_out(parser)
    parser.add_argument("--keys", required=True, type=float, help="target: keys per query, mean over layers")
    parser.add_argument("--windows", type=int, nargs="+", help="to choose from (default: half, same, double)")
    parser.add_argument("--top-k", type=_positive, nargs="+", help="to choose from (default: the adapter's)")
    parser.add_argument("--copy-spans", type=int, default=8, help="repeated spans, so that retrieval counts")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, metavar="FILE", help="adapter file")
    parser.add_argument("--tokens", action="store_true", help="show groups; needs --model, --data")
    _add_model(parser, required=False)
    _add_held_out(parser, required=False)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the groups")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_harness(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--adapter", type=Path, help="adapter file; without, the model is dense")
    parser.add_argument("--tasks", required=True, nargs="+", metavar="TASK", help="as lm_eval calls them")
    parser.add_argument("--limit", type=_positive, help="documents per task")
    parser.add_argument("--batch-size", type=_positive, default=1, help="sequences per forward pass")
    parser.add_argument("--dense-below", type=int, help="try this: prompts are short")


def _add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--model", required=required, help="Hugging Face repository or folder")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model; auto: its own on a GPU, float32 on a CPU",
    )


def _add_held_out(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--data", required=required, type=Path, help="held-out text, as for train")
    parser.add_argument("--seq-len", type=_positive, default=4096, help="tokens per sequence")
    parser.add_argument("--sequences", type=_positive, default=8, help="how many")


def _add_fields(group: Any, cls: type, helps: dict[str, str]) -> None:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, text in helps.items():
        kind = {"int": int, "float": float, "str": str}[fields[name].type.split(" | ")[0]]
        flag, default = f"--{name.replace('_', '-')}", fields[name].default
        group.add_argument(flag, type=kind, default=default, choices=CHOICES.get(name), help=text)


def _positive(word: str) -> int:
    if (value := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"{value} must be >= 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
