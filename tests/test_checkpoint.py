"""Checkpoints: they restore exactly, are whole or absent, are checked, and have clear errors."""

import collections
import contextlib
import errno
import os
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mutate import mutations

from cerl import state, wiring
from cerl.config import load, preset
from cerl.record import checkpoint
from cerl.record.checkpoint import Loaded
from cerl.record.folder import new_folder
from cerl.run import Run
from cerl.state import CheckpointError, Free, match, numbers


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
    for loaded in (
        checkpoint.load(tmp_path),
        checkpoint.load(file, map_location=torch.device("cpu")),
        checkpoint.newest(tmp_path),
    ):
        assert_equal(loaded.state, make_state(7))
        assert loaded.file == file and loaded.damaged == [] and loaded.replay is None


def test_a_folder_gives_its_newest_checkpoint_and_keeps_two(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, make_state(step))
    assert names(tmp_path) == ["checkpoint-000003.pt", "checkpoint-000004.pt"]
    assert checkpoint.load(tmp_path).state["iteration"] == 4
    checkpoint.save(tmp_path, make_state(5), keep=1)
    assert names(tmp_path) == ["checkpoint-000005.pt"]


def test_numbers_beyond_six_digits_still_sort_by_value(tmp_path):
    first = checkpoint.save(tmp_path, make_state(1))
    first.rename(tmp_path / "checkpoint-999999.pt")
    checkpoint.save(tmp_path, make_state(2))
    assert names(tmp_path) == ["checkpoint-1000000.pt", "checkpoint-999999.pt"]
    assert checkpoint.load(tmp_path).state["iteration"] == 2
    assert checkpoint.newest(tmp_path).state["iteration"] == 2


def test_loaded_tensors_outlive_the_deletion_of_their_file(tmp_path):
    checkpoint.save(tmp_path, make_state(1))
    loaded = checkpoint.load(tmp_path).state
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
    assert_equal(checkpoint.load(tmp_path).state, make_state(1))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_gives_way_to_the_intact_one_before_it(tmp_path, share):
    first = checkpoint.save(tmp_path, make_state(1))
    second = checkpoint.save(tmp_path, make_state(2))
    data = second.read_bytes()
    cut = data[: int(len(data) * share)]
    second.write_bytes(cut)
    with pytest.raises(CheckpointError, match=f"damaged .*; {first} is intact"):
        checkpoint.load(second)
    looked = checkpoint.load(tmp_path)
    assert looked.state["iteration"] == 1 and looked.file == first
    assert "checkpoint-000002.pt is damaged" in looked.damaged[0]
    assert names(tmp_path) == [first.name, second.name]  # looking changes nothing
    loaded = checkpoint.newest(tmp_path)
    assert loaded.state["iteration"] == 1 and loaded.file == first
    (sentence,) = loaded.damaged
    assert sentence.startswith("checkpoint-000002.pt is damaged") and "not a whole" in sentence
    assert sentence.endswith("it was set aside as damaged-checkpoint-000002.pt")
    assert (tmp_path / "damaged-checkpoint-000002.pt").read_bytes() == cut
    assert "not a whole archive" in (tmp_path / "damaged-checkpoint-000002.pt.txt").read_text()
    # The run goes on from there, and neither is lost.
    assert checkpoint.save(tmp_path, make_state(3)) == second
    assert checkpoint.newest(tmp_path).damaged == []


def test_what_was_set_aside_is_never_overwritten(tmp_path):
    checkpoint.save(tmp_path, make_state(1))
    for content in (b"one", b"two", b"three"):
        checkpoint.save(tmp_path, make_state(2)).write_bytes(content)
        assert checkpoint.newest(tmp_path).state["iteration"] == 1
    aside = [path for path in sorted(tmp_path.glob("damaged-*")) if path.suffix != ".txt"]
    assert [path.read_bytes() for path in aside] == [b"one", b"two", b"three"]


def test_with_two_damaged_checkpoints_both_are_named_and_nothing_is_changed(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, make_state(step)).write_bytes(b"nothing")
    for look in (checkpoint.load, checkpoint.newest):
        with pytest.raises(CheckpointError) as caught:
            look(tmp_path)
        text = str(caught.value)
        assert "no intact checkpoint: checkpoint-000002.pt is damaged" in text
        assert "checkpoint-000001.pt is damaged" in text
        assert names(tmp_path) == ["checkpoint-000001.pt", "checkpoint-000002.pt"]
    with pytest.raises(CheckpointError, match="no intact checkpoint came before it"):
        checkpoint.load(tmp_path / "checkpoint-000002.pt")


