"""The launcher takes a binary that Triton has compiled only for arguments that it would use it for."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from focus_vllm.kernels.launch import Launcher

FLOATS = torch.zeros(64)
BYTES = torch.zeros(64, dtype=torch.uint8)
VALUES = [
    *(FLOATS, FLOATS[4:], FLOATS[1:], FLOATS.bfloat16(), FLOATS.bfloat16()[1:], BYTES, BYTES[1:]),
    *(0, 1, 2, 15, 16, 17, 48, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1),
    *(2**35, 2**63 - 1, 2**63, 2**63 + 1, -(2**63), 0.0, 1.0, 16.0, 0.3, True, False, None),
]


def _arguments(plain, unaligned, general, annotated: tl.int64, first: tl.constexpr, second: tl.constexpr):
    pass


def kernel_of(function: Callable[..., None] = _arguments) -> JITFunction:
    return JITFunction(
        function, do_not_specialize=["general", "annotated"], do_not_specialize_on_alignment=["unaligned"]
    )


def test_arguments_of_one_key_are_one_to_triton() -> None:
    kernel = kernel_of()
    launcher = Launcher(kernel)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    specializations: dict[Any, set[Any]] = {}
    for place, value in itertools.product(range(4), VALUES):
        args: list[Any] = [FLOATS, FLOATS, 3, 3]
        args[place] = value
        key = launcher.key(tuple(args), (1, 2))
        specializations.setdefault((place, key), set()).add(str(bind(*args, 1, 2)[1]))
    assert all(len(found) == 1 for found in specializations.values())
    # Not a binary for every value either: sequence lengths differ from step to step.
    keys = [launcher.key((FLOATS, FLOATS, number, 3)) for number in range(100)]
    assert len(set(keys)) == 1
    keys = [launcher.key((FLOATS, FLOATS[offset:], 3, 3)) for offset in range(8)]
    assert len(set(keys)) == 1


class Recorder(JITFunction):
    """Returns as compiled what records its launches."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            number = len(self.launches)
            self.launches.append(("compiled", grid, args, options))
            return Compiled(self, number)

        return launch


class Compiled:
    def __init__(self, recorder: Recorder, number: int) -> None:
        self.recorder, self.number = recorder, number

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.recorder.launches.append((self.number, grid[:3], args))


def test_a_binary_is_launched_again_for_the_same_constants_and_options() -> None:
    recorder = Recorder(_arguments)
    launch = Launcher(recorder)
    args = (FLOATS, FLOATS, 3, 3)
    launch((5,), *args, second=2, first=1)
    launch((7, 2), *args, first=1, second=2)
    launch((7,), *args, first=2, second=1)
    launch((7,), *args, first=1, second=2, num_warps=8)
    launch((7,), FLOATS.double(), *args[1:], first=1, second=2)
    launch((8,), *args, first=2, second=1)
    usual = {"num_warps": 4, "num_stages": 3}
    assert str(recorder.launches) == str(
        [
            ("compiled", (5,), (*args, 1, 2), usual),
            (0, (7, 2, 1), (*args, 1, 2)),
            ("compiled", (7,), (*args, 2, 1), usual),
            ("compiled", (7,), (*args, 1, 2), usual | {"num_warps": 8}),
            ("compiled", (7,), (FLOATS.double(), *args[1:], 1, 2), usual),
            (2, (8, 1, 1), (*args, 2, 1)),
        ]
    )


def test_constants_have_to_be_given_and_to_be_last() -> None:
    with pytest.raises(KeyError, match="second"):
        Launcher(Recorder(_arguments))((1,), FLOATS, FLOATS, 3, 3, first=1)

    def wrong(first: tl.constexpr, then):
        pass

    with pytest.raises(AssertionError):
        Launcher(JITFunction(wrong))
