"""cerl watch: a page of runs that go on, from a server that only reads and only answers here."""

import contextlib
import http.client
import io
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from browser import browser, browsers
from result_rows import row, write
from rich.console import Console

from cerl import watch
from cerl.config import ConfigError, load
from cerl.record.finished import mark
from cerl.record.folder import appear


@pytest.fixture(autouse=True)
def plotly(monkeypatch):
    """A plotly whose JavaScript is short, so that the tests need no other."""
    fake = types.ModuleType("plotly.offline")
    fake.__dict__["get_plotlyjs"] = lambda: "var Plotly = {};"
    monkeypatch.setitem(sys.modules, "plotly", types.ModuleType("plotly"))
    monkeypatch.setitem(sys.modules, "plotly.offline", fake)


@contextlib.contextmanager
def served(*paths: Path, every: float = 0) -> Iterator[int]:
    """The port of a server of some paths.

    Args: every, seconds between two looks at its files; 0: on every request.
    """
    with watch.server(watch.Watched(paths, every=every)) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found.server_address[1]
        finally:
            found.shutdown()
            thread.join()


def asked(port: int, address: str, *, method: str = "GET", host: str = "") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest(method, address, skip_host=True)
        connection.putheader("Host", host or f"127.0.0.1:{port}")
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_the_page_follows_the_files(tmp_path):
    where = write(tmp_path / "runs" / "a", [row(step=100)])
    with served(tmp_path / "runs") as port:
        status, text = asked(port, "/")
        _, version = asked(port, "/version")
        assert status == 200 and f'data-version="{version}"' in text
        assert asked(port, "/version")[1] == version  # nothing has changed
        assert "98,765" not in text
        write(where, [row(step=100), row(step=200, **{"return": 98765.0})])
        assert asked(port, "/version")[1] != version
        assert "98,765" in asked(port, "/")[1]


def test_only_known_addresses_of_this_machine_are_answered(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    write(tmp_path / "runs" / "a", [row()])
    (tmp_path / "runs" / "a" / "film.mp4").write_bytes(b"film")
    with served(tmp_path / "runs") as port:
        for address in ("/../secret.txt", "/%2e%2e/secret.txt", f"/{secret}", "/a/rows.parquet"):
            assert asked(port, address)[0] == 404
        assert asked(port, "/plotly.min.js") == (200, "var Plotly = {};")
        assert 'href="video/0/film.mp4"' in asked(port, "/")[1]
        assert asked(port, "/video/0/film.mp4") == (200, "film")
        assert asked(port, "/video/0/other.mp4")[0] == 404
        assert asked(port, "/", host="evil.example")[0] == 403
        assert asked(port, "/", host=f"localhost:{port}")[0] == 200
        for method in ("POST", "PUT", "DELETE"):
            assert asked(port, "/", method=method)[0] == 501
        assert asked(port, "/", method="HEAD") == (200, "")


def test_a_damaged_file_and_a_run_without_rows_stop_nothing(tmp_path):
    write(tmp_path / "good", [row()])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "rows.parquet").write_bytes(b"no parquet")
    appear(tmp_path / "waiting", load("catch/ddqn"))
    text, _ = watch.page_of([tmp_path])
    assert "bad/rows.parquet: damaged" in text and "waiting" in text
    assert "<h2>Scores</h2>" in text
    text, _ = watch.page_of([tmp_path / "waiting"])
    assert "no run has rows of an evaluation yet" in text and "<h2>Scores</h2>" not in text


def test_the_view_of_a_terminal_ends_with_the_runs(tmp_path):
    appear(tmp_path / "a", load("catch/ddqn", {"schedule.steps": 1000}))
    mark(tmp_path / "a", 1000)
    output = io.StringIO()
    console = Console(file=output, width=120)
    watch.main([tmp_path], terminal=True, every=0.01, console=console)
    assert "1 run: 1 done" in output.getvalue()


