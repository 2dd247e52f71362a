"""How many GPUs a load needs: a model fitted to measured times, for what was not measured.

Prefill of L tokens takes `linear * L + quadratic * L^2` seconds: matrix products and whatever else every
token costs, and attention. The first scales with the parameters of a model's layers, the second with its
layers times its query heads, both with the number of GPUs, as if tensor parallelism cost nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from loadtest.advise import Measured
from loadtest.charts import tokens

SIDES = ("dense", "focus")
# Layers, hidden size, that of the MLP, query heads, key-value heads; heads have 128 channels.
LLAMAS = {"8b": (32, 4096, 14336, 32, 8), "70b": (80, 8192, 28672, 64, 8)}
BUSY = 0.7
"""Of the time that a replica may be busy: more, and queues grow long."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prefill:
    """Seconds of prefill by prompt length, of one side."""

    linear: float
    quadratic: float

    @classmethod
    def fit(cls, lengths: Sequence[int], seconds: Sequence[float]) -> Prefill:
        """Find the coefficients with the least relative error."""
        x, y = np.asarray(lengths, float), np.asarray(seconds)
        columns = np.stack([x / y, x * x / y], axis=1)
        (linear, quadratic), *_ = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)
        return cls(float(linear), float(quadratic))

    def seconds(self, length: int) -> float:
        """Return the time of one prompt."""
        return self.linear * length + self.quadratic * length * length


def fit(measured: Measured) -> dict[str, Prefill]:
    """Fit both sides."""
    return {
        side: Prefill.fit(measured.lengths, [times[number] for times in measured.prefill])
        for number, side in enumerate(SIDES)
    }


def scale(fitted: dict[str, Prefill], shape: str, gpus: int) -> dict[str, Prefill]:
    """Carry a fit of the 8B shape on one GPU over to another shape on `gpus` of the same kind.

    What Focus adds to every token (routing, the near part) belongs to attention and scales like it.
    """
    products = _layer_parameters(shape) / _layer_parameters("8b") / gpus
    attention = _attention(shape) / _attention("8b") / gpus
    dense, focus = (fitted[side] for side in SIDES)
    added = focus.linear - dense.linear
    return {
        "dense": Prefill(dense.linear * products, dense.quadratic * attention),
        "focus": Prefill(dense.linear * products + added * attention, focus.quadratic * attention),
    }


def plan(measured: Measured, shape: str, gpus: int, lengths: Sequence[int], rate: float) -> str:
    """Return a table: times, and replicas of `gpus` GPUs for `rate` prompts per second of each length."""
    fitted = fit(measured)
    error = max(
        abs(fitted[side].seconds(length) / times[number] - 1)
        for length, times in zip(measured.lengths, measured.prefill, strict=True)
        for number, side in enumerate(SIDES)
    )
    scaled = scale(fitted, shape, gpus)
    heads = ("prompt", "dense, s", "Focus, s", "", "replicas, dense", "replicas, Focus")
    out = [
        f"A model, not a measurement: {shape} on {gpus} GPUs, from {measured.source}",
        f"(the 8b shape on one GPU), whose times it gives within {error:.0%}.",
        f"Prefill alone, {rate:g} prompts per second, replicas busy {BUSY:.0%} of the time.",
        "",
        "".join(f"{head:>17}" for head in heads),
    ]
    for length in lengths:
        dense, focus = (scaled[side].seconds(length) for side in SIDES)
        replicas = [str(math.ceil(rate * seconds / BUSY)) for seconds in (dense, focus)]
        columns = (tokens(length), f"{dense:.3g}", f"{focus:.3g}", f"{dense / focus:.2f}x", *replicas)
        out.append("".join(f"{column:>17}" for column in columns))
    return "\n".join(out) + "\n"


def _layer_parameters(shape: str) -> float:
    layers, hidden, mlp, heads, kv_heads = LLAMAS[shape]
    return float(layers * hidden * (128 * (2 * heads + 2 * kv_heads) + 3 * mlp))


def _attention(shape: str) -> float:
    layers, _, _, heads, _ = LLAMAS[shape]
    return float(layers * heads)
