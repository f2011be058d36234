"""The only room that knows how Celery and kombu publish and read messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from celery import Celery

from celery_goalstate.index.base import Index, Wakeup
from celery_goalstate.messages.eager import EagerPublisher
from celery_goalstate.messages.publisher import MessagePublisher
from celery_goalstate.registry import Kind


class Publisher(Protocol):
    """Where wake-ups go."""

    def dispatch(
        self, kind: Kind, wakeups: Sequence[Wakeup], *, enqueued: bool = False, wait: bool = True
    ) -> bool:
        """Publish wake-ups; whether all were. Those that were not are parked: the sweeper sends them later.

        `enqueued`: by the caller, just now. All others carry what their enqueue noted.
        With `wait=False` it gives up at the first error of the broker.
        """


def open_publisher(app: Celery, index: Index, *, timeout: float) -> Publisher:
    """The publisher of an engine: by messages, or, with `task_always_eager`, without any.

    It waits for a broker that does not answer for `timeout` seconds, or, with `wait=False`, for one.
    """
    return _AsConfigured(app, index, timeout)


class _AsConfigured:
    """Asks each time: tests switch `task_always_eager` on and off."""

    def __init__(self, app: Celery, index: Index, timeout: float) -> None:
        self._conf = app.conf
        self._by_messages = MessagePublisher(app, index, timeout=timeout)
        self._eagerly = EagerPublisher(app, index)

    def dispatch(
        self, kind: Kind, wakeups: Sequence[Wakeup], *, enqueued: bool = False, wait: bool = True
    ) -> bool:
        publisher: Publisher = self._eagerly if self._conf.task_always_eager else self._by_messages
        return publisher.dispatch(kind, wakeups, enqueued=enqueued, wait=wait)
