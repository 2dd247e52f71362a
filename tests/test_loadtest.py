"""Load tests: which cells they run, what they make of figures, what they advise."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from loadtest import scenarios
from loadtest.__main__ import RESULTS, length, main
from loadtest.advise import Measured, classify, read_trace
from loadtest.bench import PHASES, Cell, Request, Result, Target, _run_all
from loadtest.capacity import SIDES, fit, scale
from loadtest.charts import bars, lines, short
from loadtest.parallel import NEW_TOKENS, Answer, differences, unlike
from loadtest.recording import doubts
from loadtest.report import concurrency_chart, render
from loadtest.scenarios import Clock, Plan, conversation, run_plan
from server.models import DEMO_FOLDER

PLAN = Plan(
    lengths=[1000, 50_000],
    concurrencies=[1, 4],
    rates=[],
    turns=0,
    beside=0,
    requests=20,
    tokens=200_000,
    output_tokens=8,
    seed=7,
)


def row(side: str, prompt: int, ttft: float, **changes: Any) -> dict[str, Any]:
    """Return a line of cells.jsonl."""
    return {
        "side": side, "scenario": "grid", "length": prompt, "concurrency": 1, "rate": None, "seed": 1,
        "output_tokens": 11,
        "requests": 4, "completed": 4, "failed": 0, "prompt_tokens": prompt, "duration": 4 * ttft,
        "requests_per_second": 1 / ttft, "goodput": 0.5, "meets_objective": side == "focus",
        "ttft_p50": ttft, "ttft_p95": ttft * 1.1, "ttft_p99": ttft * 1.2, "tpot_p50": 0.01, "tpot_p95": 0.02,
        "server_prefix_hits": 0.0, "server_preemptions": 0.0, "server_kv_peak": 0.1,
        "server_keys_read_prefill": 0.4, "server_keys_read_decode": 0.3,
        "server_queue": 0.01, "server_prefill": ttft, "server_decode": 0.1, **changes,
    }  # fmt: skip


def test_a_length_is_written_as_people_write_it() -> None:
    assert [length(text) for text in ("700", "8k", "0.5m")] == [700, 8192, 524288]


def test_cells_of_a_plan_share_no_prompt_and_no_salt_and_are_the_same_for_both_sides() -> None:
    cells = PLAN.grid(kv_tokens=None)
    assert cells == PLAN.grid(kv_tokens=None)
    assert len({cell.seed for cell in cells}) == len({cell.salt for cell in cells}) == len(cells) == 4


def test_the_turns_of_a_conversation_share_their_history() -> None:
    first, second, _ = turns = conversation(dataclasses.replace(PLAN, turns=3))
    assert len({cell.salt for cell in turns}) == len({cell.seed for cell in turns}) == 1
    assert first.history < first.length < second.history < second.length


def test_long_prompts_are_sent_fewer_times_but_fill_every_place() -> None:
    assert [cell.requests for cell in PLAN.grid(None)] == [20, 4, 20, 4]


def test_prompts_that_do_not_fit_in_the_cache_together_are_left_out() -> None:
    cells = [(cell.length, cell.concurrency) for cell in PLAN.grid(kv_tokens=60_000)]
    assert cells == [(1000, 1), (50_000, 1), (1000, 4)]


def test_measured_times_are_exact_where_measured_and_interpolated_between() -> None:
    measured = Measured("x", (1000, 4000), ((1.0, 1.0), (16.0, 4.0)), ((0.01, 0.01), (0.02, 0.01)))
    assert measured.seconds("prefill", 4000) == (16.0, 4.0)
    assert measured.seconds("prefill", 2000) == pytest.approx((4.0, 2.0))
    assert measured.seconds("prefill", 500) == (0.5, 0.5)
    assert measured.seconds("prefill", 8000) == (64.0, 16.0)
    assert measured.seconds("decode", 8000) == (0.02, 0.01)


@pytest.mark.parametrize("name", ["engine-h200.json", "cpu.json", "http-h200.jsonl"])
def test_published_measurements_can_be_used(name: str) -> None:
    measured = Measured.read(RESULTS / name)
    assert len(measured.lengths) >= 4
    assert all(dense > 0 and focus > 0 for dense, focus in (*measured.prefill, *measured.decode))


def test_advice_adds_up_what_requests_cost(tmp_path: Path) -> None:
    cells = tmp_path / "cells.jsonl"
    rows = [
        row(side, prompt, ttft)
        for side, prompt, ttft in (
            ("dense", 1000, 1.0), ("focus", 1000, 2.0), ("dense", 100_000, 100.0), ("focus", 100_000, 25.0),
        )
    ]  # fmt: skip
    # Sent beside nothing, but with one token to time; faster by chance, for Focus read every key; turns.
    rows += [row(side, 500, 0.5, scenario="alone", concurrency=None, output_tokens=2) for side in SIDES]
    rows += [
        row(side, 800, ttft, server_keys_read_prefill=1.0) for side, ttft in (("dense", 0.9), ("focus", 0.6))
    ]
    rows += [row(side, prompt, 0.1, scenario="turns") for side in SIDES for prompt in (1000, 2000)]
    cells.write_text("".join(json.dumps(line) + "\n" for line in rows))
    log = [
        "INFO starting",
        json.dumps({"path": "/v1/completions", "prompt_tokens": 1000, "tokens": 1}),
        json.dumps({"path": "/v1/completions", "prompt_tokens": 100_000, "tokens": 101}),
        json.dumps({"path": "/v1/models"}),
    ]
    measured = Measured.read(cells)
    assert measured.lengths == (500, 800, 1000, 100_000)
    assert measured.prefill[1:3] == ((0.9, 0.9), (1.0, 2.0))
    assert measured.decode[0] == measured.decode[1]
    short, long = classify(read_trace(log), measured)
    assert (short.name, short.requests, short.total) == ("0-1k", 1, (1.0, 2.0))
    assert (long.name, long.requests) == ("32k-128k", 1)
    assert long.prefill == (100.0, 25.0)
    assert long.decode == pytest.approx((1.0, 1.0))


def test_advice_says_where_focus_does_not_pay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "access.jsonl"
    trace.write_text('{"prompt_tokens": 3000, "tokens": 100}\n')
    assert main(["advise", "--trace", str(trace)]) == 0
    said = capsys.readouterr().out
    assert "Do not use Focus for this traffic" in said
    trace.write_text('{"prompt_tokens": 250000, "tokens": 100}\n')
    assert main(["advise", "--trace", str(trace)]) == 0
    assert "Do not use" not in capsys.readouterr().out


def test_the_capacity_model_gives_the_times_that_it_was_fitted_to() -> None:
    measured = Measured.read(RESULTS / "engine-h200.json")
    for side, fitted in fit(measured).items():
        for prompt, times in zip(measured.lengths, measured.prefill, strict=True):
            assert fitted.seconds(prompt) == pytest.approx(times[SIDES.index(side)], rel=0.1)


def test_the_capacity_model_foretells_a_length_it_has_not_seen() -> None:
    """Fitted without the longest prompt, it gives that within 10 %."""
    measured = Measured.read(RESULTS / "engine-h200.json")
    known = Measured("x", measured.lengths[:-1], measured.prefill[:-1], measured.decode[:-1])
    for side, fitted in fit(known).items():
        assert fitted.seconds(measured.lengths[-1]) == pytest.approx(
            measured.prefill[-1][SIDES.index(side)], rel=0.1
        )


def test_a_model_spread_over_as_many_gpus_as_it_has_more_work_keeps_its_times() -> None:
    fitted = fit(Measured.read(RESULTS / "engine-h200.json"))
    assert scale(fitted, "8b", 1)["focus"].seconds(100_000) == pytest.approx(fitted["focus"].seconds(100_000))
    assert scale(fitted, "8b", 2)["focus"].seconds(100_000) == pytest.approx(
        fitted["focus"].seconds(100_000) / 2
    )
    # 80 layers of 64 heads for 32 of 32.
    assert scale(fitted, "70b", 5)["dense"].quadratic == pytest.approx(fitted["dense"].quadratic)


def test_a_trace_without_prompt_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "access.log"
    trace.write_text("GET /v1/models 200\n")
    assert main(["advise", "--trace", str(trace)]) == 2
    assert "--log-format json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.012345, "0.0123"),
        (7.0, "7"),
        (999.7, "1000"),
        (2500, "2500"),
        (12345, "12300"),
        (5e7, "50M"),
        (-3e9, "-3G"),
    ],
)
def test_numbers_are_short_and_not_in_powers_of_ten(number: float, text: str) -> None:
    assert short(number) == text


def test_a_chart_puts_larger_values_higher_and_further_right() -> None:
    chart = lines("T", {"dense p50": [(1024, 1.0), (4096, 4.0)]}, "x", "y", log_x=True, log_y=True)
    figure = ElementTree.fromstring(chart)
    (points,) = (line.get("points") for line in figure.iter("polyline"))
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in str(points).split())
    assert x1 < x2
    assert y1 > y2


def test_bars_are_as_high_as_their_values() -> None:
    figure = ElementTree.fromstring(bars("T", {"a": {"x": 1.0, "y": 3.0}}, "s"))
    first, second = (float(str(bar.get("height"))) for bar in figure.iter("rect"))
    assert second == pytest.approx(3 * first, rel=0.01)


def test_bars_that_have_no_room_for_their_names_share_them() -> None:
    names = [f"{length}K {side}" for length in range(10) for side in ("dense", "focus")]
    words = [[str(text.text) for text in ElementTree.fromstring(bars("T", groups, "s")).iter("text")]
             for groups in ({name: {"x": 1.0} for name in some} for some in (names, names[:2]))]  # fmt: skip
    assert [word for word in words[0] if word.endswith("K")] == [f"{length}K" for length in range(10)]
    assert words[0].count("d") == words[0].count("f") == 10
    assert [word for word in words[1] if word.endswith("K")] == ["0K", "0K"]
    assert "dense" in words[1]


def test_the_time_per_token_is_the_engines_though_a_client_got_the_first_one_late() -> None:
    late = {"ttft_p50": 30.3, "tpot_p50": 0.0001}
    page = render(
        [row("dense", 524288, 134.0), row("focus", 524288, 30.0, server_decode=0.05, **late)],
        {"title": "T", "problems": []},
    )
    assert re.findall(r">([\d.]+) &#9680;", page)[:2] == ["4.42", "2.00"]
    assert re.findall(r"<title>time per output token: ([\d.]+)<", page) == ["2"]


def test_the_report_shows_the_numbers_and_needs_nothing_from_elsewhere() -> None:
    rows = [
        row("dense", 8192, 0.8),
        row("focus", 8192, 0.4),
        row("dense", 65536, 9.0),
        row("focus", 65536, 3.0),
    ]
    page = render(rows, {"title": "Test <1>", "problems": ["cell x was warm"], "date": "2026-11-24"})
    assert "Test &lt;1&gt;" in page
    assert "cell x was warm" in page
    assert re.findall(r">(\d\.\d\d) &#9680;", page)[:2] == ["2.00", "3.00"]
    for shown in ("0.8", "0.4", "9", "3"):
        assert f"<td>{shown}</td>" in page
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)


def test_the_report_shows_how_many_requests_at_a_time_were_good_enough() -> None:
    rows = [
        row(side, prompt, 1.0, concurrency=number, meets_objective=number <= good)
        for side, prompt, good in (
            ("dense", 8192, 2),
            ("dense", 65536, 0),
            ("focus", 8192, 4),
            ("focus", 65536, 1),
        )
        for number in (1, 2, 4)
    ]
    servers = {side: {"kv_tokens": 131072} for side in ("dense", "focus")}
    page = concurrency_chart(rows, {"servers": servers})
    assert re.findall(r"<title>(dense within objective: \d)<", page) == ["dense within objective: 2"]
    assert re.findall(r"<title>focus within objective: (\d)<", page) == ["4", "1"]
    assert re.findall(r"<title>focus cache holds: (\d+)<", page) == ["16", "2"]


def test_the_report_shows_what_evaluation_measured_and_says_so_if_nothing_did(tmp_path: Path) -> None:
    lengths = {"1024": 20.0, "4096": 16.0}
    dense = {
        "name": "dense",
        "perplexity": 16.0,
        "recall": 0.5,
        "far_pairs": 1.0,
        "perplexity_by_length": lengths,
    }
    focus = {**dense, "name": "focus K=8", "perplexity": 16.8, "recall": 0.6, "far_pairs": 0.27}
    evaluated = tmp_path / "quality.json"
    evaluated.write_text(json.dumps([dense, {**focus, "perplexity_by_length": {"1024": 20.0, "4096": 16.8}}]))
    (tmp_path / "cells.jsonl").write_text(json.dumps(row("dense", 8192, 0.8)) + "\n")
    (tmp_path / "manifest.json").write_text(json.dumps({"title": "T", "problems": []}))
    assert main(["report", str(tmp_path)]) == 0
    assert "not known here" in (tmp_path / "report.html").read_text()
    assert main(["report", str(tmp_path), "--quality", str(evaluated)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "27.0% of far pairs kept, perplexity +5.00% against dense" in page
    assert re.findall(r"<title>focus K=8: ([\d.]+)<", page) == ["0", "5"]


def test_workers_that_differ_are_told_from_those_that_agree() -> None:
    alone = {"tokens": [[1], [2], [3]], "groups": [{"0": "a"}]}
    same = {"tokens": [[1], [2], [3]], "groups": [{"0": "a"}, {"0": "a"}]}
    assert differences(alone, same) == []
    other_token, other_group = differences(
        alone, {"tokens": [[1], [2], [4]], "groups": [{"0": "a"}, {"0": "b"}]}
    )
    assert "5000 tokens" in other_token
    assert "worker 1" in other_group


def test_continuations_may_part_where_two_tokens_are_about_as_likely() -> None:
    def answers(at: int, token: str) -> list[Answer]:
        words = ["a"] * at + [token] * (NEW_TOKENS - at)
        return [Answer(words, [{"a": -0.7, "b": -0.8}] * NEW_TOKENS)] * 6

    one, late = answers(0, "a"), answers(20, "b")
    assert unlike(one, one) == []
    assert unlike(one, late, near_tie=0.2) == []
    assert "after 20 'a' by one, 'b' by two" in unlike(one, late)[0]
    assert "'c' by two" in unlike(one, answers(20, "c"), near_tie=0.2)[0]
    assert "after 2 'a'" in unlike(one, answers(2, "b"), near_tie=0.2)[0], "the first eight must be the same"
    assert "too few to tell" in unlike(one, answers(9, "b"), near_tie=0.2)[0]


def test_a_run_with_a_limit_leaves_out_what_would_outlast_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(scenarios.time, "monotonic", lambda: now)
    clock = Clock(100)
    assert clock.fits(Cell("grid", 1000, 4, 1))  # nothing is known yet
    clock.took(Cell("grid", 1000, 4, 1), 8)
    assert clock.fits(Cell("grid", 2000, 12, 4))  # 12 x 2 s x 4
    assert not clock.fits(Cell("grid", 2000, 13, 4))
    assert not clock.fits(Cell("rate", 1000, 10, rate=0.1))
    clock.took(Cell("grid", 2000, 1, 1), 6)  # l + l^2 / 2, with 1000 tokens for l
    assert clock.fits(Cell("grid", 4000, 4, 1))  # 4 x 20 s
    assert not clock.fits(Cell("grid", 4000, 6, 1))
    now = 97
    assert clock.fits(Cell("grid", 1000, 1, 1))
    now = 101
    assert clock.left() == 0
    assert not clock.fits(Cell("grid", 1, 1, 1))


def test_both_sides_run_the_same_cells_though_the_first_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of L tokens takes L seconds here, on the second side a tenth."""
    now = 0.0

    def run(target: Any, side: str, cells: list[Cell], seconds: float | None = None) -> list[Any]:
        nonlocal now
        took = cells[0].requests * cells[0].length * (1 if side == "dense" else 0.1)
        if seconds is not None and took > seconds:
            now += seconds
            raise TimeoutError
        now += took
        return [cells[0]]

    monkeypatch.setattr(scenarios.time, "monotonic", lambda: now)
    monkeypatch.setattr(scenarios, "run", run)
    plan = dataclasses.replace(
        PLAN, lengths=[10, 100], concurrencies=[1, 16], requests=1, fewest=1, warm_up=10
    )
    reported: list[list[Any]] = []
    wanted = None
    for side in ("dense", "focus"):
        cells: list[Any] = []
        wanted, left_out = run_plan(plan, None, side, None, cells.append, Clock(1200), wanted)
        reported.append(cells)
        assert len(left_out) == (1 if side == "dense" else 0)
    assert reported[0] == reported[1] == wanted
    assert [(cell.length, cell.concurrency) for cell in reported[0]] == [(10, 1), (100, 1), (10, 16)]
    assert now == 1.1 * (10 + 10 + 10 + 100 + 160)