def test_empty_folder_missing_file_and_foreign_archives_are_named(tmp_path):
    for look in (checkpoint.load, checkpoint.newest):
        with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
            look(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(tmp_path / "checkpoint-000001.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(CheckpointError, match="no checkpoint of cerl"):
        checkpoint.load(tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(10**6))
    with pytest.raises(CheckpointError, match="its content is compressed"):
        checkpoint.load(tmp_path / "bomb.zip")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of cerl"):
        checkpoint.load(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("found", "says"),
    [(4, "format 4, written by cerl 0.1"), (99, "format 99"), (2**40, "format unknown")],
    ids=("older", "newer", "huge"),
)
def test_another_format_is_neither_used_nor_called_damaged(tmp_path, found, says):
    checkpoint.save(tmp_path, make_state(1))
    file = tmp_path / "checkpoint-000002.pt"
    torch.save({"format": found, "cerl": "0.1\x1b[31m", "state": {}}, file)
    for look in (checkpoint.load, checkpoint.newest):
        with pytest.raises(CheckpointError, match=says) as caught:
            look(tmp_path)
        assert "\x1b" not in str(caught.value) and "reads format 5" in str(caught.value)
    assert names(tmp_path) == ["checkpoint-000001.pt", "checkpoint-000002.pt"]


class Posix:
    def __reduce__(self):
        return os.system, ("touch ran",)


class Odd:
    def __reduce__(self):
        return collections.deque, ()


@pytest.mark.parametrize(
    ("trap", "says"),
    [
        (Posix(), r"it would run code \(posix\.system\)"),
        (Odd(), r"code \(collections\.deque\)"),
    ],
)
def test_a_pickle_that_asks_for_code_is_refused_in_plain_words(tmp_path, monkeypatch, trap, says):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "checkpoint-000001.pt"
    torch.save({"format": 5, "state": trap}, file)
    with pytest.raises(CheckpointError, match=says) as caught:
        checkpoint.newest(tmp_path)
    text = str(caught.value)
    assert "which a checkpoint never does; refused" in text
    assert "weights_only" not in text and text.isprintable()
    assert names(tmp_path) == [file.name]


def test_names_in_a_foreign_archive_are_shown_without_control_characters(tmp_path):
    file = tmp_path / "checkpoint-000001.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a\x1b[2J\nb", "hello")
    data = file.read_bytes()
    file.write_bytes(data.replace(b"hello", b"jello"))
    with pytest.raises(CheckpointError, match="checksum of") as caught:
        checkpoint.load(file)
    assert str(caught.value).isprintable()


def test_what_is_no_plain_file_is_damaged_and_what_may_not_be_read_is_not(tmp_path, monkeypatch):
    first = checkpoint.save(tmp_path, make_state(1))
    os.mkfifo(tmp_path / "checkpoint-000002.pt")  # opening it would wait for ever
    (tmp_path / "checkpoint-000003.pt").mkdir()
    loaded = checkpoint.newest(tmp_path)
    assert loaded.file == first and len(loaded.damaged) == 2
    assert all("expected a plain file" in sentence for sentence in loaded.damaged)

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("cerl.record.files.read", refused)
    with pytest.raises(CheckpointError, match="cannot be read \\(Permission denied"):
        checkpoint.newest(tmp_path)
    assert first.is_file()


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
    needed = sum(t.nbytes for _, t in state.leaves(make_state(2)) if hasattr(t, "nbytes"))
    assert checkpoint.in_words(needed) in text and "are free" in text and old.name in text
    assert names(tmp_path) == [old.name] and old.read_bytes() == before
    monkeypatch.undo()
    checkpoint.save(tmp_path, make_state(2))
    assert checkpoint.load(tmp_path).state["iteration"] == 2


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

    def interrupted(file, content):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, make_state(2))
    assert names(tmp_path) == ["checkpoint-000001.pt"]
    assert checkpoint.load(tmp_path).state["iteration"] == 1


