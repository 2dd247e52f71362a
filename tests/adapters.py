"""Random adapters, and a random EAGLE head, for tests that need routing or drafts, not quality."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from focus_vllm.adapter import Adapter, BaseModel, save_adapter
from focus_vllm.config import FocusConfig
from focus_vllm.routing import Router

DEMO = Path(__file__).parent.parent / "focus_vllm" / "demo" / "model"


def random_adapter(
    model: Path, path: Path, layers: list[int] | None = None, own_queries: bool = False, **config
) -> Path:
    """Write an adapter of random routers for a model folder and return its path."""
    base = AutoConfig.from_pretrained(model)
    focus = FocusConfig(**{"window": 128, "dense_below": 256, **config})
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden_size = base.get_text_config().hidden_size
    routed = range(base.get_text_config().num_hidden_layers) if layers is None else layers
    routers = {
        index: Router(
            normal(hidden_size, focus.group_dim) / hidden_size**0.5,
            normal(focus.num_groups, focus.group_dim),
            torch.zeros(focus.num_groups),
            *((normal(focus.num_groups, focus.group_dim), normal(focus.num_groups)) if own_queries else ()),
        )
        for index in routed
    }
    base_model = BaseModel.from_config(model.name, base)
    save_adapter(Adapter(config=focus, base_model=base_model, layers=routers), path)
    return path


def random_eagle_head(model: Path, folder: Path) -> Path:
    """Write a drafter that goes on from a model's last hidden states, badly, and return its folder."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model, num_hidden_layers=1)
    layer = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    weights = {
        name.removeprefix("model."): weight
        for name, weight in layer.items()
        if ".layers." in name and "input_layernorm" not in name
    }
    identity = torch.eye(config.hidden_size)
    weights["fc.weight"] = torch.cat([torch.zeros_like(identity), identity], dim=1)
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors")
    return folder
