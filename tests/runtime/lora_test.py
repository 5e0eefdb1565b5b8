"""Runs that train adapters: what moves, what is kept, saved, exported and taken up."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import realjax
from realjax.algorithms import ppo
from realjax.dataflow.schedule import Place
from realjax.functions.role import LoraConfig, RoleConfig
from realjax.functions.train import TrainState
from realjax.models import hf, lora_files
from realjax.models.lora import with_adapters
from realjax.models.parameters import join, split
from realjax.parallel.allocation import Allocation
from realjax.parallel.sharding import padded_for
from realjax.realloc import is_on_host
from realjax.realloc.transfer import Traffic
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.parameters import ParameterStore
from realjax.runtime.run import prepare
from realjax.runtime.weights import check_lora
from realjax.testing import tiny_model, tiny_parameters
from tests.functions.plain import parameters_on, sharp_parameters
from tests.runtime.small_runs import (
    MODEL,
    check_same_arrays,
    check_same_metrics,
    data_config,
    saved_arrays,
    sft_config,
    train,
    write_data,
)

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1)
ALLOCATION = "d2f2t2@0-7"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Records, and a checkpoint to stand beside."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = write_data(folder)
    sizes = MODEL | {"num_heads": 4, "vocab_size": tokenizer.vocab_size}
    config = tiny_model(**sizes, bos_id=0)
    hf.save(folder / "base", config, tiny_parameters(config), tokenizer=tokenizer)
    return folder


def lora_config(data, lora=LORA, *, role=None, **changes):
    """Supervised fine-tuning of adapters beside a checkpoint."""
    made = sft_config(data)
    policy = dataclasses.replace(
        made.roles["policy"], path=str(data / "base"), model={}, lora=lora, tokenizer=""
    )
    policy = dataclasses.replace(policy, **(role or {}))
    return dataclasses.replace(
        made, **({"roles": {"policy": policy}, "allocation": ALLOCATION} | changes)
    )


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing interrupts, and that exports adapters."""
    lora = dataclasses.replace(LORA, export="adapter")
    checkpoint = CheckpointConfig(keep=20, every_steps=1)
    config = lora_config(data, lora, epochs=2, checkpoint=checkpoint)
    result, _ = train(config, tmp_path_factory.mktemp("whole"))
    return config, result


# -- what moves ------------------------------------------------------------------------

HOME, ROLLOUT, SAME = "f4@0-3", "t2@4-5", "f4@0-3"


def store_of(base_dtype="", *, basing=("policy",), resting=()):
    """A policy with adapters, trained on four devices."""
    config = with_adapters(
        padded_for(tiny_model(), [Allocation.parse(p) for p in (HOME, ROLLOUT)]),
        rank=4,
        alpha=8.0,
        targets=("q_proj", "down_proj"),
        base_dtype=base_dtype,
    )
    home = Place(Allocation.parse(HOME), "float32")
    store = ParameterStore({"policy": config}, {"policy": home}, resting, basing=basing)
    store.set_initial("policy", parameters_on(HOME, config, sharp_parameters(config)))
    return store, config


def moved_bytes(store, place):
    """Bytes of whole arrays that a move sent, by all routes; and the copy."""
    traffic = Traffic()
    copy = store.move("policy", place, traffic)
    return sum(traffic.bytes.values()), copy


def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("weights", ["", "int8"])
def test_only_adapters_move_where_the_base_is_in_place(weights):
    store, config = store_of()
    place = Place(Allocation.parse(ROLLOUT), "bfloat16", weights)
    trained, base = split(store.at_home("policy"), config)
    first, copy = moved_bytes(store, place)
    # The base goes in its own type, if it has one, else in that of the place.
    assert first == (num_bytes(trained) + num_bytes(base)) // 2
    base_there = split(copy, config)[1]
    store.release("policy", place)
    state = TrainState(jax.tree.map(lambda x: x + 1, trained), {"count": jnp.zeros(())})
    whole = join(state.parameters, base)
    store.set_train_state("policy", state._replace(parameters=whole))
    second, copy = moved_bytes(store, place)
    assert second == num_bytes(trained) // 2
    found, base_now = split(copy, config)
    jax.tree.map(lambda a, b: np.testing.assert_(a is b), base_now, base_there)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, (b + 1).astype(jnp.bfloat16)),
        found,
        trained,
    )


