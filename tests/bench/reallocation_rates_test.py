"""The measured half of the reallocation bench."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.bench import reallocation_rates
from realjax.bench.layout_pairs import GIGABYTE, Options, Pair
from realjax.bench.reallocation_rates import check_equal, measure

TINY = dataclasses.replace(
    GIGABYTE, **reallocation_rates.SMALL, num_layers=2, vocab_size=64
)


def options(*pairs):
    return Options(
        model=TINY,
        model_name="tiny",
        layers=(),
        pairs=tuple(map(Pair.parse, pairs)),
        devices=8,
        devices_per_host=None,
        processes=1,
        dry=False,
        against=("device_put", "jit"),
        repetitions=1,
        dtype="float32",
        draw=None,
    )


def test_a_rival_that_gives_other_numbers_is_not_timed():
    x = {"w": jnp.arange(4.0)}
    check_equal("a copy", {"w": jnp.arange(4.0)}, x)
    with pytest.raises(RuntimeError, match=r"rounding did not do the same work.*'w'"):
        check_equal("rounding", {"w": jnp.arange(4.0) + 0.5}, x)


@pytest.mark.slow
def test_every_pair_is_measured_beside_its_rivals_and_a_copy():
    found = measure(options("t4@0-3:d2t4", "f8:t8"))
    shared, same = found["pairs"]
    # device_put keeps the shards of devices 0-3, so ours is measured sharing them too.
    assert shared["shared_bytes"]["device_put"] == shared["shared_bytes"]["ours_shared"]
    assert shared["shared_bytes"]["ours"] == 0 and "jit" not in shared["seconds"]
    assert {"ours", "device_put", "jit", "copy"} <= set(same["seconds"])
    assert np.isfinite(same["share_of_copy"]) and same["memory"]
    assert set(found["host_seconds"]) == {"t4@0-3:d2t4@0-7", "f8@0-7:t8@0-7"}
    assert found["equal_layouts_seconds"]["median"] > 0
