"""Tests of `realjax/cli/plan.py`: the plan of four 8B models on machines not here."""

import json

import pytest

from realjax.cli import plan as cli
from realjax.cli.compile import run_config
from realjax.dataflow.plan import make_plan
from realjax.parallel.allocation import Allocation
from realjax.runtime.recipe import load_config
from realjax.runtime.run import make_graph

CONFIG = "configs/compile_llama_8b.py"


@pytest.fixture(scope="module")
def found():
    """What the command prints last for eight H200s."""
    values = []
    original = cli.print_table
    cli.print_table = lambda space, best, report: values.append(report)
    try:
        status = cli.command([f"--config={CONFIG}", "--cluster=8xh200", "--seconds=1"])
    finally:
        cli.print_table = original
    assert status == 0
    return values[0]


def test_the_plan_is_a_plan_of_the_run(found):
    graph = make_graph(run_config(load_config(CONFIG).to_dict()))
    plan = make_plan(graph, num_devices=8, allocations=found["allocations"])
    for name, text in found["allocations"].items():
        assert plan.calls[name].allocation == Allocation.parse(text)
    # Arithmetic follows the call that reads it.
    assert plan.calls["advantages"].allocation == plan.calls["train_policy"].allocation


def test_it_is_no_slower_than_the_best_single_allocation(found):
    assert found["lower_bound_seconds"] <= found["seconds"]
    assert found["seconds"] <= found["symmetric"]["seconds"]
    assert found["memory_bytes"] <= 141e9
    ends = [call["end"] for call in found["calls"].values()]
    assert max(ends) == pytest.approx(found["seconds"], rel=1e-5)


def test_the_last_line_is_json(capsys):
    arguments = (f"--config={CONFIG}", "--cluster=2x8xh100", "--seconds=0.2")
    assert cli.command([*arguments, "--new_tokens=500"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["cluster"] == "2x8xh100"
    assert any("train_policy" in line for line in table)


def test_what_cannot_be_planned_is_said(capsys):
    assert cli.command([f"--config={CONFIG}", "--cluster=8xh800"]) == 2
    assert "'8xh800' is no cluster" in capsys.readouterr().err
    assert cli.command([f"--config={CONFIG}", "--cluster=1xh100"]) == 2
    assert "fits no devices of 1x1xh100" in capsys.readouterr().err
    assert cli.command(["--cluster=8xh100"]) == 2
    assert "--config is missing" in capsys.readouterr().err
