"""vLLM offline, stock against Focus: time to first token, time per output token, throughput, memory, profile.

    python -m loadtest.engine --shape 8b --output engine.json --cases 1x4096 1x131072 4x131072 32x32768+256
    python -m loadtest.engine --shape 8b --output engine.json --cases 1x524288 --limit 550   # goes on
    python -m loadtest.engine --smoke                                                        # without a GPU

A case is BATCHxPROMPT: the time to first token is that of a request for one token (of a batch, until the
last has its first); then the same prompts, by now in the prefix cache, are continued, and the time per
output token is that of all tokens but the first, by the engine's clock. BATCHxPROMPT+TOKENS is one run of
the whole batch, prefill and decode: its time, and the tokens per second of both. BATCHxPROMPT~TOKENS is a
conversation's next turn: the median time to the first token of five of so many tokens, each behind the
prompt, which is cached. BATCHxPROMPT@prefill and @decode are profiles: the kernels of the prompt's last
chunk, or of one decode step. BATCHxPROMPT@host is what Python does: the median time to the first token of
prompts that are not cached, and the functions that took most. BATCHxPROMPT~TOKENS@prefill and @host are the
next turn's. BATCHxPROMPT+TOKENS@host is that of decode: the median time per output token of twenty
continuations of a cached prompt by so many tokens, and what Python's functions take a step.

The model has random weights of the shape named, and routers whose folded rows are orthogonal and of one
length, so that groups are balanced by symmetry; the output says how well. Speed is what a trained model would
have; the text is noise. Each side runs in its own process, with vLLM's defaults unless `--vllm` says
otherwise, and loads the model once. The file is written after every case, and cases that it has are not run
again. No ratio is reported if Focus does not continue a prompt below `dense_below` with stock vLLM's tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import dataclasses
import gc
import json
import os
import pstats
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focus_vllm.engine.worker import FocusWorkerExtension

if TYPE_CHECKING:
    from vllm import RequestOutput

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1000,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
    "70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
}  # fmt: skip
"""Llama-3.2-1B, Llama-3.1-8B and -70B; "tiny" is for --smoke."""
CHECKED_PROMPT = 1500
CHECKED_TOKENS = 16
PROFILED_STEPS = 8
HOST_PROMPTS = 20
TURNS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One line: see the module's text."""

    batch: int
    prompt: int
    tokens: int = 0
    profile: str = ""
    more: int = 0
    """New tokens behind a prompt that is cached."""

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read BATCHxPROMPT, with +TOKENS or ~TOKENS, and @PHASE.

        Raises:
            ValueError: It is none of them.
        """
        turn = re.fullmatch(r"(\d+)x(\d+)~(\d+)(?:@(prefill|host))?", text)
        if turn is not None:
            batch, prompt, more, profile = turn.groups()
            return cls(int(batch), int(prompt), 0, profile or "", int(more))
        match = re.fullmatch(r"(\d+)x(\d+)(?:\+(\d+)(?:@(host))?|@(prefill|decode|host))?", text)
        if match is None:
            raise ValueError(
                f"a case is {text!r}, expected 1x4096, 32x32768+256, 1x4096~256, 1x4096@decode, "
                "1x4096+64@host or 1x4096~256@host"
            )
        batch, prompt, tokens, host, profile = match.groups()
        return cls(int(batch), int(prompt), int(tokens or 0), host or profile or "")

    def __str__(self) -> str:
        tokens = f"+{self.tokens}" if self.tokens else ""
        more = f"~{self.more}" if self.more else ""
        return f"{self.batch}x{self.prompt}{tokens}{more}" + (f"@{self.profile}" if self.profile else "")


class MeasuredWorker(FocusWorkerExtension):
    """What the load test asks a worker."""

    def group_shares(self) -> list[float] | None:
        """Return the smallest and largest share of cached tokens in a group of any layer."""
        state = self._focus_state()
        if state is None:
            return None
        shares = []
        for layer in state.layers.values():
            assert layer.store is not None
            used = layer.store[layer.store != 0].int()
            shares += [(used >> group & 1).float().mean().item() for group in range(layer.config.num_groups)]
        return [min(shares), max(shares)]

    def groups_of(self, slots: int) -> dict[int, list[int]]:
        """Return the first slots of every layer's group store."""
        state = self._focus_state()
        assert state is not None
        stores = {index: layer.store for index, layer in state.layers.items()}
        return {index: store[:slots].tolist() for index, store in stores.items() if store is not None}

    def focus_memory(self) -> dict[str, int]:
        """Return bytes: in use on the GPU by anyone, by tensors, by scratch buffers and by group stores."""
        import torch
        from vllm.v1.worker import workspace

        used = {"used": 0, "tensors": 0, "scratch": 0}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            used |= {"used": total - free, "tensors": torch.cuda.memory_allocated()}
        if workspace.is_workspace_manager_initialized():
            buffers = workspace.current_workspace_manager()._current_workspaces
            used["scratch"] = sum(buffer.numel() for buffer in buffers if buffer is not None)
        state = self._focus_state()
        stores = [] if state is None else [layer.store for layer in state.layers.values()]
        used["stores"] = sum(store.untyped_storage().nbytes() for store in stores if store is not None)
        return used


