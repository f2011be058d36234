"""The pages of decisions: each says since when it holds, or what took its place, and where its code is."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

DECISIONS = sorted((ROOT / "docs/decisions").glob("*.md"))

#: What stands below a page's title; a decision that holds in part says so after a semicolon.
STATUS = re.compile(
    r"Status: (?:accepted|superseded by \[\d{4}\]\((?P<by>\d{4}-[a-z0-9-]+\.md)\)),"
    r" (?P<date>\d{4}-\d\d-\d\d)(?:; .+)?\."
)

each_page = pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)


def test_they_are_numbered() -> None:
    assert [page.name[:5] for page in DECISIONS] == [f"{n:04}-" for n in range(1, len(DECISIONS) + 1)]


@each_page
def test_a_decision_has_a_status_and_a_date(page: Path) -> None:
    title, empty, status = page.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert empty == ""
    found = STATUS.fullmatch(status)
    assert found, status
    assert date.fromisoformat(found["date"])
    if found["by"]:
        assert found["by"] > page.name
        assert (page.parent / found["by"]).exists()


@each_page
def test_a_decision_that_holds_says_where_its_code_is(page: Path) -> None:
    text = page.read_text()
    if "\nStatus: superseded" in text:
        return
    [where] = re.findall(r"^Code: (?:.+\n)+", text, re.MULTILINE)
    named = re.findall(r"`([\w/]+\.\w+)`(?:\s+\(([^)]+)\))?", where)
    assert named
    for file, names in named:
        [path] = [each for each in (ROOT / "celery_goalstate" / file, ROOT / file) if each.exists()] or [None]
        assert path, f"{file} does not exist"
        for name in re.findall(r"`(\w+)`", names):
            assert name in path.read_text(), f"{file} has no {name}"
