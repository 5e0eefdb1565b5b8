"""Tests of `realjax/runtime/parameters.py`."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.dataflow.schedule import Place
from realjax.functions.train import TrainState
from realjax.models import quantized
from realjax.models.transformer import abstract_parameters
from realjax.parallel.allocation import Allocation
from realjax.parallel.sharding import padded_for
from realjax.realloc import is_on_host, live_bytes
from realjax.realloc.links import CorruptedCopyError, check_moved
from realjax.realloc.transfer import Traffic, reallocate
from realjax.runtime import parameters
from realjax.runtime.parameters import ParameterStore, VersionError
from realjax.testing import tiny_model


def place(text, dtype="float32", weights=""):
    return Place(Allocation.parse(text), dtype, weights)


POLICY, REFERENCE, ROLLOUT = place("f4@0-3"), place("t2@6-7"), place("d2@4-5")
MODEL = padded_for(tiny_model(), [p.allocation for p in (POLICY, REFERENCE, ROLLOUT)])
CRITIC = dataclasses.replace(MODEL, head="scalar")


def filled(model, value):
    return jax.tree.map(
        lambda leaf: np.full(leaf.shape, value, np.float32),
        abstract_parameters(model),
        is_leaf=lambda leaf: hasattr(leaf, "axes"),
    )


def store_of(resting=(), **options):
    """A policy of ones and a reference of zeros."""
    models = {"policy": MODEL, "reference": MODEL}
    homes = {"policy": POLICY, "reference": REFERENCE}
    store = ParameterStore(models, homes, resting, **options)
    for role, value in (("policy", 1.0), ("reference", 0.0)):
        store.set_initial(role, upload(store, role, homes[role], value))
    return store


def upload(store, role, where, value):
    values = filled(store.models[role], value)
    return jax.tree.map(jax.device_put, values, store.shardings(role, where))


def train(store, value):
    state = TrainState(
        upload(store, "policy", POLICY, value), {"count": jnp.zeros((), jnp.int32)}
    )
    store.set_train_state("policy", state)


def check_all(tree, value):
    for leaf in jax.tree.leaves(tree):
        np.testing.assert_allclose(leaf, np.full(leaf.shape, value), rtol=1e-6)


def test_a_copy_made_before_an_update_is_refused_after_it():
    store, traffic = store_of(), Traffic()
    store.begin_step()
    store.move("policy", ROLLOUT, traffic, version=0)
    check_all(store.get("policy", ROLLOUT, 0), 1)
    train(store, 2.0)
    # A call after the update must not sample from what was there before it.
    with pytest.raises(VersionError, match=r"changed 0 times .* after 1 changes"):
        store.get("policy", ROLLOUT, 1)
    check_all(store.get("policy", POLICY, 1), 2)
    store.move("policy", ROLLOUT, traffic, version=1)
    check_all(store.get("policy", ROLLOUT, 1), 2)


def small_bytes(tree):
    """Bytes of quantized matrices, without their scales."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.nbytes for leaf in leaves if leaf.dtype in (jnp.int8, jnp.uint8))


def test_a_copy_for_a_rollout_is_quantized_anew_after_each_update():
    store, traffic = store_of(), Traffic()
    rollout = place("d2@4-5", "bfloat16", "int8")
    store.begin_step()
    first = store.move("policy", rollout, traffic)
    kernel = first["layers"]["mlp"]["up"]["kernel"]
    assert (kernel.values.dtype, kernel.scale.dtype) == (jnp.int8, jnp.float32)
    assert {d.id for d in kernel.values.sharding.device_set} == {4, 5}
    np.testing.assert_array_equal(kernel.values, 127)  # All weights are 1.
    np.testing.assert_allclose(kernel.scale, 1 / 127, rtol=1e-6)
    assert first["embedding"].dtype == jnp.bfloat16
    assert store.get("policy", rollout, 0) is first
    # The masters are as they were, and give another copy when they change.
    check_all(store.at_home("policy"), 1)
    train(store, 2.0)
    store.release("policy", rollout)
    second = store.move("policy", rollout, traffic, version=1)
    scale = second["layers"]["mlp"]["up"]["kernel"].scale
    np.testing.assert_allclose(scale, 2 / 127, rtol=1e-6)


