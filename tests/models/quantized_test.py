"""Tests of `realjax/models/quantized.py`, and of models with weights of 8 bits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models import heads, quantized, transformer
from realjax.models.quantized import Quantized
from realjax.parallel.allocation import Allocation
from realjax.parallel.sharding import (
    bytes_per_device,
    padded_for,
    parameter_shardings,
)
from realjax.realloc.quantizing import quantize
from tests.functions.plain import (
    batch_on,
    mesh_of,
    model_on,
    parameters_on,
    plain_logits,
    sharp_parameters,
)
from tests.tiny_families import FAMILIES

TOKENS = np.random.default_rng(0).integers(2, 61, (4, 16), np.int32)


def is_quantized(node):
    return isinstance(node, Quantized)


small_of = jax.jit(quantized.quantize, static_argnums=1)


@functools.cache
def logits_of(name, dtype=""):
    """Of a family, in float32 or with weights of 8 bits, on one device."""
    parameters = sharp_parameters(FAMILIES[name])
    if dtype:
        parameters = small_of(parameters, dtype)
    return np.asarray(plain_logits(parameters, FAMILIES[name], TOKENS))


@jax.jit
def whole(parameters):
    """The parameters that quantized ones stand for."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            quantized.dequantized(leaf, quantized.summed_axes(path))
            if is_quantized(leaf)
            else leaf
        ),
        parameters,
        is_leaf=is_quantized,
    )


def test_a_column_has_the_scale_of_its_largest_weight():
    # Columns reach to 127 and 2.54: scales 1 and 0.02. 1.27 is 63.5 of the latter, and
    # halves go to the even neighbour. A column of zeros needs no scale.
    x = jnp.array([[127.0, 2.54, 0.0], [-3.4, -1.0, 0.0]])
    found = quantized.in_eight_bits(x, "int8", (0,))
    np.testing.assert_allclose(found.scale, [1.0, 0.02, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(found.values, [[127, 127, 0], [-3, -50, 0]])
    np.testing.assert_allclose(
        quantized.dequantized(found, (0,)),
        [[127.0, 2.54, 0.0], [-3.0, -1.0, 0.0]],
        rtol=1e-6,
    )


def test_floats_of_8_bits_keep_three_bits_of_the_fraction():
    # Scale 1. Between 16 and 32 numbers are 2 apart, below 2^-6 they are 2^-9 apart.
    x = jnp.array([448.0, -19.1, 2.0**-9, 0.6 * 2.0**-9, 0.4 * 2.0**-9])[:, None]
    found = quantized.in_eight_bits(x, "float8_e4m3fn", (0,))
    assert found.values.dtype == jnp.uint8
    np.testing.assert_array_equal(
        quantized.numbers(found, jnp.float32)[:, 0],
        [448.0, -20.0, 2.0**-9, 2.0**-9, 0.0],
    )


@pytest.mark.parametrize("dtype", quantized.DTYPES)
@pytest.mark.parametrize("axes", [(1,), (1, 2), (2,)])
def test_the_error_is_within_half_a_step(dtype, axes):
    generator = np.random.default_rng(1)
    spread = np.exp(generator.normal(size=(3, 8, 6, 16)) * 3)
    x = (generator.normal(size=spread.shape) * spread).astype(np.float32)
    found = quantized.in_eight_bits(jnp.asarray(x), dtype, axes)
    error = np.abs(np.asarray(quantized.dequantized(found, axes)) - x)
    scale = np.expand_dims(np.asarray(found.scale), axes)
    half_step = 0.5 * scale
    if dtype != "int8":
        half_step = np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10)
    assert (error <= half_step * (1 + 1e-4)).all()
    assert error.max() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_matrices_of_layers_are_quantized_and_nothing_else(name):
    abstract = transformer.abstract_parameters(FAMILIES[name])
    leaves = jax.tree_util.tree_leaves_with_path(
        quantized.abstract(abstract, "int8"),
        is_leaf=lambda node: is_quantized(node) or hasattr(node, "axes"),
    )
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): is_quantized(leaf)
        for path, leaf in leaves
    }
    for path, is_small in names.items():
        is_whole = re.search(r"norm|bias|router|embedding|^head|^score", path)
        assert is_small != bool(is_whole), path
    assert any(names.values())


