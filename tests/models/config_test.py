"""ModelConfig and RopeScaling: counts, and what they refuse."""

import dataclasses
import math

import jax
import pytest

from realjax.models.config import ModelConfig, MoEConfig, RopeScaling
from realjax.models.families.llama import size
from realjax.models.transformer import Parameter, abstract_parameters
from tests.tiny_families import FAMILIES

TINY = ModelConfig(
    vocab_size=11,
    width=6,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=5,
)


@pytest.mark.parametrize("head", ("language", "scalar"))
@pytest.mark.parametrize("tie_embeddings", (False, True))
def test_num_parameters_is_the_size_of_the_tree(head, tie_embeddings):
    config = dataclasses.replace(TINY, head=head, tie_embeddings=tie_embeddings)
    tree = abstract_parameters(config)
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Parameter))
    assert config.num_parameters == sum(math.prod(leaf.shape) for leaf in leaves)


def test_published_sizes_have_the_published_numbers_of_parameters():
    assert size("2-7b").num_parameters == 6_738_415_616
    assert size("3.1-8b").num_parameters == 8_030_261_248
    assert size("3.2-1b").num_parameters == 1_235_814_400


def test_flops_of_a_token_are_two_per_weight_and_four_per_coordinate_seen():
    # A layer has 6·(4+2+2+4)·4 = 288 weights in attention... query 6·16, key and value
    # 6·8 each, output 16·6: 96+48+48+96 = 288, and 3·6·5 = 90 in the mlp; the head 66.
    # Attention: 4 operations, 2 layers, 16 query coordinates, 7 keys.
    assert TINY.flops_per_token(7) == 2 * (2 * (288 + 90) + 66) + 4 * 2 * 16 * 7


def test_fewer_key_heads_save_their_projections_but_no_scores():
    whole = dataclasses.replace(TINY, num_kv_heads=4)
    saved = whole.flops_per_token(100) - TINY.flops_per_token(100)
    # Two projections, two heads of width 4 less, two layers, two operations a weight.
    assert saved == 2 * 2 * 2 * 6 * 2 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "4 query heads do not split over 3"),
        ({"head_dim": 5}, "head_dim is 5; .* must be even"),
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"head": "value"}, "head.*'value'"),
        ({"norm": "batch"}, "norm.*'batch'"),
        ({"activation": "selu"}, "activation.*'selu'"),
        ({"window": 0}, "window is 0; .* at least 1"),
        ({"window": 4, "windowed_layers": (True,)}, "1 entries for 2 layers"),
        ({"windowed_layers": (True, False)}, "`window` is None"),
        (
            {"moe": MoEConfig(num_experts=2, top_k=1), "is_gated": False},
            "Experts here are gated",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "ntk", "factor": 2.0}, "kind 'ntk' is not supported"),
        (
            {"kind": "yarn", "factor": 2.0, "slow_turns": 40.0},
            "slow_turns < fast_turns",
        ),
        ({"kind": "linear", "factor": 0.5}, "factor 0.5; it must be at least 1"),
        (
            {"kind": "llama3", "factor": 2.0, "low_frequency_factor": 4.0},
            "low_frequency_factor < high_frequency_factor",
        ),
    ],
)
def test_rotary_scaling_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)


def test_longrope_needs_a_factor_for_each_pair_of_coordinates():
    scaling = RopeScaling(
        kind="longrope", short_factors=(1.0, 1.0), long_factors=(2.0,)
    )
    with pytest.raises(ValueError, match="1 long_factors for heads of width 4"):
        dataclasses.replace(TINY, rope_scaling=scaling)


@pytest.mark.parametrize(
    "fields", [{"num_experts": 2, "top_k": 3}, {"num_experts": 2, "top_k": 0}]
)
def test_a_token_goes_to_some_of_the_experts(fields):
    with pytest.raises(ValueError, match=f"top_k is {fields['top_k']} of 2 experts"):
        MoEConfig(**fields)


@pytest.mark.parametrize(("name", "config"), FAMILIES.items())
def test_num_parameters_is_the_size_of_the_tree_in_every_family(name, config):
    padded = dataclasses.replace(config, vocab_multiple=8, layer_multiple=2)
    for changed in (config, padded):
        tree = abstract_parameters(changed)
        leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Parameter))
        real = sum(math.prod(leaf.real_shape) for leaf in leaves)
        assert changed.num_parameters == real
    # 61 ids and 3 layers, in rows and stacks of 64 and 4.
    assert tree["embedding"].shape == (64, 32)
    assert tree["layers"]["attention_norm"]["scale"].shape == (4, 32)


def test_what_is_sampled_stays_where_rotations_do_not_depend_on_its_length():
    scaling = RopeScaling(kind="dynamic", factor=4.0, original_max_positions=100)
    config = dataclasses.replace(TINY, rope_scaling=scaling, max_positions=100)
    assert config.longest_sequence(is_sampled=True) == 100
    assert config.longest_sequence(is_sampled=False) == 400
    plain = dataclasses.replace(TINY, max_positions=100)
    assert plain.longest_sequence(is_sampled=False) == 100
