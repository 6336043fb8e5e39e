"""Checkpoints: exact, whole or absent, checked when read, and clear about what went wrong."""

import errno
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from cerl import checkpoint
from cerl.checkpoint import CheckpointError


def make_state(step: int) -> dict:
    g = torch.Generator().manual_seed(step)
    return {
        "iteration": step,
        "learner": {
            "net": OrderedDict(weight=torch.randn(2, 3, 40, 40, generator=g)),
            "moments": [torch.rand(2, 3, generator=g), torch.rand(5, generator=g).bfloat16()],
            "counter": torch.tensor(2**40 + step),
        },
        "replay": torch.randint(0, 255, (50, 84), dtype=torch.uint8, generator=g),
        "wall": 1.5,
        "name": "run",
        "pair": (1, None),
        "raw": b"\x00\xff",
        "flag": True,
        "empty": torch.zeros(0, 3),
    }


def assert_equal(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    file = checkpoint.save(tmp_path, make_state(7))
    assert_equal(checkpoint.load(tmp_path), make_state(7))
    assert_equal(checkpoint.load(file, map_location=torch.device("cpu")), make_state(7))


def test_a_folder_gives_its_newest_checkpoint_and_keeps_two(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, make_state(step))
    assert names(tmp_path) == ["checkpoint-000003.pt", "checkpoint-000004.pt"]
    assert checkpoint.load(tmp_path)["iteration"] == 4
    checkpoint.save(tmp_path, make_state(5), keep=1)
    assert names(tmp_path) == ["checkpoint-000005.pt"]


def test_numbers_beyond_six_digits_still_sort_by_value(tmp_path):
    first = checkpoint.save(tmp_path, make_state(1))
    first.rename(tmp_path / "checkpoint-999999.pt")
    checkpoint.save(tmp_path, make_state(2))
    assert names(tmp_path) == ["checkpoint-1000000.pt", "checkpoint-999999.pt"]
    assert checkpoint.load(tmp_path)["iteration"] == 2


def test_loaded_tensors_outlive_the_deletion_of_their_file(tmp_path):
    checkpoint.save(tmp_path, make_state(1))
    loaded = checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, make_state(2), keep=1)
    assert_equal(loaded, make_state(1))


@pytest.mark.parametrize(
    ("bad", "where"),
    [
        ({"env": {"rng": [np.zeros(3)]}}, "env.rng.0: .* got ndarray"),
        ({"a": {"device": torch.device("cpu")}}, "a.device: .* got device"),
        ({"step": checkpoint}, "step: .* got module"),
    ],
)
def test_a_state_that_could_not_be_loaded_is_refused_before_writing(tmp_path, bad, where):
    with pytest.raises(ValueError, match=where):
        checkpoint.save(tmp_path, bad)
    assert names(tmp_path) == []


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def test_a_flipped_bit_anywhere_in_the_data_is_noticed(tmp_path):
    file = checkpoint.save(tmp_path, make_state(1))
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        spans = [(info.header_offset, info.file_size) for info in archive.infolist()]
    for start, size in spans:
        name, extra = struct.unpack_from("<HH", whole, start + 26)
        data = start + 30 + name + extra
        for at in {data, data + size // 2, data + size - 1} if size else ():
            file.write_bytes(whole)
            flip(file, at)
            with pytest.raises(CheckpointError, match="damaged"):
                checkpoint.load(tmp_path)
    file.write_bytes(whole)
    assert_equal(checkpoint.load(tmp_path), make_state(1))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_names_the_intact_one_before_it(tmp_path, share):
    first = checkpoint.save(tmp_path, make_state(1))
    second = checkpoint.save(tmp_path, make_state(2))
    data = second.read_bytes()
    second.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path)
    text = str(caught.value)
    assert str(second) in text and f"{first} is intact" in text and "damaged" in text
    # The instruction works.
    second.rename(tmp_path / "broken")
    assert checkpoint.load(tmp_path)["iteration"] == 1


def test_with_two_damaged_checkpoints_no_intact_one_is_promised(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, make_state(step)).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no intact checkpoint came before it"):
        checkpoint.load(tmp_path)


def test_empty_folder_missing_file_and_foreign_archives_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(tmp_path / "checkpoint-000001.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(CheckpointError, match="no checkpoint of cerl"):
        checkpoint.load(tmp_path / "other.zip")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of cerl"):
        checkpoint.load(tmp_path / "other.pt")
    torch.save({"format": 99, "cerl": "9.9", "state": {}}, tmp_path / "new.pt")
    with pytest.raises(CheckpointError, match="format 99, written by cerl 9.9"):
        checkpoint.load(tmp_path / "new.pt")


class SmallDisk(checkpoint._File):
    """A disk with room for a few thousand bytes."""

    written = 0

    def write(self, data):
        self.written += memoryview(data).nbytes
        if self.written > 20_000:
            self.error = OSError(errno.ENOSPC, "No space left on device")
            raise self.error
        return super().write(data)


def test_a_disk_that_fills_up_midway_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = checkpoint.save(tmp_path, make_state(1))
    before = old.read_bytes()
    monkeypatch.setattr(checkpoint, "_File", SmallDisk)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(tmp_path, make_state(2))
    text = str(caught.value)
    needed = sum(t.nbytes for _, t in checkpoint._leaves(make_state(2), "") if hasattr(t, "nbytes"))
    assert checkpoint._size(needed) in text and "are free" in text and old.name in text
    assert names(tmp_path) == [old.name] and old.read_bytes() == before
    monkeypatch.undo()
    checkpoint.save(tmp_path, make_state(2))
    assert checkpoint.load(tmp_path)["iteration"] == 2


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, make_state(1))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1234))
    monkeypatch.setattr(checkpoint, "_write", lambda *_: pytest.fail("nothing may be written"))
    with pytest.raises(CheckpointError, match=r"the disk is full.*1\.2 kB are free"):
        checkpoint.save(tmp_path, make_state(2))
    assert names(tmp_path) == ["checkpoint-000001.pt"]


def test_an_interrupt_while_writing_leaves_no_temporary_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, make_state(1))

    def interrupted(path, content):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, make_state(2))
    assert names(tmp_path) == ["checkpoint-000001.pt"]
    assert checkpoint.load(tmp_path)["iteration"] == 1


def test_a_folder_that_is_gone_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoint.save(tmp_path / "gone", make_state(1))
