"""Tests of `pallas_kernels/linear_logprob/sharded.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear_logprob import reference, sharded_linear_logprob
from pallas_kernels.testing.interpret import interpreted
from tests.pallas_kernels.scoring import gradient, pack, relative_error

D = 8
MESH = (2, 2, 2)
AXES = ("data", "fsdp", "tensor")
LAYOUTS = {
    "data and fsdp": {"row_axes": ("data", "fsdp", "tensor")},
    "columns alone": {"vocab_axes": ("data", "fsdp", "tensor")},
    "fsdp splits both": {
        "row_axes": ("data", "fsdp"),
        "vocab_axes": ("tensor", "fsdp"),
    },
    "places over tensor": {
        "row_axes": ("data", "fsdp"),
        "place_axes": ("tensor",),
        "vocab_axes": ("tensor", "fsdp"),
    },
}
R, S = 8, 6


def sharded_problem(form: str):
    """Return arguments of R rows, with a vocabulary of 61 padded to 64 columns."""
    keys = jax.random.split(jax.random.key(4), 2)
    hidden = jax.random.normal(keys[0], (R, S, D))
    kernel = jnp.pad(jax.random.normal(keys[1], (D, 61)), ((0, 0), (0, 3)))
    targets = (jnp.arange(R * S) % 61).reshape(R, S)
    mask = np.random.default_rng(0).random((R * S, 61)) < 0.3
    np.put_along_axis(mask, np.asarray(targets).reshape(-1, 1), True, axis=1)
    mask[::5] = False  # Empty: the whole vocabulary.
    kept = {
        "none": None,
        "ids": jnp.stack([targets, (7 * targets + 3) % 61, targets * 0 - 1], axis=-1),
        "bits": jnp.asarray(pack(mask)).reshape(R, S, -1),
    }[form]
    weights = np.random.default_rng(1).normal(size=(2, R, S)).astype(np.float32)
    return hidden, kernel, targets, kept, weights[0], weights[1]


OPTIONS = {"vocab_size": 61, "soft_cap": 5.0}


@functools.cache
def alone(form: str):
    """Return the definition's gradients and scores of the same arguments."""
    flat = lambda x: x.reshape(R * S, *x.shape[2:])
    hidden, kernel, targets, kept, *weights = sharded_problem(form)
    args = (flat(hidden), kernel, flat(targets), jax.tree.map(flat, kept))
    grads = gradient(reference.linear_logprob, **OPTIONS)(*args, *map(flat, weights))
    scores = reference.linear_logprob(
        *args[:3], kept=args[3], temperature=0.7, **OPTIONS
    )
    return grads, scores


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("data and fsdp", "none"),
        ("columns alone", "bits"),
        ("fsdp splits both", "ids"),
        ("places over tensor", "none"),
        pytest.param("data and fsdp", "ids", marks=pytest.mark.slow),
        pytest.param("data and fsdp", "bits", marks=pytest.mark.slow),
        pytest.param("columns alone", "none", marks=pytest.mark.slow),
        pytest.param("columns alone", "ids", marks=pytest.mark.slow),
        pytest.param("fsdp splits both", "none", marks=pytest.mark.slow),
        pytest.param("fsdp splits both", "bits", marks=pytest.mark.slow),
        pytest.param("places over tensor", "ids", marks=pytest.mark.slow),
        pytest.param("places over tensor", "bits", marks=pytest.mark.slow),
    ],
)
def test_devices_of_a_mesh_give_what_the_definition_gives(name, form):
    mesh = jax.make_mesh(MESH, AXES, axis_types=(AxisType.Auto,) * 3)
    options = dict(LAYOUTS[name], mesh=mesh, chunk_size=4, block_size=5, **OPTIONS)
    args = sharded_problem(form)
    grads = gradient(sharded_linear_logprob, **options)(*args)
    scores = jax.jit(
        functools.partial(sharded_linear_logprob, temperature=0.7, **options)
    )(*args[:3], kept=args[3])
    expected_grads, expected_scores = alone(form)
    np.testing.assert_allclose(grads[0].reshape(R * S, D), expected_grads[0], atol=1e-5)
    np.testing.assert_allclose(grads[1], expected_grads[1], atol=2e-5)
    for a, b in zip(scores, expected_scores, strict=True):
        np.testing.assert_allclose(a.reshape(-1), b, atol=1e-5)


