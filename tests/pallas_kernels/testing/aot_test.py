"""Tests of `pallas_kernels/testing/aot.py` that need no compiler for CUDA."""

import pytest

from pallas_kernels.testing import aot


def test_devices_are_named_by_gpu_and_number():
    assert aot.parse("h200x8") == ("h200", 8)
    assert aot.parse("a100") == ("a100", 1)


@pytest.mark.parametrize("name", ["h200x3", "b100x8", "x8", "", "h200x8x2"])
def test_devices_that_are_not_described_are_refused(name):
    with pytest.raises(
        ValueError, match=r"none of the described devices.*a100, h100, h200"
    ):
        aot.parse(name)


def test_without_the_compiler_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(aot, "WHEELS", ("jax", "jax_plugins.none", "none.at_all"))
    aot.describe.cache_clear()
    assert aot.missing_wheels() == ("jax_plugins.none", "none.at_all")
    with pytest.raises(ModuleNotFoundError, match=r"none\.at_all.*make check-gpu-comp"):
        aot.describe("h200x8")


def test_programs_outside_of_loops_and_inside_are_counted_apart():
    looped = aot.Collective(
        kind="all-gather",
        shape="f32[2]",
        num_bytes=8,
        times=3,
        is_looped=True,
        source="",
    )
    once = aot.Collective(
        kind="all-reduce",
        shape="f32[2]",
        num_bytes=8,
        times=1,
        is_looped=False,
        source="",
    )
    report = aot.Report(
        argument_bytes=1,
        output_bytes=2,
        alias_bytes=3,
        temporary_bytes=4,
        peak_bytes=5,
        seconds=0.12,
        collectives=(looped, once, looped),
        arrays=(),
    )
    assert report.count() == {"all-gather": 2, "all-reduce": 1}
    assert report.count(is_looped=True) == {"all-gather": 2}
    assert report.count(is_looped=False) == {"all-reduce": 1}
    assert report.as_dict()["collectives"][0]["times"] == 3
