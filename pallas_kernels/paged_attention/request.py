"""What is asked of paged attention, for those that choose how it is done."""

import dataclasses

from jax.typing import DTypeLike

from pallas_kernels import _dispatch

TRACED = "traced"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the choice of an implementation looks at.

    A window or a scale that is not known before tracing is `TRACED`.
    """

    query_shape: tuple[int, ...]
    pages_shape: tuple[int, ...]
    num_columns: int
    dtype: DTypeLike
    pages_dtype: DTypeLike
    device: _dispatch.Device
    window: int | str | None = None
    soft_cap: float | None = None
    scale: float | str | None = None
    is_scaled: bool = False
