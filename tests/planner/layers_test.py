"""Tests of `realjax/planner/layers.py`."""

import dataclasses

import pytest

from realjax.models.config import MoEConfig
from realjax.parallel.allocation import Allocation
from realjax.planner.layers import (
    feed_forward_weights,
    largest_weights,
    layer_values,
    layer_weights,
)
from realjax.testing import tiny_model

# D = 32, 4 query heads and 2 of keys and values of 8 each, F = 64.
MODEL = tiny_model()


def values(tensor=1, expert=1, is_sequence_cut=False, model=MODEL):
    return layer_values(model, tensor, expert, is_sequence_cut)


def test_a_layer_holds_most_between_gate_and_down():
    # x and norm(x), 32 each; gate and up, 64 each.
    assert values().forward == 2 * 32 + 2 * 64
    # A wide attention holds more: queries, keys, values, and what it gives.
    wide = dataclasses.replace(MODEL, mlp_width=16)
    assert values(model=wide).forward == 2 * 32 + 32 + 16 + 16 + 32


def test_tensor_parts_hold_their_share_and_the_sum_of_all():
    whole, half = values(), values(tensor=2)
    assert half.mlp == whole.mlp / 2
    # The stream is whole on each, and a sum of products as wide.
    assert half.forward == 3 * 32 + 64


def test_key_and_value_heads_are_repeated_until_tensor_divides_them():
    assert values(tensor=4).kv_heads == 8  # One of 2 heads, on each of 4.


def test_sequences_that_are_cut_leave_less_of_the_stream():
    whole, cut = values(tensor=2), values(tensor=2, is_sequence_cut=True)
    assert whole.kept("block") == 32
    assert cut.kept("block") == 16


def test_what_is_kept_grows_with_what_is_not_computed_anew():
    kept = [values().kept(remat) for remat in ("offload", "block", "dots", "none")]
    # dots: input, what attention adds; q, k, v; gate, up.
    assert kept[:3] == [0, 32, 2 * 32 + 32 + 2 * 16 + 2 * 64]
    # none: inputs of products, too, what attention gives, and gate × up.
    assert kept[3] == kept[2] + 2 * 32 + 32 + 64


def test_experts_work_on_pairs_of_tokens_and_experts():
    moe = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=8, top_k=2))
    assert values(model=moe).pairs == 2
    # A shard of experts has room for a quarter more than its even share.
    assert values(model=moe, expert=4).pairs == 2.5
    assert values(model=moe).forward == 2 * 32 + 2 * (2 * 32 + 2 * 64)


@pytest.mark.parametrize(("strategy", "parts"), [("d8", 1), ("f8", 1), ("d4t2", 2)])
def test_weights_of_a_layer_are_gathered_over_fsdp_and_cut_over_tensor(strategy, parts):
    allocation = Allocation.parse(strategy)
    assert feed_forward_weights(MODEL, allocation) == 3 * 32 * 64 / parts
    assert largest_weights(MODEL, allocation) == 32 * 64 / parts
    assert layer_weights(MODEL, allocation) == MODEL.num_layer_parameters / parts
