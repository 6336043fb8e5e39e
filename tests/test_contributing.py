"""CONTRIBUTING.md and the glossary: changes apply and train, paths and words exist."""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import cerl
from cerl.bench import BENCHMARKS
from cerl.config import preset
from cerl.config.form import overridden

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
HEAD, ENVIRONMENT, NUMBER = re.findall(r"^### .*?\n(.*?)(?=^##)", PAGE, re.DOTALL | re.MULTILINE)
DIFF = re.compile(r"^```diff\n(.*?)^```", re.DOTALL | re.MULTILINE)
(HEAD_DIFF,), (NUMBER_DIFF,) = DIFF.findall(HEAD), DIFF.findall(NUMBER)
# Runs several command lines in one process.
MAIN = """
import json, sys
from cerl.__main__ import main
for words in json.loads(sys.argv[1]):
    try:
        code = main(words)
    except SystemExit as end:  # of --help
        code = end.code
    assert not code, words
"""
SMALL = ["--device", "cpu", "--threads", "1", "--out", "runs"]


def applied(diff: str, root: Path) -> set[str]:
    """Applies a diff to the files under a folder. Returns: the paths that it changes.

    Lines are found by what they say and not by their numbers, since other lines come and go.
    """
    paths = set()
    for part in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
        path, name, body = re.fullmatch(r"(\S+)\n\+\+\+ b/(\S+)\n(.*)", part, re.DOTALL).groups()  # pyright: ignore
        assert path == name
        text = (root / path).read_text()
        for counts, lines in re.findall(r"^@@ (.*?) @@.*?\n(.*?)(?=^@@|\Z)", body, re.M | re.S):
            lines = [line or " " for line in lines.splitlines()]  # editors cut the blank of " "
            old = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
            new = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
            sizes = [int(size) for size in re.findall(r",(\d+)", counts)]
            assert sizes == [old.count("\n"), new.count("\n")], f"{path}: wrong counts @@ {counts}"
            assert text.count(old) == 1, f"{path}: not found once:\n{old}"
            text = text.replace(old, new)
        (root / path).write_text(text)
        paths.add(path)
    return paths


