import errno
import logging
import os
import resource
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from realjax.runtime import manifest
from realjax.runtime.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    DamagedCheckpointError,
    FailedSaveError,
    MismatchedCheckpointError,
    NoCheckpointError,
)


def make_mesh(data, tensor, first=0):
    devices = jax.devices()[first : first + data * tensor]
    return jax.make_mesh(
        (data, tensor),
        ("data", "tensor"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


class State(NamedTuple):
    count: jax.Array
    moments: dict


def make_trees(scale=1.0, mesh=None):
    """Parameters on a mesh, a real optimizer's state, a named tuple and host arrays."""
    mesh = mesh or make_mesh(2, 2)
    sharding = NamedSharding(mesh, P("data", "tensor"))
    kernel = jax.device_put(scale * jnp.arange(64.0).reshape(8, 8), sharding)
    parameters = {"layers": {"kernel": kernel}, "scale": jnp.full(3, scale)}
    return {
        "policy": parameters,
        "optimizer": optax.adamw(1e-3).init(parameters),
        "normalizer": State(jnp.int32(scale), {"mean": jnp.float32(scale)}),
        "buffer": {"ids": np.arange(5, dtype=np.int64), "half": jnp.bfloat16(scale)},
    }


def abstract_of(trees):
    def abstract(leaf):
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract, trees)


def assert_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpointer(folder, keep=3) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_trees(float(step)), {"position": 10 * step})
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """A folder with complete checkpoints of steps 1 (scale 1) and 2 (scale 2)."""
    return shutil.copytree(saved_once, tmp_path / "checkpoints")


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        changed = bytes([data[middle] ^ 0xFF])
        path.write_bytes(data[:middle] + changed + data[middle + 1 :])


def largest_file(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


# What is saved is restored.


def test_restore_gives_back_every_tree_and_the_metadata(saved):
    with Checkpointer(saved) as checkpointer:
        assert checkpointer.latest_step() == 2
        assert checkpointer.read_metadata(2) == {"position": 20}
        trees = make_trees(2.0)
        assert_equal(checkpointer.restore(2, abstract_of(trees)), trees)
        assert_equal(checkpointer.restore(1, abstract_of(trees)), make_trees(1.0))


def test_metadata_lies_inside_the_folder_that_is_renamed(saved):
    assert (saved / "2" / "metadata" / "metadata").exists()
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    "mesh, spec, kind",
    [
        ((1, 4, 4), P(None, "tensor"), "device"),  # Four other devices.
        ((4, 2, 0), P("tensor", "data"), "device"),  # More devices, other cuts.
        ((1, 1, 7), P(), "device"),  # One device.
        ((2, 2, 0), P("data", "tensor"), "pinned_host"),
    ],
)
def test_restore_onto_another_sharding_is_exact(saved, mesh, spec, kind):
    sharding = NamedSharding(make_mesh(*mesh), spec, memory_kind=kind)
    trees = make_trees(2.0)
    abstract = {"policy": abstract_of(trees["policy"])}
    kernel = abstract["policy"]["layers"]["kernel"]
    abstract["policy"]["layers"]["kernel"] = jax.ShapeDtypeStruct(
        kernel.shape, kernel.dtype, sharding=sharding
    )
    with Checkpointer(saved) as checkpointer:
        restored = checkpointer.restore(2, abstract)
    assert_equal(restored, {"policy": trees["policy"]})
    assert restored["policy"]["layers"]["kernel"].sharding == sharding


def test_without_a_sharding_a_leaf_becomes_numpy(saved):
    abstract = {
        "policy": {
            "layers": {"kernel": np.zeros((8, 8), np.float32)},
            "scale": jax.ShapeDtypeStruct((3,), np.float32),
        }
    }
    with Checkpointer(saved) as checkpointer:
        restored = checkpointer.restore(2, abstract)
        shapes = checkpointer.read_shapes(2)
    assert type(restored["policy"]["scale"]) is np.ndarray
    np.testing.assert_array_equal(
        restored["policy"]["layers"]["kernel"], 2.0 * np.arange(64.0).reshape(8, 8)
    )
    assert shapes["buffer/half"] == jax.ShapeDtypeStruct((), jnp.bfloat16)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    mesh = make_mesh(2, 2)
    sharding = NamedSharding(mesh, P("data", "tensor"))
    make = jax.jit(
        lambda: jnp.arange(2.0**20).reshape(1024, 1024), out_shardings=sharding
    )
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        for step in range(1, 4):
            kernel = make()
            checkpointer.save(step, {"policy": kernel}, {})
            assert overwrite(kernel)[0, 0] == -1.0
            checkpointer.wait()
            shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
            restored = checkpointer.restore(step, {"policy": shape})
            np.testing.assert_array_equal(
                restored["policy"], np.arange(2.0**20).reshape(1024, 1024)
            )


def test_numbers_and_arrays_without_elements_are_kept(tmp_path):
    trees = {"a": {"count": 3, "rate": 0.5, "empty": np.zeros((0, 4), np.int32)}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, trees, {})
        checkpointer.wait()
        restored = checkpointer.restore(1, trees)
    assert restored["a"]["count"] == 3 and restored["a"]["rate"] == 0.5
    assert restored["a"]["empty"].shape == (0, 4)


