"""Training, from text to an adapter, on models so small that seconds are enough."""

import dataclasses
import itertools
import lzma
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer

import focus_vllm.training.gates as gating
import focus_vllm.training.hf as hf
import focus_vllm.training.train as trainer
from focus_vllm.adapter import BaseModel, load_adapter, save_adapter
from focus_vllm.config import FocusConfig
from focus_vllm.reference import focus_attention, focus_mask
from focus_vllm.routing import Router, route, top_groups
from focus_vllm.training.checkpoint import Checkpoints
from focus_vllm.training.data import copy_spans, plant_pairs, read_documents, sample_batch, shuffled_tokens
from focus_vllm.training.evaluate import (
    dense,
    evaluate,
    focus,
    held_out_sequences,
    local,
    oracle,
    random_groups,
    window_for,
)
from focus_vllm.training.finetune import finetune
from focus_vllm.training.gates import (
    LogGate,
    MassGate,
    PaperGate,
    causal_attention,
    soft_top_k,
)
from focus_vllm.training.hf import (
    attach,
    attach_layers,
    count_pairs,
    prompt_logprobs,
    routable_layers,
    score_tokens,
)
from focus_vllm.training.probes import TASKS, Probe, make_probes, score_probes
from focus_vllm.training.processes import processes  # noqa: F401 - a script of these tests uses it
from focus_vllm.training.settings import TrainSettings
from focus_vllm.training.tokens import describe_groups
from focus_vllm.training.train import train, weights_sha256
from focus_vllm.training.tune import tune
from focus_vllm.training.yardsticks import OracleMask

DEMO = Path(__file__).parent.parent / "focus_vllm" / "demo"
VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Untrained weights of the usual size would attend to everything alike.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MULTI_HEAD = {**SIZES, "num_key_value_heads": 4}
FAMILIES = {
    "llama": ("LlamaConfig", SIZES, "sdpa", [0, 1, 2, 3]),
    "llama, eager": ("LlamaConfig", SIZES, "eager", [0, 1, 2, 3]),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": None}, "sdpa", [0, 1, 2, 3]),
    "qwen2": ("Qwen2Config", SIZES, "sdpa", [0, 1, 2, 3]),
    "qwen3": ("Qwen3Config", SIZES, "sdpa", [0, 1, 2, 3]),
    "olmo2": ("Olmo2Config", SIZES, "sdpa", [0, 1, 2, 3]),
    "gemma2": ("Gemma2Config", {**SIZES, "sliding_window": 8}, "eager", [1, 3]),
    "gemma3": ("Gemma3TextConfig", {**SIZES, "num_hidden_layers": 6, "sliding_window": 8}, "sdpa", [5]),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 4, "n_head": 4, **MULTI_HEAD}, "sdpa", [0, 1, 2, 3]),
    "opt": ("OPTConfig", {**MULTI_HEAD, "ffn_dim": 48, "word_embed_proj_dim": 32}, "sdpa", [0, 1, 2, 3]),
}


def tiny_model(family="llama", seed=0):
    name, sizes, implementation, _ = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**sizes)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, dtype=torch.float32
    ).eval()


def random_routers(indices, num_groups=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        index: Router(
            torch.randn(32, 16, generator=generator),
            torch.randn(num_groups, 16, generator=generator),
            torch.randn(num_groups, generator=generator),
        )
        for index in indices
    }


