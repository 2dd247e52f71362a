"""The trainer: centroids for a frozen model, then potentials for the server."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from focus_vllm.adapter import Adapter, BaseModel
from focus_vllm.config import FocusConfig
from focus_vllm.routing import Router
from focus_vllm.training.checkpoint import Checkpoints
from focus_vllm.training.data import copy_spans, plant_pairs, sample_batch
from focus_vllm.training.gates import GATES, Gate
from focus_vllm.training.hf import Recorder, attach_layers, routable_layers
from focus_vllm.training.processes import processes
from focus_vllm.training.settings import TrainSettings

Potentials = tuple[torch.Tensor, torch.Tensor | None]
"""Of keys and of queries, each `[num_groups]`, float32; see `Gate.calibrated`."""
CALIBRATION_ITERATIONS = 200
KMEANS_ITERATIONS = 20
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
    log_dir: Path | None = None,
) -> Adapter:
    """Train an adapter for `model`, whose weights do not change.

    Training depends on the settings alone: what a step draws follows from the seed and the step's number,
    so a run that is resumed ends in the same adapter as one that was never stopped (with `minutes`, as far
    as the clock allows). Under `accelerate launch`, each process draws its own batches and gradients are
    averaged.

    Args:
        model: A Hugging Face causal language model, on the device and in the dtype to train with.
        tokens: `[num_tokens]`, int64: the text.
        config: What the adapter will serve.
        settings: How it is trained.
        base_model: How the adapter file describes `model`.
        provenance: Further facts for the adapter's training record.
        checkpoints: Where progress is saved; None saves none.
        progress: Show a progress bar on stderr.
        log_dir: Where TensorBoard's logs go; None writes none.

    Raises:
        ValueError: The text is shorter than a sequence, no layer can be routed, the checkpoint to
            resume from comes from another run, the loss is not finite, or there is a log_dir and no
            TensorBoard.
        RuntimeError: The model's weights changed.
    """
    started = time.perf_counter()
    check_length(tokens, settings)
    gates = new_gates(model, config, settings)
    with _frozen(model) as weights:
        if settings.init == "kmeans":
            cluster_centroids(model, tokens, gates, settings)
        run = {**config.to_dict(), **dataclasses.asdict(settings), "weights_sha256": weights}
        run["text_sha256"] = hashlib.sha256(tokens.numpy().data).hexdigest()
        parameters = parameters_of(gates)
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
        done = optimise(model, tokens, gates, settings, optimizer, checkpoints, run, progress, log_dir)
        potentials, balance = calibrate(model, tokens, gates, settings)
    shares = dominance(gates)
    record = {
        **dataclasses.asdict(settings),
        "steps": done,
        "train_window": next(iter(gates.values())).config.window,
        "processes": processes().num_processes,
        "dominance": {str(index): round(share, 4) for index, share in shares.items()},
        "balance": {str(index): round(share, 4) for index, share in balance.items()},
        "weights_sha256": weights,
        "seconds": round(time.perf_counter() - started, 1),
        **(provenance or {}),
    }
    layers = routers_of(gates, potentials)
    return Adapter(config=config, base_model=base_model, layers=layers, training=record)


def check_length(tokens: torch.Tensor, settings: TrainSettings) -> None:
    """Refuse a text that is too short to cut a sequence from."""
    if len(tokens) <= settings.seq_len:
        raise ValueError(f"the text has {len(tokens)} tokens, seq_len ({settings.seq_len}) needs one more")


def new_gates(model: PreTrainedModel, config: FocusConfig, settings: TrainSettings) -> dict[int, Gate]:
    """Make a gate with random centroids for each layer to be routed, by layer index.

    Raises:
        ValueError: There is no such layer, or a dense layer is none that could be routed.
    """
    modules = routable_layers(model)
    if unknown := sorted(set(config.dense_layers) - set(modules)):
        raise ValueError(f"dense_layers {unknown} cannot be routed anyway; the model has {sorted(modules)}")
    indices = sorted(set(modules) - set(config.dense_layers))
    if not indices:
        raise ValueError("there is no layer to route: none has full causal attention, or all are dense")
    if settings.train_window is not None:
        config = dataclasses.replace(config, window=settings.train_window)
    device = next(model.parameters()).device
    hidden_size = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(settings.seed)
    gates = {}
    for index in indices:
        projection = torch.randn(hidden_size, config.group_dim, generator=generator) / math.sqrt(hidden_size)
        centroids = torch.randn(config.num_groups, config.group_dim, generator=generator)
        # Scores start near the hidden state's standard deviation: softly assigned, so that they can learn.
        centroids *= config.temperature / math.sqrt(config.group_dim)
        gates[index] = GATES[settings.objective](
            config,
            projection.to(device).requires_grad_(),
            centroids.to(device).requires_grad_(),
            *_query_parts(centroids.to(device), settings),
            top_k=settings.train_top_k or config.top_k,
            sinkhorn_iterations=settings.sinkhorn,
            measures_mass=bool(settings.mass_weight),
        )
    return gates


def _query_parts(
    centroids: torch.Tensor, settings: TrainSettings
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Start queries where keys start, so that a token first looks for its like."""
    if settings.queries == "shared":
        return None, None
    potential = torch.zeros(len(centroids), device=centroids.device)
    return centroids.detach().clone().requires_grad_(), potential.requires_grad_()


