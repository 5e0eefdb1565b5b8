"""Rows that go on over one page each, for tests that ask no more of a pool."""

import jax.numpy as jnp

from realjax.core.arrays import Array, Float, Int, PyTree
from realjax.models import transformer
from realjax.models.config import ModelConfig
from realjax.models.pages import Pool
from realjax.models.partition import WHOLE, Partition


def extend(
    parameters: PyTree,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    pool: Pool,
    *,
    start: Int[Array, " B"] | int,
    counts: Int[Array, " B"] | None = None,
    num_parts: int = 1,
    partition: Partition = WHOLE,
) -> tuple[Float[Array, "B T D"], Pool]:
    """Run the model over the next tokens of rows that have page 0, 1, … of the pool.

    Args:
        parameters: of the model.
        config: of the model.
        tokens: of each row.
        pool: of as many pages as rows.
        start: position of the first token given.
        counts: tokens given of each row; None is all.
        num_parts: of the rows on the mesh.
        partition: how the work is split.
    """
    num_rows, num_tokens = tokens.shape
    start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (num_rows,))
    if counts is None:
        counts = jnp.full(num_rows, num_tokens, jnp.int32)
    pages = jnp.arange(num_rows, dtype=jnp.int32) % (num_rows // num_parts)
    return transformer.extend(
        parameters,
        config,
        tokens,
        pool,
        table=pages[:, None],
        first_page=jnp.zeros_like(start),
        start=start,
        counts=counts,
        lengths=start + counts,
        num_pages=jnp.int32(1),
        partition=partition,
    )
