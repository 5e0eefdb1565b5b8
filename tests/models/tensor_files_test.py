"""Tensor files: parts by byte ranges, what is planned and written, what is broken."""

import json
import os
import shutil
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from realjax.models import byte_ranges, tensor_files
from realjax.models.byte_ranges import FLOATS, ByteRanges, TensorPlace
from realjax.models.tensor_files import INDEX_FILE, SINGLE_FILE, TensorFiles
from realjax.models.tensor_writer import plan_files, write_file, write_index

SHAPES = {"a": (6, 8), "b": (3,), "c": (2, 3, 4), "d": ()}


def arrays(dtype=np.float32):
    generator = np.random.default_rng(0)
    return {
        name: np.asarray(generator.standard_normal(shape), dtype)
        for name, shape in SHAPES.items()
    }


def write(folder, tensors, max_shard_bytes=10**9):
    dtype = next(iter(tensors.values())).dtype
    shapes = [(name, array.shape) for name, array in tensors.items()]
    plan = plan_files(shapes, dtype, max_shard_bytes)
    for planned in plan:
        write_file(folder, planned, [tensors[n] for n in planned.shapes], dtype)
    write_index(folder, plan, dtype)
    return plan


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=lambda dtype: dtype.name)
def test_what_is_written_the_formats_own_reader_reads(dtype, tmp_path):
    write(tmp_path, arrays(dtype))
    found = load_file(tmp_path / SINGLE_FILE)
    assert found.keys() == SHAPES.keys()
    for name, array in arrays(dtype).items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], array)


def test_files_hold_at_most_what_was_asked_or_one_tensor(tmp_path):
    # float32 bytes: a 192, b 12, c 96, d 4. Of 100 bytes: a | b | c d.
    plan = write(tmp_path, arrays(), max_shard_bytes=100)
    assert [list(file.shapes) for file in plan] == [["a"], ["b"], ["c", "d"]]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 304
    assert index["weight_map"]["d"] == "model-00003-of-00003.safetensors"
    with TensorFiles(tmp_path) as files:
        for name, array in arrays().items():
            part = files.read(name, tuple(map(slice, array.shape)))
            np.testing.assert_array_equal(part, array)


def test_an_array_of_another_shape_than_planned_is_refused(tmp_path):
    (planned,) = plan_files([("a", (2, 3))], np.dtype("float32"), 100)
    with pytest.raises(ValueError, match=r"'a' to be saved has the shape \(3, 2\)"):
        write_file(tmp_path, planned, [np.zeros((3, 2))], np.dtype("float32"))


@pytest.mark.parametrize("page_bytes", (0, 8, 10**6))
@pytest.mark.parametrize("buffer_bytes", (1, 50, 10**6))
def test_every_part_is_read_row_by_row_or_through_a_buffer(
    page_bytes, buffer_bytes, tmp_path, monkeypatch
):
    monkeypatch.setattr(byte_ranges, "_PAGE_BYTES", page_bytes)
    monkeypatch.setattr(byte_ranges, "BUFFER_BYTES", buffer_bytes)
    write(tmp_path, arrays())
    generator = np.random.default_rng(1)
    with TensorFiles(tmp_path) as files:
        for name, array in arrays().items():
            for _ in range(30):
                box = tuple(
                    slice(*sorted(generator.integers(0, n + 1, 2).tolist()))
                    for n in array.shape
                )
                np.testing.assert_array_equal(files.read(name, box), array[box])


def test_only_the_columns_of_a_part_are_read(tmp_path):
    wide = {"wide": np.zeros((5, 10_000), np.float32)}
    write(tmp_path, wide)
    with TensorFiles(tmp_path) as files:
        files.read("wide", (slice(0, 5), slice(100, 400)))
        assert files.bytes_read == 5 * 300 * 4


def test_a_file_that_shrinks_while_it_is_open_names_the_tensor(tmp_path):
    write(tmp_path, arrays())
    with TensorFiles(tmp_path) as files:
        os.truncate(tmp_path / SINGLE_FILE, (tmp_path / SINGLE_FILE).stat().st_size - 2)
        with pytest.raises(ValueError, match="within the tensor 'd'"):
            files.read("d", ())


