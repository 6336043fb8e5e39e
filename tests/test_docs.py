"""The documentation: its commands are accepted, its code runs, its tables follow from the package,
and its site opens in a browser without errors."""

import contextlib
import functools
import http.server
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from browser import browser, browsers

from cerl.config import Config, load, preset
from cerl.config.errors import section_models
from cerl.config.form import overridden
from cerl.record.results import METRICS, ROWS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "benchmarks" not in page.parent.parts)
# Pages that this file's tests of code and commands cover; others have tests of their own.
OWN = [
    DOCS / "index.md",
    DOCS / "environments.md",
    DOCS / "from-the-authors.md",
    *sorted((DOCS / "algorithms").glob("*.md")),
]


def entries(tree: object) -> list[str]:
    """Pages that a navigation names, in its order."""
    if isinstance(tree, str):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [page for part in parts for page in entries(part)]  # type: ignore[union-attr]


def test_the_navigation_names_every_page_but_tables_once():
    settings = (ROOT / "mkdocs.yml").read_text()
    named = entries(yaml.safe_load(settings)["nav"])
    pages = {str(page.relative_to(DOCS)) for page in DOCS.glob("*.md")}
    pages |= {f"algorithms/{page.name}" for page in (DOCS / "algorithms").glob("*.md")}
    assert len(named) == len({*named})
    assert {*named} == pages | {"results/README.md"}


def test_pages_name_what_a_browser_would_fetch_from_the_site_only():
    for page in PAGES:
        for picture in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page.read_text()):
            assert (page.parent / picture).is_file(), f"{page}: {picture}"


def test_pages_link_to_files_of_docs_only():
    # The site has no others. Files outside of docs/ are named, not linked.
    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", page.read_text()):
            if not re.match(r"\w+:", link):
                target = (page.parent / link).resolve()
                assert target.is_relative_to(DOCS.resolve()) and target.exists(), f"{page}: {link}"


def commands(page: Path) -> list[list[str]]:
    lines = re.findall(r"^ *cerl ([^`\n]*)$", page.read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.stem)
def test_commands_of_pages_name_presets_and_options_that_exist(page):
    found = commands(page)
    assert found
    for command, *words in found:
        names = [*itertools.takewhile(lambda word: not word.startswith("-"), words)]
        if command == "train":
            overridden(words[0], words[1:], prog="cerl train")
        elif command == "sweep":
            assert names and {*names} <= {*preset.presets(), *preset.studies()}
        else:
            assert command == "report"


