"""What the processes of `export_test.py` do: save and load Hugging Face folders."""

import contextlib
import dataclasses
import errno
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from realjax.models import byte_ranges, hf, streaming, tensor_writer
from realjax.models.parameters import abstract_parameters
from realjax.models.tensor_checks import is_parameter
from realjax.models.tensor_files import TensorFiles
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import parameter_shardings
from realjax.runtime import cluster
from realjax.runtime.agreement import Agreement
from tests.tiny_families import FAMILIES

CONFIG = dataclasses.replace(FAMILIES["llama"], vocab_size=62)
MAX_SHARD_BYTES = 20_000


def numbers():
    """The whole model, by numpy; equal in all processes."""
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda parameter: generator.normal(size=parameter.shape).astype(np.float32),
        abstract_parameters(CONFIG),
        is_leaf=is_parameter,
    )


def shardings(allocation, config=CONFIG):
    mesh = make_mesh(Allocation.parse(allocation))
    return parameter_shardings(abstract_parameters(config), mesh)


def make(places):
    return jax.tree.map(
        lambda whole, sharding: jax.make_array_from_callback(
            whole.shape, sharding, whole.__getitem__, dtype=whole.dtype
        ),
        numbers(),
        places,
    )


def save(folder, parameters):
    hf.save(
        folder,
        CONFIG,
        parameters,
        max_shard_bytes=MAX_SHARD_BYTES,
        agreement=Agreement("export"),
    )


def live(folder, num_devices, is_sample):
    """Saves and loads in many ways; returns what this process wrote and read."""
    folder = pathlib.Path(folder)
    # Rows of so small a model lie closer together than a page.
    byte_ranges._PAGE_BYTES = 1
    everywhere = make(shardings(f"f{num_devices}"))
    with noting_files() as written:
        save(folder / "model", everywhere)
    allocations = {f"f{num_devices}": 2**20, "d2@0-1": 2**20}
    if not is_sample:
        save(folder / "model", everywhere)  # What is there is replaced.
        check_failures(folder, everywhere)
        last = f"d2@{num_devices - 2}-{num_devices - 1}"
        save(folder / "last", make(shardings(last)))
        save(folder / "copies", hf.load(folder / "model"))
        mixed = f"t2f{num_devices // 2}"
        in_host = lambda sharding: sharding.with_memory_kind("pinned_host")
        save(folder / "host", make(jax.tree.map(in_host, shardings(mixed))))
        allocations[mixed] = 1500
        check_new_head(folder, num_devices)
    read = []
    for allocation, chunk_bytes in allocations.items():
        with noting_reads(chunk_bytes) as noted:
            check(hf.load(folder / "model", shardings=shardings(allocation)))
        read += noted
    return {"written": written, "read": read}


def check_failures(folder, parameters):
    """What fails in one process is raised in all; the folder that was there stays."""
    last, write_file = jax.process_count() - 1, hf.write_file

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if jax.process_index() == last:
        hf.write_file = full
    own = jax.process_index() == last
    who = "" if own else f"Process {last} failed: OSError: .*"
    kind = OSError if own else cluster.ClusterError
    with raising(kind, f"{who}No space left"):
        save(folder / "model", parameters)
    hf.write_file = write_file
    (folder / "notes").mkdir(exist_ok=True)
    (folder / "notes" / "mine").write_text("")
    cluster.barrier("notes")
    with raising(FileExistsError, "will not be replaced"):
        save(folder / "notes", parameters)
    with raising(ValueError, "there is no `agreement`"):
        hf.save(folder / "model", CONFIG, parameters)


def check_new_head(folder, num_devices):
    """A head that is drawn lies where it shall, also where that is elsewhere."""
    critic = dataclasses.replace(CONFIG, head="scalar")
    key = jax.random.key(0)
    for allocation in (f"f{num_devices}", "d1@0"):
        places = shardings(allocation, critic)
        loaded = hf.load(folder / "model", head="scalar", key=key, shardings=places)
        kernel = loaded["score"]["kernel"]
        assert kernel.sharding == places["score"]["kernel"]
        for shard in kernel.addressable_shards:
            assert jnp.std(shard.data) > 0


def check(loaded):
    pairs = zip(jax.tree.leaves(loaded), jax.tree.leaves(numbers()), strict=True)
    for array, whole in pairs:
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])


def check_files(folder, found):
    """The processes took turns, and what they wrote is the model."""
    paths = sorted(folder.glob("*.safetensors"))
    names = [path.name for path in paths]
    assert len(paths) > 4
    sizes = [path.stat().st_size for path in paths]
    assert max(sizes) < 1.2 * MAX_SHARD_BYTES
    for process, one in enumerate(found):
        assert one["written"] == names[process :: len(found)]
    check_model(folder)


def check_model(folder):
    loaded = hf.load(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded, numbers())


def check_reads(found):
    """Each read what its devices hold, and nothing where they hold nothing."""
    num_bytes = 4 * CONFIG.num_parameters
    for process, one in enumerate(found):
        whole, first, *mixed = (part / num_bytes for part in one["read"])
        # fsdp cuts all but the norms; with t2 some more is whole.
        assert 1 / len(found) <= whole < 1 / len(found) + 0.02
        assert first == (process == 0)
        assert all(1 / len(found) <= part < 1 / len(found) + 0.05 for part in mixed)


@contextlib.contextmanager
def noting_files():
    """Lists the files that this process writes."""
    written = []

    def note(folder, planned, arrays, dtype):
        written.append(planned.name)
        tensor_writer.write_file(folder, planned, arrays, dtype)

    hf.write_file = note
    yield written
    hf.write_file = tensor_writer.write_file


@contextlib.contextmanager
def noting_reads(chunk_bytes):
    """Lists the bytes of tensors that this process reads; reads in such chunks."""
    noted, close = [], TensorFiles.close

    def note(self):
        noted.append(self.bytes_read)
        close(self)

    TensorFiles.close = note
    hf.stream = lambda *args: streaming.stream(*args, chunk_bytes=chunk_bytes)
    yield noted
    TensorFiles.close, hf.stream = close, streaming.stream


@contextlib.contextmanager
def raising(kind, pattern):
    try:
        yield
    except kind as error:
        assert re.search(pattern, str(error), re.DOTALL), error
    else:
        raise AssertionError(f"No {kind.__name__}: {pattern}")