def test_no_whole_copy_of_a_quantized_matrix_is_left():
    store = store_of()
    gc.collect()
    before = live_bytes()
    copy = store.move("policy", place("d1@4", "bfloat16", "int8"), Traffic())
    gc.collect()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(copy))
    assert live_bytes() - before == held
    assert 0 < small_bytes(copy) < held


def test_a_frozen_role_is_quantized_once_and_waits_on_the_host_in_8_bits():
    home = place("t2@6-7", "float32", "float8_e4m3fn")
    store = ParameterStore(
        {"reference": MODEL}, {"reference": home}, [("reference", "parameters")]
    )
    given = upload(store, "reference", home, 0.5)
    store.set_initial("reference", given)
    host = store.offload("reference")
    assert is_on_host(host)
    assert small_bytes(host) > 0
    store.begin_step()
    back = store.get("reference", home, 0)["layers"]["attention"]["output"]["kernel"]
    assert back.values.dtype == jnp.uint8
    np.testing.assert_allclose(
        quantized.dequantized(back, (1, 2)), np.full(back.shape, 0.5), rtol=1e-6
    )
    # What it was given is another's, and as it was.
    check_all(given, 0.5)


def test_parameters_set_out_of_turn_are_refused():
    store = store_of()
    store.begin_step()
    train(store, 2.0)
    with pytest.raises(VersionError, match="policy at f4@0-3 float32 was changed 1"):
        store.move("policy", ROLLOUT, Traffic(), version=0)
    with pytest.raises(VersionError, match="changed 1 times"):
        store.get("policy", POLICY, 0)
    store.begin_step()  # The next step counts from here.
    store.get("policy", POLICY, 0)


def test_the_copy_on_the_host_is_made_once_for_each_version():
    store = store_of(resting=[("reference", "parameters")])
    host = store.offload("reference")
    assert is_on_host(host)
    check_all(store.reload("reference"), 0)
    assert store.offload("reference") is host
    # A change makes another.
    store.follow("reference", "policy", 0.25, Traffic())
    assert store.offload("reference") is not host
    check_all(store.reload("reference"), 0.25)


def test_a_reference_follows_the_policy_across_meshes():
    store, traffic = store_of(), Traffic()
    for step in range(3):
        store.begin_step()
        store.follow("reference", "policy", 0.1, traffic)
        check_all(store.get("reference", REFERENCE, 1), 1 - 0.9 ** (step + 1))
    check_all(store.at_home("policy"), 1)
    # Every element of the reference's shards came over from the policy's devices.
    shards = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(store.at_home("reference"))
        for shard in leaf.addressable_shards
    )
    assert traffic.sent_bytes == 3 * shards


def test_a_critic_follows_the_trunk_and_keeps_its_head():
    models = {"policy": MODEL, "critic": CRITIC}
    homes = {"policy": POLICY, "critic": REFERENCE}
    store = ParameterStore(models, homes)
    for role, value in (("policy", 1.0), ("critic", 0.0)):
        store.set_initial(role, upload(store, role, homes[role], value))
    found = store.follow("critic", "policy", 1.0, Traffic())
    check_all(found.pop("score"), 0)
    check_all(found, 1)


def test_a_checkpoint_of_what_rests_on_the_host_needs_no_device():
    store = store_of(resting=[("policy", "parameters"), ("policy", "optimizer")])
    train(store, 3.0)
    store.rest()
    saved = store.saved_state("policy")
    assert is_on_host(saved)
    other = store_of()
    other.restore("policy", saved)
    check_all(other.train_state("policy").parameters, 3)


def test_moves_are_verified_on_request(monkeypatch):
    def corrupted(*arguments, **options):
        assert options.pop("verify")
        moved = reallocate(*arguments, **options)
        damage = lambda x: x.at[(0,) * x.ndim].add(1)
        broken = moved | {"embedding": damage(moved["embedding"])}
        check_moved(arguments[0], broken)

    store = store_of(verifies=True)
    store.begin_step()
    check_all(store.move("policy", ROLLOUT, Traffic()), 1)
    monkeypatch.setattr(parameters, "reallocate", corrupted)
    with pytest.raises(CorruptedCopyError, match="embedding"):
        store.move("policy", ROLLOUT, Traffic())
