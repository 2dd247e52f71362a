"""vLLM on the CPU, stock against Focus: prefill, attention's share of it, and decode, by prompt length.

    python -m loadtest.cpu --output cpu.json

Both sides are vLLM offline with the same settings in processes of their own, started in turn (stock, Focus,
stock, ...); a figure is the median over rounds. Attention is the wall time inside vLLM's attention
implementation, all layers. Prompts are random tokens, for which the potentials are calibrated again, so that
groups are as balanced as on the text that an adapter was trained for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parent.parent / "focus_vllm" / "demo"
FIGURES = ("prefill", "prefill_attention", "decode", "decode_attention")
DECODE_STEPS = 32
CALIBRATION_TOKENS = 8192


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--adapter", type=Path, default=DEMO / "focus.safetensors")
    parser.add_argument("--focus", type=json.loads, default={}, help="settings that override the adapter's")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 8000, 16000, 32000])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        focus = json.loads(arguments.side)
        sys.stdout.write(
            "\n" + json.dumps(measure(arguments.model, focus, arguments.lengths, arguments.dtype))
        )
    else:
        report(arguments)


def random_prompt(length: int) -> list[int]:
    """Return the same random tokens on every call."""
    import torch

    return torch.randint(5, 16000, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def balance(model: Path, source: Path, target: Path) -> None:
    """Copy an adapter with its potentials calibrated on random tokens, layer by layer."""
    import torch
    from transformers import AutoModelForCausalLM

    from focus_vllm.adapter import load_adapter, save_adapter
    from focus_vllm.routing import sinkhorn
    from focus_vllm.training.hf import attach

    adapter = load_adapter(source)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = torch.tensor([random_prompt(CALIBRATION_TOKENS)])
    layers = dict(adapter.layers)
    with torch.no_grad(), attach(loaded, adapter.config, layers) as routed:
        loaded.base_model(input_ids=tokens, use_cache=False)
        for index, router in layers.items():
            scores = routed[index].scores
            assert scores is not None
            potential = router.potential + sinkhorn(scores[0], 200)[1]
            layers[index] = dataclasses.replace(router, potential=potential)
    save_adapter(dataclasses.replace(adapter, layers=layers), target)


def measure(
    model: Path, focus: dict[str, Any] | None, lengths: list[int], dtype: Any
) -> list[dict[str, float]]:
    """Time one engine in this process; seconds, decode per token."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        str(model),
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        additional_config={"focus": focus} if focus else {},
    )
    clock = AttentionClock()
    results = []
    params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=DECODE_STEPS + 1)
    for length in [300, *lengths]:  # the first one warms up
        clock.reset()
        output = llm.generate([TokensPrompt(prompt_token_ids=random_prompt(length))], params, use_tqdm=False)[
            0
        ]
        metrics: Any = output.metrics
        results.append(
            {
                "prefill": metrics.first_token_ts - metrics.scheduled_ts,
                "prefill_attention": sum(clock.steps[:-DECODE_STEPS]),
                "decode": (metrics.last_token_ts - metrics.first_token_ts) / DECODE_STEPS,
                "decode_attention": sum(clock.steps[-DECODE_STEPS:]) / DECODE_STEPS,
            }
        )
    return results[1:]


class AttentionClock:
    """Adds up the seconds inside attention layers, per engine step, in `steps`."""

    def __init__(self) -> None:
        from vllm.v1.attention.backends import cpu_attn

        from focus_vllm.engine.backend_cpu import FocusCPUImpl

        self.steps: list[float] = []
        self._depth = 0
        for implementation in (cpu_attn.CPUAttentionBackendImpl, FocusCPUImpl):
            for method in ("forward", "do_kv_cache_update"):
                self._time(implementation, method)

    def reset(self) -> None:
        """Forget what was measured."""
        self.steps = []

    def _time(self, implementation: Any, method: str) -> None:
        original = getattr(implementation, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self._add(args[1].layer_name, method, time.perf_counter() - start)

        setattr(implementation, method, timed)

    def _add(self, layer_name: str, method: str, seconds: float) -> None:
        if method == "do_kv_cache_update" and ".0." in layer_name:
            self.steps.append(0.0)
        self.steps[-1] += seconds


def report(arguments: argparse.Namespace) -> None:
    """Run both sides in turn, print the table, and write the JSON."""
    import torch
    import vllm

    scratch = tempfile.TemporaryDirectory()
    balanced = Path(scratch.name, arguments.adapter.name)
    balance(arguments.model, arguments.adapter, balanced)
    focus = {"adapter": str(balanced), **arguments.focus}
    rounds: dict[str, list[list[dict[str, float]]]] = {"stock": [], "focus": []}
    for number in range(arguments.rounds):
        for side, settings in (("stock", None), ("focus", focus)):
            rounds[side].append(_run_side(settings))
            sys.stderr.write(f"round {number + 1} of {arguments.rounds}: {side} done\n")
    medians = {
        side: [
            {figure: statistics.median(run[i][figure] for run in runs) for figure in FIGURES}
            for i in range(len(arguments.lengths))
        ]
        for side, runs in rounds.items()
    }
    scratch.cleanup()
    sys.stdout.write(_table(arguments.lengths, medians) + "\n")
    if arguments.output:
        conditions = {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "dtype": arguments.dtype,
            "adapter": arguments.adapter.name,
            "focus": arguments.focus,
            "command": " ".join(sys.argv[1:]),
            "lengths": arguments.lengths,
        }
        arguments.output.write_text(
            json.dumps({**conditions, "medians": medians, "rounds": rounds}, indent=1)
        )


def _run_side(focus: dict[str, Any] | None) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "loadtest.cpu", *sys.argv[1:], "--side", json.dumps(focus)]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
    }
    result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _table(lengths: list[int], medians: dict[str, list[dict[str, float]]]) -> str:
    header = "| prompt | " + " | ".join(f"{figure} (ms): stock, Focus, ratio" for figure in FIGURES) + " |"
    rows = [header, "|" + "---|" * (len(FIGURES) + 1)]
    for i, length in enumerate(lengths):
        cells = []
        for figure in FIGURES:
            stock, focus = (medians[side][i][figure] * 1e3 for side in ("stock", "focus"))
            cells.append(f"{stock:.1f}, {focus:.1f}, **{stock / focus:.2f}x**")
        rows.append(f"| {length:,} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor()


if __name__ == "__main__":
    main()
