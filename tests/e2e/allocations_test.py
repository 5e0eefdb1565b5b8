"""PPO with every call on its own allocation: the numbers, bytes and routes of it."""

import collections
import contextlib
import dataclasses
import gc
import re
from unittest import mock

import jax
import numpy as np
import pytest

from realjax.dataflow import buffer as buffer_lib
from realjax.models.transformer import abstract_parameters
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import bytes_per_device
from realjax.realloc import live_bytes
from realjax.rl import KLControl
from realjax.runtime.executor import Executor
from tests.e2e.tiny_ppo import (
    COMPARED_STEPS,
    MODEL,
    PLAN,
    PROMPT_WIDTHS,
    SEEDS,
    SIZE,
    STEPS,
    WIDTH,
    Observer,
    Step,
    hyperparameters,
    make_executor,
    masters,
    parameters_of,
    run_measured_step,
    run_step,
    shard_shapes,
    share_programs,
)


@dataclasses.dataclass
class Run:
    executor: Executor
    steps: dict[int, Step]
    evaluations: list[Step]
    observer: Observer
    parameters: dict  # Masters after the steps that are compared.
    added_bytes: dict[str, int]  # On devices after each call, since step 2 began.


@pytest.fixture(scope="module")
def many():
    """Six steps on the plan, the fifth with shorter prompts, and three evaluations."""
    executor = make_executor(hyperparameters(), PLAN)
    observer = Observer(executor)
    steps, evaluations, added_bytes, parameters = {}, [], {}, {}
    with mock.patch.object(buffer_lib, "move_array", observer.move_array):
        executor.compile_prompt_widths(PROMPT_WIDTHS, SIZE)
        evaluations.append(run_step(executor, 100, training=False))
        for step in range(1, STEPS + 1):
            if step == 2:
                steps[step], added_bytes = run_measured_step(executor, step)
            else:
                steps[step] = run_step(executor, step, width=4 if step == 5 else 8)
            if step == COMPARED_STEPS:
                parameters = masters(executor)
                evaluations.append(run_step(executor, 101, training=False))
        evaluations.append(run_step(executor, 102, training=False))
    yield Run(executor, steps, evaluations, observer, parameters, added_bytes)
    executor.close()


@pytest.fixture(scope="module")
def one():
    """The same first steps with all calls on one device."""
    executor = make_executor(hyperparameters(), dict.fromkeys(PLAN, "d1@0"))
    steps = {step: run_step(executor, step) for step in range(1, COMPARED_STEPS + 1)}
    yield executor, steps
    executor.close()


def check_equal_steps(found, wanted):
    """Losses and gradient norms of every update, and almost all sampled tokens."""
    for step in wanted:
        for name, numbers in wanted[step].updates.items():
            is_close = name.startswith(("loss/", "grad_norm/"))
            tolerances = {"rtol": 1e-4, "atol": 1e-6} if is_close else {"rtol": 1e-3}
            np.testing.assert_allclose(
                found[step].updates[name], numbers, **{"atol": 1e-4, **tolerances}
            )
        mask = wanted[step].made["completion_mask"]
        tokens = found[step].made["tokens"][mask], wanted[step].made["tokens"][mask]
        assert np.mean(tokens[0] == tokens[1]) >= (1 if step == 1 else 0.99)


def test_ppo_on_six_allocations_equals_ppo_on_one_device(many, one):
    executor, steps = one
    check_equal_steps(many.steps, steps)
    initial = parameters_of(MODEL, SEEDS["policy"])["embedding"]
    for role, wanted in masters(executor).items():
        found = many.parameters[role]
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, wanted
        )
    # Twelve updates at about 2e-3 each: they agree, and not by standing still.
    assert np.abs(many.parameters["policy"]["embedding"] - initial).max() > 5e-3


