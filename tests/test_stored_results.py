"""docs/results: its reports follow from the rows, and its page names and links everything."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from remake import (
    RESULTS,
    Numbers,
    Study,
    anchor,
    answers,
    pictures,
    report,
    studies,
    with_answers,
)

from cerl.report import intervals
from cerl.report.curves import final
from cerl.report.summary import summarise

PAGE = RESULTS / "README.md"
ROOT = RESULTS.parents[1]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def links(page: Path) -> list[str]:
    """What a page links to, without addresses on the web."""
    return [link for link in LINK.findall(page.read_text()) if not re.match(r"\w+:", link)]


def test_the_list_names_every_study_and_every_picture():
    with_rows = {path.relative_to(RESULTS).parts[0] for path in RESULTS.rglob("rows.parquet")}
    assert {folder.partition("/")[0] for folder in studies()} == with_rows
    with_table = {path.parent.relative_to(RESULTS) for path in RESULTS.rglob("table.md")}
    reported = {Path(folder) for folder, study in studies().items() if not study.bench}
    assert reported == with_table
    named = {RESULTS / f / name for f, study in studies().items() for name in pictures(study)}
    assert named == {*RESULTS.rglob("*.png")}


@pytest.mark.parametrize("folder", studies())
def test_every_picture_and_table_is_linked_from_the_page(folder):
    linked = links(PAGE)
    study = studies()[folder]
    for name in [*pictures(study), *([] if study.bench else ["table.md"])]:
        assert f"{folder}/{name}" in linked


def test_every_link_of_the_documentation_resolves():
    assert sum(len(links(page)) for page in pages()) > 100
    for page in pages():
        for link in links(page):
            name, _, place = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page}: {link}"
            if place:
                headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
                assert place in map(anchor, headings), f"{page}: {link}"


def test_the_folder_stays_below_eight_megabytes():
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) < 8e6


@pytest.mark.slow
def test_the_table_of_answers_follows_from_the_rows():
    text = PAGE.read_text()
    assert with_answers(text, answers(studies(), text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("folder", [name for name, study in studies().items() if not study.bench])
def test_committed_tables_follow_from_their_rows(folder):
    with report(folder, studies()[folder], drawn=False) as made:
        assert (made / "table.md").read_text() == (RESULTS / folder / "table.md").read_text()


# Runs of other seeds, with which the task of the demo was chosen; their rows are not stored.
NOT_STORED = {"-0.34 [-0.75, 0.08]", "-0.16 [-0.27, -0.05]", "-0.32 [-0.46, -0.19]"}
# Studies that the page also compares at other steps than in their reports, by folder.
ALSO = {"minatar-size/asterix": 0, "mujoco": 260_000}
NUMBER = r"-?[\d,]*\d(?:\.\d+)?"
ESTIMATE = re.compile(
    rf"({NUMBER})%? (?:\[({NUMBER}), \+?({NUMBER})\]|\(({NUMBER})\.\.({NUMBER})\))"
)


def computed(folder: str, study: Study) -> list[tuple[float, float, float]]:
    """Numbers with both of their ends that the rows of a study give: scores, verdicts, and
    differences of any two scores on a task; shares are percentages too."""
    found = []
    for folders in dict.fromkeys([(folder,), study.pooled or (folder,)]):
        numbers = Numbers(study, [*folders])
        for row in summarise(numbers.found, last=study.last).to_pylist():
            for ends in ("low", "high"), ("least", "greatest"):
                found.append((row["value"], *(row[end] for end in ends)))
        for line in (line for one in numbers.judged for line in (*one.tasks, *one.over)):
            for x in (line.difference, line.relative):
                found.append((x.value, x.low, x.high))
        for env in {cell.env for cell in numbers.found}:
            scores = [
                final(curve, last=study.last)
                for cell in numbers.found
                if cell.env == env
                for curve in cell.curves.values()
            ]
            for one, other in itertools.combinations(scores, 2):
                x = intervals.difference([one], [other])
                found.append((x.value, x.low, x.high))
    found = [one for one in found if None not in one]
    return found + [(100 * a, 100 * b, 100 * c) for a, b, c in found]


def told(text: Sequence[str | None], numbers: list[tuple[float, float, float]]) -> bool:
    """Whether numbers that a text tells are among those computed, or their negatives, rounded."""
    words = [word for word in text if word is not None]
    said = [float(word.replace(",", "")) for word in words]
    # Half a digit of the last decimal.
    unit = [0.5001 * 10.0 ** -len(word.partition(".")[2]) for word in words]
    return any(
        all(abs(x - y) <= most for x, y, most in zip(said, one, unit, strict=True))
        for a, b, c in numbers
        for one in ((a, b, c), (-a, -c, -b))
    )


def test_numbers_of_a_text_are_found_among_computed_ones():
    for text in ("-771 [-1,304, -238]", "28% [12, 44]", "0.53 (0.45..0.65)"):
        [match] = ESTIMATE.finditer(f"returns {text} more")
        assert match[0] == text
    [match] = ESTIMATE.finditer("by 1,304 [238, 2,000]")
    assert told(match.groups(), [(1304.4, 238.1, 1999.6)])
    assert told(match.groups(), [(-1304.4, -1999.6, -238.1)])
    assert not told(match.groups(), [(1304.4, 238.1, 2000.9)])


@pytest.mark.slow
def test_every_number_with_an_interval_in_the_prose_follows_from_the_rows():
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    checked, wrong = 0, []
    for section in sections:
        own = re.findall(r"`([\w-]+)/`", section.partition("\n")[0])
        numbers = []
        for folder, study in studies().items():
            if folder.partition("/")[0] in own and not study.bench:
                numbers += computed(folder, study)
                if folder in ALSO:
                    numbers += computed(folder, study.model_copy(update={"until": ALSO[folder]}))
        for match in ESTIMATE.finditer(section):
            if match[0] not in NOT_STORED:
                wrong += [] if told(match.groups(), numbers) else [f"{own}: {match[0]}"]
                checked += 1
    assert not wrong and checked > 150
    # The README of the project tells of the demo alone.
    told_first = [*ESTIMATE.finditer((ROOT / "README.md").read_text())]
    numbers = computed("demo", studies()["demo"])
    assert told_first and all(told(match.groups(), numbers) for match in told_first)
