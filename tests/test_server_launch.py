"""focus-serve up to the moment where vLLM starts: models, adapters, arguments, refusals."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import random_adapter
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

import focus_vllm
from server import launch
from server.cli import main
from server.keys import Keyring, make_key
from server.models import DEMO_ADAPTER, DEMO_FOLDER, read_aliases, resolve_model
from server.settings import Settings

DEFAULTS = ["--disable-uvicorn-access-log", "--shutdown-timeout", "120"]
EXTENSION = "focus_vllm.engine.worker.FocusWorkerExtension"


def write_model(folder: Path, **changes: int) -> Path:
    """Write the configuration of a tiny model, all that focus-serve reads of one, and return its folder."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    LlamaConfig(**{**shape, **changes}).save_pretrained(folder)
    return folder


def rewrite(path: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor] | None = None) -> None:
    with safe_open(path, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        header = file.metadata()
    save_file({**kept, **(tensors or {})}, path, {**header, **metadata})


def words(command: str) -> dict[str, Any]:
    """Take a printed command apart: environment, model, and flags with their values."""
    parts = shlex.split(command)
    start = parts.index("vllm")
    assert parts[start : start + 2] == ["vllm", "serve"]
    environment = dict(part.split("=", 1) for part in parts[:start])
    return {"env": environment, "model": parts[start + 2], "arguments": parts[start + 3 :]}


def value_of(arguments: list[str], flag: str) -> str:
    return arguments[len(arguments) - arguments[::-1].index(flag)]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [name for name in os.environ if name.startswith("FOCUS_")]
    for name in ("VLLM_PLUGINS", "VLLM_USE_RUST_FRONTEND", "VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE", *own):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def other_folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "other", hidden_size=24)


