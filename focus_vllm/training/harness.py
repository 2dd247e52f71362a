"""lm-evaluation-harness on a model under Focus; needs lm_eval, the extra `harness`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from focus_vllm.adapter import Adapter
from focus_vllm.training.hf import attach


@contextlib.contextmanager
def harness_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Adapter | None, batch_size: int = 1
) -> Iterator[Any]:
    """Give lm_eval's own model for Hugging Face (`HFLM`), under the adapter's mask while the context is open.

    Tasks that compare log-likelihoods run as they are (HellaSwag, ARC, PIQA, LAMBADA, TruthfulQA's multiple
    choice); those that generate are refused, because Focus here attends to whole sequences only.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        adapter: None leaves the model dense.
        batch_size: Sequences per forward pass.

    Raises:
        ValueError: lm_eval is missing.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise ValueError("this needs lm-evaluation-harness: pip install 'focus-vllm[harness]'") from None
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    with attach(model, adapter.config, adapter.layers) if adapter else contextlib.nullcontext():
        yield wrapped


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Adapter | None,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, Any]]:
    """Run lm_eval's tasks and return its results by task.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        adapter: None leaves the model dense.
        tasks: Names that lm_eval knows.
        limit: Documents per task; None takes all.
        batch_size: Sequences per forward pass.

    Raises:
        ValueError: lm_eval is missing.
    """
    with harness_model(model, tokenizer, adapter, batch_size) as wrapped:
        from lm_eval import simple_evaluate

        found: dict[str, dict[str, Any]] = simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)[
            "results"
        ]
    return found