def test_a_call_where_the_role_lives_shares_its_base():
    store, config = store_of(base_dtype="bfloat16")
    place = Place(Allocation.parse(SAME), "bfloat16")
    home = split(store.at_home("policy"), config)
    assert {str(x.dtype) for x in jax.tree.leaves(home[0])} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(home[1])} == {"bfloat16"}
    moved, copy = moved_bytes(store, place)
    assert moved == num_bytes(home[0]) // 2
    found = split(copy, config)
    jax.tree.map(lambda a, b: np.testing.assert_(a is b), found[1], home[1])
    jax.tree.map(lambda a, b: np.testing.assert_(a is not b), found[0], home[0])


def test_bases_at_other_places_than_given_ones_are_dropped():
    store, config = store_of()
    place = Place(Allocation.parse(ROLLOUT), "float32")
    trained, base = map(num_bytes, split(store.at_home("policy"), config))
    sent = []
    for places in ([("policy", place)], [], []):
        sent.append(moved_bytes(store, place)[0])
        store.release("policy", place)
        store.keep_bases(places)
    assert sent == [trained + base, trained, trained + base]


def test_a_role_that_is_offloaded_keeps_no_base_elsewhere():
    store, config = store_of(basing=(), resting=[("policy", "parameters")])
    place, traffic = Place(Allocation.parse(ROLLOUT), "float32"), Traffic()
    assert is_on_host(store.saved_state("policy")["parameters"])
    for count in (1, 2):
        store.move("policy", place, traffic)
        store.release("policy", place)
        store.offload("policy")
        everything = num_bytes(sharp_parameters(config))
        assert sum(traffic.bytes.values()) == count * everything
    copy = store.move("policy", place, traffic)
    jax.tree.map(np.testing.assert_array_equal, copy, sharp_parameters(config))


# -- runs ------------------------------------------------------------------------------


def test_adapters_learn_and_their_base_stays(data, whole):
    _, result = whole
    losses = result.metrics["loss"]
    assert losses[-1] < losses[0]
    model = result.roles["policy"]
    trained, base = split(model.parameters, model.config)
    before = hf.load(
        data / "base", config=dataclasses.replace(model.config, adapters=None)
    )
    jax.tree.map(np.testing.assert_array_equal, base, before)
    second = trained["layers"]["mlp"]["up"]["lora_b"]
    assert np.abs(second).max() > 0


def test_a_checkpoint_holds_adapters_and_their_moments_alone(whole):
    _, result = whole
    arrays = saved_arrays(result.workdir, len(result.metrics["step"]))
    names = {name for name in arrays if name.startswith("policy/")}
    parameters = {name for name in names if name.startswith("policy/parameters/")}
    assert parameters and all(
        name.endswith(("lora_a", "lora_b")) for name in parameters
    )
    others = [name for name in names - parameters if "/layers/" in name]
    assert len(others) == 2 * len(parameters)


def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(whole, tmp_path):
    config, result = whole
    last = len(result.metrics["step"])
    workdir = shutil.copytree(result.workdir, tmp_path / "run")
    for step in range(3, last + 1):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    _, text = train(config, workdir)
    assert "resumed from the checkpoint of step 2" in text
    check_same_metrics(workdir, result.workdir)
    check_same_arrays(saved_arrays(workdir, last), saved_arrays(result.workdir, last))