def test_the_plan_is_what_the_tests_here_speak_of():
    places = {name: Allocation.parse(text) for name, text in PLAN.items()}
    assert len({place.layout_key for place in places.values()}) >= 4
    assert any(place.tensor > 1 for place in places.values())
    assert any(place.fsdp > 1 for place in places.values())
    assert set(places["reward"].devices).isdisjoint(places["reference"].devices)


WEIGHTS = {
    "embedding": (64, 32),
    "head.kernel": (32, 64),
    "layers.attention.key.kernel": (2, 32, 4, 4),
    "layers.attention.output.kernel": (2, 8, 4, 32),
    "layers.attention.query.kernel": (2, 32, 8, 4),
    "layers.attention.value.kernel": (2, 32, 4, 4),
    "layers.mlp.down.kernel": (2, 64, 32),
    "layers.mlp.gate.kernel": (2, 32, 64),
    "layers.mlp.up.kernel": (2, 32, 64),
}
NORMS = {
    "final_norm.scale": (32,),
    "layers.attention_norm.scale": (2, 32),
    "layers.mlp_norm.scale": (2, 32),
}
# The dimension that is cut: by width (fsdp), or by vocabulary, heads and mlp (tensor).
FSDP_CUTS = dict(zip(WEIGHTS, (1, 0, 1, 3, 1, 1, 1, 1, 1), strict=True))
TENSOR_CUTS = dict(zip(WEIGHTS, (0, 1, 2, 1, 2, 2, 1, 2, 2), strict=True))


def cut(fsdp, tensor, head="language"):
    """The shape of every shard on so many parts."""
    shapes = dict(NORMS)
    for name, shape in WEIGHTS.items():
        sizes = list(shape)
        sizes[FSDP_CUTS[name]] //= fsdp
        sizes[TENSOR_CUTS[name]] //= tensor
        shapes[name] = tuple(sizes)
    if head == "scalar":  # One column that no strategy cuts.
        del shapes["head.kernel"]
        shapes["score.kernel"] = (32, 1)
    return shapes


def test_each_device_holds_the_share_of_parameters_and_moments_its_strategy_says(many):
    store = many.executor.store
    wanted = {"policy": cut(4, 1), "critic": cut(2, 2, "scalar")}
    for role, shapes in wanted.items():
        state = store.train_state(role)
        adam = state.optimizer[1]
        for tree in (state.parameters, adam.mu, adam.nu):
            assert shard_shapes(tree) == shapes
            assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {
                np.dtype(np.float32)
            }
    assert shard_shapes(store.at_home("reward")) == cut(1, 2, "scalar")
    assert shard_shapes(store.at_home("reference")) == cut(1, 1)
    # The copies of the calls that do not train; the policy's is cut along other axes.
    assert many.observer.copies == {
        ("policy", "t4"): cut(1, 4),
        ("critic", "f2t2"): cut(2, 2, "scalar"),
    }


def test_bytes_per_device_are_those_that_the_table_promises(many):
    for role in ("policy", "critic", "reward", "reference"):
        place = many.executor.store.homes[role]
        model = many.executor.store.models[role]
        promised = bytes_per_device(
            abstract_parameters(model), make_mesh(place.allocation)
        )
        held = collections.Counter()
        for leaf in jax.tree.leaves(many.executor.store.at_home(role)):
            for shard in leaf.addressable_shards:
                held[shard.device.id] += shard.data.nbytes
        assert held == dict.fromkeys(place.allocation.devices, promised)


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_gradients_are_cut_as_their_parameters(many, role):
    parameters = many.executor.store.train_state(role).parameters
    gradients, _ = many.observer.compiled(f"train_{role}").output_shardings
    for leaf, found in zip(*map(jax.tree.leaves, (parameters, gradients)), strict=True):
        assert found.shard_shape(leaf.shape) == leaf.addressable_shards[0].data.shape


def collectives(text):
    """The shapes that each kind of collective gives, by kind."""
    found = collections.defaultdict(set)
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        found[kind] |= {
            (dtype, *(int(size) for size in sizes.split(",") if size))
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        }
    return found