def room(path: str) -> str:
    """The room of a file: its package, or itself where it is a file of cerl/."""
    parts = Path(path).parts
    return "/".join(parts[:2]) if parts[0] == "cerl" else parts[0]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree, whose parent folder is a user's own."""
    for name in ("cerl", "agents", "envs", "configs"):
        shutil.copytree(
            ROOT / name,
            tmp_path / "tree" / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return tmp_path / "tree"


def run(tree: Path, section: str, *more: str, first: Sequence[list[str]] = ()) -> tuple[Path, str]:
    """Runs the command of a section with more options. Returns: the run folder, what was printed.

    Args: first, command lines to run before it in the same process.
    """
    (line,) = re.findall(r"^    cerl (train [^#\n]*)", section, re.MULTILINE)
    commands = [*first, [*line.split(), *SMALL, *more]]
    done = subprocess.run(
        [sys.executable, "-c", MAIN, json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": str(tree)},
        cwd=tree.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tree.parent / "runs").iterdir()
    return folder, done.stdout


def test_each_change_touches_one_room_at_most(tree):
    for diff in (HEAD_DIFF, NUMBER_DIFF):
        assert len({room(path) for path in applied(diff, tree)}) == 1
    assert not DIFF.search(ENVIRONMENT)


def test_a_diff_that_does_not_fit_is_noticed(tree):
    for old, new in (("every.mean", "every.median"), (",12 @@", ",13 @@")):
        wrong = HEAD_DIFF.replace(old, new)
        assert wrong != HEAD_DIFF
        with pytest.raises(AssertionError, match="not found once|wrong counts"):
            applied(wrong, tree)


def test_the_new_kind_takes_the_smallest_next_value(tree):
    applied(HEAD_DIFF, tree)
    spec = importlib.util.spec_from_file_location("kinds", tree / "cerl/head_kinds.py")
    assert spec and spec.loader
    kinds = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kinds)

    class Values:
        members, heads = 3, 1
        next = torch.randn(2, 3, 4, 1)  # [S, N, B, J]

        def take(self, source):
            owners = [source(i, 0).owner for i in range(3)]
            return self.next[:, owners]

    target = kinds.HEAD_KINDS["pessimistic"].target(Values())
    assert target.shape == (2, 3, 4, 1)
    for s in range(2):
        for b in range(4):
            assert set(target[s, :, b, 0].tolist()) == {min(Values.next[s, :, b, 0].tolist())}


@pytest.mark.slow
def test_the_new_kind_of_value_head_is_an_option_and_trains(tree):
    applied(HEAD_DIFF, tree)
    folder, printed = run(
        tree,
        HEAD,
        *("--seeds", "0", "--schedule.steps", "1_000", "--log.every", "500"),
        *("--eval.every", "1_000", "--eval.episodes", "2"),
        first=[["train", "catch/bootdqn", "--help"]],
    )
    assert "pessimistic: one head, to the smallest" in re.sub(r"[\s│]+", " ", printed)
    assert "heads: pessimistic" in (folder / "config.yaml").read_text()
    metrics = pq.read_table(folder / "metrics.parquet", filters=[("name", "=", "loss")])
    last = [row["value"] for row in metrics.to_pylist() if row["step"] == 1_000]
    assert len(last) == 5 and all(0 < value < 10 for value in last)


@pytest.mark.slow
def test_the_game_of_one_s_own_is_played_and_learnt(tree):
    ((name, code),) = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", ENVIRONMENT, re.M | re.S)
    assert 10 <= len(code.split("class State")[1].splitlines()) <= 25
    (tree.parent / name).write_text(code)
    small = ("--seeds", "0", "--schedule.steps", "2_000", "--explore.decay", "1_000")
    folder, _ = run(tree, ENVIRONMENT, *small)
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    assert {row["env"] for row in rows} == {"game/my_game:rules"}
    explored = next(row for row in rows if row["policy"] == "train")
    played = [row for row in rows if row["policy"] == "individual"][-1]
    assert played["return"] >= 0.9 and played["length"] < explored["length"] <= 20


@pytest.mark.slow
def test_the_new_number_is_in_the_metrics(tree):
    applied(NUMBER_DIFF, tree)
    folder, _ = run(tree, NUMBER)
    (code,) = re.findall(r'^    python -c "(.*)"$', NUMBER, re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code.replace("RUN", str(folder)))
    assert "feature_size" in out.getvalue()
    values = pq.read_table(folder / "metrics.parquet", filters=[("name", "=", "feature_size")])
    assert values.num_rows == 2 and all(value > 0 for value in values["value"].to_pylist())


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", "docs/joints.md"])
def test_files_and_links_of_a_page_exist(page):
    text = (ROOT / page).read_text()
    top = r"(?:cerl|agents|envs|configs|docs|tests)/"
    paths = {*re.findall(rf"`({top}[\w/.-]*)`", text)}
    links = {link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link}
    missing = [path for path in paths if not (ROOT / path).exists()]
    missing += [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert len(paths) + len(links) > 3 and not missing


def test_the_table_of_rooms_names_every_room():
    table = PAGE[PAGE.index("| room |") : PAGE.index("## How our code reads")]
    named = {path.rstrip("/") for path in re.findall(r"`([\w/.]+)`", table)}
    files = {path.name: path for path in (ROOT / "cerl").iterdir() if not path.is_symlink()}
    inner = {
        f"cerl/{name}" for name, path in files.items() if path.suffix == ".py" or path.is_dir()
    }
    inner -= {"cerl/__pycache__", "cerl/__init__.py"}
    assert len(inner) > 30 and {*inner, "agents", "envs", "configs"} <= named


def test_every_word_of_the_glossary_is_used_and_explained_once():
    page = ROOT / "docs" / "glossary.md"
    words = re.findall(r"^- \*\*(.*?)\*\*: ", page.read_text(), re.MULTILINE)
    assert 60 <= len(words) == len({*words})
    texts = [path for top in ("cerl", "agents", "envs") for path in (ROOT / top).rglob("*.py")]
    texts += [path for path in (ROOT / "docs").rglob("*.md") if path != page]
    texts = [path for path in texts if path != ROOT / "cerl" / "__init__.py"]
    text = " ".join(" ".join(path.read_text().split()) for path in texts)
    plain = re.sub(r"[ #]+", " ", text).casefold()  # a word may be broken over lines of a comment
    unused = [word for word in words if not re.search(rf"\b{word}(s|es)?\b", plain)]
    assert not unused


def test_the_front_page_of_the_code_explains_words_of_the_glossary():
    legend = cerl.__doc__ or ""
    page = (ROOT / "docs" / "glossary.md").read_text()
    words = re.findall(r"^    (\w[\w ]*?)  +\S", legend.split("Words")[1].split("\n\n")[1], re.M)
    assert len(words) == 12 and all(f"**{word}**" in page for word in words)


def test_the_commands_of_the_pages_are_accepted():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    lines = [
        line.split(" #")[0].split()
        for page in pages
        for line in re.findall(r"^ *cerl ([^`\n]*)$", page.read_text(), re.MULTILINE)
    ]
    trained = [
        [word for word in words[1:] if word != "--help"]
        for words in lines
        if words[0] == "train" and not re.match(r"--resume|PRESET|my\.yaml", words[1])
    ]
    assert len(trained) > 10
    for name, *options in trained:
        overridden(name, options, prog="cerl train")
    for _, *words in [words for words in lines if words[0] == "sweep"]:
        for name in itertools.takewhile(lambda word: not word.startswith("-"), words):
            assert name in {*preset.presets(), *preset.studies()}, name
    for _, name, *_ in [words for words in lines if words[0] == "bench"]:
        assert name in BENCHMARKS, name