def test_exported_adapters_and_their_sum_compute_what_the_run_does(
    data, whole, tmp_path
):
    _, result = whole
    folder, model = result.workdir / "export" / "policy", result.roles["policy"]
    assert {path.name for path in folder.iterdir()} == {
        lora_files.ADAPTER_CONFIG,
        lora_files.ADAPTER_FILE,
    }
    tokens = np.random.default_rng(0).integers(0, 300, (2, 16)).astype(np.int32)
    wanted = model.logits(tokens)
    beside = realjax.load(data / "base", "f2t2", adapters=folder)
    np.testing.assert_allclose(beside.logits(tokens), wanted, atol=1e-5)
    beside.save(tmp_path / "merged")
    merged = realjax.load(tmp_path / "merged", "d1")
    np.testing.assert_allclose(merged.logits(tokens), wanted, atol=1e-5)
    beside.save_adapters(tmp_path / "again", base="a/model")
    files = [f / lora_files.ADAPTER_FILE for f in (folder, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_takes_up_adapters_where_another_left_them(data, whole):
    _, result = whole
    folder = str(result.workdir / "export" / "policy")
    run = prepare(lora_config(data, LoraConfig(path=folder)))
    adapters = run.roles["policy"].model.adapters
    assert (adapters.rank, adapters.alpha, adapters.dropout) == (4, 8.0, 0.0)
    assert len(adapters.targets) == 7
    with pytest.raises(ValueError, match=r"lora\.rank is 8, and .* have rank 4"):
        prepare(lora_config(data, LoraConfig(path=folder, rank=8)))


@pytest.mark.slow
def test_a_frozen_role_computes_with_the_adapters_of_a_folder(data, whole, tmp_path):
    # The policy begins as its reference, so that DPO's first loss is log 2.
    _, result = whole
    folder = str(result.workdir / "export" / "policy")
    config = lora_config(data, LoraConfig(path=folder))
    config = dataclasses.replace(
        config,
        algorithm="dpo",
        roles=config.roles | {"reference": config.roles["policy"]},
        data=data_config(data, "pairs", batch_size=4),
        allocation="f2@0-1",
        allocations={"reference": "t2@2-3"},
        steps=2,
    )
    found, _ = train(config, tmp_path)
    losses = found.metrics["loss"]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[1] != losses[0]
    reference = found.roles["reference"]
    trained, _ = split(reference.parameters, reference.config)
    wanted = split(result.roles["policy"].parameters, reference.config)[0]
    jax.tree.map(np.testing.assert_array_equal, trained, wanted)


@pytest.mark.slow
def test_a_merged_export_is_a_plain_folder(data, tmp_path):
    checkpoint = CheckpointConfig(keep=1)
    config = lora_config(data, steps=1, allocation="d1@0", checkpoint=checkpoint)
    result, _ = train(config, tmp_path)
    folder = tmp_path / "export" / "policy"
    assert hf.read_config(folder).adapters is None
    tokens = np.arange(12, dtype=np.int32)[None]
    np.testing.assert_allclose(
        realjax.load(folder, "d1").logits(tokens),
        result.roles["policy"].logits(tokens),
        atol=1e-5,
    )


@pytest.mark.slow
def test_an_optimizer_in_host_memory_streams_adapters(data, whole, tmp_path):
    config, result = whole
    role = config.roles["policy"]
    optimizer = dataclasses.replace(role.optimizer, offload=True)
    streamed = lora_config(data, role={"optimizer": optimizer}, epochs=2)
    other, _ = train(streamed, tmp_path)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(other.metrics[name], result.metrics[name], rtol=1e-5)


# -- what is refused -------------------------------------------------------------------


def test_new_adapters_that_nothing_trains_are_refused(data):
    made = sft_config(data)
    roles = {
        "policy": made.roles["policy"],
        "reference": dataclasses.replace(made.roles["policy"], lora=LORA),
    }
    config = dataclasses.replace(made, algorithm="dpo", roles=roles)
    with pytest.raises(ValueError, match=r"'reference' has lora\.rank=4, and no call"):
        prepare(config)


@pytest.mark.parametrize("name", ["policy", "reference"])
def test_adapters_of_roles_that_follow_or_are_followed_are_refused(name):
    graph = ppo.graph(ppo.PPO(reference_ema=0.01))
    lora = dataclasses.replace(LORA, path="adapters")
    with pytest.raises(ValueError, match=r"'reference' follows 'policy'"):
        check_lora(name, RoleConfig(lora=lora), graph)
    check_lora("critic", RoleConfig(lora=LORA), graph)


def test_misspelt_choices_are_refused():
    with pytest.raises(ValueError, match="export='merge'"):
        LoraConfig(export="merge")
    with pytest.raises(ValueError, match="rank is -1"):
        RoleConfig(lora=LoraConfig(rank=-1))


@pytest.mark.slow
def test_masters_of_adapters_are_float32_and_their_base_is_not(data, tmp_path):
    role = {"dtype": "bfloat16"}
    config = lora_config(data, role=role, steps=2, allocation="f2@0-1")
    result, _ = train(config, tmp_path)
    model = result.roles["policy"]
    trained, base = split(model.parameters, model.config)
    assert {str(x.dtype) for x in jax.tree.leaves(trained)} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(base)} == {"bfloat16"}
    arrays = saved_arrays(tmp_path, 2)
    assert {str(x.dtype) for x in arrays.values()} <= {"float32", "int32"}
