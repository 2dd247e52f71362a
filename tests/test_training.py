"""Training, from text to an adapter, on models so small that seconds are enough."""

import dataclasses
import lzma
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer

import focus_vllm.training.hf as hf
import focus_vllm.training.train as trainer
from focus_vllm.adapter import BaseModel, load_adapter, save_adapter
from focus_vllm.config import FocusConfig
from focus_vllm.reference import focus_attention, focus_mask
from focus_vllm.routing import Router, route
from focus_vllm.training.checkpoint import Checkpoints
from focus_vllm.training.data import copy_spans, read_documents, sample_batch, shuffled_tokens
from focus_vllm.training.evaluate import (
    evaluate_dense,
    evaluate_focus,
    evaluate_local,
    held_out_sequences,
    window_for,
)
from focus_vllm.training.hf import attach, prompt_logprobs, routable_layers
from focus_vllm.training.loggate import LogGate
from focus_vllm.training.settings import TrainSettings
from focus_vllm.training.train import train, weights_sha256

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
    bias = gate._bias()[0]
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


# Training


SETTINGS = TrainSettings(steps=12, batch_size=2, seq_len=48, lr=0.03, calibration_tokens=480)
CONFIG = FocusConfig(num_groups=4, group_dim=8, window=2, sink=1, dense_below=8, dense_layers=(0,))


def base_of(model):
    return BaseModel.from_config("tiny", model.config)


def run(model, settings=SETTINGS, config=CONFIG, tokens=None, checkpoints=None, **given):
    tokens = random_tokens(2000) if tokens is None else tokens
    return train(
        model, tokens, config, settings, base_of(model), checkpoints=checkpoints, progress=False, **given
    )


def tensors_of(adapter):
    fields = [field.name for field in dataclasses.fields(Router)]
    return [getattr(router, name) for _, router in sorted(adapter.layers.items()) for name in fields]


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

    def careless(model, batch):
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
        return loss(model, batch)

    monkeypatch.setattr(trainer, "_loss", careless)
    with pytest.raises(RuntimeError, match="weights changed in training"):
        run(model)


def test_loss_that_is_not_finite_stops_the_run(monkeypatch):
    loss = trainer._loss
    monkeypatch.setattr(trainer, "_loss", lambda *given: loss(*given) * float("nan"))
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        run(tiny_model())


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
        ({"objective": "mass"}, "objective ('mass') must be one of ['log-gate']"),
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


def test_evaluation_with_every_group_is_the_dense_model():
    model, sequences = tiny_model(), random_tokens(2, 200)
    dense = evaluate_dense(model, sequences)
    focus = evaluate_focus(
        "all", model, dataclasses.replace(CONFIG, top_k=4), random_routers(range(1, 4), 4), sequences
    )
    assert focus.perplexity == pytest.approx(dense.perplexity, rel=1e-4)
    assert focus.recall == pytest.approx(dense.recall, rel=1e-4)
    assert (focus.far_pairs, focus.keys_per_query) == (1.0, dense.keys_per_query)


def test_evaluation_counts_the_pairs_of_the_mask(monkeypatch):
    monkeypatch.setattr("focus_vllm.training.evaluate.QUERY_CHUNK", 32)
    model, sequences, routers = tiny_model(), random_tokens(1, 200), random_routers(range(1, 4), 4)
    quality = evaluate_focus("focus", model, CONFIG, routers, sequences)
    with attach(model, CONFIG, routers) as layers:
        logits(model, sequences)
    masks = [focus_mask(layer.query_groups[0], layer.key_groups[0], CONFIG) for layer in layers.values()]
    nobody = torch.zeros(200, dtype=torch.int64)
    always = focus_mask(nobody, nobody, CONFIG).sum().item()
    total = sum(mask.sum().item() for mask in masks)
    assert quality.keys_per_query == pytest.approx(total / 3 / 200)
    assert quality.far_pairs == pytest.approx((total / 3 - always) / (200 * 201 / 2 - always))


@pytest.mark.parametrize(("window", "sink", "dense_below"), [(5, 0, 0), (20, 4, 0), (7, 2, 50), (199, 4, 0)])
def test_local_window_reads_as_many_keys_as_asked(window, sink, dense_below):
    config = FocusConfig(window=window, sink=sink, dense_below=dense_below)
    nobody = torch.zeros(200, dtype=torch.int64)
    keys = focus_mask(nobody, nobody, config).sum().item() / 200
    found = window_for(keys, config, 200)
    again = focus_mask(nobody, nobody, dataclasses.replace(config, window=found)).sum().item() / 200
    assert again == pytest.approx(keys)


def test_local_baseline_reads_no_far_pair():
    quality = evaluate_local(tiny_model(), CONFIG, 20.0, random_tokens(1, 200))
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


def test_demo_adapter_fits_the_demo_model():
    config = transformers.AutoConfig.from_pretrained(DEMO / "model")
    adapter = load_adapter(DEMO / "focus.safetensors")
    assert adapter.base_model.mismatches(BaseModel.from_config("demo-10m", config)) == []
    assert adapter.base_model.name == "demo-10m"
    assert max(adapter.training["balance"].values()) <= 0.25
