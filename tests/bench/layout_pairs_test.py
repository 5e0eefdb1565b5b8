"""Tests of `realjax/bench/layout_pairs.py`: models and pairs as flags."""

import pytest

from realjax.bench.layout_pairs import (
    GIGABYTE,
    LARGE_PAIRS,
    PAIRS,
    Pair,
    fitted,
    parse_model,
    parse_pairs,
)
from realjax.models.parameters import abstract_parameters
from realjax.realloc.layouts import leaf_classes


def test_the_default_model_is_a_gigabyte():
    assert 4 * GIGABYTE.num_parameters / 2**30 == pytest.approx(1, abs=0.01)


def test_pairs_are_read_with_commas_between_devices_too():
    pairs = parse_pairs("f8:t8,t2@0,3:t4@0-2,5")
    assert [str(pair) for pair in pairs] == ["f8@0-7:t8@0-7", "t2@0,3:t4@0-2,5"]
    assert pairs[1].num_devices == 6
    with pytest.raises(ValueError, match="'f8' is no pair"):
        Pair.parse("f8")


def test_models_have_names_or_sizes():
    assert parse_model("1gib") == GIGABYTE
    assert parse_model("llama-8b") == parse_model("llama-3.1-8b")
    assert parse_model("qwen3-8b").family == "qwen3"
    changed = parse_model("width=512,num_layers=3")
    assert (changed.width, changed.num_layers) == (512, 3)
    assert changed.vocab_size == GIGABYTE.vocab_size
    with pytest.raises(ValueError, match="depth in 'depth=3': no such sizes"):
        parse_model("depth=3")
    with pytest.raises(ValueError, match="no Llama of size '9b'"):
        parse_model("llama-9b")


@pytest.mark.parametrize("text", PAIRS)
def test_the_default_pairs_fit_the_default_model(text):
    pair = Pair.parse(text)
    assert pair.num_devices <= 8
    assert fitted(GIGABYTE, [pair]).num_parameters == GIGABYTE.num_parameters
    assert leaf_classes(abstract_parameters(GIGABYTE), pair.source, pair.destination)


def test_a_model_is_padded_to_what_all_pairs_divide():
    pairs = [Pair.parse(text) for text in LARGE_PAIRS]
    model = fitted(parse_model("llama-8b"), pairs)
    # 14336 = 3.5 × 4096, and 128256 = 31.3 × 4096.
    assert model.mlp_width == 4 * 4096
    assert model.padded_vocab_size == 32 * 4096
    for pair in pairs:
        leaf_classes(abstract_parameters(model), pair.source, pair.destination)
