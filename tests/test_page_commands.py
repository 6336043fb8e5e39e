"""Commands on pages: each one in a block of README.md, CONTRIBUTING.md or docs/ is read without
complaint by the parser of its command. Nothing is trained or measured."""

import functools
import importlib
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro

from cerl import arguments, bench
from cerl.__main__ import COMMANDS
from cerl.bench import compare
from cerl.config import ConfigError, load
from cerl.config.form import overridden, written_out
from cerl.sweep import grid, study
from cerl.sweep.cells import cells

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = "minatar/bootdqn"  # the preset of the runs that pages call RUN
# A kind of head that exists only once the reader has made the change that CONTRIBUTING.md shows.
TAUGHT = ["train", "catch/bootdqn", "--ensemble.heads", "pessimistic"]


def blocks(text: str) -> Iterator[str]:
    """Lines of the fenced blocks, and of those that are indented by four blanks or more."""
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def commands(page: Path) -> list[list[str]]:
    text = re.sub(r" *\\\n\s*", " ", page.read_text())  # joins lines that a backslash continues
    lines = [line for line in blocks(text) if line.startswith("cerl ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def own_presets() -> dict[str, str]:
    """The YAML files that README.md shows, by name."""
    shown = re.findall(
        r"^    # ([\w.]+\.yaml):.*\n((?:    .*\n)+)", (ROOT / "README.md").read_text(), re.M
    )
    return {name: re.sub(r"^    ", "", text, flags=re.MULTILINE) for name, text in shown}


def check_train(words: list[str]) -> None:
    train, rest = arguments.filled(COMMANDS["train"], words, prog="cerl train")
    if train.resume is not None:  # pyright: ignore[reportAttributeAccessIssue]
        arguments.changes(load(RUN), rest, folder=Path("RUN"))
        return
    name = train.preset  # pyright: ignore[reportAttributeAccessIssue]
    name = "minatar/cerl" if name in ("PRESET", "RUN/config.yaml") else name
    overridden(name, [word for word in rest if word not in arguments.HELP], prog="cerl train")


def check_sweep(words: list[str]) -> None:
    sweep, rest = arguments.filled(COMMANDS["sweep"], words, prog="cerl sweep")
    if sweep.cancel:  # pyright: ignore[reportAttributeAccessIssue]
        assert not rest
        return
    studies = study.asked(sweep.presets, "cuda")  # pyright: ignore[reportAttributeAccessIssue]
    axes = [*grid.read(sweep.grid), *grid.zipped(sweep.zip)]  # pyright: ignore[reportAttributeAccessIssue]
    assert cells(studies, words=rest, envs=sweep.envs, grid=axes)  # pyright: ignore[reportAttributeAccessIssue]


def check_bench(words: list[str]) -> None:
    name, *rest = words
    function = getattr(
        importlib.import_module(f"cerl.bench.{bench.BENCHMARKS[name][0]}"), name.replace("-", "_")
    )
    if name == "compare":
        plan, rest = arguments.filled(compare.Plan, rest, prog="cerl bench compare")
        check_bench([plan.name, *rest])
        return

    @functools.wraps(function)
    def measures_nothing(**_: object) -> None:
        pass

    rest = [word for word in rest if word not in arguments.HELP]
    rest = written_out(rest, typing.get_type_hints(function))
    tyro.cli(measures_nothing, args=rest, config=(tyro.conf.OmitArgPrefixes,))


def check(words: list[str]) -> None:
    """Raises: ConfigError or SystemExit if `cerl` would refuse the words."""
    name, *rest = words
    if name in ("train", "sweep", "bench"):
        {"train": check_train, "sweep": check_sweep, "bench": check_bench}[name](rest)
        return
    _, rest = arguments.filled(COMMANDS[name], rest, prog=f"cerl {name}")
    if name == "eval":
        arguments.of_evaluation(load(RUN), rest, prog="cerl eval")
    elif name == "fork":
        arguments.of_fork(load(RUN), rest, folder=Path("RUN"))
    else:
        arguments.refuse_unknown(name, rest)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train minatar/cerl --ensemble.member 3", "members"),
        ("train --resume RUN --optim.lr 1e-4", "optim.lr"),
        ("sweep curse --grid replay.capacities=5", "capacity"),
        ("report runs/a --lst 3", "--lst"),
        ("eval RUN --episode 3", "--episode"),
        ("fork RUN --at 400k --env.name pong", "env.name"),
        ("bench update --cals 3", "--cals"),
    ],
)
def test_a_wrong_command_is_noticed(words, told, capsys):
    with pytest.raises((ConfigError, SystemExit)) as caught:
        check(shlex.split(words))
    printed = capsys.readouterr()
    assert told in f"{caught.value}{printed.out}{printed.err}"


def test_blocks_and_continued_lines_are_read(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "cerl trains\n\n```\ncerl list\n```\n\n    cerl status a \\\n      --all  # x\n"
    )
    assert commands(page) == [["list"], ["status", "a", "--all"]]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_blocks_are_accepted(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in own_presets().items():
        (tmp_path / name).write_text(text)
    for words in commands(page):
        if words == TAUGHT:
            continue
        try:
            check(words)
        except (ConfigError, SystemExit) as error:
            pytest.fail(f"{page.name}: cerl {shlex.join(words)}: {error}")
