"""PPO whose policy and critic train adapters, six calls on six allocations."""

import jax
import numpy as np
import pytest

from realjax.models.lora import with_adapters
from realjax.models.parameters import split
from tests.e2e.tiny_ppo import MODEL, PLAN, hyperparameters, make_executor, run_step

pytestmark = pytest.mark.slow

ROLES = ("policy", "critic", "reference", "reward")
ADAPTED = with_adapters(MODEL, rank=4, alpha=16.0, targets=("all-linear",))
ONE_DEVICE = dict.fromkeys(PLAN, "d1@0")


def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def masters(executor, role):
    return jax.device_get(executor.store.train_state(role).parameters)


@pytest.fixture(scope="module")
def steps():
    """Two steps; what was moved in each, and the parameters before and after."""
    executor = make_executor(
        hyperparameters(minibatches=2), PLAN, model=ADAPTED, basing=ROLES
    )
    before = {role: masters(executor, role) for role in ("policy", "critic")}
    found = [run_step(executor, step) for step in (1, 2)]
    yield executor, before, found
    executor.close()


def moved(step):
    return sum(n for name, n in step.traffic.items() if name.startswith("bytes_"))


def test_after_the_first_step_only_adapters_move(steps):
    executor, before, (first, second) = steps
    sizes = {"trained": 0, "base": 0}
    for role, parameters in before.items():
        parts = split(parameters, executor.store.models[role])
        sizes["trained"] += num_bytes(parts[0])
        sizes["base"] += num_bytes(parts[1])
    assert moved(first) == sizes["trained"] + sizes["base"]
    assert moved(second) == sizes["trained"]
    assert sizes["trained"] < 0.5 * sizes["base"]


def test_the_sampler_and_the_trainer_have_the_same_adapters(steps):
    # In the second step they are no longer nothing; before an update of it the
    # trainer's log-probabilities are the sampler's.
    executor, before, (_, second) = steps
    state = executor.store.train_state("policy").parameters
    changed = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - b).max()), state, before["policy"]
    )
    trained, base = split(changed, ADAPTED)
    assert min(jax.tree.leaves(trained)) > 0
    assert max(jax.tree.leaves(base)) == 0
    assert second.numbers["rollout_gap/logprob"] < 1e-5


def test_programs_of_adapters_compile_once(steps):
    _, _, (_, second) = steps
    assert second.num_compiled == 0


def test_a_step_on_many_allocations_is_that_of_one_device(steps):
    _, _, (first, _) = steps
    executor = make_executor(hyperparameters(minibatches=2), ONE_DEVICE, model=ADAPTED)
    other = run_step(executor, 1)
    executor.close()
    np.testing.assert_array_equal(other.made["tokens"], first.made["tokens"])
    for name in ("loss/train_policy", "policy_loss", "value_loss", "kl"):
        if name in other.numbers:
            np.testing.assert_allclose(
                first.numbers[name], other.numbers[name], rtol=1e-3, atol=1e-5
            )
