"""Compare what a vLLM engine gave and stored with the reference on the Hugging Face model."""

from __future__ import annotations

import torch
from engines import logprobs

from focus_vllm.adapter import load_adapter
from focus_vllm.config import FocusConfig
from focus_vllm.training.hf import attach, prompt_logprobs

TOLERANCE = 1e-3
NEAR_TIE = 1e-4


def check_against_reference(hf_model, adapter, overrides, output, groups):
    """Compare every log-probability with the reference's, and every stored group with its routing."""
    loaded = load_adapter(adapter)
    config = FocusConfig.from_dict({**loaded.config.to_dict(), **overrides})
    ids = output.prompt_token_ids + list(output.outputs[0].token_ids)
    computed = ids[:-1]  # the last token's key is never computed
    assert all(len(key_groups) == len(computed) for key_groups, _ in groups.values())
    with attach(hf_model, config, loaded.layers, groups) as layers:
        expected = prompt_logprobs(hf_model, computed)
        for index, (stored_keys, stored_queries) in groups.items():
            check_routing(layers[index].scores[0], stored_keys, config.key_k)
            check_routing(layers[index].query_scores[0], stored_queries, config.top_k)
    actual = logprobs(output)[:-1]
    compared = ~actual.isnan()
    assert compared.sum() >= len(output.outputs[0].token_ids) - 1
    difference = (actual - expected)[compared].abs().max() if compared.any() else torch.tensor(0.0)
    assert difference <= TOLERANCE, f"{len(ids)} tokens: log-probabilities differ by {difference}"


def check_routing(scores, stored, k):
    """Each token must have its k best groups; only a near tie may fall either way."""
    member = (stored.long()[:, None] >> torch.arange(scores.shape[1])) & 1 != 0
    assert (member.sum(dim=1) == k).all()
    if k == scores.shape[1]:
        return
    worst_in = scores.masked_fill(~member, float("inf")).amin(dim=1)
    best_out = scores.masked_fill(member, float("-inf")).amax(dim=1)
    assert (best_out - worst_in).max() <= NEAR_TIE
