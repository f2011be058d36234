"""Every error of this package, split by what the caller does next.

* Fix the call: `ImproperlyConfigured`, `UnknownKind` (and `ValueError` / `TypeError` for a bad argument).
* Try again: `IndexUnavailable`. (`AccessDenied`, which is one, is for whoever operates the index's server.)
* Raised *by an action*: `RetryAfter`, `PermanentError`, `EntityGone`.
* Raised or recorded by the engine: `ActionTimeout`, `Interrupted`, `LeaseLost`, `WorkerLost`.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any


class GoalStateError(Exception):
    """The root of this package's errors."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message if message is not None else (type(self).__doc__ or "").split("\n")[0])


class ImproperlyConfigured(GoalStateError, ValueError):
    """A setting or an option has a value that cannot work."""


class UnknownKind(GoalStateError, LookupError):
    """No entity class of this kind is registered with the engine."""


class IndexUnavailable(GoalStateError):
    """The index did not answer; the change may or may not have been noted, and asking again is safe.

    Of an index of several servers a part may have answered. Then what `counts` or `list` would have returned
    is in `known`, as far as it is known, and what is missing there in `away`.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        known: Any = None,
        away: Iterable[str] = (),
        away_for: float = 0.0,
        left: Iterable[int] = (),
    ) -> None:
        super().__init__(message)
        self.known = known  #: what the servers told that did answer; None: nothing
        self.away = tuple(away)  #: the shards that did not, as "order (shard 0)"; empty: none did
        self.away_for = away_for  #: seconds for which this process knows that the server does not answer
        #: Of `delete_kind`: the numbers of the shards in which entities may be left. Elsewhere empty.
        self.left = tuple(left)


class AccessDenied(IndexUnavailable):
    """The index's server refuses this process, until somebody changes its settings or ours."""


class RetryAfter(GoalStateError):
    """Raised by an action: a failure that is tried again after `seconds` instead of after the back-off.

    It neither counts towards `max_failures` nor makes the back-off grow: the other side named the time.
    """

    def __init__(self, seconds: float | timedelta, message: str | None = None) -> None:
        self.seconds = seconds.total_seconds() if isinstance(seconds, timedelta) else seconds
        super().__init__(message or f"again in {self.seconds:g} s")

    def __reduce__(self) -> tuple[type[RetryAfter], tuple[float, str]]:
        return type(self), (self.seconds, str(self))


class PermanentError(GoalStateError):
    """Raised by an action: trying again is useless; the entity is quarantined until it is enqueued."""


class EntityGone(GoalStateError):
    """Raised by an action, by `from_id` or a state: the entity does not exist any more, so it is forgotten.

    As by `Engine.delete`: no failure, no retry. What others enqueue meanwhile gives it a fresh life.
    """


class ActionTimeout(GoalStateError):
    """The time budget of an action or of its list is used up."""


class Interrupted(GoalStateError):
    """The evaluation was ended by what is no `Exception`: a `Timeout` of gevent, a `CancelledError`."""


class LeaseLost(GoalStateError):
    """The evaluation no longer holds its entity's lease, or its worker ends: another one goes on."""


class WorkerLost(GoalStateError):
    """The worker that evaluated the entity died, or was out of reach for longer than its lease."""
