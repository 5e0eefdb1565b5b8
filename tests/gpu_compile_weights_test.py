"""Sampling with weights of 8 bits, compiled for H200s that are not there."""

import pytest

from tests.gpu_compile_test import GIB, compiled, pytestmark

__all__ = ["pytestmark"]

MATRICES = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
SHAPE = ("--config.rows.rollout=256", "--config.hp.sampling.max_new_tokens=1024")


@pytest.mark.parametrize(("dtype", "stored"), [("int8", "s8"), ("float8_e4m3fn", "u8")])
def test_one_layer_of_quantized_weights_is_read_at_a_time(dtype, stored):
    small = f"--config.weights.rollout={dtype}"
    programs = compiled("rollout", "d1", *SHAPE, small)
    whole = compiled("rollout", "d1", *SHAPE)
    for name, most_gib in (("prefill", 0.5), ("decode", 2.5)):
        program = programs[name]
        # Half of the bytes of bfloat16, and a scale for each output channel.
        saved = whole[name]["argument_bytes"] - program["argument_bytes"]
        assert 0.98 * MATRICES < saved <= MATRICES
        assert program["temporary_bytes"] <= most_gib * GIB
        for array in program["arrays"]:
            assert not array["shape"].startswith(("bf16[32,4096,", "bf16[32,14336,"))
    slices = {array["shape"] for array in programs["prefill"]["arrays"]}
    assert f"{stored}[1,4096,14336]" in slices