def write_model(directory: Path, shape: dict[str, Any], max_position: int) -> None:
    """Write the configuration of a Llama; its weights are vLLM's random ones."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 500000.0,
        "max_position_embeddings": max_position, "bos_token_id": 1, "eos_token_id": 2, **shape,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))


def write_balanced_adapter(path: Path, model: Path, config: dict[str, Any]) -> None:
    """Write an adapter whose routers treat all groups alike."""
    import torch
    from transformers import AutoConfig

    from focus_vllm.adapter import Adapter, BaseModel, save_adapter
    from focus_vllm.config import FocusConfig
    from focus_vllm.routing import Router

    settings = FocusConfig(**config)
    base = BaseModel.from_config(str(model), AutoConfig.from_pretrained(model))
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for index in range(base.num_hidden_layers):
        random = torch.randn(base.hidden_size, settings.group_dim, generator=generator)
        layers[index] = Router(
            projection=torch.linalg.qr(random).Q,
            centroids=torch.eye(settings.num_groups, settings.group_dim),
            potential=torch.zeros(settings.num_groups),
        )
    save_adapter(Adapter(config=settings, base_model=base, layers=layers, training={"random": 0}), path)


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """One side's work, as its process gets it."""

    model: str
    vocab: int
    adapter: str | None
    cases: list[str]
    output_tokens: int
    max_model_len: int
    deadline: float
    """`time.time()` after which no case is started."""
    vllm: dict[str, Any]
    result: str
    """JSON file to write and go on from."""


