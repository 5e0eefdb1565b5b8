"""Values survive being written as bytes."""

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.runtime.messages import decode, encode


def test_what_is_read_is_what_was_written():
    value = {
        "array": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "narrow": np.ones((0, 2), jnp.bfloat16),
        "scalar": np.float32(0.1),
        "zero-d": np.asarray(3),
        "plain": [1, 2.5, None, True, np.str_("text"), float("inf")],
    }
    found = decode(encode(value))
    assert found["plain"] == value["plain"] and list(found) == list(value)
    for key in ("array", "narrow", "scalar", "zero-d"):
        assert type(found[key]) is type(value[key])
        assert found[key].dtype == value[key].dtype
        np.testing.assert_array_equal(found[key], value[key])


def test_tuples_become_lists():
    assert decode(encode(((1, 2), {"a": ()}))) == [[1, 2], {"a": []}]


def test_arrays_of_jax_are_refused():
    with pytest.raises(TypeError, match=r"float32\[2\] of JAX.*Use `fetch`"):
        encode({"x": [jnp.ones(2)]})
