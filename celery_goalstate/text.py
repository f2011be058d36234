"""Text for people: in terminals, logs and Flower. An id or an error may hold whatever one puts into it."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with escapes for what is no mark on paper: control characters, turns of direction, surrogates.

    As `repr` has it. So a text can neither steer a terminal, nor forge a line of a log, nor read as another.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )
