"""The command that converts: what it writes, checks, says and refuses."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from realjax.cli.convert import command
from realjax.models import hf, lora_files
from realjax.models.lora import merged, with_adapters
from realjax.models.parameters import join, split
from tests.functions.plain import sharp_parameters

TESTS = pathlib.Path(__file__).parents[1]
UNTIED, SCALAR = (TESTS / "parity/data" / name for name in ("hf_untied", "hf_scalar"))
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def bins(tmp_path):
    """A checkpoint of two .bin files, with an odd tokenizer."""
    folder = shutil.copytree(TESTS / "models/data/sharded", tmp_path / "bins")
    shutil.copy(SCALAR / "config.json", folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not to be copied")
    return folder


@pytest.fixture
def copied(tmp_path):
    """A checkpoint of safetensors, to be changed."""
    return shutil.copytree(UNTIED, tmp_path / "copied")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_equal_trees(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def run(capsys, *arguments):
    """Runs the command; returns its last line, parsed, and the text before."""
    assert command([*arguments, "--json"]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1]), "\n".join(lines[:-1])


def test_bin_files_become_safetensors_with_the_same_numbers(bins, tmp_path, capsys):
    target = tmp_path / "target"
    found, _ = run(capsys, f"--source={bins}", f"--target={target}", "--check")
    assert_equal_trees(hf.load(target), hf.load(SCALAR))
    names = {path.name for path in target.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert [found["head"], found["is_checked"]] == ["scalar", True]


def test_a_summary_counts_what_is_there(capsys):
    config = hf.read_config(UNTIED)
    found, text = run(capsys, f"--source={UNTIED}")
    assert found["parameters"] == config.num_parameters
    assert found["files"] == ["model.safetensors"]
    assert found["bytes"] == (UNTIED / "model.safetensors").stat().st_size
    assert found["dtypes"] == ["float32"] and not found["has_tokenizer"]
    assert found["config"]["vocab_size"] == config.vocab_size
    assert f"{config.num_parameters:,}" in text and "llama" in text
    assert "mixed" not in text


def test_tensors_may_be_stored_as_another_type(copied, tmp_path, capsys):
    arguments = [f"--source={copied}", f"--target={tmp_path / 'short'}"]
    found, _ = run(capsys, *arguments, "--dtype=bfloat16")
    assert found["dtypes"] == ["bfloat16"]
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), hf.load(UNTIED))
    assert_equal_trees(hf.load(tmp_path / "short", dtype=jnp.bfloat16), rounded)


def test_a_language_model_becomes_a_scalar_one_with_a_head_of_the_seed(
    tmp_path, capsys
):
    heads = []
    for seed in (0, 0, 1):
        target = tmp_path / f"reward{len(heads)}"
        arguments = [f"--source={UNTIED}", f"--target={target}", f"--seed={seed}"]
        found, _ = run(capsys, *arguments, "--head=scalar")
        assert found["head"] == "scalar"
        heads.append(hf.load(target))
    assert_equal_trees(heads[0], heads[1])
    assert_equal_trees(heads[0]["layers"], hf.load(UNTIED)["layers"])
    score = [np.asarray(head["score"]["kernel"]) for head in heads]
    assert 0.005 < score[0].std() < 0.05 and (score[0] != score[2]).any()


def test_a_folder_may_be_converted_in_place(copied, capsys):
    before = hf.load(copied)
    run(capsys, f"--source={copied}", f"--target={copied}", "--dtype=float64")
    assert_equal_trees(hf.load(copied), before)
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_mixed_types_load_and_the_summary_says_so(copied, capsys):
    before = hf.load(copied)
    rewrite(copied, lambda tensors: tensors.update({UP: tensors[UP].astype("float64")}))
    found, text = run(capsys, f"--source={copied}")
    assert found["dtypes"] == ["float64", "float32"]
    assert "The types are mixed: float64, float32." in text
    assert_equal_trees(hf.load(copied), before)


def test_the_role_of_a_critic_is_kept(tmp_path, capsys):
    config, parameters = hf.read_config(SCALAR), hf.load(SCALAR)
    hf.save(tmp_path / "critic", config, parameters, role="critic")
    arguments = [f"--source={tmp_path / 'critic'}", f"--target={tmp_path / 'short'}"]
    found, text = run(capsys, *arguments, "--dtype=float16")
    assert found["role"] == "critic" and "scalar head, a critic" in text


def test_a_new_head_has_no_role_yet(tmp_path, capsys):
    config, parameters = hf.read_config(UNTIED), hf.load(UNTIED)
    hf.save(tmp_path / "policy", config, parameters, role="policy")
    arguments = [f"--source={tmp_path / 'policy'}", f"--target={tmp_path / 'new'}"]
    found, _ = run(capsys, *arguments, "--head=scalar")
    assert (found["head"], found["role"]) == ("scalar", None)


def test_settings_of_generation_are_kept_by_language_models(copied, tmp_path, capsys):
    settings = {"eos_token_id": [1, 7], "temperature": 0.6, "do_sample": True}
    (copied / "generation_config.json").write_text(json.dumps(settings))
    run(capsys, f"--source={copied}", f"--target={tmp_path / 'm'}")
    kept = (tmp_path / "m/generation_config.json").read_text()
    assert json.loads(kept) == settings
    run(capsys, f"--source={copied}", f"--target={tmp_path / 'r'}", "--head=scalar")
    assert not (tmp_path / "r/generation_config.json").exists()


def test_a_family_of_ones_own_is_named_by_a_flag(copied, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_family.py").write_text(
        "import dataclasses\n"
        "from realjax.models.families.llama import *\n"
        "from realjax.models.families import llama\n"
        "def read_config(fields):\n"
        "    config = llama.read_config({**fields, 'model_type': 'llama'})\n"
        "    return dataclasses.replace(config, family='own_family')\n"
        "def write_config(config):\n"
        "    config = dataclasses.replace(config, family='llama')\n"
        "    return llama.write_config(config) | {'model_type': 'own'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fields = json.loads((copied / "config.json").read_text()) | {"model_type": "own"}
    (copied / "config.json").write_text(json.dumps(fields))
    assert command([f"--source={copied}"]) == 2
    assert "Models of type 'own' are not supported" in capsys.readouterr().err
    arguments = [f"--source={copied}", f"--target={tmp_path / 'm'}", "--check"]
    found, _ = run(capsys, *arguments, "--family=own_family")
    assert found["family"] == "own_family"
    fields = json.loads((tmp_path / "m/config.json").read_text())
    assert fields["model_type"] == "own"


def test_a_folder_around_the_source_is_not_replaced(copied, tmp_path, capsys):
    inner = shutil.copytree(copied, copied / "inner")
    assert command([f"--source={inner}", f"--target={copied}"]) == 2
    assert "will not be replaced" in capsys.readouterr().err
    assert inner.is_dir()


@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_numbers_that_are_not_finite_are_found_by_name_and_place(copied, value, capsys):
    def spoil(tensors):
        tensors[UP][3, 2] = value

    rewrite(copied, spoil)
    assert command([f"--source={copied}"]) == 0
    assert command([f"--source={copied}", "--check"]) == 2
    error = capsys.readouterr().err
    assert f"'{UP}' holds numbers that are not finite, the first at [3, 2]" in error


def test_numbers_too_large_for_a_type_are_refused(copied, tmp_path, capsys):
    rewrite(copied, lambda tensors: tensors.update({UP: tensors[UP] + 1e6}))
    arguments = [f"--source={copied}", f"--target={tmp_path / 'x'}", "--dtype=float16"]
    assert command(arguments) == 2
    assert f"The tensor '{UP}' holds numbers that are too" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--source is missing"),
        (["--source=nowhere"], "There is no checkpoint folder nowhere"),
        (["--source={untied}", "--dtype=int8", "--target=x"], "--dtype=int8 is not"),
        (["--source={untied}", "--dtype=float16"], "--target is missing"),
        (["--source={untied}", "--head=scalar"], "--target is missing"),
        (["--source={untied}", "--head=two", "--target=x"], "head is 'two'"),
        (["--source={scalar}", "--head=language", "--target=x"], "head is lost"),
        (["--source={untied}", "--max_file_megabytes=0"], "must be at least 1"),
        (["--source={untied}", "--seed=-1"], "--seed=-1; it must be at least 0"),
        (["--source={untied}", "--target=full"], "it will not be replaced"),
        (["--source={untied}", "--targt=x"], "There is no flag --targt"),
    ],
)
def test_what_cannot_be_meant_is_one_message_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, arguments, text
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    named = [one.format(untied=UNTIED, scalar=SCALAR) for one in arguments]
    assert command(named) == 2
    assert text in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["full", "thesis.tex"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_merged_into_a_base(tmp_path, capsys, dtype):
    base = hf.read_config(UNTIED)
    config = with_adapters(base, rank=2, alpha=6.0, targets=("o_proj", "up_proj"))
    parameters = sharp_parameters(config)
    lora_files.save_adapters(tmp_path / "adapters", config, parameters)
    run(
        capsys,
        f"--source={UNTIED}",
        f"--target={tmp_path / 'merged'}",
        f"--adapters={tmp_path / 'adapters'}",
        f"--dtype={dtype}",
    )
    beside = join(split(parameters, config)[0], hf.load(UNTIED))
    hf.save(tmp_path / "wanted", base, merged(beside, config), dtype=dtype)
    found, wanted = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("merged", "wanted")
    )
    before = load_file(UNTIED / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        tolerance = 1e-6 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(
            found[name].astype(np.float32), value.astype(np.float32), atol=tolerance
        )
        is_target = name.endswith(("o_proj.weight", "up_proj.weight"))
        assert is_target == (np.abs(found[name] - before[name]).max() > 0.01)


def test_adapters_need_a_target(capsys):
    assert command([f"--source={UNTIED}", "--adapters=somewhere"]) != 0
    assert "--target is missing" in capsys.readouterr().err
