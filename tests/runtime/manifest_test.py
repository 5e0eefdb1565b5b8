import pytest

from realjax.runtime import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "data").write_bytes(b"0123456789")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "later").write_bytes(b"1")
    manifest.write(tmp_path, leave_out=("later",))
    return tmp_path


def test_a_whole_folder_has_no_damage(folder):
    assert manifest.find_damage(folder) is None


def test_what_was_left_out_may_change(folder):
    (folder / "later").write_bytes(b"22")
    (folder / "new").write_bytes(b"3")
    assert manifest.find_damage(folder) is None


def test_a_missing_file_is_named(folder):
    (folder / "empty").unlink()
    assert manifest.find_damage(folder) == f"{folder / 'empty'} is missing."


def test_a_shorter_file_is_named_with_both_sizes(folder):
    (folder / "a" / "data").write_bytes(b"012")
    assert manifest.find_damage(folder, checksums=False) == (
        f"{folder / 'a' / 'data'} is damaged: it has 3 bytes instead of 10."
    )


def test_a_changed_byte_shows_in_the_checksum_only(folder):
    (folder / "a" / "data").write_bytes(b"0123406789")
    assert manifest.find_damage(folder, checksums=False) is None
    assert "its bytes are not those written" in str(manifest.find_damage(folder))


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1', '{"a/data": 10}'])
def test_a_broken_list_is_damage(folder, text):
    (folder / manifest.FILE).write_text(text)
    assert "damaged" in str(manifest.find_damage(folder))


def test_a_folder_without_a_list_is_damaged(tmp_path):
    assert manifest.find_damage(tmp_path) == f"{tmp_path / manifest.FILE} is missing."


def test_readers_share_the_files_and_find_what_one_would(folder):
    (folder / "a" / "data").write_bytes(b"9876543210")
    found = [manifest.find_damage(folder, share=(n, 2)) for n in (0, 1)]
    assert [damage for damage in found if damage] == [manifest.find_damage(folder)]


def test_what_others_described_is_listed_unread(folder, tmp_path):
    known = manifest.describe(folder, folder / "a")
    assert known == {"a/data": [10, 2793719750]}
    assert manifest.describe(folder, folder / "none") == {}
    before = (folder / manifest.FILE).read_text()
    manifest.write(folder, leave_out=("later",), known=known)
    assert (folder / manifest.FILE).read_text() == before
    manifest.write(folder, leave_out=("later",), known={"a/data": [10, 0]})
    assert "a/data is damaged" in str(manifest.find_damage(tmp_path))
