"""Routing: which groups a token gets, and Sinkhorn, which keeps the groups balanced."""

import pytest
import torch

from focus_vllm.routing import Router, mask_dtype, route, sinkhorn, top_groups


def bits_of(mask, num_groups=8):
    return [bit for bit in range(num_groups) if mask >> bit & 1]


@pytest.mark.parametrize(
    ("num_groups", "dtype"),
    [
        (1, torch.uint8),
        (8, torch.uint8),
        (9, torch.int16),
        (16, torch.int16),
        (17, torch.int32),
        (32, torch.int32),
    ],
)
def test_bitmask_is_as_narrow_as_the_groups_allow(num_groups, dtype):
    assert mask_dtype(num_groups) == dtype
    masks = top_groups(torch.randn(5, num_groups), 1)
    assert masks.dtype == dtype


@pytest.mark.parametrize("num_groups", [1, 8, 16, 17, 32])
def test_every_group_has_a_bit_of_its_own(num_groups):
    masks = top_groups(torch.eye(num_groups), 1)
    assert [bits_of(mask.item(), num_groups) for mask in masks] == [[group] for group in range(num_groups)]


@pytest.mark.parametrize(
    ("scores", "k", "groups"),
    [
        ([1.0, 3.0, 2.0, 0.0], 1, [1]),
        ([1.0, 3.0, 2.0, 0.0], 2, [1, 2]),
        ([5.0, 5.0, 5.0, 5.0], 1, [0]),
        ([5.0, 5.0, 5.0, 5.0], 3, [0, 1, 2]),
        ([0.0, 7.0, 1.0, 7.0], 1, [1]),
        ([7.0, 1.0, 1.0, 0.0], 2, [0, 1]),
        ([1.0, 2.0, 3.0, 4.0], 4, [0, 1, 2, 3]),
    ],
)
def test_best_groups_win_and_ties_go_to_the_lower_group(scores, k, groups):
    assert bits_of(top_groups(torch.tensor([scores]), k).item()) == groups


def test_leading_dimensions_are_kept():
    scores = torch.randn(2, 3, 8)
    assert torch.equal(top_groups(scores, 2), torch.stack([top_groups(row, 2) for row in scores]))


def test_folded_layer_ranks_as_projection_centroids_and_potential_do():
    torch.manual_seed(0)
    hidden, projection, centroids = torch.randn(50, 24), torch.randn(24, 16), torch.randn(8, 16)
    potential = torch.randn(8)
    weight, bias = Router(projection, centroids, potential).fold(temperature=0.1)
    assert weight.shape == (8, 24)
    expected = (hidden.double() @ projection.double()) @ centroids.double().T / 0.1 + potential.double()
    torch.testing.assert_close((hidden @ weight.T + bias).double(), expected, rtol=1e-4, atol=1e-3)


def test_queries_with_centroids_of_their_own_choose_by_them():
    torch.manual_seed(0)
    hidden, parts = torch.randn(50, 24), [torch.randn(*shape) for shape in ((24, 16), (8, 16), (8,))]
    keys_alone = Router(*parts)
    queries_alone = Router(parts[0], torch.randn(8, 16), torch.randn(8))
    both = Router(*parts, queries_alone.centroids, queries_alone.potential)
    weight, bias = both.fold(0.1)
    assert (weight.shape, bias.shape) == ((2, 8, 24), (2, 8))
    keys, queries = route(hidden, weight, bias, 1, 3)
    assert torch.equal(keys, route(hidden, *keys_alone.fold(0.1), 1, 1)[0])
    assert torch.equal(queries, route(hidden, *queries_alone.fold(0.1), 1, 3)[1])


def test_half_precision_router_folds_in_float32():
    router = Router(torch.randn(8, 4).half(), torch.randn(2, 4).half(), torch.randn(2).half())
    assert [part.dtype for part in router.fold(0.1)] == [torch.float32, torch.float32]


@pytest.mark.parametrize(("key_k", "top_k"), [(1, 1), (1, 2), (2, 2), (2, 1), (8, 8)])
def test_token_gets_key_k_groups_as_key_and_top_k_as_query(key_k, top_k):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(40, 24), torch.randn(8, 24), torch.randn(8)
    key_groups, query_groups = route(hidden, weight, bias, key_k, top_k)
    small, large = sorted((key_k, top_k))
    assert all(len(bits_of(mask)) == key_k for mask in key_groups.tolist())
    assert all(len(bits_of(mask)) == top_k for mask in query_groups.tolist())
    both = key_groups & query_groups
    assert torch.equal(both, key_groups if small == key_k else query_groups)
    assert large >= small


def test_token_is_routed_alike_whatever_is_around_it():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(64, 24), torch.randn(8, 24), torch.randn(8)
    whole, _ = route(hidden, weight, bias, 1, 1)
    alone = torch.cat([route(row[None], weight, bias, 1, 1)[0] for row in hidden])
    assert torch.equal(whole, alone)


def sinkhorn_as_published(scores, iterations):
    """arXiv 2604.03260: in probability space, divide by the sums over tokens, then over groups."""
    assignment = scores.double().exp()
    for _ in range(iterations):
        assignment = assignment / assignment.sum(dim=0, keepdim=True)
        assignment = assignment / assignment.sum(dim=1, keepdim=True)
    return assignment


def test_sinkhorn_agrees_with_the_published_iteration():
    torch.manual_seed(0)
    scores = torch.randn(200, 8) + torch.tensor([3.0, 0, 0, 0, 0, 0, 0, -2.0])
    assignment, _ = sinkhorn(scores, iterations=50)
    torch.testing.assert_close(assignment.double(), sinkhorn_as_published(scores, 50), rtol=0, atol=1e-5)


def test_ten_iterations_balance_groups_where_softmax_collapses():
    torch.manual_seed(0)
    scores = torch.randn(512, 8) + torch.tensor([6.0, 0, 0, 0, 0, 0, 0, 0])
    assignment, _ = sinkhorn(scores, iterations=10)
    torch.testing.assert_close(assignment.sum(dim=1), torch.ones(512))
    assert scores.softmax(dim=1).mean(dim=0).max() > 0.9
    assert assignment.mean(dim=0).max() < 0.14


def test_frozen_potentials_reproduce_the_assignment_token_by_token():
    torch.manual_seed(0)
    scores = 4 * torch.randn(300, 8)
    assignment, potential = sinkhorn(scores, iterations=10)
    torch.testing.assert_close((scores + potential).softmax(dim=1), assignment)
    assert torch.equal(top_groups(scores + potential, 2), top_groups(assignment.log(), 2))


def test_sinkhorn_survives_scores_that_overflow_in_probability_space():
    scores = 500 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    assignment, potential = sinkhorn(scores)
    assert assignment.isfinite().all()
    assert potential.isfinite().all()


def test_sinkhorn_has_a_gradient():
    scores = torch.randn(32, 4, requires_grad=True)
    sinkhorn(scores)[0][:, 0].square().sum().backward()
    assert scores.grad.abs().sum() > 0
