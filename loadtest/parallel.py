"""The demo with Focus over several workers: does it give the tokens and the groups that one process gives?

    python -m loadtest.parallel tensor          two tensor-parallel workers, vLLM's executor
    python -m loadtest.parallel ray             the same on two Ray nodes, both on this host (pip install ray)
    python -m loadtest.parallel data            two data-parallel engines behind one focus-serve
    python -m loadtest.parallel http            two tensor-parallel workers behind one focus-serve

Prompts below and above dense_below, greedy, float32, on CPUs. With tensor parallelism, all ranks must store
the same groups, byte by byte. `http` also runs on two GPUs, in bfloat16: sums over two ranks are rounded
elsewhere there, so after the first tokens a continuation may leave the other where two are about as likely.
The exit status is 1 if anything else differs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loadtest.serving import FOCUS_SERVE, Server, free_port, serving
from server.models import DEMO_ADAPTER, DEMO_FOLDER

RAY_RESOURCE = "TPU"
"""Any whose units Ray numbers, other than GPU: a CPU has none."""
LENGTHS = (300, 2500, 5000)
NEW_TOKENS = 24
SAME_ON_GPUS = 8
"""Tokens that bfloat16's rounding must not change."""
NEAR_TIE = 0.2
"""Difference of two tokens' log-probabilities that bfloat16 may turn around: those of stock vLLM are 0.03
from float32's (root mean square), so a difference of two of them is 0.06 from another run's."""
# vLLM would bind the workers to cores, one list for each; small machines have no two lists.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@functools.cache
def prompts() -> list[list[int]]:
    """Return the beginnings of a text: of random tokens a model knows no likely continuation."""
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(DEMO_FOLDER).encode(Path(__file__).read_text())
    return [(ids * math.ceil(length / len(ids)))[:length] for length in LENGTHS]


def digests(worker: Any) -> dict[int, str]:
    """Return a hash of every layer's group store; runs in a worker."""
    layers = worker.model_runner.get_model().focus.layers
    return {
        index: hashlib.sha256(focus.store.numpy().tobytes()).hexdigest() for index, focus in layers.items()
    }


def name_resource() -> None:
    """Name the resource that Ray gives a worker, which vLLM does not do for CPUs: it refuses Ray there."""
    from vllm.platforms import current_platform

    type(current_platform).ray_device_key = RAY_RESOURCE


@contextlib.contextmanager
def ray_nodes(number: int) -> Iterator[None]:
    """Run a Ray cluster on this host, with room for one worker on each of its nodes."""
    import ray
    from ray.cluster_utils import Cluster

    name_resource()
    cluster = Cluster()
    try:
        for _ in range(number):
            cluster.add_node(num_cpus=1, resources={RAY_RESOURCE: 1}, object_store_memory=200 * 2**20)
        environment = {"worker_process_setup_hook": "loadtest.parallel.name_resource"}
        ray.init(address=cluster.address, runtime_env=environment)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def generate(workers: int, executor: str) -> dict[str, Any]:
    """Run an engine in this process and return its tokens and every worker's digests."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to send `digests` to the workers
    if executor == "ray" and workers > 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine is Ray's driver: in this process
        os.environ["VLLM_USE_RAY_V2_EXECUTOR_BACKEND"] = "1"  # the other wants an IP address for each node
        # Shared memory is called after the port that vLLM chooses from this, and stays behind.
        os.environ["VLLM_DP_MASTER_PORT"] = str(free_port())
        with ray_nodes(workers):
            return _generate(workers, executor)
    return _generate(workers, executor)


def _generate(workers: int, executor: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        str(DEMO_FOLDER),
        dtype="float32",
        enforce_eager=True,
        max_model_len=8192,
        tensor_parallel_size=workers,
        distributed_executor_backend=executor if workers > 1 else None,
        additional_config={"focus": {"adapter": str(DEMO_ADAPTER)}},
        worker_extension_cls="focus_vllm.engine.worker.FocusWorkerExtension",
    )
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts()], params, use_tqdm=False)
    found = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "groups": llm.collective_rpc(digests),
        "stats": llm.collective_rpc("focus_stats"),
    }
    llm.llm_engine.engine_core.shutdown()  # before its Ray cluster, if it has one
    return found


def in_a_process(workers: int, executor: str) -> dict[str, Any]:
    """Return what `generate` gives in a process of its own.

    Raises:
        RuntimeError: It failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.json"
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "loadtest.parallel",
                executor,
                "--workers",
                str(workers),
                "--output",
                output,
            ],
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise RuntimeError(
                f"{workers} workers with {executor}:\n{run.stdout[-3000:]}{run.stderr[-3000:]}"
            )
        return dict(json.loads(output.read_text()))


