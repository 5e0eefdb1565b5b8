"""Shapes at which attention is compiled and timed: packed rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.attention.api import attention
from pallas_kernels.testing.cases import Case, Limits

NUM_TOKENS = 8192
SEGMENT = 2048
GOAL = 0.5

MODELS = {
    "llama-3.2-1b": (32, 8, 64),
    "llama-3.1-8b": (32, 8, 128),
    "qwen2.5-7b": (28, 4, 128),
}
"""Query heads, key heads, and the width of one."""


def cases() -> tuple[Case, ...]:
    """Return the cases of attention."""
    return tuple(
        _case(model, *heads, backward=backward)
        for model, heads in MODELS.items()
        for backward in (False, True)
    )


def _case(
    model: str, num_heads: int, num_kv_heads: int, head_dim: int, *, backward: bool
) -> Case:
    def inputs(key: Array) -> tuple[Array, ...]:
        keys = jax.random.split(key, 4)
        heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
        arrays = [
            jax.random.normal(key, (1, NUM_TOKENS, n, head_dim), jnp.bfloat16)
            for key, n in zip(keys, heads, strict=True)
        ]
        segment_ids = jnp.arange(NUM_TOKENS, dtype=jnp.int32)[None] // SEGMENT + 1
        return *arrays, segment_ids

    def run(implementation: str | None, *arrays: Array) -> Any:
        query, key, value, out_bar, segment_ids = arrays
        attend: Callable[..., Array] = functools.partial(
            attention, segment_ids=segment_ids, implementation=implementation
        )
        if not backward:
            return attend(query, key, value)
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(out_bar)

    def reference(*arrays: Array) -> Any:
        floats = [x.astype(jnp.float32) for x in arrays[:-1]]
        return jax.jit(functools.partial(run, "blocked"))(*floats, arrays[-1])

    # Causal: half of the pairs within a segment. Two products forward, and five
    # backward: the scores again, and two gradients of each product.
    pairs = NUM_TOKENS * SEGMENT // 2
    products = 7 if backward else 2
    moved = (2 * num_heads + 2 * num_kv_heads) * NUM_TOKENS * head_dim * 2
    return Case(
        operation="attention",
        name=f"{model}, {NUM_TOKENS} tokens in segments of {SEGMENT},"
        f" {'forward and backward' if backward else 'forward'}",
        inputs=inputs,
        implementations={
            name: functools.partial(run, name) for name in ("tokamax", "blocked")
        },
        reference=reference,
        tolerance=1e-2,
        num_bytes=moved * (2 if backward else 1),
        num_flops=2 * pairs * num_heads * head_dim * products,
        goal=GOAL,
        limits=Limits(temporary_bytes=(4 if backward else 1) * 2**20, num_wgmma=8),
    )
