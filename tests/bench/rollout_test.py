"""Tests of `realjax/bench/rollout.py` and its parts, with a tiny model and work."""

import contextlib
import dataclasses
import io
import json
import sys

import jax
import numpy as np
import pytest

from realjax.bench import hf_rival, rollout, rollout_sections
from realjax.bench.rollout_options import (
    SECTIONS,
    TINY,
    Options,
    Sizes,
    log_normal_lengths,
    parse,
)
from realjax.bench.rollout_subject import (
    Subject,
    check_equal_rows,
    compilations,
    ratio,
)
from realjax.bench.roofline import read_parameter_bytes
from realjax.bench.static_loop import StaticLoop
from realjax.rl.sampling import Sampling
from realjax.testing import tiny_model

OPTIONS = Options(model=tiny_model(), repetitions=1, sizes=TINY)
SHAPE = "width=32,num_layers=2,num_heads=4,num_kv_heads=2,head_dim=8"
TINY_FLAGS = [
    "--tiny",
    "--repetitions=1",
    f"--model={SHAPE},mlp_width=64,vocab_size=64",
]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(OPTIONS)


def test_lengths_have_the_mean_that_is_asked_for():
    lengths = log_normal_lengths(Sizes(), seed=0)
    assert len(lengths) == 64
    assert lengths.max() == 512
    assert lengths.mean() == pytest.approx(272, abs=1)
    # ln X - mu is symmetric, so the quantiles around the middle are exp(mu).
    below, above = np.percentile(np.log(lengths), [30.9, 69.1])
    assert (above - below) / 2 == pytest.approx(0.6 / 2, abs=0.02)
    other = log_normal_lengths(Sizes(), seed=1)
    assert sorted(other) == sorted(lengths)
    assert list(other) != list(lengths)


def test_a_mean_near_the_longest_is_refused():
    with pytest.raises(ValueError, match=r"mean of 512\.0 at best, not 600"):
        log_normal_lengths(Sizes(mean=600), seed=0)


@pytest.mark.parametrize("greedy", [True, False])
def test_the_static_loop_writes_what_the_engine_writes(subject, greedy):
    sampling = Sampling(greedy=greedy, max_new_tokens=16)
    prompts = subject.prompts(4, 8)
    limits = np.array([16, 3, 9, 1], np.int32)
    engine = subject.engine(24, sampling)
    rollout = engine(subject.parameters, prompts, subject.key, max_new_tokens=limits)
    loop = StaticLoop(subject.program, sampling, width=24)
    tokens, logprobs = loop(subject.parameters, prompts, subject.key, limits)
    np.testing.assert_array_equal(tokens, rollout.tokens)
    np.testing.assert_allclose(logprobs, rollout.old_logprobs, atol=1e-5)
    assert np.count_nonzero(logprobs, axis=1).tolist() == limits.tolist()


def test_the_cache_of_the_static_loop_is_dense():
    program = Subject(OPTIONS).program
    loop = StaticLoop(program, Sampling(), width=24)
    # Keys and values of 2 layers, 2 heads of 8 float32, for 4 rows of 24 tokens.
    assert loop.cache_bytes(4) == 2 * 2 * 2 * 8 * 4 * 4 * 24


def test_greedy_rows_may_differ_at_near_ties_only(subject):
    prompts, sampling, width = rollout_sections.greedy_work(subject)
    engine = subject.engine(width, sampling)
    found = np.array(engine(subject.parameters, prompts, subject.key).tokens)
    assert subject.check_tokens("itself", found, found) == 1.0
    wrong = found.copy()
    place = OPTIONS.sizes.prompt + 2
    wrong[1, place] = (wrong[1, place] + 7) % 64
    with pytest.raises(RuntimeError, match=f"wrong: row 1 has token .* at {place} and"):
        subject.check_tokens("wrong", wrong, found)


def test_a_near_tie_is_no_mistake(subject, monkeypatch):
    rows = np.array([[5, 6, 7], [5, 6, 8]])
    other = np.array([[5, 6, 7], [5, 6, 9]])
    logits = np.zeros(64, np.float32)
    monkeypatch.setattr(subject, "_next_logits", lambda tokens, place: logits)
    assert subject.check_tokens("tie", rows, other) == 0.5
    logits[9] = 0.01
    with pytest.raises(RuntimeError, match=r"logits differ by 0\.01"):
        subject.check_tokens("tie", rows, other)


def test_most_sampled_rows_must_be_alike():
    rows = np.arange(40).reshape(20, 2)
    other = rows.copy()
    other[3] = 0
    assert check_equal_rows("other", other, rows) == 0.95
    other[4:6] = 0
    with pytest.raises(RuntimeError, match="85% of the rows"):
        check_equal_rows("other", other, rows)


def test_ratios_are_of_runs_next_to_each_other():
    # 4 / 2, 9 / 3, 8 / 8.
    expected = {"median": 2.0, "min": 1.0, "max": 3.0}
    assert ratio([4.0, 9.0, 8.0], [2.0, 3.0, 8.0]) == expected


