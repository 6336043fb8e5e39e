"""`cerl watch`: the page of a report while runs are going on, and a view for the terminal.

A small server answers on this machine alone (loopback) and only reads. It knows a few addresses and
maps none of them to a path, so no other file can be asked for. The page is made anew when a file of
the runs has changed, and an open page then loads itself again.
"""

import contextlib
import html
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlsplit

from rich.console import Console
from rich.live import Live

from cerl.config import ConfigError
from cerl.record import files
from cerl.record.results import RowsError
from cerl.sweep import status
from cerl.sweep.state import RunState, states
from cerl.text import few, ranges, visible

if TYPE_CHECKING:
    from cerl.report import page

HOST = "127.0.0.1"
EVERY = 10  # seconds between two looks at the folders
# The page and plotly are both from here; nothing may be loaded from elsewhere.
POLICY = "default-src 'self' 'unsafe-inline' data: blob:; frame-ancestors 'none'"


class Answer(NamedTuple):
    """What the server says to one address."""

    kind: str  # MIME type
    body: bytes


class Watched:
    """The folders that are watched, and the newest page of them.

    Args of the constructor: paths of run folders or folders of runs; every, seconds between two
    looks at them.
    """

    def __init__(self, paths: Sequence[Path], *, every: float = EVERY) -> None:
        from cerl.report import page

        self.paths, self.every = [Path(path) for path in paths], every
        self.script = page.library().encode()
        self.lock = threading.Lock()
        self.due, self.stamp, self.version, self.text = 0.0, (), "", ""
        self.videos: dict[str, Path] = {}  # by address

    def answer(self, address: str) -> Answer | None:
        """The answer to an address; None if there is none."""
        path = urlsplit(address).path
        if path == "/plotly.min.js":
            return Answer("text/javascript; charset=utf-8", self.script)
        with self.lock:
            if path in self.videos:
                with contextlib.suppress(OSError), files.read(self.videos[path]) as file:
                    return Answer("video/mp4", file.read())
            if path not in ("/", "/version"):
                return None
            self._renew()
            if path == "/version":
                return Answer("text/plain; charset=utf-8", self.version.encode())
            return Answer("text/html; charset=utf-8", self.text.encode())

    def _renew(self) -> None:
        """Makes the page anew if a file has changed, at most every `every` seconds."""
        if self.text and time.monotonic() < self.due:
            return
        stamp = _stamp(self.paths)
        if stamp != self.stamp or not self.text:
            self.stamp, self.version = stamp, str(time.time_ns())
            self.text, self.videos = page_of(
                self.paths, version=self.version, every=max(1, round(self.every))
            )
        self.due = time.monotonic() + self.every


def _stamp(paths: Sequence[Path]) -> tuple:
    """What changes when a run writes rows, begins, ends or goes on: times and sizes of its files.

    Heartbeats are left out where the rest is the same: the page says how far a run is when its rows
    change, and would otherwise load itself again every few seconds.
    """
    found = []
    for name in ("rows.parquet", "config.yaml", "finished", "error.json"):
        for file in _named(paths, name):
            with contextlib.suppress(OSError):
                facts = file.stat()
                found.append((str(file), facts.st_mtime_ns, facts.st_size))
    return tuple(sorted(found))


def _named(paths: Sequence[Path], name: str) -> Iterator[Path]:
    for path in paths:
        if path.is_file():
            yield from [path] if name == "rows.parquet" else []
        elif (path / name).is_file():
            yield path / name
        else:
            with contextlib.suppress(OSError):
                yield from path.glob(f"*/{name}")
                yield from path.glob(f"*/*/{name}")


def page_of(
    paths: Sequence[Path], *, version: str = "", every: int = EVERY
) -> tuple[str, dict[str, Path]]:
    """The page of some runs as they are now, and the videos that it links to, by their address.

    A file that cannot be read is named in the page and left out, and so are runs that have no rows
    yet.

    Args: version, that an open page compares with the newest; every, seconds between two questions.
    """
    from cerl.report import page

    parts, films = _parts(paths), {}
    runs = []
    for number, run in enumerate(parts.runs):
        names = [Path(f"video/{number}/{video.name}") for video in run.videos]
        films |= {f"/{quote(x.as_posix())}": y for x, y in zip(names, run.videos, strict=True)}
        runs.append(run._replace(videos=tuple(names)))
    text = page.content(
        parts._replace(runs=runs),
        "",
        folder=Path(),
        first=_now(paths),
        refresh=page.Refresh(every, version),
    )
    return text, films


