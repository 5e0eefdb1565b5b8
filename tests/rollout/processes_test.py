"""A rollout over two processes is that of one."""

import numpy as np
import pytest

from tests.processes.launch import launch
from tests.rollout import crossing
from tests.rollout.sampled_test import expected


@pytest.mark.slow
def test_two_processes_sample_as_one_device():
    check("d2", num_devices=1)


@pytest.mark.slow
@pytest.mark.parametrize("place, num_pages", [("d4t2", 0), ("d4t2", 9), ("t4f2", 10)])
def test_meshes_over_two_processes_sample_as_one_device(place, num_pages):
    check(place, num_pages, num_devices=4)


def check(place, num_pages=0, *, num_devices):
    found, other = launch(
        crossing.sample,
        place,
        num_pages,
        False,
        num_processes=2,
        num_devices=num_devices,
    )
    assert found == other
    np.testing.assert_array_equal(found["tokens"], expected().tokens)
    np.testing.assert_array_equal(found["lengths"], expected().lengths)
    np.testing.assert_allclose(found["logprobs"], expected().old_logprobs, atol=5e-5)


@pytest.mark.slow
def test_processes_agree_on_rows_that_the_host_ends():
    arguments = ("d2t2", 12, True)
    found, other = launch(crossing.sample, *arguments, num_processes=2, num_devices=2)
    assert found == other
    lengths, whole = np.array(found["lengths"]), expected().lengths
    assert (lengths <= whole).all() and (lengths < whole).any()