class Measured:
    """One side's engine."""

    def __init__(self, side: Side) -> None:
        from vllm import LLM

        from focus_vllm.engine.plugin import register

        register()
        self.side = side
        extra = {} if side.adapter is None else {"focus": {"adapter": side.adapter}}
        self.llm = LLM(
            model=side.model, load_format="dummy", skip_tokenizer_init=True, max_model_len=side.max_model_len,
            additional_config=extra, seed=0, disable_log_stats=False,
            worker_extension_cls="loadtest.engine.MeasuredWorker", **side.vllm,
        )  # fmt: skip

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[RequestOutput]]:
        """Return the seconds that `tokens` tokens of every prompt took, and what vLLM returned."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        start = time.perf_counter()
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        return time.perf_counter() - start, outputs

    def prompts_of(self, batch: int, length: int, seed: int) -> list[list[int]]:
        """Return random prompts."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        most = min(120000, self.side.vocab)
        return torch.randint(10, most, (batch, length), generator=generator).tolist()

    def run(self, case: Case) -> dict[str, Any]:
        """Measure one case."""
        if case.profile == "host":
            return self.profile_host(case)
        prompts = self.prompts_of(case.batch, case.prompt, 1000 * case.batch + case.prompt)
        if case.profile:
            return {"kernels": self.profile(case, prompts)}
        if case.more:
            turns = self.uncached(case, TURNS)
            return {"ttft": statistics.median(self.generate(batch, 1)[0] for batch in turns)}
        self.llm.reset_prefix_cache()
        if case.tokens:
            took, _ = self.generate(prompts, case.tokens)
            return {"seconds": took, "tokens_per_second": case.batch * (case.prompt + case.tokens) / took}
        first, _ = self.generate(prompts, 1)
        accepted = self.accepted()
        tokens = self.side.output_tokens
        result = {"ttft": first, "tpot": self.per_token(prompts, tokens)}
        accepted = self.accepted() - accepted
        if accepted:  # each step gives one more than it accepts
            result["tokens_per_step"] = tokens / (tokens - accepted / case.batch)
        return result

    def per_token(self, prompts: list[list[int]], tokens: int) -> float:
        """Return the seconds per token of `tokens` after the first, by the clock of vLLM's engine."""
        _, outputs = self.generate(prompts, 1 + tokens)
        return statistics.fmean(map(decode_seconds, outputs)) / tokens

    def uncached(self, case: Case, count: int) -> list[list[list[int]]]:
        """Return batches of which nothing is cached but, of a case of turns, the prompt before them."""
        self.llm.reset_prefix_cache()
        seeds = range(7_000_000, 7_000_000 + count)
        news = [self.prompts_of(case.batch, case.more or case.prompt, seed) for seed in seeds]
        if not case.more:
            return news
        prompts = self.prompts_of(case.batch, case.prompt, 8_000_000)
        self.generate(prompts, 1)
        return [[old + new for old, new in zip(prompts, batch, strict=True)] for batch in news]

    def accepted(self) -> int:
        """Return how many tokens were drafts, of all requests so far."""
        metrics = {metric.name: metric for metric in self.llm.get_metrics()}
        counter = metrics.get("vllm:spec_decode_num_accepted_tokens")
        return getattr(counter, "value", 0)

    def profile_host(self, case: Case) -> dict[str, Any]:
        """Return the median time to the first token, or per output token, and what Python's functions take.

        They have microseconds a prompt, or a decode step. With them what else may take Python's time:
        collections of garbage, by generation, their microseconds, and the names of threads.
        """
        count = HOST_PROMPTS * max(case.tokens, 1)
        spent: dict[tuple[str, int, str], tuple[int, float]] = {}
        if case.tokens:
            self.llm.reset_prefix_cache()
            batches = [self.prompts_of(case.batch, case.prompt, 7_000_000)] * HOST_PROMPTS
            self.generate(batches[0], 1)
            times = [self.per_token(prompts, case.tokens) for prompts in batches]
            spent = self.python_of(batches, 1)  # with the first token: what is left are steps
        else:
            times = [self.generate(prompts, 1)[0] for prompts in self.uncached(case, HOST_PROMPTS)]
            batches = self.uncached(case, HOST_PROMPTS)
        before = [stats["collections"] for stats in gc.get_stats()]
        collecting = {"start": 0.0, "stop": 0.0}

        def watch(phase: str, _: dict[str, int]) -> None:
            collecting[phase] += time.perf_counter()

        gc.callbacks.append(watch)
        recorded = self.python_of(batches, 1 + case.tokens)
        gc.callbacks.remove(watch)
        after = [stats["collections"] for stats in gc.get_stats()]
        functions: list[dict[str, Any]] = []
        for function, (calls, own) in recorded.items():
            (file, line, name), (first_calls, first) = function, spent.get(function, (0, 0.0))
            functions.append(
                {
                    "kernel": f"{Path(file).name}:{line} {name}",
                    "launches": (calls - first_calls) / count,
                    "us": 1e6 * (own - first) / count,
                }
            )
        functions.sort(key=lambda function: -function["us"])
        return {
            "tpot" if case.tokens else "ttft": statistics.median(times),
            "collections": [(end - start) / count for start, end in zip(before, after, strict=True)],
            "collecting_us": 1e6 * (collecting["stop"] - collecting["start"]) / count,
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "kernels": functions[:60],
        }

    def python_of(
        self, batches: list[list[list[int]]], tokens: int
    ) -> dict[tuple[str, int, str], tuple[int, float]]:
        """Return calls and own seconds of every function while batches get `tokens` tokens, one by one."""
        recording = cProfile.Profile()
        for prompts in batches:
            recording.runcall(self.generate, prompts, tokens)
        stats = pstats.Stats(recording).stats  # type: ignore[attr-defined]
        return {function: (calls, own) for function, (_, calls, own, _, _) in stats.items()}

    def profile(self, case: Case, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """Return the kernels of the prompts' last chunk, or of one decode step, with microseconds."""
        import torch

        from loadtest.kernels import kernel_table

        activities = [torch.profiler.ProfilerActivity.CUDA]
        if case.profile == "prefill":
            chunk = self.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
            if case.more:
                (prompts,) = self.uncached(case, 1)
            else:
                self.llm.reset_prefix_cache()
                whole = (case.prompt - chunk) // 128 * 128  # blocks that the prefix cache can give back
                self.generate([prompt[: max(whole, 1)] for prompt in prompts], 1)
                prompts = [prompt[: whole + chunk] for prompt in prompts]
            with torch.profiler.profile(activities=activities) as recording:
                self.generate(prompts, 1)
            return kernel_table(recording, 1)
        # Twice, of different lengths: the difference is decode steps alone.
        self.generate(prompts, 1)
        recordings = []
        for tokens in (2, 2 + PROFILED_STEPS):
            with torch.profiler.profile(activities=activities) as recording:
                self.generate(prompts, tokens)
            recordings.append({kernel["kernel"]: kernel for kernel in kernel_table(recording, 1)})
        short, long = recordings
        nothing = {"launches": 0.0, "us": 0.0}
        rows = [
            {
                "kernel": name,
                **{key: (row[key] - short.get(name, nothing)[key]) / PROFILED_STEPS for key in nothing},
            }
            for name, row in long.items()
        ]
        return sorted((row for row in rows if row["launches"] > 0), key=lambda row: -row["us"])


def decode_seconds(output: RequestOutput) -> float:
    """Return the seconds from a request's first token to its last, by the clock of vLLM's engine."""
    stats = output.metrics
    assert stats is not None  # unless vLLM does not log them
    return stats.last_token_ts - stats.first_token_ts


def serve(side: Side) -> None:
    """Run one side in this process; what it has measured is in the file after every case."""
    from loadtest.kernels import read_json, write_json

    path = Path(side.result)
    result = read_json(path) | {"complete": False}
    rows = result.setdefault("rows", {})
    start = time.time()
    engine = Measured(side)
    result["start_seconds"] = time.time() - start
    result["memory_at_start"] = engine.llm.collective_rpc("focus_memory")
    if "checked" not in result:
        length = min(CHECKED_PROMPT, side.max_model_len // 2)
        _, outputs = engine.generate(engine.prompts_of(1, length, 0), CHECKED_TOKENS)
        result["checked"] = [list(output.outputs[0].token_ids) for output in outputs]
    engine.generate(engine.prompts_of(1, min(20000, side.max_model_len - 16), 1), 8)
    for text in side.cases:
        if text in rows:
            continue
        if time.time() > side.deadline:
            spent = f"time is over, {result['start_seconds']:.0f} s of it for the start"
            print(f"{text} is not measured: {spent}; raise --limit", file=sys.stderr)  # noqa: T201
            continue
        rows[text] = engine.run(Case.parse(text))
        print(text, {key: value for key, value in rows[text].items() if key != "kernels"}, file=sys.stderr)  # noqa: T201
        write_json(path, result)
    cache = engine.llm.llm_engine.vllm_config.cache_config
    result |= {
        "complete": True,
        "memory_at_end": engine.llm.collective_rpc("focus_memory"),
        "kv_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        "group_shares": engine.llm.collective_rpc("group_shares"),
        "keys": engine.llm.collective_rpc("focus_stats"),
    }
    write_json(path, result)


def compare(sides: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each measured case, with ratios where both sides have it; profiles are left out.

    Raises:
        RuntimeError: The sides disagree where they must not.
    """
    checked = [side["checked"] for side in sides.values() if "checked" in side]
    if checked[1:] and checked[0] != checked[1]:
        raise RuntimeError(
            f"a prompt of {CHECKED_PROMPT} tokens goes on with {checked[0]} in stock vLLM and with "
            f"{checked[1]} with Focus; nothing is reported"
        )
    stock, focus = (sides.get(name, {}).get("rows", {}) for name in ("stock", "focus"))
    rows = []
    for text in [*stock, *(text for text in focus if text not in stock)]:
        case = Case.parse(text)
        if case.profile in ("prefill", "decode"):
            continue
        dense, ours = stock.get(text, {}), focus.get(text, {})
        row: dict[str, Any] = {"case": text, "batch": case.batch, "prompt": case.prompt}
        for name in ("ttft", "tpot", "seconds"):
            row |= {
                f"{side}_{name}": values[name]
                for side, values in (("stock", dense), ("focus", ours))
                if name in values
            }
            if name in dense and name in ours:
                row[f"{name}_ratio"] = dense[name] / ours[name]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text: what is missing was not measured."""

    def cell(row: dict[str, Any], key: str, scale: float, width: int, form: str) -> str:
        return format(row[key] * scale, f">{width}{form}") if key in row else " " * width

    lines = [
        f"{'case':>16}"
        + "".join(f"{name:>12}{'Focus':>11}{'':>8}" for name in ("TTFT s", "TPOT ms", "whole s"))
    ]
    for row in rows:
        line = f"{row['case']:>16}"
        for name, scale in (("ttft", 1), ("tpot", 1e3), ("seconds", 1)):
            line += cell(row, f"stock_{name}", scale, 12, ".3f") + cell(
                row, f"focus_{name}", scale, 11, ".3f"
            )
            line += cell(row, f"{name}_ratio", 1, 7, ".2f") + ("x" if f"{name}_ratio" in row else " ")
        lines.append(line.rstrip())
    return "\n".join(lines)


def _in_its_own_process(side: Side, directory: Path) -> None:
    request = directory / "request.json"
    request.write_text(json.dumps(dataclasses.asdict(side)))
    command = [sys.executable, "-m", "loadtest.engine", "--serve", str(request)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        process.wait(max(1.0, side.deadline - time.time()) + 30)
    except subprocess.TimeoutExpired:
        print("stopped: out of time", file=sys.stderr)  # noqa: T201
    else:
        if process.returncode:
            print(f"this side ended with status {process.returncode}", file=sys.stderr)  # noqa: T201
    finally:
        with contextlib.suppress(ProcessLookupError):  # its workers too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    """Measure the sides, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--cases", nargs="+", type=Case.parse, default=[Case(1, 4096), Case(1, 131072)])
    parser.add_argument("--side", choices=["stock", "focus"], help="run one side only")
    parser.add_argument("--output-tokens", type=int, default=64, help="tokens after the first")
    parser.add_argument("--max-model-len", type=int, help="default: what the cases need")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--focus", type=json.loads, default={}, help="FocusConfig fields as JSON")
    parser.add_argument("--vllm", type=json.loads, default={}, help="vLLM engine arguments as JSON")
    parser.add_argument("--output", type=Path, help="JSON file to write, and to go on from")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and short prompts")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(Side(**json.loads(args.serve.read_text())))
        return
    deadline = time.time() + args.limit - 40
    if args.smoke:
        args.shape, args.output_tokens = "tiny", 4
        args.cases = [Case(1, 300), Case(2, 200), Case(2, 100, tokens=8), Case(1, 300, more=30)]
        args.focus, args.vllm = {"dense_below": 128, "window": 32}, {"enforce_eager": True, **args.vllm}
    from loadtest.kernels import environment, read_json, write_json

    content = read_json(args.output) or {"sides": {}}
    content |= {"environment": environment(), "shape": args.shape, "focus": args.focus, "vllm": args.vllm}
    longest = args.max_model_len or max(
        case.prompt + case.more + (case.tokens or args.output_tokens) + 16 for case in args.cases
    )
    # The faster side first: what it leaves of its half of the time is the other's.
    names = [args.side] if args.side else ["focus", "stock"]
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_model(directory, SHAPES[args.shape], longest)
        adapter = directory / "focus.safetensors"
        write_balanced_adapter(adapter, directory, args.focus)
        for left, name in zip(range(len(names), 0, -1), names, strict=True):
            result = directory / f"{name}.json"
            write_json(result, content["sides"].get(name, {}))
            side = Side(
                str(directory), SHAPES[args.shape]["vocab_size"], str(adapter) if name == "focus" else None,
                [str(case) for case in args.cases], args.output_tokens, longest,
                time.time() + (deadline - time.time()) / left, args.vllm, str(result),
            )  # fmt: skip
            _in_its_own_process(side, directory)
            content["sides"][name] = json.loads(result.read_text())
            if args.output:
                write_json(args.output, content)
    content["rows"] = compare(content["sides"])
    print(table(content["rows"]))  # noqa: T201
    for name, measured in content["sides"].items():
        for text, row in measured.get("rows", {}).items():
            for kernel in row.get("kernels", [])[:25]:
                print(f"{name} {text} {kernel['us']:10.1f} us {kernel['launches']:7.1f}  {kernel['kernel']}")  # noqa: T201
        print(name, {key: value for key, value in measured.items() if key != "rows"})  # noqa: T201
    if args.output:
        write_json(args.output, content)


if __name__ == "__main__":
    main()
