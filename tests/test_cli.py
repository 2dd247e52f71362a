"""`focus-vllm` from the outside: what it prints, writes and refuses."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from focus_vllm.adapter import BaseModel, load_adapter
from focus_vllm.cli import main
from focus_vllm.training.train import weights_sha256

DEMO = Path(__file__).parent.parent / "focus_vllm" / "demo"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a tiny model and a text file."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "tiny-llama")
    AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(folder / "tiny-llama")
    words = ["the", "sea", "was", "calm", "and", "nobody", "remembered", "who", "built", "this", "house"]
    choose = random.Random(0)
    documents = [" ".join(choose.choices(words, k=900)) for _ in range(4)]
    (folder / "text.txt").write_text("\0".join(documents))
    return folder


OPTIONS = ("--dense-layers", "0", "--top-k", "2", "--seed", "7", "--mass-weight", "0.5")


def train_words(workplace, out, *more):
    settings = {
        "--model": workplace / "tiny-llama",
        "--data": workplace / "text.txt",
        "--out": out,
        "--steps": 4,
        "--batch-size": 2,
        "--seq-len": 64,
        "--window": 8,
        "--calibration-tokens": 256,
        "--copy-spans": 0,
        "--num-groups": 4,
    }
    return ["train", *(str(word) for pair in settings.items() for word in pair), *more]


@pytest.fixture(scope="module")
def adapter(workplace):
    out = workplace / "made" / "focus.safetensors"
    assert main(train_words(workplace, out, *OPTIONS)) == 0
    return out


def test_train_writes_an_adapter_that_says_how_it_was_made(workplace, adapter):
    made = load_adapter(adapter)
    assert (made.config.num_groups, made.config.top_k, made.config.window) == (4, 2, 8)
    assert made.config.dense_layers == (0,)
    assert list(made.layers) == [1]
    assert made.base_model.name == "tiny-llama"
    record = made.training
    assert record["mass_weight"] == 0.5
    assert (record["objective"], record["steps"], record["batch_size"], record["seed"]) == (
        "log-gate",
        4,
        2,
        7,
    )
    assert record["data"] == "text.txt"
    assert len(record["data_sha256"]) == 64
    assert set(record["versions"]) == {"focus_vllm", "torch", "transformers"}
    assert record["device"]
    assert record["command"].startswith(
        "focus-vllm train --model tiny-llama --data text.txt --out focus.safetensors"
    )
    assert str(workplace) not in json.dumps(dict(record))
    assert [path.name for path in adapter.parent.iterdir()] == ["focus.safetensors"]


def test_resume_goes_on_from_the_checkpoint(workplace, adapter, tmp_path, monkeypatch, capsys):
    import focus_vllm.training.train as trainer

    calibrate = trainer.calibrate
    monkeypatch.setattr(trainer, "calibrate", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    out = tmp_path / "focus.safetensors"
    assert main(train_words(workplace, out, *OPTIONS, "--checkpoint-every", "2")) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["focus.safetensors.checkpoint"]
    monkeypatch.setattr(trainer, "calibrate", calibrate)
    capsys.readouterr()
    assert main(train_words(workplace, out, *OPTIONS, "--resume")) == 0
    assert "100%" in capsys.readouterr().err
    assert torch.equal(load_adapter(out).layers[1].projection, load_adapter(adapter).layers[1].projection)
    assert [path.name for path in tmp_path.iterdir()] == ["focus.safetensors"]


def test_inspect_prints_what_the_adapter_is(adapter, capsys):
    assert main(["inspect", str(adapter)]) == 0
    printed = capsys.readouterr().out
    for part in (
        "tiny-llama (llama, 2 layers x 32",
        "1,288 parameters",
        "top_k",
        "balance",
        "log-gate",
        "text.txt",
    ):
        assert part in printed
    assert "about 50.0% kept" in printed


def test_inspect_as_json_is_the_whole_record(adapter, capsys):
    assert main(["inspect", str(adapter), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    made = load_adapter(adapter)
    assert facts["config"] == made.config.to_dict()
    assert facts["training"] == made.training
    assert facts["layers"] == [1]


def evaluate_words(workplace, adapter, *more):
    settings = {"--model": workplace / "tiny-llama", "--data": workplace / "text.txt", "--adapter": adapter}
    return ["evaluate", *(str(word) for pair in settings.items() for word in pair), *more]


def test_evaluate_compares_dense_focus_and_local(workplace, adapter, capsys):
    words = evaluate_words(workplace, adapter, "--seq-len", "256", "--sequences", "2", "--dense-below", "0")
    words += ["--top-k", "1", "4"]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"].split()[0] for row in rows] == ["dense", "focus", "local", "focus", "local"]
    assert 0 < rows[1]["far_pairs"] < rows[3]["far_pairs"] == 1.0
    assert rows[3]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-4)
    assert rows[2]["keys_per_query"] == pytest.approx(rows[1]["keys_per_query"], rel=0.02)
    assert main(words) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 6
    assert table[1].split()[:3] == ["dense", "100.0%", "128"]


def test_evaluate_measures_baselines_lengths_and_tasks_and_draws_them(workplace, adapter, capsys, tmp_path):
    words = evaluate_words(workplace, adapter, "--seq-len", "256", "--sequences", "2", "--dense-below", "0")
    words += [
        "--baselines",
        "random",
        "oracle",
        "--lengths",
        "64",
        "256",
        "--tasks",
        "passkey",
        "--probes",
        "2",
    ]
    assert main([*words, "--json", "--plot", str(tmp_path / "quality.png")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"].split()[0] for row in rows] == ["dense", "focus", "random", "oracle,"]
    assert rows[1]["far_pairs"] == pytest.approx(rows[3]["far_pairs"], abs=0.001)
    for row in rows:
        assert row["perplexity_by_length"]["256"] == pytest.approx(row["perplexity"])
        assert row["probes"]["passkey"]["nll"] > 0
    assert 0 < rows[1]["mass"] < 1
    assert 0.25 <= rows[1]["balance"] <= 1
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "perplexity of the first" in table
    assert "NLL (right tokens)" in table


def test_tune_writes_the_adapter_that_it_shows(workplace, adapter, capsys, tmp_path):
    out = tmp_path / "tuned.safetensors"
    words = evaluate_words(workplace, adapter, "--seq-len", "256", "--sequences", "1", "--out", str(out))
    words += ["--keys", "100", "--windows", "4", "32", "--top-k", "1", "2", "--copy-spans", "1"]
    assert main(["tune", *words[1:], "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    best = facts["choices"][0]
    assert best["keys_per_query"] <= 100
    assert facts["config"] == load_adapter(out).config.to_dict()
    assert (facts["config"]["window"], facts["config"]["top_k"]) == (best["window"], best["top_k"])
    assert main(["tune", *words[1:]]) == 0
    assert "when one layer alone is routed" in capsys.readouterr().out
    assert main(["tune", *words[1:], "--keys", "3"]) == 2
    assert "reads 3 keys per query or fewer" in capsys.readouterr().err


def test_inspect_shows_what_the_groups_hold(workplace, adapter, capsys, tmp_path):
    more = ["--model", str(workplace / "tiny-llama"), "--data", str(workplace / "text.txt")]
    words = ["inspect", str(adapter), "--tokens", *more, "--seq-len", "128", "--sequences", "2"]
    assert main([*words, "--json", "--plot", str(tmp_path / "groups.png")]) == 0
    groups = json.loads(capsys.readouterr().out)
    assert [group["group"] for group in groups] == [0, 1, 2, 3]
    assert sum(group["share"] for group in groups) == pytest.approx(1.0)
    assert (tmp_path / "groups.png").read_bytes().startswith(b"\x89PNG")
    assert main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert main(["inspect", str(adapter), "--tokens"]) == 2
    assert "--tokens needs --model and --data" in capsys.readouterr().err


def test_finetune_writes_a_model_and_its_adapter(workplace, tmp_path):
    words = train_words(workplace, tmp_path / "focus.safetensors", "--base-name", "tiny", "--from-scratch")
    words += ["--centroid-steps", "2", "--out-model", str(tmp_path / "model")]
    assert main(["finetune", *words[1:]]) == 0
    made = load_adapter(tmp_path / "focus.safetensors")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert made.training["weights_sha256"] == weights_sha256(model)
    assert made.base_model.mismatches(BaseModel.from_config("tiny", model.config)) == []
    assert AutoTokenizer.from_pretrained(tmp_path / "model").vocab_size == 16384


def test_harness_without_lm_eval_says_what_to_install(workplace, adapter, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    words = ["--model", str(workplace / "tiny-llama"), "--adapter", str(adapter), "--tasks", "piqa"]
    assert main(["harness", *words]) == 2
    assert "pip install 'focus-vllm[harness]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            ["--steps", "0", "--lr", "-1"],
            "invalid training settings: steps (0) must be >= 1; lr (-1.0) must be > 0",
        ),
        (["--top-k", "5"], "top_k (5) must be <= num_groups (4)"),
        (["--data", "nothing.txt"], "no data file at 'nothing.txt'"),
        (["--seq-len", "100000"], "seq_len (100000) needs one more"),
        (["--dense-layers", "0", "1"], "there is no layer to route"),
        (
            ["--copy-spans", "1"],
            "copied spans at a distance of 8 tokens need sequences of at least 136 tokens",
        ),
        (["--resume"], "no checkpoint at"),
        (["--model", "nothing/here"], "nothing/here"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_to_train_is_one_line_and_code_2(workplace, tmp_path, capsys, changes, reason):
    assert main(train_words(workplace, tmp_path / "focus.safetensors", *changes)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("focus-vllm train: ")
    assert reason in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"not an adapter at all"])
def test_inspect_of_something_else_is_one_line_and_code_2(tmp_path, capsys, content):
    path = tmp_path / "focus.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert main(["inspect", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert str(path) in printed.err


def test_evaluate_refuses_an_adapter_for_another_model(workplace, capsys):
    assert main(evaluate_words(workplace, DEMO / "focus.safetensors")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "it was trained for hidden_size 256 (demo-10m), the model has 32 (tiny-llama)" in error


def test_help_and_bad_settings_need_neither_torch_nor_transformers():
    script = (
        "import sys\n"
        "from focus_vllm.cli import main\n"
        "for words in (['--help'], ['train', '--help']):\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "assert main('train --model a --data b --out c --steps 0'.split()) == 2\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "train an adapter" in result.stdout
