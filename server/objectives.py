"""How requests are judged: classes of prompt length, and latency targets that grow with it."""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Mapping

from server.errors import LaunchError

BUCKETS = "1k,8k,32k,128k,256k,512k,1m"
TARGETS = {"ttft": "1+0.1/1k", "tpot": "0.05+0.0001/1k", "e2e": "60+0.2/1k"}
UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}

_LENGTH = re.compile(r"([1-9]\d*)([km]?)")
_NUMBER = r"\d+(?:\.\d+)?"
_TARGET = re.compile(rf"({_NUMBER})(?:\+({_NUMBER})/1k)?")


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A latency that a request should stay within: `base + slope * prompt tokens / 1024`, seconds."""

    base: float
    slope: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `2` or `2+0.1/1k`.

        Raises:
            ValueError: The text says nothing of that kind.
        """
        if (match := _TARGET.fullmatch(text.strip())) and any(float(part or 0) for part in match.groups()):
            return cls(float(match[1]), float(match[2] or 0))
        raise ValueError(f"{text!r} is not seconds > 0, like 2, or 2+0.1/1k: 0.1 more per 1024 prompt tokens")

    def seconds(self, prompt_tokens: int) -> float:
        """Return the target for one request."""
        return self.base + self.slope * prompt_tokens / 1024


@dataclasses.dataclass(frozen=True, slots=True)
class PromptBuckets:
    """Classes of prompt length; each includes its upper bound."""

    bounds: tuple[int, ...]
    labels: tuple[str, ...]
    """One more than bounds: `0-1k`, `1k-8k`, ... `1m+`."""

    @classmethod
    def parse(cls, text: str) -> PromptBuckets:
        """Read upper bounds like `1k,8k,1m`; k is 1024 tokens, m 1024k.

        Raises:
            ValueError: They are no lengths in increasing order.
        """
        names = [name.strip().lower() for name in text.split(",")]
        matches = [match for name in names if (match := _LENGTH.fullmatch(name))]
        bounds = tuple(int(match[1]) * UNITS[match[2]] for match in matches)
        if len(matches) < len(names) or list(bounds) != sorted(set(bounds)):
            raise ValueError(f"{text!r} is not a list of increasing prompt lengths, like {BUCKETS}")
        edges = ["0", *names]
        labels = [f"{low}-{high}" for low, high in zip(edges, names, strict=False)]
        return cls(bounds, (*labels, f"{names[-1]}+"))

    def label(self, prompt_tokens: int) -> str:
        """Return the class of a prompt."""
        return self.labels[bisect_left(self.bounds, prompt_tokens)]

    def up_to(self, prompt_tokens: int) -> tuple[str, ...]:
        """Return the classes of all prompts of at most that length."""
        return self.labels[: bisect_left(self.bounds, prompt_tokens) + 1]


@dataclasses.dataclass(frozen=True, slots=True)
class Objectives:
    """What the metrics by prompt length are told about."""

    buckets: PromptBuckets
    targets: Mapping[str, Target]
    """By objective: ttft, tpot, e2e."""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Objectives:
        """Read FOCUS_PROMPT_BUCKETS, FOCUS_SLO_TTFT, FOCUS_SLO_TPOT and FOCUS_SLO_E2E.

        Raises:
            LaunchError: One of them cannot be read; every reason is listed.
        """
        reasons = []
        targets = {}
        for objective, default in TARGETS.items():
            name = f"FOCUS_SLO_{objective.upper()}"
            try:
                targets[objective] = Target.parse(environ.get(name, default))
            except ValueError as error:
                reasons.append(f"{name}: {error}")
        try:
            buckets = PromptBuckets.parse(environ.get("FOCUS_PROMPT_BUCKETS", BUCKETS))
        except ValueError as error:
            reasons.append(f"FOCUS_PROMPT_BUCKETS: {error}")
        if reasons:
            raise LaunchError("; ".join(reasons))
        return cls(buckets, targets)
