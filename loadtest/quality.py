"""Quality experiments on a model, many to a GPU: what stands in docs/quality.md.

    python -m loadtest.quality pack --model M --train text.xz --held-out books.xz --out pack.safetensors
    python -m loadtest.quality run frontier --model M --pack pack.safetensors --out results.jsonl
    python -m loadtest.quality_report results.jsonl --out docs/quality

`pack` tokenises once, so that the machine with the GPU needs neither text nor tokenizer. `run` goes through
the units of a plan, several processes at a time, and appends one JSON line for each that is done; units that
are in the file already are skipped, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from focus_vllm.adapter import Adapter, BaseModel, save_adapter
from focus_vllm.config import FocusConfig
from focus_vllm.training import evaluate as ways
from focus_vllm.training.data import copy_spans, read_documents, shuffled_tokens, tokenize
from focus_vllm.training.evaluate import evaluate
from focus_vllm.training.finetune import finetune
from focus_vllm.training.probes import TASKS, Probe, make_probes
from focus_vllm.training.settings import TrainSettings
from focus_vllm.training.train import optimise, train
from focus_vllm.training.tune import tune

TEXT_SEED = 1234
LONG, WHOLE, SHORT = 16_384, 8192, 4096
TRAIN_TOKENS, BOOK_TOKENS = 4_000_000, 1_200_000
SEQUENCES = {"books": 16, "wikipedia": 8, "code": 8}
PROBES = 8
LOCAL_WINDOWS = (256, 512, 768, 1024, 1280, 1536, 2048, 2560, 3072)

Unit = dict[str, Any]


def pack(model: str, train_file: Path, held_out: Path, out: Path) -> dict[str, int]:
    """Tokenise training and held-out text into one file of 16-bit tokens.

    Books are the documents of `held_out`. From `train_file`, some long articles and some Python PEPs are set
    aside to measure on, and not trained on.

    Returns:
        How many tokens each part has.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = read_documents(train_file)
    apart = {
        "wikipedia": _longest([text for text in documents if _is_article(text)], SEQUENCES["wikipedia"]),
        "code": _longest([text for text in documents if _is_pep(text)], SEQUENCES["code"]),
    }
    hidden = {document for part in apart.values() for document in part}
    rest = [document for document in documents if document not in hidden]
    books = [document for document in rest if not _is_article(document) and not _is_pep(document)]
    tensors = {
        "train": shuffled_tokens(rest, tokenizer, TRAIN_TOKENS, TEXT_SEED),
        "train_books": shuffled_tokens(books, tokenizer, BOOK_TOKENS, TEXT_SEED),
        "books": _rows(read_documents(held_out), tokenizer, LONG, SEQUENCES["books"]),
        "wikipedia": _rows(apart["wikipedia"], tokenizer, WHOLE, SEQUENCES["wikipedia"]),
        "code": _rows(apart["code"], tokenizer, SHORT, SEQUENCES["code"]),
    }
    for task in TASKS:
        probes = make_probes(task, tokenizer, WHOLE, PROBES)
        width = max(len(probe.token_ids) for probe in probes)
        # Shorter ones are padded in front with -1, which fits in no vocabulary.
        rows = torch.full((len(probes), width), -1)
        for row, probe in zip(rows, probes, strict=True):
            row[width - len(probe.token_ids) :] = probe.token_ids
        tensors[f"probes.{task}"] = rows
        tensors[f"answers.{task}"] = torch.tensor([probe.answer for probe in probes])
    out.parent.mkdir(parents=True, exist_ok=True)
    small = {name: _narrow(tensor) for name, tensor in tensors.items()}
    save_file(small, out)
    return {name: tensor.numel() for name, tensor in tensors.items()}


