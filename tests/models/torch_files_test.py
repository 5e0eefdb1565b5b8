"""PyTorch's .bin files: what is in them, what is refused, and that nothing is run."""

import pathlib
import pickle
import random
import shutil
import zipfile

import jax
import numpy as np
import pytest

from realjax.models import hf
from realjax.models.byte_ranges import FLOATS, ByteRanges
from realjax.models.tensor_files import TensorFiles
from realjax.models.torch_files import read_places

DATA = pathlib.Path(__file__).parent / "data"
CHECKPOINT = DATA.parents[1] / "parity/data/hf_scalar"
TENSORS = DATA / "tensors.bin"


def read_all(path):
    """Every float tensor of a file."""
    with ByteRanges() as ranges:
        return {
            name: ranges.read(name, place, tuple(map(slice, place.shape)))
            for name, place in read_places(path, []).items()
            if place.dtype in FLOATS
        }


def test_every_kind_of_tensor_is_read_as_pytorch_wrote_it():
    found = read_all(TENSORS)
    expected = np.load(DATA / "tensors.npz")
    assert found.keys() == set(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array.astype(np.float64), expected[name])
    assert found["bfloat16"].dtype == FLOATS["BF16"]


def test_types_that_are_no_floats_are_known_by_name():
    places = read_places(TENSORS, [])
    names = ("flags", "counts", "float8")
    assert [places[name].dtype for name in names] == ["BOOL", "I64", "F8_E4M3"]


def test_a_part_of_a_strided_tensor_is_read_without_the_rest():
    places = read_places(TENSORS, [])
    expected = np.load(DATA / "tensors.npz")
    box = (slice(1, 3), slice(2, 4))
    for name in ("transposed", "every_second_column", "rows_of_another", "repeated"):
        with ByteRanges() as ranges:
            part = ranges.read(name, places[name], box)
            np.testing.assert_array_equal(part, expected[name][box])
            assert ranges.bytes_read < 20 * part.itemsize


@pytest.fixture(params=("single", "sharded"))
def checkpoint(request, tmp_path):
    """A folder of .bin files."""
    folder = shutil.copytree(DATA / request.param, tmp_path / "checkpoint")
    shutil.copy(CHECKPOINT / "config.json", folder)
    return folder


def test_a_folder_of_bin_files_loads_as_one_of_safetensors(checkpoint):
    expected = hf.load(CHECKPOINT)
    jax.tree.map(np.testing.assert_array_equal, hf.load(checkpoint), expected)


def test_safetensors_are_read_where_there_are_both(checkpoint):
    shutil.copy(CHECKPOINT / "model.safetensors", checkpoint)
    with TensorFiles(checkpoint) as files:
        assert [path.name for path in files.paths] == ["model.safetensors"]


def test_a_folder_with_half_of_its_bin_files_names_the_other(tmp_path):
    folder = shutil.copytree(DATA / "sharded", tmp_path / "checkpoint")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002.bin is missing"):
        TensorFiles(folder)


def test_the_format_before_1_6_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"old\.bin is of the format before PyTorch"):
        read_places(DATA / "old.bin", [])


@pytest.mark.parametrize("part", (0.05, 0.5, 0.99))
def test_a_file_that_was_cut_off_names_a_tensor_that_is_lost(tmp_path, part):
    content = (DATA / "single/pytorch_model.bin").read_bytes()
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content[: int(part * len(content))])
    places = read_places(DATA / "single/pytorch_model.bin", [])
    starts = {name: place.start for name, place in places.items()}
    with pytest.raises(ValueError, match=r"not a whole file of torch\.save") as caught:
        read_places(path, ["model.embed_tokens.weight"])
    named = str(caught.value).split("'")[1]
    # In the middle, what is named lies around the cut or behind it.
    assert part != 0.5 or starts[named] > 0.2 * len(content)


