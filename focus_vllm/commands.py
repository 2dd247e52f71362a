"""What the commands of `focus-vllm` do; their options are in cli.py."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from focus_vllm.adapter import Adapter, AdapterError, BaseModel, load_adapter, save_adapter
from focus_vllm.config import FocusConfig
from focus_vllm.training import evaluate as ways
from focus_vllm.training.checkpoint import Checkpoints
from focus_vllm.training.data import copy_spans, read_documents, shuffled_tokens
from focus_vllm.training.evaluate import Quality, held_out_sequences
from focus_vllm.training.finetune import finetune as finetune_model
from focus_vllm.training.harness import run_tasks
from focus_vllm.training.plots import plot_groups, plot_quality
from focus_vllm.training.probes import TASKS, make_probes
from focus_vllm.training.processes import processes
from focus_vllm.training.provenance import describe_run
from focus_vllm.training.tokens import Group, describe_groups
from focus_vllm.training.train import train as train_adapter
from focus_vllm.training.tune import Tuning
from focus_vllm.training.tune import tune as tune_adapter


def train(arguments: argparse.Namespace) -> None:
    """Train centroids for a frozen model, then calibrate them for serving."""
    documents = read_documents(arguments.data)
    model, tokenizer = _load_model(arguments)
    settings = arguments.settings
    tokens = shuffled_tokens(documents, tokenizer, settings.num_tokens(), settings.seed)
    checkpoints = Checkpoints(
        arguments.out.with_name(arguments.out.name + ".checkpoint"),
        every=arguments.checkpoint_every,
        resume=arguments.resume,
    )
    adapter = train_adapter(
        model,
        tokens,
        arguments.config,
        settings,
        _base_model(arguments, model),
        provenance=describe_run(arguments.words, arguments.data, model.device),
        checkpoints=checkpoints,
        log_dir=arguments.log_dir,
    )
    if processes().is_main_process:
        save_adapter(adapter, arguments.out)
        checkpoints.path.unlink(missing_ok=True)
        sys.stdout.write(_describe(arguments.out, adapter))


def finetune(arguments: argparse.Namespace) -> None:
    """Train a model's weights under the gate; write the model and its adapter."""
    documents = read_documents(arguments.data)
    model, tokenizer = _load_model(arguments)
    settings = arguments.settings
    tokens = shuffled_tokens(documents, tokenizer, settings.num_tokens(), settings.seed)
    adapter = finetune_model(
        model,
        tokens,
        arguments.config,
        settings,
        _base_model(arguments, model),
        arguments.weights_lr,
        arguments.centroid_steps,
        provenance=describe_run(arguments.words, arguments.data, model.device),
    )
    model.save_pretrained(arguments.out_model)
    tokenizer.save_pretrained(arguments.out_model)
    save_adapter(adapter, arguments.out)
    sys.stdout.write(_describe(arguments.out, adapter))


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure dense, Focus and the baselines."""
    adapter = load_adapter(arguments.adapter)
    config = _changed(adapter.config, arguments, ("window", "dense_below"))
    documents = read_documents(arguments.data)
    model, tokenizer = _load_model(arguments)
    _check_model(arguments, adapter, model)
    length = arguments.seq_len
    sequences = held_out_sequences(documents, tokenizer, length, arguments.sequences)
    tasks = TASKS if arguments.tasks == ["all"] else arguments.tasks
    probes = {task: make_probes(task, tokenizer, length, arguments.probes, arguments.seed) for task in tasks}

    def measure(way: ways.Way) -> Quality:
        return ways.evaluate(model, way, sequences, arguments.lengths, probes, arguments.seed)

    rows = [measure(ways.dense())]
    for top_k in arguments.top_k or [config.top_k]:
        focus = dataclasses.replace(config, top_k=top_k)
        name = f"focus K={focus.num_groups} key_k={focus.key_k} top_k={top_k} window={focus.window}"
        row = measure(ways.focus(name, model, focus, adapter.layers))
        rows.append(row)
        if "local" in arguments.baselines:
            rows.append(measure(ways.local(model, focus, row.keys_per_query, length)))
        if "random" in arguments.baselines:
            rows.append(measure(ways.random_groups(model, focus, arguments.seed)))
        if "oracle" in arguments.baselines:
            rows.append(measure(ways.oracle(model, focus, row.far_pairs)))
    if arguments.plot:
        plot_quality(rows, arguments.plot)
    _print(arguments, ways.to_json(rows), quality_table(rows))


def tune(arguments: argparse.Namespace) -> None:
    """Write an adapter with the best configuration for a number of keys."""
    adapter = load_adapter(arguments.adapter)
    documents = read_documents(arguments.data)
    model, tokenizer = _load_model(arguments)
    _check_model(arguments, adapter, model)
    config = adapter.config
    sequences = held_out_sequences(documents, tokenizer, arguments.seq_len, arguments.sequences)
    windows = arguments.windows or [config.window // 2, config.window, 2 * config.window]
    copy_spans(sequences, arguments.copy_spans, min(windows), torch.Generator().manual_seed(0))
    tuning = tune_adapter(
        model, adapter, sequences, arguments.keys, windows, arguments.top_k or [config.top_k]
    )
    save_adapter(tuning.adapter, arguments.out)
    facts = {
        "config": tuning.adapter.config.to_dict(),
        "choices": [dataclasses.asdict(choice) for choice in tuning.choices],
        "layer_losses": [
            {"window": window, "top_k": top_k, "losses": losses}
            for (window, top_k), losses in tuning.layer_losses.items()
        ],
    }
    _print(arguments, facts, _tuning_table(tuning))


def inspect(arguments: argparse.Namespace) -> None:
    """Print what an adapter is, or what its groups hold."""
    adapter = load_adapter(arguments.adapter)
    if not arguments.tokens:
        facts = {
            "config": adapter.config.to_dict(),
            "base_model": dataclasses.asdict(adapter.base_model),
            "layers": sorted(adapter.layers),
            "parameters": _num_parameters(adapter),
            "training": dict(adapter.training),
        }
        _print(arguments, facts, _describe(arguments.adapter, adapter))
        return
    if not arguments.model or not arguments.data:
        raise ValueError("--tokens needs --model and --data: the text whose tokens are put into groups")
    documents = read_documents(arguments.data)
    model, tokenizer = _load_model(arguments)
    _check_model(arguments, adapter, model)
    sequences = held_out_sequences(documents, tokenizer, arguments.seq_len, arguments.sequences)
    groups = describe_groups(model, tokenizer, adapter.config, adapter.layers, sequences)
    if arguments.plot:
        plot_groups(groups, arguments.plot)
    _print(arguments, [dataclasses.asdict(group) for group in groups], "".join(_group_lines(groups)))


def harness(arguments: argparse.Namespace) -> None:
    """Run lm-evaluation-harness and print its results as JSON."""
    adapter = load_adapter(arguments.adapter) if arguments.adapter else None
    model, tokenizer = _load_model(arguments)
    if adapter is not None:
        _check_model(arguments, adapter, model)
        config = _changed(adapter.config, arguments, ("dense_below",))
        adapter = dataclasses.replace(adapter, config=config)
    results = run_tasks(model, tokenizer, adapter, arguments.tasks, arguments.limit, arguments.batch_size)
    sys.stdout.write(json.dumps(results, indent=1, default=str) + "\n")


def _print(arguments: argparse.Namespace, facts: Any, text: str) -> None:
    sys.stdout.write(json.dumps(facts, indent=1) + "\n" if arguments.json else text)


def _changed(config: FocusConfig, arguments: argparse.Namespace, names: Sequence[str]) -> FocusConfig:
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return dataclasses.replace(config, **given)


def _load_model(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    device = torch.device(arguments.device) if arguments.device else processes().device
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {arguments.device!r} asked for, but PyTorch finds no CUDA GPU")
    dtype: str | torch.dtype = arguments.dtype
    if dtype != "auto":
        dtype = getattr(torch, arguments.dtype)
    elif device.type == "cpu":
        dtype = torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        if getattr(arguments, "from_scratch", False):
            config = AutoConfig.from_pretrained(arguments.model)
            torch.manual_seed(arguments.seed)
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=None if dtype == "auto" else dtype
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load model {arguments.model!r}: {error}") from None
    model.to(device)
    return model, tokenizer


def _base_model(arguments: argparse.Namespace, model: PreTrainedModel) -> BaseModel:
    return BaseModel.from_config(arguments.base_name or _model_name(arguments.model), model.config)


def _check_model(arguments: argparse.Namespace, adapter: Adapter, model: PreTrainedModel) -> None:
    served = BaseModel.from_config(_model_name(arguments.model), model.config)
    if reasons := adapter.base_model.mismatches(served):
        raise AdapterError(arguments.adapter, reasons)


def _model_name(model: str) -> str:
    return Path(model).resolve().name if Path(model).exists() else model


def _own_queries(adapter: Adapter) -> bool:
    return any(router.query_centroids is not None for router in adapter.layers.values())


def _num_parameters(adapter: Adapter) -> int:
    routers = adapter.layers.values()
    return sum(tensor.numel() for router in routers for tensor in router.tensors().values())


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
        "queries": "centroids of their own" if _own_queries(adapter) else "the keys' centroids",
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


def quality_table(rows: Sequence[Quality]) -> str:
    """Lay out measurements as text; the first is what the others are compared with."""
    width = max(len(row.name) for row in rows)
    head = "far pairs  keys/query  perplexity  vs dense  recall NLL    mass  largest group"
    lines = [f"{'attention':<{width}}  {head}"]
    for row in rows:
        gap = row.perplexity / rows[0].perplexity - 1
        lines.append(
            f"{row.name:<{width}}  {row.far_pairs:>9.1%}  {row.keys_per_query:>10.0f}"
            f"  {row.perplexity:>10.3f}  {gap:>+8.2%}  {row.recall:>10.3f}"
            f"  {_share(row.mass):>6}  {_share(row.balance):>13}"
        )
    if sizes := list(rows[0].perplexity_by_length):
        lines += ["", f"{'perplexity of the first':<{width}}" + "".join(f"  {size:>8}" for size in sizes)]
        for row in rows:
            values = "".join(f"  {value:>8.3f}" for value in row.perplexity_by_length.values())
            lines.append(f"{row.name:<{width}}{values}")
    if tasks := list(rows[0].probes):
        lines += ["", f"{'NLL (right tokens)':<{width}}" + "".join(f"  {task:>17}" for task in tasks)]
        for row in rows:
            cells = (f"{score.nll:.3f} ({score.accuracy:.0%})" for score in row.probes.values())
            lines.append(f"{row.name:<{width}}" + "".join(f"  {cell:>17}" for cell in cells))
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _tuning_table(tuning: Tuning) -> str:
    lines = ["window  top_k  keys/query  predicted  measured  dense layers"]
    for choice in tuning.choices:
        measured = "" if choice.measured is None else f"{choice.measured:.4f}"
        dense = " ".join(map(str, choice.dense_layers)) or "none"
        lines.append(
            f"{choice.window:>6}  {choice.top_k:>5}  {choice.keys_per_query:>10.0f}"
            f"  {choice.predicted:>9.4f}  {measured:>8}  {dense}"
        )
    layers = sorted(next(iter(tuning.layer_losses.values())))
    lines += ["", "divergence from dense, nats per token, when one layer alone is routed"]
    lines.append("window  top_k" + "".join(f"  {f'layer {layer}':>9}" for layer in layers))
    for (window, top_k), losses in tuning.layer_losses.items():
        cells = "".join(f"  {losses[layer]:>9.4f}" for layer in layers)
        lines.append(f"{window:>6}  {top_k:>5}{cells}")
    return "\n".join(lines) + "\n"


def _group_lines(groups: Sequence[Group]) -> Iterator[str]:
    yield "layer  group   share  purity  frequent tokens: share of the group, of the token's occurrences\n"
    for group in groups:
        tokens = "  ".join(f"{text!r} {inside:.0%} {sure:.0%}" for text, inside, sure in group.tokens)
        yield f"{group.layer:>5}  {group.group:>5}  {group.share:>6.1%}  {group.purity:>6.1%}  {tokens}\n"
