"""Classes of prompt length and latency targets."""

from __future__ import annotations

import pytest

from server.errors import LaunchError
from server.objectives import Objectives, PromptBuckets, Target


def test_a_bucket_includes_its_upper_bound() -> None:
    buckets = PromptBuckets.parse("1k,8k,1m")
    assert [buckets.label(n) for n in (0, 1, 1024, 1025, 8192, 8193, 2**20, 2**20 + 1)] == [
        *("0-1k", "0-1k", "0-1k", "1k-8k", "1k-8k", "8k-1m", "8k-1m", "1m+"),
    ]


def test_buckets_of_prompts_up_to_a_length_are_those_that_such_prompts_can_have() -> None:
    buckets = PromptBuckets.parse("100,1k,8k")
    for longest in (1, 100, 101, 1024, 9000):
        assert buckets.up_to(longest) == tuple(
            dict.fromkeys(buckets.label(length) for length in range(1, longest + 1))
        )


def test_a_target_grows_with_the_prompt() -> None:
    target = Target.parse("1.5+0.25/1k")
    assert [target.seconds(n) for n in (0, 1024, 4096)] == [1.5, 1.75, 2.5]
    assert Target.parse("2").seconds(10**6) == 2
    assert Target.parse("0+0.5/1k").seconds(2048) == 1


@pytest.mark.parametrize("text", ["", "fast", "-1", "0", "0+0/1k", "1+/1k", "1+0.1", "1+0.1/1m", "nan"])
def test_a_target_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not seconds > 0"):
        Target.parse(text)


@pytest.mark.parametrize("text", ["", "1k,", "8k,1k", "1k,1024", "0,1k", "1.5k", "1g", "-1"])
def test_buckets_that_are_no_rising_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a list of increasing prompt lengths"):
        PromptBuckets.parse(text)


def test_the_environment_is_read_and_all_its_errors_are_listed() -> None:
    read = Objectives.read({"FOCUS_SLO_TPOT": "0.2", "FOCUS_PROMPT_BUCKETS": "64,2k"})
    assert read.targets["tpot"] == Target(0.2)
    assert read.targets["ttft"] == Target(1, 0.1)
    assert read.buckets.labels == ("0-64", "64-2k", "2k+")
    with pytest.raises(LaunchError) as refused:
        Objectives.read({"FOCUS_SLO_TTFT": "soon", "FOCUS_PROMPT_BUCKETS": "8k,1k"})
    assert "FOCUS_SLO_TTFT: 'soon'" in str(refused.value)
    assert "FOCUS_PROMPT_BUCKETS: '8k,1k'" in str(refused.value)
