"""Rows of replay on the disk are restored to the bit, whatever the disk does meanwhile."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cerl import draw
from cerl.data import EnvSpec, Row
from cerl.record import checkpoint, files, pieces, spool
from cerl.record.checkpoint import Checkpoints
from cerl.replay import Replay
from cerl.state import CheckpointError

CPU = torch.device("cpu")
SEEDS, ENVS, ROWS = 2, 3, 20
WIDTH = SEEDS * ENVS * (2 * 4 + 8 + 4 + 1 + 1 + 2 + 4)  # bytes of a time index


def ring(*, rows: int = ROWS, remembered: int = 1, seeds: int = SEEDS, **options) -> Replay:
    spec = EnvSpec("any", (2,), torch.float32, 4, ENVS, 1, True, True)
    keys = draw.seed_keys(range(seeds))
    capacity = rows * ENVS
    return Replay(spec, keys=keys, capacity=capacity, device=CPU, remembered=remembered, **options)


def add(replay: Replay, count: int, *stores: Checkpoints) -> None:
    """New rows that depend on their number alone, each followed by what the loop does."""
    for _ in range(count):
        g = torch.Generator().manual_seed(int(replay.total))
        lead = (len(replay.keys), ENVS)
        action = torch.randint(0, 4, lead, generator=g)
        flags = torch.rand(2, *lead, generator=g) < 0.5
        obs, state = torch.randn(2, *lead, 2, generator=g)
        row = Row(obs, action, torch.randn(lead, generator=g), flags[0], flags[1], action)
        replay.add(row, state[..., :1])
        replay.misses += 1
        for store in stores:
            store.stream()


def pieces_of(rows: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(spool, "PIECE", rows * WIDTH)


def assert_same(one: Replay, two: Replay) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def restored(folder: Path, **options) -> Replay:
    other = ring(**options)
    Checkpoints(folder, other).restore(checkpoint.newest(folder))
    return other


def names(folder: Path) -> list[str]:
    place = folder / pieces.FOLDER
    return sorted(path.name for path in place.iterdir()) if place.exists() else []


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("piece", [1, 4, 9, ROWS])
@pytest.mark.parametrize("fill", [0, 1, 7, ROWS, ROWS + 7, 7 * ROWS + 3])
def test_a_ring_comes_back_bit_for_bit_at_every_fill(tmp_path, monkeypatch, fill, piece):
    pieces_of(piece, monkeypatch)
    replay = ring()
    store = Checkpoints(tmp_path, replay)
    add(replay, fill, store)
    store.save({"iteration": fill})
    assert_same(replay, restored(tmp_path))
    # And once more after it went on from there.
    other = ring()
    loaded = checkpoint.newest(tmp_path)
    again = Checkpoints(tmp_path, other)
    again.restore(loaded)
    for count in (3, 0, 5):
        for each, its in ((replay, store), (other, again)):
            add(each, count, its)
        again.save({"iteration": fill})
        assert_same(replay, other)
        assert_same(other, restored(tmp_path))
    for each in (store, again):
        each.close()


def test_rows_without_a_state_and_in_host_memory_do_too(tmp_path, monkeypatch):
    pieces_of(3, monkeypatch)
    replay = ring(remembered=0, placement="host")
    store = Checkpoints(tmp_path, replay)
    add(replay, 31, store)
    store.save({})
    store.close()
    assert_same(replay, restored(tmp_path, remembered=0, placement="host"))


def test_only_new_rows_are_written_and_few_files_stay(tmp_path, monkeypatch):
    pieces_of(4, monkeypatch)
    replay = ring()
    store = Checkpoints(tmp_path, replay)
    assert store.spool is not None
    sizes = []
    write = pieces.write

    def counted(path, rows):
        sizes.append(len(rows) // WIDTH)
        return write(path, rows)

    monkeypatch.setattr(pieces, "write", counted)
    for _ in range(20):
        add(replay, 3, store)
        store.save({})
        # What two checkpoints and the ring need: whole pieces, and a tail each.
        assert len(names(tmp_path)) <= ROWS // 4 + 1 + 3
        assert set(names(tmp_path)) >= store.spool.names
    assert sizes.count(4) == 60 // 4 and max(sizes) == 4
    store.close()


def test_a_ring_smaller_than_a_piece_is_one_file(tmp_path):
    replay = ring()
    store = Checkpoints(tmp_path, replay)
    for count in (5, 30, 0):
        add(replay, count, store)
        store.save({})
    store.close()
    assert len(names(tmp_path)) == 1  # both checkpoints were made of the same rows
    assert_same(replay, restored(tmp_path))


def test_training_waits_for_a_slow_disk_and_its_rows_arrive(tmp_path, monkeypatch):
    pieces_of(2, monkeypatch)
    replay, go = ring(), threading.Semaphore(0)
    store = Checkpoints(tmp_path, replay)
    write = pieces.write

    def slow(path, rows):
        go.acquire()
        return write(path, rows)

    monkeypatch.setattr(pieces, "write", slow)
    add(replay, 2 * spool.STAGED, store)  # as many as may be under way
    waits = threading.Thread(target=add, args=(replay, 2, store))
    waits.start()
    waits.join(0.05)
    assert waits.is_alive()
    for _ in range(20):
        go.release()
    waits.join()
    add(replay, 1, store)
    store.save({})
    store.close()
    assert_same(replay, restored(tmp_path))


class Disk:
    """Room for some writes; each fails halfway once they are used up."""

    def __init__(self, room: int) -> None:
        self.room, self.error = room, errno.ENOSPC

    def create(self, path: Path):
        disk, file = self, CREATE(path)
        write = file.write

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, data):
                disk.room -= 1
                if disk.room < 0:
                    write(bytes(data)[: len(data) // 2])
                    raise OSError(disk.error, os.strerror(disk.error))
                return write(data)

        return Full()


CREATE = files.create


@pytest.mark.parametrize("room", range(0, 36, 3))
def test_a_full_disk_loses_nothing_and_the_next_save_works(tmp_path, monkeypatch, room):
    pieces_of(4, monkeypatch)
    replay = ring()
    store = Checkpoints(tmp_path, replay)
    add(replay, 21, store)
    store.save({"iteration": 1})
    at_first = ring()
    add(at_first, 21)
    disk, failed = Disk(room), 0
    monkeypatch.setattr(files, "create", disk.create)
    for _ in range(6):
        add(replay, 1)
        for call in (store.stream, lambda: store.save({"iteration": 2})):
            try:
                call()
            except CheckpointError as error:
                assert "disk is full" in str(error)
                failed += 1
        if disk.room < 0:
            break
    if failed and checkpoint.load(tmp_path).state["iteration"] == 1:
        assert_same(at_first, restored(tmp_path))
    disk.room = 10**9
    add(replay, 2, store)
    store.save({"iteration": 3})
    store.close()
    assert_same(replay, restored(tmp_path))


def test_rows_that_the_disk_refused_are_written_later(tmp_path, monkeypatch):
    pieces_of(4, monkeypatch)
    replay, disk = ring(), Disk(0)
    disk.error = errno.EROFS
    store = Checkpoints(tmp_path, replay)
    monkeypatch.setattr(files, "create", disk.create)
    refused = 0
    for _ in range(3 * ROWS):  # longer than the ring holds the first of them
        try:
            add(replay, 1, store)
        except CheckpointError as error:
            assert "could not be written (Read-only file system)" in str(error)
            refused += 1
    assert 2 <= refused <= 3 * ROWS // 4  # once a piece, not once a row
    assert checkpoint.files(tmp_path) == [] and names(tmp_path) == []
    disk.room = 10**9
    store.save({})
    store.close()
    assert_same(replay, restored(tmp_path))


def test_pieces_that_somebody_deleted_are_written_again(tmp_path, monkeypatch):
    pieces_of(4, monkeypatch)
    replay = ring()
    store = Checkpoints(tmp_path, replay)
    add(replay, 23, store)
    store.save({})
    for name in names(tmp_path)[2:]:
        (tmp_path / pieces.FOLDER / name).unlink()
    store.save({})
    store.close()
    assert_same(replay, restored(tmp_path))


def two_checkpoints(folder: Path, patch: pytest.MonkeyPatch, more: int = 2) -> tuple[Replay, Path]:
    """A ring as the older of two checkpoints holds it; the newer one's file."""
    pieces_of(4, patch)
    replay, old = ring(), ring()
    store = Checkpoints(folder, replay)
    add(replay, 22, store)
    add(old, 22)
    store.save({"iteration": 1})
    add(replay, more, store)
    file = store.save({"iteration": 2})
    store.close()
    return old, file


