"""The only room that knows how Celery and kombu publish and read messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from celery import Celery

from celery_goalstate.index.base import Index, Wakeup
from celery_goalstate.messages.eager import EagerPublisher
from celery_goalstate.messages.notes import NO_LINK
from celery_goalstate.messages.publisher import MessagePublisher
from celery_goalstate.registry import Kind
from celery_goalstate.settings import Settings


class Publisher(Protocol):
    """Where wake-ups go. Those that could not be published are parked: the sweeper sends them later."""

    def dispatch(
        self,
        kind: Kind,
        wakeups: Sequence[Wakeup],
        *,
        enqueued: bool = False,
        link: Mapping[str, Any] = NO_LINK,
    ) -> bool:
        """Publish wake-ups; whether all were. It waits for the broker for `broker_timeout`, and warns then.

        `enqueued`: by the caller, just now. All others carry what their enqueue noted. `link` names the
        caller's trace, if the messages are not to be a part of it.
        """

    def publish_at_once(self, kind: Kind, wakeups: Sequence[Wakeup]) -> None:
        """Publish wake-ups of nobody who is there, without a second try. It waits for `sweep_timeout`.

        Raises `errors.BrokerUnavailable` or `errors.MessagesRefused`, unless all were published.
        """


def open_publisher(app: Celery, index: Index, settings: Settings) -> Publisher:
    """The publisher of an engine: by messages, or, with `task_always_eager`, without any."""
    return _AsConfigured(app, index, settings)


class _AsConfigured:
    """Asks each time: tests switch `task_always_eager` on and off."""

    def __init__(self, app: Celery, index: Index, settings: Settings) -> None:
        self._conf = app.conf
        self._by_messages = MessagePublisher(app, index, settings)
        self._eagerly = EagerPublisher(app, index)

    @property
    def _publisher(self) -> Publisher:
        return self._eagerly if self._conf.task_always_eager else self._by_messages

    def dispatch(
        self,
        kind: Kind,
        wakeups: Sequence[Wakeup],
        *,
        enqueued: bool = False,
        link: Mapping[str, Any] = NO_LINK,
    ) -> bool:
        return self._publisher.dispatch(kind, wakeups, enqueued=enqueued, link=link)

    def publish_at_once(self, kind: Kind, wakeups: Sequence[Wakeup]) -> None:
        self._publisher.publish_at_once(kind, wakeups)
