"""Compile the language head of Llama 3.1 8B alone, forward and backward, for H200s.

    JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot:. python tests/compile_head.py f8 32
    … python tests/compile_head.py d1 2 dense          # the unfused head, to compare

Arguments: a strategy, how many rows of 4096 tokens there are in all, and if wanted the
implementation of `linear_logprob`, the type of the kernel, and "forward" for no
gradient. Prints one line of JSON, what the program needs on one device. Used by
`gpu_compile_test.py`.
"""

import json
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.linear_logprob import linear_logprob
from pallas_kernels.testing import aot
from realjax.parallel.allocation import Allocation
from realjax.parallel.head import linear_logprob_for
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import parameter_shardings, rows_sharding

WIDTH, VOCAB, LENGTH = 4096, 128256, 4096


def on_one_device(hidden, kernel, targets, **options):
    flat = hidden.reshape(-1, WIDTH), kernel, targets.reshape(-1)
    return [x.reshape(targets.shape) for x in linear_logprob(*flat, **options)]


def main(
    strategy: str,
    num_rows: int,
    implementation: str | None = None,
    dtype: str = "float32",
    direction: str = "backward",
) -> None:
    allocation = Allocation.parse(strategy)
    machine = aot.describe(f"h200x{allocation.size}")
    mesh = make_mesh(allocation, machine.devices)
    of_rows = rows_sharding(mesh, num_rows)
    of_kernel = parameter_shardings(("embed", "vocab"), mesh)
    score = linear_logprob_for(mesh) or on_one_device

    def loss(hidden, kernel, targets, weights):
        logprobs, entropy = score(
            hidden, kernel, targets, implementation=implementation
        )
        return jnp.sum(weights * logprobs) + jnp.sum(weights * entropy)

    def shape(*size, dtype=jnp.float32, sharding=of_rows):
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    if direction == "forward":
        compiled = jax.jit(loss)
    else:
        gradient = jax.grad(loss, argnums=(0, 1))
        compiled = jax.jit(gradient, out_shardings=(of_rows, of_kernel))
    report = aot.compile_for(
        machine,
        compiled,
        shape(num_rows, LENGTH, WIDTH, dtype=jnp.bfloat16),
        shape(WIDTH, VOCAB, dtype=jnp.dtype(dtype), sharding=of_kernel),
        shape(num_rows, LENGTH, dtype=jnp.int32),
        shape(num_rows, LENGTH),
        mesh=mesh,
    )
    print(json.dumps(report.as_dict()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
