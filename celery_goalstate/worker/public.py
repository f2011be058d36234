"""The public task `goalstate.enqueue`, for beat and others who know only task names."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery import Celery

from celery_goalstate.deadlines import Deadline

if TYPE_CHECKING:
    from celery_goalstate.engine import Engine


def create_public_task(app: Celery, name: str, engine: Engine) -> None:
    """Create the task that enqueues an entity, and returns what `Engine.enqueue` did.

    Its deadline is None for now, a number of seconds from now, or an ISO 8601 time with its time zone.
    """

    def enqueue(kind: str, id: str | int, deadline: float | str | None = None) -> dict[str, Any]:
        done = engine.enqueue(engine.ref(kind, id), _read(deadline))
        return {
            "changed": done.changed,
            "deadline": None if done.deadline is None else done.deadline.isoformat(),
            "sent": done.sent,
        }

    enqueue.__qualname__ = name
    enqueue.__doc__ = "Enqueue an entity: kind, id, and when to evaluate it (seconds from now, or ISO 8601)."
    create: Any = app.task  # its stubs know no options by name
    create(enqueue, name=name, shared=False)


def _read(deadline: Any) -> Deadline:
    if not isinstance(deadline, str):
        given: Deadline = deadline
        return given
    try:
        return datetime.fromisoformat(deadline)
    except ValueError:
        raise ValueError(
            f"deadline is {deadline!r}; give seconds from now, or an ISO 8601 time with its time zone"
        ) from None
