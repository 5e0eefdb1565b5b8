"""PPO of mixtures of experts in odd sizes, on stages, experts and cut optimizers."""

import jax
import numpy as np
import pytest

from realjax.models.config import MoEConfig
from realjax.testing import tiny_model
from tests.e2e.allocations_test import check_equal_steps
from tests.e2e.tiny_ppo import hyperparameters, make_executor, masters, run_step

pytestmark = pytest.mark.slow

# No allocation below divides 67 ids, or 3 layers, into equal parts.
MODEL = tiny_model(
    vocab_size=67,
    num_layers=3,
    num_heads=8,
    num_kv_heads=1,
    head_dim=4,
    mlp_width=16,
    has_query_key_norm=True,
    window=6,
    moe=MoEConfig(num_experts=4, top_k=2, aux_loss_coef=0.05, z_loss_coef=0.01),
)
PLAN = {
    "rollout": "e2t2@0-3",
    "reward": "t2@6-7",
    "reference": "s2@4-5",
    "value": "e2@2-3",
    "advantages": "d4@1-4",
    "train_policy": "s2e2t2@0-7",
    "train_critic": "f2t2@4-7+zero1",
}
STEPS = (1, 2)


def run(allocations):
    executor = make_executor(hyperparameters(), allocations, model=MODEL)
    try:
        steps = {step: run_step(executor, step) for step in STEPS}
        return steps, masters(executor)
    finally:
        executor.close()


@pytest.fixture(scope="module")
def runs():
    return run(PLAN), run(dict.fromkeys(PLAN, "d1@0"))


def test_a_mixture_on_many_strategies_learns_what_one_device_learns(runs):
    (found, parameters), (wanted, expected) = runs
    check_equal_steps(found, wanted)
    for role in expected:
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(
                x[tuple(slice(size) for size in y.shape)], y, atol=1e-5
            ),
            parameters[role],
            expected[role],
        )


def test_padding_stays_zero_in_training(runs):
    (_, parameters), _ = runs
    # 67 ids over 2 stages x 2 parts, 3 layers over 2 stages.
    assert parameters["policy"]["embedding"].shape[0] == 68
    assert not parameters["policy"]["embedding"][67:].any()
    jax.tree.map(
        lambda leaf: np.testing.assert_array_equal(leaf[3:], 0),
        parameters["policy"]["layers"],
    )


def test_every_update_reports_the_routers_of_its_role(runs):
    (found, _), (wanted, _) = runs
    names = {name for name in found[1].updates if name.startswith("router/")}
    measured = ("aux_loss", "z_loss", "dropped", "max_load", "idle")
    roles = ("policy", "critic")
    assert names == {f"router/{name}/{role}" for name in measured for role in roles}
    for name in names:
        numbers = found[1].updates[name]
        assert len(numbers) == 4  # One for each minibatch.
        np.testing.assert_allclose(numbers, wanted[1].updates[name], rtol=1e-4)