def random_tokens(*shape, seed=0):
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def state_of(model):
    """Everything that attaching could leave behind."""
    return [
        (name, sorted(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ], model.config._attn_implementation


# Attaching


@pytest.mark.parametrize("family", FAMILIES)
def test_full_attention_layers_are_found_by_structure(family):
    assert sorted(routable_layers(tiny_model(family))) == FAMILIES[family][3]


def test_layers_with_a_sliding_window_everywhere_leave_nothing_to_route():
    config = transformers.MistralConfig(**SIZES, sliding_window=8)
    assert routable_layers(AutoModelForCausalLM.from_config(config)) == {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes", [{"window": 50}, {"top_k": 8}, {"dense_below": 50}, {"key_k": 8}], ids=str
)
def test_mask_that_covers_everything_gives_the_dense_model(family, changes):
    model, tokens = tiny_model(family), random_tokens(2, 50)
    config = FocusConfig(**{"window": 2, "sink": 1, "dense_below": 4, **changes})
    dense = logits(model, tokens)
    with attach(model, config, random_routers(FAMILIES[family][3])):
        torch.testing.assert_close(logits(model, tokens), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_left_exactly_as_it_was_found(family):
    model, tokens = tiny_model(family), random_tokens(1, 50)
    before, state = logits(model, tokens), state_of(model)
    config = FocusConfig(window=2, sink=0, dense_below=0)
    with attach(model, config, random_routers(FAMILIES[family][3])):
        assert not torch.equal(logits(model, tokens), before)
    assert state_of(model) == state
    assert torch.equal(logits(model, tokens), before)


def test_model_is_restored_when_the_context_raises():
    model = tiny_model()
    state = state_of(model)
    with pytest.raises(RuntimeError, match="stop"), attach(model, FocusConfig(), random_routers([0])):
        raise RuntimeError("stop")
    assert state_of(model) == state


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize(("key_k", "top_k"), [(1, 1), (1, 2), (2, 2)])
def test_attached_attention_is_the_reference_across_query_chunks(family, key_k, top_k, monkeypatch):
    monkeypatch.setattr(hf, "QUERY_CHUNK", 16)
    attend, compared = hf.HardMask.attend, []

    def checked_attend(self, query, key, value, scale, softcap):
        output = attend(self, query, key, value, scale, softcap)
        for row in range(len(query)):
            parts = [part[row].transpose(0, 1) for part in (query, key, value)]
            groups = self.query_groups[row], self.key_groups[row]
            expected, _ = focus_attention(*parts, *groups, self.config, scale, softcap)
            torch.testing.assert_close(output[row].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
            compared.append(expected)
        return output

    monkeypatch.setattr(hf.HardMask, "attend", checked_attend)
    config = FocusConfig(key_k=key_k, top_k=top_k, window=3, sink=2, dense_below=5)
    model = tiny_model(family)
    with attach(model, config, random_routers(FAMILIES[family][3])):
        logits(model, random_tokens(2, 53))
    assert len(compared) == 2 * len(FAMILIES[family][3])


@pytest.mark.parametrize(
    ("family", "norm"), [("llama", "model.layers.2.input_layernorm"), ("gpt2", "transformer.h.2.ln_1")]
)
def test_groups_follow_from_the_input_of_the_qkv_projection(family, norm):
    model, tokens, config = tiny_model(family), random_tokens(2, 20), FocusConfig(key_k=1, top_k=2)
    routers, seen = random_routers([2]), []
    hook = model.get_submodule(norm).register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    with attach(model, config, routers) as layers:
        logits(model, tokens)
    hook.remove()
    expected = [route(row, *routers[2].fold(config.temperature), 1, 2) for row in seen[0]]
    assert torch.equal(layers[2].key_groups, torch.stack([groups[0] for groups in expected]))
    assert torch.equal(layers[2].query_groups, torch.stack([groups[1] for groups in expected]))
    assert layers[2].scores.shape == (2, 20, 8)


def test_given_groups_replace_routing():
    model, tokens = tiny_model(), random_tokens(1, 40)
    config = FocusConfig(window=2, sink=0, dense_below=0)
    everything, nothing = torch.full((40,), 255, dtype=torch.uint8), torch.zeros(40, dtype=torch.uint8)
    dense, routers = logits(model, tokens), random_routers(range(4))
    with attach(model, config, routers, dict.fromkeys(range(4), (everything, everything))) as layers:
        torch.testing.assert_close(logits(model, tokens), dense, rtol=1e-4, atol=1e-4)
        assert layers[0].scores is not None
    with attach(model, config, routers, dict.fromkeys(range(4), (nothing, everything))):
        local = logits(model, tokens)
    assert (local - dense).abs().max() > 0.01


def test_given_groups_of_another_length_are_refused():
    groups = torch.zeros(39, dtype=torch.uint8)
    model = tiny_model()
    with (
        attach(model, FocusConfig(), random_routers([0]), {0: (groups, groups)}),
        pytest.raises(ValueError, match="groups given for 39 tokens, the input has 40"),
    ):
        logits(model, random_tokens(1, 40))


def test_layer_that_cannot_be_routed_is_refused():
    reason = r"layers \[0, 2\] cannot be routed; full causal attention: \[1, 3\]"
    model, routers = tiny_model("gemma2"), random_routers([0, 1, 2])
    with pytest.raises(ValueError, match=reason), attach(model, FocusConfig(), routers):
        pass


def test_model_that_bypasses_the_attention_interface_is_refused():
    config = transformers.FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    reason = "FalconForCausalLM does not use transformers' attention interface"
    model, routers = AutoModelForCausalLM.from_config(config), random_routers([0])
    with pytest.raises(ValueError, match=reason), attach(model, FocusConfig(), routers):
        pass


def test_attaching_twice_is_refused():
    model = tiny_model()
    with (
        attach(model, FocusConfig(), random_routers([0])),
        pytest.raises(ValueError, match="attached already"),
        attach(model, FocusConfig(), random_routers([1])),
    ):
        pass


def test_generation_with_a_cache_is_refused():
    model = tiny_model()
    with attach(model, FocusConfig(), random_routers([0])), torch.no_grad():
        cache = model(input_ids=random_tokens(1, 9), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="use_cache=False"):
            model(input_ids=random_tokens(1, 1), past_key_values=cache)


def test_prompt_logprobs_are_those_of_the_next_tokens(monkeypatch):
    monkeypatch.setattr(hf, "QUERY_CHUNK", 7)
    model, tokens = tiny_model(), random_tokens(23)
    expected = logits(model, tokens[None])[0, :-1].log_softmax(dim=-1)[torch.arange(22), tokens[1:]]
    torch.testing.assert_close(prompt_logprobs(model, tokens.tolist()), expected, rtol=1e-4, atol=1e-4)


# The log-gate


def test_sharp_assignments_make_the_gate_the_hard_mask():
    length, config = 37, FocusConfig(num_groups=4, group_dim=4, window=3, sink=1, dense_below=0)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, length, 8, generator=generator) for _ in range(3))
    members = torch.randint(4, (length,), generator=generator)
    gate = LogGate(config, torch.eye(4), 5.0 * torch.eye(4))
    gate.observe(torch.eye(4)[members][None])
    groups = 1 << members
    parts = [part[0].transpose(0, 1) for part in (query, key, value)]
    expected, _ = focus_attention(*parts, groups, groups, config, 0.3)
    output = gate.attend(query, key, value, 0.3, 0.0)[0].transpose(0, 1)
    # A pair without a common group keeps the gate's floor of 1e-6.
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-3)


def test_gate_leaves_near_pairs_and_sinks_alone_and_is_causal():
    generator = torch.Generator().manual_seed(0)
    centroids = 0.01 * torch.randn(8, 16, generator=generator)
    gate = LogGate(FocusConfig(window=2, sink=1), torch.randn(32, 16, generator=generator), centroids)
    gate.observe(torch.randn(1, 12, 32, generator=generator))
    bias = gate.bias(*gate.memberships(), 0)[0]
    i, j = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    assert (bias[j > i] == float("-inf")).all()
    assert (bias[(j <= i) & ((i - j <= 2) | (j == 0))] == 0).all()
    assert (bias[(i - j > 2) & (j > 0)] < 0).all()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_gate_that_is_all_near_is_causal_attention_with_and_without_softcap(softcap):
    query, key, value = (torch.randn(2, heads, 9, 8) for heads in (4, 2, 2))
    gate = LogGate(FocusConfig(window=9), torch.randn(32, 16), torch.randn(8, 16))
    gate.observe(torch.randn(2, 9, 32))
    output = gate.attend(query, key, value, 0.3, softcap)
    if softcap:
        always = torch.ones(9, dtype=torch.uint8)
        parts = [part[1].transpose(0, 1) for part in (query, key, value)]
        expected = focus_attention(*parts, always, always, FocusConfig(), 0.3, softcap)[0].transpose(0, 1)
        torch.testing.assert_close(output[1], expected)
    else:
        repeated = (part.repeat_interleave(2, dim=1) for part in (key, value))
        torch.testing.assert_close(
            output, scaled_dot_product_attention(query, *repeated, is_causal=True, scale=0.3)
        )


def small_gate(kind, length=21, num_groups=4, own=False, **given):
    """A gate that has seen random hidden states, and queries, keys and values for it."""
    generator = torch.Generator().manual_seed(0)
    config = FocusConfig(num_groups=num_groups, group_dim=8, window=3, sink=2)
    projection, centroids = (
        torch.randn(*shape, generator=generator).requires_grad_() for shape in ((16, 8), (num_groups, 8))
    )
    queries = torch.randn(num_groups, 8, generator=generator).requires_grad_(), torch.zeros(num_groups)
    gate = kind(config, projection, centroids, *(queries if own else ()), **given)
    gate.observe(0.02 * torch.randn(2, length, 16, generator=generator))
    return gate, [torch.randn(2, 2, length, 8, generator=generator) for _ in range(3)]


def pairs_of(length):
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    return (j <= i) & ((i - j <= 3) | (j < 2)), j > i


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", [LogGate, PaperGate])
def test_gates_are_their_formula_over_all_pairs_at_once(kind, own, top_k, softcap, monkeypatch):
    monkeypatch.setattr(gating, "CPU_QUERIES", 4)
    gate, (query, key, value) = small_gate(kind, own=own, top_k=top_k)
    output = gate.attend(query, key, value, 0.3, softcap)
    queries, keys = gate.memberships()
    shared = torch.einsum("bic,bjc->bij", queries, keys)
    near, future = pairs_of(21)
    scores = 0.3 * torch.einsum("bhid,bhjd->bhij", query, key)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if kind is LogGate:
        scores = scores + torch.where(near, 0.0, shared.clamp(1e-6, 1).log())[:, None]
    else:
        scores = scores * torch.where(near, 1.0, torch.sigmoid(10 * shared))[:, None]
    expected = scores.masked_fill(future, float("-inf")).softmax(-1) @ value
    torch.testing.assert_close(output, expected)
    wanted = torch.autograd.grad(
        expected.square().sum(), [gate.projection, gate.centroids], retain_graph=True
    )
    found = torch.autograd.grad(output.square().sum(), [gate.projection, gate.centroids])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_groups_become_balanced_from_step_to_step_when_scores_differ_by_much():
    gate, _ = small_gate(LogGate, length=400)
    gate.scores = (gate.scores * 20).detach()
    gate.scores[:, ::10, 0] -= 2000.0  # the other nine prefer group 0 by 200

    def largest_group():
        return gate.memberships()[1].flatten(0, 1).argmax(-1).bincount().max().item() / 800

    assert largest_group() > 0.8, "ten iterations from zeros are not enough"
    for _ in range(60):
        gate.memberships()
        gate.start.copy_(gate.found)
    assert largest_group() < 0.4


@pytest.mark.parametrize("own", [True, False])
def test_what_all_tokens_have_in_common_changes_no_membership(own):
    gate, _ = small_gate(LogGate, own=own)
    before = gate.memberships()
    gate.scores = gate.scores + torch.tensor([300.0, 0.0, 0.0, -100.0])
    if own:
        gate.query_scores = gate.query_scores + torch.tensor([-50.0, 0.0, 200.0, 0.0])
    torch.testing.assert_close(gate.memberships(), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("own", [True, False])
def test_calibrated_potentials_give_each_token_alone_the_groups_of_training(own):
    gate, _ = small_gate(LogGate, length=400, own=own)
    gate.scores = (gate.scores * 20 + torch.tensor([300.0, 0.0, 0.0, -100.0])).detach()
    gate.sinkhorn_iterations, gate.sharpness = 200, 3.0
    gate.query_potential = torch.tensor([1.0, 0.0, -1.0, 0.5]) if own else None
    keys, queries = gate.calibrated(
        gate.scores.flatten(0, 1), gate.query_scores.flatten(0, 1) if own else None, 200
    )
    trained_queries, trained_keys = gate.memberships()
    torch.testing.assert_close((gate.scores + keys).softmax(-1), trained_keys, rtol=1e-2, atol=1e-3)
    if own:
        torch.testing.assert_close((gate.query_scores + queries).softmax(-1), trained_queries)
    else:
        assert queries is None


def test_imbalance_is_of_single_sequences_though_the_batch_is_balanced():
    gate, _ = small_gate(LogGate, length=400)
    mixed = torch.eye(4).repeat(100, 1)  # every group in turn
    apart = torch.eye(4)[torch.arange(400) // 200]  # two groups
    for rows, wanted in (([mixed, mixed], 0.0), ([apart, apart.roll(2, dims=1)], 1.0)):
        gate.scores = 50 * torch.stack(rows)
        keys = gate.memberships()[1]
        torch.testing.assert_close(keys.mean(dim=(0, 1)), torch.full((4,), 0.25), rtol=1e-3, atol=1e-3)
        assert gate.imbalance.item() == pytest.approx(wanted, abs=0.01)


def test_mass_objective_is_the_log_of_the_attention_that_the_gate_keeps():
    gate, (query, key, value) = small_gate(MassGate, top_k=2)
    output = gate.attend(query, key, value, 0.3, 0.0)
    near, future = pairs_of(21)
    scores = (0.3 * query @ key.transpose(-1, -2)).masked_fill(future, float("-inf"))
    torch.testing.assert_close(output, scores.softmax(-1) @ value)
    queries, keys = gate.memberships()
    kept = torch.where(near, 1.0, (queries @ keys.transpose(1, 2)).clamp(max=1.0))[:, None]
    mass = (scores.softmax(-1) * kept).sum(-1)[:, :, 4:]
    torch.testing.assert_close(gate.loss, -mass.log().mean())


@pytest.mark.parametrize("kind", [LogGate, PaperGate])
def test_mass_beside_another_objective_is_the_same(kind):
    gate, given = small_gate(kind)
    alone, _ = small_gate(MassGate)
    gate.attend(*given, 0.3, 0.0)
    assert gate.loss is None
    gate.measures_mass = True
    gate.attend(*given, 0.3, 0.0)
    alone.attend(*given, 0.3, 0.0)
    assert gate.loss.item() == alone.loss.item() > 0.1


@pytest.mark.parametrize("k", [1, 2, 7])
def test_soft_choice_of_groups_adds_up_and_ends_as_the_hard_one(k):
    scores = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        soft_top_k(scores, k).sum(-1), torch.full((50,), float(k), dtype=torch.float64)
    )
    bits = (soft_top_k(1000 * scores, k) > 0.5).long() @ (1 << torch.arange(8))
    assert (bits == top_groups(scores, k).long()).float().mean() > 0.95
    assert torch.autograd.gradcheck(lambda given: soft_top_k(given, k), scores[:3].requires_grad_())


def test_gates_hold_no_square_of_the_length():
    gate, parts = small_gate(LogGate, length=640)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (sizes.append(tensor.numel()), tensor)[1], lambda tensor: tensor
    ):
        gate.attend(*parts, 0.3, 0.0)
    assert max(sizes) < 640 * 640


# Data


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "model")


