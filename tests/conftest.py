"""Fixtures shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when a kernel is defined, its own library's included, whether it will be interpreted. The
    # variable is gone again before any test starts a process that inherits it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.experimental.gluon  # noqa: F401 - what the first launch would import

        import focus_vllm.kernels.listed
        import focus_vllm.kernels.routing
        import focus_vllm.kernels.warmup  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run engines last: vLLM patches the transformers classes that it runs, for the whole process."""
    items.sort(key=lambda item: item.get_closest_marker("vllm") is not None)