@pytest.mark.parametrize("name", ["train_policy", "train_critic", "value"])
def test_fsdp_programs_gather_one_layer_at_a_time_and_hold_no_whole_stack(many, name):
    place = Allocation.parse(PLAN[name])
    text = many.observer.compiled(name).as_text()
    found = collectives(text)
    for weight, shape in WEIGHTS.items():
        if not weight.startswith("layers."):
            continue
        _, *layer = shape
        layer[TENSOR_CUTS[weight] - 1] //= place.tensor
        assert ("f32", *layer) in found["all-gather"]
        stack = cut(1, place.tensor)[weight]
        assert f"f32[{','.join(map(str, stack))}]" not in text
    if name != "value":
        # Gradients are summed over the devices that saw other rows.
        assert found["all-reduce"] | found["reduce-scatter"] >= {("f32", 32)}


@pytest.mark.parametrize("name", ["rollout", "reward"])
def test_tensor_programs_reduce_activations_and_gather_no_weight(many, name):
    found = collectives(many.observer.compiled(name).as_text())
    rows = {"rollout": (SIZE, 1, 32), "reward": (2, WIDTH, 32)}[name]
    assert ("f32", *rows) in found["all-reduce"]
    # The logits of the rollout are gathered for the sampler, the head is not.
    logits = {("f32", SIZE, 64)} if name == "rollout" else set()
    assert found["all-gather"] == logits


def test_every_move_of_the_run_was_guarded_and_only_prompts_were_uploaded(many):
    # Six steps and three evaluations, after one rollout for each of two widths.
    guarded = many.observer
    assert guarded.moved_bytes.keys() == {"parameters", "batch"}
    shapes = collections.Counter(array.shape for array in guarded.uploads)
    assert shapes == {(SIZE, 8): 9, (SIZE, 4): 2}


def test_the_guard_catches_a_copy_through_the_host():
    mesh = make_mesh(Allocation.parse("t4@0-3"))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))
    turned = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(None, "tensor")
    )
    array = jax.device_put(np.ones((8, 8), np.float32), cut)
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="host-to-device"):
            jax.device_put(array, turned)


def test_a_key_is_sent_once_to_each_mesh_that_needs_it_from_elsewhere(many):
    # advantages stays where it was made; the rest of what each call reads is sent.
    readers = {
        "prompts": {"rollout"},
        "tokens": {"reward", "reference", "value", "train_policy", "train_critic"},
        "kept": {"reference", "train_policy"},
        "completion_mask": {"advantages", "train_policy", "train_critic"},
        "old_logprobs": {"advantages", "train_policy"},
        "is_truncated": {"advantages"},
        "scores": {"advantages"},
        "ref_logprobs": {"advantages"},
        "bootstrap_values": {"advantages"},
        "values": {"advantages", "train_critic"},
        "advantages": {"train_policy"},
        "value_targets": {"train_critic"},
    }
    wanted = {
        (key, Allocation.parse(PLAN[name]).layout_key): 1
        for key, names in readers.items()
        for name in names
    }
    for step in many.steps.values():
        assert step.sends == wanted
    assert many.executor.sends == wanted


