"""Draws of the next token, and the choice of an implementation.

mosaic       one kernel on a GPU, a few passes over each row
bisection    the same without a kernel: CPUs, other devices
sorted       the definition
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from pallas_kernels import _dispatch
from pallas_kernels.linear_logprob.reference import scaled_logits
from pallas_kernels.sampling import bisection, mosaic, reference
from pallas_kernels.sampling.filters import (
    LARGEST_ID_SET,
    Draw,
    Filters,
    Form,
    Request,
)


def sample(
    logits: Float[Array, "B V"],
    uniforms: Float[Array, "B 2"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    union: bool = False,
    forbidden: Bool[Array, "B V"] | None = None,
    kept: Form | None = None,
    implementation: str | None = None,
) -> Draw:
    """Draw one token per row from what the filters leave, without sorting.

        logits -> / temperature -> top-k -> top-p of what is left -> min-p -> one draw

    A row's token depends on its own logits and uniform numbers only. Ties are kept and
    chosen by the lower id. All arithmetic is float32. On several devices this is to be
    called in `jax.shard_map` over the rows; where the vocabulary is cut, too, there is
    `sharded_sample`.

    Args:
        logits: of the next token.
        uniforms: two per row, in [0, 1).
        temperature: logits are divided by it.
        top_k: most likely tokens to keep; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities add up to it.
        min_p: of what top-k and top-p leave, keep the tokens of at least this share of
            the highest probability; 0 keeps all.
        union: top-p is of the distribution before top-k, and what either removes is
            removed. Otherwise, top-p of the tokens that top-k kept.
        forbidden: tokens of probability 0. Each row needs another one.
        kept: the form in which the tokens left are returned: "ids" (a top-k of at most
            `LARGEST_ID_SET`), "bits", or None.
        implementation: "mosaic", "bisection" or "sorted"; None chooses, see `explain`.

    Raises:
        ValueError: a filter is out of its range, ids are asked for and top_k is not in
            1 to `LARGEST_ID_SET`, no implementation has that name, or the one asked for
            cannot draw so.
    """
    filters = Filters(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, union=union
    )
    request = Request(
        shape=logits.shape,
        dtype=logits.dtype,
        device=_dispatch.device(),
        filters=filters.of(logits.shape[-1]),
        kept=kept,
    )
    choice = _choose(request, implementation)
    if forbidden is not None:
        logits = jnp.where(forbidden, -jnp.inf, logits)
    if choice.name != "mosaic":
        logits = scaled_logits(logits, temperature)
    draw = choice.function(request, logits, uniforms, forbidden)
    return draw if kept is not None else draw._replace(kept=None)


def greedy(
    logits: Float[Array, "B V"],
    *,
    forbidden: Bool[Array, "B V"] | None = None,
    kept: Form | None = None,
) -> Draw:
    """Take the most likely token of each row, of equals the lower id.

    Args:
        logits: of the next token.
        forbidden: tokens of probability 0. Each row needs another one.
        kept: "bits" returns all tokens but the forbidden ones as kept.

    Returns:
        The tokens, with log-probabilities and entropies of the whole distribution.
    """
    logits = logits.astype(jnp.float32)
    if forbidden is not None:
        logits = jnp.where(forbidden, -jnp.inf, logits)
    return bisection.greedy(logits, forbidden, has_kept=kept is not None)


def explain(
    shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
    *,
    device: _dispatch.Device | None = None,
    kept: Form | None = None,
    implementation: str | None = None,
    **filters: bool | int | float,
) -> str:
    """Say which implementation draws so, and why none of those before it.

    Args:
        shape: [B, V].
        dtype: of the logits.
        device: the one to draw on; None is the one of this process.
        kept: as in `sample`.
        implementation: as in `sample`.
        **filters: `temperature`, `top_k`, `top_p`, `min_p` and `union` of `sample`.
    """
    request = Request(
        shape=shape,
        dtype=dtype,
        device=device or _dispatch.device(),
        filters=Filters(**filters).of(shape[-1]),  # pyright: ignore[reportArgumentType]  # The class checks names.
        kept=kept,
    )
    return _choose(request, implementation).explanation


def _choose(request: Request, implementation: str | None) -> _dispatch.Choice:
    if request.kept == "ids" and not request.is_small_set:
        raise ValueError(
            f"Ids of the kept tokens are asked for, but top_k is"
            f" {request.filters.top_k} of {request.shape[-1]} tokens; it takes 1 to"
            f" {LARGEST_ID_SET}, fewer than there are. Ask for bits."
        )
    return _dispatch.choose("sampling", _IMPLEMENTATIONS, request, name=implementation)


def _never(request: Request) -> str | None:
    return "it sorts the vocabulary"


_IMPLEMENTATIONS = (
    _dispatch.Implementation(
        name="mosaic", function=mosaic.sample, unsupported=mosaic.unsupported
    ),
    _dispatch.Implementation(name="bisection", function=bisection.sample),
    _dispatch.Implementation(name="sorted", function=reference.sample, unwise=_never),
)
