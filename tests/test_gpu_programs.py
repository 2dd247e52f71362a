"""The GPU's measurement programs, as far as they go without one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loadtest import engine, kernels
from loadtest.advise import Measured
from loadtest.engine import Case, compare, table

ROW = {"ttft": 4.0, "tpot": 0.02}


@pytest.mark.parametrize(
    "text",
    [
        "1x4096",
        "32x32768+256",
        "1x32768+64@host",
        "1x32768~512",
        "1x32768~512@host",
        "8x131072@decode",
        "1x262144@prefill",
    ],
)
def test_a_case_is_read_as_it_is_written(text):
    assert str(Case.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["4096", "1x", "1x2@both", "1x2+", "1x2~", "1x2~3@decode", "1x2+3@decode", "x"]
)
def test_another_case_is_refused(text):
    with pytest.raises(ValueError, match="expected 1x4096"):
        Case.parse(text)


def test_ratios_are_given_where_both_sides_were_measured():
    stock = {
        "checked": [[1, 2]],
        "rows": {"1x4096": ROW, "4x100+8": {"seconds": 3.0}, "1x9@decode": {"kernels": []}},
    }
    focus = {"checked": [[1, 2]], "rows": {"1x4096": {"ttft": 2.0, "tpot": 0.04}, "1x8": ROW}}
    rows = {row["case"]: row for row in compare({"stock": stock, "focus": focus})}
    assert list(rows) == ["1x4096", "4x100+8", "1x8"]
    assert rows["1x4096"]["ttft_ratio"] == 2.0
    assert rows["1x4096"]["tpot_ratio"] == 0.5
    assert "seconds_ratio" not in rows["4x100+8"]
    lines = table(list(rows.values())).splitlines()
    assert lines[1].split() == ["1x4096", "4.000", "2.000", "2.00x", "20.000", "40.000", "0.50x"]
    assert lines[2].split() == ["4x100+8", "3.000"]


def test_one_side_alone_is_reported_without_ratios():
    (row,) = compare({"focus": {"rows": {"1x8": ROW}}})
    assert row == {"case": "1x8", "batch": 1, "prompt": 8, "focus_ttft": 4.0, "focus_tpot": 0.02}


def test_estimates_are_made_from_what_was_measured_on_both_sides(tmp_path):
    stock = {"rows": {"1x4096": ROW, "1x8192": ROW, "1x100+8": {"seconds": 1.0}, "2x4096": ROW}}
    focus = {"rows": {"1x4096": {"ttft": 2.0, "tpot": 0.01}, "1x100+8": {"seconds": 1.0}, "2x4096": ROW}}
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({"rows": compare({"stock": stock, "focus": focus})}))
    measured = Measured.read(path)
    assert measured.lengths == (4096,)
    assert measured.prefill == ((4.0, 2.0),)


def test_nothing_is_reported_if_a_short_prompt_goes_on_differently():
    with pytest.raises(RuntimeError, match="nothing is reported"):
        compare({"stock": {"checked": [[1]]}, "focus": {"checked": [[2]]}})


def test_kernels_are_measured_once_and_kept(tmp_path, monkeypatch, capsys):
    output = tmp_path / "kernels.json"
    command = ["kernels", "--smoke", "--only", "decode", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    kernels.main()
    written = json.loads(output.read_text())
    assert [row["phase"] for row in written["rows"]] == ["decode", "decode+qkv", "decode+own"]
    assert all(0 < row["keys_read"] < 1 for row in written["rows"])
    assert "FAILED" not in capsys.readouterr().out
    monkeypatch.setattr(kernels, "measure", None)
    kernels.main()
    assert json.loads(output.read_text())["rows"] == written["rows"]
    monkeypatch.setattr(sys, "argv", ["kernels", "--head-size", "256", "--output", str(output)])
    with pytest.raises(SystemExit):
        kernels.main()
    message = capsys.readouterr().err
    assert "'head_size': 64" in message
    assert "head_size=256" in message


def test_a_wrong_result_is_not_reported(monkeypatch):
    monkeypatch.setattr(kernels.Layer, "errors", lambda self: (1e-3, 2e-3))
    with pytest.raises(RuntimeError, match="nothing is reported"):
        kernels.measure(kernels.smoke_cases()[-1], kernels.Shape(4, 2, 64), 1)


class FakeEngine:
    """vLLM's offline engine without a model: token n of a prompt's continuation is n."""

    accepts = 0.0
    """Share of a continuation's tokens, but for the first, that were drafts."""

    def __init__(self) -> None:
        self.accepted = 0
        cache = SimpleNamespace(num_gpu_blocks=10, block_size=16)
        scheduler = SimpleNamespace(max_num_batched_tokens=64)
        config = SimpleNamespace(cache_config=cache, scheduler_config=scheduler)
        self.llm_engine = SimpleNamespace(vllm_config=config)
        self.prompts: list[int] = []

    def generate(self, inputs: list[Any], params: Any, use_tqdm: bool) -> list[Any]:
        self.prompts += [len(prompt["prompt_token_ids"]) for prompt in inputs]
        self.accepted += int(self.accepts * len(inputs) * (params.max_tokens - 1))
        completion = SimpleNamespace(token_ids=list(range(params.max_tokens)))
        # A request's tokens take 10 ms each, but for the first; a later request's begin later.
        return [
            SimpleNamespace(
                outputs=[completion],
                metrics=SimpleNamespace(
                    first_token_ts=late, last_token_ts=late + 0.01 * (params.max_tokens - 1)
                ),
            )
            for late in range(len(inputs))
        ]

    def collective_rpc(self, method: str) -> list[str]:
        return [method]

    def reset_prefix_cache(self) -> None:
        self.prompts.append(0)

    def get_metrics(self) -> list[Any]:
        return [SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens", value=self.accepted)]


@pytest.fixture
def fake_engines(monkeypatch) -> list[FakeEngine]:
    started = []

    def start(self: engine.Measured, side: engine.Side) -> None:
        self.side, self.llm = side, FakeEngine()
        started.append(self.llm)

    def in_this_process(side: engine.Side, directory: Path) -> None:
        engine.serve(engine.Side(**json.loads(json.dumps(dataclasses.asdict(side)))))

    monkeypatch.setattr(engine.Measured, "__init__", start)
    monkeypatch.setattr(engine, "_in_its_own_process", in_this_process)
    return started


def test_each_side_is_started_once_and_every_case_is_written(tmp_path, monkeypatch, fake_engines, capsys):
    output = tmp_path / "engine.json"
    command = ["engine", "--shape", "tiny", "--output", str(output), "--cases", "1x300", "2x100+8"]
    monkeypatch.setattr(sys, "argv", command)
    engine.main()
    assert len(fake_engines) == 2
    assert fake_engines[0].prompts == [190, 364, 0, 300, 300, 0, 100, 100]
    written = json.loads(output.read_text())
    assert [row["case"] for row in written["rows"]] == ["1x300", "2x100+8"]
    assert {"ttft_ratio", "tpot_ratio"} <= set(written["rows"][0])
    assert written["rows"][0]["focus_tpot"] == pytest.approx(0.01)
    assert "tokens_per_step" not in written["sides"]["focus"]["rows"]["1x300"]
    assert written["rows"][1]["seconds_ratio"] > 0
    assert written["sides"]["focus"]["kv_tokens"] == 160
    assert "2x100+8" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", [*command, "3x50"])
    engine.main()
    assert fake_engines[2].prompts == [364, 0, 50, 50, 50, 50, 50, 50]
    rows = json.loads(output.read_text())["rows"]
    assert [row["case"] for row in rows] == ["1x300", "2x100+8", "3x50"]
    assert rows[2]["stock_tpot"] == pytest.approx(0.01)


def test_the_next_turn_is_timed_behind_its_cached_prompt(tmp_path, monkeypatch, fake_engines):
    output = tmp_path / "engine.json"
    command = ["engine", "--shape", "tiny", "--output", str(output), "--cases", "2x300~40"]
    monkeypatch.setattr(sys, "argv", command)
    engine.main()
    assert fake_engines[0].prompts[2:] == [0, 300, 300, *[340] * 2 * engine.TURNS]
    assert json.loads(output.read_text())["rows"][0]["ttft_ratio"] > 0


def test_tokens_of_a_step_are_counted_where_there_are_drafts(tmp_path, monkeypatch, fake_engines):
    monkeypatch.setattr(FakeEngine, "accepts", 0.75)
    output = tmp_path / "engine.json"
    monkeypatch.setattr(
        sys, "argv", ["engine", "--shape", "tiny", "--output", str(output), "--cases", "2x300"]
    )
    engine.main()
    assert json.loads(output.read_text())["sides"]["focus"]["rows"]["2x300"]["tokens_per_step"] == 4


def test_what_python_does_is_counted_by_prompt(tmp_path, monkeypatch, fake_engines):
    output = tmp_path / "engine.json"
    command = ["engine", "--shape", "tiny", "--side", "focus", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*command, "--cases", "1x30@host"])
    engine.main()
    prompts = [30] * engine.HOST_PROMPTS
    assert fake_engines[0].prompts[2:] == [0, *prompts, 0, *prompts], "none is in the prefix cache"
    row = json.loads(output.read_text())["sides"]["focus"]["rows"]["1x30@host"]
    fake = re.compile(r"test_gpu_programs\.py:\d+ generate")
    (generate,) = [line for line in row["kernels"] if fake.fullmatch(line["kernel"])]
    assert generate["launches"] == 1
    assert len(row["collections"]) == 3
    assert "MainThread" in row["threads"]


