"""Tensor parallelism: both ranks route alike, and as one GPU does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.two_gpus, pytest.mark.timeout(420)]

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "focus_vllm" / "demo"
SLOTS = 6000
RUN = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from focus_vllm.engine.plugin import register

def main():
    register()
    llm = LLM(model=sys.argv[1], max_model_len=8192, tensor_parallel_size=int(sys.argv[3]), seed=0,
              kv_cache_memory_bytes=2**29, gpu_memory_utilization=0.1,
              worker_extension_cls="loadtest.engine.MeasuredWorker",
              additional_config={"focus": {"adapter": sys.argv[2]}}, enable_prefix_caching=False)
    text = open("focus_vllm/adapter.py").read() + open("focus_vllm/reference.py").read()
    tokens = (llm.get_tokenizer().encode(text) * 4)[:6000]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    done = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)[0].outputs[0]
    groups = llm.collective_rpc("groups_of", args=(int(sys.argv[4]),))
    print("RESULT " + json.dumps([list(done.token_ids), groups, llm.collective_rpc("focus_stats")]))

if __name__ == "__main__":
    main()
"""


def run(tmp_path: Path, ranks: int) -> list[Any]:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    arguments = [str(DEMO / "model"), str(DEMO / "focus.safetensors"), str(ranks), str(SLOTS)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-4000:]
    result: list[Any] = json.loads(lines[0].removeprefix("RESULT "))
    return result


def test_two_gpus_give_the_groups_and_tokens_of_one(tmp_path):
    tokens, (groups,), (counts,) = run(tmp_path, 1)
    tokens_of_two, (first, second), (counts_of_first, counts_of_second) = run(tmp_path, 2)
    assert first == second
    assert counts_of_first == counts_of_second
    assert counts_of_first["candidate_tokens"] == counts["candidate_tokens"]
    # What enters the first layer has not been added up over ranks yet. Behind it, sums in bfloat16 are
    # rounded elsewhere, and near ties may fall the other way: 0.51 % of all on two H100. One engine and the
    # float32 reference differ in 0.6 to 1.7 %.
    assert groups[min(groups, key=int)] == first[min(first, key=int)]
    pairs = [pair for index in groups for pair in zip(groups[index], first[index], strict=True)]
    assert sum(a != b for a, b in pairs) <= 0.01 * len(pairs)
    assert tokens_of_two[:8] == tokens[:8]
