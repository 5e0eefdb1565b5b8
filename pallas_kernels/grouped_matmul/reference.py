"""The definition of the grouped product: a matrix for every row. For tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(
    x: Float[Array, "T D"],
    kernels: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
) -> Float[Array, "T F"]:
    """Multiply each row by its group's matrix; rows of no group give zeros.

    Takes T D F numbers for the matrices of all rows, and as much for the gradient.
    """
    num_groups = kernels.shape[0]
    group = group_of_rows(group_sizes, x.shape[0])
    kernel_of_row = kernels.astype(x.dtype)[jnp.minimum(group, num_groups - 1)]
    out = jnp.einsum("td,tdf->tf", x, kernel_of_row, preferred_element_type=jnp.float32)
    is_grouped = (group < num_groups)[:, None]
    return jnp.where(is_grouped, out, 0).astype(x.dtype)


def group_of_rows(group_sizes: Int[Array, " E"], num_rows: int) -> Int[Array, " T"]:
    """Return each row's group; E for rows past the last."""
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(num_rows, dtype=ends.dtype)
    return jax.vmap(lambda row: (row >= ends).sum(dtype=jnp.int32))(rows)
