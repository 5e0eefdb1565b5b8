"""Whole steps at the size of Llama 3.1 8B, compiled for H200s that are not there.

`make check-gpu-compile` runs these; each compiles for about a minute. They need the
wheels of `requirements/aot.lock` in .venv/aot and are skipped without them.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
WHEELS = ROOT / ".venv" / "aot"
GIB = 2**30

BUDGETS = {
    # Beyond the masters and the sums of gradients, at 4 rows of 4096 tokens a device;
    # tensor parallel at 4 rows in all.
    "train_policy f8 accumulate": 12.0 * GIB,
    "train_policy t8 accumulate": 9.2 * GIB,
    # Nothing but what is updated in place.
    "train_policy f8 apply": 0.1 * GIB,
    "train_policy t8 apply": 0.1 * GIB,
    "reference f8 fill": 6.0 * GIB,
    # 256 completions of 2048 tokens on one device: in one layer, their keys and values
    # are 2 GiB. A chunk of 256 tokens beside the weights of one layer.
    "rollout d1 decode": 2.3 * GIB,
    "rollout d1 prefill": 0.6 * GIB,
    # The pages of 256 rows of 1024 tokens, read in one layer; all layers are 32 GiB, in
    # 8 bits 16.5.
    "pages d1 16 bfloat16 1": 1.5 * GIB,
    "pages d1 16 int8 1": 1.0 * GIB,
    "pages d1 16 bfloat16 64": 2.5 * GIB,
    "pages t8 16 bfloat16 1": 0.2 * GIB,
    "pages d4t2 16 bfloat16 1": 0.2 * GIB,
    # Of 64k tokens by 128k columns, and its part in the 8B step on eight devices.
    "head in the f8 step": 0.25 * GIB,
    "head d1": 1.0 * GIB,
    "attention d1": 1.0 * GIB,
    # The moments of two layers, one read and one written back.
    "streamed update f8": 0.5 * GIB,
    "streamed update t8": 0.5 * GIB,
    "head f8": 0.25 * GIB,
    "head t8": 0.25 * GIB,
}
"""Most bytes of temporaries on one device."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not WHEELS.exists(), reason="needs .venv/aot, made by `make check-gpu-compile`"
    ),
]


def run(*arguments: str) -> dict:
    """Run Python without a GPU; return the JSON of its last line."""
    paths = (str(WHEELS), str(ROOT), os.environ.get("PYTHONPATH", ""))
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": ":".join(paths), "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def compiled(call: str, strategy: str, *overrides: str) -> dict[str, dict]:
    """Return the report of each program of a call."""
    num_devices = int(strategy[1:])
    found = run(
        *("-m", "realjax.cli.compile", "--config=configs/compile_llama_8b.py"),
        *(f"--for=h200x{num_devices}", f"--calls={call}"),
        *(f"--config.allocation={strategy}", *overrides),
    )
    return {program["program"]: program for program in found["programs"]}


def collectives(program: dict, *, is_looped: bool) -> list[tuple[str, str, int]]:
    """Return kind, shape and number of runs of the larger ones, sorted."""
    return sorted(
        (c["kind"], c["shape"], c["times"])
        for c in program["collectives"]
        if c["is_looped"] == is_looped and c["num_bytes"] > 2**20
    )


def check(name: str, program: dict) -> None:
    found = program["temporary_bytes"]
    assert found <= BUDGETS[name], f"{name}: {found / GIB:.2f} GiB of temporaries"


@pytest.mark.parametrize(("strategy", "rows"), [("f8", 32), ("t8", 4)])
def test_train_step_fits_its_budget(strategy, rows):
    programs = compiled("train_policy", strategy, f"--config.rows.train_policy={rows}")
    for name in ("accumulate", "apply"):
        check(f"train_policy {strategy} {name}", programs[name])
        # The old state is updated in place.
        assert programs[name]["alias_bytes"] > 3 * GIB


def test_fsdp_never_holds_the_whole_head_nor_its_gradient():
    program = compiled("train_policy", "f8", "--config.rows.train_policy=32")
    for array in program["accumulate"]["arrays"]:
        assert "4096,128256" not in array["shape"]
    for found in program["accumulate"]["collectives"]:
        assert "128256" not in found["shape"]
        # In loops: weights of a layer and a chunk of hidden states, no more.
        assert not found["is_looped"] or found["num_bytes"] <= 112 * 2**20


def test_head_adds_little_to_the_step_beyond_its_gradient():
    policy = compiled("train_policy", "f8", "--config.rows.train_policy=32")
    critic = compiled("train_critic", "f8", "--config.rows.train_critic=32")
    gradient_bytes = 4096 * 128256 * 4 // 8
    with_head, without = (
        step["accumulate"]["temporary_bytes"] for step in (policy, critic)
    )
    added = with_head - without - gradient_bytes
    assert added <= BUDGETS["head in the f8 step"], f"{added / GIB:.2f} GiB"


def test_tensor_parallel_layers_sum_their_outputs_and_nothing_else():
    program = compiled("train_policy", "t8", "--config.rows.train_policy=4")
    found = program["accumulate"]["collectives"]
    assert {c["kind"] for c in found} == {"all-reduce"}
    of_layers = [c for c in found if c["times"] == 32]
    # Attention and feed-forward layer: forward, anew before the gradient (the last sum
    # of a layer is not needed there), and backward. Query, key and value are one sum.
    size = 4 * 4096 * 4096 * 2
    assert sum(c["num_bytes"] for c in of_layers) == 5 * size


