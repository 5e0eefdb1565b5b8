"""Shapes at which the grouped product is compiled and timed: layers of experts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.testing.cases import Case, Limits

NUM_ROWS = 16384
GOAL = 0.5

LAYERS = {
    "mixtral-8x7b": (8, 4096, 14336),
    "qwen3-30b-a3b": (128, 2048, 768),
}
"""Experts, and the sizes of the matrix of one."""


def cases() -> tuple[Case, ...]:
    """Return the cases of the grouped product."""
    return tuple(
        _case(model, *sizes, backward=backward)
        for model, sizes in LAYERS.items()
        for backward in (False, True)
    )


def _case(
    model: str, num_groups: int, width: int, out_width: int, *, backward: bool
) -> Case:
    def inputs(key: Array) -> tuple[Array, ...]:
        keys = jax.random.split(key, 4)
        x = jax.random.normal(keys[0], (NUM_ROWS, width), jnp.bfloat16)
        shape = (num_groups, width, out_width)
        kernels = jax.random.normal(keys[1], shape, jnp.bfloat16) / width**0.5
        out_bar = jax.random.normal(keys[2], (NUM_ROWS, out_width), jnp.bfloat16)
        # Unequal groups: each row chooses, the first groups more often.
        weights = -jnp.log1p(jnp.arange(num_groups, dtype=jnp.float32))
        chosen = jax.random.categorical(keys[3], weights, shape=(NUM_ROWS,))
        sizes = jnp.bincount(chosen, length=num_groups).astype(jnp.int32)
        return x, kernels, out_bar, sizes

    def run(implementation: str | None, *arrays: Array) -> Any:
        x, kernels, out_bar, sizes = arrays
        multiply = lambda x, kernels: grouped_matmul(
            x, kernels, sizes, implementation=implementation
        )
        if not backward:
            return multiply(x, kernels)
        out, pull = jax.vjp(multiply, x, kernels)
        return out, *pull(out_bar)

    def reference(*arrays: Array) -> Any:
        floats = [x.astype(jnp.float32) for x in arrays[:-1]]
        return jax.jit(functools.partial(run, "blocked"))(*floats, arrays[-1])

    matrices = num_groups * width * out_width * 2
    rows = NUM_ROWS * (width + out_width) * 2
    products = 3 if backward else 1
    # Backward, tokamax makes the transpose of all matrices, and of the rows.
    temporaries = matrices + rows if backward else 0
    return Case(
        operation="grouped_matmul",
        name=f"{model}, {NUM_ROWS} rows,"
        f" {'forward and backward' if backward else 'forward'}",
        inputs=inputs,
        implementations={
            name: functools.partial(run, name) for name in ("tokamax", "blocked")
        },
        reference=reference,
        tolerance=1e-2,
        num_bytes=(matrices + rows) * products,
        num_flops=2 * NUM_ROWS * width * out_width * products,
        goal=GOAL,
        limits=Limits(temporary_bytes=temporaries + 2**20, num_wgmma=8),
    )
