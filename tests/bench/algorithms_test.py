"""Tests of `realjax.bench.algorithms`: that it measures, and what it covers."""

import json
import pathlib

import pytest

import realjax.algorithms
from realjax.bench import algorithms
from realjax.bench.learning_lines import BY_NAME, LINES, SORTING
from realjax.data.sorting import score_all, sorting_score


def test_every_algorithm_has_a_line_and_every_line_a_name_of_its_own():
    folder = pathlib.Path(realjax.algorithms.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {line.algorithm for line in LINES} == files
    assert len(BY_NAME) == len(LINES)


def test_lines_are_chosen_by_name_or_by_algorithm():
    assert [line.name for line in algorithms.chosen_lines("dapo")] == ["dapo"]
    assert {line.algorithm for line in algorithms.chosen_lines("grpo")} == {"grpo"}
    assert len(algorithms.chosen_lines("grpo")) > 3
    with pytest.raises(ValueError, match=r"no line .grop.*grpo"):
        algorithms.chosen_lines("grop")


def test_the_score_is_the_share_of_right_places():
    assert sorting_score("4071=", "0147") == 1.0
    assert sorting_score("4071=", "0417") == 0.5
    assert sorting_score("4071=", "01") == 0.5
    assert sorting_score("4071=", "01470147") == 0.5
    assert score_all(["4071="] * 2, ["0147", None], answer=[1, 2]) == [1.0, 0.0]


def test_records_of_the_sorting_task_are_right_and_wrong_as_they_say(tmp_path):
    folder = SORTING.write(tmp_path / "sorting")
    records = {
        name: [json.loads(x) for x in (folder / f"{name}_train.jsonl").open()]
        for name in ("sft", "right", "pairs", "labels", "prompts")
    }
    score = lambda one, key: sorting_score(one["prompt"], one[key])
    assert all(score(one, "answer") == 1 for one in records["right"])
    imitated = [score(one, "answer") for one in records["sft"]]
    assert 0.5 < sum(imitated) / len(imitated) < 0.75
    for one in records["pairs"]:
        assert sorting_score(one["prompt"], one["pos_answers"][0]) == 1
        assert sorting_score(one["prompt"], one["neg_answers"][0]) < 1
    assert all((score(x, "completion") == 1) == x["label"] for x in records["labels"])
    held_out = {
        json.loads(x)["prompt"] for x in (folder / "prompts_valid.jsonl").open()
    }
    assert not held_out & {one["prompt"] for one in records["prompts"]}


@pytest.mark.parametrize(
    "name",
    [
        "sft",
        *(pytest.param(n, marks=pytest.mark.slow) for n in BY_NAME if n != "sft"),
    ],
)
def test_a_line_runs_from_every_seed_with_the_same_programs(name, tmp_path, capsys):
    arguments = [f"--algorithm={name}", "--seeds=2", "--steps=2"]
    arguments += [f"--folder={tmp_path}", f"--picture={tmp_path}/curves.svg"]
    assert algorithms.main(arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (line,) = (one for one in report["lines"] if one["name"] == name)
    assert [[step for step, _ in curve] for curve in line["curves"]] == [[0, 1, 2]] * 2
    assert line["curves"][0] != line["curves"][1]
    assert (tmp_path / "curves.svg").stat().st_size > 0
    # What is known is not run again.
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    assert algorithms.main([f"--algorithm={name}", f"--known={path}"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one for one in again["lines"] if one["name"] == name] == [line]


@pytest.mark.parametrize(
    "name", ["rloo", *(pytest.param(n, marks=pytest.mark.slow) for n in BY_NAME)]
)
def test_a_line_reaches_its_bar(name, tmp_path):
    line = BY_NAME[name]
    steps = 60 if line.name == "rloo" else 0  # A sample, of every `make test`.
    found = algorithms.learn(line, tmp_path, [0], steps=steps)
    assert line.is_reached(found["curves"][0][-1][1]), found["curves"]
