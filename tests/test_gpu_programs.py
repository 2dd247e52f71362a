"""The GPU's measurement programs, as far as they go without one."""

from __future__ import annotations

import json
import sys

import pytest

from loadtest import kernels
from loadtest.advise import Measured
from loadtest.engine import Case, compare, table

ROW = {"ttft": 4.0, "tpot": 0.02}


@pytest.mark.parametrize("text", ["1x4096", "32x32768+256", "8x131072@decode", "1x262144@prefill"])
def test_a_case_is_read_as_it_is_written(text):
    assert str(Case.parse(text)) == text


@pytest.mark.parametrize("text", ["4096", "1x", "1x2@both", "1x2+", "x"])
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
    assert [row["phase"] for row in written["rows"]] == ["decode", "decode+qkv"]
    assert all(0 < row["keys_read"] < 1 for row in written["rows"])
    assert "FAILED" not in capsys.readouterr().out
    monkeypatch.setattr(kernels, "measure", None)
    kernels.main()
    assert json.loads(output.read_text())["rows"] == written["rows"]


def test_a_wrong_result_is_not_reported(monkeypatch):
    monkeypatch.setattr(kernels.Layer, "errors", lambda self: (1e-3, 2e-3))
    with pytest.raises(RuntimeError, match="nothing is reported"):
        kernels.measure(kernels.smoke_cases()[-1], kernels.Shape(4, 2, 64), 1)
