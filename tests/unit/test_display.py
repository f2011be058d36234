from __future__ import annotations

import ast
import enum
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_goalstate.display import matrix_html, matrix_text, printable, state_text
from celery_goalstate.entity import EntityRef
from celery_goalstate.rules import ANY, Rules


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("plain ünï → 🙂 'quoted' \\", "plain ünï → 🙂 'quoted' \\"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b31m", r"\x9b31m"),
        ("two\nlines\r\ttab", r"two\nlines\r\ttab"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("\ud83d\U000e0001", r"\ud83d\U000e0001"),
    ],
)
def test_what_is_no_mark_on_paper_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_whatever_it_is(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    assert printable(text) == text or not text.isprintable()
    if "\\" not in text and "'" not in text:
        assert ast.literal_eval(f"'{printable(text)}'") == text


def test_the_name_of_an_entity_is_printable() -> None:
    assert str(EntityRef("order", "a\u202eb")) == r"order/a\u202eb"
    assert EntityRef("order", "a\u202eb").id == "a\u202eb"


class State(enum.Enum):
    NEW = "n"
    PAID = "p"


RULES = Rules({"shipped": {State.NEW: ["charge", "ship"], State.PAID: ["ship"]}, ANY: {ANY: []}})


class Unprintable:
    def __str__(self) -> str:
        raise OSError


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (State.NEW, "NEW"),
        ("two\nlines", "two lines"),
        (3, "3"),
        ("x" * 100, "x" * 59 + "…"),
        (Unprintable(), "<Unprintable that cannot be printed>"),
    ],
    ids=["Enum", "lines", "number", "long", "Unprintable"],
)
def test_a_state_in_words(state: Any, text: str) -> None:
    assert state_text(state) == text


def test_the_matrix_for_a_terminal() -> None:
    assert matrix_text(RULES.matrix((State.PAID, "shipped"))).splitlines() == [
        "STATE  → shipped           → ANY",
        "NEW    charge, ship        nothing (ANY state)",
        "PAID   * ship              nothing (ANY state)",
        "ANY    nothing (ANY goal)  nothing",
    ]


def test_the_matrix_for_a_terminal_shows_a_gap() -> None:
    assert matrix_text(Rules({"g": {"s": []}}).matrix(("lost", "g"))).splitlines() == [
        "STATE  → g",
        "s      nothing",
        "lost   * no rule",
    ]


class Parsed(HTMLParser):
    """The tags with their attributes, and the text of each cell."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], "all tags are closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "th" in self.open or "td" in self.open:
            self.cells[-1] += data


def test_the_matrix_as_html() -> None:
    page = Parsed(matrix_html(RULES.matrix((State.PAID, "shipped"))))
    assert page.cells == [
        *("State", "shipped", "ANY"),
        *("NEW", "charge, ship", "nothing (ANY state)"),
        *("PAID", "now: ship", "nothing (ANY state)"),
        *("ANY", "nothing (ANY goal)", "nothing"),
    ]
    cells = [attributes for tag, attributes in page.tags if tag == "td"]
    assert [each["class"] for each in cells] == [
        *("goalstate-actions", "goalstate-nothing"),
        *("goalstate-actions goalstate-present", "goalstate-nothing"),
        *("goalstate-nothing", "goalstate-nothing"),
    ]
    assert [each.get("aria-current") for each in cells] == [None, None, "true", None, None, None]
    assert {attributes["scope"] for tag, attributes in page.tags if tag == "th"} == {"row", "col"}


def test_a_missing_cell_as_html() -> None:
    html = matrix_html(Rules({"g": {"s": []}}).matrix(("lost", "g")))
    assert '<td class="goalstate-missing goalstate-present" aria-current="true">' in html


TAGS = {"table", "caption", "thead", "tbody", "tr", "th", "td", "small", "strong"}


@given(st.text(), st.text(), st.from_regex(r"\S.*", fullmatch=True).filter(str.isprintable))
def test_whatever_states_and_actions_are_called_the_html_is_ours(state: str, goal: str, action: str) -> None:
    page = Parsed(matrix_html(Rules({goal: {state: [action]}}).matrix()))
    assert {tag for tag, _ in page.tags} <= TAGS
    assert {name for _, attributes in page.tags for name in attributes} <= {"class", "scope", "aria-current"}
    assert page.cells == ["State", state_text(goal), state_text(state), action]


@given(st.text(), st.text())
def test_whatever_states_are_called_the_text_steers_no_terminal(state: str, goal: str) -> None:
    text = matrix_text(Rules({goal: {state: []}}).matrix((state, goal)))
    assert re.sub("\n", "", text).isprintable()
    assert len(text.split("\n")) == 2
