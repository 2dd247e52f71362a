"""Launch kernels without Triton's checks of their arguments.

Those take longer than the launch itself: 120 us with them, on an H200's host, where the GPU is done with a
layer of an 8B model in 600 us (1,024 tokens).
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from triton.runtime import KernelInterface


class Launcher:
    """Launches a kernel; what Triton compiles the first time is launched again as it is."""

    def __init__(self, kernel: KernelInterface[Any], **options: int) -> None:
        """`options` are Triton's, such as `num_warps`."""
        self._kernel, self._options = kernel, options
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch on the current stream.

        Args:
            key: Whatever Triton compiles the kernel differently for: constants, dtypes, alignments, the
                device, and integers that are not `do_not_specialize`.
            grid: Numbers of programs.
            args: All of the kernel's arguments in their order, constants too.
        """
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*args)
            return
        assert len(args) == len(self._kernel.arg_names)
        compiled = self._kernel[grid](*args, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            self._compiled[key] = compiled
