"""The page of a report: it needs no network, escapes every text, and works in a browser."""

import importlib.util
import json
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import DRAW, browser, browsers
from result_rows import PNG, ensemble, row, trained, write

from cerl.config import load
from cerl.config.form import overridden
from cerl.config.labels import Label
from cerl.record.folder import dump
from cerl.report import curves, page, palette, roles, sentences, statistics, tables, verdicts
from cerl.report.curves import Cell, Curve
from cerl.report.figures import catalogue, look
from cerl.report.figures.asked import Asked
from cerl.report.page import charts, grids, looks, slides
from cerl.report.page.runs import runs_of
from cerl.report.summary import summarise

RESULTS = Path(__file__).parents[1] / "docs" / "results"
EVIL = "<img src=x onerror=alert(1)></script><b>a & b</b>"
PLOTLY = importlib.util.find_spec("plotly") is not None


def parts_of(*folders: Path) -> page.Parts:
    table = curves.load_rows(folders)
    found, notes = curves.cells(table)
    judged = verdicts.verdicts(found)
    notes += roles.notes(found)
    summary = summarise(found)
    scores = page.Scores(*tables.table(summary), tables.caption(summary))
    return page.Parts(found, scores, notes, judged, runs_of(table))


def study(folder: Path, *, steps=(100, 200, 300), seeds=(0, 1, 2, 3)) -> Path:
    """Runs of a single agent, an ensemble and CERL on two games, made of numbers."""
    for game, size in (("breakout", 1.0), ("asterix", 2.0)):
        for name, level in (("ddqn", 10.0), ("bootdqn", 6.0), ("cerl", 8.0)):
            own = {"env.name": game}
            where = folder / f"{name}-{game}"
            trained(where, f"minatar/{name}", own, size * level, seeds=seeds, steps=steps)
            dump(load(f"minatar/{name}", own | {"seeds": list(seeds)}), where / "config.yaml")
    return folder


