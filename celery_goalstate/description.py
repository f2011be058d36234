"""What the index knows of an entity, for people and programs: statuses, times as datetimes."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from celery_goalstate.index.base import LONGEST_WORD, Position, Record, cut
from celery_goalstate.index.base import Failure as IndexFailure
from celery_goalstate.index.base import Listing as IndexListing
from celery_goalstate.index.base import Status as IndexStatus


class Status(enum.StrEnum):
    """Where an entity stands. One that the engine does not track has none."""

    SCHEDULED = "scheduled"  #: an evaluation is pending
    RUNNING = "running"  #: a worker evaluates it now; a next evaluation may be pending
    IDLE = "idle"  #: evaluated; nothing is pending
    FAILED = "failed"  #: quarantined until it is enqueued


class Listing(enum.StrEnum):
    """What else there are lists of, besides those of each status."""

    FAILING = "failing"  #: those that have failed and are tried again, the longest first
    OVERDUE = "overdue"  #: those that are due, the longest first
    NEXT = "next"  #: those that are pending and not due yet, the next first
    LONG = "long"  #: those whose evaluation lasts for longer than a third of a lease, the longest first


PUBLIC_STATUSES = {
    IndexStatus.PARKED: Status.SCHEDULED,
    IndexStatus.SENT: Status.SCHEDULED,
    IndexStatus.RUNNING: Status.RUNNING,
    IndexStatus.IDLE: Status.IDLE,
    IndexStatus.FAILED: Status.FAILED,
}


@dataclass(frozen=True, slots=True)
class Enqueued:
    """What `enqueue` did. It has no truth value: say which of its fields is meant."""

    changed: bool  #: did it change the schedule?
    deadline: datetime | None  #: the one in force (UTC); None: nothing is pending
    sent: bool  #: was a message published? If not, the index sends it in time

    def __bool__(self) -> bool:
        raise TypeError("an Enqueued is neither true nor false; use .changed or .sent")


@dataclass(frozen=True, slots=True)
class Failure:
    """One evaluation that failed."""

    at: datetime  #: when it ended (UTC)
    error: str
    state: str  #: as it was read last; empty: it was not read, or its worker fell silent
    step: str  #: where it failed: an action's name, `get_state`, ...; empty: that is not known
    seconds: float | None  #: how long that action took, if it was one
    task_id: str | None


@dataclass(frozen=True, slots=True)
class Doing:
    """What a long evaluation was doing when its lease was renewed last."""

    worker: str  #: Celery's name of it
    pid: int  #: of the process that evaluates
    step: str  #: an action's name, `get_state`, ...
    calls: str  #: `app.py:7 call_carrier < app.py:8 ship`: the innermost call first; empty: not known
    seen: datetime | None = None  #: when that was (UTC)

    def text(self) -> str:
        """As the index keeps it."""
        calls = cut(self.calls, LONGEST_CALLS)
        fields = [cut(self.worker, LONGEST_WORD), self.pid, cut(self.step, LONGEST_WORD), calls]
        return json.dumps(fields, ensure_ascii=False)


#: Bytes of calls that are kept.
LONGEST_CALLS = 160


def _doing(record: Record) -> Doing | None:
    found = record.whereabouts
    if found is None:
        return None
    try:
        worker, pid, step, calls = json.loads(found.where)
    except (ValueError, TypeError):
        return None  # another release's
    return Doing(worker, pid, step, calls, datetime_of(found.seen))


@dataclass(frozen=True, slots=True)
class Description:
    """Everything that the index knows of an entity. Datetimes are UTC."""

    kind: str
    id: str
    status: Status
    deadline: datetime | None  #: of the pending evaluation
    sent: bool  #: is a message under way for it? If not, it is parked in the index
    failures: int  #: consecutive ones
    error: str | None  #: of the last evaluation
    failing: (
        datetime | None
    )  #: since when its evaluations fail; None: the last one did not, or no more follows
    history: tuple[Failure, ...]  #: the last failures, newest first; in lists, that one only
    state: str | None  #: in up to 20 characters, as the last evaluation read it last
    goal: str | None  #: likewise
    step: str | None  #: where the last evaluation failed
    task_id: str | None  #: of the Celery task under way, or of the last one
    converged: bool | None  #: did the last evaluation reach the goal? None: it was not read
    finished: datetime | None  #: when the last evaluation ended
    started: datetime | None  #: when the evaluation under way began
    doing: Doing | None  #: what that is doing, once it has lasted for a third of a lease
    lease_expires: datetime | None  #: when its worker may count as lost, unless it renews
    fencing_token: int | None  #: of the evaluation under way
    quarantined: datetime | None  #: since when
    cursor: str  #: where it stands in lists, for `Engine.list(after=...)`


def public_listing(name: str) -> Status | Listing:
    """The status or the list of this name. Raises `ValueError` if there is none."""
    if name in list(Status):
        return Status(name)
    if name in list(Listing):
        return Listing(name)
    raise ValueError(f"status is {name!r}; give one of {', '.join([*Status, *Listing])}")


def index_listings(listing: Status | Listing) -> list[IndexStatus | IndexListing]:
    """What the index calls this status or list."""
    match listing:
        case Listing.FAILING:
            return [IndexListing.FAILING]
        case Listing.LONG:
            return [IndexListing.LONG]
        case Listing.OVERDUE | Listing.NEXT:
            return [IndexStatus.PARKED, IndexStatus.SENT]
    return [inner for inner, public in PUBLIC_STATUSES.items() if public is listing]


def public_counts(counts: Mapping[IndexStatus, int]) -> dict[Status, int]:
    """The index's counts, by public status."""
    counted = dict.fromkeys(Status, 0)
    for status, count in counts.items():
        counted[PUBLIC_STATUSES[status]] += count
    return counted


