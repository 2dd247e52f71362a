"""Focus on a Hugging Face causal language model, through transformers' attention interface."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from focus_vllm.config import FocusConfig
from focus_vllm.reference import focus_mask, masked_attention
from focus_vllm.routing import Router, route
from focus_vllm.training.gates import causal_attention, repeat_heads

HANDLER = "_focus_attention"
QUERY_CHUNK = 1024
UNSUPPORTED_INPUTS = ("s_aux", "position_bias")


class LayerAttention(Protocol):
    """Replaces the attention of one layer."""

    def observe(self, hidden: torch.Tensor) -> None:
        """See the input of the layer's QKV projection, `[batch, num_tokens, hidden_size]`."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float
    ) -> torch.Tensor:
        """Return the output, `[batch, num_heads, num_tokens, head_size]` like `query`.

        `key` and `value` are `[batch, num_kv_heads, num_tokens, head_size]`.
        """


@dataclasses.dataclass(slots=True)
class Recorder:
    """Leaves attention as it is and keeps the hidden states."""

    hidden: torch.Tensor | None = None
    """The last input of the layer's QKV projection, `[batch, num_tokens, hidden_size]`."""

    def observe(self, hidden: torch.Tensor) -> None:
        """Keep `hidden`."""
        self.hidden = hidden

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float
    ) -> torch.Tensor:
        """Attend to everything earlier."""
        return causal_attention(query, *repeat_heads(query, key, value), scale, softcap)


@dataclasses.dataclass(slots=True)
class HardMask:
    """One layer under the mask that is served; keeps what it routed last."""

    config: FocusConfig
    weight: torch.Tensor
    """`[num_groups, hidden_size]` or `[2, num_groups, hidden_size]`, float32, from `Router.fold`."""
    bias: torch.Tensor
    """`[num_groups]` or `[2, num_groups]`, float32."""
    given: tuple[torch.Tensor, torch.Tensor] | None = None
    """`(key_groups, query_groups)` to use instead of routing, `[num_tokens]`, `[batch, num_tokens]`, or
    `[1]` for all tokens."""
    scores: torch.Tensor | None = None
    """What keys were routed by, `[batch, num_tokens, num_groups]`, float32."""
    query_scores: torch.Tensor | None = None
    """What queries were routed by, likewise."""
    key_groups: torch.Tensor | None = None
    """G used last, `[batch, num_tokens]`."""
    query_groups: torch.Tensor | None = None
    """Q used last, `[batch, num_tokens]`."""

    def observe(self, hidden: torch.Tensor) -> None:
        """Choose the groups of `hidden`'s tokens."""
        own = self.bias.dim() == 2
        keys = (self.weight[0], self.bias[0]) if own else (self.weight, self.bias)
        self.scores = self.query_scores = functional.linear(hidden.float(), *keys)
        if own:
            self.query_scores = functional.linear(hidden.float(), self.weight[1], self.bias[1])
        if self.given is None:
            groups = route(hidden, self.weight, self.bias, self.config.key_k, self.config.top_k)
        else:
            shape = hidden.shape[:2]
            for part in self.given:
                if part.shape[-1] not in (1, shape[1]):
                    raise ValueError(f"groups given for {part.shape[-1]} tokens, the input has {shape[1]}")
            groups = (
                self.given[0].to(hidden.device).expand(shape),
                self.given[1].to(hidden.device).expand(shape),
            )
        self.key_groups, self.query_groups = groups

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float
    ) -> torch.Tensor:
        """Attend under the mask, `QUERY_CHUNK` queries at a time, in the dtype of `query`."""
        assert self.key_groups is not None
        assert self.query_groups is not None
        key, value = repeat_heads(query, key, value)
        chunks = []
        for start in range(0, query.shape[2], QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, query.shape[2])
            mask = torch.stack(
                [
                    focus_mask(queries[start:stop], keys[:stop], self.config, start)
                    for queries, keys in zip(self.query_groups, self.key_groups, strict=True)
                ]
            )
            chunk = query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop]
            chunks.append(_masked_chunk(*chunk, mask, scale, softcap))
        return torch.cat(chunks, dim=2)

    @property
    def num_tokens(self) -> int:
        """How many tokens the last call had."""
        assert self.key_groups is not None
        return self.key_groups.shape[1]

    def pairs(self) -> tuple[int, int, int]:
        """Return the last call's far pairs kept, far pairs, and pairs that always attend."""
        assert self.query_groups is not None
        assert self.key_groups is not None
        return count_pairs(self.query_groups, self.key_groups, self.config)


