"""Tests of `realjax/bench/reallocation.py`: planning, and the flags."""

import json

import pytest

from realjax.bench import reallocation
from realjax.bench.layout_pairs import GIGABYTE, PAIRS


def dry(capfd, *flags):
    reallocation.main(["--dry", "--repetitions=1", *flags])
    lines = capfd.readouterr().out.splitlines()
    return lines[:-1], json.loads(lines[-1])


def test_planning_prints_a_table_and_one_json_object(capfd, tmp_path):
    lines, found = dry(
        capfd,
        "--model=width=64,num_layers=4,num_heads=8,num_kv_heads=4,head_dim=8,"
        "mlp_width=96,vocab_size=128",
        "--pairs=f4:t4@4-7,t2@0,3:d2",
        "--devices_per_host=4",
        "--layers=4,8",
        f"--draw={tmp_path}",
    )
    assert lines[0] == "f4@0-3:t4@4-7"
    assert lines[1].startswith("leaves ")
    # A table a pair, not one for every number of layers.
    assert sum(line.startswith("sum ") for line in lines) == 2
    keys = [(pair["pair"], pair["layers"]) for pair in found["pairs"]]
    assert keys == [
        ("f4@0-3:t4@4-7", 4),
        ("f4@0-3:t4@4-7", 8),
        ("t2@0,3:d2@0-1", 4),
        ("t2@0,3:d2@0-1", 8),
    ]
    first, deeper = found["pairs"][:2]
    # Everything goes to the other host, once.
    parameters = 4 * found["parameters"]
    assert first["bytes"]["across"] == first["bytes"]["least_across"] == parameters
    assert first["bytes"]["on_device"] == 0
    leaves = [sorted(leaf["leaves"]) for leaf in first["classes"]]
    assert leaves == [sorted(leaf["leaves"]) for leaf in deeper["classes"]]
    assert first["slowest_class_seconds"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "f4_on_0-3_to_t4_on_4-7.svg",
        "t2_on_0,3_to_d2_on_0-1.svg",
    }


def test_thousands_of_devices_need_none(capfd):
    _, found = dry(
        capfd, "--model=llama-8b", "--devices_per_host=8", "--pairs=f512t8:t8"
    )
    (pair,) = found["pairs"]
    assert found["devices"] == 4096 > found["num_devices"]
    # Every class but the norms comes whole to the eight devices of host 0.
    assert pair["bytes"]["across"] == pair["bytes"]["least_across"] > 0
    assert max(leaf["pieces"] for leaf in pair["classes"]) == 4096


def test_without_flags_twelve_pairs_of_a_gigabyte_are_measured():
    options = reallocation.parse([])
    assert not options.dry and options.model == GIGABYTE
    assert (options.devices, options.processes) == (8, 1)
    assert len(options.pairs) == len(PAIRS) == 12
    assert options.against == ("device_put", "jit")


def test_flags_that_make_no_sense_say_what_would():
    with pytest.raises(ValueError, match="--devices=4, and the pairs need 8"):
        reallocation.parse(["--devices=4"])
    with pytest.raises(ValueError, match="magic cannot be measured"):
        reallocation.parse(["--against=jit,magic"])
    assert reallocation.parse(["--against="]).against == ()
