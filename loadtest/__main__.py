"""Load tests of focus-serve, dense against Focus, and what follows from them.

python -m loadtest run      measure, and write a report
python -m loadtest report   write the report again
python -m loadtest advise   estimate the gain for the prompts of an access log
python -m loadtest plan     estimate how many GPUs a load needs
python -m loadtest shape    write a model of a known shape with random weights, and an adapter for it

docs/loadtest.md explains them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from server.objectives import UNITS

RESULTS = Path(__file__).parents[1] / "docs/results"
DENSE_SHARE = 0.66
"""Of a run's time limit, what dense may use with its start; Focus has the rest for the same cells."""
STOP_SECONDS = 15
"""Of the limit, kept for the last server's end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 1 if a measurement should not be trusted, 2 if nothing could be done."""
    options = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = options.function
    try:
        return command(options)
    except (OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"loadtest: {error}\n")
        return 2


def _run(options: argparse.Namespace) -> int:
    from loadtest.bench import Cell, Result, Target
    from loadtest.manifest import describe
    from loadtest.recording import Recording, earlier
    from loadtest.scenarios import Clock, Plan, run_plan

    if bool(options.dense) != bool(options.focus) or bool(options.dense) == bool(options.adapter):
        raise ValueError("give --dense and --focus, two running servers, or --adapter, to have them started")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no server is left behind
    began = time.monotonic()
    importlib.import_module("vllm.benchmarks.serve")  # takes seconds that no cell should be charged with
    if options.adapter:
        _check(options)
    lengths = sorted(options.lengths)
    plan = Plan(
        lengths=lengths,
        concurrencies=sorted(options.concurrency),
        rates=options.rates,
        turns=options.turns,
        beside=lengths[-1] if options.beside is None else options.beside,
        requests=options.requests,
        tokens=options.tokens,
        output_tokens=options.output_tokens,
        seed=options.seed,
        fewest=options.fewest,
        warm_up=options.warm_up,
    )
    info: dict[str, Any] = {}
    manifest: dict[str, Any] = {
        "title": options.title,
        **describe(info),
        "plan": dataclasses.asdict(plan),
        "objectives": {"ttft": options.slo_ttft, "tpot": options.slo_tpot},
        "quality": _quality(options.quality),
        "left_out": [],
    }
    sides = {"dense": DENSE_SHARE, "focus": 1.0}
    problems: list[str] = []
    kv_tokens: int | None = None
    wanted: list[Cell] | None = None
    if options.resume:
        before, wanted = earlier(options.output, plan)
        del sides["dense"]
        info["dense"] = before["servers"]["dense"]
        kv_tokens = info["dense"]["kv_tokens"]
        problems += before["problems"]
        manifest["left_out"] += before["left_out"]
    recording = Recording(options.output, manifest, problems, append=options.resume)

    def report(result: Result) -> None:
        row = recording.add(result)
        sys.stdout.write(
            f"{time.monotonic() - began:6.1f} s  {row['side']:6} {row['scenario']:7} "
            f"{row['length']:>8} x {row['concurrency'] or '-'!s:3} "
            f"TTFT {row['ttft_p50']:.3f} s  {row['requests_per_second']:.2f} requests/s\n"
        )
        sys.stdout.flush()

    for side, share in sides.items():
        with _server(options, side) as url:
            target = Target.at(url, options.tokenizer, options.api_key)
            info[side], room = _about(target)
            info[side]["kv_tokens"] = room
            manifest["title"] = options.title or f"{info[side]['model']}, measured over HTTP"
            kv_tokens = min(kv_tokens or room, room) if room else kv_tokens
            end = options.limit and began + (options.limit - STOP_SECONDS) * share
            clock = Clock(end and end - time.monotonic())
            wanted, left_out = run_plan(plan, target, side, kv_tokens, report, clock, wanted, problems.append)
            manifest["left_out"] += [cell.name for cell in left_out]
            if left_out and not wanted:
                problems.append(f"{side}: nothing was measured, for the limit left no time")
    path = recording.write(ended=True)
    sys.stdout.write("".join(f"! {problem}\n" for problem in problems) + f"{path}\n")
    return 1 if problems else 0