def differences(one: dict[str, Any], many: dict[str, Any]) -> list[str]:
    """Return what differs between one process and several workers, and between these."""
    found = [
        f"prompt of {length} tokens: {alone} alone, {together} together"
        for length, alone, together in zip(LENGTHS, one["tokens"], many["tokens"], strict=True)
        if alone != together
    ]
    found += [
        f"worker {rank} has other groups than worker 0"
        for rank, groups in enumerate(many["groups"])
        if groups != many["groups"][0]
    ]
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One greedy completion."""

    tokens: list[str]
    likely: list[dict[str, float]]
    """Log-probabilities of the two most likely tokens, at each."""


def complete(server: Server, prompt: list[int]) -> Answer:
    """Return one greedy completion over HTTP."""
    body = {"model": "focus-demo", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "logprobs": 2}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        found = json.load(response)["choices"][0]["logprobs"]
    return Answer(found["tokens"], found["top_logprobs"])


def served(flags: Sequence[str]) -> tuple[list[Answer], set[str]]:
    """Return what `focus-serve` with these flags answers to all prompts twice, and which engines did."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*FOCUS_SERVE, *flags]
        with (
            serving(command, Path(folder) / "log", ENVIRONMENT) as server,
            ThreadPoolExecutor(2 * len(LENGTHS)) as pool,
        ):
            answers = list(pool.map(lambda ids: complete(server, ids), [*prompts(), *prompts()]))
            engines = {
                line.split('engine="')[1].split('"')[0]
                for line in server.get("/metrics").splitlines()
                if line.startswith("vllm:request_success_total") and not line.endswith(" 0.0")
            }
    return answers, engines


def data_parallel() -> list[str]:
    """Compare two engines behind one server with one; return what differs."""
    flags = ["--dtype", "float32"]
    alone, _ = served(flags)
    together, engines = served([*flags, "--data-parallel-size", "2"])
    if len(engines) != 2:
        return [f"requests were answered by engines {sorted(engines)}, not by two"]
    return unlike(alone, together)


def tensor_parallel() -> list[str]:
    """Compare a server with two tensor-parallel workers with a server of one; return what differs."""
    import torch

    gpus, size = torch.cuda.is_available(), ["--tensor-parallel-size", "2"]
    # The demo needs little, and other servers may be on the same GPUs.
    little = ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(2**29)]
    flags = little if gpus else ["--dtype", "float32"]
    (alone, _), (together, _) = served(flags), served([*flags, *size])
    return unlike(alone, together, NEAR_TIE if gpus else 0.0)


def unlike(one: list[Answer], two: list[Answer], near_tie: float = 0.0) -> list[str]:
    """Return what differs, but for what follows two tokens of log-probabilities at most `near_tie` apart.

    The first tokens must be the same in any case.
    """
    found, same = [], 0
    for ids, alone, together in zip([*prompts(), *prompts()], one, two, strict=True):
        pairs = list(zip(alone.tokens, together.tokens, strict=True))
        first = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        same += first
        if first == len(pairs):
            continue
        token, other = pairs[first]
        likely = alone.likely[first]
        too_soon = first < SAME_ON_GPUS
        if too_soon or other not in likely or likely[token] - likely[other] > near_tie:
            found.append(
                f"prompt of {len(ids)} tokens: after {first} {token!r} by one, {other!r} by two; "
                f"one's likely tokens are {likely}"
            )
    if not found and same < len(one) * NEW_TOKENS // 2:
        found.append(f"{same} of {len(one) * NEW_TOKENS} tokens came before near ties: too few to tell")
    return found


def main() -> int:
    """Parse the command line and run; 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tensor", "data", "ray", "http", "mp"])
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.output:
        arguments.output.write_text(json.dumps(generate(arguments.workers, arguments.what)))
        return 0
    if arguments.what == "data":
        found, same = data_parallel(), "the same tokens from two engines"
    elif arguments.what == "http":
        found, same = tensor_parallel(), "the same tokens from two workers"
    else:
        executor = "ray" if arguments.what == "ray" else "mp"
        found = differences(in_a_process(1, executor), in_a_process(2, executor))
        same = "the same tokens, and the same groups on every rank"
    sys.stdout.write("\n".join(found or [same]) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
