"""Publishing wake-ups as messages."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery
from celery.utils.quorum_queues import detect_quorum_queues

from celery_goalstate.index.base import Index, Wakeup
from celery_goalstate.messages.producers import Producers
from celery_goalstate.messages.wakeup import contents_of, grouped
from celery_goalstate.registry import Kind

logger = logging.getLogger(__name__)

#: Messages that one flush of a connection carries; those of a flush that failed are all parked again.
BATCH = 500

#: How to publish without a wait. (With `retry=False`, kombu still tries to connect for some seconds.)
AT_ONCE: Mapping[str, Any] = {"retry": True, "retry_policy": {"max_retries": 0}}

#: RabbitMQ itself holds messages back by whole seconds only, in milliseconds; workers hold them for the rest.
WHOLE_SECOND = 1000


class MessagePublisher:
    """Publishes the wake-ups of one engine."""

    def __init__(self, app: Celery, index: Index) -> None:
        self._app = app
        self._index = index
        self._producers = Producers(app)
        self._create_sent_event = app.conf.task_send_sent_event

    def dispatch(
        self,
        kind: Kind,
        wakeups: Sequence[Wakeup],
        *,
        wait: bool = True,
    ) -> bool:
        """Publish wake-ups; whether all were. Those that were not are parked: the sweeper sends them later.

        With `wait=False` it gives up at the first error of the broker.
        """
        asked_at = time.monotonic()
        routing = {**kind.options.routing, **({} if wait else AT_ONCE)}
        for start in range(0, len(wakeups), BATCH):
            messages = list(grouped(wakeups[start : start + BATCH], kind.options.batch_size))
            try:
                self._publish(kind, messages, routing, asked_at)
            except Exception as error:
                left = wakeups[start:]
                logger.warning(
                    "could not publish %d of kind %s, the sweeper will send them later: %s: %s",
                    len(left), kind.name, type(error).__name__, error,
                )  # fmt: skip
                self._index.put_back(kind.name, left)
                if isinstance(error, SoftTimeLimitExceeded):
                    raise  # meant for the action that enqueues
                return False
        return True

    def _publish(
        self, kind: Kind, messages: list[list[Wakeup]], options: Mapping[str, Any], asked_at: float
    ) -> None:
        with self._producers.borrowed() as producer:
            if len(messages) == 1:
                self._send(kind, messages[0], producer, options, asked_at)
                return
            with producer.batch(BATCH):
                for wakeups in messages:
                    self._send(kind, wakeups, producer, options, asked_at)

    def _send(
        self,
        kind: Kind,
        wakeups: list[Wakeup],
        producer: Any,
        options: Mapping[str, Any],
        asked_at: float,
    ) -> None:
        """What `app.send_task` does, without what a wake-up has no use for.

        In particular it has no parent: an entity that is looked at for ever is no endless chain of tasks. The
        delays count from `asked_at`: those at the end of many messages must not come later for that.
        """
        app, name, wakeup = self._app, kind.task, wakeups[0]
        options = {"serializer": "json", "ignore_result": True, **options}
        contents = {
            **contents_of(kind.name, wakeups)._asdict(),
            "retries": wakeup.retries,
            "countdown": max(0.0, wakeup.delay / 1000 - (time.monotonic() - asked_at)) if wakeup.delay else 0,
        }
        if wakeup.delay >= WHOLE_SECOND and _delays_natively(app, producer):
            app.send_task(
                name, task_id=wakeup.task_id, producer=producer, add_to_parent=False, **contents, **options
            )
            return
        ignore_result = options.pop("ignore_result")
        message = app.amqp.create_task_message(
            wakeup.task_id,
            name,
            create_sent_event=self._create_sent_event,
            ignore_result=ignore_result,
            **contents,
        )
        if not ignore_result:
            app.backend.on_task_call(producer, wakeup.task_id)
        routed = app.amqp.router.route(options, name, contents["args"], contents["kwargs"])
        queue = routed.get("queue")
        if queue is not None and hash(queue) in producer.connection.declared_entities:
            routed["declare"] = ()  # kombu would find that out, too, at the cost of three copies of the queue
        app.amqp.send_task_message(producer, name, message, **routed)


def _delays_natively(app: Celery, producer: Any) -> bool:
    """Whether RabbitMQ itself holds delayed messages back, as quorum queues need it: Celery knows how."""
    return bool(detect_quorum_queues(app, producer.connection.transport.driver_type)[0])