def test_wrong_paths_and_ports_are_told(tmp_path):
    with pytest.raises(ConfigError, match="no such file or folder: .*nowhere"):
        watch.main([tmp_path / "nowhere"])
    with served(tmp_path) as port, pytest.raises(ConfigError, match=f"listen on port {port}"):
        watch.server(watch.Watched([tmp_path]), port=port)


# Draws all figures, and tells how many places have one.
DRAWN = (
    "const done = arguments[0]; Promise.all(places.map(draw)).then(() => "
    "setTimeout(() => done(places.filter(p => p.dataset.drawn === 'done').length), 200))"
)


@pytest.mark.slow
@browsers
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_open_page_follows_the_runs_and_keeps_what_the_reader_chose(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "plotly")  # this test needs the real one
    monkeypatch.delitem(sys.modules, "plotly.offline")

    def rows(steps: Sequence[int], name: str, level: float) -> list[dict]:
        seeds = range(3)
        own = {"preset": f"catch/{name}"}
        return [
            row(step=t, seed=s, **own, **{"return": level + t / 1000 + s})
            for t in steps
            for s in seeds
        ]

    def grow(steps: Sequence[int]) -> None:
        for name, level in (("ddqn", 10.0), ("other", 20.0)):
            write(tmp_path / "runs" / name, rows(steps, name, level))

    grow([100, 200, 300])
    with served(tmp_path / "runs", every=1) as port, browser() as driver:
        driver.get(f"http://127.0.0.1:{port}/")
        assert driver.execute_async_script(DRAWN) > 0
        # The reader filters the scores, sorts them downwards, unfolds a run and moves a slider.
        driver.find_element("css selector", "#grid-scores input").send_keys("other")
        head = driver.find_elements("css selector", "#grid-scores thead button")[1]
        for _ in range(2):
            driver.execute_script("arguments[0].click()", head)
        driver.execute_script("document.querySelector('#grid-runs details').open = true")
        place = "places.find(p => (figures[p.dataset.figure].frames || []).length)"
        driver.execute_async_script(
            f"const done = arguments[0], place = {place};"
            "const slider = place._fullLayout.sliders[0];"
            "place.emit('plotly_sliderchange', {slider, step: slider.steps[1]});"
            "const zoom = {'xaxis.range[0]': -7, 'xaxis.range[1]': 77};"
            "Plotly.relayout(place, zoom).then(done)"
        )
        driver.execute_script("document.getElementById('scores').scrollIntoView()")
        driver.execute_script("window.scrollBy(0, 5); window.old = true")
        top = "return document.getElementById('scores').getBoundingClientRect().top"
        before = driver.execute_script(top)

        grow([100, 200, 300, 400])
        grow([100, 200, 300, 400, 500])
        for _ in range(300):
            if not driver.execute_script("return window.old"):
                break
            time.sleep(0.1)
        assert not driver.execute_script("return window.old")
        text = driver.find_element("id", "grid-scores").text
        assert "500" in text and "21.5" in text  # the newest step and its mean score

        assert abs(driver.execute_script(top) - before) <= 2
        box = driver.find_element("css selector", "#grid-scores input")
        assert box.get_attribute("value") == "other"
        left = driver.find_elements("css selector", "#grid-scores tbody tr:not([hidden])")
        assert len(left) == 1 and "other" in left[0].text
        order = "return document.querySelectorAll('#grid-scores thead th')[1].ariaSort"
        assert driver.execute_script(order) == "descending"
        assert driver.execute_script("return document.querySelector('#grid-runs details').open")
        driver.execute_async_script(DRAWN)
        view = driver.execute_script(
            f"const place = {place}, slider = place._fullLayout.sliders[0];"
            "return [slider.steps[slider.active].args[0][0], place.layout.xaxis.range]"
        )
        assert view == ["200", [-7, 77]]
        assert driver.get_log("browser") == []