@pytest.mark.parametrize("dtype", quantized.DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_abstract_twin_has_the_shapes_and_types_of_the_arrays(name, dtype):
    config = FAMILIES[name]
    init = functools.partial(transformer.init_parameters, config)
    made = jax.eval_shape(
        lambda key: quantized.quantize(init(key), dtype), jax.random.key(0)
    )
    twin = quantized.abstract(transformer.abstract_parameters(config), dtype)
    as_array = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype or "float32")
    found = jax.tree.map(as_array, twin, is_leaf=lambda node: hasattr(node, "axes"))
    assert found == made
    for leaf in jax.tree.leaves(twin, is_leaf=lambda node: hasattr(node, "axes")):
        assert len(leaf.axes) == len(leaf.shape) == len(leaf.real_shape)


# The mean change of a logit, of the deviation of logits. A router that picks another
# expert changes a token's output as a whole.
BOUNDS = {"int8": 0.02, "float8_e4m3fn": 0.1}
MIXTURE = 2.0


def marked(names, sample):
    return [
        n if n in sample else pytest.param(n, marks=pytest.mark.slow) for n in names
    ]


@pytest.mark.parametrize("dtype", quantized.DTYPES)
@pytest.mark.parametrize("name", marked(FAMILIES, ("llama", "qwen3_moe")))
def test_every_family_is_within_a_bound_of_float32(name, dtype):
    config = FAMILIES[name]
    exact, found = logits_of(name), logits_of(name, dtype)
    change = np.abs(found - exact).mean() / exact.std()
    assert 0 < change < BOUNDS[dtype] * (MIXTURE if config.moe else 1)
    # The scale behind the sum is the same algebra as whole weights before it.
    same = whole(small_of(sharp_parameters(config), dtype))
    same = plain_logits(same, config, TOKENS)
    np.testing.assert_allclose(found, same, atol=2e-5)


def logits(program, parameters, tokens):
    config = program.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden = transformer.hidden_states(
        parameters,
        config,
        tokens,
        positions,
        jnp.ones_like(tokens),
        dtype=program.dtype,
        partition=program.partition,
    )
    return heads.logits(parameters, config, hidden, program.partition.constrain)


def on_mesh(name, dtype, place):
    """Logits, the quantized parameters, and the compiled program, on a mesh."""
    allocation = Allocation.parse(place)
    config = padded_for(FAMILIES[name], [allocation])
    abstract = quantized.abstract(transformer.abstract_parameters(config), dtype)
    mesh, program = mesh_of(place), model_on(place, config)
    small = quantize(
        parameters_on(place, config, sharp_parameters(config)),
        parameter_shardings(abstract, mesh, options=allocation.options),
        dtype,
    )
    counted = bytes_per_device(abstract, mesh, options=allocation.options)
    tokens = batch_on(place, {"tokens": TOKENS})["tokens"]
    compiled = (
        jax.jit(functools.partial(logits, program)).lower(small, tokens).compile()
    )
    return np.asarray(compiled(small, tokens))[..., :61], small, counted, compiled


SLOW_MESHES = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
        ("llama", "f2", "int8"),
        ("llama", "t2", "float8_e4m3fn"),
        ("llama", "d2f2t2", "float8_e4m3fn"),
        ("llama", "f2+zero1", "int8"),
        ("gpt2", "s3", "int8"),
        ("gemma3", "t4", "int8"),
        ("qwen3_moe", "t2", "float8_e4m3fn"),
        ("qwen3_moe", "f2", "int8"),
        ("qwen3_moe", "e2f2t2", "float8_e4m3fn"),
    )
]


@pytest.mark.parametrize(
    ("name", "place", "dtype"),
    [("llama", "t2", "int8"), ("qwen3_moe", "e2f2", "int8"), *SLOW_MESHES],
)
def test_meshes_agree_and_hold_the_bytes_that_are_counted(name, place, dtype):
    found, small, counted, _ = on_mesh(name, dtype, place)
    np.testing.assert_allclose(found, logits_of(name, dtype), atol=2e-5)
    held = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(small)]
    assert sum(held) == counted


@pytest.mark.parametrize(
    ("name", "place"),
    [("llama", "d1"), pytest.param("qwen3_moe", "f2", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("dtype", quantized.DTYPES)
def test_no_stack_of_matrices_is_ever_cast_as_a_whole(name, place, dtype):
    _, small, _, compiled = on_mesh(name, dtype, place)
    text = compiled.as_text()
    stacks = {
        leaf.values.sharding.shard_shape(leaf.shape)
        for leaf in jax.tree.leaves(small, is_leaf=is_quantized)
        if is_quantized(leaf)
    }
    for shape in stacks:
        sizes = ",".join(map(str, shape))
        assert re.search(rf"\b[su]8\[{sizes}\]", text), sizes
        assert not re.search(rf"\b(?:f32|bf16|f16|f8\w+)\[{sizes}\]", text), sizes
