"""Tests of `realjax/runtime/stored.py`."""

import dataclasses
import errno
import io
import json
import os

import numpy as np
import pytest

import realjax
from realjax.data.tokenizer import Tokenizer
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import LoraConfig, RoleConfig
from realjax.models import hf, lora_files
from realjax.models.config import ModelConfig
from realjax.models.lora import with_adapters
from realjax.runtime import stored
from realjax.runtime.console import Console
from realjax.runtime.run import prepare
from realjax.runtime.run_config import EvaluationConfig
from realjax.testing import tiny_parameters
from tests.functions.plain import sharp_parameters
from tests.runtime.small_runs import MODEL, data_config, sft_config, train, write_data

FILES = "*_train.stored-*.npz"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_data(folder)
    answers = (folder / "answers_train.jsonl").read_text().splitlines()
    for split, size in (("train", 9), ("valid", 3)):
        records = [json.loads(line) for line in answers[:size]]
        labels = [
            {"prompt": r["prompt"], "completion": r["answer"], "label": i % 2 == 0}
            for i, r in enumerate(records)
        ]
        text = "".join(json.dumps(label) + "\n" for label in labels)
        (folder / f"labels_{split}.jsonl").write_text(text)
    return folder


def saved_role(folder, name, seed):
    """A role whose weights are on disk."""
    place, tokenizer = folder / name, Tokenizer.load(folder / "tokenizer")
    if not place.exists():
        sizes = {"vocab_size": tokenizer.vocab_size, "eos_ids": tokenizer.eos_ids}
        model = ModelConfig(**sizes | MODEL)
        hf.save(place, model, tiny_parameters(model, seed), tokenizer=tokenizer)
    return RoleConfig(path=str(place), optimizer=OptimizerConfig(learning_rate=1e-2))


def config_of(folder, kind, is_stored, **changes):
    # Two models, so that the numbers tell whose they are.
    roles = {
        "reference": saved_role(folder, "reference", 1),
        "policy": saved_role(folder, "policy", 0),
    }
    hp = {"beta": 0.5, "stores_reference": is_stored}
    return sft_config(
        folder,
        **{
            "algorithm": {"pairs": "dpo", "labels": "kto"}[kind],
            "roles": roles,
            "data": data_config(folder, kind, batch_size=4),
            "hp": hp,
            "steps": 3,
            "evaluation": EvaluationConfig(at_start=True, at_end=False),
            **changes,
        },
    )


def show():
    text = io.StringIO()
    return Console(file=text, width=200), text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_a_stored_reference_gives_the_numbers_of_one_that_is_called(
    folder, tmp_path, kind
):
    called, _ = train(config_of(folder, kind, False), tmp_path / "called")
    other_place = config_of(folder, kind, True, allocations={"reference": "t2@0-1"})
    kept, text = train(other_place, tmp_path / "kept")
    assert text.count("stored ref_logprobs in") == 2  # Of both files of data.
    assert set(kept.roles) == {"policy"}
    shown = ("loss", "rewards/", "eval/", "grad_norm")
    names = [name for name in called.metrics if name.startswith(shown)]
    assert len(names) > 5
    for name in names:
        np.testing.assert_allclose(
            kept.metrics[name], called.metrics[name], rtol=2e-4, atol=1e-5, err_msg=name
        )
    assert np.nanmax(np.abs(called.metrics["eval/loss"])) > 0
    rewards = {"pairs": "rewards/chosen", "labels": "rewards/desirable"}[kind]
    assert np.nanmin(np.abs(called.metrics[rewards])) > 1e-3  # Another model than it.


def filled(config, workdir):
    """A run's data sets with what is stored of them, and what was said."""
    console, text = show()
    run = prepare(config)
    workdir.mkdir(exist_ok=True)
    stored.fill(run, workdir, console)
    return run, text.getvalue()


def test_a_file_is_read_again_and_made_anew_where_it_is_not_right(
    folder, tmp_path, monkeypatch
):
    config, workdir = config_of(folder, "pairs", True), tmp_path / "run"
    run, text = filled(config, workdir)
    assert "stored ref_logprobs in" in text
    first = run.train_data.batch([0])["ref_logprobs"]
    assert (first[run.train_data.batch([0])["completion_mask"]] < 0).all()
    (file,) = folder.glob(FILES)
    with monkeypatch.context() as patch:
        patch.setattr(stored, "_compute", None)  # Nothing is computed.
        run, text = filled(config, workdir)
    assert text == ""
    np.testing.assert_array_equal(run.train_data.batch([0])["ref_logprobs"], first)
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    run, text = filled(config, workdir)
    assert f"{file} is damaged or of other data" in text.replace("\n", "")
    np.testing.assert_array_equal(run.train_data.batch([0])["ref_logprobs"], first)
    assert file.read_bytes() != whole[:100]


