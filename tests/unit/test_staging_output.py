"""Where an output file may go."""

import os

import pytest

from bundle.staging.output import output_problem


@pytest.mark.parametrize("name", ["new.agb", "old.agb", "link.agb", "dangling.agb"])
def test_a_file_and_a_new_name_will_do(tmp_path, name):
    (tmp_path / "old.agb").write_bytes(b"x")
    (tmp_path / "link.agb").symlink_to("old.agb")
    (tmp_path / "dangling.agb").symlink_to("nowhere")
    assert output_problem(tmp_path / name) == ""


def test_nothing_else_will(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("folder", "pipe", "to-pipe", "device", "file/x", "no/x", ".", "x" * 300):
        assert output_problem(tmp_path / name), name
    assert output_problem(tmp_path / "a\0b")
