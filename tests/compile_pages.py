"""Compile a step of decoding from pages for H200s, at the size of Llama 3.1 8B.

    JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot:. python tests/compile_pages.py d1 16 int8 1

256 rows with 1024 tokens each in use. The arguments are the strategy, the tokens of a
page, the type of the pool, and the tokens given of each row. Prints one line of JSON,
what the program needs. Used by `gpu_compile_test.py`.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from pallas_kernels.testing import aot
from realjax.models import axes, pages
from realjax.models.families import llama
from realjax.models.parameters import abstract_parameters
from realjax.models.transformer import extend
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for
from realjax.parallel.sharding import axes_spec, is_axes, parameter_shardings

NUM_ROWS, LENGTH = 256, 1024


def main(strategy: str, page_size: int, dtype: str, num_tokens: int) -> None:
    allocation = Allocation.parse(strategy)
    machine = aot.describe(f"h200x{allocation.size}")
    mesh = make_mesh(allocation, machine.devices)
    partition = partition_for(mesh)
    config = llama.size("3.1-8b")

    def on_mesh(names, leaf):
        sharding = NamedSharding(mesh, axes_spec(names, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def ints(names, *sizes):
        return on_mesh(names, jax.ShapeDtypeStruct(sizes, jnp.int32))

    abstract = abstract_parameters(config)
    parameters = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, jnp.bfloat16, sharding=sharding
        ),
        abstract,
        parameter_shardings(abstract, mesh),
        is_leaf=lambda node: hasattr(node, "axes"),
    )
    num_columns = LENGTH // page_size
    one_device = dataclasses.replace(partition, constrain=axes.unconstrained)
    pool = jax.eval_shape(
        functools.partial(
            *(pages.empty, config, NUM_ROWS * num_columns, page_size, dtype, one_device)
        )
    )
    pool = jax.tree.map(on_mesh, pages.axes_of(pool), pool, is_leaf=is_axes)
    names = ("first_page", "start", "counts", "lengths")
    rows = {
        "table": ints(axes.PAGE_TABLE, NUM_ROWS, num_columns),
        "num_pages": ints(axes.SCALAR),
        **{name: ints(axes.OF_ROWS, NUM_ROWS) for name in names},
    }

    def step(parameters, tokens, pool, rows):
        options = {"dtype": jnp.bfloat16, "partition": partition}
        return extend(parameters, config, tokens, pool, **rows, **options)

    report = aot.compile_for(
        machine,
        jax.jit(step, donate_argnums=2),
        parameters,
        ints(axes.PAGE_TABLE, NUM_ROWS, num_tokens),
        pool,
        rows,
        mesh=mesh,
    )
    of_device = sum(
        leaf.dtype.itemsize * leaf.size // mesh.size for leaf in jax.tree.leaves(pool)
    )
    print(json.dumps(report.as_dict() | {"pool_bytes": of_device}))


if __name__ == "__main__":
    strategy, size, dtype, count = sys.argv[1:]
    main(strategy, int(size), dtype, int(count))
