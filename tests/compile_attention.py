"""Compile attention over 32k tokens, forward and backward, for one H200.

    JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot:. python tests/compile_attention.py

The heads of Llama 3.1 8B. Prints one line of JSON, what the program needs beyond its
inputs and outputs. Used by `gpu_compile_test.py`.
"""

import json

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attention
from pallas_kernels.testing import aot
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import replicated

LENGTH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32768, 32, 8, 128


def step(query, key, value, segment_ids, out_bar):
    attend = lambda *inputs: attention(*inputs, segment_ids=segment_ids)
    out, backward = jax.vjp(attend, query, key, value)
    return out, backward(out_bar)


def main() -> None:
    machine = aot.describe("h200x1")
    mesh = make_mesh(Allocation.parse("d1"), machine.devices)

    def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *sizes), dtype, sharding=replicated(mesh))

    query = shape(LENGTH, NUM_HEADS, HEAD_DIM)
    key = shape(LENGTH, NUM_KV_HEADS, HEAD_DIM)
    segment_ids = shape(LENGTH, dtype=jnp.int32)
    report = aot.compile_for(
        machine, jax.jit(step), query, key, key, segment_ids, query, mesh=mesh
    )
    print(json.dumps({"temporary_bytes": report.temporary_bytes}))


if __name__ == "__main__":
    main()