def test_a_piece_damaged_at_any_byte_falls_back_to_the_whole_checkpoint(tmp_path, monkeypatch):
    old, _ = two_checkpoints(tmp_path, monkeypatch)
    before = everything(tmp_path)
    older, newer = (checkpoint._intact(f, CPU).replay for f in checkpoint.files(tmp_path))
    assert older is not None and newer is not None
    (name,) = newer.names - older.names
    tail = tmp_path / pieces.FOLDER / name
    whole = tail.read_bytes()
    for at in range(0, len(whole), 17):
        tail.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        reason = pieces.damage(tmp_path, newer)
        assert reason is not None and "checksum" in reason
    for spoilt in (whole[:-1], whole + b"x", b""):
        tail.write_bytes(spoilt)
        assert "bytes, got" in (pieces.damage(tmp_path, newer) or "")
    loaded = checkpoint.newest(tmp_path)
    (sentence,) = loaded.damaged
    assert loaded.state["iteration"] == 1 and name in sentence
    assert "set aside as damaged-checkpoint-000002.pt" in sentence
    aside = tmp_path / "damaged-checkpoint-000002.pt"
    assert aside.read_bytes() == before["checkpoint-000002.pt"]
    assert name in (tmp_path / "damaged-checkpoint-000002.pt.txt").read_text()
    assert_same(old, restored(tmp_path))
    assert checkpoint.newest(tmp_path).damaged == []


