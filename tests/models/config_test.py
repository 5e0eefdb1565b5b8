"""ModelConfig and RopeScaling: counts, and what they refuse."""

import dataclasses
import math

import jax
import pytest

from realjax.models.config import ModelConfig, RopeScaling
from realjax.models.families.llama import size
from realjax.models.transformer import Parameter, abstract_parameters

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
        ({"head": "value"}, "head is 'value'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "yarn", "factor": 2.0}, "kind 'yarn' is not supported"),
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