def test_what_python_does_is_counted_by_output_token(tmp_path, monkeypatch, fake_engines):
    output = tmp_path / "engine.json"
    command = ["engine", "--shape", "tiny", "--output", str(output), "--cases", "1x30+8@host"]
    monkeypatch.setattr(sys, "argv", command)
    engine.main()
    again = [30] * engine.HOST_PROMPTS
    assert fake_engines[0].prompts[2:] == [0, 30, *3 * again], "the prompt stays cached"
    written = json.loads(output.read_text())
    assert written["rows"][0]["tpot_ratio"] == pytest.approx(1)
    row = written["sides"]["focus"]["rows"]["1x30+8@host"]
    assert row["tpot"] == pytest.approx(0.01)
    calls = {line["kernel"].split(" ", 1)[1]: line["launches"] for line in row["kernels"]}
    assert calls["generate"] == 0, "what a request takes is not a step's"


def test_the_next_turn_is_profiled_behind_its_cached_prompt(tmp_path, monkeypatch, fake_engines):
    output = tmp_path / "engine.json"
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext("recording"))
    row = {"kernel": "near", "launches": 1.0, "us": 2.0}
    tables = {("recording", 1): [row]}
    monkeypatch.setattr(kernels, "kernel_table", lambda *args: tables[args])
    command = ["engine", "--shape", "tiny", "--side", "focus", "--output", str(output), "--cases"]
    monkeypatch.setattr(sys, "argv", [*command, "1x30~9@host", "2x30~9@prefill"])
    engine.main()
    turns = [0, 30, *[39] * engine.HOST_PROMPTS]
    assert fake_engines[0].prompts[2:] == [*turns, *turns, 0, 30, 30, 39, 39]
    rows = json.loads(output.read_text())["sides"]["focus"]["rows"]
    assert rows["1x30~9@host"]["ttft"] > 0
    assert rows["2x30~9@prefill"] == {"kernels": [row]}


def test_no_case_is_started_when_the_time_is_over(tmp_path, monkeypatch, capsys, fake_engines):
    output = tmp_path / "engine.json"
    monkeypatch.setattr(sys, "argv", ["engine", "--shape", "tiny", "--output", str(output), "--limit", "0"])
    engine.main()
    assert json.loads(output.read_text())["rows"] == []
    assert "is not measured: time is over, 0 s of it for the start; raise --limit" in capsys.readouterr().err
