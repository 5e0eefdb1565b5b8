"""Tests of `pallas_kernels/linear_logprob`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear_logprob import (
    default_chunk_size,
    is_kept,
    linear_logprob,
    linear_scores,
    reference,
)
from tests.pallas_kernels.scoring import gradient, pack

T, D, V = 30, 8, 70
FORMS = ("none", "ids", "bits")


def problem(seed: int = 0, scale: float = 1.0, dtype=jnp.float32):
    """Return random hidden states, a kernel, and targets."""
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = scale * jax.random.normal(keys[0], (T, D))
    kernel = jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (T,), 0, V)
    return hidden.astype(dtype), kernel, targets


def random_sets(targets, form: str):
    """Return sets that have the target, every third one empty, and their masks."""
    if form == "none":
        return None, np.ones((T, V), bool)
    rng = np.random.default_rng(0)
    num_kept, width = rng.integers(1, 12, T), 12
    ids = np.full((T, width), -1, np.int32)
    mask = np.zeros((T, V), bool)
    for t in range(T):
        if t % 3 == 0:
            continue
        others = np.delete(np.arange(V), targets[t])
        chosen = np.append(rng.permutation(others)[: num_kept[t] - 1], targets[t])
        ids[t, rng.permutation(width)[: len(chosen)]] = chosen
        mask[t, chosen] = True
    kept = jnp.asarray(ids if form == "ids" else pack(mask))
    return kept, mask | ~mask.any(-1, keepdims=True)


def oracle(hidden, kernel, targets, mask, temperature):
    """Score row by row in float64."""
    logprobs, entropy = [], []
    for h, target, kept in zip(np.float64(hidden), targets, mask, strict=True):
        logits = (h @ np.float64(kernel))[kept] / temperature
        log_p = logits - np.log(np.sum(np.exp(logits)))
        logprobs.append(log_p[np.flatnonzero(kept).tolist().index(int(target))])
        entropy.append(-np.sum(np.exp(log_p) * log_p))
    return np.array(logprobs), np.array(entropy)


def test_logprob_and_entropy_of_three_tokens():
    # logits ln 1, ln 2, ln 5: p = 1/8, 2/8, 5/8
    #   log p₁ = ln 1/4        H = (ln 8) - (2 ln 2 + 5 ln 5) / 8
    # kept {0, 1}: p = 1/3, 2/3
    #   log p₁ = ln 2/3        H = ln 3 - (2 ln 2) / 3
    # temperature 1/2 squares the odds: p = 1/30, 4/30, 25/30
    hidden, kernel = jnp.ones((1, 1)), jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
    targets = jnp.array([1])
    log2, log3, log5 = np.log([2, 3, 5])
    for call in (linear_logprob, reference.linear_logprob):
        logprob, entropy = call(hidden, kernel, targets)
        np.testing.assert_allclose(logprob, [-2 * log2], rtol=1e-6)
        np.testing.assert_allclose(entropy, [3 * log2 - (2 * log2 + 5 * log5) / 8])
        for kept in (jnp.array([[1, -1, 0]]), jnp.array([[0b011]], jnp.uint32)):
            logprob, entropy = call(hidden, kernel, targets, kept=kept)
            np.testing.assert_allclose(logprob, [log2 - log3], rtol=1e-6)
            np.testing.assert_allclose(entropy, [log3 - 2 * log2 / 3], rtol=1e-6)
        logprob, _ = call(hidden, kernel, targets, temperature=0.5)
        np.testing.assert_allclose(logprob, [np.log(4 / 30)], rtol=1e-6)


def test_sets_are_read_from_ids_and_from_bits():
    ids = jnp.array([[3, -1, 0], [-1, -1, -1]])
    expected = [[True, False, False, True, False], [True] * 5]
    np.testing.assert_array_equal(is_kept(ids, 5), expected)
    bits = jnp.array([[0b01001], [0]], jnp.uint32)
    np.testing.assert_array_equal(is_kept(bits, 5), expected)
    # Token 33 is bit 1 of word 1; further dimensions come first.
    expected = np.arange(40).reshape(1, 1, 40) == 33
    np.testing.assert_array_equal(
        is_kept(jnp.array([[[0, 2]]], jnp.uint32), 40), expected
    )
    np.testing.assert_array_equal(is_kept(jnp.array([[[33]]]), 40), expected)


@pytest.mark.parametrize(
    ("form", "temperature"), [("none", 1.0), ("none", 0.7), ("ids", 0.7), ("bits", 0.7)]
)
@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_agrees_with_float64_row_by_row(implementation, form, temperature):
    hidden, kernel, targets = problem(scale=2.0)
    kept, mask = random_sets(targets, form)
    found = jax.jit(
        functools.partial(
            linear_logprob,
            temperature=temperature,
            implementation=implementation,
            chunk_size=8,
        )
    )(hidden, kernel, targets, kept=kept)
    expected = oracle(hidden, kernel, targets, mask, temperature)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"implementation": "dense"},
        {"implementation": "chunked", "chunk_size": 10},  # 3 equal chunks.
        {"implementation": "chunked", "chunk_size": 8},  # 5 of 6 rather than 4 of 8.
    ],
    ids=["dense", "three", "five"],
)
def test_gradients_are_those_of_the_definition(options, form):
    hidden, kernel, targets = problem()
    kept, _ = random_sets(targets, form)
    weights = np.random.default_rng(1).normal(size=(2, T)).astype(np.float32)
    args = (hidden, kernel, targets, kept, weights[0], weights[1])
    found = gradient(linear_logprob, **options)(*args)
    expected = gradient(reference.linear_logprob)(*args)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_tokens_that_do_not_split_evenly_are_padded():
    hidden, kernel, targets = problem()
    few = linear_logprob(hidden[:29], kernel, targets[:29], chunk_size=7)
    all_ = linear_logprob(hidden, kernel, targets, implementation="dense")
    for a, b in zip(few, all_, strict=True):
        np.testing.assert_allclose(a, b[:29], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_empty_sets_and_extreme_logits_have_finite_gradients(implementation, form):
    # Logits of ±1000: one token has all the probability, the others' underflows.
    hidden, kernel, targets = problem(scale=300.0)
    kept, _ = random_sets(targets, form)
    ones = jnp.ones(T)
    grads = gradient(linear_logprob, implementation=implementation, chunk_size=10)(
        hidden, kernel, targets, kept, ones, ones
    )
    for grad in grads:
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_target_outside_its_set_is_impossible_and_its_gradient_finite(implementation):
    hidden, kernel, _ = problem()
    targets, kept = jnp.full((T,), 5), jnp.full((T, 3), 6)
    options = {"implementation": implementation, "chunk_size": 10}
    found, entropy = linear_logprob(hidden, kernel, targets, kept=kept, **options)
    np.testing.assert_array_equal(found, np.full(T, -np.inf))
    np.testing.assert_array_equal(entropy, np.zeros(T))
    expected, _ = reference.linear_logprob(hidden, kernel, targets, kept=kept)
    np.testing.assert_array_equal(found, expected)
    args = (hidden, kernel, targets, kept, jnp.ones(T), jnp.ones(T))
    found = gradient(linear_logprob, **options)(*args)
    expected = gradient(reference.linear_logprob)(*args)
    for a, b in zip(found, expected, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_normalizers_and_their_gradients_are_those_of_all_logits(implementation):
    # log Σ exp(logit / temperature), and its gradient is the softmax.
    hidden, kernel, targets = problem(scale=2.0)
    found = lambda h, k: (
        linear_scores(
            h, k, targets, temperature=0.7, implementation=implementation, chunk_size=8
        ).log_normalizer
    )
    expected = lambda h, k: jax.nn.logsumexp(
        reference.scaled_logits(h @ k, 0.7), axis=-1
    )
    args, weights = (hidden, kernel), jnp.arange(T, dtype=jnp.float32)
    np.testing.assert_allclose(found(*args), expected(*args), rtol=1e-6)
    grads = (
        jax.grad(lambda h, k, f=f: jnp.sum(weights * f(h, k)), argnums=(0, 1))(*args)
        for f in (found, expected)
    )
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bfloat16_rows_accumulate_in_float32_and_give_a_float32_kernel_gradient():
    hidden, kernel, targets = problem(dtype=jnp.bfloat16)
    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    found = linear_logprob(hidden, kernel, targets, chunk_size=10)
    expected = oracle(
        hidden.astype(jnp.float32), rounded, targets, np.ones((T, V), bool), 1.0
    )
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
    weights = np.random.default_rng(1).normal(size=(2, T)).astype(np.float32)
    grads = gradient(linear_logprob, implementation="chunked", chunk_size=10)(
        hidden, kernel, targets, None, weights[0], weights[1]
    )
    exact = gradient(reference.linear_logprob)(
        hidden.astype(jnp.float32), rounded, targets, None, weights[0], weights[1]
    )
    assert [grad.dtype for grad in grads] == [jnp.bfloat16, jnp.float32]
    # bfloat16 has 8 bits: each of the gradient's terms is within 1/256.
    for a, b in zip(grads, exact, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.03)


def compiled(function, num_tokens=512, vocab_size=640, width=16):
    shape = jax.ShapeDtypeStruct
    return (
        jax.jit(function)
        .lower(
            shape((num_tokens, width), jnp.float32),
            shape((width, vocab_size), jnp.float32),
            shape((num_tokens,), jnp.int32),
        )
        .compile()
    )


def summed(hidden, kernel, targets, *, entropy_weight, **options):
    logprobs, entropy = linear_logprob(hidden, kernel, targets, **options)
    if entropy_weight is None:
        return logprobs.sum()
    return logprobs.sum() + entropy_weight * entropy.sum()


def test_no_array_of_all_tokens_by_the_vocabulary_exists():
    loss = functools.partial(summed, entropy_weight=1.0)
    grad = jax.grad(functools.partial(loss, chunk_size=128), argnums=(0, 1))
    program = compiled(grad)
    assert "f32[512,640]" not in program.as_text()
    # Three chunks of logits at most, beside the gradient of the kernel.
    assert program.memory_analysis().temp_size_in_bytes < 3 * 128 * 640 * 4 + 640 * 128
    assert "f32[512,640]" in compiled(jax.grad(loss)).as_text()  # One chunk.


def test_unused_entropy_costs_nothing():
    unused = functools.partial(summed, entropy_weight=None, chunk_size=128)
    used = functools.partial(summed, entropy_weight=1.0, chunk_size=128)
    cost = lambda f: compiled(f).cost_analysis()["flops"]
    # Of one chunk (the loop is counted once): a product and a sum per logit forward;
    # backward, two products and sums more.
    logits = 128 * 640
    assert cost(used) - cost(unused) >= 2 * logits
    grad = functools.partial(jax.grad, argnums=(0, 1))
    assert cost(grad(used)) - cost(grad(unused)) >= 4 * logits
    # Also where a compiled function returns both.
    inner = jax.jit(functools.partial(linear_logprob, chunk_size=128))
    through_jit = lambda *args: inner(*args)[0].sum()
    assert cost(grad(through_jit)) - cost(grad(unused)) < 2 * logits


@pytest.mark.parametrize(
    ("form", "kernel_spec"),
    [
        ("none", P(None, "tensor")),
        ("none", P("data", "tensor")),
        ("ids", P("data", "tensor")),
        ("bits", P("data", "tensor")),
    ],
)
def test_sharded_rows_and_vocabulary_give_what_one_device_gives(kernel_spec, form):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shard = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    keys = jax.random.split(jax.random.key(2), 2)
    hidden = jax.random.normal(keys[0], (64, D))
    kernel = jax.random.normal(keys[1], (D, 64))
    targets = jnp.arange(64)
    kept = {
        "none": None,
        "ids": jnp.stack([targets, (7 * targets + 3) % 64, targets * 0 - 1], axis=1),
        "bits": jnp.full((64, 2), 0xFFFFFFFF, jnp.uint32),
    }[form]
    ones = jnp.ones(64)
    options = {"implementation": "chunked", "chunk_size": 16}
    alone = gradient(linear_logprob, **options)(
        hidden, kernel, targets, kept, ones, ones
    )
    gathered = NamedSharding(mesh, P(None, "tensor"))
    program = gradient(
        linear_logprob,
        **options,
        constrain_kernel=lambda x: jax.lax.with_sharding_constraint(x, gathered),
    )
    args = (
        shard(hidden, "data"),
        jax.device_put(kernel, NamedSharding(mesh, kernel_spec)),
        shard(targets, "data"),
        None if kept is None else shard(kept, "data"),
        shard(ones, "data"),
        shard(ones, "data"),
    )
    for a, b in zip(program(*args), alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    text = program.lower(*args).compile().as_text()
    # A chunk's logits are [16 / 4, 64 / 2] on a device; nothing gathers them.
    assert "f32[4,32]" in text
    assert "f32[16,64]" not in text
    assert "f32[16,32]" not in text
    assert "f32[4,64]" not in text


def test_result_does_not_depend_on_the_chunks_of_other_tokens():
    hidden, kernel, targets = problem()
    order = np.random.default_rng(0).permutation(T)
    call = functools.partial(linear_logprob, chunk_size=10)
    straight, _ = call(hidden, kernel, targets)
    shuffled, _ = call(hidden[order], kernel, targets[order])
    np.testing.assert_allclose(shuffled, straight[order], atol=1e-6)


def test_few_tokens_are_scored_at_once_and_many_in_chunks_that_fit_the_cache():
    assert default_chunk_size(1024, 4096) == 1024
    assert default_chunk_size(2048, 4096) == 512


def test_errors_say_what_is_wrong():
    hidden, kernel, targets = problem()
    with pytest.raises(ValueError, match="no implementation 'fused'"):
        # The type checker of the tests would refuse it first.
        getattr(linear_logprob, "__wrapped__", linear_logprob)(
            hidden, kernel, targets, implementation="fused"
        )
    with pytest.raises(ValueError, match=r"temperature is 0\.0; it must be positive"):
        linear_logprob(hidden, kernel, targets, temperature=0.0)
    with pytest.raises(ValueError, match="2 words of 32 bits do not fit"):
        linear_logprob(hidden, kernel, targets, kept=jnp.zeros((T, 2), jnp.uint32))
    with pytest.raises(ValueError, match=r"soft cap of the logits is 0\.0"):
        linear_logprob(hidden, kernel, targets, soft_cap=0.0)
    with pytest.raises(ValueError, match="vocabulary has 71 tokens and the kernel 70"):
        linear_logprob(hidden, kernel, targets, vocab_size=71)
    with pytest.raises(TypeError, match="int16; it must be int32"):
        linear_logprob(hidden, kernel, targets, kept=jnp.zeros((T, 2), jnp.int16))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"implementation": "dense"},
        {"implementation": "chunked", "chunk_size": 10},
        # Blocks of 32, 32 and 6 columns: the last is moved left by 26.
        {"implementation": "chunked", "chunk_size": 8, "block_size": 32},
    ],
    ids=["dense", "chunks", "blocks"],
)
def test_capped_logits_and_padded_vocabularies_follow_the_definition(options, form):
    hidden, kernel, targets = problem(scale=2.0)
    # Padding that would win every softmax if it counted.
    padded = jnp.pad(kernel, ((0, 0), (0, 20)), constant_values=9.0)
    kept, _ = random_sets(targets, form)
    weights = np.random.default_rng(1).normal(size=(2, T)).astype(np.float32)
    args = (targets, kept, weights[0], weights[1])
    found = gradient(linear_logprob, **options, soft_cap=3.0, vocab_size=V)(
        hidden, padded, *args
    )
    expected = gradient(reference.linear_logprob, soft_cap=3.0)(hidden, kernel, *args)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(found[1][:, :V], expected[1], atol=1e-5)
    np.testing.assert_array_equal(found[1][:, V:], np.zeros((D, 20)))
    call = functools.partial(linear_logprob, soft_cap=3.0, temperature=0.7, **options)
    scores = call(hidden, padded, targets, kept=kept, vocab_size=V)
    plain = reference.linear_logprob(
        hidden, kernel, targets, kept=kept, soft_cap=3.0, temperature=0.7
    )
    for a, b in zip(scores, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_soft_cap_of_three_logits():
    # 2 tanh(x / 2) of 2 artanh(1/2), 0 and -2 artanh(1/2) is 1, 0, -1.
    x = 2 * np.arctanh(0.5)
    kernel = jnp.array([[x, 0.0, -x]], jnp.float32)
    log_total = np.log(np.exp(1) + 1 + np.exp(-1))
    for call in (linear_logprob, reference.linear_logprob):
        found, _ = call(jnp.ones((1, 1)), kernel, jnp.array([0]), soft_cap=2.0)
        np.testing.assert_allclose(found, [1 - log_total], rtol=1e-6)


def test_sets_of_some_columns_are_those_columns_of_the_whole_sets():
    kernel_ids = jnp.array([[3, -1, 37], [-1, -1, -1], [39, 40, 32]])
    mask = np.array(is_kept(kernel_ids, 41))
    for kept in (kernel_ids, jnp.asarray(pack(mask))):
        for first, width in ((0, 41), (30, 9), (33, 8), (38, 20)):
            found = reference.is_kept_between(kept, first, width, 41)
            inside = mask[:, first : first + width]
            padding = np.zeros((3, width - inside.shape[1]), bool)
            np.testing.assert_array_equal(found, np.hstack([inside, padding]))
