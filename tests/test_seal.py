"""config.yaml of a run: sealed, told from files of others, changed only where it may be."""

import hashlib
import os
import random
import stat
from pathlib import Path

import pytest
import torch
import yaml

from cerl.config import ConfigError, load
from cerl.record import files, results, seal, trust, versions
from cerl.record import folder as folder_module
from cerl.record.folder import change, check_fixed, dump, fixed, fixed_hash, load_file

RUN = load("catch/cerl", {"seeds": [0, 1]})
MODULE = load("gym/cartpole", {"env.name": "my_tasks:Mine-v0"})


@pytest.fixture
def folder(tmp_path):
    dump(RUN, tmp_path / "config.yaml")
    return tmp_path


@pytest.fixture
def other_user(monkeypatch, tmp_path_factory):
    """Makes the process another user's, with another key or none at all."""

    def become():
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))

    return become


def text_of(folder):
    return (folder / "config.yaml").read_bytes()


def refused(content):
    with pytest.raises(ConfigError, match="changed or cut since the run wrote it: expected"):
        seal.unsealed(content, Path("config.yaml"))


def test_a_sealed_config_is_read_back_and_seals_the_same_text_the_same(folder):
    assert load_file(folder / "config.yaml") == RUN
    before = text_of(folder)
    dump(RUN, folder / "config.yaml")
    assert text_of(folder) == before
    assert yaml.safe_load(before)["preset"] == "catch/cerl"


def test_a_config_that_was_cut_anywhere_is_refused(folder):
    whole = text_of(folder)
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    assert len(ends) > 100
    ends += random.Random(0).sample(range(len(whole)), 200)
    for end in {0, *ends, len(whole) - 1} - {len(whole)}:
        refused(whole[:end])