def test_kernel_and_its_gradient_stay_cut_where_fsdp_splits_tokens_and_columns():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    shape = lambda s, dtype, *spec: jax.ShapeDtypeStruct(
        s, dtype, sharding=NamedSharding(mesh, P(*spec))
    )
    both = {"row_axes": ("fsdp",), "vocab_axes": ("fsdp",)}

    def loss(hidden, kernel, targets):
        options = dict(both, mesh=mesh, chunk_size=32)
        return sharded_linear_logprob(hidden, kernel, targets, **options)[0].sum()

    grad = jax.jit(
        jax.grad(loss, argnums=(0, 1)),
        out_shardings=(NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P("fsdp"))),
    )
    text = (
        grad.lower(
            shape((8, 64, 16), jnp.float32, "fsdp"),
            shape((16, 640), jnp.float32, "fsdp"),
            shape((8, 64), jnp.int32, "fsdp"),
        )
        .compile()
        .as_text()
    )
    # Of 640 columns a device has 80, and of a chunk of 32 tokens all.
    assert "f32[32,80]" in text
    for whole in ("f32[16,640]", "f32[32,640]", "f32[512,80]"):
        assert whole not in text


def test_sharded_shapes_that_do_not_divide_are_refused():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    hidden, kernel, targets, *_ = sharded_problem("none")
    with pytest.raises(ValueError, match="61 columns of the kernel do not divide over"):
        sharded_linear_logprob(
            hidden, kernel[:, :61], targets, mesh=mesh, vocab_axes=("fsdp",)
        )
    with pytest.raises(ValueError, match="6 places do not divide over fsdp=8"):
        sharded_linear_logprob(hidden, kernel, targets, mesh=mesh, place_axes=("fsdp",))


@pytest.mark.parametrize("form", ["ids", pytest.param("bits", marks=pytest.mark.slow)])
def test_interpreted_kernel_runs_within_the_layout_of_a_mesh(form):
    # One device: what the kernel sees of axes are traced indices and chunks.
    axes = {"row_axes": ("fsdp",), "vocab_axes": ("tensor", "fsdp")}
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    _, _, targets, kept, *weights = sharded_problem(form)
    rng = np.random.default_rng(5)
    hidden = jnp.asarray(0.3 * rng.normal(size=(R, S, 64)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(64, 64)), jnp.bfloat16).astype(jnp.float32)
    call = functools.partial(
        sharded_linear_logprob, mesh=mesh, implementation="mosaic", **axes, **OPTIONS
    )
    args = (hidden, kernel, targets, kept)
    with interpreted() as checks:
        scores = jax.jit(functools.partial(call, temperature=0.7))(*args[:3], kept=kept)
        grads = jax.block_until_ready(gradient(call, chunk_size=24)(*args, *weights))
    assert not checks.has_races
    # Scores, the same again for the gradient in two chunks, and those gradients.
    assert checks.num_kernels == 1 + 2 + 2
    flat = lambda x: x.reshape(R * S, *x.shape[2:])
    args = (flat(hidden.astype(jnp.float32)), kernel, flat(targets), flat(kept))
    expected = reference.linear_logprob(
        *args[:3], kept=args[3], temperature=0.7, **OPTIONS
    )
    for a, b in zip(scores, expected, strict=True):
        assert relative_error(flat(a), b) < 1e-5
    expected = gradient(reference.linear_logprob, **OPTIONS)(*args, *map(flat, weights))
    assert relative_error(flat(grads[0]), expected[0]) < 1e-2
    assert relative_error(grads[1], expected[1]) < 1e-2


def test_sharded_form_explains_what_cannot_be():
    hidden, kernel, targets, *_ = sharded_problem("none")
    mesh = jax.make_mesh((1,), ("tensor",), (AxisType.Auto,))
    call = functools.partial(sharded_linear_logprob, hidden, kernel, targets, mesh=mesh)
    with pytest.raises(ValueError, match="cannot run as 'mosaic': it is for Hopper"):
        call(implementation="mosaic")
    with pytest.raises(ValueError, match="no implementation 'dense'"):
        call(implementation="dense")