def _parts(paths: Sequence[Path]) -> "page.Parts":
    """What the page is made of; what cannot be read is told in its notes."""
    from cerl.report import page, roles, tables, verdicts
    from cerl.report.page.runs import runs_of
    from cerl.report.summary import summarise

    problems: list[str] = []
    rows = [*_named(paths, "rows.parquet")]
    try:
        if not rows:
            raise RowsError("no run has rows of an evaluation yet")
        try:
            table = tables.load_rows(rows)
        except (RowsError, OSError):
            rows, problems = _readable(rows)
            table = tables.load_rows(rows)
        found, notes = tables.cells(table)
    except RowsError as error:
        return page.Parts([], None, [*problems, str(error)], [], [])
    notes = [*problems, *notes, *roles.notes(found)]
    summary = summarise(found)
    scores = page.Scores(*tables.table(summary), tables.caption(summary))
    return page.Parts(found, scores, notes, verdicts.verdicts(found), runs_of(table))


def _readable(rows: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The files of rows that can be read, and what is wrong with the others."""
    from cerl.report import tables

    good, problems = [], []
    for file in rows:
        try:
            tables.load_rows([file])
            good.append(file)
        except (RowsError, OSError) as error:
            problems.append(str(error))
    return good, problems


def _now(paths: Sequence[Path]) -> str:
    """The states of all runs, as HTML."""
    from cerl.report.page import grids

    found, problems = _states(paths)
    parts = [f"<p>{html.escape(visible(text))}</p>" for text in problems]
    if not found:
        return "".join(parts)
    parts.insert(0, f"<p>{html.escape(status.summary(found).plain)}</p>")
    headings = ["run", "name", "environment", "seeds", "state", "steps", "of", "device", "error"]
    lines = [
        [
            one.run.folder,
            one.run.label,
            one.run.env,
            ", ".join(ranges(one.run.seeds)),
            one.state,
            f"{one.step:,}",
            f"{one.steps:,}",
            f"{one.device}@{one.host}" if one.device else "",
            one.error.strip(),
        ]
        for one in found
    ]
    return "".join(parts) + grids.grid("states", headings, lines)


def _states(paths: Sequence[Path]) -> tuple[list[RunState], list[str]]:
    """The states of the runs of some folders, and why there are none of others."""
    found: list[RunState] = []
    problems = []
    for path in paths:
        try:
            found += states(path)
        except (ConfigError, OSError) as error:
            # A folder of stored rows has no run that could go on.
            if not any(_named([path], "rows.parquet")):
                problems.append(str(error))
    return found, problems


def server(watched: Watched, *, port: int = 0) -> ThreadingHTTPServer:
    """A server of a page, which answers once `serve_forever` is called.

    Args:   port, 0 for any that is free.
    Raises: ConfigError if the port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        """Answers GET and HEAD; every other method is refused by the base class."""

        def do_GET(self) -> None:
            self._say(body=True)

        def do_HEAD(self) -> None:
            self._say(body=False)

        def _say(self, *, body: bool) -> None:
            # A page from elsewhere could reach this server under a name of its own that it lets
            # point to this machine; browsers then send that name.
            name = self.headers.get("Host", "").rpartition(":")[0]
            if name not in (HOST, "localhost"):
                self.send_error(403, "expected an address of this machine")
                return
            found = watched.answer(self.path)
            if found is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", found.kind)
            self.send_header("Content-Length", str(len(found.body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if body:
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(found.body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not printed."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ConfigError(
            f"watch --port: cannot listen on port {port} ({error.strerror}); expected a free port, "
            "or 0 for any"
        ) from error


def main(
    paths: Sequence[Path],
    *,
    port: int = 0,
    terminal: bool = False,
    every: float = EVERY,
    console: Console | None = None,
) -> None:
    """Shows runs until it is interrupted.

    Args:   paths, run folders or folders of runs; port of the server on this machine, 0 for any
            that is free; terminal, show the states of the runs in the terminal instead, until none
            of them trains or waits; every, seconds between two looks at the folders.
    Raises: ConfigError for a path that does not exist, or a port that cannot be had; ImportError if
            plotly is missing.
    """
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ConfigError(f"watch: no such file or folder: {few(missing)}")
    console = console or Console(highlight=False)
    if terminal:
        _in_terminal(paths, console, every=every)
        return
    with server(Watched(paths, every=every), port=port) as found:
        console.print(f"http://{HOST}:{found.server_address[1]}/", soft_wrap=True, markup=False)
        console.print("Ctrl-C ends it; the runs go on", markup=False)
        with contextlib.suppress(KeyboardInterrupt):
            found.serve_forever()


def _in_terminal(paths: Sequence[Path], console: Console, *, every: float) -> None:
    """What `cerl status` shows, drawn anew until no run trains or waits."""
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            found = [one for path in paths for one in states(path)]
            live.update(status.shown(found, width=console.width), refresh=True)
            if not any(one.state in ("running", "queued", "waiting") for one in found):
                return
            time.sleep(every)