class Outside(HTMLParser):
    """Collects what a page would load, and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset") or (name == "href" and tag != "a"):
                self.loaded.append(value or "")
            assert not name.startswith("on"), f"{tag} has a handler {name}"


def parsed(text: str) -> Outside:
    found = Outside()
    found.feed(text)
    return found


def figures_in(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="figure-data">(.*?)</script>', text)
    assert found
    return json.loads(found[1])


def test_a_page_loads_nothing_and_has_every_part(tmp_path):
    parts = parts_of(study(tmp_path / "runs"))
    text = page.content(parts, "var Plotly;", folder=tmp_path)
    assert all(source.startswith("data:") for source in parsed(text).loaded)
    assert "url(" not in text and "@import" not in text
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings[:5] == ["Verdicts", "Figures", "Scores", "Verdicts in numbers", "Runs"]
    assert len(figures_in(text)) == text.count('class="chart"') >= 6


def test_figures_without_a_chart_stand_in_the_page_as_pictures(tmp_path):
    found, _ = curves.cells(curves.load_rows([study(tmp_path / "runs")]))
    drawn = catalogue.pictures(found, Asked(), {})
    told = [title.partition(":")[0] for title in drawn]
    # There are neither metrics, nor times, nor options that differ within a method.
    assert told == ["improvement", "own-data"]
    assert all(content.startswith(PNG) for content in drawn.values())
    parts = parts_of(tmp_path / "runs")
    pictures = {f"{EVIL}{title}": content for title, content in drawn.items()}
    text = page.content(parts, "var Plotly;", folder=tmp_path, pictures=pictures)
    assert text.count('<img src="data:image/png;base64,') == 2
    assert parsed(text).tags.count("img") == 2
    assert all(source.startswith("data:") for source in parsed(text).loaded)


def test_single_seeds_are_lines_of_the_page_where_there_is_no_band(tmp_path):
    for seeds, thin in ((5, 5), (7, 0)):
        where = study(tmp_path / str(seeds), seeds=range(seeds))
        found, _ = curves.cells(curves.load_rows([where]))
        [first, *_] = charts.curve_charts(found)
        names = [trace.get("name", "") for trace in first.figure["data"]]
        assert sum(name.startswith("ddqn, individual, seed") for name in names) == thin
        assert any("fill" in trace for trace in first.figure["data"]) == (not thin)


def test_page_and_files_draw_a_role_alike(tmp_path):
    found, _ = curves.cells(curves.load_rows([study(tmp_path)]))
    files, own = look.looks(found), looks.looks(found)
    for name in ("bootdqn", "cerl"):
        assert files[name].colour == own[name].colour
    styles = {style.marker: style.symbol for style in palette.ROLES.values()}
    assert all(styles[files[name].marker] == own[name].symbol for name in files)


def test_texts_of_runs_are_data_in_html_and_in_figures(tmp_path):
    found = ensemble(np.arange(24.0).reshape(3, 4, 2), np.zeros((3, 4)))
    for one in found:
        one |= {"preset": EVIL, "env": f"catch/{EVIL}"}
    parts = parts_of(write(tmp_path / EVIL.replace("/", "-"), found))
    parts = parts._replace(notes=[*parts.notes, EVIL])
    plain = parsed(page.content(parts, "", folder=tmp_path, first=""))
    assert "img" not in plain.tags and "b" not in plain.tags
    text = page.content(parts, "", folder=tmp_path)
    assert text.count("</script>") == 3  # figures, plotly, the script of the page
    names = [t.get("name", "") for f in figures_in(text).values() for t in f["data"]]
    assert any("&lt;b&gt;" in name for name in names)  # plotly draws it as <b>
    assert not any("<" in name for name in names)


def test_the_command_of_a_run_trains_the_same_run(tmp_path):
    changes = {
        "env.name": "asterix",
        "ensemble.members": 3,
        "optim.lr": 3e-4,
        "seeds": [4, 7],
        "schedule.steps": 12_345,
        "eval.policies": ["individual"],
    }
    config = load("minatar/cerl", changes)
    where = trained(tmp_path / "a", "minatar/cerl", changes, seeds=(4, 7))
    dump(config, where / "config.yaml")
    [run] = runs_of(curves.load_rows([where]))
    assert run.against == "preset minatar/cerl" and not run.problem
    told = {option for option, _, _ in run.changed}
    assert told == {key for key in changes if key != "seeds"}
    program, command, name, *words = shlex.split(run.command)
    assert (program, command, name) == ("cerl", "train", "minatar/cerl")
    again = overridden(name, words, prog="cerl train")
    assert again == config


def test_a_run_whose_preset_is_gone_is_compared_with_the_defaults(tmp_path):
    where = write(tmp_path / "a", [row()])
    dump(load("catch/ddqn").model_copy(update={"preset": "no/such"}), where / "config.yaml")
    [run] = runs_of(curves.load_rows([where]))
    assert "no preset no/such" in run.against
    assert ("ensemble.members", "1", "1") not in run.changed


def test_runs_say_what_was_lost_and_what_is_unknown(tmp_path):
    found = [row(seed=s, step=t, wall_seconds=36.0 * t) for s in range(3) for t in (100, 200)]
    found[3]["return"] = float("nan")  # seed 1 at its last evaluation
    found[5]["diverged"] = True
    write(tmp_path / "a", found)
    write(tmp_path / "b", [row()])
    (tmp_path / "b" / "config.yaml").write_text("seeds: [")
    (tmp_path / "b" / "versions.yaml").write_text("- {device: cpu, cerl: 0.1.0}")
    (tmp_path / "b" / "video-seed-0.mp4").write_bytes(b"film")
    a, b = runs_of(curves.load_rows([tmp_path]))
    assert (a.name, a.seeds, a.step, a.seconds) == ("a", (0, 1, 2), 200, 7200.0)
    assert a.lost == (1,) and a.diverged == {2: 200}
    assert "no config.yaml" in a.problem and not a.command
    assert "config.yaml" in b.problem and (b.device, b.versions) == ("cpu", {"cerl": "0.1.0"})
    text = grids.runs([a, b], tmp_path)
    assert "seed 1 has no finite score" in text and "seed 2 diverged at step 200" in text
    assert 'href="b/video-seed-0.mp4"' in text and "2.00" in text


def test_numbers_of_a_table_sort_by_what_they_begin_with():
    text = grids.grid("x", ["a"], [["1,200 [1,100, 1,300]"], ["-0.5"], ["2 (1 lost)"], ["2b"]])
    assert re.findall(r'data-value="([^"]*)"', text) == ["1200.0", "-0.5", "2.0"]


def simulated(games: int, methods: int, seeds: int, steps: int) -> list[Cell]:
    """Cells with curves of random numbers, as of a large study."""
    rng = np.random.default_rng(0)
    names = [*statistics.human_random()][:games]
    at = np.arange(1, steps + 1) * 250_000
    out = []
    for game in names:
        for k in range(methods):
            scores = {}
            for score in ("individual", "vote"):
                returns = rng.normal(1000.0, 300.0, (steps, seeds)).cumsum(0)
                scores[score] = Curve(at, returns, np.full((steps, seeds), 10))
            label = Label(f"method-{k}", {})
            facts = (f"atari/{game}", f"method-{k}", label, None, f"{k:012d}", 10)
            out.append(Cell(*facts, tuple(range(seeds)), {}, scores))
    return out


@pytest.mark.slow
def test_figures_of_a_large_study_stay_below_ten_megabytes():
    found = simulated(55, 5, 5, 200)
    drawn = [*slides.over_tasks(found), *slides.at_steps(found), *charts.curve_charts(found)]
    size = len(page._json({chart.key: chart.figure for chart in drawn}))
    assert size < 10_000_000  # plotly itself has five million bytes


def test_without_plotly_an_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install 'cerl\[page\]'"):
        page.library()


@pytest.mark.slow
@pytest.mark.skipif(not PLOTLY, reason="plotly is not installed")
def test_plotly_knows_every_property_of_the_figures(tmp_path):
    from plotly.graph_objects import Figure

    text = page.content(parts_of(study(tmp_path)), "", folder=tmp_path)
    for figure in figures_in(text).values():
        assert Figure(figure).to_dict()["data"]


@pytest.mark.slow
@browsers
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_the_page_works_in_a_browser(tmp_path, width, dark):
    parts = parts_of(RESULTS / "minatar")
    file = tmp_path / "report.html"
    page.write(*parts[:4], file, parts.runs)
    with browser(width, dark=dark) as driver:
        driver.get(file.as_uri())
        driver.execute_async_script(DRAW)
        # Every figure has lines or points, and none is wider than the page.
        drawn = driver.execute_script(
            "return places.map(p => [p.dataset.drawn, p.querySelectorAll('.trace').length])"
        )
        assert drawn and all(state == "done" and traces > 0 for state, traces in drawn)
        wide = driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        # The slider of a figure changes what is drawn.
        moved = driver.execute_async_script(
            "const done = arguments[0];"
            "const place = places.find(p => p.dataset.figure.startsWith('profile'));"
            "const before = JSON.stringify(place.data[0].y);"
            "const name = figures[place.dataset.figure].frames[0].name;"
            "Plotly.animate(place, [name], {mode: 'immediate', frame: {duration: 0}})"
            ".then(() => done(JSON.stringify(place.data[0].y) !== before))"
        )
        assert moved
        # A filter leaves the lines that have all words.
        box = driver.find_element("css selector", "#grid-scores input")
        box.send_keys("breakout cerl")
        rows = driver.find_elements("css selector", "#grid-scores tbody tr:not([hidden])")
        assert rows and all("breakout" in one.text and "cerl" in one.text for one in rows)
        # A heading sorts by numbers, first upwards and then downwards.
        head = driver.find_elements("css selector", "#grid-scores thead button")[2]
        values = (
            "return [...document.querySelectorAll('#grid-scores tbody tr')]"
            ".map(r => +r.cells[2].dataset.value)"
        )
        driver.execute_script("arguments[0].click()", head)
        up = driver.execute_script(values)
        driver.execute_script("arguments[0].click()", head)
        down = driver.execute_script(values)
        assert up == sorted(up) and down == up[::-1] and up[0] < up[-1]
        back = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert back == ("rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")
        assert driver.get_log("browser") == []


@pytest.mark.slow
@browsers
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_names_that_look_like_markup_run_no_script_in_a_browser(tmp_path):
    found = ensemble(np.arange(24.0).reshape(3, 4, 2), np.zeros((3, 4)))
    for one in found:
        one |= {"preset": EVIL, "env": f"catch/{EVIL}"}
    parts = parts_of(write(tmp_path / "a", found))
    page.write(*parts[:4], tmp_path / "report.html", parts.runs)
    with browser() as driver:
        driver.get((tmp_path / "report.html").as_uri())
        driver.execute_async_script(DRAW)
        assert not driver.find_elements("css selector", "img[src='x'], svg b")
        texts = driver.find_elements("css selector", ".legendtext")
        assert any("<b>a & b</b>" in one.text for one in texts)
        assert driver.get_log("browser") == []


def test_every_kind_of_verdict_has_a_title_and_a_meaning():
    assert {*sentences.TITLES} == {*sentences.ALL_SIDES} | {"tandem"} == {*verdicts.KINDS}
    assert all(charts._meaning(kind) for kind in verdicts.KINDS)
