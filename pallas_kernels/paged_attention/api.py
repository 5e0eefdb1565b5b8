"""Attention to pages as models call it, and the choice of an implementation.

mosaic      on Hopper, 16-bit queries: a kernel reads what is seen from where it lies
listed      on CPU, steps of decoding: pages in use are met some at a time
gathered    the pages of each row are copied together, then attended to as a dense cache
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import _dispatch
from pallas_kernels.paged_attention import listed, mosaic_sm90, reference
from pallas_kernels.paged_attention.partials import Partials
from pallas_kernels.paged_attention.request import TRACED, Request


def paged_attention(
    query: Float[Array, "B T H K"],
    keys: Shaped[Array, "L P N S K"],
    values: Shaped[Array, "L P N S K"],
    key_scales: Float[Array, "L P N S"] | None = None,
    value_scales: Float[Array, "L P N S"] | None = None,
    *,
    layer: Int[Array, ""],
    table: Int[Array, "B M"],
    first_page: Int[Array, " B"],
    start: Int[Array, " B"],
    num_pages: Int[Array, ""],
    window: int | Int[Array, ""] | None = None,
    soft_cap: float | None = None,
    scale: float | Float[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H K"]:
    """Attend from T tokens of each row to the pages of its own sequence.

        out_t = sum_j softmax_j(cap(scale x query_t · key_j)) value_j

    Pages hold S tokens of all layers. With S = 4, the token at position p of row b
    stands in slot p % 4 of page table[b, p // 4 - first_page[b]]:

        position     0 1 2 3 | 4 5 6 7 | 8 9
        table[b]               7         2     -1        first_page[b] = 1

    Query t has position start[b] + t. It sees position j if and only if j is not after
    its own, the page of j is in the table, and it is fewer than `window` positions
    after j. Query head h reads key and value head h // (H / N). Scores and their
    softmax are float32.

    Args:
        query: of the new tokens; their keys and values are in the pages already.
        keys: pages of all layers. They are made the query's type once read; of uint8
            they are the bits of float8_e4m3fn.
        values: as the keys.
        key_scales: of each token and head: a key is what is stored times its scale.
            None where keys are stored as they are.
        value_scales: as of the keys.
        layer: whose pages are read.
        table: page of each S positions of a row, from its first on; -1 is no page.
        first_page: number of pages before those in the table, which are not seen.
        start: position of each row's first query.
        num_pages: columns of the table in use by any row; later ones may be left
            unread. The time taken is about proportional to it.
        window: a token sees itself and the `window - 1` tokens before it, at least 1;
            may be traced. None has no limit.
        soft_cap: cap(x) = soft_cap x tanh(x / soft_cap); None leaves scores as they
            are.
        scale: of the scores; may be traced. None is K**-0.5.
        implementation: "mosaic", "listed" or "gathered"; None chooses, see `explain`.

    Returns:
        One vector per token and query head, in the query's dtype. What sees nothing is
        finite and means nothing.

    Raises:
        ValueError: heads do not split, one of the scales is missing, no implementation
            has that name, or the one asked for cannot attend so.
    """
    pages = reference.Pages(keys, values, key_scales, value_scales)
    rows = reference.Rows(table, first_page, start, _as_array(window))
    request = _request(query, pages, rows, window, soft_cap, scale)
    return _choose(request, implementation).function(
        query,
        pages,
        rows,
        layer=layer,
        num_pages=num_pages,
        scale=_scale(scale, query),
        soft_cap=soft_cap,
    )


def paged_attention_in_part(
    query: Float[Array, "B T H K"],
    keys: Shaped[Array, "L P N S K"],
    values: Shaped[Array, "L P N S K"],
    key_scales: Float[Array, "L P N S"] | None = None,
    value_scales: Float[Array, "L P N S"] | None = None,
    *,
    layer: Int[Array, ""],
    table: Int[Array, "B M"],
    first_page: Int[Array, " B"],
    start: Int[Array, " B"],
    num_pages: Int[Array, ""],
    window: int | Int[Array, ""] | None = None,
    soft_cap: float | None = None,
    scale: float | Float[Array, ""] | None = None,
    implementation: str | None = None,
) -> Partials:
    """Attend to some pages of each sequence, when others are elsewhere.

    Over two devices that have half of the pages each, inside `jax.shard_map`:

        position        0 1 2 3 | 4 5 6 7        8 9
        device 0          7         2                    first_page = 0
        device 1                                  5      first_page = 2

        found = paged_attention_in_part(query, …)     # Each with its own table.
        out = combine(found, axis_name="sequence")    # The same on both.

    Args:
        query: as all others, as for `paged_attention`.
        keys: as there.
        values: as there.
        key_scales: as there.
        value_scales: as there.
        layer: as there.
        table: of the pages that are here.
        first_page: number of pages before those in the table.
        start: position of each row's first query, in the whole sequence.
        num_pages: columns of the table in use by any row.
        window: as there.
        soft_cap: as there.
        scale: as there.
        implementation: "mosaic" or "gathered"; None takes the first that can.

    Returns:
        What `combine` takes, of this part.

    Raises:
        ValueError: as `paged_attention`.
    """
    pages = reference.Pages(keys, values, key_scales, value_scales)
    rows = reference.Rows(table, first_page, start, _as_array(window))
    request = _request(query, pages, rows, window, soft_cap, scale)
    _check(request)
    choice = _dispatch.choose(
        "paged attention in part", _IN_PART, request, name=implementation
    )
    return choice.function(
        query,
        pages,
        rows,
        layer=layer,
        num_pages=num_pages,
        scale=_scale(scale, query),
        soft_cap=soft_cap,
    )


def explain(
    query_shape: tuple[int, ...],
    pages_shape: tuple[int, ...],
    num_columns: int,
    dtype: DTypeLike,
    *,
    pages_dtype: DTypeLike | None = None,
    device: _dispatch.Device | None = None,
    implementation: str | None = None,
    **options: bool | int | float | str | None,
) -> str:
    """Say which implementation attends so, and why none of those before it.

    Args:
        query_shape: [B, T, H, K].
        pages_shape: [L, P, N, S, K].
        num_columns: of the table.
        dtype: of the query.
        pages_dtype: of keys and values; None is that of the query.
        device: the one to attend on; None is the one of this process.
        implementation: as in `paged_attention`.
        **options: `window`, `soft_cap` and `scale` of `paged_attention`, a traced
            window or scale as "traced"; and `is_scaled`.
    """
    request = Request(
        query_shape=query_shape,
        pages_shape=pages_shape,
        num_columns=num_columns,
        dtype=dtype,
        pages_dtype=dtype if pages_dtype is None else pages_dtype,
        device=device or _dispatch.device(),
        **options,  # pyright: ignore[reportArgumentType]  # The class checks names.
    )
    return _choose(request, implementation).explanation


def _choose(request: Request, implementation: str | None) -> _dispatch.Choice:
    _check(request)
    return _dispatch.choose(
        "paged attention", _IMPLEMENTATIONS, request, name=implementation
    )


def _check(request: Request) -> None:
    num_heads, num_kv_heads = request.query_shape[2], request.pages_shape[2]
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


def _request(
    query: Array,
    pages: reference.Pages,
    rows: reference.Rows,
    window: int | Array | None,
    soft_cap: float | None,
    scale: float | Array | None,
) -> Request:
    if (pages.key_scales is None) != (pages.value_scales is None):
        given, missing = "key_scales", "value_scales"
        if pages.key_scales is None:
            given, missing = missing, given
        raise ValueError(f"{given} came without {missing}. Give both, or neither.")
    return Request(
        query_shape=query.shape,
        pages_shape=pages.keys.shape,
        num_columns=rows.table.shape[1],
        dtype=query.dtype,
        pages_dtype=pages.keys.dtype,
        device=_dispatch.device(),
        window=_known(window),
        soft_cap=soft_cap,
        scale=_known(scale),
        is_scaled=pages.key_scales is not None,
    )


def _scale(scale: float | Array | None, query: Array) -> Array:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return jnp.asarray(scale, jnp.float32)


def _known[T](x: T | Array) -> T | str:
    return TRACED if isinstance(x, jax.Array) else x


def _as_array(window: int | Array | None) -> Array | None:
    return None if window is None else jnp.asarray(window, jnp.int32)


def _listed_unsupported(request: Request) -> str | None:
    num_tokens = request.query_shape[1]
    if num_tokens > 1:
        return f"rows have {num_tokens} tokens, and it takes one"
    return None


def _listed_unwise(request: Request) -> str | None:
    if request.device.platform != "cpu":
        return "a loop of few pages leaves most of a GPU idle"
    return None


_IMPLEMENTATIONS = (
    _dispatch.Implementation(
        name="mosaic",
        function=mosaic_sm90.attend,
        unsupported=mosaic_sm90.unsupported,
    ),
    _dispatch.Implementation(
        name="listed",
        function=listed.listed,
        unsupported=_listed_unsupported,
        unwise=_listed_unwise,
    ),
    _dispatch.Implementation(name="gathered", function=reference.gathered),
)

_IN_PART = (
    _dispatch.Implementation(
        name="mosaic",
        function=mosaic_sm90.attend_in_part,
        unsupported=mosaic_sm90.unsupported,
    ),
    _dispatch.Implementation(name="gathered", function=reference.gathered_in_part),
)