def test_traffic_is_the_bytes_of_what_moved_by_route(many):
    policy, critic = (
        4 * dataclasses.replace(MODEL, head=head).num_parameters
        for head in ("language", "scalar")
    )
    whole = {"leaves_none": 0, "leaves_jit": 0, "bytes_none": 0, "bytes_jit": 0}
    for step in many.steps.values():
        # The policy is cut anew, the critic's shards go to four other devices as they
        # are: each is a quarter of every weight, and all of every norm and the score.
        norms_bytes = 4 * (5 * 32 + 32)
        put_bytes = 4 * ((critic - norms_bytes) // 4 + norms_bytes)
        traffic = step.traffic
        assert traffic | whole == traffic
        assert (traffic["leaves_put"], traffic["bytes_put"]) == (12, critic)
        assert (traffic["leaves_slice"], traffic["bytes_slice"]) == (12, policy)
        assert traffic["sent_bytes"] > put_bytes
        assert step.batch_traffic["uploaded_bytes"] in (SIZE * 8 * 4, SIZE * 4 * 4)
    runs = [*many.steps.values(), *many.evaluations]
    sent = sum(step.traffic["sent_bytes"] for step in runs)
    extra = many.observer.moved_bytes["parameters"] - sent
    # The policy moved once more before them, to compile the prompt widths.
    assert extra == many.steps[1].traffic["sent_bytes"] - put_bytes
    batch = sum(
        step.batch_traffic["sent_bytes"] + step.batch_traffic["collective_bytes"]
        for step in runs
    )
    assert batch == many.observer.moved_bytes["batch"]


def test_nothing_compiles_after_the_second_step(many):
    # Lengths, numbers of microbatches and, in step 5, the width of prompts differ.
    assert many.evaluations[0].num_compiled > 0
    assert [many.steps[step].num_compiled for step in range(3, STEPS + 1)] == [0] * 4
    assert [found.num_compiled for found in many.evaluations[1:]] == [0, 0]
    lengths = [
        found.numbers["completions/mean_length"] for found in many.steps.values()
    ]
    assert len(set(lengths)) == STEPS


def test_evaluation_changes_nothing(many, one):
    # The run on many devices evaluated before its first step, the other did not.
    tokens = [found[1].made["tokens"] for found in (many.steps, one[1])]
    np.testing.assert_array_equal(*tokens)
    state = many.executor.calls.transform_states["advantages"]
    run_step(many.executor, 103, training=False)
    after = many.executor.calls.transform_states["advantages"]
    jax.tree.map(np.testing.assert_array_equal, state, after)


@pytest.fixture(scope="module")
def offloaded(many):
    """Two steps with reward and reference in host memory between their calls."""
    roles = ("reward", "reference")
    executor = make_executor(hyperparameters(), PLAN, offload=roles)
    share_programs(executor, many.executor, PLAN)
    steps = {1: run_step(executor, 1)}
    steps[2], added_bytes = run_measured_step(executor, 2)
    yield executor, steps, added_bytes
    executor.close()


def test_offloading_gives_the_same_numbers(many, offloaded):
    _, steps, _ = offloaded
    for step, found in steps.items():
        assert found.numbers == many.steps[step].numbers
        np.testing.assert_array_equal(
            found.made["ref_logprobs"], many.steps[step].made["ref_logprobs"]
        )


def test_an_offloaded_role_is_there_from_one_call_ahead_of_its_own(many, offloaded):
    executor, _, added_bytes = offloaded
    reward = 2 * bytes_per_device(
        abstract_parameters(executor.store.models["reward"]),
        make_mesh(Allocation.parse(PLAN["reward"])),
    )
    reference = 2 * 4 * MODEL.num_parameters  # A whole copy on both devices.
    more = {
        "rollout": reward,
        "reward": reward + reference,
        "reference": reference,
    }
    # Both runs began the step at their own level, the offloaded one without the two.
    assert added_bytes == {
        name: size + more.get(name, 0) for name, size in many.added_bytes.items()
    }
    gc.collect()
    levels = [(live_bytes(), live_bytes("pinned_host"))]
    for role in ("reward", "reference"):
        executor.store.reload(role)
        levels.append((live_bytes(), live_bytes("pinned_host")))
    for role in ("reward", "reference"):
        executor.store.offload(role)
    gc.collect()
    assert levels[1][0] - levels[0][0] == reward
    assert levels[2][0] - levels[1][0] == reference
    assert live_bytes() == levels[0][0]
    assert levels[0][1] == reward + reference


def check_sampler_and_trainer_agree(step):
    """Before the first update every token's importance ratio is 1 to 1e-5."""
    mask = step.made["completion_mask"]
    # The reference has the policy's weights: on other devices, in packed rows, it must
    # find each token as probable as the sampler did, over the same set of tokens.
    found, wanted = step.made["ref_logprobs"], step.made["old_logprobs"]
    np.testing.assert_allclose(found[mask], wanted[mask], atol=1e-5)
    assert np.abs(wanted[mask]).max() > 1
    # approxkl is half the mean square: no token's ratio is further away than this.
    kl = step.updates["policy/approxkl_avg"]
    assert np.sqrt(2 * kl[0] * mask.sum()) < 1e-5
    np.testing.assert_allclose(step.updates["val/ratio"][0], 1, atol=1e-5)
    # The last two minibatches are scored by a policy that has moved: -inf would show.
    assert np.isfinite(kl).all()
    assert kl[3] > 1e-6


def test_ratio_is_one_before_the_first_update_with_top_k_and_top_p(many):
    check_sampler_and_trainer_agree(many.steps[1])
    assert many.steps[1].made["kept"].shape == (SIZE, WIDTH, 20)


def first_step_with(many, sampling):
    executor = make_executor(hyperparameters(sampling), PLAN)
    # The others see the sampler's sets, whose form depends on the sampler.
    share_programs(executor, many.executor, ["reward", "value", "train_critic"])
    with contextlib.closing(executor):
        return run_step(executor, 1)


def test_ratio_is_one_with_top_p_alone_and_a_least_length(many):
    sampling = {"temperature": 0.7, "top_p": 0.9, "min_new_tokens": 8}
    step = first_step_with(many, sampling)
    check_sampler_and_trainer_agree(step)
    assert step.made["kept"].shape == (SIZE, WIDTH, 2)  # 64 bits
    assert step.made["completion_mask"].sum(axis=1).min() >= 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        {"top_p": 0.8},
        {"min_new_tokens": 8},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_new_tokens": 8},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.6, "union": True},
        {"temperature": 0.7},
        {},
    ],
    ids=str,
)
def test_ratio_is_one_however_completions_are_drawn(many, sampling):
    step = first_step_with(many, sampling or {"temperature": 1.0})
    check_sampler_and_trainer_agree(step)
    if least := sampling.get("min_new_tokens"):
        assert step.made["completion_mask"].sum(axis=1).min() >= least


