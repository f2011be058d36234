"""README and docs: every example runs, every link leads somewhere, every table says what the code says."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.utils.dispatch import Signal

from benchmarks.report import ratio
from celery_goalstate import Engine, Status, cli, exceptions, signals, testing
from celery_goalstate.display import DOCS
from celery_goalstate.settings import REFUSED_TASK_OPTIONS, TASK_OPTIONS, KindOptions, Settings
from celery_goalstate.worker.task import REFUSALS
from tests.docs import words
from tests.docs.pages import PAGES, ROOT, Block, blocks, prose
from tests.servers import Valkey

RUN = {"python", "console"}
OPERATING = Path("docs/how-to/operating.md")
LANGUAGES = RUN | {"mermaid", "ini", "text", "yaml"}

page_by_page = pytest.mark.parametrize("page", PAGES, ids=str)


@page_by_page
def test_every_block_is_of_a_known_sort(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.language in RUN for block in blocks(page))], ids=str
)
@pytest.mark.timeout(320)
def test_examples_run(page: Path, valkey: Valkey, tmp_path: Path) -> None:
    directory = tmp_path / "page"
    directory.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.docs.run_page", str(page), valkey.url],
        cwd=directory,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{directory}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "",
        },
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def shown_commands() -> list[tuple[Block, str]]:
    return [
        (block, command)
        for page in PAGES
        for block in blocks(page)
        if block.language == "console" and block.shown
        for command, _ in block.commands()
    ]


def test_contributors_are_told_of_all_tests() -> None:
    told = re.findall(r"^\| `tests/(\w+)` ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert sorted(told) == sorted({file.parent.name for file in (ROOT / "tests").glob("*/*.py")})


def test_contributors_are_told_of_all_rooms() -> None:
    """The map has a row for whatever lies in the package, and names files that are there."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    the_map = contributing.partition("## The map")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (.+) \|$", the_map, re.MULTILINE)
    rooms = [room for first, _ in rows for room in re.findall(r"`([\w.]+/?)`", first)]
    files = (file.relative_to(words.PACKAGE) for file in words.PACKAGE.rglob("*.py"))
    package = {f"{file.parts[0]}/" if len(file.parts) > 1 else file.name for file in files}
    assert sorted(rooms) == sorted(package - {"__init__.py"})
    for first, text in rows:
        for file in re.findall(r"`(\w+\.py)`", text):
            assert (words.PACKAGE / first.strip("`/") / file).exists(), f"{first}: {file}"