def test_every_changed_added_and_missing_byte_is_refused(folder):
    whole = text_of(folder)
    for at in range(len(whole)):
        refused(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for changed in (whole + b"\n", b"\n" + whole, whole + whole, whole[1:], whole.upper()):
        refused(changed)


def test_the_refusal_says_what_to_do_instead(folder):
    path = folder / "config.yaml"
    path.write_bytes(text_of(folder).replace(b"gamma: 0.99", b"gamma: 0.5"))
    with pytest.raises(ConfigError) as caught:
        load_file(path)
    words = f"cerl train --resume {folder} --schedule.steps 2_000_000"
    assert words in str(caught.value) and f"cerl train {path}" in str(caught.value)
    path.write_text("seeds: [1]\n")
    with pytest.raises(ConfigError, match="a seal in its last line, got none"):
        load_file(path)


def test_a_config_is_a_plain_file_of_modest_size(folder):
    path = folder / "config.yaml"
    path.rename(folder / "elsewhere")
    path.symlink_to("elsewhere")
    with pytest.raises(ConfigError, match="got a link"):
        load_file(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="expected a plain file"):
        load_file(path)
    path.unlink()
    path.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(ConfigError, match="expected at most 1,048,576 bytes"):
        load_file(path)


def test_the_file_is_the_seal_of_the_whole_text_by_its_definition(folder):
    whole = text_of(folder)
    text, line = whole[: whole.rindex(b"# seal: ")], whole[whole.rindex(b"# seal: ") :]
    _, _, code, digest = line.decode().split()
    assert digest == hashlib.sha256(text + f"# seal: {code} ".encode()).hexdigest()
    assert len(code) == 64


def test_the_key_is_made_once_and_only_its_owner_may_read_it(other_user):
    other_user()
    key = seal.key()
    assert len(key) == 32 and seal.key() == key
    path = seal.key_file()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["key"]
    other_user()
    assert seal.key() != key


@pytest.mark.parametrize("how", ["readable", "short", "link", "folder", "no state folder"])
def test_a_key_that_others_may_know_is_no_key(other_user, folder, how):
    other_user()
    path = seal.key_file()
    seal.key()
    if how == "readable":
        path.chmod(0o640)
    elif how == "short":
        path.write_bytes(b"x" * 31)
    elif how == "link":
        path.rename(path.with_name("other"))
        path.symlink_to("other")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.unlink()
        path.parent.rmdir()
        path.parent.write_text("")
    with pytest.raises(OSError, match="key|file|File exists"):
        seal.key()
    dump(RUN, folder / "config.yaml")
    assert b"# seal: - " in text_of(folder)
    assert seal.opened(folder / "config.yaml").own is False
    assert load_file(folder / "config.yaml") == RUN
    dump(MODULE, folder / "config.yaml")
    with pytest.raises(ConfigError, match="without your key.*pass --trust"):
        trust.check(MODULE, folder, trusted=False)


def test_processes_that_make_the_key_at_once_agree(other_user, monkeypatch):
    other_user()
    create, first = files.create, []

    def slow(path, **options):
        if not first:
            first.append(None)
            first[0] = seal.key()  # another process, meanwhile
        return create(path, **options)

    monkeypatch.setattr(files, "create", slow)
    assert seal.key() == first[0]


def test_ones_own_run_may_import_a_module_and_another_users_may_not(folder, other_user):
    dump(MODULE, folder / "config.yaml")
    trust.check(MODULE, folder, trusted=False)
    other_user()
    with pytest.raises(ConfigError, match="import the module my_tasks and run its code; .*--trust"):
        trust.check(MODULE, folder, trusted=False)
    trust.check(MODULE, folder, trusted=True)
    trust.check(load("gym/cartpole"), folder, trusted=False)


def test_a_forged_mark_is_refused_as_a_strangers(folder):
    dump(MODULE, folder / "config.yaml")
    whole = text_of(folder)
    text = whole[: whole.rindex(b"# seal: ")]
    for code in (b"0" * 64, b"-", b"", "é".encode()):
        head = text + b"# seal: " + code + b" "
        seal_line = hashlib.sha256(head).hexdigest().encode() + b"\n"
        (folder / "config.yaml").write_bytes(head + seal_line)
        assert load_file(folder / "config.yaml") == MODULE
        with pytest.raises(ConfigError, match="not made by you"):
            trust.check(MODULE, folder, trusted=False)


def test_a_game_of_somebody_s_own_is_code_and_so_are_its_arguments():
    run = load("game/ddqn", {"env.name": "my_games:corridor", "env.kwargs": {"map": "a/b.py"}})
    assert list(trust.code(run)) == [
        "import the module my_games and run its code",
        "hand 'a/b.py' to the game's function (env.kwargs.map)",
    ]


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"map_name": "8x8", "size": 3, "slippery": False}, None),
        ({"env_id": "evil:Task-v0"}, "'evil:Task-v0'"),
        ({"nested": {"parts": ["plain", "os.system"]}}, "env.kwargs.nested.parts.1"),
        ({"xml_file": "/etc/passwd"}, "'/etc/passwd'"),
    ],
)
def test_words_for_a_constructor_that_may_name_code_or_files_are_told(kwargs, told):
    run = load("gym/cartpole")
    run = run.model_copy(update={"env": run.env.model_copy(update={"kwargs": kwargs})})
    found = " ".join(trust.code(run))
    assert (told in found) if told else found == ""


def test_options_that_may_change_are_changed_and_sealed_anew(folder):
    changes = {"schedule.steps": 50_000, "log.every": 7, "device": "cpu"}
    run = change(folder, changes)
    assert run == load("catch/cerl", {"seeds": [0, 1], **changes})
    assert load_file(folder / "config.yaml") == run
    assert seal.opened(folder / "config.yaml").own
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_changes_are_checked_before_anything_is_written(folder):
    before = text_of(folder)
    for changes, message in (
        (
            {"optim.lr": 1.0},
            "optim.lr cannot change in a run; expected one of schedule.steps",
        ),
        ({"log.every": 5, "seeds": [3]}, "seeds cannot change"),
        ({"schedule.steps": 3}, "schedule.steps: the run would end before its first update"),
        ({"log.evry": 3}, "log.evry: no such key; did you mean log.every"),
    ):
        for attempt in (change, lambda at, c: load_file(at / "config.yaml", c)):
            with pytest.raises(ConfigError, match=message):
                attempt(folder, changes)
    assert text_of(folder) == before
    assert load_file(folder / "config.yaml", {"log.every": 5}).log.every == 5
    assert text_of(folder) == before


def test_a_strangers_run_stays_a_strangers_when_it_is_changed(folder, other_user):
    other_user()
    change(folder, {"log.every": 5})
    assert not seal.opened(folder / "config.yaml").own


