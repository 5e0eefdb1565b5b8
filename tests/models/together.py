"""One of several processes that save and load a checkpoint together.

python -m tests.models.together RANK NUM_PROCESSES PORT FOLDER

The last line it prints is JSON: what it read and wrote, and whether its shards are
right. Started by `together_test.py`.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np

from realjax.models import byte_ranges, hf, streaming, tensor_writer
from realjax.models.parameters import abstract_parameters
from realjax.models.tensor_checks import is_parameter
from realjax.models.tensor_files import TensorFiles
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import parameter_shardings
from tests.tiny_families import FAMILIES

CONFIG = dataclasses.replace(FAMILIES["llama"], vocab_size=62)
MAX_SHARD_BYTES = 20_000


def numbers(config):
    """The whole model, by numpy; equal in all processes."""
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda parameter: generator.normal(size=parameter.shape).astype(np.float32),
        abstract_parameters(config),
        is_leaf=is_parameter,
    )


def shardings(allocation):
    mesh = make_mesh(Allocation.parse(allocation))
    return parameter_shardings(abstract_parameters(CONFIG), mesh)


def is_right(loaded):
    """Whether every shard of this process holds its part."""
    pairs = zip(jax.tree.leaves(loaded), jax.tree.leaves(numbers(CONFIG)), strict=True)
    return all(
        np.array_equal(shard.data, whole[shard.index])
        for array, whole in pairs
        for shard in array.addressable_shards
    )


def note_bytes():
    """Make `TensorFiles` note what it has read when it is closed."""
    noted, close = [], TensorFiles.close

    def note(files):
        noted.append(files.bytes_read)
        close(files)

    TensorFiles.close = note
    return noted


def main():
    rank, num_processes, port, folder = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(num_processes), int(rank))
    # Rows of so small a model lie closer together than a page.
    byte_ranges._PAGE_BYTES = 1
    target = pathlib.Path(folder) / "model"
    written, noted = [], note_bytes()
    write_file = tensor_writer.write_file

    def note_file(folder, planned, arrays, dtype):
        written.append(planned.name)
        write_file(folder, planned, arrays, dtype)

    hf.write_file = note_file
    make = lambda whole, sharding: jax.make_array_from_callback(
        whole.shape, sharding, whole.__getitem__
    )
    parameters = jax.tree.map(make, numbers(CONFIG), shardings("f4"))
    # Twice: what is there is replaced, and the barriers can be met again.
    for _ in range(2):
        hf.save(target, CONFIG, parameters, max_shard_bytes=MAX_SHARD_BYTES)
    found = {"written": sorted(set(written)), "is_right": [], "bytes_read": []}
    stream = streaming.stream
    for allocation, chunk_bytes in (("f4", 2**20), ("t2f2", 1500), ("d2@0-1", 2**20)):
        hf.stream = lambda *a, size=chunk_bytes: stream(*a, chunk_bytes=size)
        loaded = hf.load(target, shardings=shardings(allocation))
        found["is_right"].append(is_right(loaded))
        found["bytes_read"].append(noted[-1])
    # On the devices of the first process alone.
    hf.save(target.with_name("alone"), CONFIG, loaded)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
