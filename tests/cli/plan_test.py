"""Tests of `realjax/cli/plan.py`: the plan of four 8B models on machines not here."""

import contextlib
import io
import json
import xml.etree.ElementTree

import pytest

from realjax.cli import plan as cli
from realjax.cli.compile import run_config
from realjax.dataflow.plan import ExecutionPlan, make_plan
from realjax.parallel.allocation import Allocation
from realjax.runtime.recipe import load_config
from realjax.runtime.run import make_graph

CONFIG = "configs/compile_llama_8b.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gets the files that the command writes."""
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def printed(folder):
    """What the command prints for four H200s."""
    (folder / "run").mkdir()
    steps = [{"step": n, "timing_s/rollout": s} for n, s in enumerate((9, 9, 2, 3, 4))]
    text = "\n".join(map(json.dumps, steps)) + "\n"
    (folder / "run" / "metrics.jsonl").write_text(text)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = cli.command(
            [
                *(f"--config={CONFIG}", "--cluster=4xh200", "--seconds=1"),
                *(f"--svg={folder}/plan.svg", f"--trace={folder}/trace.json"),
                *(f"--json={folder}/plan.json", f"--measured={folder}/run"),
                "--explain=rollout",
            ]
        )
    assert status == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def found(printed):
    """What it prints last."""
    return json.loads(printed.splitlines()[-1])


def test_the_plan_is_a_plan_of_the_run(found):
    graph = make_graph(run_config(load_config(CONFIG).to_dict()))
    plan = make_plan(graph, num_devices=4, allocations=found["allocations"])
    for name, text in found["allocations"].items():
        assert plan.calls[name].allocation == Allocation.parse(text)
    # Arithmetic follows the call that reads it.
    followed = plan.calls["train_policy"].allocation
    assert plan.calls["advantages"].allocation.strategy == followed.strategy
    assert plan.calls["advantages"].allocation.devices == followed.devices


def test_it_is_no_slower_than_the_best_single_allocation(found):
    assert found["lower_bound_seconds"] <= found["seconds"]
    assert found["seconds"] <= found["symmetric"]["seconds"]
    assert found["memory_bytes"] <= 141e9
    ends = [call["end"] for call in found["calls"].values()]
    assert max(ends) == pytest.approx(found["seconds"], rel=1e-5)


def test_its_file_is_a_plan_that_a_run_takes(found, folder):
    graph = make_graph(run_config(load_config(CONFIG).to_dict()))
    values = json.loads((folder / "plan.json").read_text())
    plan = ExecutionPlan.from_dict(graph, values, num_devices=4)
    for name, text in found["allocations"].items():
        assert str(plan.calls[name].allocation) == text


def test_its_pictures_name_every_call(found, folder):
    picture = (folder / "plan.svg").read_text()
    xml.etree.ElementTree.fromstring(picture)
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    for name in found["calls"]:
        assert name in picture
        assert any(event["name"] == name for event in events)


def test_it_says_what_else_a_call_could_have(printed, found):
    text = found["allocations"]["rollout"].partition("+")[0]
    lines = printed.splitlines()
    (first,) = (line for line in lines if "(chosen)" in line)
    assert text in first
    assert any("d2t2@0-3" in line and "+" in line for line in lines)


def test_medians_of_a_run_stand_beside_what_is_expected(found):
    # The first two of five steps compile.
    assert found["measured"] == {"rollout": 3.0}


@pytest.mark.slow
def test_an_allocation_that_was_not_chosen_is_explained(capsys, folder, printed):
    common = (f"--config={CONFIG}", "--cluster=4xh200", "--seconds=1")
    arguments = [*common, f"--plan={folder}/plan.json"]
    assert cli.command([*arguments, "--explain=rollout=d2@0-1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "With rollout on d2@0-1" in told
    assert "the best plan that was found takes" in told
    assert "the call itself +" in told
    assert cli.command([*arguments, "--explain=train_policy=d4@0-3"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "train_policy cannot have d4@0-3" in told
    assert "GiB of each device's" in told


def test_what_cannot_be_planned_is_said(capsys, tmp_path):
    assert cli.command([f"--config={CONFIG}", "--cluster=8xh800"]) == 2
    assert "'8xh800' is no cluster" in capsys.readouterr().err
    assert cli.command([f"--config={CONFIG}", "--cluster=1xh100"]) == 2
    assert "fits no devices of 1x1xh100" in capsys.readouterr().err
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"flops": 1.0}))
    arguments = [f"--config={CONFIG}", "--cluster=8xh100"]
    assert cli.command([*arguments, f"--coefficients={path}"]) == 2
    assert "holds no coefficients" in capsys.readouterr().err
    assert cli.command(["--cluster=8xh100"]) == 2
    assert "--config is missing" in capsys.readouterr().err