def test_arrays_without_elements_come_back_on_their_sharding(tmp_path):
    sharding = NamedSharding(make_mesh(2, 2), P(None, "tensor"))
    empty = jax.ShapeDtypeStruct((0, 4), jnp.float32, sharding=sharding)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": jnp.zeros((0, 4))}, {})
        checkpointer.wait()
        restored = checkpointer.restore(1, {"a": empty})["a"]
    assert restored.shape == (0, 4) and restored.sharding == sharding


def test_trees_without_arrays_are_kept(tmp_path):
    trees = {"optimizer": optax.sgd(0.1).init({"w": jnp.zeros(2)}), "none": {}}
    with Checkpointer(tmp_path) as checkpointer:
        for step, saved in enumerate([trees | {"policy": jnp.ones(2)}, trees]):
            checkpointer.save(step, saved, {})
            checkpointer.wait()
            assert checkpointer.restore(step, trees) == trees


def test_only_the_last_checkpoints_stay(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (3, 7, 20, 100):
            assert checkpointer.save(step, {"a": jnp.ones(2)}, {})
        checkpointer.wait()
        assert checkpointer.steps() == [20, 100]


def test_a_step_is_saved_once(saved):
    with Checkpointer(saved) as checkpointer:
        assert not checkpointer.save(2, make_trees(9.0), {})
        assert checkpointer.read_metadata(2) == {"position": 20}


def test_a_run_can_go_on_from_an_earlier_step(saved):
    with Checkpointer(saved) as checkpointer:
        checkpointer.discard_after(1)
        assert checkpointer.latest_step() == 1
        assert checkpointer.save(2, make_trees(9.0), {"position": 90})
        checkpointer.wait()
        assert checkpointer.read_metadata(2) == {"position": 90}


def test_a_reader_sees_what_a_writer_saves_meanwhile(saved):
    with Checkpointer(saved) as writer, Checkpointer(saved, read_only=True) as reader:
        leftover = saved / "4.orbax-checkpoint-tmp"
        leftover.mkdir()  # Being written, for all a reader knows.
        writer.save(3, make_trees(3.0), {"position": 30})
        writer.wait()
        assert reader.latest_step() == 3
        restored = reader.restore_latest(
            {"buffer": abstract_of(make_trees()["buffer"])}
        )
        assert (restored.step, restored.metadata) == (3, {"position": 30})
        Checkpointer(saved, read_only=True).close()
        assert leftover.exists()


def test_a_reader_of_a_folder_that_is_not_there_makes_none(tmp_path):
    with Checkpointer(tmp_path / "none", read_only=True) as reader:
        assert reader.latest_step() is None
    assert not (tmp_path / "none").exists()


# What cannot be restored says why.


def test_no_checkpoint_names_the_folder(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(NoCheckpointError, match=r"no complete checkpoint in /.*"):
            checkpointer.restore_latest({})
        with pytest.raises(NoCheckpointError, match=r"step 5 in .*steps there: none"):
            checkpointer.restore(5, {})


def test_another_models_shape_names_the_array_and_both_shapes(saved):
    abstract = abstract_of(make_trees())
    abstract["policy"]["layers"]["kernel"] = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    with (
        Checkpointer(saved) as checkpointer,
        pytest.raises(
            MismatchedCheckpointError,
            match=r"policy/layers/kernel is float32\[8, 4\] here and float32\[8, 8\]",
        ),
    ):
        checkpointer.restore_latest(abstract)


def test_another_dtype_is_refused_rather_than_rounded(saved):
    abstract = {"policy": abstract_of(make_trees()["policy"])}
    abstract["policy"]["scale"] = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    with (
        Checkpointer(saved) as checkpointer,
        pytest.raises(MismatchedCheckpointError, match=r"bfloat16\[3\] here and float"),
    ):
        checkpointer.restore(2, abstract)


def test_arrays_only_here_and_only_there_are_named(saved):
    abstract = {"policy": {"layers": {"bias": jax.ShapeDtypeStruct((8,), jnp.float32)}}}
    with (
        Checkpointer(saved) as checkpointer,
        pytest.raises(MismatchedCheckpointError) as caught,
    ):
        checkpointer.restore(2, abstract)
    text = str(caught.value)
    assert "policy/layers/bias is not there" in text
    assert "policy/layers/kernel is only there" in text


@pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_read(saved, how, caplog):
    path = largest_file(saved / "2")
    damage(path, how)
    trees = make_trees(1.0)
    with Checkpointer(saved, keep=3) as checkpointer:
        with pytest.raises(DamagedCheckpointError, match=str(path)):
            checkpointer.restore(2, abstract_of(trees))
        with caplog.at_level(logging.WARNING):
            restored = checkpointer.restore_latest(abstract_of(trees))
        assert restored.step == 1 and restored.metadata == {"position": 10}
        assert_equal(restored.arrays, trees)
        assert str(path) in caplog.text and "damaged-2" in caplog.text
        # The run goes on and comes to step 2 again.
        assert checkpointer.save(2, make_trees(2.0), {"position": 20})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2]
        assert checkpointer.restore_latest(abstract_of(trees)).step == 2


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_latest_step_passes_over_a_damaged_checkpoint(saved, how, caplog):
    damage(largest_file(saved / "2"), how)
    with Checkpointer(saved) as checkpointer:
        assert checkpointer.latest_step() == 1
    assert "passed over" in caplog.text


@pytest.mark.parametrize("name", ["metadata/metadata", manifest.FILE])
def test_damaged_metadata_is_noticed(saved, name):
    damage(saved / "2" / name, "truncated")
    with (
        Checkpointer(saved) as checkpointer,
        pytest.raises(DamagedCheckpointError, match=name),
    ):
        checkpointer.read_metadata(2)


def test_when_every_checkpoint_is_damaged_each_is_named(saved):
    for step in ("1", "2"):
        damage(largest_file(saved / step), "truncated")
    with (
        Checkpointer(saved) as checkpointer,
        pytest.raises(NoCheckpointError, match=r"(?s)/2/.*damaged.*/1/.*damaged"),
    ):
        checkpointer.restore_latest(abstract_of(make_trees()))


# What cannot be saved says why, and harms nothing.


def test_a_full_disk_is_named_and_the_last_checkpoint_stands(saved, monkeypatch):
    def fill(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Checkpointer(saved, keep=3) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "write", fill)  # In the thread that writes.
            checkpointer.save(3, make_trees(3.0), {})
            with pytest.raises(FailedSaveError) as caught:
                checkpointer.wait()
        text = str(caught.value)
        assert "is full" in text and "step 3" in text
        assert "step 2 is complete and stays" in text
        assert sorted(path.name for path in saved.iterdir()) == ["1", "2"]
        # Space was made: the next save works.
        assert checkpointer.save(4, make_trees(4.0), {})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2, 4]


