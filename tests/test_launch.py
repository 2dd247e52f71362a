"""The launcher takes a binary that Triton has compiled only for arguments that it would use it for."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from focus_vllm.kernels import launch as launch_module
from focus_vllm.kernels.launch import Fixed, Launcher, Repeated, repeatable

FLOATS = torch.zeros(64)
BYTES = torch.zeros(64, dtype=torch.uint8)
VALUES = [
    *(FLOATS, FLOATS[4:], FLOATS[1:], FLOATS.bfloat16(), FLOATS.bfloat16()[1:], BYTES, BYTES[1:]),
    *(0, 1, 2, 15, 16, 17, 48, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1),
    *(2**35, 2**63 - 1, 2**63, 2**63 + 1, -(2**63), 0.0, 1.0, 16.0, 0.3, True, False, None),
]


def _arguments(plain, unaligned, general, annotated: tl.int64, first: tl.constexpr, second: tl.constexpr):
    pass


def test_arguments_of_one_key_are_one_to_triton() -> None:
    kernel = JITFunction(
        _arguments, do_not_specialize=["general", "annotated"], do_not_specialize_on_alignment=["unaligned"]
    )
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
    """Returns as compiled what notes its launches."""

    def __init__(self) -> None:
        super().__init__(_arguments)
        self.noted: list[tuple[Any, ...]] = []

    def run(self, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> SimpleNamespace:
        assert warmup, "launched by Triton"
        number = len(self.noted)
        self.noted.append(("compiled", args, options))
        return SimpleNamespace(
            run=lambda *args: self.noted.append((number, *args)), function="handle", packed_metadata="packed"
        )


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: f"on {device}")
    monkeypatch.setattr(launch_module, "driver", SimpleNamespace(active=active))


def launched(number: int, size: tuple[int, ...], *args: Any) -> tuple[Any, ...]:
    addresses = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
    return number, *size, "on 3", "handle", "packed", None, None, None, *addresses


@pytest.mark.usefixtures("stream")
def test_a_binary_is_launched_again_for_the_same_constants_and_options() -> None:
    recorder = Recorder()
    launch = Launcher(recorder)
    args = (FLOATS, FLOATS, 3, 3)
    double = (FLOATS.double(), *args[1:])
    launch((5,), *args, second=2, first=1)
    launch((7, 2), *args, first=1, second=2)
    launch((7,), *args, first=2, second=1)
    launch((7,), *args, first=1, second=2, num_warps=8)
    launch((7,), *double, first=1, second=2)
    launch((8,), *args, first=2, second=1)
    launch((8,), *args, first=2, second=1, launch_pdl=True)
    usual = {"num_warps": 4, "num_stages": 3, "launch_pdl": False}
    assert str(recorder.noted) == str(
        [
            ("compiled", (*args, 1, 2), usual),
            launched(0, (5, 1, 1), *args, 1, 2),
            launched(0, (7, 2, 1), *args, 1, 2),
            ("compiled", (*args, 2, 1), usual),
            launched(3, (7, 1, 1), *args, 2, 1),
            ("compiled", (*args, 1, 2), usual | {"num_warps": 8}),
            launched(5, (7, 1, 1), *args, 1, 2),
            ("compiled", (*double, 1, 2), usual),
            launched(7, (7, 1, 1), *double, 1, 2),
            launched(3, (8, 1, 1), *args, 2, 1),
            ("compiled", (*args, 2, 1), usual | {"launch_pdl": True}),
            launched(10, (8, 1, 1), *args, 2, 1),
        ]
    )


@pytest.mark.usefixtures("stream")
def test_launches_are_repeated_with_other_values_and_with_what_calls_return() -> None:
    recorder = Recorder()
    launch, repeated = Launcher(recorder), Repeated()
    scratch, begun, results = torch.ones(4), [], []

    @dataclasses.dataclass
    class Attention:
        scale: float

        @repeatable
        def __call__(self, keys: torch.Tensor, factor: float) -> torch.Tensor:
            launch((9,), keys, keys, 0, 0, first=0, second=0)  # of its own, not to be repeated beside it
            results.append(keys * factor * self.scale)
            return results[-1]

    def layer(keys: torch.Tensor, factor: float, none: None) -> None:
        attention = Attention(float(keys[0]))  # every layer's is another

        def launches() -> None:
            begun.append(keys)
            launch((1,), keys, scratch, 3, 3, first=1, second=2)
            result = attention(keys, factor)
            launch((2,), result, none, 3, 3, first=1, second=2)

        repeated(Fixed(keys), (factor, attention, none), launches)

    layers = list(
        zip([torch.full((4,), float(number)) for number in range(4)], (2.0, 2.0, 2.0, 5.0), strict=True)
    )
    for keys, factor in layers:
        layer(keys, factor, None)
    layer(layers[0][0].double(), 2.0, None)
    layer(torch.zeros(5)[1:], 2.0, None)
    assert [id(keys) for keys in begun[:2]] == [id(layers[0][0]), id(layers[3][0])]
    assert len(begun) == 4, "another number, dtype and alignment begin anew"
    # Every binary is noted once as compiled, before its launches.
    launches = [(note[1], *note[10:]) for note in recorder.noted if note[0] != "compiled"]
    expected = []
    for (keys, factor), result in zip(layers, results[:4], strict=True):
        assert torch.equal(result, keys * factor * keys[0])
        expected += [
            (1, keys.data_ptr(), scratch.data_ptr(), 3, 3, 1, 2),
            (9, keys.data_ptr(), keys.data_ptr(), 0, 0, 0, 0),
            (2, result.data_ptr(), None, 3, 3, 1, 2),
        ]
    assert launches[: len(expected)] == expected


@pytest.mark.usefixtures("stream")
def test_what_uses_views_is_not_repeated() -> None:
    recorder, repeated, sums = Recorder(), Repeated(), []
    add, stack = repeatable(torch.sum), repeatable(torch.stack)
    launch, tensors = Launcher(recorder), [torch.zeros(8), torch.ones(8)]
    for keys in tensors:
        repeated(Fixed(), [keys], lambda keys=keys: launch((1,), keys, keys[4:], 3, 3, first=1, second=2))
        repeated(Fixed(keys), [1], lambda keys=keys: sums.append(add(keys[4:])))
        repeated(Fixed(keys), [2], lambda keys=keys: sums.append(stack((keys[:4],))))
    launches = [note[10:12] for note in recorder.noted if note[0] != "compiled"]
    assert launches == [(keys.data_ptr(), keys[4:].data_ptr()) for keys in tensors]
    assert [float(result.sum()) for result in sums] == [0, 0, 4, 4]


@pytest.mark.usefixtures("stream")
def test_a_tensor_that_is_two_values_does_not_stand_for_others() -> None:
    recorder, repeated = Recorder(), Repeated()
    launch, keys, others = Launcher(recorder), torch.zeros(8), torch.ones(8)
    for first, second in ((keys, keys), (keys, others), (others, keys), (keys, keys)):

        def launches(a: torch.Tensor = first, b: torch.Tensor = second) -> None:
            launch((1,), a, b, 3, 3, first=1, second=2)

        repeated(Fixed(first), [second], launches)
    noted = [note[10:12] for note in recorder.noted if note[0] != "compiled"]
    one, other = keys.data_ptr(), others.data_ptr()
    assert noted == [(one, one), (one, other), (other, one), (one, one)]


@pytest.mark.usefixtures("stream")
def test_what_failed_is_not_repeated() -> None:
    recorder, repeated, attempts = Recorder(), Repeated(), []
    launch = Launcher(recorder)

    def launches() -> None:
        launch((1,), FLOATS, FLOATS, 3, 3, first=1, second=2)
        attempts.append(1)
        if len(attempts) == 1:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        repeated(Fixed(), [FLOATS], launches)
    launch((2,), FLOATS, FLOATS, 3, 3, first=1, second=2)  # nobody's
    for _ in range(2):
        repeated(Fixed(), [FLOATS], launches)
    assert len(attempts) == 2
    assert [note[1] for note in recorder.noted if note[0] != "compiled"] == [1, 2, 1, 1]


def test_constants_have_to_be_given_and_to_be_last() -> None:
    with pytest.raises(KeyError, match="second"):
        Launcher(Recorder())((1,), FLOATS, FLOATS, 3, 3, first=1)

    def wrong(first: tl.constexpr, then):
        pass

    with pytest.raises(AssertionError):
        Launcher(JITFunction(wrong))
