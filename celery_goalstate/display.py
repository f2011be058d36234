"""Text for people: in terminals, logs and Flower. An id or an error may hold whatever one puts into it."""

from __future__ import annotations

import difflib
import enum
import getpass
import os
import platform
from collections.abc import Container, Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_goalstate.rules import Cell, Matrix

#: Where the documentation is read. Messages name its pages, for the files of docs/ are not installed.
DOCS = "https://celery-goalstate.readthedocs.io/en/stable/"

#: Characters of who does something.
LONGEST_NAME = 80
#: Characters of a state where it is named.
STATE_WIDTH = 60


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


def one_line(text: str, limit: int) -> str:
    """The text on one line, printable, and cut to `limit` characters."""
    shown = printable(" ".join(text.split())[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def text_of(value: object) -> str:
    """What `str()` says of the value, which need not be able to."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a text for people must not fail what it describes
        return f"<{type(value).__name__} that cannot be printed>"


def state_text(state: Any, limit: int = STATE_WIDTH) -> str:
    """A state or a goal state, on one line, in at most `limit` characters: of an Enum's member its name."""
    return one_line(state.name if isinstance(state, enum.Enum) else text_of(state), limit)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest of the known names; empty if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


# Tables ------------------------------------------------------------------------------------------


def table_text(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Container[int] = ()) -> str:
    """A table for a terminal, whose columns are as wide as they must be; those of `numbers` end flush."""
    lines = [headings, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def cell_text(column: int, cell: str) -> str:
        return cell.rjust(widths[column]) if column in numbers else cell.ljust(widths[column])

    return "\n".join("  ".join(cell_text(*each) for each in enumerate(line)).rstrip() for line in lines)


def matrix_text(matrix: Matrix) -> str:
    """What `Rules.matrix` returns, for a terminal: a state a row, a goal state a column.

    A star marks the present cell. What the table does not say for the cell itself, but for `ANY`, names that.
    """
    return table_text(
        ["STATE", *(f"→ {goal}" for goal in matrix.goals)],
        [
            [state, *(f"{'* ' * cell.present}{_actions(cell)}{_inherited(cell)}" for cell in row)]
            for state, row in zip(matrix.states, matrix.rows, strict=True)
        ],
    )


def matrix_html(matrix: Matrix) -> str:
    """What `Rules.matrix` returns, as an HTML table: everything in it is escaped.

    It brings neither style nor script, but classes. The table is `goalstate-matrix`; a cell with actions
    `goalstate-actions`, with a deliberate nothing `goalstate-nothing`, one that is missing
    `goalstate-missing`; the present one is `goalstate-present`, too. What is from `ANY` says so in a
    `goalstate-inherited`.
    """
    return "\n".join(_html_lines(matrix))


def _html_lines(matrix: Matrix) -> Iterator[str]:
    yield '<table class="goalstate-matrix">'
    yield "<caption>What leads from a state (row) toward a goal state (column)</caption>"
    goals = "".join(f'<th scope="col">{_html(goal)}</th>' for goal in matrix.goals)
    yield f'<thead><tr><th scope="col">State</th>{goals}</tr></thead>'
    yield "<tbody>"
    for state, row in zip(matrix.states, matrix.rows, strict=True):
        yield f'<tr><th scope="row">{_html(state)}</th>{"".join(map(_html_cell, row))}</tr>'
    yield "</tbody>"
    yield "</table>"


def _html_cell(cell: Cell) -> str:
    sort = "missing" if cell.actions is None else "actions" if cell.actions else "nothing"
    attributes, text = f'class="goalstate-{sort}"', _html(_actions(cell))
    if cell.present:
        # In words, too: not every screen reader reads out which cell is the current one.
        attributes = f'class="goalstate-{sort} goalstate-present" aria-current="true"'
        text = f"<strong>now: </strong>{text}"
    if cell.inherited:
        text += f'<small class="goalstate-inherited">{_html(_inherited(cell))}</small>'
    return f"<td {attributes}>{text}</td>"


def _actions(cell: Cell) -> str:
    return "no rule" if cell.actions is None else ", ".join(cell.actions) or "nothing"


def _inherited(cell: Cell) -> str:
    return f" ({cell.inherited})" if cell.inherited else ""


def _html(text: str) -> str:
    return escape(printable(text))
