"""What the choice of an implementation, and of block sizes, looks at."""

import dataclasses

from jax.typing import DTypeLike

from pallas_kernels._dispatch import Device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the choice of an implementation looks at.

    Attributes:
        num_tokens: on one device.
        width: of the hidden states.
        num_columns: of the kernel, on one device.
        dtype: of the hidden states.
        kernel_dtype: of the kernel.
        device: the program is for.
        has_sets: distributions are restricted.
        has_several: targets of each token.
        is_cut: the compiler cuts the arrays over devices by itself.
        chunk_size: most tokens together, if it is given.
        block_size: most columns together, if it is given.
    """

    num_tokens: int
    width: int
    num_columns: int
    dtype: DTypeLike
    kernel_dtype: DTypeLike
    device: Device
    has_sets: bool = False
    has_several: bool = False
    is_cut: bool = False
    chunk_size: int | None = None
    block_size: int | None = None
