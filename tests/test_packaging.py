"""The contents of an installation; pins, tree and pyproject.toml agree."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

from cerl import __version__
from cerl.config import preset

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_packages_are_the_tree():
    found = {"cerl", *(f"cerl.{name}" for name in ("agents", "envs", "configs"))}
    for top, name in (("cerl", "cerl"), ("agents", "cerl.agents"), ("envs", "cerl.envs")):
        for path in (ROOT / top).rglob("__init__.py"):
            below = path.parent.relative_to(ROOT / top).parts
            if not (top == "cerl" and below[:1] in (("agents",), ("envs",), ("configs",))):
                found.add(".".join((name, *below)))
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_folder_with_code_is_a_package():
    for top in ("cerl", "agents", "envs"):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_links_show_the_same_names_uninstalled():
    for name in ("agents", "envs", "configs"):
        assert os.readlink(ROOT / "cerl" / name) == f"../{name}"


def test_pins_are_exact_unique_and_satisfy_every_requirement():
    pinned = {}
    for pin in pins():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, pin
        assert plain(pin.name) not in pinned, pin
        pinned[plain(pin.name)] = specifier.version
    wanted = list(PROJECT["project"]["dependencies"])
    for extra in PROJECT["project"]["optional-dependencies"].values():
        wanted += extra
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pinned[plain(requirement.name)]), requirement


def test_pins_are_closed_under_dependencies():
    """Everything that an installed pinned package needs here is pinned too."""
    pinned = {plain(pin.name) for pin in pins()}
    for name in sorted(pinned):
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, needs):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            cuda = plain(requirement.name).startswith(("nvidia-", "cuda-"))
            assert cuda or plain(requirement.name) in pinned, f"{name} needs {requirement}"


def test_the_repository_holds_no_runs_but_golden_ones():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git repository")
    checkpoints = [path for path in done.stdout.splitlines() if path.endswith(".pt")]
    assert [path for path in checkpoints if not path.startswith("tests/golden/")] == []


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from the source distribution of a copy of the tree."""
    folder = tmp_path_factory.mktemp("build")
    unwanted = shutil.ignore_patterns(
        ".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "docs", "tests"
    )
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=unwanted)
    build = (
        "import sys; from setuptools import build_meta; "
        "print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
    )

    def built(kind, tree):
        line = [sys.executable, "-W", "ignore", "-c", build, kind, str(folder)]
        done = subprocess.run(line, cwd=tree, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return folder / done.stdout.splitlines()[-1]

    source = built("build_sdist", folder / "tree")
    with tarfile.open(source) as archive:
        if hasattr(tarfile, "data_filter"):  # Python 3.11.2 has none, and 3.12 warns without
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder / "source")
    return built("build_wheel", folder / "source" / f"cerl-{__version__}")


@pytest.mark.slow
def test_wheel_holds_code_presets_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    page = (ROOT / "cerl" / "report" / "page").glob("page.*")  # the look of the HTML page
    wanted = {"cerl/py.typed", *(path.relative_to(ROOT).as_posix() for path in page)}
    for top, inside in (("cerl", "cerl"), ("agents", "cerl/agents"), ("envs", "cerl/envs")):
        for path in (ROOT / top).rglob("*.py"):
            below = path.relative_to(ROOT / top)
            if top != "cerl" or below.parts[0] not in ("agents", "envs", "configs"):
                wanted.add(f"{inside}/{below.as_posix()}")
    for pattern in ("*.py", "*.csv", "*.yaml", "*/*.yaml"):
        for path in (ROOT / "configs").glob(pattern):
            wanted.add(f"cerl/configs/{path.relative_to(ROOT / 'configs').as_posix()}")
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_metadata_of_the_wheel_name_dependencies_extras_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        found = Metadata.from_email(archive.read(f"{folder}/METADATA"), validate=True)
        commands = archive.read(f"{folder}/entry_points.txt").decode()
    project = PROJECT["project"]
    assert (found.name, str(found.version)) == ("cerl", __version__)
    assert str(found.requires_python) == str(
        Requirement(f"x{project['requires-python']}").specifier
    )
    extras = project["optional-dependencies"]
    assert sorted(found.provides_extra or ()) == sorted(extras)
    wanted = {None: project["dependencies"], **extras}
    needs = found.requires_dist or []
    for extra, lines in wanted.items():
        for line in map(Requirement, lines):
            # A requirement of an extra is marked with it, so it must not apply without it.
            applies = {"extra": extra or "", "python_version": "3.11", "platform_system": "Linux"}
            assert any(
                need.name == line.name
                and need.specifier == line.specifier
                and need.extras == line.extras
                and (need.marker is None) == (extra is None and line.marker is None)
                and (need.marker is None or need.marker.evaluate(applies))
                for need in needs
            ), line
    assert len(needs) == sum(map(len, wanted.values()))
    assert commands.split() == ["[console_scripts]", "cerl", "=", "cerl.__main__:main"]


@pytest.mark.slow
def test_installed_command_runs_from_anywhere(wheel, tmp_path):
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    line = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    install = subprocess.run(
        [*line, "install", "-q", "--no-deps", "--no-index", str(wheel)],
        capture_output=True,
        text=True,
    )
    assert install.returncode == 0, install.stderr
    # The dependencies come from the packages at hand, cerl itself from the new environment alone.
    site = Path(pytest.__file__).resolve().parent.parent
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(site)}

    def run(*words):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # `-P` keeps the folder at hand off the path; the installed copy must not be the checkout.
    where = run(str(python), "-P", "-c", "import cerl, cerl.envs.minatar; print(cerl.__file__)")
    assert Path(where.strip()).is_relative_to(home)
    command = str(home / "bin" / "cerl")
    assert run(command, "--version") == f"cerl {__version__}\n"
    listed = run(command, "list", "presets")
    assert [line.split()[0] for line in listed.splitlines()] == preset.presets()
    # All data of the package: configs, scores of a human player, and the look of a page.
    assert "studies:" in run(command, "list") and "minatar-5" in run(command, "list", "envs")
    code = "from cerl.report import statistics; print(len(statistics.human_random()))"
    assert int(run(str(python), "-P", "-c", code)) > 50
    examined = run(command, "doctor")
    assert str(home) in examined and "equal to the bit" in examined and "fault" not in examined
    options = ("--schedule.steps", "500", "--replay.start", "100", "--log.every", "250")
    trained = run(command, "train", "catch/ddqn", *options, "--eval.every", "250")
    folder = trained.splitlines()[-1]
    assert (tmp_path / folder / "finished").exists()
    run(command, "report", folder, "--html")
    page = (tmp_path / folder / "report.html").read_text()
    css = (ROOT / "cerl" / "report" / "page" / "page.css").read_text()
    assert css.strip().splitlines()[0] in page
