"""Plans of ReaL's tutorial, compiled for eight H100s that are not there."""

import pytest

from tests.gpu_compile_test import pytestmark, run

__all__ = ["pytestmark"]


@pytest.mark.parametrize(
    ("name", "num_calls"), [("sft", 1), ("reward_model", 1), ("ppo", 6)]
)
def test_every_call_of_the_tutorials_plans_fits_as_compiled(name, num_calls):
    found = run("tests/compile_plan.py", f"llama7b_{name}", "h100x8")
    assert len(found["calls"]) == num_calls
    for call in found["calls"]:
        assert call["limit_bytes"] == 80 * 10**9
        assert call["fits"], call["call"]
        off = call["predicted_bytes"] / call["compiled_bytes"] - 1
        assert abs(off) <= 0.2, f"{call['call']}: {off:+.0%}"
