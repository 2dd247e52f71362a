"""The adapter: one safetensors file with what Focus learned for one base model.

Tensors, for each routed layer `i`: `layers.{i}.projection` `[hidden_size, group_dim]`,
`layers.{i}.centroids` `[num_groups, group_dim]`, `layers.{i}.potential` `[num_groups]`; in version 2, all
of them may also have `layers.{i}.query_centroids` and `layers.{i}.query_potential` of those shapes.
Metadata, each a string: `format`, `version`, and as JSON `config` (FocusConfig), `base_model`
(BaseModel) and `training` (free provenance). docs/adapter.md has an example.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from focus_vllm.config import FocusConfig
from focus_vllm.routing import Router

FORMAT = "focus-adapter"
# 2 brought query centroids; an adapter without them is still written as 1.
VERSION, SHARED_VERSION = 2, 1
METADATA_KEYS = {"format", "version", "config", "base_model", "training"}
HASHED_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)


class AdapterError(ValueError):
    """An adapter that must not be used; `reasons` lists every one found."""

    def __init__(self, path: str | Path, reasons: list[str]) -> None:
        self.reasons = reasons
        super().__init__(f"adapter {str(path)!r} refused: " + "; ".join(reasons))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """The model that an adapter was trained for: its name and what must match."""

    name: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    config_hash: str
    """SHA-256 over HASHED_FIELDS of the model's config.json."""

    @classmethod
    def from_config(cls, name: str, config: Any) -> BaseModel:
        """Describe a model by its Hugging Face configuration (the text part of a multimodal one)."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = text.num_attention_heads
        fields: dict[str, Any] = {key: getattr(text, key, None) for key in HASHED_FIELDS}
        fields["num_key_value_heads"] = fields["num_key_value_heads"] or heads
        fields["head_dim"] = fields["head_dim"] or text.hidden_size // heads
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        return cls(
            name=name,
            model_type=text.model_type,
            hidden_size=text.hidden_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=fields["num_key_value_heads"],
            config_hash=digest,
        )

    def mismatches(self, served: BaseModel) -> list[str]:
        """Return why an adapter for this model must not run on `served`; empty if it may."""
        return [
            f"it was trained for {field.name} {ours!r} ({self.name}), "
            f"the model has {theirs!r} ({served.name})"
            for field in dataclasses.fields(self)
            if field.name != "name"
            and (ours := getattr(self, field.name)) != (theirs := getattr(served, field.name))
        ]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter in memory."""

    config: FocusConfig
    base_model: BaseModel
    layers: Mapping[int, Router]
    """Routed layers by index: all but `config.dense_layers` and those that are not full attention."""
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How it was made: objective, data, steps, seed, versions, command."""


def save_adapter(adapter: Adapter, path: str | Path) -> None:
    """Write `adapter` to `path` in one step: a reader sees the old file or the new one, never a part.

    Raises:
        AdapterError: The adapter contradicts itself; every reason is listed and nothing is written.
    """
    path = Path(path)
    if reasons := _inconsistencies(adapter):
        raise AdapterError(path, reasons)
    tensors = {
        f"layers.{index}.{name}": tensor.detach().cpu().contiguous()
        for index, router in sorted(adapter.layers.items())
        for name, tensor in router.tensors().items()
    }
    metadata = {
        "format": FORMAT,
        "version": str(VERSION if _has_query_centroids(adapter) else SHARED_VERSION),
        "config": json.dumps(adapter.config.to_dict()),
        "base_model": json.dumps(dataclasses.asdict(adapter.base_model)),
        "training": json.dumps(dict(adapter.training)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, scratch, metadata)
        Path(scratch).chmod(0o644)
        Path(scratch).replace(path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def load_adapter(path: str | Path) -> Adapter:
    """Read and check an adapter file completely.

    Raises:
        FileNotFoundError: There is no such file.
        AdapterError: It is not a usable adapter; every reason is listed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise AdapterError(path, [f"not a complete safetensors file ({error})"]) from None
    config, base_model, training = _parse_metadata(path, metadata)
    layers, reasons = _parse_tensors(tensors)
    if reasons:
        raise AdapterError(path, reasons)
    adapter = Adapter(config=config, base_model=base_model, layers=layers, training=training)
    if reasons := _inconsistencies(adapter):
        raise AdapterError(path, reasons)
    return adapter