@pytest.fixture
def adapter_file(tmp_path: Path, model_folder: Path) -> Path:
    return random_adapter(model_folder, tmp_path / "adapters" / "focus.safetensors")


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main([*map(str, arguments), "--dry-run"]) == 0
    return words(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run focus-serve, which must refuse with status 2, and return its one message."""
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("focus-serve: ") == 1
    return captured.err


# The command


def test_dry_run_prints_a_vllm_command_with_focus(
    capsys: pytest.CaptureFixture[str], model_folder: Path, adapter_file: Path
) -> None:
    command = dry_run(
        capsys, "--model", model_folder, "--adapter", adapter_file, "--port", "9000", "-tp", "2"
    )
    assert command["model"] == str(model_folder)
    assert value_of(command["arguments"], "--port") == "9000"
    assert value_of(command["arguments"], "-tp") == "2"
    assert value_of(command["arguments"], "--worker-extension-cls") == EXTENSION
    additional = json.loads(value_of(command["arguments"], "--additional-config"))
    assert additional == {"focus": {"adapter": str(adapter_file)}}
    assert "focus" in command["env"]["VLLM_PLUGINS"].split(",")


def test_without_arguments_the_demo_is_served_with_its_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    command = dry_run(capsys)
    assert command["model"] == str(DEMO_FOLDER)
    additional = json.loads(value_of(command["arguments"], "--additional-config"))
    assert additional == {"focus": {"adapter": str(DEMO_ADAPTER)}}
    assert value_of(command["arguments"], "--served-model-name") == "focus-demo"
    assert command["env"]["VLLM_CPU_KVCACHE_SPACE"] == "2"


def test_the_users_own_cache_size_and_flags_win_over_the_demos(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    command = dry_run(capsys, "--adapter", "none", "--served-model-name", "mine", "--no-enforce-eager")
    assert command["env"]["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert value_of(command["arguments"], "--served-model-name") == "mine"
    assert command["arguments"].index("--enforce-eager") < command["arguments"].index("--no-enforce-eager")


@pytest.mark.parametrize(
    ("name", "default", "own"),
    [("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128", "1024"), ("NUMBA_NUM_THREADS", "1", "4")],
)
def test_libraries_are_limited_unless_the_user_says_otherwise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, default: str, own: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    assert dry_run(capsys)["env"][name] == default
    monkeypatch.setenv(name, own)
    assert dry_run(capsys)["env"][name] == own


MULTIPLY = """
import ctypes, psutil, torch
from vllm import _custom_ops as ops

def memory():
    ctypes.CDLL(None).malloc_trim(0)  # what is in use, not what has been
    return psutil.Process().memory_info().rss

weight = torch.zeros(768, 256, dtype=torch.bfloat16)
product = ops.create_onednn_mm(weight.t(), 32)
def multiply(sizes):
    for num_tokens in sizes:
        ops.onednn_mm(product, torch.zeros(num_tokens, 256, dtype=torch.bfloat16), None)

multiply(range(600, 610))  # the library itself
before = memory()
multiply(range(1, 600))
print(memory() - before)
"""


def test_what_vllm_compiles_for_every_number_of_tokens_takes_less_than_half_the_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    grown = []
    for capacity in (dry_run(capsys)["env"]["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], "1024"):
        environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": capacity, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", MULTIPLY], env=environment, capture_output=True, check=True
        )
        grown.append(int(run.stdout.split()[-1]))
    assert grown[0] < grown[1] / 2, grown


def test_additional_config_of_the_user_is_kept_beside_focus(
    capsys: pytest.CaptureFixture[str], model_folder: Path, adapter_file: Path
) -> None:
    own = json.dumps({"other": {"a": 1}, "focus": {"window": 64}})
    command = dry_run(capsys, "--model", model_folder, "--adapter", adapter_file, "--additional-config", own)
    assert command["arguments"].count("--additional-config") == 1
    additional = json.loads(value_of(command["arguments"], "--additional-config"))
    assert additional == {"other": {"a": 1}, "focus": {"window": 64, "adapter": str(adapter_file)}}


def test_adapter_none_serves_stock_attention(capsys: pytest.CaptureFixture[str], model_folder: Path) -> None:
    command = dry_run(capsys, "--model", model_folder, "--adapter", "none")
    assert command["model"] == str(model_folder)
    assert command["arguments"] == [*DEFAULTS, "--middleware", "server.gate.Gate"]


GRAPHS = "--max-cudagraph-capture-size"


def test_graphs_are_captured_for_steps_whose_launches_take_longest(
    capsys: pytest.CaptureFixture[str], model_folder: Path, adapter_file: Path
) -> None:
    served = "--model", model_folder, "--adapter", adapter_file
    assert value_of(dry_run(capsys, *served)["arguments"], GRAPHS) == "1024"
    assert value_of(dry_run(capsys, *served, GRAPHS, "64")["arguments"], GRAPHS) == "64"
    assert GRAPHS not in dry_run(capsys, "--model", model_folder, "--adapter", "none")["arguments"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--cudagraph-capture-sizes", "1", "2"],
        ["--cudagraph_capture_sizes=1"],
        ["--compilation-config", '{"max_cudagraph_capture_size": 8}'],
        ["--compilation-config.cudagraph_mode", "NONE"],
        ["-cc.max_cudagraph_capture_size=8"],
    ],
)
def test_graphs_that_the_user_chose_otherwise_are_left_to_them(
    capsys: pytest.CaptureFixture[str], model_folder: Path, adapter_file: Path, flags: list[str]
) -> None:
    """vLLM refuses a size that is given twice in different ways."""
    command = dry_run(capsys, "--model", model_folder, "--adapter", adapter_file, *flags)
    assert GRAPHS not in command["arguments"]


def test_config_file_of_vllm_is_not_overridden_by_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    command = dry_run(capsys, "--adapter", "none", "--config", "settings.yaml")
    assert command["arguments"] == ["--config", "settings.yaml", "--middleware", "server.gate.Gate"]


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [(None, {"focus", "mine", "stats"}), ("mine", {"focus", "mine"}), ("", {"focus"})],
)
def test_vllm_plugins_gains_focus_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, allowed: str | None, expected: set[str]
) -> None:
    installed = {
        "vllm.general_plugins": ["focus", "mine"],
        "vllm.stat_logger_plugins": ["stats"],
        "vllm.endpoint_plugins": ["focus", "admin"],
    }

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        return [importlib.metadata.EntryPoint(name, "m:f", group) for name in installed.get(group, [])]

    monkeypatch.setattr(launch, "entry_points", entry_points)
    environ = {} if allowed is None else {"VLLM_PLUGINS": allowed}
    plan = launch.plan_launch(resolve_model("m", {}), None, {}, [], environ, Settings())
    assert set(plan.environment["VLLM_PLUGINS"].split(",")) == expected


def test_the_printed_command_survives_a_shell() -> None:
    plan = launch.Launch(("a b", "--x", '{"k": "it\'s"}'), {"NAME": "1 2"})
    shell = plan.command().replace("vllm serve", 'printf "%s\\n" "$NAME"', 1)
    # The assignment is made first: a shell expands "$NAME" before it applies a prefix assignment.
    shell = shell.replace("NAME='1 2' ", "NAME='1 2'; ", 1)
    printed = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["1 2", "a b", "--x", '{"k": "it\'s"}']


def test_version_names_vllm_and_focus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed["focus_vllm"] == focus_vllm.__version__
    assert printed["vllm"].startswith("0.2")


# Models and aliases


def test_list_models_prints_every_alias(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-models"]) == 0
    printed = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert printed == read_aliases()
    assert printed["llama-70b"].startswith("meta-llama/")


def test_an_alias_names_the_model_and_is_served_under_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    command = dry_run(capsys, "--model", "llama-8b", "--adapter", "none")
    name = read_aliases()["llama-8b"]
    assert command["model"] == name
    names = ["--served-model-name", "llama-8b", name]
    assert command["arguments"] == [*DEFAULTS, *names, "--middleware", "server.gate.Gate"]


def test_alias_file_adds_and_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "aliases.toml"
    file.write_text('[models]\nllama-8b = "here/it-is"\nours = "org/ours"\n')
    for alias, model in {"llama-8b": "here/it-is", "ours": "org/ours"}.items():
        command = dry_run(capsys, "--model", alias, "--adapter", "none", "--alias-file", file)
        assert command["model"] == model


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[models", "cannot read"), ('[model]\na = "b"', "['model']"), ("[models]\na = 1", "['a']")],
)
def test_a_wrong_alias_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, reason: str
) -> None:
    file = tmp_path / "aliases.toml"
    file.write_text(content)
    message = refusal(capsys, "--alias-file", file, "--list-models")
    assert str(file) in message
    assert reason in message


def test_a_model_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str], adapter_file: Path) -> None:
    message = refusal(capsys, "--model", "lama-8b", "--adapter", adapter_file)
    assert "'lama-8b'" in message
    assert "--list-models" in message


def test_a_model_without_an_adapter_is_refused_with_the_ways_out(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "--model", "llama-8b")
    assert "llama-8b needs an adapter" in message
    assert "--adapter none" in message


# Adapters


def test_from_a_folder_the_adapter_made_for_the_model_is_taken(
    capsys: pytest.CaptureFixture[str], model_folder: Path, adapter_file: Path, other_folder: Path
) -> None:
    random_adapter(other_folder, adapter_file.parent / "another.safetensors")
    (adapter_file.parent / "broken.safetensors").write_bytes(b"no")
    command = dry_run(capsys, "--model", model_folder, "--adapter", adapter_file.parent)
    additional = json.loads(value_of(command["arguments"], "--additional-config"))
    assert additional["focus"]["adapter"] == str(adapter_file)


def test_a_folder_with_two_adapters_for_the_model_is_ambiguous(
    capsys: pytest.CaptureFixture[str], model_folder: Path, adapter_file: Path
) -> None:
    random_adapter(model_folder, adapter_file.parent / "second.safetensors")
    message = refusal(capsys, "--model", model_folder, "--adapter", adapter_file.parent)
    assert "2 adapters" in message
    assert "focus.safetensors, second.safetensors" in message


def test_a_folder_without_a_fitting_adapter_says_why_for_each(
    capsys: pytest.CaptureFixture[str], model_folder: Path, adapter_file: Path, other_folder: Path
) -> None:
    random_adapter(other_folder, adapter_file)
    (adapter_file.parent / "broken.safetensors").write_bytes(b"no")
    message = refusal(capsys, "--model", model_folder, "--adapter", adapter_file.parent)
    assert "broken.safetensors: not a complete safetensors file" in message
    assert "focus.safetensors: it was trained for hidden_size 24" in message


def test_an_empty_folder_is_refused(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refusal(capsys, "--model", model_folder, "--adapter", empty)
    assert "no adapter" in message
    assert "nor any other .safetensors file" in message


def test_a_hugging_face_repository_is_downloaded_and_searched(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Path,
    adapter_file: Path,
) -> None:
    def snapshot_download(repo_id: str, **filters: list[str]) -> str:
        assert repo_id == "org/focus-tiny"
        assert filters["allow_patterns"] == ["*.safetensors"]
        return str(adapter_file.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    command = dry_run(capsys, "--model", model_folder, "--adapter", "org/focus-tiny")
    additional = json.loads(value_of(command["arguments"], "--additional-config"))
    assert additional["focus"]["adapter"] == str(adapter_file)


def test_a_repository_that_cannot_be_reached_is_refused(
    capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    message = refusal(capsys, "--model", model_folder, "--adapter", "org/not-here")
    assert "'org/not-here'" in message
    assert "cannot be read" in message


def test_a_missing_adapter_file_is_refused(capsys: pytest.CaptureFixture[str], model_folder: Path) -> None:
    message = refusal(capsys, "--model", model_folder, "--adapter", "nowhere/focus.safetensors")
    assert "no adapter at 'nowhere/focus.safetensors'" in message


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def newer(path: Path) -> None:
    rewrite(path, {"version": "3"})


def unknown_key(path: Path) -> None:
    rewrite(path, {"colour": "blue", "flavour": "mint"})


def unknown_tensor(path: Path) -> None:
    rewrite(path, {}, {"layers.0.bias": torch.zeros(4), "layers.1.gate": torch.zeros(4)})


def other_model(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        base = json.loads(file.metadata()["base_model"])
    rewrite(path, {"base_model": json.dumps({**base, "model_type": "gpt2", "config_hash": "0"})})


@pytest.mark.parametrize(
    ("damage", "reasons"),
    [
        (truncate, ["not a complete safetensors file"]),
        (newer, ["version is '3'", "upgrade focus-vllm"]),
        (unknown_key, ["'colour'", "'flavour'"]),
        (unknown_tensor, ["'layers.0.bias'", "'layers.1.gate'"]),
        (other_model, ["model_type 'gpt2'", "config_hash"]),
    ],
)
def test_a_wrong_adapter_is_refused_with_every_reason(
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    adapter_file: Path,
    damage: Any,
    reasons: list[str],
) -> None:
    damage(adapter_file)
    message = refusal(capsys, "--model", model_folder, "--adapter", adapter_file)
    assert str(adapter_file) in message
    assert [reason for reason in reasons if reason not in message] == []


def test_a_refusal_is_one_message_and_status_2_before_vllm_is_imported(adapter_file: Path) -> None:
    script = (
        "import sys; from server.cli import main; status = main(); "
        "sys.exit(9 if 'vllm' in sys.modules else status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, "--adapter", str(adapter_file)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"focus-serve: adapter '{adapter_file}' refused: it was trained for")
    assert result.stderr.count("\n") == 1


# Arguments that contradict Focus


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["llama-8b"], "--model"),
        (["--worker-extension-cls", "mine.Extension"], "mine.Extension"),
        (["--worker_extension_cls=mine.Extension"], "mine.Extension"),
        (["--additional-config.a.b", "1"], "one JSON object"),
        (["--additional-config", '{"focus": {"adapter": "x"}}'], "--adapter"),
    ],
)
def test_arguments_that_contradict_focus_are_refused(
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    adapter_file: Path,
    arguments: list[str],
    reason: str,
) -> None:
    assert reason in refusal(capsys, *arguments, "--model", model_folder, "--adapter", adapter_file)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_additional_config_that_is_no_json_object_is_refused(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--additional-config", text])
    assert stopped.value.code == 2
    assert repr(text) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"), [("VLLM_USE_RUST_FRONTEND", "1"), ("FOCUS_STATS_INTERVAL", "often")]
)
def test_an_environment_that_contradicts_focus_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert name in refusal(capsys, "--adapter", "none")


def test_missing_entry_points_stop_the_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "entry_points", lambda group, name=None: ())
    assert "install it again" in refusal(capsys, "--adapter", "none")


def test_peek_reads_what_decides_the_configuration() -> None:
    peeked = launch.peek(["--port", "1", "--revision", "abc", "--trust_remote_code"])
    expected = argparse.Namespace(revision="abc", trust_remote_code=True, worker_extension_cls="")
    assert peeked == expected


def test_a_setting_that_the_engine_would_refuse_is_refused_before_it_starts(
    capsys: pytest.CaptureFixture[str], model_folder: Path, adapter_file: Path
) -> None:
    for own, expected in (
        ({"window": -1, "top_k": 9}, "window (-1) must be an integer >= 0"),
        ({"top_k": 9}, "top_k (9) must be <= num_groups (8)"),
        ({"num_groups": 4}, "['num_groups'] cannot be given"),
    ):
        additional = json.dumps({"focus": own})
        message = refusal(
            capsys, "--model", model_folder, "--adapter", adapter_file, "--additional-config", additional
        )
        assert expected in message


# Settings


def test_a_flag_wins_over_a_variable_and_that_over_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("max_queued_requests = 1\nmax_queued_tokens = 2\ndrain_timeout = 3\nlog_prompts = true\n")
    monkeypatch.setenv("FOCUS_MAX_QUEUED_REQUESTS", "10")
    monkeypatch.setenv("FOCUS_MAX_QUEUED_TOKENS", "20")
    flags = ["--adapter", "none", "--focus-config", file, "--max-queued-requests", "100"]
    assert main([*map(str, flags), "--dry-run"]) == 0
    printed = capsys.readouterr()
    command = words(printed.out)
    own = {name: value for name, value in command["env"].items() if name.startswith("FOCUS_")}
    assert own == {
        "FOCUS_SHARED_PREFILLS": "3",
        "FOCUS_MAX_QUEUED_REQUESTS": "100",
        "FOCUS_MAX_QUEUED_TOKENS": "20",
        "FOCUS_DRAIN_TIMEOUT": "3",
        "FOCUS_LOG_PROMPTS": "True",
    }
    assert value_of(command["arguments"], "--shutdown-timeout") == "3"
    assert "max_queued_tokens = 20\n" in printed.err
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert Settings().environment() | {"FOCUS_SHARED_PREFILLS": "3"} == own


def test_every_wrong_setting_is_named_with_its_value_and_what_it_is_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("request_timeout = -1\n")
    monkeypatch.setenv("FOCUS_MAX_BODY_MB", "large")
    message = refusal(capsys, "--focus-config", file, "--log-format", "xml")
    for part in (
        f"request_timeout in {str(file)!r} is -1, it should be greater than 0: seconds that a request may",
        "FOCUS_MAX_BODY_MB is 'large', it should be a valid number",
        "in MiB; more gets 413 (without it: 64)",
        "--log-format is 'xml', it should be 'text' or 'json'",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("max_bodymb = 1", "no setting is called max_bodymb; there are model"),
        ("a = ", "cannot read"),
        (None, "No such"),
    ],
)
def test_a_wrong_settings_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, reason: str
) -> None:
    file = tmp_path / "settings.toml"
    if content:
        file.write_text(content)
    message = refusal(capsys, "--focus-config", file)
    assert str(file) in message
    assert reason in message


def test_a_target_that_cannot_be_read_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "FOCUS_SLO_TTFT: 'soon'" in refusal(capsys, "--slo-ttft", "soon")


def test_log_format_json_reaches_vllm_and_uvicorn(capsys: pytest.CaptureFixture[str]) -> None:
    command = dry_run(capsys, "--adapter", "none", "--log-format", "json")
    file = Path(command["env"]["VLLM_LOGGING_CONFIG_PATH"])
    assert value_of(command["arguments"], "--log-config-file") == str(file)
    assert json.loads(file.read_text())["loggers"]["vllm"]["handlers"] == ["json"]


# Keys


def test_make_key_prints_a_line_for_the_file_and_the_key_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.toml"
    for name in ("alice", "bob-2"):
        assert main(["--make-key", name]) == 0
        printed = capsys.readouterr()
        with file.open("a") as output:
            output.write(printed.out)
        key = printed.err.split()[-1]
        assert key.startswith("focus-")
        assert key not in printed.out
        found = Keyring(file).find(key)
        assert found
        assert found[0] == name
    assert "'a b'" in refusal(capsys, "--make-key", "a b")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('alice = "focus-secret"', "alice is wrong"),
        (
            'a = {sha256 = "focus-secret"}\nb = {sha256 = "0", limit = 1}',
            "a.sha256, b.limit, b.sha256 is wrong",
        ),
        ("alice", "cannot read"),
        (None, "cannot read"),
    ],
)
def test_a_wrong_file_of_keys_is_refused_without_showing_what_is_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, reason: str
) -> None:
    file = tmp_path / "keys.toml"
    if content:
        file.write_text(content)
    message = refusal(capsys, "--adapter", "none", "--api-key-file", file)
    assert str(file) in message
    assert reason in message
    assert "secret" not in message


def test_keys_on_the_command_line_and_ways_around_the_gate_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys.toml").write_text(make_key("alice")[1])
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    flags = ["--adapter", "none", "--api-key-file", tmp_path / "keys.toml", "--api_key=secret", "--grpc"]
    message = refusal(capsys, *flags)
    for part in ("--api-key shows the key", "--grpc knows neither", "VLLM_API_KEY is set"):
        assert part in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("flags", "shared"),
    [
        ([], "3"),
        (["--shared-prefills", "0"], "0"),
        (["--long-prefill-token-threshold", "0"], None),
        (["--long_prefill_token_threshold=100"], None),
    ],
)
def test_steps_are_shared_unless_a_threshold_is_given(
    flags: list[str], shared: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--adapter", "none", "--dry-run", *flags]) == 0
    assert words(capsys.readouterr().out)["env"].get("FOCUS_SHARED_PREFILLS") == shared
