"""Text for people: in terminals, logs and Flower. An id or an error may hold whatever one puts into it."""

from __future__ import annotations

import difflib
import getpass
import os
import platform
from collections.abc import Iterable

#: Where the documentation is read. Messages name its pages, for the files of docs/ are not installed.
DOCS = "https://celery-goalstate.readthedocs.io/en/stable/"

#: Characters of who does something.
LONGEST_NAME = 80


def printable(text: str) -> str:
    """The text with escapes for what is no mark on paper: control characters, turns of direction, surrogates.

    As `repr` has it. So a text can neither steer a terminal, nor forge a line of a log, nor read as another.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


def this_user() -> str:
    """Who runs this process, and where: `ann@ops-1`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have a number only
        user = str(os.getuid()) if hasattr(os, "getuid") else "somebody"
    return printable(f"{user}@{platform.node()}")[:LONGEST_NAME]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest of the known names; empty if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