def _narrow(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.to(torch.int16 if tokens.max() < 2**15 else torch.int32)


def _is_pep(document: str) -> bool:
    return document.startswith("PEP: ")


def _is_article(document: str) -> bool:
    """Wikipedia articles begin with their title on a line of its own and say it again soon."""
    title, _, rest = document.partition("\n")
    name = title.split(" (")[0].strip()
    return 0 < len(name) < 80 and not name.isupper() and name in rest[:300] and len(document) < 200_000


def _longest(documents: Sequence[str], count: int) -> list[str]:
    return sorted(documents, key=len)[-count:]


def _rows(documents: Sequence[str], tokenizer: Any, length: int, count: int) -> torch.Tensor:
    """Cut sequences from the starts of documents, in turn, as many per document as needed."""
    rows: list[torch.Tensor] = []
    per_document = -(-count // len(documents))
    for document in documents:
        ids = tokenize(tokenizer, [document[: per_document * length * 8]])[0]
        whole = min(len(ids) // length, per_document)
        rows += list(torch.tensor(ids[: whole * length]).view(whole, length))
    return torch.stack(rows[:count])


def units_of(plan: str, seeds: int) -> list[Unit]:
    """Return the units of a plan, the most telling first.

    Raises:
        ValueError: There is no such plan.
    """
    if plan not in PLANS:
        raise ValueError(f"plan {plan!r} must be one of {list(PLANS)}")
    units = list(PLANS[plan]())
    repeated = [unit for unit in units if unit["kind"] in ("adapter", "tuned", "books-only", "lora")]
    fixed = [{**unit, "seed": 0, "id": unit["name"]} for unit in units if unit not in repeated]
    return fixed + [
        {**unit, "seed": seed, "id": f"{unit['name']} seed={seed}"}
        for unit in repeated
        for seed in range(seeds)
    ]


def _adapter(
    name: str, num_groups: int, top_ks: Sequence[int], windows: Sequence[int], **changes: Any
) -> Unit:
    """An adapter to train, and the settings under which to measure it."""
    given = ("group_dim", "temperature", "key_k")
    own: dict[str, Any] = {key: changes.pop(key) for key in given if key in changes}
    settings = {
        "steps": 800,
        "train_window": 512,
        "train_top_k": 2,
        **changes,
    }
    serve = [{"top_k": top_k, "window": window} for window in windows for top_k in top_ks]
    config = {"num_groups": num_groups, "window": windows[0], "top_k": top_ks[0], "dense_below": 0, **own}
    return {"kind": "adapter", "name": name, "config": config, "settings": settings, "serve": serve}


def _frontier() -> Iterator[Unit]:
    yield {"kind": "dense", "name": "dense"}
    yield {"kind": "local", "name": "local windows"}
    unit = _adapter("K=18", 18, (2, 4), (1024, 1536, 2048))
    # Few keys go further in a window than in groups.
    few = [{"top_k": 1, "window": window} for window in (768, 1024)]
    yield {**unit, "serve": unit["serve"] + few, "full": True}


def _yardsticks() -> Iterator[Unit]:
    """Random groups and the oracle; windows, top_k and dense layers chosen by measured loss."""
    for num_groups, top_k, window in ((16, 2, 1024), (16, 4, 1024)):
        config = {"num_groups": num_groups, "top_k": top_k, "window": window, "dense_below": 0}
        yield {"kind": "yardsticks", "name": f"random and oracle {top_k}/{num_groups}", "config": config}
    tuned = _adapter("K=16 tuned", 16, (2, 4), (256, 512, 1024, 2048))
    # The keys per query of the first measurements, docs/quality.md.
    yield {**tuned, "kind": "tuned", "keys": [993, 1446, 1853]}


def _ideas() -> Iterator[Unit]:
    """Each differs from the frontier's settings in what its name says, to choose better ones."""
    changes: dict[str, dict[str, Any]] = {
        "balance 0.2": {"balance_weight": 0.2},
        "balance 0": {"balance_weight": 0.0},
        "lr 0.001": {"lr": 0.001},
        "shared": {"queries": "shared"},
        "16 dimensions": {"group_dim": 16},
        "train_top_k 1": {"train_top_k": 1},
        "4096 tokens, train window 1024": {"seq_len": 4096, "batch_size": 2, "train_window": 1024},
        "mass 0": {"mass_weight": 0.0},
        "sharpen 4": {"sharpen": 4.0},
        "dense target": {"target": "dense"},
        "copy_spans 4": {"copy_spans": 4},
        "kmeans": {"init": "kmeans"},
        "no Sinkhorn": {"sinkhorn": 0},
        "key_values 4": {"key_values": 4},
    }
    for name, change in changes.items():
        yield _adapter(f"idea: {name}", 18, (2, 4), (1024,), **change)


def _ablations() -> Iterator[Unit]:
    """One setting at a time, K=16, window 1024."""
    cheap: dict[str, Any] = {"steps": 200}
    window = (1024,)
    yield _adapter("K=16", 16, (2, 4), window, **cheap)
    yield _adapter("K=16 shared", 16, (2, 4), window, queries="shared", **cheap)
    for objective in ("mass", "paper"):
        alone = {**cheap, "objective": objective}
        yield _adapter(f"objective {objective}", 16, (2, 4), window, **alone)
        yield _adapter(f"objective {objective} shared", 16, (2, 4), window, queries="shared", **alone)
    for group_dim in (4, 8, 16, 64):
        yield _adapter(f"d_g={group_dim}", 16, (2, 4), window, group_dim=group_dim, **cheap)
    for tau in (0.05, 0.3, 1.0):
        yield _adapter(f"tau={tau}", 16, (2, 4), window, temperature=tau, **cheap)
    for iterations in (0, 1, 3, 20):
        alone = {**cheap, "sinkhorn": iterations, "balance_weight": 0.0}
        yield _adapter(f"sinkhorn={iterations}", 16, (2, 4), window, **alone)
    alone = {**cheap, "sinkhorn": 0, "balance_weight": 0.0, "queries": "shared"}
    yield _adapter("sinkhorn=0 shared", 16, (2, 4), window, **alone)
    yield _adapter("K=8", 8, (1, 2), (1024,), **cheap)
    own = {"group_dim": 16, "train_top_k": 1, "mass_weight": 0.0, "balance_weight": 0.0, "copy_spans": 0}
    paper = _adapter("K=4, the paper's", 4, (1,), (128,), queries="shared", **own, **cheap)
    yield {**paper, "serve": [{"top_k": k, "key_k": k} for k in (1, 2, 3)]}
    yield _adapter("key_k=2", 16, (2,), window, key_k=2, queries="shared", **cheap)


def _claims() -> Iterator[Unit]:
    """The paper's sections on fine-tuning, training from scratch and LoRA, at a small scale."""
    config = {"num_groups": 4, "group_dim": 16, "window": 128, "top_k": 2, "key_k": 2, "dense_below": 0}
    plain = {"copy_spans": 0, "mass_weight": 0.0, "balance_weight": 0.0, "sharpen": 1.0, "train_top_k": 1}
    settings = {"steps": 200, "queries": "shared", **plain}
    yield {"kind": "books-only", "name": "focus on books", "config": config, "settings": settings}
    yield {"kind": "lora", "name": "lora on books", "settings": settings}
    for centroid_steps in (0, 100):
        name = f"finetune, {centroid_steps} centroid steps"
        more = {"centroid_steps": centroid_steps, "weights_lr": 1e-5}
        yield {"kind": "finetune", "name": name, "config": config, "settings": settings, **more}
    yield {"kind": "finetune-dense", "name": "finetune dense", "settings": settings, "weights_lr": 1e-5}
    for iterations in (10, 3, 0):
        yield {
            "kind": "scratch",
            "name": f"from scratch, sinkhorn={iterations}",
            "config": {**config, "num_groups": 8},
            "settings": {**settings, "sinkhorn": iterations, "seq_len": 1024, "batch_size": 16, "steps": 300},
            "weights_lr": 1e-3,
        }


def _smoke() -> Iterator[Unit]:
    """A few seconds, to see that everything runs."""
    yield {"kind": "dense", "name": "dense"}
    small = _adapter("smoke", 4, (1, 2), (64,), steps=2, batch_size=1, seq_len=512, train_window=32)
    yield {**small, "full": True}
    tuned = _adapter("tuned", 4, (1, 2), (32, 64), steps=1, batch_size=1, seq_len=512, train_window=32)
    yield {**tuned, "kind": "tuned", "keys": [WHOLE // 3]}
    config = {"num_groups": 4, "window": 32, "top_k": 2, "dense_below": 0}
    settings = {"steps": 2, "batch_size": 1, "seq_len": 256, "copy_spans": 0}
    yield {"kind": "yardsticks", "name": "random and oracle", "config": config}
    more = {"centroid_steps": 1, "weights_lr": 1e-5}
    yield {"kind": "finetune", "name": "finetune", "config": config, "settings": settings, **more}
    yield {"kind": "finetune-dense", "name": "finetune dense", "settings": settings, "weights_lr": 1e-5}
    yield {"kind": "scratch", "name": "scratch", "config": config, "settings": settings, "weights_lr": 1e-4}


PLANS = {
    "smoke": _smoke,
    "ideas": _ideas,
    "frontier": _frontier,
    "yardsticks": _yardsticks,
    "ablations": _ablations,
    "claims": _claims,
}


@functools.cache
def _load_pack(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.long() for name, tensor in load_file(path).items()}


def _load_model(path: str) -> PreTrainedModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.to(device)  # type: ignore[arg-type]
    return model


class Bench:
    """A model and the text to train and measure it on."""

    def __init__(
        self, model: str, pack_file: Path, sequences: int | None = None, adapters: Path | None = None
    ) -> None:
        self.model = _load_model(model)
        self.name = Path(model).name
        self.text = _load_pack(pack_file)
        self.sequences = sequences
        """Measure on so many of each kind at most; None takes all."""
        self.adapters = adapters
        """Folder to keep what was trained in; None keeps nothing."""

    def measure(self, way: ways.Way, transfer: bool = False, probes: bool = False) -> dict[str, Any]:
        """Return `Quality` on books and Wikipedia at 8,192 tokens; if asked, on longer books and on tasks."""
        books, articles = (self.text[name][: self.sequences] for name in ("books", "wikipedia"))
        tasks = self._probes() if probes else {}
        found = {
            "books": evaluate(self.model, way, books[:, :WHOLE], (1024, 2048, 4096, 8192), tasks),
            "wikipedia": evaluate(self.model, way, articles),
        }
        if transfer:
            found["long"] = evaluate(self.model, way, books[:8], (1024, 2048, 4096, 8192, 16_384))
        return {name: dataclasses.asdict(quality) for name, quality in found.items()}

    def losses(self, way: ways.Way) -> dict[str, float]:
        """Return perplexity in and out of domain."""
        rows = {name: self.text[name][: self.sequences, :SHORT] for name in ("books", "wikipedia", "code")}
        return {name: evaluate(self.model, way, sequences).perplexity for name, sequences in rows.items()}

    def _probes(self) -> dict[str, list[Probe]]:
        return {
            task: [
                Probe(row[row >= 0], int(answer))
                for row, answer in zip(self.text[f"probes.{task}"], self.text[f"answers.{task}"], strict=True)
            ]
            for task in TASKS
        }

    def focus(self, adapter: Adapter, **changes: Any) -> ways.Way:
        """Return the adapter's mask with some settings changed."""
        config = dataclasses.replace(adapter.config, **changes)
        return ways.focus("focus", self.model, config, adapter.layers)

    def train(self, unit: Unit, text: str) -> Adapter:
        """Train the unit's adapter on a part of the text."""
        config, settings = FocusConfig(**unit["config"]), self.settings(unit)
        base = BaseModel.from_config(self.name, self.model.config)
        adapter = train(self.model, self.text[text], config, settings, base, progress=False)
        if self.adapters is not None:
            self.adapters.mkdir(parents=True, exist_ok=True)
            save_adapter(adapter, self.adapters / f"{re.sub(r'[^a-zA-Z0-9.]+', '-', unit['id'])}.safetensors")
        return adapter

    def settings(self, unit: Unit) -> TrainSettings:
        """Return the unit's training settings; on a GPU the model runs in bfloat16."""
        precision = "bfloat16" if self.model.device.type == "cuda" else "model"
        return TrainSettings(**{"seed": unit["seed"], "precision": precision, **unit["settings"]})


def _run_dense(bench: Bench, unit: Unit) -> dict[str, Any]:
    return {"rows": [{"way": "dense", **bench.measure(ways.dense(), True, True)}]}


def _run_local(bench: Bench, unit: Unit) -> dict[str, Any]:
    rows = []
    for window in LOCAL_WINDOWS:
        way = ways.window_alone(bench.model, FocusConfig(window=window, dense_below=0))
        rows.append({"way": way.name, **bench.measure(way, window == 1024, window == 1024)})
    return {"rows": rows}


def _run_yardsticks(bench: Bench, unit: Unit) -> dict[str, Any]:
    config = FocusConfig(**unit["config"])
    share = config.top_k / config.num_groups
    both = ways.random_groups(bench.model, config), ways.oracle(bench.model, config, share)
    return {"rows": [{"way": way.name, **bench.measure(way)} for way in both]}


def _run_adapter(bench: Bench, unit: Unit) -> dict[str, Any]:
    adapter = bench.train(unit, "train")
    rows = []
    for number, changes in enumerate(unit["serve"]):
        first = number == 0 and unit["seed"] == 0 and unit.get("full", False)
        rows.append({"serve": changes, **bench.measure(bench.focus(adapter, **changes), first, first)})
    parameters = sum(part.numel() for router in adapter.layers.values() for part in router.tensors().values())
    return {"rows": rows, "training": dict(adapter.training), "parameters": parameters}


def _run_tuned(bench: Bench, unit: Unit) -> dict[str, Any]:
    """Choose windows, top_k and dense layers on training text, then measure on held-out text."""
    adapter = bench.train(unit, "train")
    rows = bench.text["train"][: 4 * WHOLE].view(4, WHOLE).clone()
    copy_spans(rows, 8, WHOLE // 4, torch.Generator().manual_seed(unit["seed"]))
    windows, top_ks = ([*{serve[key]: None for serve in unit["serve"]}] for key in ("window", "top_k"))
    found = []
    for keys in unit["keys"]:
        tuning = tune(bench.model, adapter, rows, keys, windows, top_ks)
        config = tuning.adapter.config
        serve = {"keys": keys, "top_k": config.top_k, "window": config.window, "dense": config.dense_layers}
        found.append({"way": f"{unit['name']} to {keys}", **bench.measure(bench.focus(tuning.adapter))})
        found[-1]["chosen"] = serve
    return {"rows": found, "training": dict(adapter.training)}


def _run_books_only(bench: Bench, unit: Unit) -> dict[str, Any]:
    before = bench.losses(ways.dense())
    adapter = bench.train(unit, "train_books")
    return {"before": before, "after": bench.losses(bench.focus(adapter)), "training": dict(adapter.training)}


def _run_lora(bench: Bench, unit: Unit) -> dict[str, Any]:
    """Low-rank updates of the query projections, about as many parameters as the books-only adapter has."""
    from peft import LoraConfig, get_peft_model

    before = bench.losses(ways.dense())
    model, settings = bench.model, bench.settings(unit)
    wrapped: Any = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    optimise(model, bench.text["train_books"], {}, settings, optimizer, progress=False)
    parameters = sum(parameter.numel() for parameter in trained)
    return {"before": before, "after": bench.losses(ways.dense()), "parameters": parameters}


def _run_finetune(bench: Bench, unit: Unit) -> dict[str, Any]:
    before = bench.losses(ways.dense())
    base = BaseModel.from_config(bench.name, bench.model.config)
    given = FocusConfig(**unit["config"]), bench.settings(unit), base, unit["weights_lr"]
    adapter = finetune(
        bench.model, bench.text["train_books"], *given, unit.get("centroid_steps", 0), progress=False
    )
    sparse, dense = bench.losses(bench.focus(adapter)), bench.losses(ways.dense())
    return {"before": before, "after": sparse, "after_dense": dense, "training": dict(adapter.training)}


def _run_finetune_dense(bench: Bench, unit: Unit) -> dict[str, Any]:
    before, settings = bench.losses(ways.dense()), bench.settings(unit)
    optimizer = torch.optim.AdamW(bench.model.parameters(), lr=unit["weights_lr"])
    # The learning rate is given in proportion to settings.lr, and the optimizer's is what it starts from.
    optimise(bench.model, bench.text["train_books"], {}, settings, optimizer, progress=False)
    return {"before": before, "after": bench.losses(ways.dense())}


def _run_scratch(bench: Bench, unit: Unit) -> dict[str, Any]:
    torch.manual_seed(unit["seed"])
    fresh: Any = AutoModelForCausalLM.from_config(bench.model.config)  # type: ignore[no-untyped-call]
    bench.model = fresh.to(bench.model.device, torch.float32).eval()
    return _run_finetune(bench, unit)


KINDS = {
    "dense": _run_dense,
    "local": _run_local,
    "yardsticks": _run_yardsticks,
    "adapter": _run_adapter,
    "tuned": _run_tuned,
    "books-only": _run_books_only,
    "lora": _run_lora,
    "finetune": _run_finetune,
    "finetune-dense": _run_finetune_dense,
    "scratch": _run_scratch,
}


def run_unit(
    unit: Unit, model: str, pack_file: Path, sequences: int | None, adapters: Path | None, until: float
) -> Unit | None:
    """Run one unit and return it with its results; None if `time.time()` is past `until`."""
    started = time.time()
    if started > until:
        return None
    bench = Bench(model, pack_file, sequences, adapters)
    results = KINDS[unit["kind"]](bench, unit)
    device = torch.cuda.get_device_name() if bench.model.device.type == "cuda" else "cpu"
    seconds = round(time.time() - started, 1)
    return {**unit, "seconds": seconds, "device": device, "torch": torch.__version__, **results}


def run(
    units: Sequence[Unit],
    model: str,
    pack_file: Path,
    out: Path,
    parallel: int,
    minutes: float,
    sequences: int | None = None,
    adapters: Path | None = None,
) -> None:
    """Run the units that `out` does not have yet, `parallel` at a time, and append each as it is done.

    No unit is started after `minutes`. One that fails is reported and left for the next run.
    """
    done = {json.loads(line)["id"] for line in out.read_text().splitlines()} if out.exists() else set()
    left = [unit for unit in units if unit["id"] not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    until = time.time() + 60 * minutes
    spawn = multiprocessing.get_context("spawn")
    with out.open("a") as file, ProcessPoolExecutor(parallel, mp_context=spawn) as pool:
        jobs = {
            pool.submit(run_unit, unit, model, pack_file, sequences, adapters, until): unit for unit in left
        }
        for job in as_completed(jobs):
            unit = jobs[job]
            if error := job.exception():
                sys.stderr.write(f"{unit['id']}: {type(error).__name__}: {error}\n")
            elif result := job.result():
                file.write(json.dumps(result) + "\n")
                file.flush()
                sys.stderr.write(f"{unit['id']}: {result['seconds']} s\n")
            else:
                sys.stderr.write(f"{unit['id']}: not started, time is over\n")


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("--model", required=True)
    packing.add_argument("--train", required=True, type=Path)
    packing.add_argument("--held-out", required=True, type=Path)
    packing.add_argument("--out", required=True, type=Path)
    running = commands.add_parser("run")
    running.add_argument("plan", choices=list(PLANS))
    running.add_argument("--model", required=True)
    running.add_argument("--pack", required=True, type=Path)
    running.add_argument("--out", required=True, type=Path)
    running.add_argument("--parallel", type=int, default=6, help="units at a time")
    running.add_argument("--minutes", type=float, default=8.0, help="start no unit later than this")
    running.add_argument("--seeds", type=int, default=3)
    running.add_argument("--sequences", type=int, help="measure on so many of each kind (default: all)")
    running.add_argument("--adapters", type=Path, help="folder to keep the adapters in (default: not kept)")
    given = parser.parse_args(words)
    if given.command == "pack":
        sizes: Mapping[str, int] = pack(given.model, given.train, given.held_out, given.out)
        sys.stdout.write(json.dumps(sizes) + "\n")
    else:
        units = units_of(given.plan, given.seeds)
        more = given.sequences, given.adapters
        run(units, given.model, given.pack, given.out, given.parallel, given.minutes, *more)


if __name__ == "__main__":
    main()