def test_options_that_may_change_are_no_part_of_what_a_run_is(folder):
    mark = fixed_hash(folder)
    assert mark == fixed_hash(RUN)
    change(folder, {"schedule.steps": 50_000, "log.save_replay": False, "threads": 2})
    assert fixed_hash(folder) == mark
    check_fixed(folder, mark, where="a")
    for key, value in (("seeds", [0, 7]), ("optim.lr", 1.0), ("preset", "mine")):
        other = load("catch/cerl", {"seeds": [0, 1], key: value})
        assert fixed_hash(other) != mark


def test_a_lengthened_run_is_one_configuration_in_rows(folder):
    code = results.config_hash(RUN)
    run = change(folder, {"schedule.steps": 50_000, "log.every": 3, "threads": 2})
    assert results.config_hash(run) == code
    assert results.config_hash(load("catch/cerl", {"schedule.update_every": 8})) != code


def test_a_file_of_a_newer_cerl_with_more_options_has_the_same_mark(folder):
    mark = fixed_hash(folder)
    tree = RUN.model_dump(mode="json")
    del tree["loss"]["mask_probability"], tree["compile"], tree["log"]["every"]
    path = folder / "config.yaml"
    files.write_text(path, folder_module._text(tree, path))
    older = fixed_hash(folder)
    assert older != mark and load_file(path).compile is RUN.compile
    change(folder, {"log.every": 9})
    assert fixed_hash(folder) == older


def test_what_another_config_made_is_refused_with_the_options_that_differ(folder):
    made = fixed(load("catch/cerl", {"seeds": [0, 7], "optim.lr": 0.5}))
    with pytest.raises(ConfigError) as caught:
        check_fixed(folder, made, where="checkpoint-000001.pt")
    text = str(caught.value)
    assert text.startswith("checkpoint-000001.pt: expected a file made with")
    assert "optim.lr 0.5, seeds [0, 7] (config.yaml: 0.001, [0, 1])" in text
    with pytest.raises(ConfigError, match="made with another config.yaml"):
        check_fixed(folder, "0" * 64, where="x")
    check_fixed(folder, fixed(RUN), where="x")


def entries(folder):
    return yaml.safe_load((folder / "versions.yaml").read_text())


def test_every_session_adds_an_entry_and_says_what_differs(folder, monkeypatch):
    assert versions.record_versions(folder, torch.device("cpu")) == []
    assert versions.record_versions(folder, torch.device("cpu")) == []
    first, second = entries(folder)
    assert first["device"] == "cpu" and first["time"].endswith("Z")
    assert set(first) >= {"cerl", "python", "machine", "torch", "numpy"}
    assert {**first, "time": 0} == {**second, "time": 0}
    now = versions.versions() | {"torch": "2.99"}
    monkeypatch.setattr(versions, "versions", lambda: now)
    monkeypatch.setattr(versions, "device_kind", lambda device: "NVIDIA H200")
    old = first["torch"]
    assert versions.record_versions(folder, torch.device("cpu")) == [
        "resumed on NVIDIA H200 instead of cpu: bits may differ from here on",
        f"resumed under torch 2.99 instead of {old}: bits may differ from here on",
    ]
    assert len(entries(folder)) == 3


def test_an_entry_of_the_kind_before_lists_is_taken_over(folder):
    (folder / "versions.yaml").write_text("cerl: 0.0.1\ntorch: 2.11\n")
    said = versions.record_versions(folder, torch.device("cpu"))
    assert f"resumed under cerl {versions.__version__} instead of 0.0.1" in said[0]
    assert entries(folder)[0] == {"cerl": "0.0.1", "torch": 2.11} and len(entries(folder)) == 2


@pytest.mark.parametrize(
    "content",
    [b"\xff\x00", b"a: [", b"- 3\n", b"x", b"- {torch: [1]}\n", b"[" * 3000, b"{a: 1, a: 2}", b""],
)
def test_a_versions_file_that_cannot_be_read_is_kept_aside(folder, content):
    (folder / "versions.yaml").write_bytes(content)
    [said] = versions.record_versions(folder, torch.device("cpu"))
    [aside] = folder.glob("damaged-*")
    assert aside.name in said and aside.read_bytes() == content
    assert len(entries(folder)) == 1


def test_a_link_in_place_of_the_versions_is_not_written_through(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "file"
    outside.write_text("precious")
    (folder / "versions.yaml").symlink_to(outside)
    assert "got a link" in versions.record_versions(folder, torch.device("cpu"))[0]
    assert outside.read_text() == "precious" and len(entries(folder)) == 1