def count_pairs(
    query_groups: torch.Tensor, key_groups: torch.Tensor, config: FocusConfig
) -> tuple[int, int, int]:
    """Count a mask's pairs without building it.

    Args:
        query_groups: Q, `[batch, num_tokens]`, integer bitmasks.
        key_groups: G, likewise.
        config: The mask's settings.

    Returns:
        The far pairs that share a group, all far pairs, and the pairs that attend whatever their groups.
    """
    batch, num_tokens = key_groups.shape
    i = torch.arange(num_tokens, device=key_groups.device)
    # A query's far keys are those from position sink to far - 1.
    far = torch.where(i < config.dense_below, 0, i - config.window).clamp_min(config.sink)
    kept = 0
    for queries, keys in zip(query_groups, key_groups, strict=True):
        for signature in keys.unique():
            counts = functional.pad((keys == signature).cumsum(0), (1, 0))
            inside = counts[far.clamp(max=num_tokens)] - counts[min(config.sink, num_tokens)]
            kept += int((inside * ((queries & signature) != 0)).sum())
    all_far = batch * int((far - config.sink).sum())
    return kept, all_far, batch * num_tokens * (num_tokens + 1) // 2 - all_far


def _masked_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    if not softcap:
        return functional.scaled_dot_product_attention(query, key, value, mask[:, None], scale=scale)
    # SDPA has no softcap; the reference does, one sequence at a time.
    rows = [
        masked_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), m, scale, softcap)[0]
        for q, k, v, m in zip(query, key, value, mask, strict=True)
    ]
    return torch.stack(rows).transpose(1, 2).to(query.dtype)


def attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Find self-attention by structure: a layer index and a projection of the hidden state."""
    return {
        index: module
        for module in model.modules()
        if type(index := getattr(module, "layer_idx", None)) is int
        and "Attention" in type(module).__name__
        and getattr(module, "is_causal", True)
        and not getattr(module, "is_cross_attention", False)
        and _input_projection(module) is not None
    }


def routable_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the attention modules that Focus can route: those of full causal attention."""
    return {index: module for index, module in attention_layers(model).items() if _is_full(module, index)}


def _is_full(module: nn.Module, index: int) -> bool:
    config: Any = module.config
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return bool(layer_types[index] == "full_attention")
    return getattr(config, "sliding_window", None) is None


def _input_projection(module: nn.Module) -> nn.Module | None:
    """Return the first projection of the hidden state: q_proj, k_proj, c_attn, query_key_value, ..."""
    for child in module.children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            return child
    return None


