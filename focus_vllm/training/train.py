"""The trainer: centroids for a frozen model, then potentials for the server."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from focus_vllm.adapter import Adapter, BaseModel
from focus_vllm.config import FocusConfig
from focus_vllm.routing import Router, sinkhorn
from focus_vllm.training.checkpoint import Checkpoints
from focus_vllm.training.data import copy_spans, sample_batch
from focus_vllm.training.hf import attach_layers, routable_layers
from focus_vllm.training.loggate import LogGate
from focus_vllm.training.settings import TrainSettings

CALIBRATION_ITERATIONS = 200
MAX_GRADIENT_NORM = 1.0


def train(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    config: FocusConfig,
    settings: TrainSettings,
    base_model: BaseModel,
    provenance: Mapping[str, Any] | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = True,
) -> Adapter:
    """Train an adapter for `model`, whose weights do not change.

    Training depends on the settings alone: what a step draws follows from the seed and the step's number,
    so a run that is resumed ends in the same adapter as one that was never stopped.

    Args:
        model: A Hugging Face causal language model, on the device and in the dtype to train with.
        tokens: `[num_tokens]`, int64: the text.
        config: What the adapter will serve.
        settings: How it is trained.
        base_model: How the adapter file describes `model`.
        provenance: Further facts for the adapter's training record.
        checkpoints: Where progress is saved; None saves none.
        progress: Show a progress bar on stderr.

    Raises:
        ValueError: The text is shorter than a sequence, no layer can be routed, the checkpoint to
            resume from comes from another run, or the loss is not finite.
        RuntimeError: The model's weights changed.
    """
    started = time.perf_counter()
    if len(tokens) <= settings.seq_len:
        raise ValueError(f"the text has {len(tokens)} tokens, seq_len ({settings.seq_len}) needs one more")
    window = config.window if settings.train_window is None else settings.train_window
    gates = _new_gates(model, dataclasses.replace(config, window=window), settings)
    with _frozen(model) as weights:
        run = {**config.to_dict(), **dataclasses.asdict(settings), "weights_sha256": weights}
        run["text_sha256"] = hashlib.sha256(tokens.numpy().data).hexdigest()
        _optimise(model, tokens, gates, settings, checkpoints, run, progress)
        potentials, balance = calibrate(model, tokens, gates, settings)
    layers = {
        index: Router(gate.projection.detach(), gate.centroids.detach(), potentials[index])
        for index, gate in gates.items()
    }
    record = {
        **dataclasses.asdict(settings),
        "train_window": window,
        "balance": {str(index): round(share, 4) for index, share in balance.items()},
        "weights_sha256": weights,
        "seconds": round(time.perf_counter() - started, 1),
        **(provenance or {}),
    }
    return Adapter(config=config, base_model=base_model, layers=layers, training=record)


def _new_gates(model: PreTrainedModel, config: FocusConfig, settings: TrainSettings) -> dict[int, LogGate]:
    modules = routable_layers(model)
    if unknown := sorted(set(config.dense_layers) - set(modules)):
        raise ValueError(f"dense_layers {unknown} cannot be routed anyway; the model has {sorted(modules)}")
    indices = sorted(set(modules) - set(config.dense_layers))
    if not indices:
        raise ValueError("there is no layer to route: none has full causal attention, or all are dense")
    device = next(model.parameters()).device
    hidden_size = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(settings.seed)
    gates = {}
    for index in indices:
        projection = torch.randn(hidden_size, config.group_dim, generator=generator) / math.sqrt(hidden_size)
        centroids = torch.randn(config.num_groups, config.group_dim, generator=generator)
        # Scores start near the hidden state's standard deviation: softly assigned, so that they can learn.
        centroids *= config.temperature / math.sqrt(config.group_dim)
        parts = (part.to(device).requires_grad_() for part in (projection, centroids))
        gates[index] = LogGate(config, *parts)
    return gates


def _optimise(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    gates: dict[int, LogGate],
    settings: TrainSettings,
    checkpoints: Checkpoints | None,
    run: Mapping[str, Any],
    progress: bool,
) -> None:
    parameters = [part for gate in gates.values() for part in (gate.projection, gate.centroids)]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    first = 0
    if checkpoints is not None and checkpoints.resume:
        first = checkpoints.load(parameters, optimizer, run)
    bar = tqdm(total=settings.steps, initial=first, unit="step", disable=not progress, dynamic_ncols=True)
    with bar, attach_layers(model, gates):
        for step in range(first, settings.steps):
            optimizer.param_groups[0]["lr"] = _learning_rate(settings, step)
            loss = _loss(model, _batch(tokens, gates, settings, step))
            if not math.isfinite(value := loss.item()):
                raise ValueError(f"the loss is {value} at step {step + 1}: lower lr ({settings.lr})")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            bar.set_postfix_str(f"loss {value:.4f}", refresh=False)
            bar.update()
            if checkpoints is not None and (step + 1) % checkpoints.every == 0:
                checkpoints.save(step + 1, parameters, optimizer, run)


def _learning_rate(settings: TrainSettings, step: int) -> float:
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def _batch(
    tokens: torch.Tensor, gates: Mapping[int, LogGate], settings: TrainSettings, step: int
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    batch = sample_batch(tokens, settings.batch_size, settings.seq_len + 1, generator)
    window = next(iter(gates.values())).config.window
    return copy_spans(batch, settings.copy_spans, window, generator)


def _loss(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the next token over `batch`, `[batch, num_tokens]`."""
    batch = batch.to(next(model.parameters()).device)
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, tokens: torch.Tensor, gates: Mapping[int, LogGate], settings: TrainSettings
) -> tuple[dict[int, torch.Tensor], dict[int, float]]:
    """Find each layer's column potentials: Sinkhorn's fixed point on the text's last `calibration_tokens`.

    Returns:
        By layer, the potentials `[num_groups]`, float32, and the balance: the share of those tokens
        that are in the largest group when each is in its best one (1 / num_groups is ideal).
    """
    seq_len = settings.seq_len
    sample = tokens[-max(settings.calibration_tokens, seq_len) :]
    sample = sample[: len(sample) // seq_len * seq_len].view(-1, seq_len)
    scores: dict[int, list[torch.Tensor]] = {index: [] for index in gates}
    device = next(model.parameters()).device
    with attach_layers(model, gates):
        for batch in sample.split(settings.batch_size):  # type: ignore[no-untyped-call]
            model(input_ids=batch.to(device), use_cache=False)
            for index, gate in gates.items():
                assert gate.scores is not None
                scores[index].append(gate.scores.flatten(0, 1))
    potentials, balance = {}, {}
    for index, parts in scores.items():
        assignment, potential = sinkhorn(torch.cat(parts), CALIBRATION_ITERATIONS)
        counts = torch.bincount(assignment.argmax(dim=-1), minlength=len(potential))
        potentials[index] = potential - potential.mean()
        balance[index] = (counts.max() / counts.sum()).item()
    return potentials, balance


@contextlib.contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[str]:
    """Freeze `model` while the context is open and prove that its weights stayed as they were.

    Yields:
        The SHA-256 of its weights.

    Raises:
        RuntimeError: They changed.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training
    before = weights_sha256(model)
    try:
        model.requires_grad_(False)
        model.train(False)
        yield before
        if (after := weights_sha256(model)) != before:
            raise RuntimeError(f"the model's weights changed in training: SHA-256 {before}, now {after}")
    finally:
        model.train(was_training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def weights_sha256(model: PreTrainedModel) -> str:
    """Return the SHA-256 over the names and bytes of the model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