def test_of_a_tensor_in_two_files_the_one_that_the_index_names_is_read(tmp_path):
    first, *_, last = write(tmp_path, arrays(), max_shard_bytes=100)
    assert "a" in first.shapes and "a" not in last.shapes
    tensors = load_file(tmp_path / last.name)
    save_file(tensors | {"a": np.zeros((6, 8), "float32")}, tmp_path / last.name)
    with TensorFiles(tmp_path) as files:
        found = files.read("a", (slice(0, 6), slice(0, 8)))
    np.testing.assert_array_equal(found, arrays()["a"])


def test_a_folder_that_is_replaced_while_it_is_read_stays_what_it_was(tmp_path):
    old, new = tmp_path / "m", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    write(old, arrays(), max_shard_bytes=100)
    write(new, {name: np.zeros_like(array) for name, array in arrays().items()}, 100)
    with TensorFiles(old) as files:
        old.rename(tmp_path / "old")
        new.rename(old)
        for name, array in arrays().items():
            found = files.read(name, tuple(map(slice, array.shape)))
            np.testing.assert_array_equal(found, array)


def test_a_folder_that_is_replaced_while_it_is_opened_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    folder.mkdir()
    write(folder, arrays())
    read_header = tensor_files._read_header

    def replace_and_read(path, expected):
        folder.rename(tmp_path / "old")
        shutil.copytree(tmp_path / "old", folder)
        return read_header(path, expected)

    monkeypatch.setattr(tensor_files, "_read_header", replace_and_read)
    with pytest.raises(ValueError, match=r"replaced by another checkpoint while"):
        TensorFiles(folder)


def test_a_file_that_was_cut_off_names_the_tensor_that_is_lost(tmp_path):
    write(tmp_path, arrays())
    content = (tmp_path / SINGLE_FILE).read_bytes()
    # d is 4 bytes at the end, and c 96 before it.
    for cut, name in ((1, "d"), (5, "c"), (101, "b")):
        (tmp_path / SINGLE_FILE).write_bytes(content[:-cut])
        with pytest.raises(ValueError, match=f"not a whole .* tensor '{name}' ends"):
            TensorFiles(tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes(content[:20])
    with pytest.raises(ValueError, match=r"none of its tensors \('a' \(and 1 more\)\)"):
        TensorFiles(tmp_path, needed=["b", "a"])


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "the bytes 0 to 4"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "the bytes -4 to 0"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "the bytes"),
        ({"dtype": "F32", "data_offsets": [0, 4]}, "header is wrong"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "header is wrong"),
        ([], "header is wrong"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(entry, text, tmp_path):
    header = json.dumps({"weight": entry}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(8)
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=text):
        TensorFiles(tmp_path)


def test_a_header_of_absurd_length_is_refused(tmp_path):
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", 2**60) + bytes(100))
    with pytest.raises(ValueError, match="header is wrong"):
        TensorFiles(tmp_path)


def test_types_that_are_not_floats_are_known_and_not_read(tmp_path):
    tensors = {"mask": np.ones((2, 2), bool), "x": np.ones(2, jnp.bfloat16)}
    save_file(tensors, tmp_path / SINGLE_FILE)
    with TensorFiles(tmp_path) as files:
        assert [files.dtype("mask"), files.dtype("x")] == ["BOOL", "BF16"]
        with pytest.raises(ValueError, match="'mask' is stored as BOOL"):
            files.read("mask", (slice(0, 1), slice(0, 1)))


def test_strides_pick_elements_out_of_a_file(tmp_path):
    content = np.arange(12, dtype=np.float32)
    (tmp_path / "x").write_bytes(content.tobytes())
    # Columns of the [3, 4] array, from the second element on.
    place = TensorPlace(tmp_path / "x", 4, (3, 3), "F32", (1, 4))
    with ByteRanges() as ranges:
        part = ranges.read("x", place, (slice(0, 2), slice(1, 3)))
    np.testing.assert_array_equal(part, [[5, 9], [6, 10]])