def test_where_every_checkpoint_needs_a_damaged_piece_nothing_is_changed(tmp_path, monkeypatch):
    two_checkpoints(tmp_path, monkeypatch)
    shared = tmp_path / pieces.FOLDER / names(tmp_path)[2]
    shared.unlink()
    before = everything(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.newest(tmp_path)
    text = str(caught.value)
    assert text.count("the file is gone") == 2 and "--log.no-save-replay" in text
    assert "checkpoint-000002.pt is intact except for its rows of replay" in text
    assert everything(tmp_path) == before
    # The instruction works, and looking at the state needs no rows.
    assert checkpoint.newest(tmp_path, replay=False).state["iteration"] == 2
    assert checkpoint.load(tmp_path).state["iteration"] == 2


@pytest.mark.parametrize("more", [2, 9, 3 * ROWS])
def test_both_checkpoints_keep_what_they_need(tmp_path, monkeypatch, more):
    old, file = two_checkpoints(tmp_path, monkeypatch, more)
    file.write_bytes(b"lost")
    assert_same(old, restored(tmp_path))


def test_what_dead_writers_left_is_collected(tmp_path, monkeypatch):
    old, _ = two_checkpoints(tmp_path, monkeypatch)
    needed = names(tmp_path)
    place = tmp_path / pieces.FOLDER
    (place / "000000000000-000000000004-0123456789ab.rows").write_bytes(b"half")
    (place / "notes.txt").write_text("mine")
    restored(tmp_path)
    assert names(tmp_path) == [*needed, "notes.txt"]


def test_checkpoints_without_replay_write_no_pieces(tmp_path, monkeypatch):
    old, _ = two_checkpoints(tmp_path, monkeypatch)
    store = Checkpoints(tmp_path, None)
    for _ in range(2):
        store.stream()
        store.save({"iteration": 3})
    store.close()
    assert names(tmp_path) == [] and checkpoint.newest(tmp_path).replay is None


def test_rows_of_other_options_are_refused(tmp_path):
    replay = ring()
    store = Checkpoints(tmp_path, replay)
    add(replay, 5, store)
    store.save({})
    store.close()
    for options in ({"rows": 19}, {"remembered": 0}, {"seeds": 3}, {"remembered": 2}):
        with pytest.raises(CheckpointError, match="other options"):
            restored(tmp_path, **options)


def test_nothing_is_read_or_written_through_links(tmp_path, monkeypatch):
    pieces_of(4, monkeypatch)
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    run.mkdir()
    mine = outside / "000000000000-000000000004-0123456789ab.rows"
    mine.write_text("mine")
    (run / pieces.FOLDER).symlink_to(outside)
    replay = ring()
    store = Checkpoints(run, replay)
    add(replay, 3, store)
    with pytest.raises(CheckpointError, match="could not be written"):
        store.save({})
    assert os.listdir(outside) == [mine.name] and mine.read_text() == "mine"
    (run / pieces.FOLDER).unlink()
    store.save({"iteration": 1})
    add(replay, 30, store)
    store.save({"iteration": 2})
    store.close()
    rows = checkpoint.load(run).replay
    assert rows is not None
    for path in (run / pieces.FOLDER / names(run)[-1], run / pieces.FOLDER):
        with linked(path, outside):
            assert "through links" in (pieces.damage(run, rows) or "")
    file = run / "checkpoint-000002.pt"
    with linked(file, outside), pytest.raises(CheckpointError, match="through links"):
        checkpoint.load(file)
    with linked(file, outside):
        (sentence,) = checkpoint.newest(run).damaged
        assert "through links" in sentence and (outside / "away").is_file()
        os.rename(run / "damaged-checkpoint-000002.pt", file)
    assert checkpoint.newest(run).state["iteration"] == 2


@contextlib.contextmanager
def linked(path: Path, outside: Path) -> Iterator[None]:
    """Something lies outside meanwhile, and a link to it in its place."""
    path.rename(outside / "away")
    path.symlink_to(outside / "away")
    yield
    path.unlink()
    (outside / "away").rename(path)


def test_what_a_run_needs_on_the_disk_is_bounded(tmp_path, monkeypatch):
    pieces_of(3, monkeypatch)
    for every in (3, 40):
        folder = tmp_path / str(every)
        folder.mkdir()
        replay = ring()
        store = Checkpoints(folder, replay)
        state = {"net": torch.randn(5000)}
        bound, most = store.needs(state, every=every, iterations=90), 0
        overhead = 5_000  # of three archives and of pieces' headers
        for step in range(1, 91):
            add(replay, 1, store)
            if step % every == 0:
                store.save(state)
            most = max(most, sum(path.stat().st_size for path in folder.rglob("*.*")))
        store.close()
        assert most <= bound + overhead <= 3 * most
    assert Checkpoints(tmp_path, None).needs(state, every=1, iterations=9) == 3 * 20_000


def test_a_step_that_the_thread_could_not_take_is_no_silent_loss(tmp_path, monkeypatch):
    pieces_of(4, monkeypatch)
    replay = ring()
    store = Checkpoints(tmp_path, replay)

    def broken(path, rows):
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "write", broken)
        add(replay, 4, store)
        with pytest.raises(MemoryError):
            store.save({})
    store.save({})
    store.close()
    assert_same(replay, restored(tmp_path))


