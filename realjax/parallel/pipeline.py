"""Stages: the stack of layers cut into groups that work on different rows at a time.

The rows are cut into pieces; in tick t stage s runs its layers on piece t - s and hands
the result on (GPipe: Huang et al. 2019, https://arxiv.org/abs/1811.06965):

    tick       0    1    2    3    4
    stage 0    a    b    c    d    ·       4 pieces, 2 stages: 5 ticks,
    stage 1    ·    a    b    c    d       of which each stage idles 1

The backward pass is the transpose of the loop. Only the stage axis is split by hand;
data, fsdp, expert and tensor stay the compiler's. Embedding and head are no stage's:
the vocabulary is cut over the stages too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from realjax.core.arrays import Array, Float, PyTree
from realjax.models.axes import RESIDUAL, Constrain
from realjax.models.partition import Layer, RunLayers, scan_layers

PIECES_PER_STAGE = 4
"""Most pieces for each stage: with 4, stages idle at most a fifth of the time."""


def num_pieces(num_rows: int, num_row_shards: int, num_stages: int) -> int:
    """Return how many pieces the rows are cut into, each with rows of every shard."""
    rows = num_rows // num_row_shards if num_rows % num_row_shards == 0 else num_rows
    most = PIECES_PER_STAGE * num_stages
    return next(n for n in range(min(most, rows), 0, -1) if rows % n == 0)


def run_stages(mesh: Mesh, constrain: Constrain, num_row_shards: int) -> RunLayers:
    """Return a function that runs the layers in stages.

    Args:
        mesh: of the call; the stacked leaves are cut over its stage axis.
        constrain: of the call, for the rows.
        num_row_shards: parts the rows are split into.
    """
    num_stages = mesh.shape["stage"]
    hand_on = [(stage, (stage + 1) % num_stages) for stage in range(num_stages)]

    def run(
        layer: Layer, x: Float[Array, "R S D"], stacked: PyTree, of_rows: PyTree
    ) -> tuple[Float[Array, "R S D"], PyTree]:
        count = num_pieces(len(x), num_row_shards, num_stages)
        cut = lambda leaf: _cut(leaf, count, constrain)
        run_layers = functools.partial(scan_layers, layer)

        def stage_loop(stacked: PyTree, x: Array, of_rows: PyTree):
            """Run one stage; x is [1, pieces, rows, …], of_rows [pieces, rows, …]."""
            stage, x = jax.lax.axis_index("stage"), x[0]

            def tick(carry: tuple[Array, Any], time: Array):
                received, sums = carry
                piece = jnp.clip(time - stage, 0, count - 1)
                pick = lambda leaf: jax.lax.dynamic_index_in_dim(
                    leaf, piece, keepdims=False
                )
                entering = jnp.where(stage == 0, pick(x), received)
                rows = jax.tree.map(pick, of_rows)
                out, more = run_layers(entering, stacked, rows)
                is_busy = (time >= stage) & (time - stage < count)
                add = lambda total, new: total + jnp.where(is_busy, new, 0)
                sums = jax.tree.map(add, sums, more)
                return (jax.lax.ppermute(out, "stage", hand_on), sums), out

            first = jax.tree.map(lambda leaf: leaf[0], (x, of_rows))
            _, shapes = jax.eval_shape(run_layers, first[0], stacked, first[1])
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            ticks = jnp.arange(count + num_stages - 1)
            carry = (jnp.zeros_like(first[0]), zeros)
            (_, sums), outs = jax.lax.scan(tick, carry, ticks)
            # The last stage ends its first piece in tick num_stages - 1.
            return outs[None, num_stages - 1 :], sums

        by_stage, whole = PartitionSpec("stage"), PartitionSpec()
        # A copy for each stage, side by side: the gradient of one for all would be
        # summed by hand, which XLA for the CPU cannot do in bfloat16.
        pieces = cut(x)
        copies = jnp.broadcast_to(pieces[None], (num_stages, *pieces.shape))
        outs, sums = jax.shard_map(
            stage_loop,
            mesh=mesh,
            in_specs=(by_stage, by_stage, whole),
            out_specs=(by_stage, by_stage),
            axis_names={"stage"},
            check_vma=False,  # Kernels start their loops from plain zeros.
        )(stacked, copies, jax.tree.map(cut, of_rows))
        return constrain(_joined(outs[-1]), RESIDUAL), sums

    return run


def _cut(leaf: Array, count: int, constrain: Constrain) -> Array:
    """Cut [R, …] into [count, R / count, …]: piece i has the rows i, count + i, ….

    Rows lie on their devices in contiguous blocks, so that each piece has some of every
    block and no row moves.
    """
    pieces = jnp.swapaxes(leaf.reshape(-1, count, *leaf.shape[1:]), 0, 1)
    return constrain(pieces, (None, "batch", *(None for _ in leaf.shape[1:])))


def _joined(pieces: Array) -> Array:
    """Undo `_cut`."""
    return jnp.swapaxes(pieces, 0, 1).reshape(-1, *pieces.shape[2:])
