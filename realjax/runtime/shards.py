"""Arrays of several processes in one folder: each process writes pieces of its own.

    array [8, 8] over devices of processes 0 and 1        arrays/ocdbt.process_0/…
        ┌────┬────┐                                       arrays/ocdbt.process_1/…
        │ 0  │ 0  │   one writer for each distinct shard  arrays/manifest.ocdbt, d/…
        ├────┼────┤                                         leads to the pieces of both
        │ 1  │ 1  │
        └────┴────┘

The files are those that Orbax makes of the same arrays, so that it reads them, in any
number of processes and onto any shardings. It does not write them here: it takes arrays
that one process holds alone for a mistake, and its processes wait for each other by
collectives over all devices, which may be busy with the calls of other meshes.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore

type Views = Sequence[Mapping[str, Any]]
type Box = tuple[tuple[int, int], ...]

_PROCESS_FOLDER = "ocdbt.process_"
_MAX_FILE_BYTES = 2**31
# Small values stand beside their names; one node holds the names of a checkpoint.
_DATABASE = {
    "max_inline_value_bytes": 1024,
    "max_decoded_node_bytes": 100_000_000,
    "manifest_kind": "single",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an array, written by one process.

    Attributes:
        name: of the array.
        box: start and stop in every dimension.
        process: that writes it.
    """

    name: str
    box: Box
    process: int


