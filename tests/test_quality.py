"""The quality experiments end to end, on a model and text so small that seconds are enough."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from focus_vllm.adapter import load_adapter
from loadtest import quality, quality_report

DEMO = Path(__file__).parent.parent / "focus_vllm" / "demo"
SIZES = {"LONG": 512, "WHOLE": 384, "SHORT": 256, "TRAIN_TOKENS": 6000, "BOOK_TOKENS": 2000, "PROBES": 1}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a tiny model, text of every kind, and the pack made of them."""
    folder = tmp_path_factory.mktemp("quality")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=16384, **sizes)).save_pretrained(folder / "tiny")
    AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(folder / "tiny")
    choose = random.Random(0)

    words = ["the", "sea", "was", "calm", "and", "nobody", "saw", "who", "built", "this", "house"]

    def prose(count):
        return " ".join(choose.choices(words, k=count))

    articles = [f"Calm {n}\n\nCalm {n} is a sea. {prose(900)}" for n in range(10)]
    peps = [f"PEP: {n}\nTitle: {prose(600)}" for n in range(10)]
    books = [f"BOOK {n}\n\n{prose(2000)}" for n in range(3)]
    (folder / "train.txt").write_text("\0".join([*articles, *peps, *books]))
    (folder / "books.txt").write_text("\0".join(f"OTHER {n}\n\n{prose(5000)}" for n in range(4)))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SIZES.items():
            patch.setattr(quality, name, value)
        counts = quality.pack(
            str(folder / "tiny"), folder / "train.txt", folder / "books.txt", folder / "pack.safetensors"
        )
    assert counts["books"] == 16 * 512
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {**SIZES, "LOCAL_WINDOWS": (32, 64)}.items():
        monkeypatch.setattr(quality, name, value)
    # Processes of their own would not see the sizes above.
    monkeypatch.setattr(quality, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))


def run(workplace, units, out, minutes=10.0):
    quality.run(
        units, str(workplace / "tiny"), workplace / "pack.safetensors", out, 1, minutes, 1, out.parent
    )
    return quality_report.read_results(out) if out.exists() else []


def test_held_out_text_is_not_trained_on(workplace):
    text = quality._load_pack(workplace / "pack.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(workplace / "tiny")
    assert [tokenizer.decode(text[name][0][:3])[:4] for name in ("books", "wikipedia", "code")] == [
        "OTHE",
        "Calm",
        "PEP:",
    ]
    trained = tokenizer.decode(text["train"])
    held_out = [tokenizer.decode(row) for row in text["wikipedia"]]
    assert all(row[:200] not in trained for row in held_out)


def test_smoke_plan_gives_results_that_can_be_reported(workplace, tmp_path, capsys):
    units = quality.units_of("smoke", 2)
    assert len({unit["id"] for unit in units}) == len(units) == 9
    local = {"kind": "local", "name": "local windows", "id": "local windows", "seed": 0}
    results = run(workplace, [*units, local], tmp_path / "results.jsonl")
    assert {unit["id"] for unit in results} == {unit["id"] for unit in [*units, local]}, (
        capsys.readouterr().err
    )
    adapter = next(unit for unit in results if unit["kind"] == "adapter")
    assert [row["serve"]["top_k"] for row in adapter["rows"]] == [1, 2]
    assert adapter["rows"][0]["books"]["far_pairs"] < adapter["rows"][1]["books"]["far_pairs"]
    kept = load_adapter(tmp_path / "smoke-seed-0.safetensors")
    assert (kept.config.num_groups, kept.training["seed"]) == (4, 0)
    text = quality_report.report(results, tmp_path / "plots")
    assert "| smoke, top_k=1, window=64 | 2 |" in text
    (local,) = (line for line in text.splitlines() if line.startswith("| local window 32 + 4 sinks | 1 |"))
    assert local.count("| 0.0% |") == 2, "far pairs of books and of Wikipedia"
    assert "| finetune dense |" in text
    assert "| tuned to 128 | 2 |" in text
    assert "passkey" in text
    assert (tmp_path / "plots" / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_run_goes_on_where_it_stopped(workplace, tmp_path, capsys):
    units = quality.units_of("smoke", 1)[:1]
    out = tmp_path / "results.jsonl"
    assert run(workplace, units, out, minutes=-1.0) == []
    assert "not started, time is over" in capsys.readouterr().err
    first = run(workplace, units, out)
    assert run(workplace, units, out) == first
    failing = [{"kind": "riddle", "name": "riddle", "id": "riddle", "seed": 0}]
    assert run(workplace, failing, out) == first
    assert "riddle: KeyError" in capsys.readouterr().err


@pytest.mark.parametrize("plan", quality.PLANS)
def test_every_plan_asks_for_valid_settings(plan):
    for unit in quality.units_of(plan, 3):
        assert unit["kind"] in quality.KINDS
        json.dumps(unit)
        if "settings" in unit:
            quality.TrainSettings(**unit["settings"])
        for serve in unit.get("serve", [{}]):
            quality.FocusConfig(**{**unit.get("config", {}), **serve})