def test_a_folder_that_is_gone_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoint.save(tmp_path / "gone", make_state(1))


def expected() -> dict:
    return {"net": {"w": torch.zeros(2, 3)}, "list": [torch.zeros(1), 5], "n": 1.0, "any": Free()}


def got(**changes) -> dict:
    return {**expected(), "any": ["what", "ever"], **changes}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"net": {"w": torch.zeros(2, 4)}},
            r"net.w of shape \[2, 3\] and float32, got shape \[2",
        ),
        ({"net": {"w": torch.zeros(2, 3).long()}}, r"got shape \[2, 3\] and int64"),
        ({"net": {"w": "text"}}, "float32, got str"),
        ({"net": {"w": torch.zeros(2, 3, device="meta")}}, "without content"),
        ({"net": {"w": torch.eye(2).to_sparse()}}, "a tensor of layout sparse_coo"),
        ({"net": {"w": torch.zeros(2, 3, requires_grad=True)}}, "requires gradients"),
        ({"net": {}}, "expected net.w, got none"),
        ({"net": None}, "expected net with 1 keys, got None"),
        ({"\x1b[2J": 1}, r"expected nothing else in its root, got '\\x1b\[2J'"),
        ({"list": [torch.zeros(1)]}, "a list of length 2, got a list of length 1"),
        ({"list": (torch.zeros(1), 5)}, "got a tuple of length 2"),
        ({"list": [torch.zeros(1), True]}, "list.1 to be int, got bool"),
        ({"n": 1}, "n to be float, got int"),
    ],
)
def test_a_tree_that_differs_is_refused_with_the_place(changes, says):
    match(expected(), got())
    with pytest.raises(CheckpointError, match=says) as caught:
        match(expected(), got(**changes))
    assert str(caught.value).startswith("checkpoint: ") and str(caught.value).isprintable()


def test_five_differences_are_listed_and_a_free_part_checks_itself():
    trees = ({str(k): 0 for k in range(9)}, {str(k): "" for k in range(9)})
    with pytest.raises(CheckpointError) as caught:
        match(*trees, "here")
    text = str(caught.value)
    assert text.startswith("here: ") and text.count("got str") == 5 and "; and more." in text
    scores = {"latest": Free(numbers)}
    match(scores, {"latest": {"train": 1.0, "vote": 2}})
    for bad in ({"train": "1"}, {3: 1.0}, [1.0], None):
        with pytest.raises(CheckpointError, match="latest: expected numbers by name"):
            match(scores, {"latest": bad})


TINY = {
    "seeds": (3, 1),
    "device": "cpu",
    "ensemble": {"members": 2},
    "net": {"hidden": (8,)},
    "replay": {"capacity": 40, "batch": 4, "start": 8},
    "eval": {"episodes": 1},
}
GRU = {
    "env": {"envs": 2, "length": 5},
    "replay": {"start": 16},
    "encoder": {"width": 8, "context": 2, "learnt": 3, "sampling": "uniform"},
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("catch/cerl", {}),
        ("memory/gru", GRU),
        ("gym/cartpole", {}),
        ("point_mass/cerl", {}),
    ],
)
def test_a_run_meets_no_spoilt_structure_behind_the_check(tmp_path, name, changes):
    config = load(name, preset.merged(TINY, {**changes, "out": str(tmp_path)}))
    folder = new_folder(config)
    ours, fresh = (Run(config, wiring.assemble(config), folder) for _ in range(2))
    for _ in range(12):
        ours.parts.collector.step()
    ours.parts.learner.update()
    state = ours.snapshot()
    template = fresh.template()
    match(template, state)
    # Simulators check their own state: the tests of each family hold that.
    beside = () if ours.parts.env.spec.resident else (("collector", "env"),)
    refused = 0
    for what, spoilt in mutations(state, 75, beside=beside):
        try:
            match(template, spoilt)
        except CheckpointError as error:
            assert str(error).isprintable() and len(str(error)) < 2000, what
            refused += 1
            continue
        # What passes the check does no harm, or says what is wrong.
        with contextlib.suppress(ValueError, RuntimeError):
            fresh.load(Loaded(spoilt, folder, [], None))
    assert refused >= 60
    for each in (ours, fresh):
        wiring.close(each.parts)
