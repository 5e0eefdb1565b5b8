"""The attention functions models call, and the choice of an implementation.

cudnn      on GPU, where each row is one segment and nothing is exotic
tokamax    on Hopper, if it is installed: packed rows
dense      all scores of a row at once: short rows
blocked    scores of a block at a time: everything else
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import _dispatch
from pallas_kernels.attention import blocked, cudnn, reference, tokamax

# Longer rows are attended block by block: the scores of a dense row take 4 H T² bytes,
# forward and again backward. So are many rows, over all devices, with scores of 4 GiB.
LONGEST_DENSE_ROW = 1024
MOST_DENSE_SCORES = 2**30

TRACED = "traced"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the choice of an implementation looks at.

    A window or a scale that is not known before tracing is `TRACED`.
    """

    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    dtype: DTypeLike
    device: _dispatch.Device
    causal: bool = True
    window: int | str | None = None
    soft_cap: float | None = None
    scale: float | str | None = None
    is_packed: bool = True


def attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T N K"],
    value: Float[Array, "B T N K"],
    *,
    segment_ids: Int[Array, "B T"],
    causal: bool = True,
    window: int | Int[Array, ""] | None = None,
    soft_cap: float | None = None,
    scale: float | Float[Array, ""] | None = None,
    is_packed: bool = True,
    implementation: str | None = None,
) -> Float[Array, "B T H K"]:
    """Attend within the segments of packed rows.

        out_t = sum_s softmax_s(cap(scale x query_t · key_s)) value_s

    over the s of t's segment, s <= t if `causal`, and t - s < `window`. Query head h
    reads key and value head h // (H / N). Scores and their softmax are float32.

    Where a mesh axis splits the query heads but not the key heads, every block of the
    backward pass sums its gradients of keys over that axis. Repeat the key heads until
    the axis splits them too, and the gradient of the repetition sums once.

    Args:
        query: of every token.
        key: of every token.
        value: of every token.
        segment_ids: tokens see each other if and only if their ids are equal, padding
            (0) included, so that every token sees at least itself. What padding returns
            means nothing.
        causal: tokens see no later ones.
        window: a token sees itself and the `window - 1` tokens before it, at least 1;
            may be traced, as layers of a scanned stack differ. None has no limit.
        soft_cap: cap(x) = soft_cap x tanh(x / soft_cap); None leaves scores as they
            are.
        scale: of the scores; may be traced. None is K**-0.5. A constant to gradients.
        is_packed: False promises that each row is one segment and then padding, which
            cuDNN can attend. Rows that break the promise may return NaN.
        implementation: "cudnn", "tokamax", "dense" or "blocked"; None chooses, see
            `explain`. The first two are kernels: on several devices call this inside
            `jax.shard_map`.

    Returns:
        One vector per token and query head, in the query's dtype.

    Raises:
        ValueError: heads do not split, no implementation has that name, or the one
            asked for cannot attend so.
    """
    request = Request(
        query_shape=query.shape,
        key_shape=key.shape,
        dtype=query.dtype,
        device=_dispatch.device(),
        causal=causal,
        window=_known(window),
        soft_cap=soft_cap,
        scale=_known(scale),
        is_packed=is_packed,
    )
    choice = _choose(request, implementation)
    if choice.name == "cudnn":
        return choice.function(
            query, key, value, segment_ids=segment_ids, window=window, scale=scale
        )
    if choice.name == "tokamax":
        return choice.function(
            *(query, key, value),
            segment_ids=segment_ids,
            window=window,
            soft_cap=soft_cap,
            scale=scale,
        )
    places = jnp.arange(query.shape[1], dtype=jnp.int32)
    visibility = reference.Visibility(
        segment_ids, segment_ids, places, places, _as_array(window)
    )
    form = reference.Form(causal, soft_cap)
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    return _attend(choice, form, query, key, value, visibility, scale)