def adapters_of(folder, name):
    """A folder of adapters for the saved roles."""
    model = with_adapters(
        hf.read_config(folder / "reference"), rank=2, alpha=4.0, targets=("q_proj",)
    )
    lora_files.save_adapters(folder / name, model, sharp_parameters(model))
    return LoraConfig(path=str(folder / name))


def with_adapters_of(config, lora):
    roles = dict(config.roles)
    roles["reference"] = dataclasses.replace(roles["reference"], lora=lora)
    return dataclasses.replace(config, roles=roles)


@pytest.mark.parametrize("change", ["weights", "dtype", "data", "adapters"])
def test_other_numbers_have_another_file(folder, tmp_path, change):
    config = config_of(folder, "pairs", True)
    if change == "adapters":
        config = with_adapters_of(config, adapters_of(folder, "adapters"))
    once = stored._run_once(prepare(config))
    before = stored._fingerprint(once, once.train_data)
    if change == "weights":
        file = next((folder / "reference").glob("*.safetensors"))
        os.utime(file, (0, 0))  # Written at another time.
    elif change == "adapters":
        os.utime(folder / "adapters" / lora_files.ADAPTER_FILE, (0, 0))
    elif change == "dtype":
        roles = dict(config.roles)
        roles["reference"] = dataclasses.replace(roles["reference"], dtype="bfloat16")
        config = dataclasses.replace(config, roles=roles)
    else:
        data = dataclasses.replace(config.data, max_length=20, overlong="truncate")
        config = dataclasses.replace(config, data=data)
    other = stored._run_once(prepare(config))
    assert stored._fingerprint(other, other.train_data) != before


def test_what_decides_no_number_decides_no_file(folder):
    found = set()
    for changes in ({}, {"steps": 7, "seed": 3}, {"allocation": "f2@0-1"}):
        once = stored._run_once(prepare(config_of(folder, "pairs", True, **changes)))
        found.add(stored._fingerprint(once, once.train_data))
    assert len(found) == 1


def test_where_the_data_cannot_be_written_the_work_folder_is(tmp_path):
    files = [tmp_path / "missing" / "a.npz", tmp_path / "a.npz"]
    values = {"ref_logprobs": np.arange(3, dtype=np.float32)}
    assert stored._write(files, values, "f") == files[1]
    console, text = show()
    found = stored._read(files, "f", console)
    assert found is not None
    np.testing.assert_array_equal(found["ref_logprobs"], values["ref_logprobs"])
    assert stored._read(files, "g", console) is None
    assert "is damaged or of other data" in text.getvalue()
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz"}


VALUES = {"ref_logprobs": np.arange(3, dtype=np.float32)}


def test_a_file_has_the_mode_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        file = stored._write([tmp_path / "a.npz"], VALUES, "f")
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_written_leaves_no_part_of_itself(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"begin")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        stored._write([tmp_path / "a.npz"], VALUES, "f")
    assert not list(tmp_path.iterdir())


def test_a_file_that_may_not_be_read_is_not_said_to_be_damaged(tmp_path, monkeypatch):
    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    file = stored._write([tmp_path / "a.npz"], VALUES, "f")
    monkeypatch.setattr(type(file), "open", refuse)  # The superuser may read anything.
    console, text = show()
    assert stored._read([file], "f", console) is None
    found = text.getvalue().replace("\n", "")
    assert "cannot be read (Permission denied)" in found and "damaged" not in found


def test_an_empty_file_is_made_anew(tmp_path):
    (tmp_path / "a.npz").touch()
    console, text = show()
    assert stored._read([tmp_path / "a.npz"], "f", console) is None
    assert "is damaged or of other data" in text.getvalue()


def test_a_plan_is_asked_for_as_a_run_takes_it(folder):
    # Of a call that no step has.
    config = config_of(folder, "pairs", True, allocations={"reference": "t2@0-1"})
    found = realjax.plan(config, 8)
    assert set(found.calls) == {"train_policy"}
    assert found.as_dict() == prepare(config).plan.as_dict()
