"""What the index knows of an entity, for people and programs: statuses, times as datetimes."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from celery_goalstate.index.base import Position, Record
from celery_goalstate.index.base import Status as IndexStatus


class Status(enum.StrEnum):
    """Where an entity stands. One that the engine does not track has none."""

    SCHEDULED = "scheduled"  #: an evaluation is pending
    RUNNING = "running"  #: a worker evaluates it now; a next evaluation may be pending
    IDLE = "idle"  #: evaluated; nothing is pending
    FAILED = "failed"  #: quarantined until it is enqueued


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
class Description:
    """Everything that the index knows of an entity. Datetimes are UTC."""

    kind: str
    id: str
    status: Status
    deadline: datetime | None  #: of the pending evaluation
    sent: bool  #: is a message under way for it? If not, it is parked in the index
    failures: int  #: consecutive ones
    error: str | None  #: of the last evaluation
    task_id: str | None  #: of the Celery task under way, or of the last one
    converged: bool | None  #: did the last evaluation reach the goal? None: it was not read
    finished: datetime | None  #: when the last evaluation ended
    started: datetime | None  #: when the evaluation under way began
    lease_expires: datetime | None  #: when its worker may count as lost, unless it renews
    fencing_token: int | None  #: of the evaluation under way
    quarantined: datetime | None  #: since when
    cursor: str  #: where it stands in lists, for `Engine.list(after=...)`


def public_status(status: str) -> Status:
    """The status of this name. Raises `ValueError` if there is none."""
    if status not in list(Status):
        raise ValueError(f"status is {status!r}; give one of {', '.join(Status)}")
    return Status(status)


def index_statuses(status: Status) -> list[IndexStatus]:
    """What the index calls this status."""
    return [inner for inner, public in PUBLIC_STATUSES.items() if public is status]


def public_counts(counts: Mapping[IndexStatus, int]) -> dict[Status, int]:
    """The index's counts, by public status."""
    counted = dict.fromkeys(Status, 0)
    for status, count in counts.items():
        counted[PUBLIC_STATUSES[status]] += count
    return counted


def datetime_of(milliseconds: int | None) -> datetime | None:
    """The index's milliseconds as a datetime in UTC."""
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


def description_of(kind: str, record: Record) -> Description:
    """A record of the index, described."""
    return Description(
        kind=kind,
        id=record.id,
        status=PUBLIC_STATUSES[record.status],
        deadline=datetime_of(record.deadline),
        sent=record.status is IndexStatus.SENT,
        failures=record.failures,
        error=record.error or None,
        task_id=record.task_id or None,
        converged=record.converged,
        finished=datetime_of(record.finished),
        started=datetime_of(record.started),
        lease_expires=datetime_of(record.lease_expires),
        fencing_token=int(record.lease) if record.lease else None,
        quarantined=datetime_of(record.since),
        cursor=_cursor(kind, PUBLIC_STATUSES[record.status], Position(record.score, record.id)),
    )


def _cursor(kind: str, status: Status, position: Position) -> str:
    return f"{status}/{kind}/{position.score:.0f}/{position.id}"


def position_of(cursor: str) -> tuple[Status, str, Position]:
    """The status and the kind of the entity that has this cursor, and where it stands among those.

    Raises `ValueError`.
    """
    match = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
    if match is None:
        raise ValueError(f"after is {cursor!r}; give the `cursor` of the last entity that you have")
    status, kind, score, id = match.groups()
    return Status(status), kind, Position(float(score), id)


_CURSOR = re.compile(rf"({'|'.join(Status)})/([^/]+)/([0-9]{{1,16}}|inf)/(.+)")
