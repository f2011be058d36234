"""Why messages could not be published. The publisher and the sweeper act on it; no user sees these."""

from __future__ import annotations

from kombu.exceptions import KombuError

from celery_goalstate.exceptions import GoalStateError


class NotPublished(GoalStateError):
    """Messages could not be published; `__cause__` says why."""

    @property
    def reason(self) -> str:
        """For people: without kombu's own wrapping, in which the words are lost at times."""
        error = self.__cause__
        if isinstance(error, KombuError):
            error = error.__cause__ or error
        return f"{type(error).__name__}: {error}"


class BrokerUnavailable(NotPublished):
    """The broker cannot be reached, or does not answer: other kinds' messages will hardly pass, either."""


class MessagesRefused(NotPublished):
    """The messages of one kind are refused, by the broker or on the way to it; others' may pass."""
