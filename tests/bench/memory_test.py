"""Tests of `realjax/bench/memory.py`; with XLA's compiler for CUDA, a sample of it."""

import collections

import pytest

from realjax.bench import memory
from realjax.bench.memory_pairs import PAIRS
from realjax.parallel.sharding import check_fit
from realjax.runtime.confirming import CompiledProgram
from realjax.runtime.described import described_model
from realjax.runtime.run import make_graph
from tests.gpu_compile_test import WHEELS, run


def program(**sizes):
    names = ("beside_bytes", "argument_bytes", "new_bytes", "temporary_bytes")
    found = dict.fromkeys(names, 0) | sizes
    return CompiledProgram(call="rollout", program="decode", seconds=0.0, **found)


def test_twenty_pairs_are_on_eight_devices_with_every_axis_and_kind_of_program():
    assert len({str(pair) for pair in PAIRS}) == 20
    allocations = [pair.plan.calls[pair.call].allocation for pair in PAIRS]
    assert {allocation.size for allocation in allocations} == {8}
    for axis in ("data", "fsdp", "tensor", "stage", "expert"):
        assert any(getattr(allocation, axis) > 1 for allocation in allocations)
    for option in ("sequence", "zero1"):
        assert any(option in allocation.options for allocation in allocations)
    calls = collections.Counter(pair.call for pair in PAIRS)
    assert set(calls) >= {"rollout", "reference", "reward", "value", "train_policy"}
    assert {pair.remat for pair in PAIRS} >= {"none", "dots", "block"}


def test_a_pair_divides_its_model():
    for pair in PAIRS:
        graph = make_graph(pair.config)
        role = graph.calls[pair.call].role
        assert role is not None
        model = described_model(pair.config, graph, role)
        check_fit(pair.plan.calls[pair.call].allocation, model, batch_rows=pair.rows)


def test_the_largest_program_is_what_a_call_takes():
    small = program(argument_bytes=10, temporary_bytes=30)
    # What waits beside it is the call's, too.
    large = program(argument_bytes=10, temporary_bytes=20, beside_bytes=15)
    found = memory.compared(PAIRS[0], [small, large])
    assert found.compiled_bytes == 45
    assert found.compiled_temporary_bytes == 30


def test_errors_are_shares_of_what_was_compiled():
    row = {
        "predicted_bytes": 90,
        "compiled_bytes": 100,
        "predicted_temporary_bytes": 15,
        "compiled_temporary_bytes": 10,
    }
    other = row | {"predicted_bytes": 104}
    assert memory.errors(row) == pytest.approx((-0.1, 0.5))
    found = memory.summary([row, other])
    assert found["mean_peak_error"] == pytest.approx(0.07)
    assert found["worst_peak_error"] == pytest.approx(0.1)
    assert found["mean_temporary_error"] == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.skipif(
    not WHEELS.exists(), reason="needs .venv/aot, made by `make check-gpu-compile`"
)
def test_predictions_are_what_a_gpus_compiler_finds():
    # Log-probabilities over fsdp; a pipeline of values; gradients that keep nothing.
    found = run("-m", "realjax.bench.memory", "--pairs=5,10,14")
    assert found["mean_peak_error"] <= 0.08
    assert found["worst_peak_error"] <= 0.20
    assert found["mean_temporary_error"] <= 0.25
