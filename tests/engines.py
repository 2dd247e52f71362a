"""vLLM engines in this process, and what they stored, for tests against the reference."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


@contextlib.contextmanager
def engine(model: Path, focus: dict[str, Any] | None = None, **kwargs: Any) -> Iterator[Any]:
    """Start an engine, with Focus if `focus` is given, and end it."""
    from vllm import LLM

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 8704,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    llm = LLM(
        str(model),
        additional_config={} if focus is None else {"focus": focus},
        worker_extension_cls="focus_vllm.engine.worker.FocusWorkerExtension",
        **{**defaults, **kwargs},
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def prompt(num_tokens: int, seed: int = 0, vocab: int = 16000) -> list[int]:
    """Return random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, vocab, (num_tokens,), generator=generator).tolist()


def generate(
    llm: Any, prompts: list[list[int]], max_tokens: int = 1, prompt_logprobs: bool = True
) -> list[Any]:
    """Generate greedily, with the log-probabilities of prompt and output."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if prompt_logprobs else None,
        detokenize=False,
    )
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def logprobs(output: Any) -> torch.Tensor:
    """Return the log-probability of every token after the first; NaN where vLLM gave none."""
    ids = output.prompt_token_ids
    given = output.prompt_logprobs or [None] * len(ids)
    values = [
        float("nan") if row is None else row[token].logprob for row, token in zip(given, ids, strict=True)
    ]
    completion = output.outputs[0]
    values += [
        row[token].logprob for row, token in zip(completion.logprobs, completion.token_ids, strict=True)
    ]
    return torch.tensor(values[1:])


class StoredGroups:
    """Records what the group store held for each request when its blocks were freed."""

    def __init__(self, llm: Any, monkeypatch: Any) -> None:
        from focus_vllm.engine.backend_cpu import FocusCPUImpl

        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        self.preemptions = 0
        self._scheduler = core.scheduler
        self._layers = runner.get_model().focus.layers
        routed = {id(focus) for focus in self._layers.values()}
        context = runner.vllm_config.compilation_config.static_forward_context
        self._kv_cache_group = next(
            number
            for number, group in enumerate(runner.kv_cache_config.kv_cache_groups)
            if any(id(context[name].impl.focus) in routed for name in group.layer_names)
        )
        self._query_stores: dict[int, torch.Tensor] = {}
        self._groups: dict[tuple[int, ...], dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
        forward, free = FocusCPUImpl.forward, self._scheduler.kv_cache_manager.free
        preempt = self._scheduler._preempt_request

        def keep_query_groups_too(impl, *args, **kwargs):
            output = forward(impl, *args, **kwargs)
            focus, metadata = impl.focus, args[5]
            if focus is not None and metadata is not None:
                kept = self._query_stores.setdefault(id(focus), torch.zeros_like(focus.store))
                routed_now = 0 if metadata.deferred else focus.query_groups[: len(metadata.new_slots)]
                kept[metadata.new_slots] = routed_now
            return output

        def keep_and_free(request):
            for focus in self._layers.values():
                focus.deferred.flush()
            self._keep(request)
            free(request)

        def count_and_preempt(*args, **kwargs):
            self.preemptions += 1
            preempt(*args, **kwargs)

        monkeypatch.setattr(FocusCPUImpl, "forward", keep_query_groups_too)
        monkeypatch.setattr(self._scheduler.kv_cache_manager, "free", keep_and_free)
        monkeypatch.setattr(self._scheduler, "_preempt_request", count_and_preempt)

    def _keep(self, request: Any) -> None:
        groups = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)
        blocks = torch.tensor(groups[self._kv_cache_group])
        block_size = self._scheduler.block_size
        slots = (blocks[:, None] * block_size + torch.arange(block_size)).view(-1)
        # Of the last token there is no key, or one that was computed as a draft.
        slots = slots[: min(request.num_computed_tokens, request.num_tokens - 1, len(slots))]
        stores = [
            (focus.store[slots], self._query_stores[id(focus)][slots]) for focus in self._layers.values()
        ]
        # Of a token routed late only the groups as a key are known; tests that have some use key_k = top_k.
        self._groups[tuple(request.prompt_token_ids)] = {
            index: (keys, torch.where(queries == 0, keys, queries))
            for index, (keys, queries) in zip(self._layers, stores, strict=True)
        }

    def of(self, output: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Return `(key_groups, query_groups)` by layer, of the tokens whose keys were computed."""
        return self._groups[tuple(output.prompt_token_ids)]
