"""Every error of this package, split by what the caller does next.

* Fix the call: `ImproperlyConfigured`, `UnknownKind` (and `ValueError` / `TypeError` for a bad argument).
* Try again: `IndexUnavailable`.
* Said *by an action* to the engine: `RetryAfter`, `PermanentError`.
* Said by the engine about an evaluation: `ActionTimeout`, `LeaseLost`, `WorkerLost`.
"""

from __future__ import annotations

from datetime import timedelta


class GoalStateError(Exception):
    """The root of this package's errors."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message if message is not None else (type(self).__doc__ or "").split("\n")[0])


class ImproperlyConfigured(GoalStateError, ValueError):  # noqa: N818 - the name that Celery and Django users know
    """A setting or an option has a value that cannot work."""


class UnknownKind(GoalStateError, LookupError):  # noqa: N818 - names the thing, as KeyError does
    """No entity class of this kind is registered with the engine."""


class IndexUnavailable(GoalStateError):  # noqa: N818 - a condition that passes, not a mistake
    """The index did not answer; the change may or may not have been noted, and saying it again is safe."""


class RetryAfter(GoalStateError):  # noqa: N818 - reads as the instruction that it is: raise RetryAfter(30)
    """Raised by an action: a failure whose next look comes after `seconds` instead of after the back-off.

    It neither counts towards `max_failures` nor makes the back-off grow: the other side said when to return.
    """

    def __init__(self, seconds: float | timedelta, message: str | None = None) -> None:
        self.seconds = seconds.total_seconds() if isinstance(seconds, timedelta) else seconds
        super().__init__(message or f"look again in {self.seconds:g} s")

    def __reduce__(self) -> tuple[type[RetryAfter], tuple[float, str]]:
        return type(self), (self.seconds, str(self))


class PermanentError(GoalStateError):
    """Raised by an action: trying again is useless; the entity is quarantined until somebody enqueues it."""


class ActionTimeout(GoalStateError):  # noqa: N818 - the counterpart of the built-in TimeoutError
    """The time budget of an action or of its list is used up."""


class LeaseLost(GoalStateError):  # noqa: N818 - as above: states what happened
    """The evaluation no longer holds its entity's lease; another may be under way, so it stops here."""


class WorkerLost(GoalStateError):  # noqa: N818 - Celery's WorkerLostError, seen from the entity
    """The worker that evaluated the entity died, or was out of reach for longer than its lease."""
