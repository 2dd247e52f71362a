"""What the groups hold: which tokens, how surely, and how many."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from focus_vllm.config import FocusConfig
from focus_vllm.routing import Router
from focus_vllm.training.hf import attach


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """One group of one layer, over some text."""

    layer: int
    group: int
    share: float
    """Of all tokens; with key_k groups per token, shares add up to key_k."""
    purity: float
    """Chance that a token of the group would be in it for what it is alone: mean over the group's tokens of
    the share of that token's occurrences that the group holds. By chance it would be `share`."""
    tokens: tuple[tuple[str, float, float], ...]
    """The most frequent tokens: text, share of the group, share of that token's occurrences."""


@torch.no_grad()
def describe_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: FocusConfig,
    layers: Mapping[int, Router],
    sequences: torch.Tensor,
    top: int = 8,
) -> list[Group]:
    """Route text as it is served and describe each group by the tokens it holds as keys.

    Args:
        model: The adapter's base model.
        tokenizer: Its tokenizer.
        config: The adapter's settings.
        layers: The adapter's routers.
        sequences: `[count, num_tokens]`, int64.
        top: How many tokens to list per group.
    """
    vocabulary = int(sequences.max()) + 1
    counts = {index: torch.zeros(config.num_groups, vocabulary, dtype=torch.long) for index in layers}
    with attach(model, config, layers) as attached:
        for row in sequences:
            model(input_ids=row[None].to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
            for index, handler in attached.items():
                assert handler.key_groups is not None
                for group in range(config.num_groups):
                    inside = row[((handler.key_groups[0] >> group) & 1).bool().cpu()]
                    counts[index][group] += torch.bincount(inside, minlength=vocabulary)
    occurrences = torch.bincount(sequences.flatten(), minlength=vocabulary).clamp_min(1)
    return [
        _describe(tokenizer, index, group, row, occurrences, sequences.numel(), top)
        for index, table in counts.items()
        for group, row in enumerate(table)
    ]


def _describe(
    tokenizer: PreTrainedTokenizerBase,
    layer: int,
    group: int,
    counts: torch.Tensor,
    occurrences: torch.Tensor,
    num_tokens: int,
    top: int,
) -> Group:
    size = max(int(counts.sum()), 1)
    most = [int(token) for token in counts.topk(min(top, len(counts))).indices if counts[token]]
    return Group(
        layer=layer,
        group=group,
        share=int(counts.sum()) / num_tokens,
        purity=(counts * (counts / occurrences)).sum().item() / size,
        tokens=tuple(
            (
                str(tokenizer.decode([token])),
                int(counts[token]) / size,
                (counts[token] / occurrences[token]).item(),
            )
            for token in most
        ),
    )