def parameters_of(gates: Mapping[int, Gate]) -> list[torch.Tensor]:
    """Return what is trained, in the order of the layers."""
    return [part for gate in gates.values() for part in gate.parameters()]


def routers_of(gates: Mapping[int, Gate], potentials: Mapping[int, Potentials]) -> dict[int, Router]:
    """Return what the gates learned as the adapter holds it."""
    return {index: gate.router(*potentials[index]) for index, gate in gates.items()}


@torch.no_grad()
def cluster_centroids(
    model: PreTrainedModel, tokens: torch.Tensor, gates: Mapping[int, Gate], settings: TrainSettings
) -> None:
    """Put each layer's centroids where k-means finds clusters of the text's projected hidden states."""
    generator = torch.Generator().manual_seed(settings.seed)
    recorders = {index: Recorder() for index in gates}
    batch = sample_batch(tokens, settings.batch_size, settings.seq_len, generator)
    with attach_layers(model, recorders):
        model(input_ids=batch.to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
    for index, gate in gates.items():
        hidden = recorders[index].hidden
        assert hidden is not None
        points = hidden.flatten(0, 1).float() @ gate.projection
        points = points - points.mean(dim=0)
        starts = torch.randperm(len(points), generator=generator)[: gate.config.num_groups]
        centres = points[starts.to(points.device)]
        for _ in range(KMEANS_ITERATIONS):
            members = functional.one_hot(torch.cdist(points, centres).argmin(dim=1), len(centres)).float()
            counts = members.sum(dim=0)[:, None]
            centres = torch.where(counts > 0, members.T @ points / counts.clamp_min(1), centres)
        for part in (gate.centroids, gate.query_centroids):
            if part is not None:
                part.copy_(functional.normalize(centres, dim=1) * gate.config.temperature)


def optimise(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    gates: Mapping[int, Gate],
    settings: TrainSettings,
    optimizer: torch.optim.Optimizer,
    checkpoints: Checkpoints | None = None,
    run: Mapping[str, Any] | None = None,
    progress: bool = True,
    log_dir: Path | None = None,
) -> int:
    """Take the settings' steps with `optimizer`, whose parameters are whatever is trained.

    Args:
        model: The model, attached to for the time of training.
        tokens: `[num_tokens]`, int64.
        gates: By layer index; with none, the model trains as it is.
        settings: How to train.
        optimizer: Each of its groups keeps its learning rate's ratio to `settings.lr`.
        checkpoints: See `train`.
        run: What a resumed run must repeat.
        progress: See `train`.
        log_dir: See `train`.

    Returns:
        The steps taken.

    Raises:
        ValueError: The loss is not finite, the checkpoint is not this run's, or TensorBoard is missing.
    """
    state = processes()
    parameters = [part for group in optimizer.param_groups for part in group["params"]]
    kept = parameters + [gate.start for gate in gates.values()]
    ratios = [group["lr"] / settings.lr for group in optimizer.param_groups]
    step, seconds = 0, 0.0
    if checkpoints is not None and checkpoints.resume:
        step, seconds = checkpoints.load(kept, optimizer, run or {})
    started = time.perf_counter() - seconds
    show = progress and state.is_main_process
    bar = tqdm(total=settings.steps, initial=step, unit="step", disable=not show, dynamic_ncols=True)
    with bar, attach_layers(model, gates), _summary(log_dir if state.is_main_process else None) as summary:
        while (part := _progress(settings, step, time.perf_counter() - started)) < 1:
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = ratio * _learning_rate(settings, part)
            for gate in gates.values():
                gate.sharpness = settings.sharpen**part
            loss = _gradients(model, tokens, gates, settings, parameters, step)
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {step + 1}: lower lr ({settings.lr})")
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if part > 0:
                bar.total = min(settings.steps, round((step - 1) / part))
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
            if summary is not None:
                summary.add_scalar("loss", loss, step)
                summary.add_scalar("lr", optimizer.param_groups[0]["lr"], step)
                for index, share in dominance(gates).items():
                    summary.add_scalar(f"largest_group/{index}", share, step)
            if checkpoints is not None and step % checkpoints.every == 0 and state.is_main_process:
                checkpoints.save(step, time.perf_counter() - started, kept, optimizer, run or {})
    for gate in gates.values():
        gate.sharpness = settings.sharpen
    return step


def _progress(settings: TrainSettings, step: int, seconds: float) -> float:
    """Return how much of the training is behind: of its steps, or of its time if that is more."""
    done = step / settings.steps
    if not settings.minutes or not step:
        return done
    elapsed = torch.tensor(seconds, device=processes().device)
    # The first process's clock, so that all stop together.
    return max(done, float(broadcast(elapsed)) / (60 * settings.minutes))


def _learning_rate(settings: TrainSettings, progress: float) -> float:
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _gradients(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    gates: Mapping[int, Gate],
    settings: TrainSettings,
    parameters: list[torch.Tensor],
    step: int,
) -> float:
    """Set the parameters' gradients and the gates' `start`, averaged over passes and processes.

    Returns:
        The mean loss.
    """
    state = processes()
    total = torch.zeros((), device=next(model.parameters()).device)
    potentials = {index: torch.zeros_like(gate.start) for index, gate in gates.items()}
    for turn in range(settings.accumulate):
        number = (step * settings.accumulate + turn) * state.num_processes + state.process_index
        loss = _loss(model, _batch(tokens, gates, settings, number), gates, settings) / settings.accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
        for index, gate in gates.items():
            if gate.found is not None:
                potentials[index] += gate.found / settings.accumulate
    if state.num_processes > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = reduce(parameter.grad, "mean")
        total = reduce(total, "mean")
        potentials = {index: reduce(potential, "mean") for index, potential in potentials.items()}
    for index, gate in gates.items():
        gate.start.copy_(potentials[index])
    return total.item()


def _batch(
    tokens: torch.Tensor, gates: Mapping[int, Gate], settings: TrainSettings, number: int
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    batch = sample_batch(tokens, settings.batch_size, settings.seq_len + 1, generator)
    window = next(iter(gates.values())).config.window if gates else 0
    copy_spans(batch, settings.copy_spans, window, generator)
    return plant_pairs(batch, settings.key_values, window, generator)


def _loss(
    model: PreTrainedModel, batch: torch.Tensor, gates: Mapping[int, Gate], settings: TrainSettings
) -> torch.Tensor:
    """Return what is minimised on `batch`, `[batch, num_tokens]`, as a scalar."""
    batch = batch.to(next(model.parameters()).device)
    precision = torch.autocast(batch.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")
    if settings.objective == "mass":
        with precision:
            model(input_ids=batch[:, :-1], use_cache=False, logits_to_keep=1)
        return _lost_mass(gates) + _unevenness(gates, settings)
    if settings.target == "dense":
        for gate in gates.values():
            gate.dense = True
        with torch.no_grad(), precision:
            dense = model(input_ids=batch[:, :-1], use_cache=False).logits
        for gate in gates.values():
            gate.dense = False
    with precision:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits.flatten(0, 1).float()
    more = _unevenness(gates, settings)
    if settings.mass_weight and gates:
        more = more + settings.mass_weight * _lost_mass(gates)
    if settings.target == "text":
        return functional.cross_entropy(logits, batch[:, 1:].flatten()) + more
    wanted = dense.flatten(0, 1).float().log_softmax(dim=-1)
    return (
        functional.kl_div(logits.log_softmax(dim=-1), wanted, reduction="batchmean", log_target=True) + more
    )


def _lost_mass(gates: Mapping[int, Gate]) -> torch.Tensor:
    return torch.stack([gate.loss for gate in gates.values() if gate.loss is not None]).mean()


def _unevenness(gates: Mapping[int, Gate], settings: TrainSettings) -> torch.Tensor | float:
    if not settings.balance_weight or not gates:
        return 0.0
    found = [gate.imbalance for gate in gates.values() if gate.imbalance is not None]
    return settings.balance_weight * torch.stack(found).mean()


@torch.no_grad()
def dominance(gates: Mapping[int, Gate]) -> dict[int, float]:
    """Return the largest group's share of the last batch's tokens, by layer."""
    shares = {}
    for index, gate in gates.items():
        members = gate.memberships()[1].flatten(0, 1).argmax(dim=-1)
        shares[index] = (torch.bincount(members).max() / len(members)).item()
    return shares


@contextlib.contextmanager
def _summary(log_dir: Path | None) -> Iterator[Any]:
    if log_dir is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("a log_dir needs TensorBoard: pip install 'focus-vllm[plots]'") from None
    with SummaryWriter(str(log_dir)) as summary:
        yield summary


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, tokens: torch.Tensor, gates: Mapping[int, Gate], settings: TrainSettings
) -> tuple[dict[int, Potentials], dict[int, float]]:
    """Find each layer's column potentials: Sinkhorn's fixed point on `calibration_tokens` of all the text.

    They come from sequences spread evenly over it, for a part of it would be of one kind.

    Returns:
        By layer, the potentials and the balance: the share of those tokens that are in the largest group
        when each is in its best one (1 / num_groups is ideal).
    """
    seq_len = settings.seq_len
    count = max(min(settings.calibration_tokens, len(tokens)) // seq_len, 1)
    starts = torch.linspace(0, len(tokens) - seq_len, count, dtype=torch.float64).long()
    sample = tokens[starts[:, None] + torch.arange(seq_len)]
    scores: dict[int, list[torch.Tensor]] = {index: [] for index in gates}
    query_scores: dict[int, list[torch.Tensor]] = {index: [] for index in gates}
    device = next(model.parameters()).device
    with attach_layers(model, gates):
        for batch in sample.split(settings.batch_size):  # type: ignore[no-untyped-call]
            model(input_ids=batch.to(device), use_cache=False, logits_to_keep=1)
            for index, gate in gates.items():
                assert gate.scores is not None
                scores[index].append(gate.scores.flatten(0, 1))
                if gate.query_scores is not None:
                    query_scores[index].append(gate.query_scores.flatten(0, 1))
    potentials, balance = {}, {}
    for index, gate in gates.items():
        keys = torch.cat(scores[index])
        queries = torch.cat(query_scores[index]) if query_scores[index] else None
        potentials[index] = gate.calibrated(keys, queries, CALIBRATION_ITERATIONS)
        counts = torch.bincount((keys + potentials[index][0]).argmax(dim=-1))
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
