"""Launch kernels without Triton's checks of their arguments.

Those take longer than the launch itself: 120 us with them, on an H200's host, where the GPU is done with a
layer of an 8B model in 600 us (1,024 tokens).
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from triton.runtime import KernelInterface
from triton.runtime.jit import JITFunction


class Launcher:
    """Launches a kernel, whose constants are its last parameters.

    What Triton has compiled for such arguments is launched again as it is.
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
        self, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any
    ) -> None:
        """Launch on the current stream.

        Args:
            grid: Numbers of programs: one, two or three.
            args: The kernel's arguments but for constants, in their order.
            num_warps: Triton's.
            num_stages: Triton's.
            constants: The kernel's.
        """
        if not isinstance(self._kernel, JITFunction):
            self._kernel[grid](*args, **constants)
            return
        values = tuple(constants[name] for name in self._constants)
        key = self.key(args, values, num_warps, num_stages)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._kernel[grid](*args, *values, num_warps=num_warps, num_stages=num_stages)
            self._compiled[key] = compiled
        else:
            compiled[(*grid, 1, 1)](*args, *values)

    def key(self, args: tuple[Any, ...], *others: Hashable) -> Hashable:
        """Return what a binary depends on.

        Args:
            args: The kernel's but for constants.
            others: What it depends on as it is.
        """
        return others, *map(_class_of, args, self._specialized, self._aligned)


def _class_of(value: Any, specialized: bool, aligned: bool) -> Hashable:
    """Return what Triton compiles differently for: more than that in doubt, never less."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.get_device(), specialized and aligned and value.data_ptr() % 16 == 0
    if type(value) is int:
        width = 32 if -(2**31) <= value < 2**31 else 64 if value < 2**63 else 65
        return (width, value == 1, value % 16 == 0) if specialized else width
    return str(type(value))
