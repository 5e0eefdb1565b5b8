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

from pallas_kernels import _dispatch
from pallas_kernels.linear_logprob import api, chunked, mosaic_sm90, top
from pallas_kernels.linear_logprob.api import Cut, Plan
from pallas_kernels.linear_logprob.blocks import Rows, Static
from pallas_kernels.linear_logprob.request import Request

# A chunk on one device, after gathering, and columns of a block: float32 logits of
# 16 MiB. The kernel's part is in the type of the products and read at little cost.
CHUNK_TOKENS = 2**11
BLOCK_SIZE = 2**11
# Of the Mosaic kernel: tokens of a chunk forward, whose hidden states are gathered;
# columns that are copied where they are not read in place; and both backward: gradients
# to the logits of 16 MiB.
MOSAIC_CHUNK_TOKENS = 2**13
MOSAIC_BLOCK_SIZE = 2**13
GRADIENT_CHUNK_TOKENS = 2**11
GRADIENT_BLOCK_SIZE = 2**12

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
    targets: Int[Array, "R S"] | Int[Array, "R S K"],
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
    implementation: str | None = None,
) -> tuple[Float[Array, "R S"] | Float[Array, "R S K"], Float[Array, "R S"]]:
    """Score the targets at each place of every row, as `linear_logprob` does.

    To be called under `jax.jit`. Arrays that lie otherwise are moved to the layout
    described here first: the kernel in the type of `hidden`, its gradient in float32.

    Args:
        hidden: one vector per token.
        kernel: of the linear layer.
        targets: token ids to score, one of each place or several.
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
        implementation: "mosaic" or "chunked", as for `linear_logprob`; None chooses.

    Returns:
        Log-probabilities and entropies, float32, in nats, cut as the tokens are.

    Raises:
        ValueError: a dimension that its axes do not divide, or no implementation has
            that name, or the one asked for cannot do this.
    """
    layout = _Layout(mesh, row_axes, place_axes, vocab_axes)
    _check(layout, hidden.shape, kernel.shape)
    gather_axes = tuple(axis for axis in vocab_axes if axis in layout.token_axes)
    num_gathered = layout.num_parts(gather_axes)
    num_tokens = hidden.shape[0] * hidden.shape[1]
    num_tokens //= layout.num_parts(layout.token_axes)
    request = Request(
        num_tokens=num_tokens * num_gathered,
        width=hidden.shape[2],
        num_columns=kernel.shape[1] // layout.num_parts(vocab_axes),
        dtype=hidden.dtype,
        # The part of a device is cast before.
        kernel_dtype=hidden.dtype,
        device=_dispatch.device(),
        has_sets=kept is not None,
        has_several=targets.ndim > 2,
        chunk_size=chunk_size,
        block_size=block_size,
    )
    choice = _dispatch.choose(
        "sharded_linear_logprob", _IMPLEMENTATIONS, request, name=implementation
    )
    static = api.make_static(
        kernel.shape[1],
        temperature=temperature,
        soft_cap=soft_cap,
        vocab_size=vocab_size,
    )._replace(gather_axes=gather_axes, vocab_axes=vocab_axes)
    plan = Plan(
        *(
            _apply(static, cut, request, num_gathered)
            for cut in choice.function(request)
        )
    )
    return _sharded(plan, layout, hidden, kernel, targets, kept)


def sharded_linear_top(
    hidden: Float[Array, "R S D"],
    kernel: Float[Array, "D V"],
    *,
    num_top: int,
    mesh: Mesh,
    row_axes: AxisNames = (),
    place_axes: AxisNames = (),
    vocab_axes: AxisNames = (),
    temperature: float = 1.0,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    block_size: int | None = None,
) -> tuple[Float[Array, "R S K"], Int[Array, "R S K"]]:
    """Find the most likely tokens at each place of every row, as `linear_top` does.

    To be called under `jax.jit`, like `sharded_linear_logprob`.

    Args:
        hidden: one vector per token.
        kernel: of the linear layer.
        num_top: K, how many.
        mesh: as for `sharded_linear_logprob`, like all that follow.
        row_axes: likewise.
        place_axes: likewise.
        vocab_axes: likewise.
        temperature: likewise.
        soft_cap: likewise.
        vocab_size: likewise.
        chunk_size: likewise.
        block_size: likewise.

    Returns:
        Their log-probabilities and their ids, cut as the tokens are.

    Raises:
        ValueError: a dimension that its axes do not divide, or there are not so many
            tokens.
    """
    layout = _Layout(mesh, row_axes, place_axes, vocab_axes)
    _check(layout, hidden.shape, kernel.shape)
    gather_axes = tuple(axis for axis in vocab_axes if axis in layout.token_axes)
    num_gathered = layout.num_parts(gather_axes)
    num_tokens = hidden.shape[0] * hidden.shape[1]
    num_tokens //= layout.num_parts(layout.token_axes)
    request = Request(
        num_tokens=num_tokens * num_gathered,
        width=hidden.shape[2],
        num_columns=kernel.shape[1] // layout.num_parts(vocab_axes),
        dtype=hidden.dtype,
        kernel_dtype=hidden.dtype,
        device=_dispatch.device(),
        chunk_size=chunk_size,
        block_size=block_size,
    )
    static = top.checked_static(
        kernel.shape[1],
        num_top,
        temperature=temperature,
        soft_cap=soft_cap,
        vocab_size=vocab_size,
    )._replace(gather_axes=gather_axes, vocab_axes=vocab_axes)
    static = _apply(static, _chunked(request)[0], request, num_gathered)

    def local(kernel, hidden):
        found = top.highest(static, _flat(hidden), kernel, num_top)
        return jax.tree.map(lambda x: x.reshape(*hidden.shape[:2], -1), found)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(layout.kernel, layout.tokens),
        out_specs=layout.tokens,
        check_vma=False,
    )(kernel.astype(hidden.dtype), hidden)


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


