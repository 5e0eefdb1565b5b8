"""The same numbers over the devices of a mesh, with every collective written down.

    hidden [R, S, D]   rows over some axes, and places over others
    kernel [D, V]      columns over `vocab_axes`

An axis that splits columns only (tensor) works on the same tokens everywhere: four
numbers a token are summed over it. An axis that splits both (fsdp) gathers the tokens
of a chunk, and scatters the chunk's gradient: the kernel stays cut and is never
gathered, nor is its float32 gradient. An axis that splits tokens only (data) sums the
kernel's gradient, once, after the loop.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt

from pallas_kernels._dispatch import device
from pallas_kernels.linear_logprob import api, chunked
from pallas_kernels.linear_logprob.chunked import Static

# A chunk on one device, after gathering, and columns of a block: float32 logits of
# 16 MiB. The kernel's part is in the type of the products and read at little cost.
CHUNK_TOKENS = 2**11
BLOCK_SIZE = 2**11

AxisNames = tuple[str, ...]


class _Layout(NamedTuple):
    """How the arrays lie on the mesh."""

    mesh: Mesh
    row_axes: AxisNames
    place_axes: AxisNames
    vocab_axes: AxisNames

    @property
    def tokens(self) -> P:
        return P(self.row_axes or None, self.place_axes or None)

    @property
    def kernel(self) -> P:
        return P(None, self.vocab_axes or None)

    @property
    def token_axes(self) -> AxisNames:
        return (*self.row_axes, *self.place_axes)

    def num_parts(self, axes: AxisNames) -> int:
        parts = 1
        for axis in axes:
            parts *= self.mesh.shape[axis]
        return parts


def sharded_linear_logprob(
    hidden: Float[Array, "R S D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "R S"],
    *,
    mesh: Mesh,
    row_axes: AxisNames = (),
    place_axes: AxisNames = (),
    vocab_axes: AxisNames = (),
    temperature: float = 1.0,
    kept: Int[Array, "R S C"] | UInt[Array, "R S C"] | None = None,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    block_size: int | None = None,
) -> tuple[Float[Array, "R S"], Float[Array, "R S"]]:
    """Score one target per place of every row, as `linear_logprob` does.

    To be called under `jax.jit`. Arrays that lie otherwise are moved to the layout
    described here first: the kernel in the type of `hidden`, its gradient in float32.

    Args:
        hidden: one vector per token.
        kernel: of the linear layer.
        targets: token ids to score.
        mesh: of all axes.
        row_axes: mesh axes that split the rows; they divide R.
        place_axes: mesh axes that split the places; they divide S.
        vocab_axes: mesh axes that split the columns, slowest first; they divide V.
        temperature: the logits are divided by it.
        kept: sets of token ids, as for `linear_logprob`.
        soft_cap: of the logits, as for `linear_logprob`.
        vocab_size: columns of the kernel past it are padding.
        chunk_size: most tokens of one chunk on one device, those of other devices that
            it gathers included; None chooses.
        block_size: most columns that a device looks at together; None chooses.

    Returns:
        Log-probabilities and entropies, float32, in nats, cut as the tokens are.

    Raises:
        ValueError: a dimension that its axes do not divide.
    """
    layout = _Layout(mesh, row_axes, place_axes, vocab_axes)
    _check(layout, hidden.shape, kernel.shape)
    gather_axes = tuple(axis for axis in vocab_axes if axis in layout.token_axes)
    num_gathered = layout.num_parts(gather_axes)
    num_columns = kernel.shape[1] // layout.num_parts(vocab_axes)
    num_tokens = targets.size // layout.num_parts(layout.token_axes)
    chunk_size = chunk_size or _default_chunk_size(
        num_tokens * num_gathered, num_columns
    )
    if block_size is None and device().platform != "cpu":
        block_size = BLOCK_SIZE
    if block_size is not None and block_size >= num_columns:
        block_size = None
    static = api.make_static(
        kernel.shape[1],
        temperature=temperature,
        soft_cap=soft_cap,
        vocab_size=vocab_size,
    )._replace(
        num_chunks=chunked.num_chunks(num_tokens, max(1, chunk_size // num_gathered)),
        block_size=block_size,
        gather_axes=gather_axes,
        vocab_axes=vocab_axes,
    )
    return _sharded(static, layout, hidden, kernel, targets, kept)


def _check(layout: _Layout, hidden_shape, kernel_shape) -> None:
    for what, size, axes in (
        ("rows", hidden_shape[0], layout.row_axes),
        ("places", hidden_shape[1], layout.place_axes),
        ("columns of the kernel", kernel_shape[1], layout.vocab_axes),
    ):
        if size % layout.num_parts(axes):
            raise ValueError(
                f"{size} {what} do not divide over {'×'.join(axes)}"
                f"={layout.num_parts(axes)}. Name fewer axes, or pad."
            )


def _default_chunk_size(num_tokens: int, num_columns: int) -> int:
    if device().platform == "cpu":
        return api.default_chunk_size(num_tokens, num_columns)
    return CHUNK_TOKENS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sharded(static: Static, layout: _Layout, hidden, kernel, targets, kept):
    scores = _scores(static, layout, hidden, kernel.astype(hidden.dtype), targets, kept)
    return scores.logprobs, scores.entropy


def _forward(static: Static, layout: _Layout, hidden, kernel, targets, kept):
    hidden, targets, kept = jax.tree.map(lambda x: x.value, (hidden, targets, kept))
    master = kernel.value
    kernel = jax.lax.with_sharding_constraint(
        master.astype(hidden.dtype),
        jax.sharding.NamedSharding(layout.mesh, layout.kernel),
    )
    scores = _scores(static, layout, hidden, kernel, targets, kept)
    # The gradient has the type of the kernel it is for; only its type is kept.
    like = jnp.zeros((0,), master.dtype)
    residuals = (hidden, kernel, targets, kept, scores, like)
    return (scores.logprobs, scores.entropy), residuals


def _backward(static: Static, layout: _Layout, residuals, cotangents):
    hidden, kernel, targets, kept, scores, like = residuals
    summed_axes = tuple(a for a in layout.token_axes if a not in layout.vocab_axes)

    def local(kernel, rows):
        shape, rows = rows.hidden.shape, _flat(rows)
        hidden_grad, kernel_grad = chunked.gradients(static, kernel, rows)
        if summed_axes:
            kernel_grad = jax.lax.psum(kernel_grad, summed_axes)
        return hidden_grad.reshape(shape), kernel_grad

    rows = chunked.Rows(hidden, targets, kept, scores, api.used(cotangents))
    hidden_grad, kernel_grad = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(layout.kernel, layout.tokens),
        out_specs=(layout.tokens, layout.kernel),
        check_vma=False,
    )(kernel, rows)
    return hidden_grad, kernel_grad.astype(like.dtype), None, None


_sharded.defvjp(_forward, _backward, symbolic_zeros=True)


def _scores(static: Static, layout: _Layout, hidden, kernel, targets, kept):
    def local(kernel, rows):
        shape = rows[0].shape[:2]
        hidden, targets, kept = _flat(rows)
        scores, _ = chunked.score(static, hidden, kernel, targets, kept)
        return jax.tree.map(lambda x: x.reshape(shape), scores)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(layout.kernel, layout.tokens),
        out_specs=layout.tokens,
        check_vma=False,
    )(kernel, (hidden, targets, kept))


def _flat(rows):
    """[R, S, …] -> [R · S, …], on one device."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