def test_documents_are_read_from_plain_and_compressed_text(tmp_path):
    content = "First\nline.\0Second: äöü.\0\n".encode()
    (tmp_path / "plain.txt").write_bytes(content)
    (tmp_path / "packed.txt.xz").write_bytes(lzma.compress(content))
    for name in ("plain.txt", "packed.txt.xz"):
        assert read_documents(tmp_path / name) == ["First\nline.", "Second: äöü."]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("a.txt.xz", b"plain", "is not UTF-8 text"),
        ("a.txt", b"\0 \n\0", "holds no text"),
    ],
)
def test_file_that_is_not_text_is_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_documents(tmp_path / name)


def test_shuffled_tokens_hold_each_document_and_its_end(tokenizer):
    documents = ["one two three", "four five", "six"]
    tokens = shuffled_tokens(documents, tokenizer, 10_000, seed=0)
    assert sorted(tokenizer.decode(tokens).split(tokenizer.eos_token)) == sorted([*documents, ""])
    assert torch.equal(shuffled_tokens(documents, tokenizer, 4, seed=0), tokens[:4])


def test_batch_is_cut_from_the_text():
    tokens = torch.arange(100)
    batch = sample_batch(tokens, 5, 100, torch.Generator().manual_seed(0))
    assert torch.equal(batch, tokens.expand(5, 100))
    batch = sample_batch(tokens, 5, 7, torch.Generator().manual_seed(0))
    assert torch.equal(batch - batch[:, :1], torch.arange(7).expand(5, 7))