@contextlib.contextmanager
def _server(options: argparse.Namespace, side: str) -> Iterator[str]:
    """Give the address of a running server, or of one that runs until the block ends."""
    from loadtest.serving import serving

    if url := getattr(options, side):
        yield url.rstrip("/")
        return
    with serving(_command(options, side), options.output / f"{side}.log") as server:
        yield server.url


def _command(options: argparse.Namespace, side: str) -> list[str]:
    from loadtest.serving import FOCUS_SERVE

    adapter = "none" if side == "dense" else options.adapter
    return [*FOCUS_SERVE, "--model", options.model, "--adapter", adapter, *options.flags]


def _check(options: argparse.Namespace) -> None:
    """Find out that the second server cannot start before the first has been measured."""
    check = subprocess.run([*_command(options, "focus"), "--dry-run"], capture_output=True, text=True)
    if check.returncode:
        raise RuntimeError(check.stderr.strip())


def _about(target: Any) -> tuple[dict[str, Any], int | None]:
    from loadtest.bench import Metrics, _get

    info = {"model": target.model}
    with contextlib.suppress(OSError):
        info |= json.loads(_get(f"{target.url}/focus/info", target.headers))
    with contextlib.suppress(OSError):
        info["vllm"] = json.loads(_get(f"{target.url}/version", target.headers))["version"]
    return info, Metrics(target.url, target.headers).kv_tokens


def _quality(path: Path | None) -> list[dict[str, Any]] | None:
    """Read what `focus-vllm evaluate --json` printed; the first row is dense's."""
    if path is None:
        return None
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    if not isinstance(rows, list) or not rows or rows[0].get("name") != "dense":
        raise ValueError(
            f"{path} is not what focus-vllm evaluate --json prints: its first row must be dense's"
        )
    return rows


def _report(options: argparse.Namespace) -> int:
    from loadtest.report import write_report

    if options.quality:
        path = options.folder / "manifest.json"
        manifest = {**json.loads(path.read_text()), "quality": _quality(options.quality)}
        path.write_text(json.dumps(manifest, indent=1) + "\n")
    sys.stdout.write(f"{write_report(options.folder)}\n")
    return 0


def _advise(options: argparse.Namespace) -> int:
    from loadtest.advise import Measured, advice, read_trace

    with options.trace.open() as lines:
        trace = read_trace(lines)
    sys.stdout.write(advice(trace, Measured.read(options.measured)))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from loadtest.advise import Measured
    from loadtest.capacity import plan

    measured = Measured.read(options.measured)
    sys.stdout.write(plan(measured, options.shape, options.gpus, options.lengths, options.rate))
    return 0