def _apply(static: Static, cut: Cut, request: Request, num_gathered: int) -> Static:
    """Return what is known before tracing, with the numbers of one pass."""
    assert cut.chunk_size is not None
    own = cut._replace(chunk_size=max(1, cut.chunk_size // num_gathered))
    return api.apply_cut(
        static, own, request.num_tokens // num_gathered, request.num_columns
    )


def _mosaic(request: Request) -> tuple[Cut, Cut]:
    blocks, chunk_size = api.kernel_blocks(request), MOSAIC_CHUNK_TOKENS
    if request.has_sets:
        chunk_size = min(chunk_size, api.set_chunk_size(request.num_columns))
    block_size, num_columns = request.block_size, request.num_columns
    if block_size is None and not api.is_ready(request):
        block_size = api.even_block_size(num_columns, MOSAIC_BLOCK_SIZE)
    forward = Cut(request.chunk_size or chunk_size, block_size, blocks)
    block_size = request.block_size or api.even_block_size(
        num_columns, GRADIENT_BLOCK_SIZE
    )
    chunk_size = request.chunk_size or GRADIENT_CHUNK_TOKENS
    backward = Cut(chunk_size, block_size, blocks)
    return forward, backward


def _chunked(request: Request) -> tuple[Cut, Cut]:
    chunk_size, block_size = request.chunk_size, request.block_size
    if request.device.platform != "cpu":
        cut = Cut(chunk_size or CHUNK_TOKENS, block_size or BLOCK_SIZE)
    else:
        num_tokens, num_columns = request.num_tokens, request.num_columns
        cut = Cut(
            chunk_size
            or api.default_chunk_size(num_tokens, num_columns, device=request.device),
            block_size,
        )
    return cut, cut


_IMPLEMENTATIONS = (
    _dispatch.Implementation(
        name="mosaic", function=_mosaic, unsupported=mosaic_sm90.unsupported
    ),
    _dispatch.Implementation(name="chunked", function=_chunked),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sharded(plan: Plan, layout: _Layout, hidden, kernel, targets, kept):
    scores = _scores(
        plan.forward, layout, hidden, kernel.astype(hidden.dtype), targets, kept
    )
    return scores.logprobs, scores.entropy


def _forward(plan: Plan, layout: _Layout, hidden, kernel, targets, kept):
    hidden, targets, kept = jax.tree.map(lambda x: x.value, (hidden, targets, kept))
    master = kernel.value
    kernel = jax.lax.with_sharding_constraint(
        master.astype(hidden.dtype),
        jax.sharding.NamedSharding(layout.mesh, layout.kernel),
    )
    scores = _scores(plan.forward, layout, hidden, kernel, targets, kept)
    # The gradient has the type of the kernel it is for; only its type is kept.
    like = jnp.zeros((0,), master.dtype)
    residuals = (hidden, kernel, targets, kept, scores, like)
    return (scores.logprobs, scores.entropy), residuals


def _backward(plan: Plan, layout: _Layout, residuals, cotangents):
    hidden, kernel, targets, kept, scores, like = residuals
    summed_axes = tuple(a for a in layout.token_axes if a not in layout.vocab_axes)

    def local(kernel, rows):
        shape, rows = rows.hidden.shape, _flat(rows)
        hidden_grad, kernel_grad = chunked.gradients(plan.backward, kernel, rows)
        if summed_axes:
            kernel_grad = jax.lax.psum(kernel_grad, summed_axes)
        return hidden_grad.reshape(shape), kernel_grad

    cotangents = [*api.used(cotangents), None]  # The normalizer is not returned.
    rows = Rows(hidden, targets, kept, scores, cotangents)
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
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), scores)

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
