"""The transformer: packing, padding, pages, recomputation, and shardings."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models import heads, pages
from realjax.models.config import ModelConfig
from realjax.models.transformer import (
    INIT_DEVIATION,
    Parameter,
    abstract_parameters,
    hidden_states,
    init_parameters,
)
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for
from realjax.parallel.sharding import (
    parameter_shardings,
    replicated,
    rows_sharding,
)
from tests.models.paged import extend

CONFIG = ModelConfig(
    vocab_size=32,
    width=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_width=24,
)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def parameters():
    """Larger than a new model's: every term must show in the output."""
    drawn = jax.jit(init_parameters, static_argnums=0)(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, drawn)


def draw_tokens(*shape, seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 0, CONFIG.vocab_size)


def positions_of(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)


@functools.partial(jax.jit, static_argnames=("remat", "dtype"))
def run(parameters, tokens, positions, segment_ids, *, remat="none", dtype=jnp.float32):
    return hidden_states(
        parameters, CONFIG, tokens, positions, segment_ids, remat=remat, dtype=dtype
    )


def run_rows(parameters, tokens, **options):
    ones = jnp.ones(tokens.shape, jnp.int32)
    return run(parameters, tokens, positions_of(tokens), ones, **options)


def total(parameters, tokens, **options):
    """A scalar in which every hidden state counts differently."""
    return jnp.sum(jnp.sin(run_rows(parameters, tokens, **options)))


def assert_trees_close(left, right, atol=TOLERANCE):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), left, right)


@pytest.mark.parametrize("head", ("language", "scalar"))
@pytest.mark.parametrize("tie_embeddings", (False, True))
def test_new_parameters_have_the_abstract_shapes(head, tie_embeddings):
    config = dataclasses.replace(CONFIG, head=head, tie_embeddings=tie_embeddings)
    drawn = jax.eval_shape(
        functools.partial(init_parameters, config), jax.random.key(0)
    )
    shapes = jax.tree.map(
        lambda parameter: jax.ShapeDtypeStruct(parameter.shape, jnp.float32),
        abstract_parameters(config),
        is_leaf=lambda x: isinstance(x, Parameter),
    )
    assert drawn == shapes


def test_every_dimension_has_a_logical_axis():
    leaves = jax.tree.leaves(
        abstract_parameters(CONFIG), is_leaf=lambda x: isinstance(x, Parameter)
    )
    assert all(len(leaf.shape) == len(leaf.axes) for leaf in leaves)


def test_new_matrices_have_the_documented_deviations():
    config = dataclasses.replace(CONFIG, width=64, mlp_width=128, vocab_size=256)
    drawn = jax.jit(init_parameters, static_argnums=0)(config, jax.random.key(0))
    layers = drawn["layers"]
    plain = [drawn["embedding"], drawn["head"]["kernel"]]
    plain += [layers["attention"][name]["kernel"] for name in ("query", "key", "value")]
    plain += [layers["mlp"][name]["kernel"] for name in ("gate", "up")]
    for matrix in plain:
        np.testing.assert_allclose(matrix.std(), INIT_DEVIATION, rtol=0.05)
    residual = INIT_DEVIATION / (2 * config.num_layers) ** 0.5
    for matrix in (
        layers["attention"]["output"]["kernel"],
        layers["mlp"]["down"]["kernel"],
    ):
        np.testing.assert_allclose(matrix.std(), residual, rtol=0.05)
    assert (layers["attention_norm"]["scale"] == 1).all()


