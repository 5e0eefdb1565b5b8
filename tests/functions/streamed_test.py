"""Streamed updates: the resident arithmetic, with moments that wait on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from realjax.algorithms import sft
from realjax.functions import streamed
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.train import TrainProgram
from realjax.parallel import Allocation, padded_for
from realjax.realloc.offload import moved_in_program
from realjax.rl.masking import Mean
from realjax.testing import tiny_batch, tiny_model
from tests.functions.plain import (
    batch_on,
    mesh_of,
    model_on,
    pack_groups,
    parameters_on,
    sharp_parameters,
)
from tests.tiny_families import FAMILIES

SPEC = sft.graph(sft.SFT()).calls["train_policy"].function
CONFIG = {"learning_rate": 1e-2, "warmup_fraction": 0.2, "clip_norm": 0.1}
HOST = "pinned_host"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A layer at a time; of the others some rows at a time, and rows left over."""
    monkeypatch.setattr(streamed, "CHUNK_BYTES", 600)


def program_of(place, config=None, **changes):
    config = padded_for(config or tiny_model(), [Allocation.parse(place)])
    optimizer = OptimizerConfig(**(CONFIG | changes))
    model, mesh = model_on(place, config), mesh_of(place)
    return TrainProgram(SPEC, model, mesh, optimizer, 10, moved_in_program)


def fresh(program, place):
    config = program.program.config
    return program.init_optimizer(
        parameters_on(place, config, sharp_parameters(config))
    )


def sums_of(program, seed, factor=1.7):
    """Sums of gradients of random numbers, of a minibatch of 7 tokens."""
    drawn = jax.tree.map(
        lambda leaf: np.float32(factor) * np.asarray(leaf),
        sharp_parameters(program.program.config, seed=seed),
    )
    means = {"loss": Mean(np.float32(3.0), np.float32(7.0))}
    return jax.device_put((drawn, means), (program._cut, program._whole))


def updated(program, place, options=None):
    """State after three updates, the second of a gradient that is not finite."""
    state, apply = fresh(program, place), None
    for seed, factor in ((1, 1.7), (2, np.nan), (3, 0.3)):
        sums = sums_of(program, seed, factor)
        if apply is None:
            lowered = program._apply.lower(state, sums)
            apply = lowered.compile(compiler_options=options)
        state, _ = apply(state, sums)
    return state


def bits(state):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


# XLA writes a / c / d, with c and d one number for a whole array, as a / (c d) or as
# a (1 / c) / d, whichever the code around suggests. That is all that may differ.
AS_WRITTEN = {"xla_disable_hlo_passes": "algsimp"}


def assert_same_bits(place, config=None, **changes):
    resident = updated(program_of(place, config, **changes), place, AS_WRITTEN)
    found = updated(
        program_of(place, config, offload=True, **changes), place, AS_WRITTEN
    )
    expected = bits(resident)
    different = [name for name, value in bits(found).items() if value != expected[name]]
    assert not different
    # It did move.
    program = program_of(place, config, **changes)
    assert bits(fresh(program, place)) != expected
    for old, new in zip(jax.tree.leaves(resident), jax.tree.leaves(found), strict=True):
        assert new.sharding.spec == old.sharding.spec
    assert kinds(found.parameters) == {"device"}
    assert kinds(found.optimizer[1].mu) == kinds(found.optimizer[1].nu) == {HOST}
    assert kinds(found.optimizer[1].count) == {"device"}


@pytest.mark.parametrize("place", ["d1", "f2t2"])
def test_streamed_updates_are_the_resident_ones_bit_for_bit(place):
    assert_same_bits(place)


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["d8", "f4", "f8+zero1", "d2f2t2+zero1", "t4", "s2", "s2t2", "d2s2t2"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_layout_has_the_bits_of_the_resident_update(family, place):
    # 3 layers and 61 ids: padded for stages, tensor and fsdp.
    assert_same_bits(place, FAMILIES[family])


@pytest.mark.slow
@pytest.mark.parametrize("place", ["d1", "e4", "e2t2", "f2t2"])
def test_experts_have_the_bits_of_the_resident_update(place):
    assert_same_bits(place, FAMILIES["mixtral"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"clip_norm": 0.0},
        {"clip_norm": 1e6},
        {"schedule": "constant", "warmup_fraction": 0.0},
        {"schedule": "linear", "weight_decay": 0.0},
    ],
)
def test_every_optimizer_has_the_bits_of_the_resident_update(changes):
    assert_same_bits("f2t2", **changes)


