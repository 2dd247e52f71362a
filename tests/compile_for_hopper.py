"""Compile the kernels for Hopper where there is no GPU: what Triton's interpreter lets pass may not compile.

    python tests/compile_for_hopper.py      # prints each kernel's registers, stack and shared memory

Without TRITON_INTERPRET. The path's own code launches the kernels on tensors of the CPU; a launch compiles.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from focus_vllm.config import FocusConfig
from focus_vllm.kernels import decode_lists, routing
from focus_vllm.kernels.attention import DecodeScratch, PrefillScratch
from focus_vllm.kernels.decode_lists import Progress
from focus_vllm.kernels.gather import PAGE, GatherScratch
from focus_vllm.kernels.listed import ListedAttention
from focus_vllm.kernels.near import GROUP_BITS, NearKeys, Scores
from focus_vllm.kernels.plan import index_capacity, list_capacity, lists_per_query, near_keys
from focus_vllm.kernels.routing import device_weight
from focus_vllm.kernels.warmup import compile_kernels, compile_routing
from focus_vllm.routing import mask_dtype

CASES: list[tuple[dict[str, int], tuple[int, int, int], bool, float]] = [
    ({}, (32, 8, 128), False, 0.0),
    ({"num_groups": 16, "top_k": 4}, (16, 1, 96), True, 0.0),
    ({"key_k": 2, "top_k": 2}, (8, 8, 64), False, 20.0),
    ({"num_groups": 16, "key_k": 2, "top_k": 2, "sink": 0}, (8, 4, 256), False, 0.0),
]
"""Settings, heads and head size, FP8 keys, softcap."""
TOKENS = 2048


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


RUN = JITFunction.run


def compile_only(self: JITFunction, *args: Any, **options: Any) -> SimpleNamespace:
    """Return what launches nothing."""
    kernel = RUN(self, *args, **options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    registers, stack = found.groups() if found else ("?", "?")
    say(f"{self.__name__:16} {registers:>4} registers, stack {stack}, shared {kernel.metadata.shared}")
    return SimpleNamespace(run=lambda *_: None, function=None, packed_metadata=None)


def compile_case(
    changes: dict[str, int], heads: tuple[int, int, int], quantized: bool, softcap: float
) -> None:
    config = FocusConfig(**changes)
    say(f"{config} {heads} {'FP8' if quantized else 'bfloat16'}")
    num_heads, num_kv_heads, head_size = heads
    out_dtype = torch.bfloat16
    dtype = torch.float8_e4m3fn if quantized else out_dtype
    near = near_keys(config, TOKENS)
    rows = TOKENS * lists_per_query(config)
    copies = ((near, num_kv_heads, head_size), (near, num_kv_heads, head_size), (near, GROUP_BITS))
    prefill = PrefillScratch(
        torch.empty(list_capacity(config, 4096), dtype=torch.int32),
        torch.empty(index_capacity(config, 4096, TOKENS, rows, near), dtype=torch.int32),
        torch.empty(rows, num_heads, head_size, dtype=dtype),
        torch.empty(rows, num_heads, head_size, dtype=out_dtype),
        NearKeys(*(torch.empty(shape, dtype=out_dtype) for shape in copies)),
    )
    lists, list_lens = torch.empty(1, 4096, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    starts = torch.arange(2, dtype=torch.int32)
    decode = DecodeScratch(lists, list_lens, starts, Progress.zeros(1, torch.device("cpu")))
    query = torch.zeros(64, num_heads, head_size).to(dtype)
    query.zero_ = lambda: query  # type: ignore[method-assign] - the CPU cannot for FP8
    scales = [torch.ones(1)] * 3 if quantized else []
    pages = [torch.empty(40, PAGE, num_kv_heads, head_size, dtype=dtype) for _ in range(2)]
    compile_kernels(
        config, query, torch.zeros(64, num_heads, head_size, dtype=out_dtype), num_kv_heads, dtype,
        Scores(0.1, softcap, *scales), prefill, decode,
        GatherScratch(pages[0], pages[1], torch.empty(200_000, dtype=torch.int32)),
        ListedAttention(Scores(0.1, softcap, *scales), 1),
    )  # fmt: skip
    weight = device_weight(torch.empty(config.num_groups, 4096), out_dtype)
    bias = torch.zeros(config.num_groups)
    groups = torch.empty(2, TOKENS, dtype=mask_dtype(config.num_groups))
    compile_routing(weight, bias, groups[0], groups[1], config.key_k, config.top_k)


if __name__ == "__main__":
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )
    )
    JITFunction.run = compile_only
    decode_lists.launches_early = routing.launches_early = lambda _: True
    for case in CASES:
        compile_case(*case)