def read_base_model(path: str | Path) -> BaseModel:
    """Read only which model an adapter file is for.

    Raises:
        AdapterError: The header is not one of a usable adapter.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise AdapterError(path, [f"not a complete safetensors file ({error})"]) from None
    return _parse_metadata(Path(path), metadata)[1]


def _parse_metadata(path: Path, metadata: dict[str, str]) -> tuple[FocusConfig, BaseModel, dict[str, Any]]:
    if metadata.get("format") != FORMAT:
        raise AdapterError(
            path, [f"its format is {metadata.get('format')!r}, a Focus adapter's is {FORMAT!r}"]
        )
    if metadata.get("version") not in (str(SHARED_VERSION), str(VERSION)):
        raise AdapterError(
            path,
            [
                f"its version is {metadata.get('version')!r}, this release reads up to {VERSION!r}: "
                "upgrade focus-vllm or train the adapter again"
            ],
        )
    reasons = [f"unknown metadata key {key!r}" for key in sorted(set(metadata) - METADATA_KEYS)]
    reasons += [f"missing metadata key {key!r}" for key in sorted(METADATA_KEYS - set(metadata))]
    parsed: dict[str, Any] = {}
    for key, parse in (
        ("config", FocusConfig.from_dict),
        ("base_model", _parse_base_model),
        ("training", dict),
    ):
        try:
            parsed[key] = parse(json.loads(metadata.get(key, "{}")))
        except (ValueError, TypeError, AttributeError) as error:
            if key in metadata:
                reasons.append(f"metadata {key!r}: {error}")
    if reasons:
        raise AdapterError(path, reasons)
    return parsed["config"], parsed["base_model"], parsed["training"]


def _parse_base_model(values: dict[str, Any]) -> BaseModel:
    fields = {field.name for field in dataclasses.fields(BaseModel)}
    if set(values) != fields:
        raise ValueError(f"has keys {sorted(values)}, expected {sorted(fields)}")
    return BaseModel(**values)


def _parse_tensors(tensors: dict[str, torch.Tensor]) -> tuple[dict[int, Router], list[str]]:
    names = {field.name for field in dataclasses.fields(Router)}
    needed = {name for name in names if not name.startswith("query_")}
    found: dict[int, dict[str, torch.Tensor]] = {}
    reasons = []
    for name, tensor in sorted(tensors.items()):
        prefix, _, rest = name.partition(".")
        index, _, part = rest.partition(".")
        if prefix != "layers" or not index.isdecimal() or part not in names:
            reasons.append(f"unknown tensor {name!r}")
            continue
        found.setdefault(int(index), {})[part] = tensor
    for layer, parts in sorted(found.items()):
        reasons += [f"missing tensor 'layers.{layer}.{part}'" for part in sorted(needed - set(parts))]
    if reasons:
        return {}, reasons
    return {index: Router(**parts) for index, parts in found.items()}, []


def _has_query_centroids(adapter: Adapter) -> bool:
    return any(router.query_centroids is not None for router in adapter.layers.values())


def _inconsistencies(adapter: Adapter) -> list[str]:
    config, base = adapter.config, adapter.base_model
    expected = {
        "projection": (base.hidden_size, config.group_dim),
        "centroids": (config.num_groups, config.group_dim),
        "potential": (config.num_groups,),
        "query_centroids": (config.num_groups, config.group_dim),
        "query_potential": (config.num_groups,),
    }
    reasons = [] if adapter.layers else ["it routes no layer"]
    queries = {name for name in expected if _has_query_centroids(adapter) or not name.startswith("query_")}
    for index, router in sorted(adapter.layers.items()):
        if index >= base.num_hidden_layers:
            reasons.append(f"layer {index} does not exist: the model has {base.num_hidden_layers}")
        if index in config.dense_layers:
            reasons.append(f"layer {index} is in dense_layers and has tensors")
        tensors = router.tensors()
        reasons += [f"layers.{index}.{part} is missing" for part in sorted(queries - set(tensors))]
        for part, tensor in tensors.items():
            shape = expected[part]
            if tuple(tensor.shape) != shape:
                reasons.append(
                    f"layers.{index}.{part} has shape {list(tensor.shape)}, expected {list(shape)}"
                )
            elif not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                reasons.append(f"layers.{index}.{part} ({tensor.dtype}) is not all finite numbers")
    return reasons