@pytest.mark.parametrize("distance", [0, 50])
def test_copied_spans_repeat_tokens_from_far_back(distance):
    original = torch.arange(300).repeat(20, 1)
    batch = copy_spans(original.clone(), 1, distance, torch.Generator().manual_seed(0))
    for row in batch:
        places = (row != torch.arange(300)).nonzero()[:, 0]
        assert 16 <= len(places) <= 64
        assert torch.equal(places, torch.arange(places[0], places[-1] + 1))
        back = (places - row[places]).unique()
        assert len(back) == 1
        assert back.item() >= distance + len(places)


def test_copied_spans_that_cannot_fit_are_refused():
    with pytest.raises(ValueError, match="need sequences of at least 228 tokens, got 200"):
        copy_spans(torch.zeros(1, 200), 1, 100, torch.Generator())


def test_planted_pairs_come_back_far_behind():
    generator = torch.Generator().manual_seed(0)
    batch = plant_pairs(torch.arange(400).repeat(20, 1), 1, 100, generator)
    for row in batch:
        runs = row.unfold(0, 12, 1)
        i, j = (runs[:, None] == runs[None]).all(dim=-1).nonzero(as_tuple=True)
        assert (j - i)[i < j].tolist() == [
            distance for distance in (j - i)[i < j].tolist() if distance >= 112
        ]
        assert (i < j).sum() == 1
    with pytest.raises(ValueError, match="need sequences of at least 124 tokens, got 120"):
        plant_pairs(torch.zeros(1, 120), 1, 100, generator)


# Training


SETTINGS = TrainSettings(
    steps=12, batch_size=2, seq_len=48, lr=0.03, calibration_tokens=480,
    copy_spans=0, mass_weight=0.0, balance_weight=0.0, sharpen=1.0, train_top_k=1,
)  # fmt: skip
CONFIG = FocusConfig(num_groups=4, group_dim=8, window=2, sink=1, dense_below=8, dense_layers=(0,))


def base_of(model):
    return BaseModel.from_config("tiny", model.config)


def run(model, settings=SETTINGS, config=CONFIG, tokens=None, checkpoints=None, **given):
    tokens = random_tokens(2000) if tokens is None else tokens
    return train(
        model, tokens, config, settings, base_of(model), checkpoints=checkpoints, progress=False, **given
    )


def tensors_of(adapter):
    return [part for _, router in sorted(adapter.layers.items()) for part in router.tensors().values()]


def test_training_lowers_the_loss():
    model, settings = tiny_model(), dataclasses.replace(SETTINGS, steps=40, schedule="constant")
    tokens = random_tokens(settings.seq_len + 1)
    losses, loss = [], trainer._loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_loss", lambda *given: (losses.append(loss(*given)), losses[-1])[1])
        run(model, settings, tokens=tokens)
    assert len(losses) == 40
    assert losses[-1] < losses[0] - 0.05, losses


def test_trained_adapter_is_complete_and_serves_the_configuration(tmp_path):
    model = tiny_model()
    adapter = run(model, provenance={"data": "text.txt"})
    save_adapter(adapter, tmp_path / "a.safetensors")
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert loaded.config == CONFIG
    assert sorted(loaded.layers) == [1, 2, 3]
    assert loaded.base_model.mismatches(base_of(model)) == []
    assert loaded.training["data"] == "text.txt"
    assert loaded.training["steps"] == 12
    assert set(loaded.training["balance"]) == {"1", "2", "3"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", ["log-gate", "paper", "mass"])
def test_every_objective_moves_the_centroids_of_every_family(family, objective):
    model = tiny_model(family)
    config = dataclasses.replace(CONFIG, dense_layers=())
    once = dataclasses.replace(SETTINGS, objective=objective, steps=1, calibration_tokens=48)
    adapters = [run(model, dataclasses.replace(once, steps=steps), config) for steps in (1, 2)]
    for first, second in zip(tensors_of(adapters[0]), tensors_of(adapters[1]), strict=True):
        assert not torch.equal(first, second)
        assert second.isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "dense"},
        {"init": "kmeans"},
        {"train_top_k": 2},
        {"queries": "shared"},
        {"precision": "bfloat16"},
        {"objective": "mass"},
        {"objective": "paper"},
        {"mass_weight": 1.0},
        {"objective": "mass", "balance_weight": 1.0},
        {"objective": "paper", "target": "dense", "init": "kmeans", "train_top_k": 2, "accumulate": 2},
    ],
    ids=str,
)
def test_what_is_optimised_falls(changes):
    settings = dataclasses.replace(SETTINGS, steps=40, schedule="constant", **changes)
    losses, gradients = [], trainer._gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_gradients", lambda *given: (losses.append(gradients(*given)), losses[-1])[1])
        run(tiny_model(), settings, tokens=random_tokens(settings.seq_len + 1))
    assert sum(losses[-3:]) < 0.99 * sum(losses[:3]), losses


def test_dense_target_costs_nothing_when_everything_is_near():
    model = tiny_model()
    settings = dataclasses.replace(SETTINGS, target="dense", train_window=48)
    gates = trainer.new_gates(model, CONFIG, settings)
    with attach_layers(model, gates):
        assert trainer._loss(model, random_tokens(2, 49), gates, settings).item() == pytest.approx(
            0, abs=1e-6
        )


def test_defaults_follow_the_adapter_and_the_objective():
    config = dataclasses.replace(CONFIG, top_k=3)
    for given, wanted in ((None, 3), (2, 2)):
        gates = trainer.new_gates(tiny_model(), config, dataclasses.replace(SETTINGS, train_top_k=given))
        assert {gate.top_k for gate in gates.values()} == {wanted}
    weights = {name: TrainSettings(objective=name).mass_weight for name in ("log-gate", "paper", "mass")}
    assert weights == {"log-gate": 1.0, "paper": 0.0, "mass": 0.0}


