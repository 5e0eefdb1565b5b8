"""The transformer: packing, padding, the cache, recomputation, and shardings."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models import cache, heads
from realjax.models.config import ModelConfig
from realjax.models.transformer import (
    INIT_DEVIATION,
    Parameter,
    abstract_parameters,
    extend,
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


@jax.jit
def step(parameters, tokens, positions, state, start, first_slot):
    return extend(
        parameters,
        CONFIG,
        tokens,
        positions,
        state,
        start=start,
        first_slot=first_slot,
    )


def test_prompts_then_single_tokens_are_as_the_whole_rows(parameters):
    # Sequences of 3 + 4 and 5 + 4 tokens, the prompts right-aligned in 5 slots.
    first_slot = jnp.asarray([2, 0], jnp.int32)
    whole = draw_tokens(2, 9)
    in_slots = jnp.stack([jnp.roll(whole[0], 2), whole[1]])
    slots = jnp.arange(5, dtype=jnp.int32)[None]
    positions = jnp.maximum(slots - first_slot[:, None], 0)
    state = cache.empty(CONFIG, 2, 12, jnp.float32)
    hidden, state = step(
        parameters, in_slots[:, :5], positions, state, jnp.int32(0), first_slot
    )
    parts = [hidden]
    for slot in range(5, 9):
        token = in_slots[:, slot : slot + 1]
        position = (slot - first_slot)[:, None]
        hidden, state = step(
            parameters, token, position, state, jnp.int32(slot), first_slot
        )
        parts.append(hidden)
    hidden = jnp.concatenate(parts, axis=1)
    expected = run_rows(parameters, whole)
    np.testing.assert_allclose(hidden[0, 2:], expected[0, :7], atol=1e-4)
    np.testing.assert_allclose(hidden[1], expected[1], atol=1e-4)
    assert not state.keys[:, :, :, 9:].any()


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


@pytest.mark.parametrize("allocation", ("f4", "t4"))
def test_a_sharded_cache_says_what_one_device_says(parameters, allocation):
    mesh = make_mesh(Allocation.parse(allocation))
    shardings = parameter_shardings(abstract_parameters(CONFIG), mesh)
    tokens, first_slot = draw_tokens(4, 6), jnp.zeros(4, jnp.int32)
    partition = partition_for(mesh)
    sharded = jax.jit(
        functools.partial(
            extend, config=CONFIG, start=jnp.int32(0), partition=partition
        )
    )
    found, found_cache = sharded(
        jax.device_put(parameters, shardings),
        tokens=tokens,
        positions=positions_of(tokens),
        cache=cache.empty(CONFIG, 4, 8, jnp.float32, partition),
        first_slot=first_slot,
    )
    state = cache.empty(CONFIG, 4, 8, jnp.float32)
    expected, expected_cache = step(
        parameters, tokens, positions_of(tokens), state, jnp.int32(0), first_slot
    )
    assert_trees_close(jax.device_get(found), expected)
    # 2 key heads over 4 parts: each is there twice.
    repeats = found_cache.keys.shape[2] // expected_cache.keys.shape[2]
    assert repeats == (2 if allocation == "t4" else 1)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, repeats, axis=2), expected_cache)
    assert_trees_close(jax.device_get(found_cache), repeated)


def test_parameters_drawn_into_shardings_are_those_drawn_on_one_device():
    mesh = make_mesh(Allocation.parse("d2f2t2"))
    shardings = parameter_shardings(abstract_parameters(CONFIG), mesh)
    key = jax.random.key(3)
    init = functools.partial(init_parameters, CONFIG)
    sharded = jax.jit(init, out_shardings=shardings)(key)
    jax.tree.map(np.testing.assert_array_equal, sharded, jax.jit(init)(key))