def write_pickle(path, pickled):
    """A file as torch.save writes them, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", bytes(16))
    return path


class Call:
    """Pickles to the call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_a_pickle_that_calls_something_is_refused_and_does_not_call_it(tmp_path):
    victim = tmp_path / "victim"
    attack = pickle.dumps({"weight": Call(pathlib.Path.touch, victim)})
    with pytest.raises(ValueError, match=r"it names [\w.]+, which a checkpoint"):
        read_places(write_pickle(tmp_path / "x.bin", attack), [])
    for module_name, name in (
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
    ):
        attack = f"c{module_name}\n{name}\n(Vx\ntR.".encode()
        with pytest.raises(ValueError, match=rf"names {module_name}\.{name}"):
            read_places(write_pickle(tmp_path / "x.bin", attack), [])
    assert not victim.exists()


def test_what_a_pickle_does_to_a_name_ends_with_it(tmp_path):
    # BUILD with (None, {...}) sets attributes of what is on the stack.
    build = b"ctorch._utils\n_rebuild_tensor_v2\n(N}V__defaults__\n(I1\ntstb."
    with pytest.raises(ValueError, match="not a dictionary of tensors"):
        read_places(write_pickle(tmp_path / "x.bin", build), [])
    assert len(read_all(TENSORS)) > 5


@pytest.mark.parametrize(
    ("pickled", "text"),
    [
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({"epoch": 3}), "its entry 'epoch' is a int"),
        (pickle.dumps({1: 2}), "its entry 1 is a int"),
        (b"", "data.pkl is not read"),
        (b"\x80\x02}q\x00(X\x10", "data.pkl is not read"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(NI0\n((tR.", "data.pkl is not read"),
        # Room for two to the 32 objects, in five bytes.
        (b"Nr\xff\xff\xff\xff.", "holds a NoneType"),
    ],
    ids=range(7),
)
def test_what_is_no_dictionary_of_tensors_is_said(tmp_path, pickled, text):
    with pytest.raises(ValueError, match=text):
        read_places(write_pickle(tmp_path / "x.bin", pickled), [])


def test_a_tensor_that_reaches_behind_its_storage_is_named(tmp_path):
    with zipfile.ZipFile(TENSORS) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        for name, content in members.items():
            is_storage = name.endswith("data/1")
            archive.writestr(name, content[:-4] if is_storage else content)
    with pytest.raises(ValueError, match=r"'float32' .* behind its storage"):
        read_places(tmp_path / "x.bin", [])


def test_a_compressed_or_missing_storage_is_named(tmp_path):
    with zipfile.ZipFile(TENSORS) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for kind, text in (("missing", "is missing"), ("compressed", "is compressed")):
        with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
            for name, content in members.items():
                if name.endswith("data/0"):
                    if kind == "compressed":
                        archive.writestr(name, content, zipfile.ZIP_DEFLATED)
                    continue
                archive.writestr(name, content)
        with pytest.raises(ValueError, match=f"'float64' {text}"):
            read_places(tmp_path / "x.bin", [])


def _mutations(content, count):
    generator = random.Random(0)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(len(content))] = generator.randrange(256)
        yield bytes(changed)


@pytest.mark.parametrize(
    "count", (100, pytest.param(2000, marks=pytest.mark.slow)), ids=str
)
def test_broken_bytes_are_read_or_refused_and_nothing_else(tmp_path, count):
    path, num_refused = tmp_path / "x.bin", 0
    with zipfile.ZipFile(TENSORS) as archive:
        pickled = archive.read("tensors/data.pkl")
        storages = {n: archive.read(n) for n in archive.namelist() if "data/" in n}
    for changed in _mutations(pickled, count):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("tensors/data.pkl", changed)
            for name, content in storages.items():
                archive.writestr(name, content)
        try:
            read_all(path)
        except ValueError:
            num_refused += 1
    for changed in _mutations(TENSORS.read_bytes(), count):
        path.write_bytes(changed)
        try:
            read_all(path)
        except ValueError:
            num_refused += 1
    assert num_refused > count // 4