def test_a_servers_first_request_does_not_say_how_long_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    ran: list[Cell] = []

    def run(target: Any, side: str, cells: list[Cell], seconds: float | None = None) -> list[Any]:
        nonlocal now
        now += 0.1 * cells[0].requests if ran else 20
        ran.append(cells[0])
        return [cells[0]]

    monkeypatch.setattr(scenarios.time, "monotonic", lambda: now)
    monkeypatch.setattr(scenarios, "run", run)
    plan = dataclasses.replace(PLAN, lengths=[10], concurrencies=[1], requests=32, fewest=1)
    done, left_out = run_plan(plan, None, "dense", None, lambda _: None, Clock(100))
    assert [cell.requests for cell in done] == [32]
    assert left_out == []
    assert len({(cell.length, cell.seed) for cell in ran}) == 3, "no prompt is in the prefix cache"


def test_a_run_that_was_stopped_goes_on_with_what_its_second_side_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[tuple[str, Cell]] = []
    stop_at: int | None = None
    metrics: dict[str, float | None] = dict.fromkeys(
        ("prefix_hits", "preemptions", "kv_peak", "keys_read_prefill", "keys_read_decode", *PHASES), 1.0
    )
    metrics["prefix_hits"] = 0.0

    def send(target: Any, side: str, cells: list[Cell], seconds: float | None = None) -> list[Result]:
        sent.extend((side, cell) for cell in cells if cell.scenario != "warmup")
        if len(sent) == stop_at:
            raise KeyboardInterrupt
        answers = [Request(cell.length, cell.output_tokens, 0.0, 1.0, 2.0, "") for cell in cells]
        return [
            Result(side, cell, 1.0, [answer] * cell.requests, metrics)
            for cell, answer in zip(cells, answers, strict=True)
        ]

    monkeypatch.setattr(scenarios, "run", send)
    monkeypatch.setattr(Target, "at", lambda url, tokenizer, key: Target(url, "demo", "demo"))
    monkeypatch.setattr("loadtest.__main__._about", lambda target: ({"model": "demo"}, 100_000))
    command = ["run", "--output", str(tmp_path), "--dense", "http://a", "--focus", "http://b"]
    command += ["--lengths", "100", "200", "--concurrency", "1", "2", "--requests", "2", "--turns", "1"]
    assert main(command) == 0
    whole, cells = sent.copy(), (tmp_path / "cells.jsonl").read_text()
    on_focus = [cell for side, cell in whole if side == "focus"]
    assert [cell for side, cell in whole if side == "dense"] == on_focus
    assert len(on_focus) == 4 + 1 + 3  # grid, conversation, short ones alone and beside a long one

    sent, stop_at = [], len(on_focus) + 3
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert "did not come to its end" in (tmp_path / "report.html").read_text()
    sent, stop_at = [], None
    assert main([*command, "--resume"]) == 0
    assert sent == [("focus", cell) for cell in on_focus[2:]]
    assert (tmp_path / "cells.jsonl").read_text() == cells
    assert "did not come to its end" not in (tmp_path / "report.html").read_text()

    assert main([*command, "--resume", "--seed", "2"]) == 2
    assert "seed was 1, is 2" in capsys.readouterr().err
    assert (tmp_path / "cells.jsonl").read_text() == cells


