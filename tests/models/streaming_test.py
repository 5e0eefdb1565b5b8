"""Arrays filled by chunks: the same numbers, each read once, little host memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from realjax.models.streaming import Reader, cut_shape, read_parts, stream
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh

SHAPE = (6, 10, 4)
ARRAY = np.arange(240, dtype=np.float32).reshape(SHAPE)


def sharding(allocation, *spec):
    return NamedSharding(make_mesh(Allocation.parse(allocation)), PartitionSpec(*spec))


SHARDINGS = {
    "one": lambda: SingleDeviceSharding(jax.devices()[3]),
    "copies": lambda: sharding("d8"),
    "rows": lambda: sharding("d2f2t2", "data", None, "tensor"),
    "columns": lambda: sharding("f2t2", None, "fsdp", "tensor"),
    "both": lambda: sharding("f2t2", None, None, ("fsdp", "tensor")),
}


class Notes:
    """Reads ARRAY, with its dimensions in some order in memory, and notes what."""

    def __init__(self, order):
        self.order, self.boxes = order, []

    def __call__(self, box):
        self.boxes.append(box)
        stored = np.ascontiguousarray(ARRAY[box].transpose(self.order))
        return stored.transpose(np.argsort(self.order))

    @property
    def num_read(self):
        sizes = [np.prod([s.stop - s.start for s in box]) for box in self.boxes]
        return sum(sizes), max(sizes)


def reader(read, **changes):
    dtype = np.dtype("float32")
    options = {"dtype": dtype, "read_dtype": dtype, "cuts": (0, 2)} | changes
    return Reader(shape=SHAPE, read=read, order=read.order, **options)


@pytest.mark.parametrize("order", ((0, 1, 2), (0, 2, 1)), ids=str)
@pytest.mark.parametrize("name", SHARDINGS)
def test_chunks_fill_what_one_read_would_give(name, order):
    wanted = SHARDINGS[name]()
    read = Notes(order)
    # 40 floats at a time; with eight copies 5, which is one row of the cuts.
    found = stream(reader(read), wanted, chunk_bytes=160)
    assert found.sharding == wanted
    assert len(read.boxes) > 3
    np.testing.assert_array_equal(found, ARRAY)


def test_parts_side_by_side_are_read_once_and_together():
    read = Notes((0, 2, 1))
    stream(reader(read), SHARDINGS["columns"](), chunk_bytes=160)
    # 240 elements in chunks of 40: a whole row of the first dimension at a time.
    assert read.num_read == (240, 40)
    assert len(read.boxes) == 6


class Narrow(Notes):
    """Reads bfloat16."""

    def __call__(self, box):
        return super().__call__(box).astype(jnp.bfloat16)


def test_a_narrow_type_is_read_narrow_and_cast_on_the_devices(monkeypatch):
    read, dtypes = Narrow((0, 1, 2)), []
    make = jax.make_array_from_callback

    def note(shape, sharding, callback, dtype):
        dtypes.append(np.dtype(dtype).name)
        return make(shape, sharding, callback, dtype)

    monkeypatch.setattr(jax, "make_array_from_callback", note)
    narrow = reader(read, read_dtype=np.dtype(jnp.bfloat16))
    found = stream(narrow, SHARDINGS["columns"](), chunk_bytes=160)
    assert found.dtype == jnp.float32 and set(dtypes) == {"bfloat16"}
    np.testing.assert_array_equal(found, ARRAY.astype(jnp.bfloat16))


def test_a_small_array_is_placed_at_once():
    read = Notes((0, 1, 2))
    found = stream(reader(read), SHARDINGS["rows"]())
    # Two halves of the rows, each with all columns.
    assert len(read.boxes) == 1 and read.num_read == (240, 240)
    np.testing.assert_array_equal(found, ARRAY)


def test_pinned_memory_is_filled_at_once():
    read = Notes((0, 1, 2))
    pinned = SHARDINGS["rows"]().with_memory_kind("pinned_host")
    found = stream(reader(read), pinned, chunk_bytes=160)
    assert len(read.boxes) == 1 and found.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(found, ARRAY)


@pytest.mark.parametrize(
    ("shape", "cuts", "num_elements", "expected"),
    [
        ((8, 10, 10), (0,), 300, (3, 10, 10)),  # 3, 3 and 2 of 8 layers.
        ((8, 10, 10), (0, 1), 30, (1, 3, 10)),  # 4 chunks of 10 rows: 3, 3, 3, 1.
        ((8, 10, 10), (0,), 30, (1, 10, 10)),  # A layer is more, and is not cut.
        ((8, 10, 10), (), 30, (8, 10, 10)),
        ((7,), (0,), 100, (7,)),
    ],
)
def test_shapes_of_chunks(shape, cuts, num_elements, expected):
    assert cut_shape(shape, cuts, num_elements) == expected


def test_parts_that_do_not_touch_are_read_apart():
    read = Notes((0, 1, 2))
    first, third = ((0, 2), (0, 10), (0, 4)), ((4, 6), (0, 10), (0, 4))
    parts = read_parts([first, third, first], read)
    assert len(read.boxes) == 2
    np.testing.assert_array_equal(parts[third], ARRAY[4:6])
