"""Tests of `realjax/planner/working.py` against stored figures of XLA's compiler."""

import dataclasses
import json
import pathlib

import pytest

from realjax.bench import memory
from realjax.bench.memory_pairs import HELD_OUT, PAIRS
from realjax.dataflow.graph import DataflowGraph, call
from realjax.dataflow.plan import make_plan
from realjax.functions.function import Generate
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import Role, RoleConfig
from realjax.planner.memory import Work, call_bytes
from realjax.rl import Sampling
from realjax.runtime.confirming import CompiledProgram
from realjax.testing import tiny_model

# Written by `python -m realjax.bench.memory` for eight H200s, and with `--held_out`.
STORED = pathlib.Path(__file__).parent / "compiled_memory.json"


def compared(pairs):
    known = {row["pair"]: row for row in json.loads(STORED.read_text())["rows"]}
    return [
        memory.compared(
            pair,
            [CompiledProgram(**program) for program in known[str(pair)]["programs"]],
        ).as_dict()
        for pair in pairs
    ]


@pytest.mark.parametrize("pairs", [PAIRS, HELD_OUT], ids=["pairs", "held_out"])
def test_predicted_memory_is_what_the_compiler_found(pairs):
    found = memory.summary(compared(pairs))
    assert found["mean_peak_error"] <= 0.08
    assert found["worst_peak_error"] <= 0.20
    assert found["mean_temporary_error"] <= 0.25


def test_gradients_over_stages_are_there_twice():
    # Of the twenty: a pipeline in which every tick adds to the gradient of all layers.
    (found,) = [row for row in compared(PAIRS) if row["allocation"] == "s4t2"]
    assert memory.errors(found)[1] == pytest.approx(0, abs=0.05)


def generating(device_kind, strategy="d8"):
    graph = DataflowGraph(
        rollout=call("policy", Generate(sampling=Sampling(max_new_tokens=512)))
    )
    plan = make_plan(graph, num_devices=8, allocation=strategy)
    role = Role(
        name="policy",
        config=RoleConfig(),
        model=tiny_model(),
        eos_ids=(1,),
        dtype="bfloat16",
        is_trained=False,
    )
    work = Work(num_rows=256, width=520, prompt_width=8, device_kind=device_kind)
    return call_bytes(graph, plan, "rollout", {"policy": role}, 256, work)


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_hopper_reads_pages_where_they_lie_and_others_gather_them(kind):
    gathers = generating("NVIDIA A100-SXM4-80GB")
    assert generating(kind).temporary < gathers.temporary
    # What is not known is counted as what takes more.
    assert generating("") == gathers
    # 32 rows of 520 keys and values, 2 heads of 8 values of 2 bytes.
    assert gathers.temporary > 32 * 520 * 2 * 2 * 8 * 2


def training(strategy, **config):
    pair = dataclasses.replace(PAIRS[11], allocation=strategy, rows=8)
    graph = pair.plan.graph
    role = Role(
        name="policy",
        config=RoleConfig(**config),
        model=tiny_model(num_layers=4),
        eos_ids=(1,),
        dtype="bfloat16",
        is_trained=True,
    )
    work = Work(num_rows=8, width=8)
    return call_bytes(graph, pair.plan, "train_policy", {"policy": role}, 8, work)


def test_zero1_gathers_whole_parameters_to_update_them():
    cut, whole = training("f8"), training("f8+zero1")
    assert whole.temporary >= whole.masters / 2
    assert whole.temporary > cut.temporary


def test_moments_of_two_layers_pass_through_a_device():
    resident = training("f8")
    streamed = training("f8", optimizer=OptimizerConfig(offload=True))
    assert streamed.masters < resident.masters
    assert streamed.temporary >= resident.temporary
