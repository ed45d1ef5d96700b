"""Files are whole or as they were: whatever fails, nothing half-written takes a name."""

import os
import stat

import pytest

from bundle.durable import write_beside, write_new


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_another_whole(tmp_path):
    path = tmp_path / "state"
    write_beside(path, b"one", 0o644)
    write_beside(path, b"two")
    assert (path.read_bytes(), names(tmp_path)) == (b"two", ["state"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside(tmp_path):
    path = tmp_path / "state"
    write_beside(path, b"one")
    with pytest.raises(TypeError):
        write_beside(path, None)
    assert (path.read_bytes(), names(tmp_path)) == (b"one", ["state"])


def test_a_link_beside_is_not_followed(tmp_path):
    path, other = tmp_path / "state", tmp_path / "other"
    other.write_bytes(b"kept")
    (tmp_path / f".state.{os.getpid()}").symlink_to(other)
    with pytest.raises(OSError, match="symbolic link"):
        write_beside(path, b"two")
    assert other.read_bytes() == b"kept"


def test_a_new_file_has_its_mode_and_is_never_another(tmp_path):
    path = tmp_path / "key"
    write_new(path, b"one", 0o604)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    with pytest.raises(FileExistsError):
        write_new(path, b"two")
    assert path.read_bytes() == b"one"


def test_a_new_file_that_cannot_be_written_is_not_there(tmp_path):
    with pytest.raises(TypeError):
        write_new(tmp_path / "key", None)
    assert names(tmp_path) == []
