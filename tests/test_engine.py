"""Focus in a real vLLM engine on the CPU, against the reference on the Hugging Face model."""

from __future__ import annotations

import pytest
import torch
from adapters import DEMO, random_adapter, random_eagle_head
from engines import StoredGroups, engine, generate, logprobs, prompt
from reference_check import TOLERANCE, check_against_reference
from transformers import AutoModelForCausalLM

from focus_vllm.adapter import load_adapter

pytestmark = pytest.mark.vllm

LENGTHS = [3, 255, 300, 511, 777, 1024, 1500, 2111]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return random_adapter(DEMO, tmp_path_factory.mktemp("adapter") / "focus.safetensors")


@pytest.fixture(scope="module")
def hf_model():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_below_dense_below_are_bit_identical_to_stock_vllm(adapter, dtype):
    prompts = [prompt(length, seed=length) for length in (1, 17, 300, 1200)]
    results = []
    for focus in (None, {"adapter": str(adapter), "dense_below": 1300}):
        with engine(DEMO, focus, dtype=dtype, max_num_batched_tokens=512) as llm:
            results.append(generate(llm, prompts, max_tokens=24))
    for stock, focused in zip(*results, strict=True):
        assert focused.outputs[0].token_ids == stock.outputs[0].token_ids
        assert torch.equal(logprobs(focused), logprobs(stock))


@pytest.mark.parametrize("overrides", [{"top_k": 8}, {"key_k": 8}, {"window": 4000}], ids=str)
def test_a_mask_that_keeps_every_pair_equals_stock_vllm(adapter, overrides):
    prompts = [prompt(3001)]
    with engine(DEMO) as llm:
        stock = generate(llm, prompts, max_tokens=8)[0]
    with engine(DEMO, {"adapter": str(adapter), **overrides}) as llm:
        focused = generate(llm, prompts, max_tokens=8)[0]
        counts = llm.collective_rpc("focus_stats")[0]
    assert focused.outputs[0].token_ids == stock.outputs[0].token_ids
    assert (logprobs(focused) - logprobs(stock)).abs().max() <= TOLERANCE
    assert counts["selected_tokens"] == counts["candidate_tokens"]


def test_queries_with_centroids_of_their_own_are_served_by_them(hf_model, monkeypatch, tmp_path):
    adapter = random_adapter(DEMO, tmp_path / "focus.safetensors", own_queries=True)
    with engine(DEMO, {"adapter": str(adapter)}) as llm:
        stored = StoredGroups(llm, monkeypatch)
        output = generate(llm, [prompt(1511)], max_tokens=20)[0]
    groups = stored.of(output)
    assert any(not torch.equal(keys, queries) for keys, queries in groups.values())
    check_against_reference(hf_model, adapter, {}, output, groups)


@pytest.mark.parametrize(("key_k", "top_k", "num_tokens"), [(1, 1, 8000), (1, 2, 5003), (2, 2, 3000)])
def test_prompt_logprobs_equal_the_reference(adapter, hf_model, monkeypatch, key_k, top_k, num_tokens):
    overrides = {"key_k": key_k, "top_k": top_k}
    with engine(DEMO, {"adapter": str(adapter), **overrides}) as llm:
        stored = StoredGroups(llm, monkeypatch)
        output = generate(llm, [prompt(num_tokens)])[0]
        counts = llm.collective_rpc("focus_stats")[0]
    check_against_reference(hf_model, adapter, overrides, output, stored.of(output))
    assert counts["selected_tokens"]["prefill"] < 0.8 * counts["candidate_tokens"]["prefill"]
    config = load_adapter(adapter).config
    num_layers = hf_model.config.num_hidden_layers - len(config.dense_layers)
    assert counts["dense_queries"] == {"prefill": config.dense_below * num_layers, "decode": 0}


@pytest.mark.parametrize("max_num_batched_tokens", [256, 4096])
def test_a_batch_of_mixed_lengths_equals_the_reference_however_it_is_chunked(
    adapter, hf_model, monkeypatch, max_num_batched_tokens
):
    settings = {"max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": 8}
    with engine(DEMO, {"adapter": str(adapter)}, **settings) as llm:
        stored = StoredGroups(llm, monkeypatch)
        outputs = generate(llm, [prompt(length, seed=length) for length in LENGTHS], max_tokens=5)
    for output in outputs:
        check_against_reference(hf_model, adapter, {}, output, stored.of(output))


def test_a_prefix_cache_hit_equals_the_reference(adapter, hf_model, monkeypatch):
    first = prompt(2000)
    second = first[:1700] + prompt(400, seed=1)
    with engine(DEMO, {"adapter": str(adapter)}, enable_prefix_caching=True) as llm:
        stored = StoredGroups(llm, monkeypatch)
        generate(llm, [first], prompt_logprobs=False)
        output = generate(llm, [second], max_tokens=8, prompt_logprobs=False)[0]
    assert output.num_cached_tokens == 1700 // 128 * 128
    check_against_reference(hf_model, adapter, {}, output, stored.of(output))


