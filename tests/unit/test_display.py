from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_goalstate.display import printable
from celery_goalstate.entity import EntityRef


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
