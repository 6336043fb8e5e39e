"""Files are replaced whole, and never through a link."""

import os

import pytest

from cerl.record import files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    files.write_text(path, "old")

    def fails(file):
        file.write(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fails)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    files.write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    link = tmp_path / "folder" / "a"
    link.parent.mkdir()
    link.symlink_to(outside)
    files.write_text(link, "new")
    assert outside.read_text() == "mine" and not link.is_symlink() and link.read_text() == "new"


def test_only_plain_files_are_read(tmp_path):
    path, link, pipe = tmp_path / "a", tmp_path / "link", tmp_path / "pipe"
    path.write_text("mine")
    link.symlink_to(path)
    os.mkfifo(pipe)
    with files.read(path) as file:
        assert file.read() == b"mine"
    for other, says in ((link, "a link"), (pipe, "a plain file"), (tmp_path, "a plain file")):
        with pytest.raises(OSError, match=says):
            files.read(other)
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "gone")


def test_nothing_is_created_or_appended_through_a_link(tmp_path):
    outside, link = tmp_path / "outside", tmp_path / "link"
    link.symlink_to(outside)
    with pytest.raises(OSError):
        files.create(link)
    with pytest.raises(OSError):
        files.append(link)
    assert not outside.exists()


def test_a_folder_to_write_into_is_no_link(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="link to"):
        files.own_folder(tmp_path / "link")
    assert files.own_folder(tmp_path / "new").is_dir()


def test_what_dead_writers_left_is_swept(tmp_path):
    left = files.temporary(tmp_path / "a")
    files.create(left).close()
    (tmp_path / "b").write_text("stays")
    files.sweep_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["b"]
