"""What to hold an adapter against: the attention that its mask keeps, and the mask that knows it all."""

from __future__ import annotations

import dataclasses

import torch

from focus_vllm.config import FocusConfig
from focus_vllm.reference import visible
from focus_vllm.routing import top_groups
from focus_vllm.training.gates import attention_scores, causal_attention, repeat_heads
from focus_vllm.training.hf import HardMask, count_pairs

QUERY_CHUNK = 128
SAMPLED_QUERIES = 64


@dataclasses.dataclass(slots=True)
class MassMeter:
    """Attends as the model does and measures what a mask would have kept of it."""

    mask: HardMask
    kept: float = 0.0
    """Attention kept, summed over heads and sampled queries."""
    measured: int = 0

    def observe(self, hidden: torch.Tensor) -> None:
        """Choose the groups of `hidden`'s tokens."""
        self.mask.observe(hidden)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float
    ) -> torch.Tensor:
        """Return full causal attention."""
        key, value = repeat_heads(query, key, value)
        config, num_tokens = self.mask.config, query.shape[2]
        assert self.mask.key_groups is not None
        assert self.mask.query_groups is not None
        first = max(config.window + config.sink + 1, config.dense_below)
        if first < num_tokens:
            step = -(-(num_tokens - first) // SAMPLED_QUERIES)
            i = torch.arange(first, num_tokens, step, device=query.device)
            j = torch.arange(num_tokens, device=query.device)
            scores = attention_scores(query[:, :, i], key, scale, softcap).float()
            weights = scores.masked_fill(j > i[:, None], float("-inf")).softmax(dim=-1)
            groups = self.mask.query_groups[:, i, None], self.mask.key_groups[:, None]
            seen = visible(i[:, None], j[None], *groups, config)
            self.kept += (weights * seen[:, None]).sum().item()
            self.measured += weights[..., 0].numel()
        return causal_attention(query, key, value, scale, softcap)


@dataclasses.dataclass(slots=True)
class RandomMask(HardMask):
    """Groups drawn for each position, whatever the token."""

    seed: int = 0

    def observe(self, hidden: torch.Tensor) -> None:
        """Draw the groups of `hidden`'s tokens, the same for every sequence."""
        shape = *hidden.shape[:2], self.config.num_groups
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(shape[1:], generator=generator).to(hidden.device).expand(shape)
        self.key_groups = top_groups(scores, self.config.key_k)
        self.query_groups = top_groups(scores, self.config.top_k)


@dataclasses.dataclass(slots=True)
class OracleMask:
    """Attends to window, sinks, and the far keys that get the most attention over all heads."""

    config: FocusConfig
    far_share: float
    """Share of each query's far keys that it reads."""
    num_tokens: int = 0

    def observe(self, hidden: torch.Tensor) -> None:
        """Note the length."""
        self.num_tokens = hidden.shape[1]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float
    ) -> torch.Tensor:
        """Attend under the mask."""
        key, value = repeat_heads(query, key, value)
        nobody = torch.zeros(1, 1, dtype=torch.uint8, device=query.device)
        outputs = []
        for start in range(0, self.num_tokens, QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, self.num_tokens)
            i = torch.arange(start, stop, device=query.device)[:, None]
            j = torch.arange(stop, device=query.device)[None]
            always = visible(i, j, nobody, nobody, self.config)
            scores = attention_scores(query[:, :, start:stop], key[:, :, :stop], scale, softcap).float()
            attention = scores.masked_fill(j > i, float("-inf")).softmax(dim=-1).sum(dim=1)
            far = (j <= i) & ~always
            budget = (far.sum(dim=-1) * self.far_share).round().long()
            ranked = attention.masked_fill(~far, -1.0).sort(dim=-1, descending=True)
            chosen = torch.arange(stop, device=query.device) < budget[:, None]
            picked = torch.zeros_like(ranked.values, dtype=torch.bool)
            picked.scatter_(-1, ranked.indices, chosen.expand_as(ranked.indices))
            weights = scores.masked_fill(~(picked & far | always)[:, None], float("-inf")).softmax(dim=-1)
            outputs.append(weights.to(value.dtype) @ value[:, :, :stop])
        return torch.cat(outputs, dim=2)

    def pairs(self) -> tuple[int, int, int]:
        """Return how many far pairs were kept, how many there were, and the pairs that always attend."""
        nobody = torch.zeros(1, self.num_tokens, dtype=torch.uint8)
        _, far, always = count_pairs(nobody, nobody, self.config)
        return round(far * self.far_share), far, always
