"""vLLM with CUDA graphs and torch.compile: the demo model with its adapter, against stock vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "focus_vllm" / "demo"
PROMPTS = [500, 1900, 2500, 6000]
RUN = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from focus_vllm.engine.plugin import register

def main():
    register()
    focus, arguments, groups = (json.loads(text) for text in sys.argv[2:5])
    llm = LLM(model=sys.argv[1], max_model_len=8192, additional_config={"focus": focus} if focus else {},
              gpu_memory_utilization=0.3, seed=0, **arguments)
    text = open("focus_vllm/adapter.py").read() + open("focus_vllm/reference.py").read()
    tokens = (llm.get_tokenizer().encode(text) * 4)[:6000]
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=0, ignore_eos=True)
    result = []
    for lengths in groups:
        prompts = [{"prompt_token_ids": tokens[:length]} for length in lengths]
        for output in llm.generate(prompts, params, use_tqdm=False):
            done = output.outputs[0]
            values = [entry[token].logprob for token, entry in zip(done.token_ids, done.logprobs)]
            result.append([list(done.token_ids), values])
    print("RESULT " + json.dumps(result))

main()
"""


def run(focus: dict | None, groups: list[list[int]], **arguments) -> list[list]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    settings = {"adapter": str(DEMO / "focus.safetensors"), **focus} if focus is not None else None
    texts = [json.dumps(value) for value in (settings, arguments, groups)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(DEMO / "model"), *texts],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def focus_alone() -> list[list]:
    return run({}, [[length] for length in PROMPTS], enable_prefix_caching=False)


@pytest.fixture(scope="module")
def stock_alone() -> list[list]:
    return run(None, [[length] for length in PROMPTS], enable_prefix_caching=False)


def test_prompt_below_dense_below_is_bit_identical_to_stock(focus_alone, stock_alone):
    assert focus_alone[:2] == stock_alone[:2]


def test_long_prompt_is_not_dense(focus_alone, stock_alone):
    assert focus_alone[3] != stock_alone[3]


def test_window_as_long_as_the_prompt_is_dense(stock_alone):
    wide = run({"window": 8192}, [[length] for length in PROMPTS], enable_prefix_caching=False)
    for ours, dense in zip(wide, stock_alone, strict=True):
        assert ours[1][0] == pytest.approx(dense[1][0], abs=0.05)


def test_first_token_does_not_depend_on_batch_chunks_graphs_or_cached_prefixes(focus_alone):
    variants = [
        run({}, [PROMPTS], enable_prefix_caching=False, max_num_batched_tokens=1536),
        run({}, [[6000], *([length] for length in PROMPTS)], enforce_eager=True)[1:],
    ]
    for variant in variants:
        for ours, alone in zip(variant, focus_alone, strict=True):
            assert ours[1][0] == pytest.approx(alone[1][0], abs=0.05)
