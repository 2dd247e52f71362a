"""How an adapter is trained; what it serves is in FocusConfig."""

from __future__ import annotations

import dataclasses

CHOICES = {
    "objective": ("log-gate", "mass", "paper"),
    "target": ("text", "dense"),
    "init": ("random", "kmeans"),
    "queries": ("own", "shared"),
    "precision": ("model", "bfloat16"),
    "schedule": ("cosine", "constant"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """One training run, whatever the model.

    Raises:
        ValueError: A value is out of range; the message lists every one that is.
    """

    objective: str = "log-gate"
    """What gates far pairs in training (docs/training.md): `log-gate`, `paper`, or `mass` without a backward
    pass through the model."""
    mass_weight: float | None = None
    """Times the loss of `mass` that is added to another objective's; None is 1 for `log-gate`, else 0."""
    balance_weight: float = 1.0
    """Times the unevenness of groups within single sequences (`Gate.imbalance`) that is added to the loss."""
    target: str = "text"
    """What the model's predictions are compared with: the `text`, or its own `dense` ones (distillation)."""
    steps: int = 600
    minutes: float = 0.0
    """Stop after so long if the steps take longer, the learning rate falling accordingly; 0 is no limit."""
    batch_size: int = 4
    """Sequences per forward pass."""
    accumulate: int = 1
    """Forward passes whose gradients are added up for one step."""
    seq_len: int = 2048
    """Tokens per sequence."""
    lr: float = 3e-3
    """AdamW's learning rate at the start; better than 1e-2 and 3e-2 on demo-10m (docs/training.md)."""
    schedule: str = "cosine"
    """`cosine` falls to 0 over the steps, `constant` stays."""
    seed: int = 0
    precision: str = "model"
    """`bfloat16` runs the model under autocast; groups are scored in float32 in any case."""
    init: str = "random"
    """Centroids at the start: `random`, or `kmeans` of the text's projected hidden states."""
    sinkhorn: int = 10
    """Iterations that balance the groups; with 0 the assignment is a softmax, and they collapse."""
    queries: str = "own"
    """Queries choose groups by centroids of their `own`, or by the keys' (`shared`, as in the paper)."""
    sharpen: float = 2.0
    """Scores are multiplied by a factor that grows from 1 to this, so that soft groups end as hard ones."""
    train_top_k: int | None = None
    """Groups that a query attends to while training; None takes the adapter's `top_k`."""
    train_window: int | None = None
    """Window while training, in tokens; None takes the adapter's."""
    copy_spans: int = 8
    """Spans per sequence that repeat earlier text."""
    key_values: int = 0
    """Keys per sequence that come back, with the value that followed them."""
    text_tokens: int = 4_000_000
    """Most text that sequences are drawn from, in tokens."""
    calibration_tokens: int = 65_536
    """Text on which the potentials are calibrated."""

    def __post_init__(self) -> None:
        if self.mass_weight is None:
            object.__setattr__(self, "mass_weight", float(self.objective == "log-gate"))
        at_least = {
            "steps": 1,
            "minutes": 0,
            "batch_size": 1,
            "accumulate": 1,
            "seq_len": 2,
            "seed": 0,
            "sinkhorn": 0,
            "sharpen": 1,
            "copy_spans": 0,
            "key_values": 0,
            "mass_weight": 0,
            "balance_weight": 0,
            "text_tokens": 1,
            "calibration_tokens": 1,
        }
        reasons = [
            f"{name} ({getattr(self, name)}) must be >= {low}"
            for name, low in at_least.items()
            if getattr(self, name) < low
        ]
        for name, low in (("train_window", 0), ("train_top_k", 1)):
            if (value := getattr(self, name)) is not None and value < low:
                reasons.append(f"{name} ({value}) must be >= {low}")
        if self.mass_weight and self.objective == "mass":
            reasons.append(f"mass_weight ({self.mass_weight}) is for other objectives: 'mass' is that alone")
        if not self.lr > 0:
            reasons.append(f"lr ({self.lr}) must be > 0")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                reasons.append(f"{name} ({getattr(self, name)!r}) must be one of {list(known)}")
        if reasons:
            raise ValueError("invalid training settings: " + "; ".join(reasons))

    def num_tokens(self) -> int:
        """Return how many tokens of text training and calibration read at most."""
        wanted = self.steps * self.accumulate * self.batch_size * (self.seq_len + 1)
        return min(wanted, self.text_tokens) + self.calibration_tokens
