"""The command that samples: prompts from everywhere, JSON Lines out."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from realjax.cli.sample import Lines, command
from realjax.data.tokenizer import Tokenizer
from realjax.functions.packed import ModelProgram
from realjax.models import hf
from realjax.rl.sampling import Sampling
from realjax.rollout.engine import Engine
from realjax.rollout.settings import Settings
from realjax.runtime.model import load
from realjax.runtime.sample import Completion
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
FIELDS = ["prompt", "completion", "ids", "logprobs", "entropy", "finish_reason"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def make_other(world, name, tokenizer):
    """A folder of a smaller vocabulary, with another tokenizer or none."""
    if not (world / name).exists():
        config = tiny_model(260)
        hf.save(world / name, config, parameters(config), tokenizer=tokenizer)


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
        assert len(line["logprobs"]) == len(line["entropy"]) == len(line["ids"]) <= 8
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


def test_the_options_are_those_of_the_engine(world, sampled, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    lines = sampled(f"--prompts={file}", "--greedy", "--kv_dtype=int8", "--slots=2")
    model = load(world / "policy", "d1")
    prompts = {"prompts": np.zeros((5, 24), np.int32), "ids": np.arange(5, dtype="u4")}
    tokens = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    for row, ids in zip(prompts["prompts"], tokens, strict=True):
        row[: len(ids)] = ids
    prompts["lengths"] = np.array([len(ids) for ids in tokens], np.int32)
    engine = Engine(
        ModelProgram(config=model.config),
        model.mesh,
        Sampling(greedy=True, max_new_tokens=8),
        eos_ids=model.tokenizer.eos_ids,
        width=24,
        settings=Settings(slots=3, kv_dtype="int8"),
    )
    rollout = engine(model.parameters, prompts, jax.random.key(0))
    found = np.asarray(rollout.tokens), np.asarray(rollout.completion_mask)
    wanted = [row[mask].tolist() for row, mask in zip(*found, strict=True)]
    assert [line["ids"] for line in lines] == wanted
    texts = [model.tokenizer.decode(ids) for ids in wanted]
    assert [line["completion"] for line in lines] == texts


def test_stop_strings_and_bad_words_are_flags(sampled, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    many = (f"--prompts={file}", "--n=6")
    stops = {"a", "o d"}
    for line, whole in zip(
        sampled(*many, *(f"--stop={stop}" for stop in stops)),
        sampled(*many),
        strict=True,
    ):
        assert line["ids"] == whole["ids"][: len(line["ids"])]
        assert not any(stop in line["completion"] for stop in stops)
    words = ("cat", "a")
    for line in sampled(*many, *(f"--bad_words={word}" for word in words)):
        assert "cat" not in line["completion"]


def test_bad_prompts_have_an_error_in_their_lines(world, tmp_path, capsys):
    file, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts = ["the cat", "x" * 256, "a good day"]
    file.write_text("\n".join(prompts))
    model, new = f"--model={world / 'policy'}", "--max_new_tokens=8"
    arguments = [model, new, "--allocation=d1", f"--prompts={file}", "--n=2"]
    assert command([*arguments, f"--output={output}"]) == 1
    lines = [json.loads(line) for line in output.open()]
    assert [line["prompt"] for line in lines] == [p for p in prompts for _ in range(2)]
    for line in lines:
        if line["prompt"] == prompts[1]:
            assert list(line) == [*FIELDS, "error"]
            assert line["error"].startswith("Prompt 1 has 256 tokens; with 8 new ones")
            assert line["ids"] == [] and line["finish_reason"] == "error"
        else:
            assert list(line) == FIELDS and line["ids"]
    message = capsys.readouterr().err
    assert "1 of 3 prompts failed. Prompt 1 has 256 tokens" in message


@pytest.mark.parametrize("is_file", [True, False])
def test_what_is_sampled_before_ctrl_c_is_kept(
    world, tmp_path, monkeypatch, capsys, is_file
):
    # As if the key was hit after the second completion to end, a later one in order.
    def interrupted(model, prompts, *, on_completion, **options):
        for place in (0, 3):
            ids = [place]
            one = Completion(prompt=place, ids=ids, finish_reason="stop", text="x")
            on_completion(place, one)
        raise KeyboardInterrupt

    monkeypatch.setattr("realjax.cli.sample.sample", interrupted)
    file, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    file.write_text("\n".join(PROMPTS))
    output.write_text("earlier\n")
    arguments = [f"--model={world / 'policy'}", f"--prompts={file}", "--allocation=d1"]
    to_file = [f"--output={output}"] if is_file else []
    assert command([*arguments, *to_file]) == 130
    found = capsys.readouterr()
    partial = tmp_path / ".out.jsonl.partial"
    text = partial.read_text() if is_file else found.out
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["ids"] for line in lines] == [[0], [3]]
    assert [line["prompt"] for line in lines] == [PROMPTS[0], PROMPTS[3]]
    assert (f"2 completions are in {partial}" in found.err) == is_file
    assert found.err.endswith("stopped\n")
    assert output.read_text() == "earlier\n"


def test_lines_are_in_order_whatever_ends_first():
    written = []
    lines = Lines(["p", "q"], lambda line: written.append(json.loads(line)["ids"]))
    for place, count in ((2, 0), (0, 1), (3, 1), (1, 4)):
        one = Completion(prompt=place // 2, ids=[place], finish_reason="stop")
        lines.add(place, one)
        assert len(written) == count
    lines.close()
    assert written == [[0], [1], [2], [3]]


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
        (["--slots=-1"], "slots -1"),
        (["--pages=-1"], "pages -1"),
        (["--kv_dtype=int4"], "kv_dtype='int4' is not one of"),
        (["--stop="], "empty string"),
        (["--bad_words= "], "which is no word"),
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
    make_other(world, "bare", None)
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


def test_ids_of_another_tokenizer_are_errors_of_their_prompts(world, tmp_path, capsys):
    make_other(world, "foreign", other_tokenizer())
    file = tmp_path / "prompts.txt"
    file.write_text("zebras zigzag through the zoo")
    model = f"--model={world / 'foreign'}"
    arguments = [model, f"--prompts={file}", "--allocation=d1", "--max_new_tokens=8"]
    assert command(arguments) == 1
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert "the model's vocabulary has 260 ids" in line["error"]


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
