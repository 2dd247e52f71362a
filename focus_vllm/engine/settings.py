"""Focus's part of vLLM's configuration, and what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focus_vllm.adapter import Adapter, BaseModel, load_adapter
from focus_vllm.config import FocusConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OVERRIDES = {"key_k", "top_k", "window", "sink", "dense_below", "dense_layers", "decode_budget"}


class FocusUnsupportedError(RuntimeError):
    """Focus cannot serve this configuration; `reasons` lists every one found."""

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = reasons
        super().__init__("Focus cannot serve this configuration: " + "; ".join(reasons))


@dataclasses.dataclass(frozen=True, slots=True)
class FocusSettings:
    """`--additional-config '{"focus": {...}}'`, checked."""

    path: Path
    sha256: str
    adapter: Adapter
    config: FocusConfig
    """The adapter's configuration with the user's overrides."""


def focus_option(vllm_config: VllmConfig) -> Any:
    """Return `additional_config["focus"]` as it was given; None if Focus is off."""
    extra = vllm_config.additional_config
    return extra.get("focus") if isinstance(extra, dict) else None


def read_settings(vllm_config: VllmConfig) -> FocusSettings | None:
    """Return the Focus settings of an engine, or None if it has none.

    Raises:
        FocusUnsupportedError: A setting, or vLLM's configuration, does not allow Focus.
        AdapterError: The adapter file is not usable.
        FileNotFoundError: There is no adapter file.
    """
    values = focus_option(vllm_config)
    if values is None:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("adapter"), str):
        raise FocusUnsupportedError(
            [f'additional_config["focus"] is {values!r}, expected {{"adapter": "FILE.safetensors"}}']
        )
    path = Path(values["adapter"])
    adapter = load_adapter(path)
    overrides = {key: value for key, value in values.items() if key not in ("adapter", "sha256")}
    config = override(adapter.config, overrides)
    if reasons := _refusals(vllm_config, adapter, config):
        raise FocusUnsupportedError(reasons)
    return FocusSettings(path, hashlib.sha256(path.read_bytes()).hexdigest(), adapter, config)


def override(config: FocusConfig, values: dict[str, Any]) -> FocusConfig:
    """Return an adapter's configuration with the user's settings in place of its own.

    Raises:
        FocusUnsupportedError: A setting is unknown, belongs to the training, or is out of range.
    """
    if unknown := sorted(set(values) - OVERRIDES):
        raise FocusUnsupportedError(
            [f"Focus setting {unknown} cannot be given; besides 'adapter' there are {sorted(OVERRIDES)}"]
        )
    try:
        return FocusConfig.from_dict({**config.to_dict(), **values})
    except (TypeError, ValueError) as error:
        raise FocusUnsupportedError([str(error)]) from None


def _refusals(vllm_config: VllmConfig, adapter: Adapter, config: FocusConfig) -> list[str]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    served = BaseModel.from_config(model.model, model.hf_config)
    reasons = adapter.base_model.mismatches(served)
    checks: list[tuple[Any, str]] = [
        (model.use_mla, "the model uses multi-head latent attention (MLA)"),
        (
            vllm_config.kv_transfer_config is not None,
            "a KV connector would move blocks without their groups: remove --kv-transfer-config",
        ),
        (vllm_config.lora_config is not None, "LoRA is enabled: remove --enable-lora"),
        (
            parallel.decode_context_parallel_size > 1,
            f"decode_context_parallel_size is {parallel.decode_context_parallel_size}, it must be 1",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            f"prefill_context_parallel_size is {parallel.prefill_context_parallel_size}, it must be 1",
        ),
        (
            parallel.use_ubatching,
            "two parts of a batch would share buffers: remove --enable-dbo and --ubatch-size",
        ),
    ]
    if vllm_config.device_config.device_type == "cpu":
        dtype = vllm_config.cache_config.cache_dtype
        checks.append((dtype.startswith("fp8"), f"kv_cache_dtype {dtype!r} on the CPU: use 'auto'"))
        budget = config.decode_budget
        checks.append((budget is not None, f"decode_budget is {budget}: it works on GPUs only, leave it out"))
    else:
        from vllm import envs

        layout = envs.VLLM_KV_CACHE_LAYOUT
        checks.append((layout == "HND", "the KV cache layout is HND: unset VLLM_KV_CACHE_LAYOUT"))
        # The groups of a step's drafts are stored while its lists are made, which must not need them.
        drafts = _most_drafts(vllm_config)
        few = f"window is {config.window}, and a step has up to {drafts} drafts: it must be at least {drafts}"
        checks.append((config.window < drafts, few))
    return reasons + [reason for unsupported, reason in checks if unsupported]


def _most_drafts(vllm_config: VllmConfig) -> int:
    """Return the most tokens besides one that a step verifies of a request, as vLLM's builders count them."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return 0
    return (2 if speculative.parallel_drafting else 1) * (speculative.num_speculative_tokens or 0)