@pytest.mark.parametrize(("weight", "what"), [("mass_weight", "loss"), ("balance_weight", "imbalance")])
def test_weights_add_what_the_gates_lose(weight, what):
    model = tiny_model()
    plain = dataclasses.replace(SETTINGS, mass_weight=1e-9)  # measured, and as good as not added
    settings = dataclasses.replace(plain, **{weight: 0.5})
    gates, batch = trainer.new_gates(model, CONFIG, settings), random_tokens(2, 49)
    with attach_layers(model, gates):
        without, loss = (trainer._loss(model, batch, gates, each).item() for each in (plain, settings))
    added = sum(getattr(gate, what).item() for gate in gates.values()) / len(gates)
    assert loss == pytest.approx(without + 0.5 * added)
    assert added > 0.01


def test_every_step_begins_with_the_potentials_of_the_one_before():
    model, tokens = tiny_model(), random_tokens(2000)
    gates = trainer.new_gates(model, CONFIG, SETTINGS)
    begun = []
    first = gates[1]
    plain = trainer._gradients

    def gradients(*args):
        begun.append(first.start.clone())
        loss = plain(*args)
        begun.append(first.found)
        return loss

    optimizer = torch.optim.AdamW(trainer.parameters_of(gates), lr=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_gradients", gradients)
        trainer.optimise(
            model, tokens, gates, dataclasses.replace(SETTINGS, steps=3), optimizer, progress=False
        )
    assert not begun[0].any()
    assert torch.equal(begun[1], begun[2])
    assert torch.equal(begun[3], begun[4])
    assert begun[4].abs().max() > 0


def test_final_sharpness_is_part_of_the_adapter():
    plain, sharp = (
        run(tiny_model(), dataclasses.replace(SETTINGS, steps=1, sharpen=factor)) for factor in (1.0, 5.0)
    )
    for index in plain.layers:
        for name in ("centroids", "query_centroids"):
            ours, theirs = (getattr(made.layers[index], name) for made in (sharp, plain))
            torch.testing.assert_close(ours, 5 * theirs)


def test_groups_collapse_without_sinkhorn_and_hold_with_it():
    shares = {}
    for iterations in (10, 0):
        settings = dataclasses.replace(SETTINGS, steps=40, sinkhorn=iterations, queries="shared")
        record = run(tiny_model(), settings).training
        shares[iterations] = max(record["dominance"].values())
    assert shares[10] < 0.45
    assert shares[0] > shares[10] + 0.1


def test_accumulated_passes_are_the_processes_of_several_gpus(tmp_path):
    """Two processes that average gradients give the adapter of one that accumulates two passes."""
    tests = Path(__file__).parent
    script = (
        "import dataclasses, sys, test_training as t\n"
        "settings = dataclasses.replace(t.SETTINGS, steps=3, accumulate=int(sys.argv[2]))\n"
        "adapter = t.run(t.tiny_model(), settings)\n"
        "assert adapter.training['processes'] == int(sys.argv[3])\n"
        "if t.processes().is_main_process:\n"
        "    t.save_adapter(adapter, sys.argv[1])\n"
    )
    (tmp_path / "run.py").write_text(script)
    paths = [os.environ.get("PYTHONPATH"), str(tests.parent), str(tests)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, *launch, str(tmp_path / "run.py"), str(tmp_path / "two.safetensors"), "1", "2"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    one = run(tiny_model(), dataclasses.replace(SETTINGS, steps=3, accumulate=2))
    for ours, theirs in zip(
        tensors_of(one), tensors_of(load_adapter(tmp_path / "two.safetensors")), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("queries", ["own", "shared"])
def test_hard_mask_serves_the_groups_that_were_trained(queries):
    """The adapter's groups are the gate's best ones, with queries' own centroids and without."""
    model, tokens = tiny_model(), random_tokens(1, 48)
    settings = dataclasses.replace(SETTINGS, queries=queries)
    gates = trainer.new_gates(model, CONFIG, settings)
    generator = torch.Generator().manual_seed(1)
    for gate in gates.values():
        for part in gate.parameters():
            part.data += 0.05 * torch.randn(part.shape, generator=generator)
    with attach_layers(model, gates):
        logits(model, tokens)
    zeros = torch.zeros(4)
    nothing = {index: (zeros, zeros if queries == "own" else None) for index in gates}
    way = focus_way(model, CONFIG, trainer.routers_of(gates, nothing))
    # Only the first routed layer: later hidden states depend on what attention did.
    mask, gate = way.handlers[1], gates[1]
    with attach_layers(model, {1: mask}):
        logits(model, tokens)
    assert torch.equal(mask.key_groups, top_groups(gate.scores, 1))
    wanted = gate.scores if queries == "shared" else gate.query_scores
    assert torch.equal(mask.query_groups, top_groups(wanted, 1))
    assert torch.equal(mask.query_groups, mask.key_groups) == (queries == "shared")


def test_minutes_end_the_training_and_the_learning_rate_with_it(monkeypatch):
    rates, rate = [], trainer._learning_rate
    monkeypatch.setattr(trainer, "_learning_rate", lambda *given: (rates.append(rate(*given)), rates[-1])[1])
    seconds = itertools.count(step=0.03)
    monkeypatch.setattr(trainer, "time", types.SimpleNamespace(perf_counter=lambda: next(seconds)))
    settings = dataclasses.replace(SETTINGS, steps=100_000, minutes=0.02)
    adapter = run(tiny_model(), settings)
    assert adapter.training["steps"] == len(rates) == 39
    assert 1.2 <= adapter.training["seconds"] <= 1.4
    assert rates[-1] < 0.2 * rates[0]


def test_log_dir_gets_loss_rate_and_balance(monkeypatch, tmp_path):
    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def __enter__(self):
            return self

        def __exit__(self, *stop):
            written.append("closed")

        def add_scalar(self, name, value, step):
            written.append((self.folder, name, step, value))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    run(tiny_model(), log_dir=tmp_path)
    assert {entry[1] for entry in written[:-1]} == {"loss", "lr", *(f"largest_group/{i}" for i in (1, 2, 3))}
    assert written[-1] == "closed"
    assert {entry[:3] for entry in written[:-1]} >= {(str(tmp_path), "loss", step) for step in range(1, 13)}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="needs TensorBoard"):
        run(tiny_model(), log_dir=tmp_path)


# Training the weights, too


def test_first_phase_leaves_the_weights_and_the_second_moves_them():
    model = tiny_model()
    seen, whole = [], trainer.optimise

    def watched(model, *given, **more):
        seen.append(weights_sha256(model))
        return whole(model, *given, **more)

    settings = dataclasses.replace(SETTINGS, steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("focus_vllm.training.finetune.optimise", watched)
        adapter = finetune(
            model,
            random_tokens(500),
            CONFIG,
            settings,
            base_of(model),
            1e-3,
            centroid_steps=3,
            progress=False,
        )
    assert len(seen) == 2
    assert seen[0] == seen[1] != weights_sha256(model) == adapter.training["weights_sha256"]
    assert sorted(adapter.layers) == [1, 2, 3]
    assert max(adapter.training["dominance"].values()) < 0.5


def test_finetuning_lowers_the_loss():
    model, tokens = tiny_model(), random_tokens(300)
    before = evaluate(model, dense(), tokens[None]).perplexity
    settings = dataclasses.replace(SETTINGS, steps=30)
    finetune(model, tokens, CONFIG, settings, base_of(model), 3e-3, progress=False)
    assert evaluate(model, dense(), tokens[None]).perplexity < 0.9 * before


def test_weights_cannot_follow_the_dense_model():
    for changes in ({"objective": "mass"}, {"target": "dense"}):
        settings, model = dataclasses.replace(SETTINGS, **changes), tiny_model()
        with pytest.raises(ValueError, match="cannot train the weights"):
            finetune(model, random_tokens(500), CONFIG, settings, base_of(model), 1e-3, progress=False)


def test_sliding_window_layers_get_no_router():
    assert sorted(run(tiny_model("gemma2"), config=dataclasses.replace(CONFIG, dense_layers=())).layers) == [
        1,
        3,
    ]


def test_same_seed_gives_the_same_adapter_and_another_seed_another():
    first, again = run(tiny_model()), run(tiny_model())
    other = run(tiny_model(), dataclasses.replace(SETTINGS, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(first), tensors_of(again), strict=True))
    assert not torch.equal(tensors_of(first)[0], tensors_of(other)[0])


def interrupt_after(steps):
    """Make the training loop stop as if the user had pressed Ctrl-C after so many steps."""
    patch, loss, left = pytest.MonkeyPatch(), trainer._loss, [steps]

    def counted(*given):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return loss(*given)

    patch.setattr(trainer, "_loss", counted)
    return patch


def test_resumed_run_ends_in_the_same_adapter_as_an_uninterrupted_one(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a.checkpoint", every=5)
    patch = interrupt_after(7)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model(), checkpoints=checkpoints)
    patch.undo()
    resumed = run(tiny_model(), checkpoints=dataclasses.replace(checkpoints, resume=True))
    whole = run(tiny_model())
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(resumed), tensors_of(whole), strict=True))


def test_resume_with_other_settings_lists_every_difference(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a.checkpoint", every=5)
    run(tiny_model(), checkpoints=checkpoints)
    again = dataclasses.replace(checkpoints, resume=True)
    changed = dataclasses.replace(SETTINGS, lr=0.5)
    with pytest.raises(ValueError, match="cannot resume") as error:
        run(tiny_model(seed=1), changed, dataclasses.replace(CONFIG, window=3), checkpoints=again)
    for part in ("lr was 0.03 and is 0.5", "window was 2 and is 3", "weights_sha256 was"):
        assert part in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_resume_from_something_else_is_refused(tmp_path, content):
    (tmp_path / "a.checkpoint").write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        run(tiny_model(), checkpoints=Checkpoints(tmp_path / "a.checkpoint", resume=True))


def test_resume_from_a_checkpoint_of_another_version_changes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a.checkpoint")
    parameter = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter])
    checkpoints.save(3, 1.0, [parameter + 1], optimizer, {})
    with pytest.raises(ValueError, match="it holds 1 tensors, this version of focus-vllm trains 2"):
        checkpoints.load([parameter, torch.zeros(4)], optimizer, {})
    assert not parameter.any()