def test_a_write_that_the_system_refuses_surfaces_at_the_next_save(saved):
    # A limit on the size of files makes real writes fail, of TensorStore's threads too.
    big = {"policy": jax.random.normal(jax.random.key(0), (512, 1024))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(saved, keep=3) as checkpointer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            checkpointer.save(3, big, {})
            with pytest.raises(FailedSaveError, match=r"step 3 .*too large"):
                checkpointer.save(4, big, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert checkpointer.latest_step() == 2
        assert sorted(path.name for path in saved.iterdir()) == ["1", "2"]
        assert checkpointer.save(4, big, {})
        checkpointer.wait()
        assert checkpointer.latest_step() == 4


@pytest.mark.parametrize(
    "trees, metadata, message",
    [
        ({"a": {"key": jax.random.key(0)}}, {}, r"a/key .*key_data"),
        ({"a": {"name": "text"}}, {}, r"a/name is str"),
        ({}, {"loader": {"at": np.zeros(2)}}, r"metadata\.loader\.at is ndarray"),
        ({}, {"epochs": {3: 1}}, r"metadata\.epochs has the key 3"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, trees, metadata, message):
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(TypeError, match=message),
    ):
        checkpointer.save(1, trees, metadata)


def test_metadata_of_numpy_and_tuples_comes_back_as_json(tmp_path):
    metadata = {"step": np.int64(3), "plan": ("d2", None, True), "rate": np.float32(2)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": jnp.ones(1)}, metadata)
        checkpointer.wait()
        assert checkpointer.read_metadata(1) == {
            "step": 3,
            "plan": ["d2", None, True],
            "rate": 2.0,
        }


def test_every_error_is_a_checkpoint_error():
    for error in (
        NoCheckpointError,
        DamagedCheckpointError,
        MismatchedCheckpointError,
        FailedSaveError,
    ):
        assert issubclass(error, CheckpointError)


# When to save.


@pytest.mark.parametrize(
    "config, situation, is_due",
    [
        ({"every_steps": 5}, {"step": 10}, True),
        ({"every_steps": 5}, {"step": 11}, False),
        ({"every_minutes": 2.0}, {"step": 1, "minutes_since_save": 2.5}, True),
        ({"every_minutes": 2.0}, {"step": 1, "minutes_since_save": 1.5}, False),
        ({"every_epochs": 2}, {"step": 1, "epoch": 4, "is_epoch_end": True}, True),
        ({"every_epochs": 2}, {"step": 1, "epoch": 3, "is_epoch_end": True}, False),
        ({"every_epochs": 2}, {"step": 1, "epoch": 4}, False),
        ({}, {"step": 5, "minutes_since_save": 1e6, "is_epoch_end": True}, False),
        ({"every_steps": 7, "every_minutes": 1.0}, {"step": 7}, True),
    ],
)
def test_a_save_is_due_when_any_rule_says_so(config, situation, is_due):
    assert CheckpointConfig(**config).is_due(**situation) is is_due


@pytest.mark.parametrize("field", ["every_steps", "every_minutes", "every_epochs"])
def test_negative_intervals_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} is -1"):
        CheckpointConfig(**{field: -1})


def test_at_least_one_checkpoint_stays():
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointConfig(keep=0)
