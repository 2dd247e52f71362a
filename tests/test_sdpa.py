"""The CPU path against the reference, on paged keys in permuted rows."""

import pytest
import torch

from focus_vllm.config import FocusConfig
from focus_vllm.kernels.sdpa import PagedKeys, focus_sdpa
from focus_vllm.reference import focus_attention, focus_mask
from focus_vllm.routing import top_groups

HEADS = {"mha": (4, 4, 32), "gqa": (8, 2, 64), "mqa": (6, 1, 16)}


def random_sequence(seq_len, num_queries, heads, config, seed=0, spare_rows=37):
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, head_size = heads
    rows = torch.full((seq_len + spare_rows, num_kv_heads, 2 * head_size), float("nan"))
    slots = torch.randperm(len(rows), generator=generator)[:seq_len]
    rows[slots] = torch.randn(seq_len, num_kv_heads, 2 * head_size, generator=generator)
    scores = torch.randn(seq_len, config.num_groups, generator=generator)
    keys = PagedKeys(rows, slots, top_groups(scores, config.key_k))
    query = torch.randn(num_queries, num_heads, head_size, generator=generator)
    return query, top_groups(scores, config.top_k)[seq_len - num_queries :], keys


def reference(query, query_groups, keys, config, scale, softcap):
    key, value = keys.rows[keys.slots].chunk(2, dim=-1)
    return focus_attention(query, key, value, query_groups, keys.groups, config, scale, softcap)[0]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("key_k", "top_k"), [(1, 1), (1, 2), (2, 2), (2, 1), (8, 8)])
@pytest.mark.parametrize(
    ("seq_len", "num_queries"), [(1, 1), (63, 17), (700, 1), (700, 300), (1000, 1000), (1501, 257)]
)
def test_output_equals_the_reference(heads, key_k, top_k, seq_len, num_queries):
    config = FocusConfig(num_groups=8, key_k=key_k, top_k=top_k, window=50, sink=3, dense_below=0)
    query, query_groups, keys = random_sequence(seq_len, num_queries, heads, config)
    output, pairs = focus_sdpa(query, query_groups, keys, config, scale=0.2)
    expected = reference(query, query_groups, keys, config, 0.2, 0.0)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)
    assert pairs == int(focus_mask(query_groups, keys.groups, config, seq_len - num_queries).sum())


@pytest.mark.parametrize("settings", [
    {"window": 0, "sink": 0},
    {"window": 0, "sink": 5},
    {"window": 2000},
    {"num_groups": 16, "top_k": 3, "key_k": 2},
    {"num_groups": 32, "top_k": 4},
    {"num_groups": 1},
])  # fmt: skip
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_every_setting_equals_the_reference(settings, softcap):
    config = FocusConfig(**{"window": 100, "sink": 4, "dense_below": 0, **settings})
    query, query_groups, keys = random_sequence(900, 600, HEADS["gqa"], config, seed=1)
    output, _ = focus_sdpa(query, query_groups, keys, config, 0.3, softcap)
    torch.testing.assert_close(
        output, reference(query, query_groups, keys, config, 0.3, softcap), atol=2e-6, rtol=1e-5
    )


def test_the_output_of_a_chunk_does_not_depend_on_where_it_was_cut():
    config = FocusConfig(window=40, dense_below=0)
    query, query_groups, keys = random_sequence(800, 800, HEADS["gqa"], config, seed=2)
    whole, _ = focus_sdpa(query, query_groups, keys, config, 0.2)
    for start, end in ((0, 1), (1, 300), (300, 799), (799, 800)):
        prefix = PagedKeys(keys.rows, keys.slots[:end], keys.groups[:end])
        part, _ = focus_sdpa(query[start:end], query_groups[start:end], prefix, config, 0.2)
        torch.testing.assert_close(part, whole[start:end], atol=2e-6, rtol=1e-5)
