"""The openai client against a real focus-serve with the embedded demo, on the CPU."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from drains import check_drain
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from loadtest import serving

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

MODEL = "focus-demo"
PROMPT = "The history of the city begins with"
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]


class Server(serving.Server):
    """A focus-serve with the embedded demo."""

    def __init__(self, log: Path, *arguments: str) -> None:
        environment = {"FOCUS_STATS_INTERVAL": "0.5", **serving.on_one_core()}
        super().__init__([*serving.FOCUS_SERVE, *arguments], log, environment, serving.free_port())

    def info(self) -> dict[str, Any]:
        return dict(json.loads(self.get("/focus/info")))

    def keys(self) -> dict[str, float]:
        """Return the counters as `selected_prefill`, `candidate_decode` and so on, up to date."""
        self.info()
        return {
            f"{sample.name.split('_')[2]}_{sample.labels['phase']}": sample.value
            for family in text_string_to_metric_families(self.get("/metrics"))
            if family.name.startswith("focus_attn_")
            for sample in family.samples
            if sample.name.endswith("_total")
        }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    # The demo would rather write line breaks for ever than an object.
    form = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
    server = Server(
        tmp_path_factory.mktemp("server") / "log.txt", *tools, "--structured-outputs-config", form
    )
    try:
        server.wait_until_ready()
        yield server
        assert server.stop() == 0, server.log.read_text()
    finally:
        server.kill()


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def complete(client: OpenAI, prompt: str | list[int] = PROMPT, **options: Any) -> Any:
    return client.completions.create(
        model=MODEL, prompt=prompt, **{"max_tokens": 12, "temperature": 0, **options}
    )


def chat(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=MESSAGES, **{"max_tokens": 12, "temperature": 0, **options}
    )


def test_the_served_model_is_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_completions_stream_the_text_that_they_return_at_once(client: OpenAI) -> None:
    whole = complete(client)
    streamed = list(complete(client, stream=True))
    assert whole.choices[0].text.strip()
    assert whole.usage.completion_tokens == 12
    assert len(streamed) > 2
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    assert streamed[-1].choices[0].finish_reason == "length"


def test_chat_streams_the_text_that_it_returns_at_once(client: OpenAI) -> None:
    whole = chat(client)
    streamed = list(chat(client, stream=True))
    assert whole.choices[0].message.content.strip()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == (
        whole.choices[0].message.content
    )
    assert streamed[-1].choices[0].finish_reason == "length"


def test_n_gives_that_many_different_choices(client: OpenAI) -> None:
    for answer in (
        complete(client, n=2, temperature=1, seed=1),
        chat(client, n=2, temperature=1, seed=1),
    ):
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.choices[0].model_dump() != answer.choices[1].model_dump()


def test_greedy_tokens_are_the_ones_with_the_highest_logprob(client: OpenAI) -> None:
    logprobs = complete(client, logprobs=3).choices[0].logprobs
    assert len(logprobs.token_logprobs) == 12
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == max(top.values()) <= 0
    tokens = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(tokens) == 12
    for token in tokens:
        assert token.logprob == max(other.logprob for other in token.top_logprobs)


def test_text_ends_before_the_stop_word(client: OpenAI) -> None:
    text = complete(client).choices[0].text
    stop = text.split()[2]
    choice = complete(client, stop=[stop]).choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


def check_schema(text: str) -> None:
    answer = json.loads(text)
    assert set(answer) == {"city", "warm"}
    assert len(answer["city"]) <= 8
    assert isinstance(answer["warm"], bool)


def test_structured_output_follows_its_schema(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    check_schema(chat(client, response_format=form, max_tokens=200).choices[0].message.content)
    choice = complete(client, max_tokens=20, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert choice.choices[0].text in ("yes", "no")


def test_a_tool_is_called_with_arguments_of_its_schema_in_both_modes(client: OpenAI) -> None:
    options: Any = {"tools": [TOOL], "max_tokens": 200}
    options["tool_choice"] = {"type": "function", "function": {"name": "weather"}}
    (call,) = chat(client, **options).choices[0].message.tool_calls
    assert call.function.name == "weather"
    check_schema(call.function.arguments)
    deltas = [
        delta
        for chunk in chat(client, stream=True, **options)
        for delta in chunk.choices[0].delta.tool_calls or ()
    ]
    assert deltas[0].function.name == "weather"
    check_schema("".join(delta.function.arguments or "" for delta in deltas))


def test_a_stream_gives_usage_when_asked(client: OpenAI) -> None:
    *_, last = complete(client, stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens == 12


def test_a_cancelled_stream_leaves_the_engine_idle(server: Server, client: OpenAI) -> None:
    stream = complete(client, stream=True, max_tokens=20_000, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 2
    aborted = 'focus_requests_aborted_total{cause="client",model_name="focus-demo",phase="decode",'
    while aborted not in server.get("/metrics"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_responses_api_answers(client: OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input=PROMPT, max_output_tokens=12, temperature=0)
    assert answer.usage
    assert answer.usage.output_tokens == 12


def test_a_prompt_that_is_too_long_is_a_clear_400(client: OpenAI) -> None:
    limit = client.models.list().data[0].model_dump()["max_model_len"]
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, [5] * (limit + 100))
    assert refused.value.status_code == 400
    assert f"maximum context length is {limit} tokens" in str(refused.value)
    assert str(limit + 100) in str(refused.value)


def test_info_describes_the_demo_adapter(server: Server) -> None:
    info = server.info()
    assert info["attention"] == "focus"
    assert info["adapter"]["file"] == "focus.safetensors"
    assert sorted(info["routed_layers"] + info["dense_layers"]) == list(range(8))
    assert info["routed_layers"]
    assert {"num_groups", "key_k", "top_k", "window"} <= set(info["config"])
    assert info["versions"]["vllm"].startswith("0.2")


def test_a_short_prompt_reads_every_key_and_a_long_one_does_not(server: Server, client: OpenAI) -> None:
    dense_below = server.info()["config"]["dense_below"]
    before = server.keys()
    complete(client, [7] * 64)
    short = server.keys()
    grown = {name: short[name] - before[name] for name in short}
    assert grown["candidate_prefill"] == grown["selected_prefill"] > 0
    assert grown["candidate_decode"] == grown["selected_decode"] > 0

    text = "".join(f"{number} men came to the town. " for number in range(dense_below // 4))
    assert complete(client, text).usage.prompt_tokens > dense_below + 1000
    long = server.keys()
    grown = {name: long[name] - short[name] for name in long}
    assert 0 < grown["selected_prefill"] < grown["candidate_prefill"]
    assert 0 < grown["selected_decode"] < grown["candidate_decode"]
    read = server.info()["keys_read"]
    assert read["prefill"] == pytest.approx(long["selected_prefill"] / long["candidate_prefill"])
    assert read["decode"] == pytest.approx(long["selected_decode"] / long["candidate_decode"])


def test_vllms_own_metrics_are_untouched(server: Server, client: OpenAI) -> None:
    complete(client)
    metrics = server.get("/metrics")
    assert (
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="focus-demo"}' in metrics
    )
    assert "focus_adapter_info{" in metrics
    assert "focus_build_info{" in metrics


def test_the_curl_line_of_the_log_works(server: Server) -> None:
    (line,) = (line for line in server.log.read_text().splitlines() if "Try: curl" in line)
    answer = subprocess.run(
        line.partition("Try: ")[2], shell=True, capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(answer.stdout)["choices"][0]["text"]


def test_sigterm_under_load_completes_what_has_begun_refuses_the_rest_and_exits_with_0(
    server: Server,
) -> None:
    check_drain(server, lambda: server.process.send_signal(signal.SIGTERM))