@pytest.mark.slow
@pytest.mark.parametrize(
    "allocations",
    [
        # Generation and training on the same devices, cut along other axes.
        {
            "rollout": "d2t2@0-3",
            "reward": "d8",
            "reference": "f2t2@4-7",
            "value": "f4@4-7",
            "train_policy": "f2t2@0-3",
            "train_critic": "d2f2@4-7",
        },
        # One device beside seven, and activations cut along the tokens.
        {
            "rollout": "d4t2@0-7",
            "reward": "d1@7",
            "reference": "t4@0-3+sequence",
            "value": "d2@1,6",
            "train_policy": "d2t4@0-7+sequence",
            "train_critic": "f2t4@0-7",
        },
    ],
    ids=["same_devices", "sequence"],
)
def test_two_completions_in_few_slots_over_shuffled_epochs_equal_one_device(
    allocations,
):
    hp = hyperparameters(
        completions_per_prompt=2,
        minibatches=2,
        epochs=2,
        shuffle=True,
        kl=KLControl(adaptive=True),
        value_norm="ma",
        value_loss="huber",
    )
    runs = []
    for places, rows in (
        (allocations, {"rollout": 8}),
        (dict.fromkeys(PLAN, "d1@0"), {}),
    ):
        executor = make_executor(hp, places, rows=rows)
        with contextlib.closing(executor):
            runs.append({step: run_step(executor, step) for step in (1, 2, 3)})
    check_equal_steps(*runs)