def test_resume_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        run(tiny_model(), checkpoints=Checkpoints(tmp_path / "a.checkpoint", resume=True))


def test_model_is_unchanged_by_training():
    model = tiny_model()
    before, state = weights_sha256(model), state_of(model)
    adapter = run(model)
    assert weights_sha256(model) == before == adapter.training["weights_sha256"]
    assert state_of(model) == state
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_changed_weights_are_noticed(monkeypatch):
    model, loss = tiny_model(), trainer._loss

    def careless(model, *given):
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
        return loss(model, *given)

    monkeypatch.setattr(trainer, "_loss", careless)
    with pytest.raises(RuntimeError, match="weights changed in training"):
        run(model)


def test_loss_that_is_not_finite_stops_the_run(monkeypatch):
    loss = trainer._loss
    monkeypatch.setattr(trainer, "_loss", lambda *given: loss(*given) * float("nan"))
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        run(tiny_model())


def test_calibration_reads_all_parts_of_the_text(monkeypatch):
    model, seen = tiny_model(), []
    gates = trainer.new_gates(model, CONFIG, SETTINGS)
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **given: (seen.append(given["input_ids"]), forward(**given))[1]
    )
    trainer.calibrate(model, torch.arange(4800) % 50, gates, SETTINGS)
    rows = torch.cat(seen)
    assert rows.shape == (10, 48)
    starts = torch.linspace(0, 4752, 10).long() % 50
    torch.testing.assert_close(rows[:, 0], starts)


def test_calibrated_potentials_balance_the_groups():
    adapter = run(tiny_model(), dataclasses.replace(SETTINGS, steps=1))
    assert max(adapter.training["balance"].values()) < 0.45
    without = {
        index: dataclasses.replace(router, potential=torch.zeros(4))
        for index, router in adapter.layers.items()
    }
    shares = []
    for routers in (adapter.layers, without):
        model = tiny_model()
        with attach(model, CONFIG, routers) as layers:
            logits(model, random_tokens(1, 480))
            shares.append(
                [
                    layer.key_groups.unique(return_counts=True)[1].max().item() / 480
                    for layer in layers.values()
                ]
            )
    assert sum(shares[0]) < sum(shares[1])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": 0}, "steps (0) must be >= 1"),
        ({"lr": 0.0}, "lr (0.0) must be > 0"),
        ({"train_window": -1}, "train_window (-1) must be >= 0"),
        ({"objective": "hard"}, "objective ('hard') must be one of ['log-gate', 'mass', 'paper']"),
        ({"sharpen": 0.5}, "sharpen (0.5) must be >= 1"),
        ({"objective": "mass", "mass_weight": 1.0}, "mass_weight (1.0) is for other objectives"),
        ({"schedule": "linear"}, "schedule ('linear') must be one of ['cosine', 'constant']"),
    ],
)
def test_training_settings_out_of_range_are_refused(changes, reason):
    with pytest.raises(ValueError, match="invalid training settings") as error:
        TrainSettings(**changes)
    assert reason in str(error.value)


def test_text_shorter_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"the text has 48 tokens, seq_len \(48\) needs one more"):
        run(tiny_model(), tokens=random_tokens(48))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [((0, 1, 2, 3), "no layer to route"), ((7,), r"dense_layers \[7\] cannot be routed")],
)
def test_dense_layers_that_make_no_sense_are_refused(layers, reason):
    with pytest.raises(ValueError, match=reason):
        run(tiny_model(), config=dataclasses.replace(CONFIG, dense_layers=layers))