def test_layers_are_drawn_independently(parameters):
    kernel = parameters["layers"]["mlp"]["gate"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


def test_sequences_packed_in_a_row_are_as_in_rows_of_their_own(parameters):
    first, second = draw_tokens(1, 7), draw_tokens(1, 5, seed=2)
    packed = jnp.concatenate([first, second], axis=1)
    positions = jnp.concatenate([positions_of(first), positions_of(second)], axis=1)
    segment_ids = jnp.asarray([[1] * 7 + [2] * 5], jnp.int32)
    hidden = run(parameters, packed, positions, segment_ids)
    np.testing.assert_allclose(
        hidden[:, :7], run_rows(parameters, first), atol=TOLERANCE
    )
    np.testing.assert_allclose(
        hidden[:, 7:], run_rows(parameters, second), atol=TOLERANCE
    )


def test_what_stands_on_padding_does_not_matter(parameters):
    tokens = draw_tokens(2, 9)
    segment_ids = jnp.ones((2, 9), jnp.int32).at[:, 6:].set(0)
    other = tokens.at[:, 6:].set(3)
    hidden = run(parameters, tokens, positions_of(tokens), segment_ids)
    changed = run(parameters, other, positions_of(tokens), segment_ids)
    np.testing.assert_array_equal(hidden[:, :6], changed[:, :6])
    assert np.isfinite(hidden).all()
    short = run_rows(parameters, tokens[:, :6])
    np.testing.assert_allclose(hidden[:, :6], short, atol=TOLERANCE)


def test_a_token_does_not_see_later_ones(parameters):
    tokens = draw_tokens(1, 8)
    changed = tokens.at[0, 5].add(1) % CONFIG.vocab_size
    before, after = run_rows(parameters, tokens), run_rows(parameters, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


@pytest.mark.parametrize("remat", ("block", "dots", "offload"))
def test_recomputation_changes_no_gradient(parameters, remat):
    tokens = draw_tokens(2, 8)
    kept = jax.grad(total)(parameters, tokens)
    recomputed = jax.grad(total)(parameters, tokens, remat=remat)
    assert_trees_close(kept, recomputed)


def saved_bytes(parameters, remat):
    """Bytes kept between the forward and the backward pass."""

    def forward(parameters, tokens):
        return jax.vjp(lambda p: total(p, tokens, remat=remat), parameters)[1]

    abstract = jax.eval_shape(forward, parameters, draw_tokens(8, 64))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))


def test_recomputation_keeps_less(parameters):
    none, dots, block = (saved_bytes(parameters, r) for r in ("none", "dots", "block"))
    assert block < dots < none


@pytest.mark.parametrize("remat", ("block", "offload"))
def test_offloading_moves_the_inputs_of_layers_to_the_host_and_back(parameters, remat):
    step = jax.grad(functools.partial(total, remat=remat))
    text = str(jax.make_jaxpr(step)(parameters, draw_tokens(2, 8)))
    out = re.findall(r"f32<host>\[(\S+)\] = device_put", text)
    back = re.findall(r"f32\[(\S+)\] = device_put", text)
    # One place in the loop forward and one in the loop backward.
    assert out == back == (["2,8,16"] if remat == "offload" else [])


def test_unknown_recomputation_is_refused(parameters):
    tokens = draw_tokens(1, 4)
    with pytest.raises(ValueError, match="remat is 'all'"):
        run_rows(parameters, tokens, remat="all")


def test_bfloat16_is_within_its_rounding_of_float32(parameters):
    tokens = draw_tokens(2, 8)
    hidden = run_rows(parameters, tokens, dtype=jnp.bfloat16)
    assert hidden.dtype == jnp.bfloat16
    exact = run_rows(parameters, tokens)
    error = np.abs(hidden.astype(jnp.float32) - exact)
    # Eight bits, over six residual additions; the norm makes hidden states of size 1.
    assert error.mean() < 0.02


step = jax.jit(extend, static_argnums=1)