def _shape(options: argparse.Namespace) -> int:
    import shutil

    from loadtest.engine import SHAPES, write_balanced_adapter, write_model
    from server.models import DEMO_FOLDER

    options.output.mkdir(parents=True, exist_ok=True)
    words = json.loads((DEMO_FOLDER / "config.json").read_text())["vocab_size"]
    shape = {**SHAPES[options.shape]}
    shape["vocab_size"] = max(shape["vocab_size"], words)  # for the demo's tokenizer
    write_model(options.output, shape, options.max_model_len)
    shutil.copy(DEMO_FOLDER / "tokenizer_config.json", options.output)
    tokenizer = json.loads((DEMO_FOLDER / "tokenizer.json").read_text())
    # Random weights say tokens that it lacks. One without a text has vLLM decode the whole prompt again.
    like = {**tokenizer["added_tokens"][0], "special": False}
    tokenizer["added_tokens"] += [
        {**like, "id": number, "content": f" [{number}]"} for number in range(words, shape["vocab_size"])
    ]
    (options.output / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_balanced_adapter(options.output / "focus.safetensors", options.output, json.loads(options.focus))
    adapter = options.output / "focus.safetensors"
    sys.stdout.write(f"focus-serve --model {options.output} --adapter {adapter} --load-format dummy\n")
    return 0


def length(text: str) -> int:
    """Read a number of tokens: 1000, 8k, 1m."""
    unit = text[-1:].lower()
    return int(float(text[:-1]) * UNITS[unit]) if unit in ("k", "m") else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="measure, and write a report")
    run.set_defaults(function=_run)
    run.add_argument("--output", type=Path, required=True, help="folder for the report and what is behind it")
    run.add_argument("--model", default="demo", help="what focus-serve --model takes")
    run.add_argument("--adapter", help="what focus-serve --adapter takes; the other side is served without")
    run.add_argument("--dense", metavar="URL", help="a running server without Focus")
    run.add_argument("--focus", metavar="URL", help="a running server of the same model with Focus")
    run.add_argument("--api-key", help="for those servers")
    run.add_argument("--tokenizer", help="default: the model's")
    run.add_argument("--lengths", type=length, nargs="+", default=[length(f"{2**n}k") for n in range(3, 10)])
    run.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    run.add_argument("--rates", type=float, nargs="*", default=[], help="requests per second, for goodput")
    run.add_argument("--turns", type=int, default=6, help="of one conversation; 0: none")
    run.add_argument(
        "--beside",
        type=length,
        metavar="LENGTH",
        help="of the prompt that short requests meet (default: the longest; 0: none)",
    )
    run.add_argument("--requests", type=int, default=32, help="per cell")
    run.add_argument("--fewest", type=int, default=3, help="per cell, however long prompts are")
    run.add_argument(
        "--warm-up",
        type=length,
        metavar="LENGTH",
        help="longest prompt of which one is sent beforehand (default: of every length)",
    )
    run.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="for the whole command: cells that would take longer are left out, on both sides",
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="measure Focus where an earlier run into the same folder measured dense alone",
    )
    run.add_argument(
        "--tokens", type=length, default="2m", help="prompt tokens per cell: fewer requests if long"
    )
    run.add_argument("--output-tokens", type=int, default=64)
    run.add_argument("--slo-ttft", default="1+0.1/1k", help="seconds, and more per 1024 prompt tokens")
    run.add_argument("--slo-tpot", default="0.05+0.0001/1k", help="the same per output token")
    run.add_argument("--seed", type=int, default=1)
    run.add_argument("--title", help="what the report says on top")
    run.add_argument("flags", nargs="*", metavar="-- FLAGS", help="more for both servers")

    report = commands.add_parser("report", help="write the report again")
    report.set_defaults(function=_report)
    report.add_argument("folder", type=Path)
    for command in (run, report):
        command.add_argument(
            "--quality",
            type=Path,
            metavar="JSON",
            help="what focus-vllm evaluate --json printed, to show beside",
        )

    advise = commands.add_parser("advise", help="estimate the gain for the prompts of an access log")
    advise.set_defaults(function=_advise)
    advise.add_argument("--trace", type=Path, required=True, help="focus-serve's log with --log-format json")
    plan = commands.add_parser("plan", help="estimate how many GPUs a load needs")
    plan.set_defaults(function=_plan)
    plan.add_argument("--shape", choices=["8b", "70b"], default="70b")
    plan.add_argument("--gpus", type=int, default=8, help="of a replica")
    plan.add_argument("--lengths", type=length, nargs="+", default=[length(f"{2**n}k") for n in range(3, 11)])
    plan.add_argument("--rate", type=float, default=1.0, help="prompts per second")
    for command, measured in ((advise, "http-h200.jsonl"), (plan, "engine-h200.json")):
        command.add_argument(
            "--measured",
            type=Path,
            default=RESULTS / measured,
            help="a file of docs/results, or the cells.jsonl of a run (default: %(default)s)",
        )

    shape = commands.add_parser("shape", help="write a model of a known shape with random weights")
    shape.set_defaults(function=_shape)
    shape.add_argument("--shape", default="8b")
    shape.add_argument("--output", type=Path, required=True)
    shape.add_argument("--max-model-len", type=length, default="1m")
    shape.add_argument("--focus", default="{}", help="settings of the adapter, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
