"""Attention by tokamax, whose kernels for Hopper know packed rows.

tokamax is an optional dependency (`pip install realjax[tokamax]`). Its public function
has no argument for segments; the operation behind it has: the first key that each query
sees. Segments and windows are both said so, and causality says the rest:

    segment ids    3 3 3 5 5 0 0
    first key      0 0 0 3 3 5 5          window 2:  0 0 1 3 3 5 5

The backward pass is a kernel, too; it looks at every query after a key, also those past
the end of its segment, where all is masked.
"""

import functools
import importlib
import importlib.util
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import Device


def attend(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T N K"],
    value: Float[Array, "B T N K"],
    *,
    segment_ids: Int[Array, "B T"],
    window: int | Int[Array, ""] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    through: Literal["mosaic_gpu", "xla"] = "mosaic_gpu",
) -> Float[Array, "B T H K"]:
    """Attend causally in packed rows, on one device.

    Args:
        query: of every token.
        key: of every token.
        value: of every token.
        segment_ids: a segment is a run of equal ids. An id that comes back after
            another one is a new segment here.
        window: a token sees itself and the `window - 1` tokens before it; may be
            traced.
        soft_cap: cap(x) = soft_cap x tanh(x / soft_cap); None leaves scores as they
            are.
        scale: of the scores; None is K**-0.5.
        through: "xla" has tokamax compute the same call without its kernel, for tests.
    """
    base: Any = importlib.import_module("tokamax._src.ops.attention.base")
    first = first_key(segment_ids, window)
    out = _operation(through)(
        query,
        key,
        value,
        # One dimension for the heads, which all see the same.
        mask=base.Mask(k_start=first[:, None], is_causal=True),
        logits_scale=query.shape[-1] ** -0.5 if scale is None else scale,
        logits_soft_cap=soft_cap,
        logits_dtype=jnp.float32,
    )
    return out.astype(query.dtype)


def first_key(
    segment_ids: Int[Array, "B T"], window: int | Array | None
) -> Int[Array, "B T"]:
    """Return the place of the first key that each query sees."""
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    if window is None:
        return first
    return jnp.maximum(first, places + 1 - window)


@functools.cache
def _operation(through: str) -> Any:
    """Return the operation behind `tokamax.dot_product_attention`."""
    if through == "xla":
        return importlib.import_module(
            "tokamax._src.ops.attention.base"
        ).DotProductAttention()
    return importlib.import_module(
        "tokamax._src.ops.attention.pallas_mosaic_gpu"
    ).PallasMosaicGpuFlashAttention()


def is_installed() -> bool:
    """Tell whether tokamax can be imported."""
    return importlib.util.find_spec("tokamax") is not None


def unsupported(
    *,
    head_dim: int,
    dtype: jnp.dtype,
    causal: bool,
    is_scale_known: bool,
    device: Device,
) -> str | None:
    """Return why tokamax cannot attend so, or None.

    Forward and backward kernels are both asked for: what trains also infers.
    """
    if not is_installed():
        return "tokamax is not installed; `pip install realjax[tokamax]` adds it"
    if device.platform != "gpu" or device.compute_capability is None:
        return f"its kernel needs an NVIDIA GPU, and this is for {device.platform}"
    if device.compute_capability[0] != 9:
        return f"its kernel is taken on Hopper, and this GPU is {device.kind}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"its kernel attends in bfloat16 and float16, not in {jnp.dtype(dtype)}"
    if head_dim % 64 or head_dim > 256:
        return f"heads are {head_dim} wide; it takes 64, 128, 192 and 256"
    if not causal:
        return "segments are told by causality, and this is not causal"
    if not is_scale_known:
        return "the scale is traced, and tokamax needs it before"
    return None
