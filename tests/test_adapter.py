"""The adapter file: what is written is read back, and anything else is refused with every reason."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GPT2Config, LlamaConfig

import focus_vllm.adapter
from focus_vllm.adapter import Adapter, AdapterError, BaseModel, load_adapter, read_base_model, save_adapter
from focus_vllm.config import FocusConfig
from focus_vllm.routing import Router

GOLDEN = Path(__file__).parent / "data" / "golden_adapter_v1.safetensors"


@pytest.fixture
def adapter():
    base = BaseModel(
        name="example/small",
        model_type="llama",
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        config_hash="ab" * 32,
    )
    generator = torch.Generator().manual_seed(0)
    layers = {
        index: Router(
            torch.randn(24, 32, generator=generator),
            torch.randn(8, 32, generator=generator),
            torch.randn(8, generator=generator),
        )
        for index in (0, 2)
    }
    return Adapter(
        config=FocusConfig(dense_layers=(1,)),
        base_model=base,
        layers=layers,
        training={"steps": 3, "data": "a.txt"},
    )


@pytest.fixture
def path(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "focus.safetensors")
    return tmp_path / "focus.safetensors"


def rewrite(path, metadata=None, tensors=None):
    """Write the file again with some metadata or tensors replaced; None removes one."""
    with safe_open(path, framework="pt") as file:
        old_metadata = file.metadata()
        old_tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    new_metadata = {**old_metadata, **(metadata or {})}
    new_tensors = {**old_tensors, **(tensors or {})}
    save_file(
        {name: tensor for name, tensor in new_tensors.items() if tensor is not None},
        path,
        {key: value for key, value in new_metadata.items() if value is not None},
    )


def refusal(path):
    with pytest.raises(AdapterError) as error:
        load_adapter(path)
    return error.value


def test_golden_file_of_version_1_loads_with_every_value():
    golden = load_adapter(GOLDEN)
    assert golden.config == FocusConfig(
        num_groups=4,
        group_dim=2,
        key_k=1,
        top_k=2,
        window=32,
        sink=2,
        dense_below=64,
        dense_layers=(1,),
        temperature=0.25,
    )
    assert golden.base_model == BaseModel(
        name="example/tiny-llama",
        model_type="llama",
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        config_hash="5f" * 32,
    )
    assert golden.training == {"objective": "log-gate", "steps": 3, "versions": {"focus_vllm": "0.1.0"}}
    assert sorted(golden.layers) == [0, 2]
    router = golden.layers[2]
    assert router.projection[:2].tolist() == [[-0.125, -0.0625], [0.0, 0.0625]]
    assert router.centroids.dtype == torch.float16
    assert router.centroids.tolist() == [[2.0, 3.0], [4.0, 5.0], [6.0, 7.0], [8.0, 9.0]]
    assert router.potential.tolist() == [0.5, -0.25, 0.0, 2.0]


def test_saved_adapter_is_read_back_exactly(adapter, path):
    loaded = load_adapter(path)
    assert (loaded.config, loaded.base_model) == (adapter.config, adapter.base_model)
    assert loaded.training == adapter.training
    assert sorted(loaded.layers) == [0, 2]
    for index, router in adapter.layers.items():
        found = loaded.layers[index].tensors()
        assert sorted(found) == ["centroids", "potential", "projection"]
        assert all(torch.equal(found[name], tensor) for name, tensor in router.tensors().items())


def with_queries(adapter):
    """The adapter with centroids of their own for queries."""
    layers = {
        index: dataclasses.replace(
            router, query_centroids=router.centroids + 1, query_potential=router.potential + 1
        )
        for index, router in adapter.layers.items()
    }
    return dataclasses.replace(adapter, layers=layers)


def version_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()["version"]


def test_query_centroids_are_read_back_and_make_it_version_2(adapter, path):
    assert version_of(path) == "1"
    own = with_queries(adapter)
    save_adapter(own, path)
    assert version_of(path) == "2"
    for index, router in load_adapter(path).layers.items():
        found = router.tensors()
        assert sorted(found) == sorted(field.name for field in dataclasses.fields(Router))
        assert all(torch.equal(found[name], part) for name, part in own.layers[index].tensors().items())


def test_query_centroids_of_only_some_layers_are_refused(adapter, path):
    save_adapter(with_queries(adapter), path)
    rewrite(path, tensors={"layers.2.query_potential": None, "layers.0.query_centroids": None})
    message = str(refusal(path))
    assert "layers.2.query_potential is missing" in message
    assert "layers.0.query_centroids is missing" in message


def test_base_model_alone_can_be_read(adapter, path):
    assert read_base_model(path) == adapter.base_model


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load_adapter(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    "kept", [0, 4, 100, -1], ids=["empty", "half a length", "half a header", "one byte short"]
)
def test_truncated_file_is_refused(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    assert "not a complete safetensors file" in str(refusal(path))
    with pytest.raises(AdapterError, match="not a complete safetensors file"):
        read_base_model(path)


def test_file_of_another_format_is_refused(path):
    rewrite(path, {"format": "pt"})
    assert "its format is 'pt', a Focus adapter's is 'focus-adapter'" in str(refusal(path))


def test_newer_version_is_refused_with_what_to_do(path):
    rewrite(path, {"version": "3"})
    message = str(refusal(path))
    assert "its version is '3', this release reads up to 2" in message
    assert "upgrade focus-vllm" in message


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"colour": "red"}, "unknown metadata key 'colour'"),
        ({"training": None}, "missing metadata key 'training'"),
        ({"config": "{"}, "metadata 'config'"),
        ({"config": json.dumps({**FocusConfig().to_dict(), "windw": 3})}, "unknown Focus setting ['windw']"),
        (
            {"config": json.dumps({**FocusConfig().to_dict(), "top_k": 99})},
            "top_k (99) must be <= num_groups (8)",
        ),
        ({"base_model": json.dumps({"name": "x"})}, "metadata 'base_model': has keys ['name']"),
    ],
)
def test_metadata_that_is_not_understood_is_refused(path, metadata, reason):
    rewrite(path, metadata)
    assert reason in str(refusal(path))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"layers.0.scale": torch.zeros(1)}, "unknown tensor 'layers.0.scale'"),
        ({"layers.x.potential": torch.zeros(8)}, "unknown tensor 'layers.x.potential'"),
        ({"layers.0.potential": None}, "missing tensor 'layers.0.potential'"),
        (
            {"layers.0.centroids": torch.zeros(4, 32)},
            "layers.0.centroids has shape [4, 32], expected [8, 32]",
        ),
        (
            {"layers.2.potential": torch.full((8,), float("nan"))},
            "layers.2.potential (torch.float32) is not all",
        ),
        ({"layers.2.projection": torch.full((24, 32), float("inf"))}, "layers.2.projection"),
        ({"layers.2.potential": torch.zeros(8, dtype=torch.int64)}, "layers.2.potential (torch.int64)"),
    ],
)
def test_wrong_tensor_is_refused(path, tensors, reason):
    rewrite(path, tensors=tensors)
    assert reason in str(refusal(path))


def test_layer_that_does_not_exist_or_is_dense_is_refused(path):
    shapes = {"projection": (24, 32), "centroids": (8, 32), "potential": (8,)}
    names = {f"layers.{index}.{part}": shape for index in (1, 3) for part, shape in shapes.items()}
    rewrite(path, tensors={name: torch.zeros(shape) for name, shape in names.items()})
    assert refusal(path).reasons == [
        "layer 1 is in dense_layers and has tensors",
        "layer 3 does not exist: the model has 3",
    ]


def test_refusal_lists_every_reason(path):
    rewrite(path, {"a": "1", "b": "2", "config": "[]"})
    assert len(refusal(path).reasons) == 3


def test_contradictory_adapter_is_not_written(adapter, tmp_path):
    broken = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, num_groups=4))
    with pytest.raises(AdapterError) as error:
        save_adapter(broken, tmp_path / "focus.safetensors")
    assert len(error.value.reasons) == 4
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file_and_nothing_else(adapter, path, monkeypatch):
    before = path.read_bytes()

    def fail(tensors, filename, metadata):
        Path(filename).write_bytes(b"part of a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(focus_vllm.adapter, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(adapter, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_mismatches_name_both_values_of_every_difference(adapter):
    served = dataclasses.replace(
        adapter.base_model, name="example/large", hidden_size=48, config_hash="cd" * 32
    )
    reasons = adapter.base_model.mismatches(served)
    assert reasons[0] == "it was trained for hidden_size 24 (example/small), the model has 48 (example/large)"
    assert len(reasons) == 2


def test_same_model_under_another_name_matches(adapter):
    assert adapter.base_model.mismatches(dataclasses.replace(adapter.base_model, name="a/copy")) == []


def test_base_model_follows_the_configuration():
    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    base = BaseModel.from_config("a", config)
    assert (base.hidden_size, base.num_key_value_heads) == (64, 2)
    config.vocab_size += 1
    assert BaseModel.from_config("a", config).config_hash != base.config_hash


def test_model_without_kv_heads_has_as_many_as_heads():
    assert BaseModel.from_config("gpt2", GPT2Config(n_embd=64, n_layer=2, n_head=4)).num_key_value_heads == 4
