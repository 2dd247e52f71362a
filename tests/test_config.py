"""FocusConfig refuses what cannot be served, and says everything that is wrong."""

import dataclasses

import pytest

from focus_vllm.config import FocusConfig


def test_defaults_are_valid_and_frozen():
    config = FocusConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_groups": 0}, "num_groups (0) must be an integer >= 1"),
        ({"num_groups": 33}, "num_groups (33) must be <= 32"),
        ({"group_dim": 0}, "group_dim (0) must be an integer >= 1"),
        ({"key_k": 9}, "key_k (9) must be <= num_groups (8)"),
        ({"top_k": 9}, "top_k (9) must be <= num_groups (8)"),
        ({"top_k": True}, "top_k (True) must be an integer >= 1"),
        ({"window": -1}, "window (-1) must be an integer >= 0"),
        ({"window": 1.5}, "window (1.5) must be an integer >= 0"),
        ({"sink": -1}, "sink (-1) must be an integer >= 0"),
        ({"dense_below": -1}, "dense_below (-1) must be an integer >= 0"),
        ({"temperature": 0.0}, "temperature (0.0) must be > 0"),
        ({"temperature": float("nan")}, "temperature (nan) must be > 0"),
        ({"dense_layers": (-1,)}, "dense_layers ([-1]) must be integers >= 0"),
    ],
)
def test_value_out_of_range_is_refused(changes, reason):
    with pytest.raises(ValueError, match="invalid Focus configuration") as error:
        FocusConfig(**changes)
    assert reason in str(error.value)


def test_refusal_lists_every_reason():
    with pytest.raises(ValueError, match="invalid Focus configuration") as error:
        FocusConfig(key_k=9, top_k=10, temperature=-1.0)
    for name in ("key_k (9)", "top_k (10)", "temperature (-1.0)"):
        assert name in str(error.value)


def test_dense_layers_are_sorted_and_unique():
    assert FocusConfig(dense_layers=(3, 1, 3)).dense_layers == (1, 3)


def test_dict_round_trip_keeps_every_field():
    config = FocusConfig(num_groups=16, key_k=2, top_k=4, window=7, dense_layers=(0, 5), temperature=0.5)
    assert FocusConfig.from_dict(config.to_dict()) == config


def test_unknown_and_missing_settings_are_named():
    values = FocusConfig().to_dict()
    with pytest.raises(ValueError, match="unknown Focus setting \\['windw'\\]"):
        FocusConfig.from_dict({**values, "windw": 3})
    del values["sink"]
    with pytest.raises(ValueError, match="missing Focus setting \\['sink'\\]"):
        FocusConfig.from_dict(values)


def test_a_decode_budget_is_written_only_if_there_is_one():
    assert "decode_budget" not in FocusConfig().to_dict()
    config = FocusConfig(decode_budget=0)
    assert FocusConfig.from_dict(config.to_dict()) == config