def test_prompts_then_single_tokens_are_as_the_whole_rows(parameters):
    # Sequences of 3 + 4 and 5 + 4 tokens.
    lengths, whole = np.array([3, 5]), draw_tokens(2, 9)
    pool = pages.empty(CONFIG, 2, 12, "float32")
    hidden, pool = step(
        *(parameters, CONFIG, whole[:, :5], pool), start=0, counts=jnp.asarray(lengths)
    )
    rows = [[hidden[row, :length]] for row, length in enumerate(lengths)]
    for _ in range(4):
        token = whole[np.arange(2), lengths][:, None]
        hidden, pool = step(parameters, CONFIG, token, pool, start=jnp.asarray(lengths))
        for row, parts in enumerate(rows):
            parts.append(hidden[row])
        lengths = lengths + 1
    expected = run_rows(parameters, whole)
    for row, length in enumerate((7, 9)):
        found = jnp.concatenate(rows[row])
        np.testing.assert_allclose(found, expected[row, :length], atol=1e-4)
        assert pool.keys[:, row, :, :length].any(axis=(0, 1, 3)).all()
        assert not pool.keys[:, row, :, length:].any()


@pytest.mark.parametrize(
    "allocation",
    [
        "d2f2t2",
        *(pytest.param(text, marks=pytest.mark.slow) for text in ("f4", "d2t2", "t4")),
    ],
)
def test_sharded_gradients_are_those_of_one_device(parameters, allocation):
    mesh = make_mesh(Allocation.parse(allocation))
    shardings = parameter_shardings(abstract_parameters(CONFIG), mesh)
    tokens = draw_tokens(8, 6)
    rows = rows_sharding(mesh, 8)

    def loss(parameters, tokens):
        ones = jnp.ones(tokens.shape, jnp.int32)
        hidden = hidden_states(
            parameters,
            CONFIG,
            tokens,
            positions_of(tokens),
            ones,
            remat="block",
            partition=partition_for(mesh),
        )
        return jnp.mean(jnp.sin(heads.logits(parameters, CONFIG, hidden)))

    sharded = jax.jit(
        jax.value_and_grad(loss),
        in_shardings=(shardings, rows),
        out_shardings=(replicated(mesh), shardings),
    )
    found = sharded(jax.device_put(parameters, shardings), jax.device_put(tokens, rows))
    one_device = jax.jit(
        jax.value_and_grad(
            lambda p, t: jnp.mean(jnp.sin(heads.logits(p, CONFIG, run_rows(p, t))))
        )
    )
    assert_trees_close(jax.device_get(found), one_device(parameters, tokens), 1e-6)


@pytest.mark.parametrize(("allocation", "num_parts"), [("f4", 4), ("t4", 1)])
def test_a_sharded_pool_says_what_one_device_says(parameters, allocation, num_parts):
    mesh = make_mesh(Allocation.parse(allocation))
    shardings = parameter_shardings(abstract_parameters(CONFIG), mesh)
    tokens, partition = draw_tokens(4, 6), partition_for(mesh)
    sharded = functools.partial(extend, num_parts=num_parts, partition=partition)
    found, found_pool = jax.jit(sharded, static_argnums=1)(
        jax.device_put(parameters, shardings),
        CONFIG,
        tokens,
        pages.empty(CONFIG, 4, 8, "float32", partition),
        start=0,
    )
    pool = pages.empty(CONFIG, 4, 8, "float32")
    expected, expected_pool = step(parameters, CONFIG, tokens, pool, start=0)
    assert_trees_close(jax.device_get(found), expected)
    # 2 key heads over 4 parts: each is there twice.
    repeats = found_pool.keys.shape[2] // expected_pool.keys.shape[2]
    assert repeats == (2 if allocation == "t4" else 1)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, repeats, axis=2), expected_pool)
    assert_trees_close(jax.device_get(found_pool), repeated)
    # Every device has a quarter: of the pages, or of the heads.
    (quarter,) = {shard.data.nbytes for shard in found_pool.keys.addressable_shards}
    assert 4 * quarter == found_pool.keys.nbytes


def test_parameters_drawn_into_shardings_are_those_drawn_on_one_device():
    mesh = make_mesh(Allocation.parse("d2f2t2"))
    shardings = parameter_shardings(abstract_parameters(CONFIG), mesh)
    key = jax.random.key(3)
    init = functools.partial(init_parameters, CONFIG)
    sharded = jax.jit(init, out_shardings=shardings)(key)
    jax.tree.map(np.testing.assert_array_equal, sharded, jax.jit(init)(key))
