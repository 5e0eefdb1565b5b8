"""Tests of `realjax/realloc/quantizing.py`."""

import jax
import numpy as np

from realjax.models import quantized, transformer
from realjax.parallel.sharding import parameter_shardings
from realjax.realloc.quantizing import quantize
from realjax.testing import tiny_model
from tests.functions.plain import mesh_of, parameters_on, sharp_parameters

CONFIG = tiny_model()
TWIN = quantized.abstract(transformer.abstract_parameters(CONFIG), "int8")


def quantized_on(place, parameters, **options):
    shardings = parameter_shardings(TWIN, mesh_of(place))
    return quantize(parameters, shardings, "int8", **options), shardings


def test_parts_are_quantized_as_the_whole_would_be():
    drawn = sharp_parameters(CONFIG)
    # The sum of attention's output and of `down` is over what tensor cuts.
    found, shardings = quantized_on("f2t2", parameters_on("f2t2", CONFIG, drawn))
    expected = jax.jit(quantized.quantize, static_argnums=1)(drawn, "int8")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings


def test_matrices_are_freed_on_request_and_the_rest_is_passed_on():
    parameters = parameters_on("d1", CONFIG, sharp_parameters(CONFIG))
    kept, _ = quantized_on("d1", parameters)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(parameters))
    assert kept["embedding"] is parameters["embedding"]
    found, _ = quantized_on("d1", parameters, donate=True)
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        assert leaf.is_deleted() == bool(quantized.summed_axes(path)), path
    jax.tree.map(np.testing.assert_array_equal, found, kept)