def test_compilations_are_counted():
    function = jax.jit(lambda x: x * 3 + 1)
    x = jax.block_until_ready(jax.numpy.ones(3))
    with compilations() as first:
        function(x)
    with compilations() as second:
        function(x)
    assert (first.count, second.count) == (1, 0)


def test_a_tied_embedding_is_read_as_the_head():
    tied = dataclasses.replace(OPTIONS.model, tie_embeddings=True)
    subjects = [
        Subject(dataclasses.replace(OPTIONS, model=model))
        for model in (OPTIONS.model, tied)
    ]
    untied_bytes, tied_bytes = map(read_parameter_bytes, subjects)
    assert untied_bytes == tied_bytes
    assert tied_bytes == 4 * tied.num_parameters


def test_sharing_prefills_each_prompt_once(subject):
    found = rollout_sections.sharing(subject)
    # 4 prompts of 16 tokens, the last of which is decoded; 2 completions of each.
    assert found["prefilled_tokens"] == {"shared": 4 * 15, "alone": 8 * 15}
    assert found["rows_alike"] == 1.0


@pytest.mark.slow
def test_refilled_slots_compute_less_for_the_same_tokens():
    sizes = dataclasses.replace(TINY, num_prompts=16, mean=24, longest=64)
    options = dataclasses.replace(OPTIONS, sizes=sizes, engine={"steps": 2})
    found = rollout_sections.lengths(Subject(options))
    share = found["useful_over_computed"]
    assert share["refilled"] > share["batched"]
    # The loop of a batch ends with its longest row, batches with a launch of 2 steps.
    assert share["batched"] <= share["static"]
    assert found["useful_tokens"] == pytest.approx(16 * 24, rel=0.03)


def test_nothing_compiles_after_the_warm_up(subject):
    found = rollout_sections.recompilations(subject)
    assert (found["programs"], found["compilations"]) == (0, 0)
    assert found["programs_before"] > 0
    assert found["tokens"] > 0


def test_without_an_interpreter_generate_is_left_out(subject):
    assert hf_rival.beside_hf(subject) == {"left_out": "no --hf_python"}


def test_an_interpreter_without_pytorch_is_an_error(tmp_path):
    prompts = np.zeros((1, 4), np.int32)
    if "torch" in sys.modules:
        pytest.skip("PyTorch is here")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match="ended with 3"):
        hf_rival.Rival(python, tmp_path, prompts, 4, "float32")


STAND_IN = """
import json, pathlib, sys, time
import numpy as np
folder, count, _ = sys.argv[1:]
print(json.dumps({"torch": "none"}), flush=True)
for line in sys.stdin:
    tokens = np.load(pathlib.Path(folder) / "expected.npy")
    np.save(pathlib.Path(folder) / line.strip(), tokens)
    print(json.dumps({"seconds": 0.5}), flush=True)
"""


def test_the_rival_answers_in_turn(tmp_path, monkeypatch):
    server = tmp_path / "server.py"
    server.write_text(STAND_IN)
    monkeypatch.setattr(hf_rival, "SERVER", server)
    expected = np.arange(6, dtype=np.int64).reshape(1, 6)
    np.save(tmp_path / "expected.npy", expected)
    prompts = np.zeros((1, 4), np.int32)
    python = hf_rival.pathlib.Path(sys.executable)
    with hf_rival.Rival(python, tmp_path, prompts, 2, "float32") as rival:
        assert rival.versions == {"torch": "none"}
        assert rival("dynamic") == rival("static") == 0.5
        assert rival.tokens("static").tolist() == expected.tolist()
        process = rival._process
    assert process.returncode == 0


def test_flags_choose_sections_models_and_settings():
    options = parse(
        ["--sections=equal,roofline", "--batches=2,4", "--steps=16", "--kv_dtype=int8"],
        "",
    )
    assert options.sections == ("equal", "roofline")
    assert options.sizes.batches == (2, 4)
    assert options.engine == {"steps": 16, "kv_dtype": "int8"}
    assert options.model.num_parameters == pytest.approx(5.2e6, rel=0.1)
    assert options.model.max_positions >= 64 + 512
    assert "roofline" not in parse([], "").sections  # On a CPU.
    large = parse(["--model=8b", "--dtype=bfloat16"], "")
    assert large.model.num_parameters == pytest.approx(8.03e9, rel=0.01)
    with pytest.raises(ValueError, match="speed cannot be measured"):
        parse(["--sections=speed"], "")


@pytest.mark.slow
def test_the_command_ends_with_one_json_object():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        rollout.main([*TINY_FLAGS, f"--sections={','.join(SECTIONS)}"])
    found = json.loads(out.getvalue().splitlines()[-1])
    assert found["bench"] == "rollout"
    assert set(SECTIONS) <= set(found)
    assert found["equal"]["tokens_per_second"]["engine"]["median"] > 0
    assert [batch["rows"] for batch in found["roofline"]["batches"]] == [2, 4]
    assert found["hf"] == {"left_out": "no --hf_python"}