def test_a_manifest_that_names_other_files_or_gaps_is_refused(tmp_path, monkeypatch):
    two_checkpoints(tmp_path, monkeypatch)
    of = checkpoint.newest(tmp_path).replay
    assert of is not None
    good = of.state()
    assert pieces.manifest(good) == of
    name, first, last, size, checksum = good["pieces"][0]
    for changes in (
        {"total": of.total + 1},
        {"total": -1},
        {"rows": 0},
        {"rows": True},
        {"misses": [2**70]},
        {"layout": {"obs": 3}},
        {"pieces": good["pieces"][1:]},
        {"pieces": good["pieces"][:1] + good["pieces"][2:]},
        {"pieces": [("../../etc/passwd", first, last, size, checksum), *good["pieces"][1:]]},
        {"pieces": [(name, first, last, size), *good["pieces"][1:]]},
        {"pieces": [(name, first - 2**60, last, size, checksum), *good["pieces"][1:]]},
        {"more": 1},
    ):
        with pytest.raises(CheckpointError, match=r"checkpoint\.replay"):
            pieces.manifest({**good, **changes})
    with pytest.raises(CheckpointError):
        pieces.manifest([])


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["device", "host"])
def test_rows_on_a_gpu_come_back_bit_for_bit(tmp_path, monkeypatch, placement):
    pieces_of(4, monkeypatch)
    device = torch.device("cuda")
    spec = EnvSpec("any", (2,), torch.float32, 4, ENVS, 1, True, True)
    plain = ring()
    rings = [
        Replay(
            spec,
            keys=draw.seed_keys(range(SEEDS), device=device),
            capacity=ROWS * ENVS,
            device=device,
            remembered=1,
            placement=placement,
        )
        for _ in range(2)
    ]
    store = Checkpoints(tmp_path, rings[0])
    for _ in range(33):
        add(plain, 1)
        at = (int(plain.total) - 1) % ROWS
        row = Row(*(getattr(plain, name)[:, at].to(device) for name in Row._fields))
        assert plain.state is not None
        rings[0].add(row, plain.state[:, at].to(device))
        store.stream()
    rings[0].misses += 33
    store.save({})
    store.close()
    Checkpoints(tmp_path, rings[1]).restore(checkpoint.newest(tmp_path))
    for each in rings:
        for name, value in plain.state_dict().items():
            assert torch.equal(value, each.state_dict()[name].cpu()), name