@pytest.mark.slow
def test_the_start_page_s_own_question_can_be_planned(tmp_path):
    [words] = [words for words in commands(DOCS / "index.md") if "--dry-run" in words]
    words[words.index("--out") + 1] = str(tmp_path / "mine")
    ran = subprocess.run(
        [sys.executable, "-m", "cerl", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_presets_and_studies_in_backticks_exist():
    known = {*preset.presets(), *preset.studies()}
    families = "|".join(sorted({name.partition("/")[0] for name in preset.presets()}))
    for page in OWN:
        for name in re.findall(rf"`((?:{families})/[\w-]+)`", page.read_text()):
            assert name in known, f"{page}: {name}"
    table = (DOCS / "from-the-authors.md").read_text().split("## ensemble-rl-discrete")[0]
    rows = [row for row in table.splitlines() if row.startswith("|")][2:]
    studies = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    assert len(studies) > 15 and {*studies} <= {*preset.studies()}


def options() -> set[str]:
    """Dotted keys of all options, of every kind of every section."""
    found = set()
    for name, field in Config.model_fields.items():
        kinds = section_models(Config, name)
        found.add(name)
        for model in kinds.values():
            for inner in model.model_fields:
                found.add(f"{name}.{inner}")
                value = getattr(model.model_fields[inner], "default", None)
                for deeper in getattr(type(value), "model_fields", {}):
                    found.add(f"{name}.{inner}.{deeper}")
        for inner in getattr(field.annotation, "model_fields", {}):
            found.add(f"{name}.{inner}")
    return found


def test_options_in_backticks_exist():
    known, checked = options(), 0
    sections = "agent|encoder|net|loss|optim|replay|schedule|explore|eval|log|ensemble|env"
    for page in OWN:
        for name in re.findall(rf"`((?:{sections})\.[\w.]+)", page.read_text()):
            assert name in known, f"{page}: {name}"
            checked += 1
    assert checked > 60


def test_tests_that_the_page_of_faults_names_exist():
    found = re.findall(r"`(tests/\w+\.py)::(\w+)`", (DOCS / "cannot-happen.md").read_text())
    assert len(found) >= 25
    for file, name in found:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), name


def test_the_schema_is_that_of_the_files():
    text = (DOCS / "data.md").read_text()
    words = {"string": "text", "int64": "integer", "double": "number", "bool": "true or false"}
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    for title, schema in (("Rows", ROWS), ("Metrics", METRICS)):
        [part] = [part for part in parts if part.startswith(title)]
        told = re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", part, re.MULTILINE)
        assert told == [(field.name, words[str(field.type)]) for field in schema]


def test_code_of_the_schema_page_runs(monkeypatch, capsys):
    pytest.importorskip("pandas")
    monkeypatch.chdir(ROOT)
    [code] = re.findall(r"```python\n(.*?)```", (DOCS / "data.md").read_text(), re.DOTALL)
    exec(compile(code, "docs/data.md", "exec"), {})
    told = capsys.readouterr().out
    assert "active     0.375" in told and "passive" in told


def test_quotes_of_the_report_are_those_of_the_stored_one():
    table = " ".join((DOCS / "results/demo/table.md").read_text().split())
    text = (DOCS / "reading-a-report.md").read_text()
    quotes = re.findall(r"(?:^> .*\n)+", text, re.MULTILINE)
    assert len(quotes) == 3
    for quote in quotes:
        lines = [line.removeprefix("> ") for line in quote.splitlines()]
        assert " ".join(" ".join(lines).split()) in table


def test_numbers_of_what_was_tried_are_on_the_pages_that_it_links():
    checked = 0
    for row in (DOCS / "tried.md").read_text().splitlines():
        if row.startswith("| ") and (link := re.search(r"\]\(([^)#]+)", row)):
            source = (DOCS / link[1]).read_text()
            measured = [cell for cell in row.split("|")[2:-2]]
            for number in re.findall(r"-?\d+\.\d+", " ".join(measured)):
                assert number in source, row
                checked += 1
    assert checked >= 13


def test_authors_values_of_the_paper_s_presets_stand_beside_their_flags():
    text = (DOCS / "from-the-authors.md").read_text()
    text = text.partition("## ensemble-rl-discrete")[2].partition("## ensemble-rl-continuous")[0]
    paper = load("atari/paper-bootdqn")
    for flag, value in (
        ("ensemble_size", paper.ensemble.members),
        ("min_replay_history", paper.replay.start),
        ("target_update_period", paper.schedule.target_every),
        ("replay_capacity", paper.replay.capacity),
    ):
        [row] = [row for row in text.splitlines() if row.startswith("|") and f".{flag}`" in row]
        assert re.search(rf"\b{value}\b", row.split("|")[2]), flag


# Keys of the settings of both repositories, and flags of their commands.
DISCRETE = """
agent_name summary_writing_frequency gamma update_horizon min_replay_history update_period
target_update_period epsilon_train epsilon_eval epsilon_decay_period loss_type optimizer double_dqn
ensemble_size share_encoder share_penult aux_loss tandem active_prob grad_scale dqn_zoo_net sep_prob
sep_mode single_cerl cerl_own_target multi_gamma num_gammas fnorm mico mico_weight per_step
boot_prob
learning_rate beta2 eps centered game_name sticky_actions terminal_on_life_loss num_iterations
training_steps evaluation_steps max_steps_per_episode replay_capacity batch_size checkpoint_duration
checkpoint_frequency save_checkpoint clean_final_checkpoint collectors kappa num_atoms replay_scheme
exp seed resume disable_jit wandb wandb_project base_dir gin_files gin_bindings
"""
CONTINUOUS = """
algo actor_lr critic_lr temp_lr n hidden_size discount policy_update_delay updates_per_step tau
target_update_period init_temperature target_entropy backup_entropy replay_buffer_size cel cel_type
tandem active_prob aux_huber huber_delta ln_critic ln_params_critic exp env_name save_dir seed
eval_episodes log_interval eval_interval eval_value_bias batch_size max_steps start_training
reset_interval resets tqdm save_video save_1M_buffer save_buffer save_agent save_checkpoint
checkpoint_interval resume_checkpoint nsteps tags notes config
"""


@pytest.mark.parametrize(("part", "flags"), [("discrete", DISCRETE), ("continuous", CONTINUOUS)])
def test_every_flag_of_the_authors_has_its_place(part, flags):
    sections = re.split(r"^## ", (DOCS / "from-the-authors.md").read_text(), flags=re.MULTILINE)
    [section] = [text for text in sections if text.startswith(f"ensemble-rl-{part}")]
    code = " ".join(re.findall(r"`([^`\n]+)`", section))
    missing = [flag for flag in flags.split() if not re.search(rf"\b{flag}\b", code)]
    assert len(flags.split()) > 45 and not missing


ZENSICAL = shutil.which("zensical", path=str(Path(sys.executable).parent)) or (
    shutil.which("zensical")
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing of single requests."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not ZENSICAL:
        pytest.skip("no zensical: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, folder / "docs")
    (folder / "cerl").symlink_to(ROOT / "cerl")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    built = subprocess.run(
        [ZENSICAL, "build", "--strict", "--clean"], cwd=folder, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "site"


@pytest.mark.slow
def test_the_site_has_every_page_and_no_rows(site):
    named = entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    for page in named:
        made = page.replace("README.md", "index.html").replace(".md", ".html")
        assert (site / made).is_file(), page
    assert not [*site.rglob("*.parquet"), *site.rglob("*.py")]


class Places(HTMLParser):
    """The addresses that a page of HTML names, and the places in it that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("href", "src") and value:
                self.links.append(value)
            elif key == "id" and value:
                self.names.add(value)


@pytest.mark.slow
def test_links_and_anchors_of_the_site_lead_to_files_of_the_site(site):
    pages = {page: Places(page) for page in site.rglob("*.html") if page.name != "404.html"}
    followed = 0
    for page, places in pages.items():
        for link in places.links:
            if re.match(r"\w+:", link):
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (page.parent / name).resolve() if name else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.relative_to(site)}: {link}"
            if anchor:
                assert anchor in pages[target].names, f"{page.relative_to(site)}: {link}"
            followed += 1
    assert followed > 1_000


@pytest.mark.slow
def test_the_reference_shows_the_functions_of_the_interface(site):
    page = (site / "reference.html").read_text()
    for name in ("cerl.interface.train", "cerl.interface.resume", "cerl.policy.load"):
        assert f'id="{name}"' in page
    assert page.count("<strong>Args:</strong>") >= 7  # docs/docstrings.py has read the docstrings
    assert "<p>Args:" not in page and "[S, E, *observation]" in page


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves a folder to this machine. Yields: its address."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


# The text of the page, and of the search, which is in a tree of its own.
ALL_TEXT = """return [document.body.innerText, ...[...document.querySelectorAll('*')]
    .filter(e => e.shadowRoot).map(e => e.shadowRoot.textContent)].join(' ')"""
SEEN = """return {
    wide: document.documentElement.scrollWidth,
    broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
    away: performance.getEntriesByType('resource').map(e => e.name)
        .filter(name => !name.startsWith(location.origin)),
}"""


@pytest.mark.slow
@browsers
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_pages_of_the_site_open_without_errors(site, width, dark):
    with served(site) as address, browser(width, dark=dark) as driver:
        pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
        assert len(pages) > 25
        for page in pages:
            path = page.relative_to(site)
            driver.get(f"{address}/{path}")
            seen = driver.execute_script(SEEN)
            assert seen["broken"] == [] and seen["away"] == [], path
            assert seen["wide"] <= width, path
            assert driver.get_log("browser") == [], path


@pytest.mark.slow
@browsers
def test_the_search_finds_a_word_of_the_glossary(site):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    def text(driver):
        return driver.execute_script(ALL_TEXT)

    with served(site) as address, browser() as driver:
        driver.get(f"{address}/index.html")
        driver.find_element("css selector", "button.md-search__button").click()
        ActionChains(driver).pause(1).send_keys("dormant").perform()
        WebDriverWait(driver, 20).until(lambda driver: "dormant unit: a unit whose" in text(driver))
        assert driver.get_log("browser") == []
