"""Attention by cuDNN, for rows that hold one segment each.

cuDNN has a layout for packed rows too (`q_offsets` in `jax._src.cudnn`). It is not
offered: it needs the largest number of segments of a row before tracing, leaves what
lies between segments as it finds it, and its backward pass on Hopper is known to give
NaN before cuDNN 9.18 (https://github.com/NVIDIA/TransformerEngine/issues/2186).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels._dispatch import Device


def attend(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T N K"],
    value: Float[Array, "B T N K"],
    *,
    segment_ids: Int[Array, "B T"],
    window: int | None = None,
    scale: float | None = None,
    through: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T H K"]:
    """Attend causally in rows of one segment, with padding after it.

    A token of the segment sees no later place, so never the padding: causality alone is
    exact. What the padding itself returns is set to 0, and with it all that its
    cotangents could add to the gradients of the segment.

    Args:
        query: of every token; sharded, if at all, by rows and heads as the keys are.
        key: of every token.
        value: of every token.
        segment_ids: of each row, one id and then 0 to the end. A row that is otherwise
            returns NaN.
        window: a token sees itself and the `window - 1` tokens before it.
        scale: of the scores; None is K**-0.5.
        through: "xla" has JAX compute the same call without cuDNN, for tests.
    """
    if window is not None and window >= query.shape[1]:
        window = None
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        scale=scale,
        # The places before and after the own one.
        local_window_size=None if window is None else (window - 1, 0),
        implementation=through,
    )
    is_token = segment_ids[:, :, None, None] != 0
    is_single = has_one_segment(segment_ids)[:, None, None, None]
    return jnp.where(is_single, jnp.where(is_token, out, 0), jnp.nan).astype(out.dtype)


def has_one_segment(segment_ids: Int[Array, "B T"]) -> Bool[Array, " B"]:
    """Tell which rows are one id and then 0 to the end, or 0 from the start."""
    before, after = segment_ids[:, :-1], segment_ids[:, 1:]
    return jnp.all((after == before) | (after == 0), axis=1)


def unsupported(
    *,
    head_dim: int,
    dtype: jnp.dtype,
    soft_cap: float | None,
    is_window_known: bool,
    is_scale_known: bool,
    device: Device,
) -> str | None:
    """Return why cuDNN cannot attend so, or None.

    The limits are those that `jax.nn.dot_product_attention` checks while it traces.
    """
    if device.platform != "gpu":
        return f"cuDNN needs an NVIDIA GPU, and this is compiled for {device.platform}"
    if not device.is_present:
        return "JAX asks cuDNN while it traces, and this process has no GPU"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attends in bfloat16 and float16, not in {jnp.dtype(dtype)}"
    is_hopper = device.compute_capability is not None and (
        device.compute_capability >= (9, 0)
    )
    widest = 256 if is_hopper else 128
    if head_dim % 8 or head_dim > widest:
        return (
            f"heads are {head_dim} wide; cuDNN takes multiples of 8 up to {widest} on"
            " this GPU"
        )
    if soft_cap is not None:
        return f"cuDNN does not cap scores, here at {soft_cap}"
    if not is_window_known:
        return "the window is traced, and cuDNN needs it before"
    if not is_scale_known:
        return "the scale is traced, and cuDNN needs it before"
    return None
