"""Every Focus hyperparameter, once."""

from __future__ import annotations

import dataclasses
from typing import Any

MAX_GROUPS = 32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FocusConfig:
    """What one adapter serves; used by the trainer, the adapter file and the engine.

    Raises:
        ValueError: A value is out of range; the message lists every one that is.
    """

    num_groups: int = 8
    """K: centroids, and so groups, per layer."""
    group_dim: int = 32
    """d_g: width of the space in which hidden states are compared with centroids."""
    key_k: int = 1
    """Groups that a token belongs to when others attend to it."""
    top_k: int = 1
    """Groups that a token attends to."""
    window: int = 512
    """A query at position i always attends to keys j with i - j <= window, in tokens."""
    sink: int = 4
    """Leading tokens that every query attends to."""
    # Just above where Focus and dense prefill cross on an H200 (docs/performance.md, 2026-11-22).
    dense_below: int = 4096
    """Queries at positions below this attend to every earlier key."""
    dense_layers: tuple[int, ...] = ()
    """Layers, by index, that stay dense."""
    temperature: float = 0.1
    """tau: scores are divided by this before Sinkhorn or softmax."""
    decode_budget: int | None = None
    """Most far keys, the latest, that a query computed alone attends to; None for all. See `decode_mask`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))
        if reasons := self._problems():
            raise ValueError("invalid Focus configuration: " + "; ".join(reasons))

    def _problems(self) -> list[str]:
        at_least = {"num_groups": 1, "group_dim": 1, "key_k": 1, "top_k": 1, "window": 0, "sink": 0}
        at_least["dense_below"] = 0
        reasons = [
            f"{name} ({getattr(self, name)!r}) must be an integer >= {low}"
            for name, low in at_least.items()
            if type(getattr(self, name)) is not int or getattr(self, name) < low
        ]
        if reasons:
            return reasons
        budget = self.decode_budget
        if budget is not None and (type(budget) is not int or budget < 0):
            reasons.append(f"decode_budget ({budget!r}) must be None or an integer >= 0")
        if self.num_groups > MAX_GROUPS:
            reasons.append(f"num_groups ({self.num_groups}) must be <= {MAX_GROUPS}")
        for name in ("key_k", "top_k"):
            if getattr(self, name) > self.num_groups:
                reasons.append(f"{name} ({getattr(self, name)}) must be <= num_groups ({self.num_groups})")
        if not self.temperature > 0:
            reasons.append(f"temperature ({self.temperature}) must be > 0")
        if any(type(layer) is not int or layer < 0 for layer in self.dense_layers):
            reasons.append(f"dense_layers ({list(self.dense_layers)}) must be integers >= 0")
        return reasons

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, `decode_budget` only if there is one."""
        values = {**dataclasses.asdict(self), "dense_layers": list(self.dense_layers)}
        if self.decode_budget is None:
            del values["decode_budget"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FocusConfig:
        """Build from `to_dict`'s result.

        Raises:
            ValueError: A key is unknown or missing, or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown Focus setting {unknown}; known: {sorted(known)}")
        if missing := sorted(known - {"decode_budget"} - set(values)):
            raise ValueError(f"missing Focus setting {missing}")
        return cls(**{**values, "dense_layers": tuple(values["dense_layers"])})