def test_a_cell_without_an_answer_is_a_problem_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(target: Any, side: str, cells: list[Cell], seconds: float | None = None) -> list[Any]:
        if cells[0].length == 100:
            raise RuntimeError("answered no request: lost")
        return [cells[0]]

    monkeypatch.setattr(scenarios, "run", run)
    plan = dataclasses.replace(PLAN, lengths=[10, 100, 1000], concurrencies=[1], warm_up=10)
    problems: list[str] = []
    cells: list[Any] = []
    _, left_out = run_plan(plan, None, "dense", None, cells.append, Clock(None), None, problems.append)
    assert [cell.length for cell in cells] == [10, 1000]
    assert [cell.length for cell in left_out] == [100]
    assert problems == ["dense grid 100 x 1: answered no request: lost"]


def test_a_tokenizer_is_loaded_once_for_all_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.benchmarks import serve

    used = []

    async def send(arguments: Any) -> dict[str, Any]:
        used.append(serve.get_tokenizer(arguments.tokenizer))
        return {}

    monkeypatch.setattr(serve, "get_tokenizer", serve.get_tokenizer)  # is given back afterwards
    monkeypatch.setattr(serve, "main_async", send)
    target = Target("http://127.0.0.1:1", "demo", str(DEMO_FOLDER))
    for cell in PLAN.grid(None)[:2]:
        asyncio.run(_run_all(target, [cell]))
    assert len(used) == 2
    assert used[0] is used[1]


def test_tokens_that_take_the_client_longer_than_the_engine_are_doubted() -> None:
    fine = row("dense", 8192, 1.0, tpot_p50=0.0149)  # the engine's are 10 ms
    assert doubts(fine) == []
    assert doubts({**fine, "tpot_p50": 0.2}) == [
        "dense grid 8192 x 1: the client waited 200.0 ms for a token, of the engine's 10.0: "
        "the API server or the client was slow, not the model"
    ]


def test_every_token_of_a_shape_with_random_weights_has_a_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert main(["shape", "--shape", "1b", "--output", str(tmp_path)]) == 0
    words = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert words == len(tokenizer) == 128_256
    texts = [tokenizer.decode([number]) for number in (5000, 16_384, words - 1)]
    assert all(texts)
    assert len(set(texts)) == 3
    plain = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    assert tokenizer("The town had a mill.").input_ids == plain("The town had a mill.").input_ids
