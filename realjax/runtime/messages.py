"""Values as bytes, for other processes: JSON with NumPy arrays behind it.

No pickles, which run what they say.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ARRAY = "__array__"


def encode(value: Any) -> bytes:
    """Write a value as its length, its JSON, and its arrays.

    Args:
        value: What JSON holds, and NumPy arrays in lists and dicts.

    Raises:
        TypeError: there is something else in it.
    """
    arrays: list[np.ndarray] = []

    def plain(node: Any) -> Any:
        if isinstance(node, str):
            return str(node)  # Also what NumPy has for one.
        if isinstance(node, np.ndarray | np.generic):
            arrays.append(np.ascontiguousarray(node).reshape(np.shape(node)))
            return {_ARRAY: [len(arrays) - 1, isinstance(node, np.generic)]}
        if isinstance(node, jax.Array):
            raise TypeError(
                f"Found a {node.dtype}{list(node.shape)} of JAX among the values, and"
                " only the host talks here. Use `fetch`, or give a NumPy array."
            )
        if isinstance(node, Mapping):
            return {key: plain(child) for key, child in node.items()}
        if isinstance(node, list | tuple):
            return [plain(child) for child in node]
        return node

    tree = plain(value)
    kinds = [[array.dtype.name, array.shape] for array in arrays]
    text = json.dumps({"tree": tree, "arrays": kinds}).encode()
    blocks = [array.tobytes() for array in arrays]
    return b"".join([len(text).to_bytes(8, "little"), text, *blocks])


def decode(message: bytes) -> Any:
    """Read what `encode` wrote; tuples have become lists."""
    end = 8 + int.from_bytes(message[:8], "little")
    head = json.loads(message[8:end])
    arrays = []
    for name, shape in head["arrays"]:
        dtype = jnp.dtype(name)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        block = np.frombuffer(message[end : end + size], dtype)
        arrays.append(block.reshape(shape).copy())
        end += size

    def full(node: Any) -> Any:
        if isinstance(node, dict):
            if node.keys() == {_ARRAY}:
                number, is_scalar = node[_ARRAY]
                return arrays[number][()] if is_scalar else arrays[number]
            return {key: full(child) for key, child in node.items()}
        return [full(child) for child in node] if isinstance(node, list) else node

    return full(head["tree"])
