"""Experts on one device: each token goes through its own and no other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models.experts import (
    Choice,
    ExpertKernels,
    apply_experts,
    collect,
    pair_outputs,
    sorted_pairs,
    spread,
)

SHAPE, TOP_K, WIDTH, SIZE, NUM_EXPERTS = (2, 5), 2, 4, 6, 3


def numbers():
    """Tokens, choice, kernels; the first token of each row chose one expert only."""
    generator = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(generator.standard_normal(shape, np.float32))

    kernels = ExpertKernels(
        gate=draw(NUM_EXPERTS, WIDTH, SIZE),
        up=draw(NUM_EXPERTS, WIDTH, SIZE),
        down=draw(NUM_EXPERTS, SIZE, WIDTH),
    )
    scores = generator.standard_normal((*SHAPE, NUM_EXPERTS))
    experts = np.argsort(scores, axis=-1)[..., :TOP_K].astype(np.int32)
    experts[:, 0, 1] = NUM_EXPERTS
    return (
        draw(*SHAPE, WIDTH),
        Choice(jnp.asarray(experts), draw(*SHAPE, TOP_K)),
        kernels,
    )


def plain(x, weights, kernels, experts):
    """All experts of all tokens; then those that were chosen, by their weights."""
    gate, up = (jnp.einsum("btd,edf->btef", x, k) for k in (kernels.gate, kernels.up))
    out = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, kernels.down)
    # The row past the last, for none, is zero.
    chosen = jnp.eye(NUM_EXPERTS + 1)[experts][..., :NUM_EXPERTS]
    return jnp.einsum("btke,btk,bted->btd", chosen, weights, out)


def test_an_output_is_the_weighted_sum_of_a_tokens_experts():
    # Of width 1: gate and up are x times a number, silu(a) = a / (1 + exp(-a)).
    def column(*values):
        return jnp.asarray(np.reshape(values, (-1, 1, 1)), jnp.float32)

    kernels = ExpertKernels(column(1, 2), column(3, 5), column(10, 100))
    x = jnp.asarray([[[1.0], [2.0]]])
    choice = Choice(
        experts=jnp.asarray([[[1, 0], [0, 2]]]),  # The last is none.
        weights=jnp.asarray([[[0.25, 0.75], [0.5, 9.0]]]),
    )
    silu = lambda a: a / (1 + np.exp(-a))
    first = 0.25 * silu(2) * 5 * 100 + 0.75 * silu(1) * 3 * 10
    second = 0.5 * silu(2) * 6 * 10
    out = jax.jit(apply_experts, static_argnums=3)(x, choice, kernels, "silu")
    np.testing.assert_allclose(out[0, :, 0], [first, second], rtol=1e-6)


def test_outputs_and_gradients_are_those_of_all_experts_where_they_were_chosen():
    x, choice, kernels = numbers()
    bar = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)

    def total(apply, x, weights, kernels):
        return jnp.sum(apply(x, weights, kernels) * bar)

    def ours(x, weights, kernels):
        return apply_experts(x, Choice(choice.experts, weights), kernels, "silu")

    def others(x, weights, kernels):
        return plain(x, weights, kernels, choice.experts)

    run = jax.value_and_grad(total, argnums=(1, 2, 3))
    inputs = (x, choice.weights, kernels)
    found, expected = (
        jax.jit(run, static_argnums=0)(f, *inputs) for f in (ours, others)
    )
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)
    # A weight without an expert has no gradient.
    assert not np.asarray(found[1][1])[:, 0, 1].any()


def test_tokens_without_an_expert_give_zeros_and_spoil_nothing_whatever_they_hold():
    x, choice, kernels = numbers()
    experts, spoiled = np.array(choice.experts), np.array(x)
    experts[0], spoiled[0] = NUM_EXPERTS, np.nan

    def total(x, kernels):
        out = apply_experts(
            x, Choice(jnp.asarray(experts), choice.weights), kernels, "silu"
        )
        return jnp.sum(out[1]), out

    run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    bars, out = run(jnp.asarray(spoiled), kernels)
    expected, clean = run(x, kernels)
    assert not np.asarray(out[0]).any()
    np.testing.assert_array_equal(out, clean)
    np.testing.assert_array_equal(bars[0][1], expected[0][1])
    jax.tree.map(np.testing.assert_array_equal, bars[1], expected[1])


def test_outputs_of_a_token_do_not_depend_on_the_tokens_around_it():
    x, choice, kernels = numbers()
    tokens, experts = x.reshape(-1, WIDTH), choice.experts.reshape(-1, TOP_K)
    order = np.random.default_rng(2).permutation(len(tokens))
    run = jax.jit(pair_outputs, static_argnums=3)
    moved = (jnp.asarray(np.asarray(leaf)[order]) for leaf in (tokens, experts))
    found = run(*moved, kernels, "silu")
    expected = np.asarray(run(tokens, experts, kernels, "silu"))[order]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_pairs_are_sorted_by_expert_and_keep_their_order_within_one():
    # Pairs 0 to 5; 3 is none.
    order, rank = jax.jit(sorted_pairs)(jnp.asarray([[1, 0], [3, 1], [0, 2]]))
    np.testing.assert_array_equal(order, [1, 4, 0, 3, 5, 2])
    np.testing.assert_array_equal(rank, [[2, 0], [5, 3], [1, 4]])


def test_spreading_and_collecting_leave_out_what_has_no_place():
    # Three tokens of two pairs each; pairs 4, 0 and 3 have places, and one is free.
    pair_at = jnp.asarray([4, 6, 0, 3])
    place_of = jnp.asarray([[2, 4], [4, 3], [0, 4]])
    tokens = jnp.asarray([[1.0], [2.0], [3.0]])
    rows = jax.jit(spread)(tokens, pair_at, place_of)
    np.testing.assert_array_equal(rows, [[3], [0], [1], [2]])
    rows = jnp.asarray([[10.0], [20], [30], [40]])
    back = jax.jit(collect)(rows, pair_at, place_of)
    np.testing.assert_array_equal(np.squeeze(back, 2), [[30, 0], [0, 40], [10, 0]])


def test_the_ways_back_of_spreading_and_collecting_are_their_transposes():
    # As of the plain gathers, which XLA transposes to sums in any order.
    generator = np.random.default_rng(3)
    experts = jnp.asarray(generator.integers(0, 4, (5, 2)), jnp.int32)
    order, rank = jax.jit(sorted_pairs)(experts)
    tokens = jnp.asarray(generator.standard_normal((5, 3)), jnp.float32)
    rows = jnp.asarray(generator.standard_normal((10, 3)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def bars(spread, collect):
        _, of_tokens = jax.vjp(lambda x: spread(x, order, rank), tokens)
        _, of_rows = jax.vjp(lambda x: collect(x, order, rank), rows)
        return of_tokens(rows)[0], of_rows(rows[rank] * 2)[0]

    plain = (lambda x, at, _: x[at // 2], lambda x, _, at: x[at])
    for found, expected in zip(bars(spread, collect), bars(*plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
