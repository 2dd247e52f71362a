"""`focus-vllm`: make, measure and look at adapters."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focus_vllm import __version__
from focus_vllm.config import FocusConfig
from focus_vllm.training.settings import CHOICES, TrainSettings

# torch and transformers take seconds to import: only the commands that need them do so.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from focus_vllm.adapter import Adapter
    from focus_vllm.training.evaluate import Quality

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
    "objective": "what is optimised",
    "steps": "optimiser steps",
    "batch_size": "sequences per step",
    "seq_len": "tokens per sequence",
    "lr": "AdamW's learning rate at the start",
    "schedule": "how the learning rate goes on",
    "seed": "the same seed gives the same run",
    "train_window": "window while training; default: --window",
    "copy_spans": "spans per sequence that repeat earlier text, which teaches retrieval",
    "text_tokens": "most tokens of text to draw sequences from",
    "calibration_tokens": "tokens on which the potentials are calibrated",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 with one line on stderr if the input is bad."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    try:
        arguments.run(arguments, words)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        sys.stderr.write(f"focus-vllm {arguments.command}: {message}\n")
        return BAD_INPUT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="focus-vllm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"focus-vllm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    _add_inspect(commands)
    return parser


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train an adapter for a model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train centroids for a frozen model on plain text, then calibrate them for serving.",
    )
    _add_model(parser)
    parser.add_argument("--data", required=True, type=Path, help="UTF-8 text or .xz; NUL separates documents")
    parser.add_argument("--out", required=True, type=Path, help="adapter file to write (.safetensors)")
    parser.add_argument("--base-name", help="model name to record (default: its repository or folder)")
    _add_fields(parser.add_argument_group("what the adapter serves"), FocusConfig, CONFIG_HELP)
    parser.add_argument(
        "--dense-layers", type=int, nargs="*", default=(), metavar="LAYER", help="layers that stay dense"
    )
    _add_fields(parser.add_argument_group("how it is trained"), TrainSettings, SETTINGS_HELP)
    parser.add_argument(
        "--checkpoint-every", type=_positive, default=100, metavar="STEPS", help="save progress"
    )
    parser.add_argument("--resume", action="store_true", help="go on from OUT.checkpoint")
    parser.set_defaults(run=_train)


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure an adapter under the mask that is served",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Perplexity and retrieval: dense, Focus, and a local window that reads as many keys.",
    )
    _add_model(parser)
    parser.add_argument("--adapter", required=True, type=Path, help="adapter file")
    parser.add_argument("--data", required=True, type=Path, help="held-out text, as for train")
    parser.add_argument("--seq-len", type=_positive, default=4096, help="tokens per sequence")
    parser.add_argument("--sequences", type=_positive, default=8, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the repeated spans' places")
    parser.add_argument("--top-k", type=_positive, nargs="+", help="try these (default: the adapter's)")
    parser.add_argument("--window", type=int, help="try this (default: the adapter's)")
    parser.add_argument("--dense-below", type=int, help="try this (default: the adapter's)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.set_defaults(run=_evaluate)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect", help="print what an adapter is", description="Read an adapter file."
    )
    parser.add_argument("adapter", type=Path, metavar="FILE", help="adapter file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_inspect)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face repository or folder")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model; auto: its own on a GPU, float32 on a CPU",
    )


def _add_fields(group: Any, cls: type, helps: dict[str, str]) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for name, text in helps.items():
        default = defaults[name]
        kind = int if default is None else type(default)
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=kind, default=default, choices=CHOICES.get(name), help=text)


def _positive(word: str) -> int:
    if (value := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"{value} must be >= 1")
    return value


def _train(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    given = vars(arguments)
    config = FocusConfig(
        **{name: given[name] for name in CONFIG_HELP}, dense_layers=tuple(given["dense_layers"])
    )
    settings = TrainSettings(**{name: given[name] for name in SETTINGS_HELP})
    if not arguments.data.is_file():
        raise FileNotFoundError(f"no data file at {str(arguments.data)!r}")

    from focus_vllm.adapter import BaseModel, save_adapter
    from focus_vllm.training.checkpoint import Checkpoints
    from focus_vllm.training.data import read_documents, shuffled_tokens
    from focus_vllm.training.provenance import describe_run
    from focus_vllm.training.train import train

    documents = read_documents(arguments.data)
    model, tokenizer = _load_model(arguments)
    tokens = shuffled_tokens(documents, tokenizer, settings.num_tokens(), settings.seed)
    checkpoints = Checkpoints(
        arguments.out.with_name(arguments.out.name + ".checkpoint"),
        every=arguments.checkpoint_every,
        resume=arguments.resume,
    )
    adapter = train(
        model,
        tokens,
        config,
        settings,
        BaseModel.from_config(arguments.base_name or _model_name(arguments.model), model.config),
        provenance=describe_run(["focus-vllm", *words], arguments.data, model.device),
        checkpoints=checkpoints,
    )
    save_adapter(adapter, arguments.out)
    checkpoints.path.unlink(missing_ok=True)
    sys.stdout.write(_describe(arguments.out, adapter))


def _evaluate(arguments: argparse.Namespace, _words: Sequence[str]) -> None:
    from focus_vllm.adapter import AdapterError, BaseModel, load_adapter
    from focus_vllm.training.data import read_documents
    from focus_vllm.training.evaluate import (
        evaluate_dense,
        evaluate_focus,
        evaluate_local,
        held_out_sequences,
    )

    adapter = load_adapter(arguments.adapter)
    changes = {name: vars(arguments)[name] for name in ("window", "dense_below")}
    config = dataclasses.replace(adapter.config, **{k: v for k, v in changes.items() if v is not None})
    documents = read_documents(arguments.data)
    model, tokenizer = _load_model(arguments)
    served = BaseModel.from_config(_model_name(arguments.model), model.config)
    if reasons := adapter.base_model.mismatches(served):
        raise AdapterError(arguments.adapter, reasons)
    sequences = held_out_sequences(documents, tokenizer, arguments.seq_len, arguments.sequences)
    rows = [evaluate_dense(model, sequences, arguments.seed)]
    for top_k in arguments.top_k or [config.top_k]:
        focus = dataclasses.replace(config, top_k=top_k)
        name = f"focus K={focus.num_groups} key_k={focus.key_k} top_k={top_k} window={focus.window}"
        row = evaluate_focus(name, model, focus, adapter.layers, sequences, arguments.seed)
        rows += [row, evaluate_local(model, focus, row.keys_per_query, sequences, arguments.seed)]
    if arguments.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    else:
        sys.stdout.write(_table(rows))


def _inspect(arguments: argparse.Namespace, _words: Sequence[str]) -> None:
    from focus_vllm.adapter import load_adapter

    adapter = load_adapter(arguments.adapter)
    if arguments.json:
        facts = {
            "config": adapter.config.to_dict(),
            "base_model": dataclasses.asdict(adapter.base_model),
            "layers": sorted(adapter.layers),
            "parameters": _num_parameters(adapter),
            "training": dict(adapter.training),
        }
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    else:
        sys.stdout.write(_describe(arguments.adapter, adapter))


def _load_model(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {arguments.device!r} asked for, but PyTorch finds no CUDA GPU")
    dtype: str | torch.dtype = arguments.dtype
    if dtype != "auto":
        dtype = getattr(torch, arguments.dtype)
    elif device.type == "cpu":
        dtype = torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load model {arguments.model!r}: {error}") from None
    model.to(device)  # type: ignore[arg-type]
    return model, tokenizer


def _model_name(model: str) -> str:
    return Path(model).resolve().name if Path(model).exists() else model


def _num_parameters(adapter: Adapter) -> int:
    from focus_vllm.routing import Router

    parts = [field.name for field in dataclasses.fields(Router)]
    return sum(getattr(router, part).numel() for router in adapter.layers.values() for part in parts)


def _describe(path: Path, adapter: Adapter) -> str:
    config, base = adapter.config, adapter.base_model
    record = dict(adapter.training)
    balance = record.pop("balance", {})
    size = path.stat().st_size
    lines = {
        "adapter": f"{path.name}, {size / 1024:.0f} KiB, {_num_parameters(adapter):,} parameters",
        "base model": f"{base.name} ({base.model_type}, "
        f"{base.num_hidden_layers} layers x {base.hidden_size}, "
        f"{base.num_attention_heads} heads, {base.num_key_value_heads} KV heads)",
        "routed layers": " ".join(map(str, sorted(adapter.layers))),
        **{name: str(value) for name, value in config.to_dict().items()},
        "far pairs": f"about {_expected_far_pairs(config):.1%} kept when groups are balanced",
    }
    if balance:
        shares = "  ".join(f"{layer}: {share:.1%}" for layer, share in balance.items())
        lines["balance"] = f"largest group's share per layer, {1 / config.num_groups:.1%} is ideal: {shares}"
    lines |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in record.items()}
    width = max(map(len, lines))
    return "".join(f"{name:<{width}}  {value}\n" for name, value in lines.items())


def _expected_far_pairs(config: FocusConfig) -> float:
    """Return the chance that a random choice of top_k groups meets one of key_k groups."""
    num_groups, top_k, key_k = config.num_groups, config.top_k, config.key_k
    return 1 - math.comb(num_groups - top_k, key_k) / math.comb(num_groups, key_k)


def _table(rows: Sequence[Quality]) -> str:
    width = max(len(row.name) for row in rows)
    lines = [f"{'attention':<{width}}  far pairs  keys/query  perplexity  vs dense  recall NLL"]
    for row in rows:
        gap = row.perplexity / rows[0].perplexity - 1
        lines.append(
            f"{row.name:<{width}}  {row.far_pairs:>9.1%}  {row.keys_per_query:>10.0f}"
            f"  {row.perplexity:>10.3f}  {gap:>+8.2%}  {row.recall:>10.3f}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
