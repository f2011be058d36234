"""Text for people: in terminals, logs and Flower. An id or an error may hold whatever one puts into it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Where the documentation is read. Messages name its pages, for the files of docs/ are not installed.
DOCS = "https://celery-goalstate.readthedocs.io/en/stable/"


def printable(text: str) -> str:
    """The text with escapes for what is no mark on paper: control characters, turns of direction, surrogates.

    As `repr` has it. So a text can neither steer a terminal, nor forge a line of a log, nor read as another.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest of the known names; empty if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
