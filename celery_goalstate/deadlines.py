"""What callers say about when, and what the index is asked for that. Relative deadlines stay relative."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from celery_goalstate.backoff import FURTHEST, delay_seconds
from celery_goalstate.index.base import Policy, Request, random_id

#: When to evaluate: seconds from now, a timedelta from now, or an aware datetime; None: now.
Deadline = float | timedelta | datetime | None


def one_deadline(deadline: Deadline, eta: datetime | None, countdown: float | None) -> Deadline:
    """The one of them that is given. Raises `TypeError` for several, or for one of another sort."""
    if eta is None and countdown is None:
        return deadline
    given = {"deadline": deadline, "eta": eta, "countdown": countdown}
    values = {name: value for name, value in given.items() if value is not None}
    if len(values) > 1:
        raise TypeError(f"give only one of {' and '.join(values)}: each is the deadline")
    if eta is not None and not isinstance(eta, datetime):
        raise TypeError(f"eta is {eta!r}; give an aware datetime")
    if countdown is not None and isinstance(countdown, datetime):
        raise TypeError(f"countdown is {countdown!r}; give seconds, or the datetime as eta=")
    return next(iter(values.values()), None)


def request_for(id: str, deadline: Deadline, *, now: Callable[[], datetime]) -> Request:
    """Relative deadlines stay relative: the index adds them to its own clock.

    Raises `TypeError` or `ValueError` for a deadline that cannot be one; `now` is this process's clock.
    """
    if deadline is None:
        return Request(id, delay=0, task_id=random_id())
    if isinstance(deadline, datetime):
        if deadline.utcoffset() is None:
            raise ValueError(f"deadline is {deadline!r}, which has no time zone; give an aware datetime")
        if deadline - now() > FURTHEST:
            raise ValueError(f"deadline is {deadline!r}; give one within the next hundred years")
        return Request(id, at=milliseconds(deadline.timestamp()), task_id=random_id())
    if not isinstance(deadline, (int, float, timedelta)):
        raise TypeError(f"deadline is {deadline!r}; give an aware datetime, a timedelta or seconds from now")
    return Request(id, delay=milliseconds(delay_seconds(deadline, "deadline")), task_id=random_id())


def spread_by(request: Request, id: str, more: int) -> Request:
    """The same request for this entity, so many milliseconds later."""
    if request.at is not None:
        return Request(id, at=request.at + more, task_id=random_id())
    return Request(id, delay=(request.delay or 0) + more, task_id=random_id())


def policy_of(*, replace: bool, max_wait: float | timedelta | None) -> tuple[Policy, int | None]:
    """How the request meets what is scheduled already, and its bound in milliseconds. Raises `TypeError`."""
    if max_wait is None:
        return (Policy.REPLACE if replace else Policy.EARLIEST), None
    if not replace:
        raise TypeError(f"max_wait={max_wait!r} bounds replace=True, which is not given")
    return Policy.REPLACE, milliseconds(delay_seconds(max_wait, "max_wait"))


def milliseconds(seconds: float) -> int:
    """For the index, which counts in milliseconds. Rounded up: never before the time asked for."""
    return -int(-seconds * 1000 // 1)