# Evaluation


def focus_way(model, config, routers):
    return focus("focus", model, config, routers)


def test_evaluation_with_every_group_is_the_dense_model():
    model, sequences = tiny_model(), random_tokens(2, 200)
    everything = dataclasses.replace(CONFIG, top_k=4)
    whole = evaluate(model, dense(), sequences, lengths=[50, 200])
    routed = evaluate(
        model, focus_way(model, everything, random_routers(range(1, 4), 4)), sequences, lengths=[50, 200]
    )
    assert routed.perplexity == pytest.approx(whole.perplexity, rel=1e-4)
    assert routed.recall == pytest.approx(whole.recall, rel=1e-4)
    assert routed.perplexity_by_length == pytest.approx(whole.perplexity_by_length, rel=1e-4)
    assert (routed.far_pairs, routed.keys_per_query) == (1.0, whole.keys_per_query)
    assert routed.mass == pytest.approx(1.0)


def test_perplexity_by_length_is_that_of_shorter_texts():
    model, sequences = tiny_model(), random_tokens(2, 290)
    way = focus_way(model, CONFIG, random_routers(range(1, 4), 4))
    quality = evaluate(model, way, sequences, lengths=[140 - 64, 290])
    assert quality.perplexity_by_length[290] == pytest.approx(quality.perplexity)
    short = evaluate(model, way, sequences[:, :140])
    assert quality.perplexity_by_length[140 - 64] == pytest.approx(short.perplexity, rel=1e-4)


def with_repetition(row):
    """The text that is measured: its last 64 tokens repeat some of the first half."""
    most = len(row) // 2 - 64
    start = int(torch.randint(0, most, (1,), generator=torch.Generator().manual_seed(0)))
    return torch.cat([row[:-64], row[start : start + 64]])


def test_perplexity_and_recall_are_of_the_text_with_its_end_replaced_by_an_earlier_part():
    model, (row,) = tiny_model(), random_tokens(1, 160)
    quality = evaluate(model, dense(), row[None])
    ids = with_repetition(row)
    logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    assert quality.perplexity == pytest.approx((-logprobs[:95]).mean().exp().item(), rel=1e-4)
    assert quality.recall == pytest.approx(-logprobs[95:].mean().item(), rel=1e-4)


def test_evaluation_counts_the_pairs_of_the_mask():
    model, sequences, routers = tiny_model(), random_tokens(1, 200), random_routers(range(1, 4), 4)
    quality = evaluate(model, focus_way(model, CONFIG, routers), sequences)
    with attach(model, CONFIG, routers) as layers:
        logits(model, with_repetition(sequences[0])[None])
    masks = [focus_mask(layer.query_groups[0], layer.key_groups[0], CONFIG) for layer in layers.values()]
    nobody = torch.zeros(200, dtype=torch.int64)
    always = focus_mask(nobody, nobody, CONFIG).sum().item()
    # The first layer is dense.
    total = sum(mask.sum().item() for mask in masks) + 200 * 201 / 2
    assert quality.keys_per_query == pytest.approx(total / 4 / 200)
    assert quality.far_pairs == pytest.approx((total / 4 - always) / (200 * 201 / 2 - always))
    largest = max(layer.key_groups.unique(return_counts=True)[1].max().item() for layer in layers.values())
    assert quality.balance == largest / 200


