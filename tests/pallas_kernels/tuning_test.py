"""Tests of `pallas_kernels/_tuning.py`; what a sweep writes is what is read."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from pallas_kernels import _tuning
from pallas_kernels._dispatch import H200
from pallas_kernels.testing.aot_check import all_cases

KERNELS = ("paged_attention", "linear_logprob", "sampling", "interval_copy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    rows: int = 64
    stages: int = 2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_tuning, "FOLDER", tmp_path)
    _tuning._table.cache_clear()
    yield tmp_path
    _tuning._table.cache_clear()


def tuned(shape=(100, 4096)):
    dtypes = (jnp.dtype(jnp.bfloat16), "float32")
    return _tuning.tuned("doubling", Blocks(), device=H200, dtypes=dtypes, shape=shape)


def test_without_a_table_the_default_serves(folder):
    assert tuned() == Blocks()


def test_a_table_gives_what_it_has_for_a_bucket_of_shapes(folder):
    key = _tuning.key_of(("bfloat16", "float32"), (128, 4096))
    assert key == "bfloat16 float32 | 128 4096"
    table = {"doubling": {key: {"stages": 4}}}
    (folder / "nvidia_h200.json").write_text(json.dumps(table))
    assert tuned() == tuned((65, 4000)) == Blocks(stages=4)
    assert tuned((64, 4096)) == Blocks()  # The bucket below.


def test_a_name_that_is_no_field_is_refused(folder):
    key = _tuning.key_of(("bfloat16", "float32"), (128, 4096))
    table = {"doubling": {key: {"columns": 4}}}
    (folder / "nvidia_h200.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"columns.*it has rows, stages"):
        tuned()


def test_every_case_of_a_kernel_can_be_swept():
    for case in all_cases(KERNELS):
        if not case.is_tiny:
            assert len(case.candidates) > 1, case.name
            assert case.with_blocks is not None
            assert case.tuning_key is not None
