"""The vLLM plugin: `register` runs in every process; attention changes when a model is loaded for Focus."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from focus_vllm.engine import steps

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import ModelConfig, VllmConfig

    from focus_vllm.engine.settings import FocusSettings
    from focus_vllm.engine.state import FocusState

OLDEST, NEWEST = (0, 26), (0, 28)
OLDEST_CPU = (0, 28)
"""The CPU's cache had another shape before."""
CPU_BACKEND = "focus_vllm.engine.backend_cpu.FocusCPUBackend"
CUDA_BACKEND = "focus_vllm.engine.backend_cuda.FocusFlashAttentionBackend"

# A child of vLLM's logger, so that the line appears wherever vLLM logs.
logger = logging.getLogger("vllm.focus")


def check_vllm_version() -> None:
    """Refuse a vLLM whose interfaces this release was not tested with.

    Raises:
        RuntimeError: The version is outside the tested range.
    """
    import vllm
    from vllm.platforms import current_platform

    release = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2])
    oldest, where = (OLDEST_CPU, "CPUs") if current_platform.is_cpu() else (OLDEST, "GPUs")
    if not oldest <= release <= NEWEST:
        low, high = (".".join(map(str, bound)) for bound in (oldest, NEWEST))
        raise RuntimeError(
            f"focus-vllm was tested on {where} with vLLM {low} to {high}, found {vllm.__version__}: "
            "install a vLLM in that range or a newer focus-vllm"
        )


def register() -> None:
    """Entry point of `vllm.general_plugins`; calling it again changes nothing."""
    from vllm.model_executor.model_loader import base_loader, tensorizer_loader

    for loader in (base_loader.BaseModelLoader, tensorizer_loader.TensorizerLoader):
        if not hasattr(loader.load_model, "focus"):
            loader.load_model = _with_focus(loader.load_model)  # type: ignore[method-assign]
    steps.skip_common_prefixes()
    if shared := int(os.environ.get(steps.VARIABLE, 0)):
        steps.share_steps(shared)


def _with_focus(load_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(load_model)
    def load_model_with_focus(
        self: Any, vllm_config: VllmConfig, model_config: ModelConfig, *args: Any, **kwargs: Any
    ) -> nn.Module:
        from focus_vllm.engine.settings import read_settings

        settings = None if _is_drafter(vllm_config, model_config) else read_settings(vllm_config)
        if settings is None:
            return load_model(self, vllm_config, model_config, *args, **kwargs)
        check_vllm_version()
        # vLLM hashes additional_config into its compile cache; a new adapter at an old path must not hit it.
        vllm_config.additional_config["focus"]["sha256"] = settings.sha256  # type: ignore[index]
        with _focus_backend(vllm_config):
            model = load_model(self, vllm_config, model_config, *args, **kwargs)
        _attach(model, vllm_config, settings)
        return model

    load_model_with_focus.focus = True  # type: ignore[attr-defined]
    return load_model_with_focus


def _is_drafter(vllm_config: VllmConfig, model_config: ModelConfig) -> bool:
    """Return whether a model is loaded for speculative decoding beside the one that is served."""
    if model_config is not vllm_config.model_config:
        return True
    # A draft model that is a whole model comes as the model of a configuration of its own.
    speculative = vllm_config.speculative_config
    if speculative is None or model_config is speculative.target_model_config:
        return False
    return model_config is speculative.draft_model_config


@contextlib.contextmanager
def _focus_backend(vllm_config: VllmConfig) -> Iterator[None]:
    """Have vLLM build its attention layers with the Focus backend."""
    from vllm.platforms import current_platform
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        slot, path = AttentionBackendEnum.CPU_ATTN, CPU_BACKEND
    else:
        slot, path = AttentionBackendEnum.CUSTOM, CUDA_BACKEND
    attention_config = vllm_config.attention_config
    selected = attention_config.backend
    register_backend(slot, path)
    if slot is AttentionBackendEnum.CUSTOM:
        attention_config.backend = slot
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        attention_config.backend = selected
        if slot is not AttentionBackendEnum.CUSTOM:
            slot.clear_override()
        selector._cached_get_attn_backend.cache_clear()


def _attach(model: nn.Module, vllm_config: VllmConfig, settings: FocusSettings) -> FocusState:
    from focus_vllm.engine.attach import attach

    state = attach(model, vllm_config, settings)
    config = state.config
    logger.info(
        "Focus attention is on: adapter %s (sha256 %s), %d layers routed, dense layers %s, "
        "num_groups=%d key_k=%d top_k=%d window=%d sink=%d dense_below=%d",
        settings.path.name,
        state.sha256[:12],
        len(state.layers),
        state.dense_layers,
        config.num_groups,
        config.key_k,
        config.top_k,
        config.window,
        config.sink,
        config.dense_below,
    )
    return state
