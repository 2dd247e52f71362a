"""vLLM offline on a GPU, stock against Focus: time to first token and time per output token.

    python -m loadtest.engine --shape 8b --output engine.json --cases 1x4096 1x131072 4x131072

A case is BATCHxPROMPT. The model has random weights of the shape named, and routers whose folded rows are
orthogonal and of one length, so that groups are balanced by symmetry; the output says how well. Speed is what
a trained model would have; the text is noise. Each side runs in its own process with vLLM's defaults.

The time to first token is that of a request for one token; of a batch, until the last has its first. Then
the same prompts, by now in the prefix cache, are continued, and the time per output token is that of all
tokens but the first. Nothing is reported if Focus does not continue a prompt below `dense_below` with stock
vLLM's tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
}  # fmt: skip
"""Llama-3.2-1B and Llama-3.1-8B."""
CHECKED_PROMPT = 1500
CHECKED_TOKENS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One side's work."""

    model: str
    adapter: str | None
    cases: list[tuple[int, int]]
    output_tokens: int
    max_model_len: int
    vllm: dict[str, Any]


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


def group_shares(model: Any) -> list[float] | None:
    """Return the smallest and largest share of cached tokens in a group, over layers; None without Focus."""
    state = getattr(model, "focus", None)
    if state is None:
        return None
    shares = []
    for layer in state.layers.values():
        used = layer.store[layer.store != 0].int()
        shares += [(used >> group & 1).float().mean().item() for group in range(layer.config.num_groups)]
    return [min(shares), max(shares)]


def serve(run: Run) -> dict[str, Any]:
    """Run one side in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from focus_vllm.engine.plugin import register

    register()
    extra = {} if run.adapter is None else {"focus": {"adapter": run.adapter}}
    llm = LLM(
        model=run.model, load_format="dummy", skip_tokenizer_init=True, max_model_len=run.max_model_len,
        additional_config=extra, seed=0, disable_log_stats=True, **run.vllm,
    )  # fmt: skip
    free, total = torch.cuda.mem_get_info()

    def generate(prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return time.perf_counter() - start, [list(output.outputs[0].token_ids) for output in outputs]

    def prompts_of(batch: int, length: int, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(10, 120000, (batch, length), generator=generator).tolist()

    _, checked = generate(prompts_of(1, CHECKED_PROMPT, 0), CHECKED_TOKENS)
    generate(prompts_of(1, 20000, 1), 8)
    rows = []
    for batch, length in run.cases:
        llm.reset_prefix_cache()
        prompts = prompts_of(batch, length, 1000 * batch + length)
        first, _ = generate(prompts, 1)
        again, _ = generate(prompts, 1)
        whole, _ = generate(prompts, 1 + run.output_tokens)
        row = {"batch": batch, "prompt": length, "ttft": first, "tpot": (whole - again) / run.output_tokens}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)  # noqa: T201
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "rows": rows,
        "checked": checked,
        "used_gib": (total - free) / 2**30,
        "kv_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        "group_shares": llm.apply_model(group_shares)[0],
    }


def compare(sides: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the table's rows.

    Raises:
        RuntimeError: The sides disagree where they must not.
    """
    stock, focus = sides["stock"], sides["focus"]
    if stock["checked"] != focus["checked"]:
        raise RuntimeError(
            f"a prompt of {CHECKED_PROMPT} tokens goes on with {stock['checked']} in stock vLLM and with "
            f"{focus['checked']} with Focus; nothing is reported"
        )
    rows = []
    for dense, ours in zip(stock["rows"], focus["rows"], strict=True):
        row = {"batch": dense["batch"], "prompt": dense["prompt"]}
        for name in ("ttft", "tpot"):
            row |= {
                f"stock_{name}": dense[name],
                f"focus_{name}": ours[name],
                f"{name}_ratio": dense[name] / ours[name],
            }
        rows.append(row)
    return rows


def _in_its_own_process(run: Run, directory: Path) -> dict[str, Any]:
    request, response = directory / "request.json", directory / "response.json"
    request.write_text(json.dumps(dataclasses.asdict(run)))
    command = [sys.executable, "-m", "loadtest.engine", "--serve", str(request), str(response)]
    subprocess.run(command, check=True)
    result: dict[str, Any] = json.loads(response.read_text())
    return result


def _case(text: str) -> tuple[int, int]:
    batch, _, prompt = text.partition("x")
    return int(batch), int(prompt)


def main() -> None:
    """Measure both sides, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--cases", nargs="+", type=_case, default=[(1, 4096), (1, 32768), (1, 131072)])
    parser.add_argument("--output-tokens", type=int, default=64, help="tokens after the first")
    parser.add_argument("--focus", type=json.loads, default={}, help="FocusConfig fields as JSON")
    parser.add_argument("--vllm", type=json.loads, default={}, help="vLLM engine arguments as JSON")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--serve", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        request = json.loads(args.serve[0].read_text())
        args.serve[1].write_text(json.dumps(serve(Run(**request))))
        return
    from loadtest.kernels import environment, write_json

    longest = max(prompt for _, prompt in args.cases) + args.output_tokens + 16
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_model(directory, SHAPES[args.shape], longest)
        adapter = directory / "focus.safetensors"
        write_balanced_adapter(adapter, directory, args.focus)
        run = Run(str(directory), None, args.cases, args.output_tokens, longest, args.vllm)
        sides = {
            "stock": _in_its_own_process(run, directory),
            "focus": _in_its_own_process(dataclasses.replace(run, adapter=str(adapter)), directory),
        }
    rows = compare(sides)
    titles = f"{'stock TTFT s':>14}{'Focus TTFT s':>14}{'':>8}{'stock TPOT ms':>15}{'Focus TPOT ms':>15}"
    print(f"{'batch':>5}{'prompt':>9}{titles}")  # noqa: T201
    for row in rows:
        print(  # noqa: T201
            f"{row['batch']:>5}{row['prompt']:>9}{row['stock_ttft']:>14.3f}{row['focus_ttft']:>14.3f}"
            f"{row['ttft_ratio']:>7.2f}x{row['stock_tpot'] * 1e3:>15.2f}{row['focus_tpot'] * 1e3:>15.2f}"
            f"{row['tpot_ratio']:>7.2f}x"
        )
    extras = {side: {key: value for key, value in sides[side].items() if key != "rows"} for side in sides}
    print(extras)  # noqa: T201
    if args.output:
        content = {"environment": environment(), "shape": args.shape, "focus": args.focus, "sides": extras}
        write_json(args.output, {**content, "rows": rows})


if __name__ == "__main__":
    main()
