"""What the pages show: asked of the index, and put into words. Its functions wait for the index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial as call_of
from typing import NamedTuple, TypeVar

from celery import Celery

from celery_goalstate.cli.arguments import IN_ONE_PROCESS, queue_of
from celery_goalstate.cli.output import course, details, moment, place, relative, span, what_follows
from celery_goalstate.cli.status import unswept
from celery_goalstate.description import Description, Doing, Failure, Listing, Status
from celery_goalstate.display import matrix_html, printable
from celery_goalstate.engine import Engine
from celery_goalstate.entity import Entity, EntityRef
from celery_goalstate.exceptions import GoalStateError, ImproperlyConfigured, IndexUnavailable
from celery_goalstate.index.base import Partial
from celery_goalstate.index.url import safe_url
from celery_goalstate.overview import Overview
from celery_goalstate.registry import engine_of
from celery_goalstate.rules import Matrix, Rules
from celery_goalstate.worker.task import state_word

T = TypeVar("T")

#: Rows of a list.
ROWS = 50


class Cell(NamedTuple):
    """What a table has at one place, under which heading, and what it says in full."""

    heading: str
    text: str
    full: str = ""
    wide: bool = False  #: may be long


class Row(NamedTuple):
    """An entity in a list."""

    ref: EntityRef
    cells: Sequence[Cell]
    task_id: str | None


@dataclass(frozen=True, slots=True)
class Tab:
    """A list of entities of all kinds: what it is called, which entities it has, and what it says of each."""

    name: str
    title: str
    heading: str  #: of the point in time by which it is in order
    since: Callable[[Description], datetime | None]
    count: Callable[[Overview], int]
    listings: Sequence[Status | Listing]
    none: str  #: what it says if there are none
    cells: Sequence[Callable[[Description], Cell]]

    def row(self, found: Description) -> Row:
        """What the list says of an entity."""
        time = _time(self.heading, self.since(found))
        return Row(
            EntityRef(found.kind, found.id), [time, *(cell(found) for cell in self.cells)], found.task_id
        )


def _time(heading: str, when: datetime | None) -> Cell:
    return Cell(heading, "") if when is None else Cell(heading, relative(when), moment(when))


def _states(found: Description) -> Cell:
    return Cell("State", states_text(found))


def _step(found: Description) -> Cell:
    return Cell("Failed in", printable(found.step or ""))


def _failures(found: Description) -> Cell:
    return Cell("Failures", str(found.failures or ""))


def _error(found: Description) -> Cell:
    error = printable(found.error or "")
    return Cell("Error", error, error, wide=True)


def _doing(found: Description) -> Cell:
    doing = found.doing
    return Cell("In action", doing_text(doing) if doing else "", wide=True)


def _next(found: Description) -> Cell:
    return _time("Next try", found.deadline)


def _message(found: Description) -> Cell:
    return Cell("Message", "on its way" if found.sent else "none")


TABS = (
    Tab(
        "failing",
        "Failing",
        "Failing since",
        lambda found: found.failing,
        lambda overview: overview.failing,
        (Listing.FAILING,),
        "Nothing fails.",
        (_states, _step, _failures, _error, _next),
    ),
    Tab(
        "failed",
        "Failed",
        "Quarantined",
        lambda found: found.quarantined,
        lambda overview: overview.counts[Status.FAILED],
        (Status.FAILED,),
        "Nothing is quarantined.",
        (_states, _step, _failures, _error),
    ),
    Tab(
        "running",
        "Running",
        "Running since",
        lambda found: found.started,
        lambda overview: overview.counts[Status.RUNNING],
        # Those that last long first: the others are in no order that says when they began.
        (Listing.LONG, Status.RUNNING),
        "Nothing is being evaluated.",
        (_states, _doing, _failures),
    ),
    Tab(
        "overdue",
        "Overdue",
        "Was due",
        lambda found: found.deadline,
        lambda overview: overview.overdue,
        (Listing.OVERDUE,),
        "Nothing is overdue.",
        (_states, _message, _failures, _error),
    ),
    Tab(
        "next",
        "Next",
        "Due",
        lambda found: found.deadline,
        lambda overview: max(0, overview.counts[Status.SCHEDULED] - overview.overdue),
        (Listing.NEXT,),
        "Nothing is scheduled.",
        (_states, _failures, _error),
    ),
)


# The board ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Board:
    """All kinds at a glance, and one list."""

    tab: Tab
    kinds: Sequence[Overview] = ()
    totals: dict[str, int] = field(default_factory=dict)  #: how many entities each tab has
    rows: Sequence[Row] = ()
    troubles: Sequence[str] = ()  #: what keeps it from being whole, or anything from happening
    is_whole: bool = False  #: has the index answered, all of it?


def board(app: Celery, namespace: str | None, wanted: str | None, kind: str | None) -> Board:
    """All kinds, and the list of this name, of one kind or of all: by default, what needs a person."""
    tab = next((tab for tab in TABS if tab.name == wanted), TABS[0])
    troubles: list[str] = []
    try:
        engine = open_engine(app, namespace)
        kinds = list((_known(engine, engine.overview, troubles) or {}).values())
    except GoalStateError as error:
        return Board(tab, troubles=[printable(str(error))])
    listed = [each for each in kinds if kind in (None, each.kind)]
    totals = {tab.name: sum(map(tab.count, listed)) for tab in TABS}
    if wanted is None:
        tab = next((tab for tab in TABS[:2] if totals[tab.name]), tab)
    names = [each.kind for each in listed if tab.count(each)]
    rows = _known(engine, lambda: _rows(engine, tab, names), troubles) or ()
    is_whole = not troubles
    troubles = [*dict.fromkeys(troubles), *map(printable, unswept(kinds))]
    return Board(tab, kinds, totals, rows, troubles, is_whole)


def _known(engine: Engine, call: Callable[[], T], troubles: list[str]) -> T | None:
    """What the call returns; if the index does not answer, which is added to the troubles, what is known."""
    try:
        return call()
    except IndexUnavailable as error:
        troubles.append(unavailable(engine, error))
        known: T | None = error.known
        return known


def _rows(engine: Engine, tab: Tab, kinds: Sequence[str]) -> Sequence[Row]:
    found: dict[tuple[str, str], Description] = {}
    partial = Partial()
    for kind in kinds:
        for listing in tab.listings:
            for each in partial.known(call_of(engine.list, kind, listing, ROWS)) or ():
                found.setdefault((kind, each.id), each)
    in_order = sorted(found.values(), key=lambda each: tab.since(each) or UNKNOWN)
    rows = [tab.row(each) for each in in_order[:ROWS]]
    partial.raise_if_away(rows)
    return rows


#: Of what has no point in time in a list: it comes last.
UNKNOWN = datetime.max.replace(tzinfo=UTC)


# One entity --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sheet:
    """What there is to say of one entity."""

    ref: EntityRef
    registered: bool  #: does this process know the kind, so that it can be enqueued?
    paused: bool
    status: str = ""  #: empty: it is not known
    states: str = ""
    converged: bool | None = None
    facts: dict[str, str] = field(default_factory=dict)
    history: Sequence[Failure] = ()
    follows: str = ""
    matrix: str = ""  #: HTML
    remark: str = ""  #: on the matrix
    task_id: str | None = None


def sheet(app: Celery, namespace: str | None, ref: EntityRef) -> Sheet:
    """All that is known of an entity. Raises `GoalStateError`: `IndexUnavailable`, `UnknownKind`."""
    with opened(app, namespace) as engine:
        found, paused = engine.describe(ref), engine.paused(ref.kind)
    registered = ref.kind in engine.kinds
    if found is None:
        return Sheet(ref, registered, paused)
    matrix, remark = _matrix(engine, ref.kind, found) if registered else ("", "")
    return Sheet(
        ref,
        registered,
        paused,
        status=found.status,
        states=printable(course(found)),
        converged=found.converged,
        facts=_facts(found, queue_of(engine, ref.kind)),
        history=found.history,
        follows=what_follows(found, paused),
        matrix=matrix,
        remark=remark,
        task_id=found.task_id,
    )


#: What the page says in another way than `show`.
TOLD_OTHERWISE = {"state", "before that", "failed before", "task id"}


def _facts(found: Description, queue: str | None) -> dict[str, str]:
    return {
        name: printable(text)
        for name, text in details(found, queue).items()
        if isinstance(text, str) and name not in TOLD_OTHERWISE
    }


def _matrix(engine: Engine, kind: str, found: Description) -> tuple[str, str]:
    """The kind's rules as HTML, and a remark on them; empty if this process does not have them."""
    cls = engine.kind(kind).entity_class
    if cls is None or not isinstance(cls.rules, Rules):
        return "", ""
    matrix = marked(cls.rules.matrix(), found.state, found.goal)
    own_code = cls.get_action_list is not Entity.get_action_list
    remark = f"{cls.__qualname__}.get_action_list() may choose otherwise." if own_code else ""
    return matrix_html(matrix), remark