def test_contributors_are_told_where_it_happens() -> None:
    for file in re.findall(r"`((?:\w+/)+\w+\.(?:py|lua))`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert (words.PACKAGE / file).exists() or (ROOT / file).exists(), file


def test_the_supported_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bounds = [
        f"python{project['requires-python']}",
        *project["dependencies"],
        *extras["django"],
        *extras["flower"],
        *extras["opentelemetry"],
    ]
    page = (ROOT / "CONTRIBUTING.md").read_text()
    section = page.partition("## Supported versions")[2].partition("\n## ")[0].lower()
    for bound in bounds:
        name, version = re.findall(r"^([\w-]+?)(?:\[\w+\])?>=([\d.]+)", bound)[0]
        assert re.search(rf"^\| {name}\b.*\| .*{re.escape(version)}\b", section, re.MULTILINE), bound


def test_commands_that_are_only_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for block, command in shown_commands():
        where = f"{block.page}:{block.line}: {command}"
        program, *arguments = command.split()
        match program:
            case "make":
                assert arguments[0] in targets, where
            case "pip":
                for asked in re.findall(r"celery-goalstate\[([\w,]+)\]", command):
                    assert set(asked.split(",")) <= set(extras), where
            case "celery" | "docker" | "pytest" | ".ci/run" | "git" | "python" | "systemctl":
                pass
            case ".venv/bin/python" | ".venv-newest/bin/python":
                for path in re.findall(r"tests/[\w/.]+", command):
                    assert (ROOT / path).exists(), where
            case _:
                pytest.fail(f"nobody checks {where}")


@page_by_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, section in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", (ROOT / page).read_text()):
        if target.startswith(("http://", "https://")):
            continue
        there = ROOT / page.parent / target if target else ROOT / page
        assert there.exists(), f"{page}: {target}"
        assert not section or section in sections(there), f"{page}: {target}#{section}"


def sections(page: Path) -> set[str]:
    """The names by which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_can_be_reached() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES:
        if page.parts[0] == "docs" and page.name != "README.md":
            assert page.relative_to("docs").as_posix() in index, page


def table(page: str, heading: str) -> dict[str, list[str]]:
    """The table under a heading: the code words of its first column, and the other cells."""
    text = (ROOT / page).read_text()
    section = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    return {name: cells for first, *cells in rows for name in re.findall(r"`([\w-]+)`", first.split("(")[0])}


def defaults(cls: type) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(cls) if "check" in f.metadata}


def shown_default(cell: str) -> Any:
    return eval(cell.strip("`").replace(" ", "_"))


#: How the commands begin that operators are told to run.
COMMANDS = (
    "celery ",
    "status ",
    "grep ",
    "redis-cli ",
    "resync ",
    "list ",
    "enqueue ",
    "delete ",
    "ACL ",
    "--",
)


def quoted_to_operators() -> Iterator[tuple[str, bool]]:
    """The messages that the page for operators quotes, and whether it says that they are in a log."""
    for paragraph in re.split(r"\n\n|\n(?=[*|] )", prose(OPERATING)):
        in_log = re.search(r"\blogs?\b", paragraph) is not None
        for quote in re.findall(r"`([^`]+)`", paragraph):
            if " " in quote and not quote.startswith(COMMANDS):
                yield quote, in_log


def test_an_operator_finds_the_words_of_the_code() -> None:
    """What is said to be in a log is logged; what else is quoted is in a string of the code."""
    quoted = list(quoted_to_operators())
    assert sum(in_log for _, in_log in quoted) >= 4
    assert len(quoted) >= 9
    log = (*words.of_the_log(), *REFUSALS.values())  # Celery logs the result of a task
    assert not [
        quote for quote, in_log in quoted if not words.occurs(quote, log if in_log else words.of_the_code())
    ]


def test_messages_lead_to_pages_that_users_have() -> None:
    """Files of docs/ are not installed: a message names a page of the site, and the page exists."""
    assert [text for text in words.of_the_code() if DOCS in text] == [DOCS], (
        "the site's address is in one place"
    )
    assert not [text for text in words.of_the_code() if re.search(r"\bdocs/|\.md\b", text)]
    named = [page for file in words.PACKAGE.rglob("*.py") for page in words.pages_named(file.read_text())]
    assert len(named) >= 2
    for page in named:
        assert (ROOT / "docs" / page).with_suffix(".md").exists(), page


def test_words_of_docstrings_and_comments_are_no_messages() -> None:
    source = '''
"""A docstring."""
def f(x):
    """Another."""
    logger.warning("%s is lost", x)  # a comment
    raise ValueError(f"no {x} here")
'''
    assert list(words.logged(source)) == ["%s is lost"]
    assert list(words.literals(source)) == ["%s is lost", "no ", " here"]
    assert list(words.lua_literals("local a = 'b' -- 'c'")) == ["b"]
    assert list(words.pages_named('f"see {DOCS}how-to/x.html for {this}"')) == ["how-to/x.html"]


def test_the_package_index_shows_the_readme_s_first_sentence() -> None:
    [tagline] = re.findall(r"^\*\*(.+)\*\*$", (ROOT / "README.md").read_text(), re.MULTILINE)[:1]
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["description"] == tagline


SOLO, PREFORK = r"# \(solo\) to \S+ \(prefork\)", r"\S+ \(solo\) to # \(prefork\)"


@pytest.mark.parametrize(
    ("claim", "scenario", "ours", "plain"),
    [
        ("due now costs # times as much", "enqueue", "enqueue, due now", "apply_async"),
        ("one for later # times", "enqueue", "enqueue, far", "apply_async(eta=)"),
        ("that is scheduled already # times", "enqueue", "enqueue, coalesced", "apply_async"),
        *(
            (
                f"{figures} {words}",
                "evaluate",
                f"evaluations a second{batch}, {pool}",
                f"tasks a second, {pool}",
            )
            for figures, pool in ((SOLO, "solo"), (PREFORK, "prefork"))
            for words, batch in (
                ("times as many entities as it runs tasks", ""),
                ("times as many with `batch_size=64`", ", batch_size=64"),
            )
        ),
        (
            "A million scheduled entities take # MB of the index",
            "million",
            "bytes in the index per entity",
            None,
        ),
    ],
)
def test_the_readme_s_figures_are_those_of_the_benchmarks(
    claim: str, scenario: str, ours: str, plain: str | None
) -> None:
    """To as many places as the README gives."""
    results = json.loads((ROOT / "docs/benchmarks/results.json").read_text())
    measured = results["scenarios"][scenario]["measured"]
    value = ratio(measured[ours], measured[plain]) if plain else statistics.median(measured[ours])
    text = " ".join(prose(Path("README.md")).split())
    found = re.search(claim.replace("#", r"(\d+(?:\.\d+)?)"), text)
    assert found
    assert found[1] == f"{value:.{len(found[1].partition('.')[2])}f}"


def test_stop_is_nowhere_shown_as_a_shutdown() -> None:
    """In one process' goal state engines it is one; who ports such code must not miss the difference."""
    api = (ROOT / "docs/reference/api.md").read_text()
    [row] = re.findall(r"^\| .*`stop\(\)`.*$", api, re.MULTILINE)
    for text in (row, Engine.stop.__doc__ or ""):
        assert "deployment" in text
        assert "process" in text


@page_by_page
def test_no_page_calls_an_enqueue_harmless(page: Path) -> None:
    """It loses nothing, but it ends a quarantine."""
    assert "always safe" not in " ".join((ROOT / page).read_text().split())


def test_settings_are_those_of_the_code() -> None:
    shown = table("docs/reference/settings.md", "Settings of an engine")
    assert shown.pop("goalstate_index_url")
    assert {name: shown_default(cells[0]) for name, cells in shown.items()} == {
        f"goalstate_{name}": default for name, default in defaults(Settings).items()
    }


def test_options_are_those_of_the_code() -> None:
    shown = table("docs/reference/settings.md", "Options of a kind")
    assert {name: shown_default(cells[0]) for name, cells in shown.items()} == defaults(KindOptions)


def test_celery_task_options_are_those_of_the_code() -> None:
    text = (ROOT / "docs/reference/settings.md").read_text()
    accepted, refused = re.findall(r"^(?:Accepted|Refused): (.*?)\.$", text, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(\w+)`", accepted)) == TASK_OPTIONS
    assert set(re.findall(r"`(\w+)`", refused)) == set(REFUSED_TASK_OPTIONS)


def test_signals_are_those_of_the_code() -> None:
    shown = table("docs/how-to/signals-and-traces.md", "Signals")
    sent = {name: each for name, each in vars(signals).items() if isinstance(each, Signal)}
    assert set(shown) == set(sent)
    for name, (_, arguments) in shown.items():
        told = {argument for argument in sent[name].providing_args if f"`{argument}`" in arguments}
        assert told == set(sent[name].providing_args) - {"engine", "kind", "id"}


def test_statuses_are_those_of_the_code() -> None:
    assert list(table("docs/reference/api.md", "Statuses")) == list(Status)


def test_errors_are_those_of_the_code() -> None:
    errors = {
        name
        for name, each in inspect.getmembers(exceptions, inspect.isclass)
        if issubclass(each, exceptions.GoalStateError)
    }
    assert set(table("docs/reference/api.md", "Errors")) == errors - {"GoalStateError"}


def test_the_test_kit_is_that_of_the_code() -> None:
    text = (ROOT / "docs/reference/api.md").read_text()
    section = text.partition("## Tests of your entities")[2].partition("\n## ")[0]
    told = set(re.findall(r"\w+", section))
    for name in testing.__all__:
        assert name in told
    for call in re.findall(r"^\| `((?:check_\w+|context|simulate)\(.*?\))`", section, re.MULTILINE):
        name, arguments = call.split("(", 1)
        assert set(re.findall(r"\b[a-z]\w*(?=[,=)])", re.sub(r"=[^,)]+", "=", arguments))) == set(
            inspect.signature(getattr(testing, name)).parameters
        ), name


def test_commands_are_those_of_the_code() -> None:
    shown = table("docs/reference/cli.md", "Commands")
    assert set(shown) == set(cli.goalstate.commands)
    for name, cells in shown.items():
        options = {o for p in cli.goalstate.commands[name].params for o in p.opts if o.startswith("--")}
        assert set(re.findall(r"--[a-z-]+", " ".join(cells))) == options - {"--json"}, name
