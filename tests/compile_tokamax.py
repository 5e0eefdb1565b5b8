"""What tokamax computes through XLA, beside our own implementations.

    JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot:. python tests/compile_tokamax.py

The same calls that its kernels get on a GPU, with another backend. Prints one line of
JSON: the largest differences of outputs and gradients. Used by `gpu_kernels_test.py`.
"""

import json

import jax
import jax.numpy as jnp

from pallas_kernels import attention as attention_lib
from pallas_kernels.attention import tokamax as tokamax_attention
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul import tokamax as tokamax_groups


def difference(found, expected) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs)


def of_attention(window, soft_cap) -> float:
    shapes = ((2, 24, 4, 16), (2, 24, 2, 16), (2, 24, 2, 16), (2, 24, 4, 16))
    keys = jax.random.split(jax.random.key(0), 4)
    *heads, out_bar = map(jax.random.normal, keys, shapes)
    segment_ids = jnp.asarray([[1] * 5 + [2] * 10 + [3] * 6 + [0] * 3, [7] * 24])
    out_bar = jnp.where(segment_ids[:, :, None, None] == 0, 0, out_bar)
    options = {"segment_ids": segment_ids, "window": window, "soft_cap": soft_cap}

    def run(attend, **more):
        out, pull = jax.vjp(lambda *heads: attend(*heads, **options, **more), *heads)
        out = jnp.where(segment_ids[:, :, None, None] == 0, 0, out)
        return out, *pull(out_bar)

    found = run(tokamax_attention.attend, through="xla")
    return difference(found, run(attention_lib.attention))


def of_groups(dtype) -> float:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (37, 16))
    kernels = jax.random.normal(keys[1], (5, 16, 24), dtype)
    out_bar = jax.random.normal(keys[2], (37, 24))
    sizes = jnp.asarray([5, 0, 11, 1, 13], jnp.int32)

    def run(multiply, **more):
        out, pull = jax.vjp(lambda *xs: multiply(*xs, sizes, **more), x, kernels)
        return out, *pull(out_bar)

    found = run(tokamax_groups.multiply, through="xla")
    assert found[2].dtype == dtype
    return difference(found, run(reference.grouped_matmul))


def main() -> None:
    attention = {
        f"window {window}, cap {cap}": of_attention(window, cap)
        for window in (None, 3, jnp.int32(4))
        for cap in (None, 2.0)
    }
    print(json.dumps({"attention": attention, "groups": of_groups(jnp.float32)}))


if __name__ == "__main__":
    main()