def datetime_of(milliseconds: int | None) -> datetime | None:
    """The index's milliseconds as a datetime in UTC."""
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


def description_of(kind: str, record: Record, listing: Status | Listing | None = None) -> Description:
    """A record of the index, described, as it stands in this list; None: in that of its status."""
    listing = listing or PUBLIC_STATUSES[record.status]
    return Description(
        kind=kind,
        id=record.id,
        status=PUBLIC_STATUSES[record.status],
        deadline=datetime_of(record.deadline),
        sent=record.status is IndexStatus.SENT,
        failures=record.failures,
        error=record.error or None,
        failing=datetime_of(record.failing),
        history=tuple(map(_failure, record.history)),
        state=record.state or None,
        goal=record.goal or None,
        step=record.step or None,
        task_id=record.task_id or None,
        converged=record.converged,
        finished=datetime_of(record.finished),
        started=datetime_of(record.started),
        doing=_doing(record),
        lease_expires=datetime_of(record.lease_expires),
        fencing_token=int(record.lease) if record.lease else None,
        quarantined=datetime_of(record.since),
        cursor=f"{listing}/{kind}/{record.score:.0f}/{record.id}",
    )


def _failure(failure: IndexFailure) -> Failure:
    return Failure(
        at=datetime.fromtimestamp(failure.at / 1000, UTC),
        error=failure.error,
        state=failure.state,
        step=failure.step,
        seconds=None if failure.took is None else failure.took / 1000,
        task_id=failure.task_id or None,
    )


def position_of(cursor: str) -> tuple[Status | Listing, str, Position]:
    """The list and the kind of the entity that has this cursor, and where it stands there.

    Raises `ValueError`.
    """
    match = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
    if match is None:
        raise ValueError(f"after is {cursor!r}; give the `cursor` of the last entity that you have")
    listing, kind, score, id = match.groups()
    return public_listing(listing), kind, Position(float(score), id)


_CURSOR = re.compile(rf"({'|'.join([*Status, *Listing])})/([^/]+)/([0-9]{{1,16}}|inf)/(.+)")
