"""What Focus refuses to serve, and how it says so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from adapters import DEMO, random_adapter
from transformers import AutoConfig

from focus_vllm.adapter import AdapterError
from focus_vllm.engine.plugin import check_vllm_version
from focus_vllm.engine.settings import FocusUnsupportedError, read_settings


@pytest.fixture
def adapter(tmp_path):
    return random_adapter(DEMO, tmp_path / "focus.safetensors")


def vllm_config(focus, **changes):
    """Build the parts of vLLM's configuration that Focus reads."""
    values = {
        "hf_config": AutoConfig.from_pretrained(DEMO),
        "use_mla": False,
        "kv_transfer_config": None,
        "lora_config": None,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "use_ubatching": False,
        "cache_dtype": "auto",
        "device_type": "cpu",
        "speculative_config": None,
        **changes,
    }
    parts = SimpleNamespace(**values)
    return SimpleNamespace(
        additional_config={} if focus is None else {"focus": focus},
        model_config=SimpleNamespace(model="demo", hf_config=parts.hf_config, use_mla=parts.use_mla),
        parallel_config=parts,
        cache_config=parts,
        device_config=parts,
        kv_transfer_config=parts.kv_transfer_config,
        lora_config=parts.lora_config,
        speculative_config=parts.speculative_config,
    )


def test_without_focus_in_the_configuration_there_are_no_settings():
    assert read_settings(vllm_config(None)) is None


def test_settings_of_the_user_override_those_of_the_adapter(adapter):
    settings = read_settings(vllm_config({"adapter": str(adapter), "top_k": 3, "dense_layers": [1]}))
    assert (settings.config.top_k, settings.config.dense_layers) == (3, (1,))
    assert settings.adapter.config.top_k == 1


def test_everything_unsupported_is_refused_in_one_message(adapter):
    config = vllm_config(
        {"adapter": str(adapter), "decode_budget": 500},
        use_mla=True,
        kv_transfer_config=object(),
        lora_config=object(),
        decode_context_parallel_size=2,
        prefill_context_parallel_size=4,
        use_ubatching=True,
        cache_dtype="fp8",
        hf_config=AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=2),
    )
    with pytest.raises(FocusUnsupportedError) as error:
        read_settings(config)
    message = str(error.value)
    for part in (
        "MLA",
        "KV connector",
        "LoRA",
        "decode_context_parallel_size is 2",
        "is 4",
        "--enable-dbo",
        "'fp8'",
        "decode_budget is 500",
    ):
        assert part in message
    assert "hidden_size 256" in message
    assert "the model has 64" in message


@pytest.mark.parametrize(("parallel_drafting", "most"), [(False, 3), (True, 6)])
def test_on_gpus_a_window_without_room_for_the_drafts_is_refused(adapter, parallel_drafting, most):
    drafts = SimpleNamespace(num_speculative_tokens=3, parallel_drafting=parallel_drafting)

    def settings(window, **changes):
        focus = {"adapter": str(adapter), "window": window}
        return read_settings(vllm_config(focus, speculative_config=drafts, **changes))

    with pytest.raises(FocusUnsupportedError, match=f"window is {most - 1}, .* up to {most} drafts"):
        settings(most - 1, device_type="cuda")
    assert settings(most, device_type="cuda").config.window == most
    assert settings(most - 1).config.window == most - 1


@pytest.mark.parametrize(
    ("focus", "expected"),
    [
        ("focus.safetensors", 'expected {"adapter": "FILE.safetensors"}'),
        ({"top_k": 2}, 'expected {"adapter": "FILE.safetensors"}'),
    ],
)
def test_a_focus_setting_without_an_adapter_is_refused(focus, expected):
    with pytest.raises(FocusUnsupportedError) as error:
        read_settings(vllm_config(focus))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"group_dim": 8}, "['group_dim'] cannot be given"),
        ({"top_k": 99}, "top_k (99) must be <= num_groups"),
        ({"decode_budget": -1}, "decode_budget (-1) must be None or an integer >= 0"),
    ],
)
def test_a_wrong_override_is_refused(adapter, overrides, expected):
    with pytest.raises(FocusUnsupportedError) as error:
        read_settings(vllm_config({"adapter": str(adapter), **overrides}))
    assert expected in str(error.value)


def test_a_missing_or_broken_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        read_settings(vllm_config({"adapter": str(tmp_path / "none.safetensors")}))
    (tmp_path / "broken.safetensors").write_bytes(b"\x08")
    with pytest.raises(AdapterError, match="not a complete safetensors file"):
        read_settings(vllm_config({"adapter": str(tmp_path / "broken.safetensors")}))


@pytest.mark.parametrize(
    ("version", "cpu", "tested"),
    [
        ("0.28.0", True, True),
        ("0.26.0", True, False),
        ("0.26.0+cu130", False, True),
        ("0.29.1", False, False),
    ],
)
def test_vllm_outside_what_was_tested_is_refused(monkeypatch, version, cpu, tested):
    import vllm
    from vllm.platforms import current_platform

    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    if tested:
        check_vllm_version()
        return
    expected = f"tested on {'CPUs with vLLM 0.28' if cpu else 'GPUs with vLLM 0.26'} to 0.28, found {version}"
    with pytest.raises(RuntimeError, match=expected.replace(".", r"\.")):
        check_vllm_version()