def test_preempted_and_recomputed_requests_equal_the_reference(adapter, hf_model, monkeypatch):
    prompts = [prompt(600 + 50 * i, seed=i) for i in range(4)]
    settings = {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 512, "max_model_len": 2048}
    with engine(DEMO, {"adapter": str(adapter)}, **settings) as llm:
        stored = StoredGroups(llm, monkeypatch)
        outputs = generate(llm, prompts, max_tokens=140)
    assert stored.preemptions > 0
    for output in outputs:
        check_against_reference(hf_model, adapter, {}, output, stored.of(output))


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_decode_after_a_long_prompt_equals_the_reference(
    adapter, hf_model, monkeypatch, enable_prefix_caching
):
    ids = prompt(6000)
    focus = {"adapter": str(adapter)}
    with engine(DEMO, focus, enable_prefix_caching=enable_prefix_caching) as llm:
        stored = StoredGroups(llm, monkeypatch)
        if enable_prefix_caching:
            generate(llm, [ids], prompt_logprobs=False)
        output = generate(llm, [ids], max_tokens=64, prompt_logprobs=False)[0]
        counts = llm.collective_rpc("focus_stats")[0]
    assert output.num_cached_tokens == (6000 // 128 * 128 if enable_prefix_caching else 0)
    assert len(output.outputs[0].token_ids) == 64
    check_against_reference(hf_model, adapter, {}, output, stored.of(output))
    assert 0 < counts["selected_tokens"]["decode"] < 0.5 * counts["candidate_tokens"]["decode"]


@pytest.mark.parametrize(
    "drafts",
    [
        {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1},
        {"method": "draft_model", "model": str(DEMO)},  # dense: it is not routed
        {"method": "eagle", "model": "eagle"},
    ],
)
def test_drafts_that_are_verified_equal_the_reference(adapter, hf_model, tmp_path, monkeypatch, drafts):
    drafts = {**drafts, "num_speculative_tokens": 3}
    if drafts["method"] == "eagle":
        drafts["model"] = str(random_eagle_head(DEMO, tmp_path / drafts["model"]))
    prompts = [(prompt(300) * 20)[:length] for length in (6000, 500)]
    with engine(DEMO, {"adapter": str(adapter)}, speculative_config=drafts, disable_log_stats=False) as llm:
        stored = StoredGroups(llm, monkeypatch)
        outputs = generate(llm, prompts, max_tokens=48, prompt_logprobs=False)
        metrics = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafted, accepted = (metrics[f"vllm:spec_decode_num_{name}_tokens"] for name in ("draft", "accepted"))
    assert 0 < accepted < drafted  # some were rejected, whose groups must not stay
    for output in outputs:
        check_against_reference(hf_model, adapter, {}, output, stored.of(output))


def test_decode_across_dense_below_and_a_hit_on_its_blocks_equal_the_reference(
    adapter, hf_model, monkeypatch
):
    overrides = {"dense_below": 700}
    with engine(DEMO, {"adapter": str(adapter), **overrides}, enable_prefix_caching=True) as llm:
        stored = StoredGroups(llm, monkeypatch)
        prompts = [prompt(length, seed=length) for length in (500, 650, 690)]
        outputs = generate(llm, prompts, max_tokens=150, prompt_logprobs=False)
        first = prompts[0] + list(outputs[0].outputs[0].token_ids)
        late = generate(llm, [first + prompt(250, seed=1)], max_tokens=4, prompt_logprobs=False)[0]
    assert late.num_cached_tokens == 640  # 500 of the prompt, 140 decoded
    for output in (*outputs, late):
        check_against_reference(hf_model, adapter, overrides, output, stored.of(output))


def test_an_engine_without_an_adapter_is_stock_vllm():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    with engine(DEMO) as llm:
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()
        impls = {type(module.impl) for module in model.modules() if hasattr(module, "impl")}
        assert impls == {CPUAttentionBackendImpl}
        assert llm.collective_rpc("focus_info") == [None]
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()


def test_the_scheduler_looks_for_a_common_prefix_only_without_focus(adapter, monkeypatch):
    prefixes = {}
    for name, focus in (("stock", None), ("focus", {"adapter": str(adapter)})):
        with engine(DEMO, focus, enable_prefix_caching=True) as llm:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            schedule, found = scheduler.schedule, prefixes.setdefault(name, [])

            def watched(*args, schedule=schedule, found=found, **kwargs):
                step = schedule(*args, **kwargs)
                found.append(step.num_common_prefix_blocks)
                return step

            monkeypatch.setattr(scheduler, "schedule", watched)
            generate(llm, [prompt(300)], max_tokens=3)
    assert prefixes["stock"][0][0] > 1, "all blocks of the only request"
    assert len(prefixes["focus"]) >= 3
    assert set(map(tuple, prefixes["focus"])) == {(0,)}


def test_an_adapter_that_says_nothing_of_a_layer_is_refused(tmp_path):
    from focus_vllm.engine.settings import FocusUnsupportedError

    partial = random_adapter(DEMO, tmp_path / "focus.safetensors", layers=[0, 1, 2, 3, 4, 6])
    with pytest.raises(FocusUnsupportedError) as error, engine(DEMO, {"adapter": str(partial)}):
        pass
    for index in (5, 7):
        assert f"layer {index} is full attention but neither routed" in str(error.value)


def test_layers_named_dense_are_left_to_vllm(adapter):
    with engine(DEMO, {"adapter": str(adapter), "dense_layers": [0, 7]}) as llm:
        info = llm.collective_rpc("focus_info")[0]
        generate(llm, [prompt(600)])
        counts = llm.collective_rpc("focus_stats")[0]
    assert (info["routed_layers"], info["dense_layers"]) == ([1, 2, 3, 4, 5, 6], [0, 7])
    assert counts["candidate_tokens"]["prefill"] == 6 * 600 * 601 // 2
