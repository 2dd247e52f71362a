"""Launch kernels with little work on the host.

Where the GPU has little to do, as for a short prompt behind a long cached one, it waits for the host, which
launches every layer's kernels one by one.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from triton.runtime import KernelInterface, driver
from triton.runtime.jit import JITFunction

P = ParamSpec("P")
R = TypeVar("R")

_remembering: _Calls | None = None


class Fixed:
    """Values that a layer has at every step, looked at once."""

    def __init__(self, *values: Any) -> None:
        self.values = values
        self.kinds = tuple(map(_kind, values))
        self.pointers = _pointers(values)


class Repeated:
    """Launches that many layers need alike, worked out for the first one of each kind."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Calls] = {}

    def __call__(self, fixed: Fixed, values: Sequence[Any], launch: Callable[[], None]) -> None:
        """Do what `launch` does, or did, with these values.

        Args:
            fixed: Whatever differs between layers but not between steps.
            values: Whatever else differs between layers: tensors, which may be others of the same dtype,
                shape, strides and alignment, numbers, and objects that `repeatable` functions take.
            launch: Does it all by `Launcher` and `repeatable` functions, with the values themselves: it is
                not repeated if it uses views of them, which could not be replaced.
        """
        global _remembering
        kind = fixed.kinds, *map(_kind, values)
        known = self._known.get(kind)
        if known is not None:
            known.repeat(fixed, values)
            return
        values = (*fixed.values, *values)
        tensors = [id(value) for value in values if isinstance(value, torch.Tensor)]
        if len(set(tensors)) < len(tensors):  # as which of two the same tensor is used could not be told
            launch()
            return
        calls = _remembering = _Calls(values)
        try:
            launch()
        finally:
            _remembering = None
        if not calls.views:
            self._known[kind] = calls


def repeatable(function: Callable[P, R]) -> Callable[P, R]:
    """Have `Repeated` call a function again, which launches otherwise than by `Launcher`.

    Its arguments are given in order, without names. Launches to come may be given what it returns.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        global _remembering
        calls, _remembering = _remembering, None
        try:
            result = function(*args, **kwargs)
        finally:
            _remembering = calls
        if calls is not None:
            assert not kwargs
            calls.add(function, args, result)
        return result

    return call


class _Calls:
    def __init__(self, values: Sequence[Any]) -> None:
        self._calls: list[tuple[Callable[..., Any] | _Bound, list[Any], list[tuple[int, int]]]] = []
        self._numbers = {id(value): number for number, value in enumerate(values) if value is not None}
        self._num_values = len(values)
        self._storages = {_storage(value) for value in values if isinstance(value, torch.Tensor)}
        self._alive: list[Any] = []
        self.views = False

    def add(self, function: Callable[..., Any] | _Bound, args: tuple[Any, ...], result: Any) -> None:
        places, kept = [], []
        for place, arg in enumerate(args):
            number = self._numbers.get(id(arg))
            if number is not None:  # will be replaced, and is not kept
                places.append((place, number))
                arg = None
            elif self._uses_values(arg):
                self.views = True
            kept.append(arg)
        self._alive.append(kept)
        self._calls.append((function, _pointers(kept) if isinstance(function, _Bound) else kept, places))
        if result is not None:
            self._alive.append(result)  # whose number must stay its own
            self._numbers[id(result)] = self._num_values + len(self._calls) - 1

    def _uses_values(self, arg: Any) -> bool:
        if isinstance(arg, tuple):
            return any(map(self._uses_values, arg))
        return isinstance(arg, torch.Tensor) and arg.numel() > 0 and _storage(arg) in self._storages

    def repeat(self, fixed: Fixed, values: Sequence[Any]) -> None:
        have = [*fixed.values, *values]
        pointers = fixed.pointers + _pointers(values)
        stream = None
        for function, args, places in self._calls:
            args = args.copy()
            result = None
            if isinstance(function, _Bound):
                for place, number in places:
                    args[place] = pointers[number]
                stream = _current_stream() if stream is None else stream
                function.launch(stream, args)
            else:
                for place, number in places:
                    args[place] = have[number]
                result = function(*args)
            have.append(result)
            pointers += _pointers((result,))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _pointers(values: Sequence[Any]) -> list[Any]:
    """Triton's launcher asks the driver about every tensor, and of integers nothing."""
    return [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]


def _current_stream() -> int:
    stream: int = driver.active.get_current_stream(driver.active.get_current_device())
    return stream


class _Bound:
    """A binary and its numbers of programs."""

    def __init__(self, compiled: Any, size: tuple[int, ...]) -> None:
        self._run, self._size = compiled.run, size
        self._of_binary = compiled.function, compiled.packed_metadata, None, None, None

    def launch(self, stream: int, args: Sequence[Any]) -> None:
        self._run(*self._size, stream, *self._of_binary, *args)


def _kind(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.data_ptr() % 16
    return value if isinstance(value, int | float) else str(type(value))


class Launcher:
    """Launches a kernel, whose constants are its last parameters.

    What Triton has compiled for such arguments is launched again as it is, without what may be hooked in.
    """

    def __init__(self, kernel: KernelInterface[Any]) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}
        params = kernel.params if isinstance(kernel, JITFunction) else []  # the interpreter compiles nothing
        runtime = [param for param in params if not param.is_constexpr]
        assert runtime == params[: len(runtime)]
        self._constants = [param.name for param in params[len(runtime) :]]
        self._specialized = [not param.do_not_specialize for param in runtime]
        self._aligned = [not param.do_not_specialize_on_alignment for param in runtime]

    def __call__(
        self,
        grid: tuple[int, ...],
        *args: Any,
        num_warps: int = 4,
        num_stages: int = 3,
        launch_pdl: bool = False,
        **constants: Any,
    ) -> None:
        """Launch on the current stream.

        Args:
            grid: Numbers of programs: one, two or three.
            args: The kernel's arguments but for constants, in their order.
            num_warps: Triton's.
            num_stages: Triton's.
            launch_pdl: Triton's: begin as soon as the stream's kernel before allows it, not at its end.
            constants: The kernel's.
        """
        if not isinstance(self._kernel, JITFunction):
            repeatable(functools.partial(self._kernel[grid], **constants))(*args)
            return
        values = tuple(constants[name] for name in self._constants)
        key = self.key(args, values, num_warps, num_stages, launch_pdl)
        compiled = self._compiled.get(key)
        if compiled is None:
            options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": launch_pdl}
            compiled = self._kernel.run(*args, *values, grid=grid, warmup=True, **options)
            self._compiled[key] = compiled
        bound = _Bound(compiled, (*grid, 1, 1)[:3])
        bound.launch(_current_stream(), [*_pointers(args), *values])
        if _remembering is not None:
            _remembering.add(bound, (*args, *values), None)

    def key(self, args: tuple[Any, ...], *others: Hashable) -> Hashable:
        """Return what a binary depends on.

        Args:
            args: The kernel's but for constants.
            others: What it depends on as it is.
        """
        return others, *map(_class_of, args, self._specialized, self._aligned)


@functools.cache
def launches_early(device: torch.device) -> bool:
    """Return whether a kernel can begin before the stream's last has ended: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _class_of(value: Any, specialized: bool, aligned: bool) -> Hashable:
    """Return what Triton compiles differently for: more than that in doubt, never less."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.get_device(), specialized and aligned and value.data_ptr() % 16 == 0
    if type(value) is int:
        width = 32 if -(2**31) <= value < 2**31 else 64 if value < 2**63 else 65
        return (width, value == 1, value % 16 == 0) if specialized else width
    return str(type(value))
