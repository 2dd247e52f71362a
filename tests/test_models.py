"""Every model family that Focus claims, as a tiny random model in real vLLM, against the reference."""

from __future__ import annotations

import pytest
import torch
import transformers
from adapters import random_adapter
from engines import StoredGroups, engine, generate, prompt
from reference_check import check_against_reference
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.vllm

COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
INTERLEAVED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {
    "Llama": COMMON,
    "Mistral": {**COMMON, "sliding_window": None},
    "Qwen2": COMMON,
    "Qwen3": COMMON,
    "Olmo2": COMMON,
    "Gemma2": {**COMMON, **INTERLEAVED, "sliding_window": 64, "query_pre_attn_scalar": 32},
    "Gemma3Text": {**COMMON, **INTERLEAVED, "sliding_window": 64, "query_pre_attn_scalar": 32},
    "GPT2": {
        "vocab_size": 512,
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "OPT": {
        "vocab_size": 512,
        "hidden_size": 128,
        "word_embed_proj_dim": 128,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
    },
}


def random_model(family, folder):
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # initialised too small for attention to matter
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    # vLLM runs OLMo-2 from transformers' own class, and patches that class to look for this.
    model.base_model.do_not_compile = True
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_the_reference(family, tmp_path, monkeypatch):
    model = random_model(family, tmp_path / "model")
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    full = [index for index, kind in enumerate(types) if kind == "full_attention"]
    adapter = random_adapter(tmp_path / "model", tmp_path / "focus.safetensors", layers=full, dense_below=100)
    settings = {"skip_tokenizer_init": True, "max_model_len": 2048, "max_num_batched_tokens": 512}
    with engine(tmp_path / "model", {"adapter": str(adapter)}, **settings) as llm:
        stored = StoredGroups(llm, monkeypatch)
        info = llm.collective_rpc("focus_info")[0]
        output = generate(llm, [prompt(1100, vocab=512)], max_tokens=4)[0]
        counts = llm.collective_rpc("focus_stats")[0]
    assert info["routed_layers"] == full
    assert counts["selected_tokens"]["prefill"] < 0.8 * counts["candidate_tokens"]["prefill"]
    check_against_reference(model, adapter, {}, output, stored.of(output))