def test_inference_fits_its_budget():
    check("reference f8 fill", compiled("reference", "f8")["fill"])


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_rollout_updates_its_pool_in_place(name):
    shape = ("--config.rows.rollout=256", "--config.hp.sampling.max_new_tokens=1024")
    program = compiled("rollout", "d1", *shape)[name]
    check(f"rollout d1 {name}", program)
    # A row has 2047 tokens in 64 pages of 32, and may hold one page more.
    pool_bytes = 2 * 32 * (256 * 65) * 8 * 32 * 128 * 2
    assert program["alias_bytes"] >= pool_bytes
    assert program["collectives"] == []


@pytest.mark.parametrize("name", [name for name in BUDGETS if name.startswith("pages")])
def test_pages_are_written_in_place_and_read_one_layer_at_a_time(name):
    found = run("tests/compile_pages.py", *name.split()[1:])
    check(name, found)
    assert found["alias_bytes"] >= found["pool_bytes"]
    # Heads are summed once a layer, and no page leaves its device.
    for collective in found["collectives"]:
        assert collective["kind"] == "all-reduce"
        assert collective["num_bytes"] <= 2 * 2**20


@pytest.mark.parametrize(("strategy", "num_rows"), [("d1", 16), ("f8", 32), ("t8", 4)])
def test_head_adds_little_beyond_inputs_and_gradients(strategy, num_rows):
    check(f"head {strategy}", run("tests/compile_head.py", strategy, str(num_rows)))


@pytest.mark.parametrize("strategy", ["f8", "t8"])
def test_a_streamed_update_keeps_moments_in_host_memory(strategy):
    streamed, resident = (
        run("tests/compile_update.py", strategy, kind)
        for kind in ("streamed", "resident")
    )
    check(f"streamed update {strategy}", streamed)
    # Both moments, a half of what the resident update is given with the gradients.
    moments = 2 * 8_030_261_248 * 4 // 8
    assert streamed["host_argument_bytes"] >= moments
    assert resident["argument_bytes"] - streamed["argument_bytes"] >= moments
    # In their place, and never twice.
    assert streamed["host_alias_bytes"] == streamed["host_argument_bytes"]
    assert streamed["host_temporary_bytes"] == resident["host_argument_bytes"] == 0


def test_attention_over_32k_tokens_holds_no_scores():
    found = run("tests/compile_attention.py")
    assert found["temporary_bytes"] <= BUDGETS["attention d1"]


REALLOCATIONS = [
    ("f8:t8", "cast"),
    ("d2f2t2:t8", "cast"),
    ("f8:d2t4", "cast"),
    ("f8:d2t4", "mix"),
]
"""From float32 masters to bfloat16 copies, and into averages in float32."""


@functools.cache
def reallocated(pair: str, kind: str) -> dict:
    """Return what the programs of a reallocation need."""
    return run("tests/compile_reallocation.py", pair, kind)


def steps_of(found: dict, *names: str) -> list[dict]:
    """Return the programs of these kinds."""
    return [p for p in found["programs"] if p["program"].split()[0] in names]


@pytest.mark.parametrize(("pair", "kind"), REALLOCATIONS)
def test_a_reallocation_takes_a_quarter_of_its_tree_beside_it(pair, kind):
    found = reallocated(pair, kind)
    share = found["beside_bytes"] / found["shard_bytes"]
    assert share <= 0.25, f"{pair}: {share:.3f}"
    # All of that is parcels: pieces are read and written where they are.
    for program in steps_of(found, "cut", "begin", "join"):
        assert program["temporary_bytes"] <= 2**20, program["program"]


@pytest.mark.parametrize(("pair", "kind"), REALLOCATIONS)
def test_no_program_of_a_reallocation_uses_host_memory(pair, kind):
    for program in reallocated(pair, kind)["programs"]:
        assert program["host_bytes"] == 0
        assert program["on_host"] == []
        # What a program writes into is given memory, and nothing else is called.
        assert set(program["custom_calls"]) <= {"AllocateBuffer"}


@pytest.mark.parametrize(("pair", "kind"), REALLOCATIONS)
def test_only_exchanges_of_dimensions_are_left_to_collectives(pair, kind):
    found = reallocated(pair, kind)
    assert all(not p["collectives"] for p in steps_of(found, "cut", "begin", "join"))
    exchanges = steps_of(found, "identity")
    assert bool(exchanges) == (pair == "f8:t8")
    for exchange in exchanges:
        assert {c["kind"] for c in exchange["collectives"]} == {"all-to-all"}
        # Every device is given its parts of the result, and no more.
        given = sum(c["num_bytes"] for c in exchange["collectives"])
        assert abs(given - exchange["output_bytes"]) < 1024


@pytest.mark.parametrize(("pair", "kind"), REALLOCATIONS)
def test_slabs_and_averages_are_written_in_place(pair, kind):
    found = reallocated(pair, kind)
    begun = {p["program"].split()[1] for p in steps_of(found, "begin")}
    joins = {p["program"].split()[1]: p for p in steps_of(found, "join")}
    in_place = joins.keys() if kind == "mix" else begun
    assert in_place
    for name in in_place:
        # Beside the arrays there are a counter and a number, of some bytes.
        assert joins[name]["output_bytes"] - joins[name]["alias_bytes"] < 1024


def test_one_jitted_identity_would_gather_whole_arrays():
    found = reallocated("d2f2t2:t8", "identity")
    wholes = [c for c in found["collectives"] if c["shape"] == "f32[32,4096,14336]"]
    assert {c["kind"] for c in wholes} == {"all-gather"}
    pieces = reallocated("d2f2t2:t8", "cast")
    assert found["temporary_bytes"] > 50 * pieces["beside_bytes"]