def view(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What this process knows of arrays, as others can be told.

    Of each, by name, its shape and dtype, the shape of its shards, and the processes
    that hold them; none for NumPy.
    """
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "chunk": list(_shard_shape(leaf)),
            "holders": sorted(_holders(leaf)),
        }
        for name, leaf in leaves.items()
    }


def check_alike(views: Views) -> None:
    """Check that all processes mean the same arrays.

    Raises:
        ValueError: naming the first that two of them see differently.
    """
    for process, other in enumerate(views):
        for name in {**views[0], **other}:
            here, there = (_words(seen.get(name)) for seen in (views[0], other))
            if here != there:
                raise ValueError(
                    f"{name} is {here} in process 0 and {there} in process {process}."
                    " All processes save the same arrays; those of other processes are"
                    " handles."
                )
    for name, first in views[0].items():
        is_own = all(v[name]["holders"] in ([], [p]) for p, v in enumerate(views))
        for process, other in enumerate(views):
            if other[name] != first and not is_own:
                raise ValueError(
                    f"{name} has pieces of {first['chunk']} in the processes"
                    f" {first['holders']} for process 0, and of"
                    f" {other[name]['chunk']} in {other[name]['holders']} for process"
                    f" {process}. Give it one sharding in all."
                )


def pieces(leaves: Mapping[str, Any], views: Views) -> list[Piece]:
    """Divide arrays among the processes that hold them, the same in all processes.

    Args:
        leaves: as this process has them.
        views: of all processes.
    """
    written_bytes = dict.fromkeys(range(len(views)), 0)
    found = []
    for name, leaf in leaves.items():
        if _is_shared(name, views):
            holders = _box_holders(leaf)
        else:
            whole = tuple((0, size) for size in leaf.shape)
            holders = {whole: [_first_owner(name, views)]}
        for box in sorted(holders):
            process = min(holders[box], key=lambda p: (written_bytes[p], p))
            num_elements = math.prod(stop - start for start, stop in box)
            written_bytes[process] += num_elements * leaf.dtype.itemsize
            found.append(Piece(name=name, box=box, process=process))
    return found


def copy_pieces(
    leaves: Mapping[str, Any], planned: Sequence[Piece], process: int
) -> dict[Piece, np.ndarray]:
    """Copy what a process writes to the host; then the arrays may change."""
    own = [piece for piece in planned if piece.process == process]
    shards: dict[Piece, Any] = {}
    for piece in own:
        leaf = leaves[piece.name]
        shards[piece] = leaf
        if isinstance(leaf, jax.Array):
            found = {_box(s.index, leaf.shape): s for s in leaf.addressable_shards}
            if piece.box in found:
                shards[piece] = found[piece.box].data
            shards[piece].copy_to_host_async()  # All are on their way at once.
    return {piece: _copy(shard) for piece, shard in shards.items()}


def write(
    folder: pathlib.Path,
    data: Mapping[Piece, np.ndarray],
    views: Views,
    process: int,
) -> None:
    """Write the pieces of a process; process 0 also says what each array is."""
    # One commit for all: what a kill leaves is nothing.
    transaction = tensorstore.Transaction(atomic=True)
    context = tensorstore.Context({"file_io_concurrency": {"limit": 128}})
    base = own_folder(folder, process)
    if process == 0:
        for name, seen in views[0].items():
            spec = _array_spec(base, name, seen, _chunk(name, views))
            tensorstore.open(
                spec, create=True, open=True, context=context, transaction=transaction
            ).result()
    writes = []
    for piece, array in data.items():
        spec = _array_spec(
            base, piece.name, views[0][piece.name], _chunk(piece.name, views)
        )
        store = tensorstore.open(
            spec,
            open=True,
            assume_metadata=True,
            context=context,
            transaction=transaction,
        ).result()
        target = store[tuple(slice(*bounds) for bounds in piece.box)]
        writes.append(target.write(array, can_reference_source_data_indefinitely=True))
    for write_ in writes:
        write_.result()
    if data or process == 0:
        transaction.commit_sync()


def merge(folder: pathlib.Path, views: Views) -> None:
    """Join what the processes wrote, whose files stay, and describe it for Orbax."""
    # One context: only then do values stay in their files, and names alone are copied.
    context = tensorstore.Context()
    parent = _open_database(folder, context)
    transaction = tensorstore.Transaction(atomic=True)
    for child in sorted(folder.glob(f"{_PROCESS_FOLDER}*")):
        copying = _open_database(child, context).experimental_copy_range_to(
            parent.with_transaction(transaction)
        )
        copying.result()
    transaction.commit_sync()
    tree = {}
    for name, seen in views[0].items():
        described = {"value_type": "np.ndarray", "skip_deserialize": False}
        if seen["holders"]:
            described["value_type"] = "jax.Array"
            described["write_shape"] = _chunk(name, views)
        tree[str((name,))] = {
            "key_metadata": [{"key": name, "key_type": 2}],  # A key of a dict.
            "value_metadata": described,
        }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (folder / "_METADATA").write_text(json.dumps(metadata), encoding="utf-8")


def own_folder(folder: pathlib.Path, process: int) -> pathlib.Path:
    """The part of the folder of arrays that one process writes."""
    return folder / f"{_PROCESS_FOLDER}{process}"


def _copy(shard: Any) -> np.ndarray:
    """Copy an array to the host, once."""
    if isinstance(shard, jax.Array) and shard.sharding.memory_kind == "device":
        devices = shard.sharding.device_set
        if all(device.platform != "cpu" for device in devices):
            return np.asarray(shard)
    # NumPy would see the memory of the array itself, which may be given away.
    return np.array(shard)


def _is_shared(name: str, views: Views) -> bool:
    """Whether all processes see one array, and not each a copy of its own."""
    holders = views[0][name]["holders"]
    return bool(holders) and all(seen[name]["holders"] == holders for seen in views)


def _first_owner(name: str, views: Views) -> int:
    """The first process that has a copy of its own: of NumPy, the first of all."""
    return next(
        process
        for process, seen in enumerate(views)
        if seen[name]["holders"] in ([], [process])
    )


def _chunk(name: str, views: Views) -> list[int]:
    """How an array is cut in the files: no piece shares a chunk with another."""
    seen = views[0][name]
    return seen["chunk"] if _is_shared(name, views) else seen["shape"]


def _shard_shape(leaf: Any) -> tuple[int, ...]:
    if not isinstance(leaf, jax.Array):
        return leaf.shape
    return leaf.sharding.shard_shape(leaf.shape)


def _holders(leaf: Any) -> set[int]:
    if not isinstance(leaf, jax.Array):
        return set()
    return {device.process_index for device in leaf.sharding.device_set}


def _box_holders(leaf: Any) -> dict[Box, list[int]]:
    holders: dict[Box, list[int]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        holders.setdefault(_box(index, leaf.shape), []).append(device.process_index)
    return holders


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _words(seen: Mapping[str, Any] | None) -> str:
    return "not there" if seen is None else f"{seen['dtype']}{seen['shape']}"


def _array_spec(
    base: pathlib.Path, name: str, seen: Mapping[str, Any], chunk: list[int]
) -> tensorstore.Spec:
    return tensorstore.Spec(
        {
            "driver": "zarr",
            "kvstore": {**_database_spec(base), "path": name},
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "store_data_equal_to_fill_value": True,
            "metadata": {
                "shape": seen["shape"],
                "chunks": chunk,
                "compressor": {"id": "zstd", "level": 1},
            },
            "dtype": seen["dtype"],
        }
    )


def _database_spec(base: pathlib.Path) -> dict[str, Any]:
    files = {"driver": "file", "path": f"{base}/"}
    return {
        "driver": "ocdbt",
        "base": {**files, "file_io_locking": {"mode": "non_atomic"}},
        "manifest": files,
        "target_data_file_size": _MAX_FILE_BYTES,
        "config": _DATABASE,
        "assume_config": True,
    }


def _open_database(
    base: pathlib.Path, context: tensorstore.Context
) -> tensorstore.KvStore:
    spec = tensorstore.KvStore.Spec(_database_spec(base))
    return tensorstore.KvStore.open(spec, context=context).result()
