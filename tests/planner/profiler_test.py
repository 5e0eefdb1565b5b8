"""Tests of `realjax/planner/profiler.py` and `probes.py`, on calls of moments."""

import dataclasses
import itertools

import numpy as np
import pytest

from realjax.parallel.allocation import Allocation
from realjax.planner import profiler
from realjax.planner.cluster import Cluster
from realjax.planner.cost import Coefficients, Quantities, quantities
from realjax.planner.probes import Probe, make_runner
from realjax.planner.profiler import (
    CPU_SCALE,
    GPU_SCALE,
    copies,
    describe,
    draw_calls,
    draw_probe,
    profile,
    run_seconds,
    scale_of,
)
from realjax.testing import tiny_model

SMALL = dataclasses.replace(
    CPU_SCALE,
    widths=(32,),
    num_layers=(1,),
    vocab_size=64,
    head_dim=8,
    num_rows=(4,),
    prompt_tokens=(4,),
    new_tokens=(4,),
    copy_bytes=(2**12,),
)
CPU = Cluster.load("8xcpu")


@pytest.mark.parametrize(
    ("kind", "strategy", "head"),
    [
        ("generate", "t2", "language"),
        ("infer", "f2", "scalar"),
        ("train", "s2", "language"),
    ],
)
def test_a_call_of_each_kind_runs(kind, strategy, head):
    probe = Probe(
        kind=kind,
        model=tiny_model(head=head),
        allocation=Allocation.parse(strategy),
        num_rows=4,
        prompt_tokens=4,
        new_tokens=4,
        rows=2,
        num_updates=2 if kind == "train" else 1,
    )
    assert run_seconds(make_runner(probe)) > 0
    assert str(probe).startswith(f"{kind} of 2 x 32 on {strategy}@")


def test_what_a_call_has_to_do_is_what_the_trainer_would_make_of_it():
    probe = Probe(
        kind="train",
        model=tiny_model(),
        allocation=Allocation.parse("d2s2"),
        num_rows=16,
        prompt_tokens=4,
        new_tokens=4,
        rows=5,
        num_updates=2,
    )
    # Three rows of 8 tokens on each of two row shards, one after the other.
    assert probe.microbatch_rows == 6
    work = probe.work
    assert (work.microbatch_tokens, work.pieces) == (24, 3)
    assert (work.num_updates, work.itemsize) == (2, 4)


def test_calls_are_drawn_of_all_kinds_and_differ_by_seed():
    def names(seed):
        drawn = draw_calls(CPU, CPU_SCALE, np.random.default_rng(seed))
        return [one.name for one in itertools.islice(drawn, 30)]

    assert names(0) == names(0) != names(1)
    assert {name.partition(" ")[0] for name in names(0)} == {
        "generate",
        "infer",
        "train",
        "copy",
    }


@pytest.mark.parametrize("text", ["8xcpu", "1xh200", "8xh100"])
def test_what_is_drawn_can_run_on_the_cluster(text):
    cluster, generator = Cluster.load(text), np.random.default_rng(0)
    scale = scale_of(cluster)
    assert scale == (CPU_SCALE if "cpu" in text else GPU_SCALE)
    for kind in 10 * ("generate", "infer", "train"):
        probe = draw_probe(kind, cluster, scale, generator)
        assert probe.allocation.size <= cluster.num_devices
        assert min(quantities(probe.work, probe.allocation, cluster)) >= 0


def test_a_model_is_copied_between_strategies_that_fit_it():
    # Four heads do not divide over eight devices, and eight do.
    scale = dataclasses.replace(SMALL, widths=(32, 64), num_rows=(8,))
    drawn = draw_calls(CPU, scale, np.random.default_rng(0))
    copied = [one for one in itertools.islice(drawn, 60) if one.name.startswith("copy")]
    assert len(copied) == 15
    for one in copied:
        one.make()


def test_copies_say_what_they_take():
    by_name = {one.name.partition(" MiB ")[2]: one for one in copies(CPU, SMALL)}
    size = 2**12
    found = by_name["from one device to another"].quantities
    assert found.link == size / CPU.link_bytes_per_second
    assert found.hops == 1
    summed = by_name["summed over 8 devices"].quantities
    assert summed.link == pytest.approx(2 * 7 / 8 * found.link)
    to_host = by_name["to the host and back"].quantities
    assert to_host.host == 2 * size / CPU.device.host_bytes_per_second
    for one in by_name.values():
        assert run_seconds(one.make()) > 0


def test_a_profile_is_fitted_to_some_calls_and_checked_on_others(monkeypatch):
    told = []
    # Whether programs run is for the tests above.
    monkeypatch.setattr(profiler, "make_runner", lambda probe: lambda: None)
    found = profile(
        CPU,
        minutes=1e-9,
        scale=SMALL,
        progress=lambda share, count, name: told.append((share, count, name)),
    )
    # Three copies and a call of each kind; then others.
    assert found.num_fitted == 6  # Copies are measured in truth.
    assert len(found.checked) == 3
    assert found.coefficients != Coefficients()
    assert [count for _, count, _ in told] == list(range(9))
    assert found.checked[0].name == told[6][2]
    assert min(dataclasses.astuple(found.coefficients)) >= 0
    lines = describe(found)
    assert len(lines) == len(Quantities._fields) + 2
    assert lines[-1].startswith("the worst")


def test_only_the_devices_at_hand_are_measured():
    with pytest.raises(ValueError, match="has 2 devices and this process 8"):
        profile(Cluster.load("2xcpu"), minutes=1.0)