def explain(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    dtype: DTypeLike,
    *,
    device: _dispatch.Device | None = None,
    implementation: str | None = None,
    **options: bool | int | float | str | None,
) -> str:
    """Say which implementation attends so, and why none of those before it.

    Args:
        query_shape: [B, T, H, K].
        key_shape: [B, T, N, K].
        dtype: of the query.
        device: the one to attend on; None is the one of this process.
        implementation: as in `attention`.
        **options: `causal`, `window`, `soft_cap`, `scale` and `is_packed` of
            `attention`, a traced window or scale as "traced".
    """
    request = Request(
        query_shape=query_shape,
        key_shape=key_shape,
        dtype=dtype,
        device=device or _dispatch.device(),
        **options,  # pyright: ignore[reportArgumentType]  # The class checks names.
    )
    return _choose(request, implementation).explanation


def _choose(request: Request, implementation: str | None) -> _dispatch.Choice:
    _check(request)
    return _dispatch.choose("attention", _IMPLEMENTATIONS, request, name=implementation)


def _check(request: Request) -> None:
    num_heads, num_kv_heads = request.query_shape[2], request.key_shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads do not split over {num_kv_heads} key heads. The"
            " number of query heads must be a multiple."
        )
    if isinstance(request.window, int) and request.window < 1:
        raise ValueError(
            f"The window is {request.window} tokens; it must be at least 1, the token"
            " itself. None attends without a window."
        )
    if request.soft_cap is not None and not request.soft_cap > 0:
        raise ValueError(
            f"The soft cap is {request.soft_cap}; it must be positive. None attends"
            " without."
        )


def _known[T](x: T | Array) -> T | str:
    return TRACED if isinstance(x, jax.Array) else x


def _as_array(window: int | Array | None) -> Array | None:
    return None if window is None else jnp.asarray(window, jnp.int32)


def _attend(
    choice: _dispatch.Choice,
    form: reference.Form,
    query: Array,
    key: Array,
    value: Array,
    visibility: reference.Visibility,
    scale: float | Array | None,
) -> Array:
    """Group the query heads by their key head, attend, and put them back."""
    *rows, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    split = (*rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scale = jnp.asarray(head_dim**-0.5 if scale is None else scale, jnp.float32)
    out = choice.function(form, query.reshape(split), key, value, visibility, scale)
    return out.reshape(query.shape)


def _cudnn_unsupported(request: Request) -> str | None:
    if request.is_packed:
        return "rows are packed; it takes rows of one segment, is_packed=False"
    if not request.causal:
        return "it sets padding apart by causality, and this is not causal"
    return cudnn.unsupported(
        head_dim=request.query_shape[3],
        dtype=jnp.dtype(request.dtype),
        soft_cap=request.soft_cap,
        is_window_known=request.window != TRACED,
        is_scale_known=request.scale != TRACED,
        device=request.device,
    )


def _tokamax_unsupported(request: Request) -> str | None:
    return tokamax.unsupported(
        head_dim=request.query_shape[3],
        dtype=jnp.dtype(request.dtype),
        causal=request.causal,
        is_scale_known=request.scale != TRACED,
        device=request.device,
    )


def _dense_unwise(request: Request) -> str | None:
    num_rows, num_tokens, num_heads, _ = request.query_shape
    if num_tokens > LONGEST_DENSE_ROW:
        return f"rows have {num_tokens} tokens, more than {LONGEST_DENSE_ROW}"
    num_scores = num_rows * num_heads * num_tokens**2
    if num_scores > MOST_DENSE_SCORES:
        return f"there are {num_scores} scores, more than {MOST_DENSE_SCORES}"
    return None


_IMPLEMENTATIONS = (
    _dispatch.Implementation(
        name="cudnn", function=cudnn.attend, unsupported=_cudnn_unsupported
    ),
    _dispatch.Implementation(
        name="tokamax", function=tokamax.attend, unsupported=_tokamax_unsupported
    ),
    _dispatch.Implementation(
        name="dense", function=reference.dense, unwise=_dense_unwise
    ),
    _dispatch.Implementation(name="blocked", function=blocked.blocked),
)
