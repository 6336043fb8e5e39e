"""What belongs to a release: version, changelog, citation, and how a public host runs the tests."""

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cerl import __version__

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    return version


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == __version__
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert numbers == sorted(numbers, reverse=True)


def test_the_version_stands_in_one_place():
    said = {ROOT / "CITATION.cff", ROOT / "CHANGELOG.md", ROOT / "cerl" / "__init__.py"}
    for path in [*ROOT.glob("*.toml"), *ROOT.glob("*.py"), *(ROOT / "cerl").glob("*.py")]:
        if path not in said:
            assert f'"{__version__}"' not in path.read_text(), path


def test_the_citation_has_the_keys_that_the_format_requires():
    """Required and allowed keys are those of version 1.2.0 of the Citation File Format."""
    cited = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert str(cited["version"]) == __version__ and cited["license"] == "Apache-2.0"
    known = {"cff-version", "message", "type", "title", "version", "license", "authors"}
    assert cited.keys() <= known | {"keywords", "references", "abstract", "date-released"}
    for work in cited["references"]:
        assert {"type", "title", "authors"} <= work.keys()
        assert 2024 <= work["year"] <= datetime.date.today().year
        assert work["url"] == f"https://arxiv.org/abs/{work['notes'].removeprefix('arXiv:')}"
        for author in work["authors"]:
            assert author.keys() == {"family-names", "given-names"}
    papers = {work["notes"] for work in cited["references"]}
    assert papers == {"arXiv:2405.04342", "arXiv:2503.02130", "arXiv:2504.06949"}


def test_pre_commit_runs_the_ruff_of_the_pins():
    hooks = [
        hook for repo in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    ]
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "check"], ["ruff", "format"]]
    for hook in hooks:
        assert hook["additional_dependencies"] == [f"ruff=={pinned('ruff')}"]


def test_workflows_run_the_commands_of_the_makefile_on_every_python():
    found = {path.stem: read(path) for path in WORKFLOWS}
    assert found.keys() == {"test", "docs"}
    jobs = found["test"]["jobs"]
    for job, command in (("check", "make check"), ("all", "make test")):
        assert jobs[job]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
        assert jobs[job]["steps"][-1]["run"] == command
    assert 'requires-python = ">=3.11,<3.14"' in (ROOT / "pyproject.toml").read_text()
    # YAML reads the key `on` as true.
    assert found["test"][True]["schedule"]
    assert any(step.get("run") == "make docs" for step in found["docs"]["jobs"]["build"]["steps"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_read_only_and_every_job_has_a_limit(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert "timeout-minutes" in job or name == "publish"
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_are_forms(path):
    form = read(path)
    if path.stem == "config":
        assert form.keys() == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) and any(
        "required" in f.get("validations", {}) for f in form["body"]
    )
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown") and field["attributes"]["label"]
