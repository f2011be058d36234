"""Publishing wake-ups as messages: tasks of Celery like any other, in everything that others can see.

A kind's message leaves by its task's `apply_async`, or, where the kind is only known by name, by the app's
`send_task`: whatever an app, a base class, a router or a tracer does to messages, it does to these.

Who publishes makes a difference. What a caller enqueues is published in the caller's context, as a task that
it calls itself would be. All else (a retry, the next evaluation, what was parked, what is sent again) is
published by a worker for somebody who is not there: it carries what the enqueue noted, and continues no trace
of what that worker is busy with.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from contextvars import Context
from datetime import timedelta
from functools import partial
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery
from celery.utils.quorum_queues import detect_quorum_queues

from celery_goalstate.index.base import Index, Wakeup
from celery_goalstate.messages.errors import BrokerUnavailable, MessagesRefused, NotPublished
from celery_goalstate.messages.notes import LINK, NO_LINK, adds_headers, outside_traces, read_note
from celery_goalstate.messages.producers import Producers
from celery_goalstate.messages.wakeup import contents_of, grouped
from celery_goalstate.registry import Kind
from celery_goalstate.settings import Settings

logger = logging.getLogger(__name__)

#: Messages that one flush of a connection carries; those of a flush that failed are all parked again.
BATCH = 500

#: How to publish without a wait. (With `retry=False`, kombu still tries to connect for some seconds.)
AT_ONCE: Mapping[str, Any] = {"retry": True, "retry_policy": {"max_retries": 0}}


class MessagePublisher:
    """Publishes the wake-ups of one engine."""

    def __init__(self, app: Celery, index: Index, settings: Settings) -> None:
        self._app = app
        self._index = index
        self._patient = Producers(app, settings.broker_timeout)
        self._hasty = Producers(app, min(settings.broker_timeout, settings.sweep_timeout))

    def dispatch(
        self,
        kind: Kind,
        wakeups: Sequence[Wakeup],
        *,
        enqueued: bool = False,
        link: Mapping[str, Any] = NO_LINK,
    ) -> bool:
        """As `messages.Publisher` says."""
        options = kind.options.routing
        try:
            self._publish(self._patient, kind, wakeups, options, enqueued=enqueued, link=link)
        except NotPublished as error:
            logger.warning("%s, the sweeper will send them later: %s", error, error.reason)
            if isinstance(error.__cause__, SoftTimeLimitExceeded):
                raise error.__cause__ from None  # meant for the action that enqueues
            return False
        return True

    def publish_at_once(self, kind: Kind, wakeups: Sequence[Wakeup]) -> None:
        """As `messages.Publisher` says."""
        self._publish(self._hasty, kind, wakeups, {**kind.options.routing, **AT_ONCE})

    def _publish(
        self,
        producers: Producers,
        kind: Kind,
        wakeups: Sequence[Wakeup],
        options: Mapping[str, Any],
        *,
        enqueued: bool = False,
        link: Mapping[str, Any] = NO_LINK,
    ) -> None:
        asked_at = time.monotonic()
        for start in range(0, len(wakeups), BATCH):
            messages = list(grouped(wakeups[start : start + BATCH], kind.options.batch_size))
            try:
                self._publish_batch(
                    producers, kind, messages, options, asked_at, enqueued=enqueued, link=link
                )
            except Exception as error:
                left = wakeups[start:]
                self._index.put_back(kind.name, left)
                what = f"could not publish {len(left)} of kind {kind.name}"
                if isinstance(error, BrokerUnavailable):
                    raise BrokerUnavailable(what) from error.__cause__
                raise MessagesRefused(what) from error

    def _publish_batch(
        self,
        producers: Producers,
        kind: Kind,
        messages: list[list[Wakeup]],
        options: Mapping[str, Any],
        asked_at: float,
        *,
        enqueued: bool,
        link: Mapping[str, Any],
    ) -> None:
        send = self._sender(kind)
        several = len(messages) > 1
        with (
            producers.borrowed() as producer,
            producer.flushed_together(BATCH) if several else nullcontext(),
        ):
            for wakeups in messages:
                delay = self._delay(wakeups[0], asked_at, producer)
                of_message = {**options, **delay, "producer": producer}
                if enqueued and link:
                    linked = {**of_message, "headers": {**of_message.get("headers", {}), LINK: link}}
                    outside_traces().run(self._send, send, kind, wakeups, linked)
                elif enqueued:
                    self._send(send, kind, wakeups, of_message)
                else:
                    context = Context() if adds_headers(self._app, kind) else outside_traces()
                    context.run(self._send_for_others, send, kind, wakeups, of_message)

    def _delay(self, wakeup: Wakeup, asked_at: float, producer: Any) -> Mapping[str, Any]:
        """Counted from `asked_at`: those at the end of many messages must not come later for that."""
        countdown = max(0.0, wakeup.delay / 1000 - (time.monotonic() - asked_at)) if wakeup.delay else 0.0
        if 0 < countdown < 1 and _delays_natively(self._app, producer):
            # RabbitMQ itself holds messages back by whole seconds, and Celery refuses less. Workers can.
            return {"headers": {"eta": (self._app.now() + timedelta(seconds=countdown)).isoformat()}}
        return {"countdown": countdown} if countdown else {}

    def _send_for_others(
        self, send: Callable[..., Any], kind: Kind, wakeups: Sequence[Wakeup], options: dict[str, Any]
    ) -> None:
        """With what the enqueue noted, and in no other chain of tasks than a retry of Celery's is."""
        note, task_id = read_note(wakeups[0].note), wakeups[0].task_id
        if note.headers:
            send = self._sender_as_noted(kind)
            options |= note.options
        if note.headers or note.link:
            carried = {**note.headers, LINK: note.link} if note.link else note.headers
            options["headers"] = {**options.get("headers", {}), **carried}
        if self._app.current_worker_task is not None:
            options |= {"root_id": task_id, "parent_id": task_id}
        self._send(send, kind, wakeups, options)

    def _task(self, kind: Kind) -> Any:
        """The kind's task; None: this process has no entity class of it."""
        return self._app.tasks.get(kind.task) if kind.entity_class is not None else None

    def _sender(self, kind: Kind) -> Callable[..., Any]:
        task = self._task(kind)
        if task is None:
            return partial(self._app.send_task, kind.task, ignore_result=True)
        return task.apply_async  # type: ignore[no-any-return]  # `task` is Any

    def _sender_as_noted(self, kind: Kind) -> Callable[..., Any]:
        """Below what the classes of app and task do: they would add what is this worker's."""
        task = self._task(kind)
        options: dict[str, Any] = {"ignore_result": True}
        if task is not None:
            options = {**task._get_exec_options(), "ignore_result": task.ignore_result, "task_type": task}
        return partial(Celery.send_task, self._app, kind.task, **options)

    @staticmethod
    def _send(
        send: Callable[..., Any], kind: Kind, wakeups: Sequence[Wakeup], options: Mapping[str, Any]
    ) -> None:
        args, kwargs, argsrepr, kwargsrepr = contents_of(kind.name, wakeups)
        send(
            args,
            kwargs,
            task_id=wakeups[0].task_id,
            retries=wakeups[0].retries,
            argsrepr=argsrepr,
            kwargsrepr=kwargsrepr,
            serializer="json",
            expires=None,  # whatever a base class says: a wake-up that is dropped is missed for long
            add_to_parent=False,  # which would remember all children that it has ever had
            **options,
        )


def _delays_natively(app: Celery, producer: Any) -> bool:
    """Whether RabbitMQ itself holds delayed messages back, as quorum queues need it: Celery knows how."""
    return bool(detect_quorum_queues(app, producer.connection.transport.driver_type)[0])
