"""Put routers on a loaded vLLM model: find each attention layer's QKV projection and hook it."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionType

from focus_vllm.engine.overlap import Beside, beside, mark, rejoin
from focus_vllm.engine.settings import FocusSettings, FocusUnsupportedError
from focus_vllm.engine.state import AttentionCounts, FocusState, LayerFocus
from focus_vllm.routing import mask_dtype, route


def _route_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    key_groups: torch.Tensor,
    query_groups: torch.Tensor,
    key_k: int,
    top_k: int,
) -> None:
    """`routing.route` of `hidden` `[num_tokens, hidden_size]` into the first rows of two buffers."""
    if hidden.is_cuda:
        from focus_vllm.kernels.routing import route_into  # needs Triton, which a CPU may lack

        if not torch.cuda.is_current_stream_capturing():
            route_into(hidden, weight, bias, key_groups, query_groups, key_k, top_k)
            return
        with beside(hidden.device):
            route_into(hidden, weight, bias, key_groups, query_groups, key_k, top_k)
            mark(hidden.device, Beside.ROUTING)
            _list_decodes(ATTENTIONS[weight.data_ptr()])
        return
    num_tokens = len(hidden)
    key_groups[:num_tokens], query_groups[:num_tokens] = route(hidden, weight, bias, key_k, top_k)


ATTENTIONS: WeakValueDictionary[int, Attention] = WeakValueDictionary()
"""Routed layers on a GPU, by the address of their router's weight: with a name among the operator's arguments
torch.compile would compile every layer anew."""


def _list_decodes(attention: Attention) -> None:
    context = get_forward_context()
    # In piecewise graphs attention itself is not captured, and lists anew.
    if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE and isinstance(context.attn_metadata, dict):
        attention.impl.list_decodes(context.attn_metadata[attention.layer_name])  # type: ignore[attr-defined]


def _route_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    key_groups: torch.Tensor,
    query_groups: torch.Tensor,
    key_k: int,
    top_k: int,
) -> None:
    return None


def _rejoin_op(hidden: torch.Tensor, projected: torch.Tensor, key_groups: torch.Tensor) -> None:
    """Wait for `route`. Taking `hidden` keeps its memory from being used again before."""
    rejoin(hidden.device, Beside.ROUTING)


def _rejoin_fake(hidden: torch.Tensor, projected: torch.Tensor, key_groups: torch.Tensor) -> None:
    return None


# torch.ops.focus.route: opaque to torch.compile, which sees that it writes the two buffers.
LIBRARY = torch.library.Library("focus", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op(
    op_name="route",
    op_func=_route_op,
    mutates_args=["key_groups", "query_groups"],
    fake_impl=_route_fake,
    target_lib=LIBRARY,
)
direct_register_custom_op(
    op_name="rejoin",
    op_func=_rejoin_op,
    mutates_args=["key_groups"],
    fake_impl=_rejoin_fake,
    target_lib=LIBRARY,
)


def attach(model: nn.Module, vllm_config: VllmConfig, settings: FocusSettings) -> FocusState:
    """Route every layer that the adapter has, and leave the rest to vLLM.

    Args:
        model: A model just loaded with the Focus backend selected, before it is compiled.
        vllm_config: Its configuration.
        settings: What to serve.

    Returns:
        The state, also held as `model.focus`.

    Raises:
        FocusUnsupportedError: A layer of the adapter cannot be routed; every reason is listed.
    """
    config, routers = settings.config, settings.adapter.layers
    attentions = {
        extract_layer_index(name): module
        for name, module in vllm_config.compilation_config.static_forward_context.items()
        if isinstance(module, Attention)
    }
    routed = sorted(set(routers) - set(config.dense_layers))
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        routed = [index for index in routed if index in attentions]
    projections, reasons = _find_projections(model, attentions, routed)
    reasons += [
        f"layer {index} is full attention but neither routed by the adapter nor in dense_layers"
        for index, module in sorted(attentions.items())
        if index not in routers and index not in config.dense_layers and not _unroutable(module)
    ]
    if reasons:
        raise FocusUnsupportedError(reasons)
    counts = AttentionCounts()
    eager = vllm_config.compilation_config.mode == CompilationMode.NONE
    key_groups, query_groups = (_group_buffer(model, vllm_config, config.num_groups) for _ in range(2))
    if key_groups.is_cuda:
        counts.totals = torch.zeros(4, dtype=torch.int64, device=key_groups.device)
    layers = {}
    for index in routed:
        weight, bias = (part.to(key_groups.device) for part in routers[index].fold(config.temperature))
        if weight.is_cuda:
            from focus_vllm.kernels.routing import device_weight
            from focus_vllm.kernels.warmup import compile_routing

            key_groups = torch.zeros_like(key_groups)  # a dense step stores those of all layers at its end
            dtype = vllm_config.model_config.dtype
            assert isinstance(dtype, torch.dtype)
            weight = device_weight(weight, dtype)
            compile_routing(weight, bias, key_groups, query_groups, config.key_k, config.top_k)
        layers[index] = LayerFocus(config, weight, bias, key_groups, query_groups, counts)
        attentions[index].impl.focus = layers[index]  # type: ignore[attr-defined]
        if weight.is_cuda:
            ATTENTIONS[weight.data_ptr()] = attentions[index]
        _hook(projections[index], layers[index], eager)
    state = FocusState(
        adapter=str(settings.path),
        sha256=settings.sha256,
        base_model=settings.adapter.base_model.name,
        config=config,
        layers=layers,
        dense_layers=sorted(set(attentions) - set(layers)),
        counts=counts,
    )
    model.focus = state  # type: ignore[assignment]
    return state


def _unroutable(attention: Attention) -> list[str]:
    """Return why an attention layer is left to vLLM; empty if Focus can route it."""
    impl = attention.impl
    checks = [
        (attention.attn_type != AttentionType.DECODER, f"its type is {attention.attn_type}, not decoder"),
        (attention.sliding_window is not None, f"it has a sliding window of {attention.sliding_window}"),
        (attention.kv_sharing_target_layer_name is not None, "it shares another layer's KV cache"),
        (attention.has_sink, "it has learned attention sinks"),
        (getattr(impl, "alibi_slopes", None) is not None, "it uses ALiBi"),
        (not hasattr(impl, "focus"), f"its backend is {type(impl).__name__}, not Focus's"),
    ]
    return [reason for unroutable, reason in checks if unroutable]


def _find_projections(
    model: nn.Module, attentions: dict[int, Attention], routed: list[int]
) -> tuple[dict[int, nn.Module], list[str]]:
    projections, reasons = {}, []
    for index in routed:
        if index not in attentions:
            reasons.append(
                f"the adapter routes layer {index}, the model has attention layers {sorted(attentions)}"
            )
        elif problems := _unroutable(attentions[index]):
            reasons.append(f"layer {index} cannot be routed: {', '.join(problems)}")
        elif projection := _find_projection(model, index, attentions[index]):
            projections[index] = projection
        else:
            linear = {type(module).__name__ for module in model.modules() if isinstance(module, LinearBase)}
            reasons.append(
                f"layer {index} has no QKV projection; the model's linear layers: {sorted(linear)}"
            )
    return projections, reasons


def _find_projection(model: nn.Module, index: int, attention: Attention) -> nn.Module | None:
    """Return the linear layer whose input is the hidden state that enters an attention layer.

    It is a sibling of the attention layer; in vLLM's Transformers backend, where attention layers are not
    part of the module tree, a child of the module with that `layer_idx`. It is the fused QKV projection,
    or else the first projection that is not the output's.
    """
    for parent in model.modules():
        children = list(parent.children())
        if attention in children or getattr(parent, "layer_idx", None) == index:
            linear = [child for child in children if isinstance(child, LinearBase)]
            fused = [child for child in linear if isinstance(child, QKVParallelLinear)]
            inputs = [child for child in linear if not isinstance(child, RowParallelLinear)]
            if fused or inputs:
                return (fused or inputs)[0]
    return None


def _group_buffer(model: nn.Module, vllm_config: VllmConfig, num_groups: int) -> torch.Tensor:
    size, device = vllm_config.scheduler_config.max_num_batched_tokens, next(model.parameters()).device
    return torch.zeros(size, dtype=mask_dtype(num_groups), device=device)


def _hook(projection: nn.Module, layer: LayerFocus, eager: bool) -> None:
    key_k, top_k = layer.config.key_k, layer.config.top_k

    def route_tokens(hidden: torch.Tensor) -> None:
        if layer.deferred is not None and layer.deferred.keep(layer.deferred_row, hidden):
            return
        hidden = hidden.flatten(0, -2)  # vLLM's Transformers backend has a batch dimension of 1
        route = torch.ops.focus.route if torch.compiler.is_compiling() else _route_op
        route(hidden, layer.weight, layer.bias, layer.key_groups, layer.query_groups, key_k, top_k)

    def wait_for_routing(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        projected = output[0] if isinstance(output, tuple) else output
        torch.ops.focus.rejoin(args[0], projected, layer.key_groups)

    if eager and not layer.weight.is_cuda:
        # PyTorch takes 6 us to call a hook, of the 250 that a layer of a small model takes on a CPU.
        forward = projection.forward

        def route_and_project(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            route_tokens(hidden)
            return forward(hidden, *args, **kwargs)

        projection.forward = route_and_project
        return
    projection.register_forward_pre_hook(lambda _, args: route_tokens(args[0]))
    if layer.weight.is_cuda:
        projection.register_forward_hook(wait_for_routing)