@pytest.mark.parametrize(("key_k", "top_k"), [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize(
    ("window", "sink", "dense_below"), [(5, 0, 0), (20, 4, 0), (7, 2, 50), (3, 40, 0), (199, 4, 0)]
)
def test_pairs_are_counted_as_the_mask_has_them(key_k, top_k, window, sink, dense_below):
    config = FocusConfig(window=window, sink=sink, dense_below=dense_below, key_k=key_k, top_k=top_k)
    scores = torch.rand(2, 113, 8, generator=torch.Generator().manual_seed(0))
    keys, queries = top_groups(scores, key_k), top_groups(scores, top_k)
    kept, far, always = count_pairs(queries, keys, config)
    total = sum(int(focus_mask(q, k, config).sum()) for q, k in zip(queries, keys, strict=True))
    nobody = torch.zeros(113, dtype=torch.int64)
    near = 2 * int(focus_mask(nobody, nobody, config).sum())
    assert (kept, far, always) == (total - near, 113 * 114 - near, near)


def test_mass_is_the_share_of_dense_attention_that_the_mask_keeps(monkeypatch):
    monkeypatch.setattr("focus_vllm.training.yardsticks.SAMPLED_QUERIES", 1000)
    model, tokens = tiny_model("llama, eager"), random_tokens(1, 150)
    config = FocusConfig(num_groups=4, window=3, sink=1, dense_below=0)
    # Groups of the first layer do not depend on what attention does, so both sides route alike.
    routers = random_routers([0], 4)
    quality = evaluate(model, focus_way(model, config, routers), tokens)
    with torch.no_grad():
        weights = model(input_ids=tokens, use_cache=False, output_attentions=True).attentions[0]
    with attach(model, config, routers) as attached:
        logits(model, tokens)
        mask = focus_mask(attached[0].query_groups[0], attached[0].key_groups[0], config)
    assert quality.mass == pytest.approx((weights * mask)[0, :, 5:].sum(dim=-1).mean().item(), abs=1e-5)


def test_oracle_keeps_more_attention_than_random_groups_and_as_many_pairs():
    model, tokens = tiny_model(), random_tokens(1, 150)
    query, key, value = (torch.randn(1, 4, 150, 8) for _ in range(3))
    mask = OracleMask(CONFIG, 0.25)
    mask.observe(torch.zeros(1, 150, 32))
    kept, far, _ = mask.pairs()
    assert kept == pytest.approx(0.25 * far, abs=1)
    exact = causal_attention(query, key, value, 1.0, 0.0)
    drawn = random_groups(model, CONFIG).handlers[1]
    drawn.observe(torch.zeros(1, 150, 32))
    errors = [(part.attend(query, key, value, 1.0, 0.0) - exact).abs().mean() for part in (mask, drawn)]
    assert errors[0] < 0.7 * errors[1]
    assert evaluate(model, oracle(model, CONFIG, 1.0), tokens).perplexity == pytest.approx(
        evaluate(model, dense(), tokens).perplexity, rel=1e-4
    )


def test_random_groups_keep_the_expected_share_of_far_pairs():
    model, routed = tiny_model(), dataclasses.replace(CONFIG, dense_layers=())
    quality = evaluate(model, random_groups(model, routed), random_tokens(1, 200))
    assert quality.far_pairs == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(("window", "sink", "dense_below"), [(5, 0, 0), (20, 4, 0), (7, 2, 50), (199, 4, 0)])
def test_local_window_reads_as_many_keys_as_asked(window, sink, dense_below):
    config = FocusConfig(window=window, sink=sink, dense_below=dense_below)
    nobody = torch.zeros(200, dtype=torch.int64)
    keys = focus_mask(nobody, nobody, config).sum().item() / 200
    found = window_for(keys, config, 200)
    again = focus_mask(nobody, nobody, dataclasses.replace(config, window=found)).sum().item() / 200
    assert again == pytest.approx(keys)


def test_local_baseline_reads_no_far_pair():
    model = tiny_model()
    routed = dataclasses.replace(CONFIG, dense_layers=())
    quality = evaluate(model, local(model, routed, 20.0, 200), random_tokens(1, 200))
    assert quality.far_pairs == 0.0
    assert quality.keys_per_query == pytest.approx(20.0, abs=1.0)


def test_held_out_sequences_come_from_the_starts_of_documents(tokenizer):
    documents = ["alpha beta gamma delta " * 20, "short", "one two three four five " * 20]
    sequences = held_out_sequences(documents, tokenizer, 16, 4)
    assert sequences.shape == (4, 16)
    assert tokenizer.decode(sequences[0]).startswith("alpha beta")
    assert tokenizer.decode(sequences[2]).startswith("one two")
    with pytest.raises(ValueError, match=r"no document has seq_len \(5000\) tokens"):
        held_out_sequences(documents, tokenizer, 5000, 1)


# Probes, tuning, tokens


@pytest.mark.parametrize("task", TASKS)
def test_probes_are_as_long_as_asked_and_end_in_their_answer(task, tokenizer):
    probes = make_probes(task, tokenizer, 400, 3)
    assert make_probes(task, tokenizer, 400, 3)[2].token_ids.tolist() == probes[2].token_ids.tolist()
    assert len({tuple(probe.token_ids.tolist()) for probe in probes}) == 3
    for probe in probes:
        assert 370 <= len(probe.token_ids) <= 400
        text, answer = (
            tokenizer.decode(part)
            for part in probe.token_ids.split_with_sizes([len(probe.token_ids) - probe.answer, probe.answer])
        )
        assert text.endswith((" is", " is:", " are:"))
        assert all(word in text for word in answer.replace(",", "").split())


def test_probes_that_cannot_be_made_are_refused(tokenizer):
    with pytest.raises(ValueError, match="task 'riddle' must be one of"):
        make_probes("riddle", tokenizer, 400, 1)
    with pytest.raises(ValueError, match=r"num_tokens \(20\) is too few"):
        make_probes("passkey", tokenizer, 20, 1)


def test_probes_are_scored_by_their_answers_alone():
    model, tokens = tiny_model(), random_tokens(2, 40)
    choice = logits(model, tokens[:1, :39])[0, -1].argmax()
    right = torch.cat([tokens[0, :39], choice[None]])
    score = score_probes(model, [Probe(right, 1), Probe(tokens[1], 3)])
    expected = [prompt_logprobs(model, right)[-1:], prompt_logprobs(model, tokens[1])[-3:]]
    assert score.nll == pytest.approx(-torch.cat(expected).mean().item())
    hits = score_tokens(model, tokens[1], 3)[1].sum().item()
    assert score.accuracy == pytest.approx((1 + hits) / 4)


def tuned(keys, **given):
    model = tiny_model()
    adapter = run(model, config=dataclasses.replace(CONFIG, dense_layers=()))
    sequences = random_tokens(2, 130)
    found = tune(model, adapter, sequences, keys, **{"windows": [2, 20], "top_ks": [1, 2], **given})
    return model, sequences, found


@pytest.mark.parametrize("keys", [35.0, 50.0, 60.0])
def test_tuning_stays_within_the_keys_and_takes_the_least_loss(keys):
    model, sequences, found = tuned(keys)
    best = found.choices[0]
    assert best.measured == min(choice.measured for choice in found.choices if choice.measured is not None)
    config, layers = found.adapter.config, found.adapter.layers
    assert (config.window, config.top_k, config.dense_layers) == (best.window, best.top_k, best.dense_layers)
    assert sorted(layers) == [index for index in range(4) if index not in best.dense_layers]
    served = dataclasses.replace(config, dense_below=0)
    quality = evaluate(model, focus_way(model, served, layers), sequences)
    assert quality.keys_per_query <= keys + 1.0
    # The layers that stay dense are those whose routing costs most.
    losses = found.layer_losses[best.window, best.top_k]
    assert all(losses[dense] >= losses[routed] for dense in best.dense_layers for routed in layers)


def test_more_keys_leave_no_more_loss():
    losses = [tuned(keys)[2].choices[0].measured for keys in (35.0, 50.0, 60.0)]
    assert losses[0] >= losses[1] >= losses[2] > 0


def test_tuning_for_fewer_keys_than_any_choice_reads_is_refused():
    with pytest.raises(ValueError, match="reads 4 keys per query or fewer at 130 tokens"):
        tuned(4.0)


def test_groups_are_described_by_the_tokens_they_hold(tokenizer):
    model, sequences, routers = tiny_model(), random_tokens(2, 150), random_routers([1, 3], 4)
    groups = describe_groups(model, tokenizer, CONFIG, routers, sequences, top=3)
    assert [(group.layer, group.group) for group in groups] == [(1, g) for g in range(4)] + [
        (3, g) for g in range(4)
    ]
    keys = []
    for row in sequences:
        with attach(model, CONFIG, routers) as attached:
            logits(model, row[None])
        keys.append(attached[3].key_groups[0])
    inside = (torch.cat(keys) >> 2 & 1).bool()
    tokens = sequences.flatten()
    group = groups[6]
    assert group.share == pytest.approx(inside.float().mean().item())
    sure = {token: inside[tokens == token].float().mean().item() for token in tokens.unique().tolist()}
    assert group.purity == pytest.approx(
        sum(sure[token] for token in tokens[inside].tolist()) / inside.sum().item()
    )
    values, counts = tokens[inside].unique(return_counts=True)
    assert group.tokens[0][1] == pytest.approx((counts.max() / inside.sum()).item())
    assert group.tokens[0][0] in {tokenizer.decode([t]) for t in values[counts == counts.max()].tolist()}


def test_demo_adapter_fits_the_demo_model():
    config = transformers.AutoConfig.from_pretrained(DEMO / "model")
    adapter = load_adapter(DEMO / "focus.safetensors")
    assert adapter.base_model.mismatches(BaseModel.from_config("demo-10m", config)) == []
    assert adapter.base_model.name == "demo-10m"
    assert max(adapter.training["balance"].values()) <= 0.25
