"""The command that samples: prompts from everywhere, JSON Lines out."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from realjax.cli.sample import command
from realjax.data.tokenizer import Tokenizer
from realjax.models import hf
from realjax.rl.sampling import Sampling
from realjax.testing import tiny_model
from tests.runtime.small_world import (
    PROMPTS,
    VOCAB_SIZE,
    contents,
    make_world,
    nothing_compiles,
    other_tokenizer,
    parameters,
    write_lines,
)

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = ["prompt", "completion", "ids", "logprobs", "finish_reason"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def sampled(world, capsys):
    """Runs the command on one device; returns its lines."""

    def sampled(*arguments):
        model = f"--model={world / 'policy'}"
        new = "--max_new_tokens=8"
        assert command([model, "--allocation=d1", new, *arguments]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return sampled


def test_a_line_holds_what_was_sampled(world, sampled, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n\n")
    lines = sampled(f"--prompts={file}", "--n=2")
    assert [line["prompt"] for line in lines] == [p for p in PROMPTS for _ in range(2)]
    tokenizer = Tokenizer.load(world / "policy")
    for line in lines:
        assert list(line) == FIELDS
        assert line["completion"] == tokenizer.decode(line["ids"])
        assert len(line["logprobs"]) == len(line["ids"]) <= 8
        assert max(line["logprobs"]) <= 0
        has_ended = line["ids"][-1] in tokenizer.eos_ids
        assert line["finish_reason"] == ("stop" if has_ended else "length")
    assert lines[0]["ids"] != lines[1]["ids"]


def test_prompts_come_from_lines_from_records_and_from_the_terminal(
    sampled, tmp_path, monkeypatch
):
    text, records = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\n".join(PROMPTS))
    write_lines(records, [{"prompt": prompt, "id": 3} for prompt in PROMPTS])
    found = sampled(f"--prompts={text}")
    assert sampled(f"--prompts={records}") == found
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(PROMPTS) + "\n"))
    assert sampled() == found


def test_a_seed_repeats_and_another_differs(sampled, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    draw = lambda seed: sampled(f"--prompts={file}", f"--seed={seed}")
    assert draw(0) == draw(0) != draw(1)


def test_the_output_file_appears_whole(world, sampled, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    output = tmp_path / "out.jsonl"
    output.write_text("earlier\n")
    assert sampled(f"--output={output}") == []
    assert [json.loads(line)["prompt"] for line in output.open()] == ["the cat"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_conversations_are_rendered_by_the_chat_template(sampled, world, tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer.train(["the cat"], VOCAB_SIZE, chat_template=template)
    shutil.copytree(world / "policy", tmp_path / "chat")
    tokenizer.save(tmp_path / "chat")
    turns = [{"role": "user", "content": "cat"}]
    file = write_lines(tmp_path / "chat.jsonl", [{"prompt": turns}])
    (line,) = sampled(f"--model={tmp_path / 'chat'}", f"--prompts={file}")
    assert line["prompt"] == "<user>cat"


def test_conversations_need_a_chat_template(world, tmp_path, capsys):
    turns = [{"role": "user", "content": "the cat"}]
    file = write_lines(tmp_path / "chat.jsonl", [{"prompt": turns}])
    arguments = [f"--model={world / 'policy'}", f"--prompts={file}", "--allocation=d1"]
    assert command(arguments) == 2
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--modl=x"], "There is no flag --modl. Did you mean 'model'?"),
        ([], "--model is missing"),
        (["--model=nowhere"], "There is no checkpoint folder nowhere"),
        (["--temperature=hot"], "--temperature=hot: a value of type float is needed"),
        (["--temperature=-1"], "temperature is -1.0; it must be positive"),
        (["--top_p=2"], "top_p is 2.0"),
        (["--n=0"], "completions_per_prompt is 0"),
        (["--rows=-1"], "rows -1"),
        (["--dtype=float23"], "dtype='float23' is not one of"),
        (["--allocation=d9"], "needs device 8 and this machine has 8"),
        (["--allocation=t8"], "tensor=8 does not divide num_heads=4"),
        (["--max_new_tokens=999"], "the model was made for 256"),
        (["--prompts=nowhere.txt"], "--prompts=nowhere.txt: there is no such file"),
        (["--prompts=nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (["--prompts=empty.txt"], "There are no prompts in empty.txt"),
        (["--prompts=broken.jsonl"], "Line 2 of 'broken.jsonl' is not JSON"),
        (["--prompts=other.jsonl"], "Record 0 (counting from 0)"),
        (["--output=nowhere/out.jsonl"], "there is no folder"),
        (["--output=."], "is a folder"),
        (["--model={world}/reward"], "scalar head"),
        (["--model={world}/bare"], "has no tokenizer"),
        (["--model={world}/foreign"], "the model's vocabulary has 260 ids"),
    ],
)
def test_what_cannot_be_meant_is_one_message_before_anything_compiles(
    world, tmp_path, monkeypatch, capsys, arguments, text
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat sat on the mat\n"))
    for name, tokenizer in (("bare", None), ("foreign", other_tokenizer())):
        if not (world / name).exists():
            config = tiny_model(260)
            hf.save(world / name, config, parameters(config), tokenizer=tokenizer)
    before = contents(tmp_path, world)
    named = "--model" in " ".join(arguments) or arguments == []
    model = [] if named or "modl" in arguments[0] else [f"--model={world / 'policy'}"]
    with nothing_compiles():
        arguments = [argument.format(world=world) for argument in arguments]
        assert command([*model, *arguments]) == 2
    found = capsys.readouterr()
    assert found.err.startswith("error: ") and text in found.err, found.err
    assert found.out == ""
    assert contents(tmp_path, world) == before


def test_help_names_the_flags_of_the_sampler(capsys):
    assert command(["--help"]) == 0
    found = capsys.readouterr().out
    options = {field.name for field in dataclasses.fields(Sampling)} - {"bad_words"}
    for name in ("model", "prompts", "n", *options):
        assert f"  --{name}  " in found


def test_a_terminal_and_virtual_devices(world):
    # As a person types it: two devices of the CPU, prompts from a pipe.
    settings = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    result = subprocess.run(
        [
            *(sys.executable, "-m", "realjax.cli.sample", "--cpu_devices=2"),
            *(f"--model={world / 'policy'}", "--allocation=d2", "--max_new_tokens=4"),
        ],
        env=os.environ | settings,
        input="the cat\na good day\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["the cat", "a good day"]
