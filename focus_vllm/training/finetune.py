"""Training the model's weights together with the centroids: two phases, or both from the start."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from focus_vllm.adapter import Adapter, BaseModel
from focus_vllm.config import FocusConfig
from focus_vllm.training.settings import TrainSettings
from focus_vllm.training.train import (
    calibrate,
    check_length,
    dominance,
    new_gates,
    optimise,
    parameters_of,
    routers_of,
    weights_sha256,
)


def finetune(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    config: FocusConfig,
    settings: TrainSettings,
    base_model: BaseModel,
    weights_lr: float,
    centroid_steps: int = 0,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Adapter:
    """Train `model`'s weights under the gate, and an adapter for what they become.

    Args:
        model: Changed in place.
        tokens: `[num_tokens]`, int64: the text.
        config: What the adapter will serve.
        settings: How to train; `steps` are those in which the weights move, `lr` is the centroids'.
        base_model: How the adapter file describes the model.
        weights_lr: AdamW's learning rate for the weights.
        centroid_steps: Steps before those, in which only the centroids move (the first of two phases).
        provenance: Further facts for the adapter's training record.
        progress: Show a progress bar on stderr.

    Raises:
        ValueError: The text is shorter than a sequence, no layer can be routed, the objective has no gradient
            for weights, or the loss is not finite.
    """
    check_length(tokens, settings)
    if settings.objective == "mass" or settings.target == "dense":
        raise ValueError(
            f"objective {settings.objective!r} with target {settings.target!r} follows the dense model, "
            "so it cannot train the weights: use log-gate or paper, and target text"
        )
    started = time.perf_counter()
    gates = new_gates(model, config, settings)
    centroids = parameters_of(gates)
    model.requires_grad_(False)
    if centroid_steps:
        first = dataclasses.replace(settings, steps=centroid_steps)
        optimizer = torch.optim.AdamW(centroids, lr=settings.lr, weight_decay=0.0)
        optimise(model, tokens, gates, first, optimizer, progress=progress)
    model.requires_grad_(True)
    groups = [
        {"params": centroids, "lr": settings.lr, "weight_decay": 0.0},
        {"params": list(model.parameters()), "lr": weights_lr},
    ]
    optimise(model, tokens, gates, settings, torch.optim.AdamW(groups), progress=progress)
    model.requires_grad_(False)
    potentials, balance = calibrate(model, tokens, gates, settings)
    shares = dominance(gates)
    model.requires_grad_(True)
    record = {
        **dataclasses.asdict(settings),
        "weights_lr": weights_lr,
        "centroid_steps": centroid_steps,
        "dominance": {str(index): round(share, 4) for index, share in shares.items()},
        "balance": {str(index): round(share, 4) for index, share in balance.items()},
        "weights_sha256": weights_sha256(model),
        "seconds": round(time.perf_counter() - started, 1),
        **(provenance or {}),
    }
    return Adapter(
        config=config, base_model=base_model, layers=routers_of(gates, potentials), training=record
    )
