"""The reference has algebraic anchors of its own: where the mask is dense it must be plain attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from focus_vllm.config import FocusConfig
from focus_vllm.reference import focus_attention, focus_mask, masked_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 6, 2, 16
LENGTHS = [1, 15, 16, 17, 63, 200]


def random_sequence(length, num_groups=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(length, NUM_HEADS, HEAD_SIZE, generator=generator)
    key = torch.randn(length, NUM_KV_HEADS, HEAD_SIZE, generator=generator)
    value = torch.randn(length, NUM_KV_HEADS, HEAD_SIZE, generator=generator)
    groups = 1 << torch.randint(num_groups, (length,), generator=generator)
    return query, key, value, groups


def causal_attention(query, key, value, scale):
    repeats = query.shape[1] // key.shape[1]
    heads = [part.transpose(0, 1) for part in (query, key, value)]
    heads[1:] = [part.repeat_interleave(repeats, dim=0) for part in heads[1:]]
    return scaled_dot_product_attention(*heads, is_causal=True, scale=scale).transpose(0, 1)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("changes", "everything"),
    [
        ({"window": 200}, False),
        ({"dense_below": 200}, False),
        ({"sink": 200}, False),
        ({"top_k": 8}, True),
    ],
    ids=["window", "dense_below", "sink", "top_k"],
)
def test_mask_that_covers_everything_is_causal_attention(length, changes, everything):
    query, key, value, groups = random_sequence(length)
    config = FocusConfig(**{"window": 0, "sink": 0, "dense_below": 0, **changes})
    query_groups = torch.full_like(groups, 255) if everything else groups
    output, _ = focus_attention(query, key, value, query_groups, groups, config, scale=0.3)
    torch.testing.assert_close(output, causal_attention(query, key, value, 0.3))


@pytest.mark.parametrize("query_start", [0, 1, 11])
@pytest.mark.parametrize(
    ("window", "sink", "dense_below"), [(0, 0, 0), (3, 0, 0), (2, 2, 5), (0, 4, 0), (9, 1, 8)]
)
def test_mask_is_what_the_definition_says_pair_by_pair(query_start, window, sink, dense_below):
    length = 23
    keys = random_sequence(length)[3]
    queries = (random_sequence(length, seed=1)[3] | random_sequence(length, seed=2)[3])[query_start:]
    config = FocusConfig(window=window, sink=sink, dense_below=dense_below)
    mask = focus_mask(queries, keys, config, query_start)
    assert mask.shape == (length - query_start, length)
    for row in range(len(queries)):
        for column in range(length):
            position = row + query_start
            if column > position:
                expected = False
            elif position < dense_below or column < sink or position - column <= window:
                expected = True
            else:
                bits = range(8)
                expected = any(queries[row] >> bit & 1 and keys[column] >> bit & 1 for bit in bits)
            assert mask[row, column].item() == expected, (position, column)


def test_highest_bit_of_a_wide_mask_counts():
    groups = torch.tensor([1 << 31, 0, 1 << 31]).to(torch.int32)
    mask = focus_mask(groups, groups, FocusConfig(window=0, sink=0, dense_below=0))
    assert mask[2].tolist() == [True, False, True]


def test_last_queries_alone_give_the_last_rows_of_the_whole():
    query, key, value, groups = random_sequence(40)
    config = FocusConfig(window=3, sink=1, dense_below=4)
    whole, whole_lse = focus_attention(query, key, value, groups, groups, config, 0.25)
    part, part_lse = focus_attention(query[-7:], key, value, groups[-7:], groups, config, 0.25)
    torch.testing.assert_close(part, whole[-7:])
    torch.testing.assert_close(part_lse, whole_lse[-7:])


def test_partial_outputs_merge_by_their_log_sum_exp():
    query, key, value, _ = random_sequence(30)
    mask = torch.ones(30, 30, dtype=torch.bool).tril()
    left = mask & (torch.arange(30) % 3 == 0)
    whole, whole_lse = masked_attention(query, key, value, mask, 0.25)
    parts = [masked_attention(query, key, value, part, 0.25) for part in (left, mask & ~left)]
    lse = torch.stack([part[1] for part in parts]).logsumexp(dim=0)
    merged = sum(output * (part_lse - lse).exp()[..., None] for output, part_lse in parts)
    torch.testing.assert_close(lse, whole_lse)
    torch.testing.assert_close(merged, whole)


def test_query_without_keys_gives_zero_and_minus_infinity():
    query, key, value, _ = random_sequence(4)
    output, lse = masked_attention(query, key, value, torch.zeros(4, 4, dtype=torch.bool), 1.0)
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))


def test_softcap_bounds_the_scores():
    query, key, value, _ = random_sequence(2)
    mask = torch.tensor([[True, False], [True, True]])
    output, lse = masked_attention(query * 100, key, value, mask, 1.0, softcap=2.0)
    scores = [2.0 * torch.tanh(50 * (query[1, 5] * key[j, 1]).sum()) for j in (0, 1)]
    weights = torch.stack(scores).softmax(dim=0)
    torch.testing.assert_close(output[1, 5], weights[0] * value[0, 1] + weights[1] * value[1, 1])
    assert lse.abs().max() <= 2.0 + 0.7


def test_half_precision_inputs_are_computed_in_float32():
    query, key, value, _ = (part.bfloat16() for part in random_sequence(9))
    output, lse = masked_attention(query, key, value, torch.ones(9, 9, dtype=torch.bool), 0.25)
    assert output.dtype == lse.dtype == torch.float32