def marked(matrix: Matrix, state: str | None, goal: str | None) -> Matrix:
    """The matrix with the cell marked in which an entity is, by the words that the index keeps."""
    row, column = _position(matrix.states, state), _position(matrix.goals, goal)
    return replace(
        matrix,
        rows=tuple(
            tuple(replace(cell, present=(r, c) == (row, column)) for c, cell in enumerate(cells))
            for r, cells in enumerate(matrix.rows)
        ),
    )


def _position(names: Sequence[str], kept: str | None) -> int | None:
    """Which of the names that is, if it can be only one of them; else `ANY`, if the table has it."""
    places = [n for n, name in enumerate(names) if state_word(name) == kept]
    if not places and kept is not None and "ANY" in names:
        return names.index("ANY")
    return places[0] if len(places) == 1 else None


# Both --------------------------------------------------------------------------------------------


def open_engine(app: Celery, namespace: str | None) -> Engine:
    """The engine that the pages are about. Raises `ImproperlyConfigured`."""
    engine = engine_of(app, namespace)
    if engine.settings.index_url == "memory://":
        raise ImproperlyConfigured(IN_ONE_PROCESS)
    return engine


@contextmanager
def opened(app: Celery, namespace: str | None) -> Iterator[Engine]:
    """The same, and an index that does not answer in the block is named in the error."""
    engine = open_engine(app, namespace)
    try:
        yield engine
    except IndexUnavailable as error:
        raise IndexUnavailable(unavailable(engine, error)) from error


def unavailable(engine: Engine, error: IndexUnavailable) -> str:
    """What the index did not answer, and where it was asked: without its password."""
    return printable(f"{error} ({safe_url(engine.settings.index_url)})")


def states_text(found: Description) -> str:
    """`paid → shipped`, as the last evaluation read them; empty if it read none."""
    return printable(" → ".join(filter(None, (found.state, found.goal))))


def doing_text(doing: Doing) -> str:
    """What a long evaluation does, and where."""
    return printable(f"{doing.step}{place(doing)}")


def took(failure: Failure) -> str:
    """How long the action took that failed."""
    return "" if failure.seconds is None else span(failure.seconds)