@contextlib.contextmanager
def attach(
    model: PreTrainedModel,
    config: FocusConfig,
    layers: Mapping[int, Router],
    groups: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Iterator[dict[int, HardMask]]:
    """Run `model` under the mask that is served while the context is open; it is left as it was found.

    Layers that are not in `layers` run the model's own attention. Sequences must not be padded, and
    each call sees whole sequences: call the model with `use_cache=False`.

    Args:
        model: Any Hugging Face causal language model that uses transformers' attention interface.
        config: The mask's settings.
        layers: What each routed layer learned, by layer index.
        groups: For each layer to be overridden, bitmasks `(key_groups, query_groups)`, each
            `[num_tokens]` or `[batch, num_tokens]`, to use instead of routing.

    Yields:
        The routed layers by index; each keeps the groups and scores of the last call.

    Raises:
        ValueError: The model or a layer cannot be routed, or the model has Focus attached already.
    """
    device = next(model.parameters()).device
    handlers = {}
    for index, router in layers.items():
        weight, bias = router.fold(config.temperature)
        given = None if groups is None else groups.get(index)
        handlers[index] = HardMask(config, weight.to(device), bias.to(device), given)
    with attach_layers(model, handlers):
        yield handlers


@contextlib.contextmanager
def attach_layers(model: PreTrainedModel, handlers: Mapping[int, LayerAttention]) -> Iterator[None]:
    """Let `handlers` compute the attention of their layers while the context is open.

    Raises:
        ValueError: The model or a layer cannot be routed, or the model has Focus attached already.
    """
    if not model._supports_attention_backend:
        raise ValueError(f"{type(model).__name__} does not use transformers' attention interface")
    modules = routable_layers(model)
    if unknown := sorted(set(handlers) - set(modules)):
        raise ValueError(f"layers {unknown} cannot be routed; full causal attention: {sorted(modules)}")
    if any(HANDLER in vars(module) for module in modules.values()):
        raise ValueError("the model has Focus attached already")
    with contextlib.ExitStack() as undo:
        for index, handler in handlers.items():
            vars(modules[index])[HANDLER] = handler
            undo.callback(vars(modules[index]).pop, HANDLER)
            projection = _input_projection(modules[index])
            assert projection is not None
            undo.callback(projection.register_forward_pre_hook(_observer(handler)).remove)
        configs: dict[int, Any] = {id(module.config): module.config for module in modules.values()}
        for config in configs.values():
            original = config._attn_implementation
            config._attn_implementation = _register(original)
            undo.callback(setattr, config, "_attn_implementation", original)
        yield


def _observer(handler: LayerAttention) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def observe(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        handler.observe(inputs[0])

    return observe


def _register(original: str) -> str:
    """Register attention that asks each module for its handler, else runs `original`; return its name.

    What is registered holds no state, so registering it again changes nothing and it needs no undoing.
    """
    name = f"focus_{original}"
    AttentionInterface.register(name, functools.partial(_dispatch, original))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def _dispatch(
    original: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    handler: LayerAttention | None = vars(module).get(HANDLER)
    if handler is None:
        if softcap is not None:
            kwargs["softcap"] = softcap
        attention = _original_attention(original, module)
        return attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if given := [name for name in UNSUPPORTED_INPUTS if kwargs.get(name) is not None]:
        raise ValueError(f"Focus does not support attention with {given}, layer {module.layer_idx} has it")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"Focus needs whole sequences here, got {query.shape[2]} queries and {key.shape[2]} keys: "
            "call the model with use_cache=False"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = handler.attend(query, key, value, scale, softcap or 0.0)
    return output.transpose(1, 2).contiguous(), None


def _original_attention(
    name: str, module: nn.Module
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]
    # Eager attention is registered nowhere: each model's file defines its own.
    return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]


@torch.no_grad()
def prompt_logprobs(model: PreTrainedModel, token_ids: torch.Tensor | list[int]) -> torch.Tensor:
    """Return the log-probability of each token given those before it.

    Args:
        model: A causal language model, with or without Focus attached.
        token_ids: `[num_tokens]`, one prompt.

    Returns:
        `[num_tokens - 1]`, float32, on the CPU: entry i is for token i + 1.
    """
    return score_tokens(model, token_ids, len(token_ids) - 1)[0]


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel, token_ids: torch.Tensor | list[int], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the last `count` tokens of one prompt, each given all before it.

    Args:
        model: A causal language model, with or without Focus attached.
        token_ids: `[num_tokens]`.
        count: At most num_tokens - 1.

    Returns:
        On the CPU, their log-probabilities, `[count]`, float32, and whether each is the model's first choice,
        `[count]`, bool.
    """
    ids = torch.as_tensor(token_ids, device=next(model.parameters()).device)
    logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=count + 1).logits[0, :-1]
    wanted = ids[-count:, None]
    logprobs, first = [], []
    for start in range(0, count, QUERY_CHUNK):
        rows = logits[start : start + QUERY_CHUNK].float()
        targets = wanted[start : start + QUERY_CHUNK]
        logprobs.append(rows.gather(-1, targets)[:, 0] - rows.logsumexp(dim=-1))
        first.append(rows.argmax(dim=-1) == targets[:, 0])
    return torch.cat(logprobs).cpu(), torch.cat(first).cpu()