@pytest.mark.slow
def test_simplified_by_xla_the_two_differ_by_rounding():
    # 2^-23 of the largest number in each leaf, in each of two updates, and some.
    resident = updated(program_of("f2t2"), "f2t2")
    found = updated(program_of("f2t2", offload=True), "f2t2")
    for old, new in zip(jax.tree.leaves(resident), jax.tree.leaves(found), strict=True):
        atol = 4 * 2.0**-23 * np.abs(np.asarray(old)).max()
        np.testing.assert_allclose(new, old, atol=atol, rtol=0)


def test_the_state_is_updated_in_its_place():
    program = program_of("f2t2", offload=True)
    state, sums = fresh(program, "f2t2"), sums_of(program, 1)

    def addresses(state):
        return [
            shard.data.unsafe_buffer_pointer()
            for leaf in jax.tree.leaves(state.optimizer[1][1:])
            for shard in leaf.addressable_shards
        ]

    before = addresses(jax.block_until_ready(state))
    new, _ = program._apply(state, sums)
    assert addresses(jax.block_until_ready(new)) == before
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_temporaries_are_those_of_few_layers():
    program = program_of("d1", tiny_model(num_layers=16), offload=True)
    state = fresh(program, "d1")
    layer_bytes = sum(
        leaf[0].nbytes for leaf in jax.tree.leaves(state.parameters["layers"])
    )
    memory = program._apply.lower(state, sums_of(program, 1)).compile()
    # Of 16 layers with two moments each: two, read and written, and what CPUs need for
    # the norm of all gradients.
    assert memory.memory_analysis().temp_size_in_bytes < 6 * layer_bytes


def test_moments_start_on_the_host_and_counters_on_the_devices():
    program = program_of("f2t2", offload=True)
    state = fresh(program, "f2t2")
    resident = program_of("f2t2").shardings
    assert kinds(state.optimizer[1].mu) == kinds(state.optimizer[1].nu) == {HOST}
    assert kinds((state.parameters, state.optimizer[1].count)) == {"device"}
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(resident), strict=True
    ):
        assert leaf.sharding.spec == sharding.spec
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(state.optimizer))


def test_a_program_trains_with_moments_on_the_host():
    batch = tiny_batch(8, 24)
    arrays = {key: np.asarray(batch[key]) for key in SPEC.reads}
    packings = pack_groups(batch.lengths, [range(4), range(4, 8)])

    @functools.cache
    def losses(offload):
        program = program_of("d1", offload=offload)
        state, reports = program(
            fresh(program, "d1"), batch_on("d1", arrays), [packings, packings]
        )
        assert kinds(state.optimizer[1].mu) == ({HOST} if offload else {"device"})
        return [float(report["loss"].value()) for report in reports]

    assert losses(True)[1] < losses(True)[0]
    assert losses(True) == pytest.approx(losses(False), rel=1e-6)


def test_a_checkpoint_restores_moments_to_the_host(tmp_path):
    program = program_of("f2t2", offload=True)
    state, _ = program._apply(fresh(program, "f2t2"), sums_of(program, 1))
    expected = bits(state)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        state,
        program.shardings,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert bits(restored) == expected
    assert kinds(restored.optimizer[1].mu) == kinds(restored.optimizer[1].nu) == {HOST}
    assert kinds(restored.parameters) == {"device"}
    # And goes on from there.
    new, _ = program._apply(restored, sums_of(program, 2))
    again, _ = program._apply(state, sums_of(program, 2))
    assert bits(new) == bits(again)


def test_offloading_without_what_moves_is_refused():
    model, config = model_on("d1"), OptimizerConfig(offload=True)
    with pytest.raises(ValueError, match="nothing was given that moves them"):
        TrainProgram(SPEC, model, mesh_of("d1"), config, 10)


def test_shardings_say_where_moments_wait():
    mesh = mesh_of("f2t2")
    sharding = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))
    found = streamed.on_host({"a": sharding})["a"]
    assert found.memory_kind == HOST
    assert (found.mesh, found.spec) == (mesh, sharding.spec)
    x = jax.device_put(jnp.ones((8, 3)), found)
    assert x.sharding.memory_kind == HOST
