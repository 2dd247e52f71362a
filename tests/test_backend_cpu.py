"""What the CPU backend keeps beside vLLM's cache, without an engine."""

import pytest
import torch
from vllm import _custom_ops as ops

from focus_vllm.config import FocusConfig
from focus_vllm.engine.backend_cpu import _Cache
from focus_vllm.engine.deferred import CAPACITY, DeferredRouting
from focus_vllm.engine.state import AttentionCounts, LayerFocus
from focus_vllm.routing import route

HIDDEN_SIZE = 24


@pytest.mark.parametrize(
    ("dtype", "head_size", "isa"),
    [
        (torch.float32, 32, "vec"),
        (torch.bfloat16, 32, "vec"),
        (torch.bfloat16, 128, "vec"),
        (torch.bfloat16, 80, "vec16"),
    ],
)
def test_unpacked_rows_are_the_keys_and_values_that_vllm_stored(dtype, head_size, isa):
    num_blocks, num_kv_heads, block_size = 5, 3, 64
    whole = torch.zeros(num_blocks, num_kv_heads, block_size, 4 * head_size, dtype=dtype)
    cache = _Cache.of(whole)
    key, value = torch.randn(2, 150, num_kv_heads, head_size).to(dtype)
    slots = torch.randperm(num_blocks * block_size)[:150]
    halves = cache.stock.view(num_blocks, num_kv_heads, 2 * block_size, head_size).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, isa)
    cache.unpack([4, 0, 2], isa)
    for block in range(num_blocks):
        here = slots // block_size == block
        expected = torch.cat([key, value], dim=-1)[here]
        rows = cache.rows[slots[here]]
        assert torch.equal(rows, expected if block in (4, 0, 2) else torch.zeros_like(expected))


def routed_layers(num_layers=3, num_slots=500):
    config = FocusConfig(num_groups=8, key_k=2, top_k=2)
    buffers = torch.zeros(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    layers = [
        LayerFocus(config, torch.randn(8, HIDDEN_SIZE), torch.randn(8), *buffers, AttentionCounts())
        for _ in range(num_layers)
    ]
    for layer in layers:
        layer.store = torch.zeros(num_slots, dtype=torch.uint8)
    return layers


def test_late_routing_stores_what_routing_at_once_would_even_for_a_slot_given_away_meanwhile():
    torch.manual_seed(0)
    layers = routed_layers()
    deferred = DeferredRouting(layers, torch.float32)
    expected = [torch.zeros_like(layer.store) for layer in layers]
    for step in range(20):
        slots = (torch.tensor([3, 50, 7, 8]) + step) % 60  # slot 50 comes again as 3 + 47
        assert deferred.begin_step(slots)
        for layer, store in zip(layers, expected, strict=True):
            hidden = torch.randn(9, HIDDEN_SIZE)  # rows after the fourth are padding
            assert layer.deferred.keep(layer.deferred_row, hidden)
            store[slots] = route(hidden[:4], layer.weight, layer.bias, 2, 2)[0]
    deferred.flush()
    for layer, store in zip(layers, expected, strict=True):
        assert torch.equal(layer.store, store)


def test_hidden_states_outside_a_step_are_not_kept():
    layers = routed_layers()
    deferred = DeferredRouting(layers, torch.float32)
    hidden = torch.randn(1, HIDDEN_SIZE)
    assert not deferred.keep(0, hidden)
    assert deferred.begin_step(torch.tensor([5]))
    assert deferred.keep(0, hidden)
    assert not deferred.keep(0, hidden), "a dummy run after the step"
    assert not deferred.begin_step(torch.arange(CAPACITY + 1))
