"""Tests of `realjax/runtime/confirming.py` on this machine's own devices.

They stand in for described ones: what is counted is tested here, and not what a GPU's
compiler says.
"""

import dataclasses

import jax
import pytest

from pallas_kernels.testing import aot
from realjax.planner.memory import CallBytes
from realjax.runtime.confirming import (
    CompiledProgram,
    Confirmation,
    cluster_of,
    confirmed,
)
from realjax.runtime.planning import described_plan
from tests.cli.compile_test import tiny

MACHINE = aot.Machine("cpux8", tuple(jax.devices()))


def program(name, **sizes):
    names = ("beside_bytes", "argument_bytes", "new_bytes", "temporary_bytes")
    found = dict.fromkeys(names, 0) | sizes
    return CompiledProgram(call="rollout", program=name, seconds=0.0, **found)


def confirmation(**changes):
    found = Confirmation(
        call="rollout",
        allocation="d8@0-7",
        predicted=CallBytes(masters=90, copy=40, working=30, temporary=20, pool=10),
        is_home=False,
        programs=(
            program("prefill", argument_bytes=50, temporary_bytes=35),
            program("decode", argument_bytes=55, beside_bytes=3, temporary_bytes=32),
        ),
        account_bytes=180,
        limit_bytes=200,
    )
    return dataclasses.replace(found, **changes)


def test_a_call_takes_what_its_largest_program_does():
    found = confirmation()
    assert found.predicted_bytes == 40 + 30 + 10
    assert found.compiled_bytes == 55 + 3 + 32
    assert found.compiled_temporary_bytes == 35
    assert confirmation(is_home=True).predicted_bytes == 90 + 30 + 10


def test_what_others_hold_is_beside_it():
    # 10 more than was predicted, beside the 100 of others.
    assert confirmation().peak_bytes == 190
    assert confirmation().fits
    assert not confirmation(limit_bytes=189).fits
    assert confirmation(limit_bytes=0).fits  # Nobody knows.
    assert confirmation().as_dict()["peak_bytes"] == 190


@pytest.mark.parametrize(
    ("name", "num_nodes"), [("h100x8", 1), ("h200x16", 2), ("a100x1", 1)]
)
def test_described_devices_are_a_cluster(name, num_nodes):
    machine = aot.Machine(name, tuple(range(int(name.split("x")[1]))))
    found = cluster_of(machine)
    assert found.num_nodes == num_nodes
    assert found.num_devices == len(machine.devices)
    assert name.split("x")[0] in found.name


def test_a_plan_is_confirmed_call_by_call():
    config = tiny(allocation="f4t2")
    plan = described_plan(config, cluster_of(MACHINE))
    (found,) = confirmed(config, plan, MACHINE, ("reference",))
    assert found.call == "reference"
    assert found.allocation == "f4t2@0-7"
    (fill,) = found.programs
    # Parameters, to the byte, and some of the batch.
    others = fill.argument_bytes - found.predicted.copy
    assert 0 < others < 16 * 16 * 4 * 20
    # Four models beside each other, two of which are trained.
    assert found.account_bytes > found.predicted_bytes
