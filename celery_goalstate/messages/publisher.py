"""The message that wakes a worker: how it is written, published, and read.

A wake-up says which entity to look at, and carries the token that the index expects. It is disposable: the
index is the truth, and a wake-up that is lost, late or doubled changes nothing but the time.

    task     goalstate.<kind>
    args     [[id, token], ...]      one pair, unless the kind's batch_size allows for more
    kwargs   {"resent_at": ms}       on a message that is sent once more, else nothing; others are ignored, so
                                     that later releases may add to them
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery
from celery.exceptions import Retry
from celery.result import EagerResult
from celery.utils.quorum_queues import detect_quorum_queues

from celery_goalstate.display import printable
from celery_goalstate.entity import checked_id
from celery_goalstate.index.base import Index, Wakeup
from celery_goalstate.messages.producers import Producers, flushed_together
from celery_goalstate.registry import Kind

logger = logging.getLogger(__name__)

#: Messages that one flush of a connection carries; those of a flush that failed are all parked again.
BATCH = 500

#: How to publish without a wait. (With `retry=False`, kombu still tries to connect for some seconds.)
AT_ONCE: Mapping[str, Any] = {"retry": True, "retry_policy": {"max_retries": 0}}

#: RabbitMQ itself holds messages back by whole seconds only, in milliseconds; workers hold them for the rest.
WHOLE_SECOND = 1000

#: Characters of the arguments that are shown.
SHOWN = 800

#: In eager mode: how often one entity is evaluated within one outermost `enqueue`.
EAGER_LOOKS = 10


_TOKEN = re.compile(r"[0-9]{1,20}")


def read_message(args: Any, kwargs: Any) -> tuple[list[tuple[str, str]], int | None]:
    """The (id, token) pairs of a message, and when it was sent again. Raises `ValueError` for any other."""
    match args, kwargs.get("resent_at"):
        case [[_, *_] as pairs], (None | int()) as resent_at if 0 <= (resent_at or 0) < 2**53:
            wakeups = [_read_pair(pair) for pair in pairs]
            if len(dict(wakeups)) < len(wakeups):
                raise ValueError(f"a wake-up names each entity once, not as {args!r:.100}")
            return wakeups, resent_at
    raise ValueError(f"a wake-up is ([[id, token], ...],) {{}}, not {args!r:.100} {kwargs!r:.100}")


def _read_pair(pair: Any) -> tuple[str, str]:
    match pair:
        case [str(id), str(token)] if _TOKEN.fullmatch(token):
            return checked_id(id), token
    raise ValueError(f"a wake-up's pairs are [id, token], not {pair!r:.100}")


class Publisher:
    """Publishes the wake-ups of one engine."""

    def __init__(self, app: Celery, index: Index) -> None:
        self._app = app
        self._index = index
        self._eager = _EagerQueue()
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
        if not wakeups:
            return True
        if self._app.conf.task_always_eager:
            self._evaluate_inline(kind, wakeups)
            return True
        asked_at = time.monotonic()
        routing = {**kind.options.routing, **({} if wait else AT_ONCE)}
        for start in range(0, len(wakeups), BATCH):
            messages = list(_messages(wakeups[start : start + BATCH], kind.options.batch_size))
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
            with flushed_together(producer, BATCH):
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
        app, name = self._app, kind.task
        wakeup, pairs = wakeups[0], [[each.id, each.token] for each in wakeups]
        options = {"serializer": "json", "ignore_result": True, **options}
        contents: dict[str, Any] = {
            "args": (pairs,),
            "kwargs": {} if wakeup.resent_at is None else {"resent_at": wakeup.resent_at},
            "argsrepr": repr((pairs,))[:SHOWN],
            "kwargsrepr": _shown(kind.name, wakeups),
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

    def _evaluate_inline(self, kind: Kind, wakeups: Sequence[Wakeup]) -> None:
        """`task_always_eager`: evaluate what is due before returning, one after the other and never nested.

        What an evaluation enqueues waits until it has ended. What is not due stays in the index.
        """
        queue = self._eager
        queue.waiting.extend((kind, wakeup) for wakeup in wakeups)
        if queue.draining:
            return
        looks: Counter[tuple[str, str]] = Counter()
        queue.draining = True
        try:
            while queue.waiting:
                kind, wakeup = queue.waiting.popleft()
                looks[kind.name, wakeup.id] += 1
                if wakeup.delay > 0:
                    self._index.put_back(kind.name, [wakeup])
                elif looks[kind.name, wakeup.id] > EAGER_LOOKS:
                    self._index.put_back(kind.name, [wakeup])
                    logger.warning(
                        "%s/%s is left alone after %d looks in a row",
                        kind.name,
                        printable(wakeup.id),
                        EAGER_LOOKS,
                    )
                else:
                    self._apply(kind, wakeup)
        finally:
            queue.draining = False
            while queue.waiting:
                kind, wakeup = queue.waiting.popleft()
                self._index.put_back(kind.name, [wakeup])

    def _apply(self, kind: Kind, wakeup: Wakeup) -> None:
        task = self._app.tasks.get(kind.task)
        if task is None:
            logger.error(
                "no entity class of kind %s is registered in this process: %s waits",
                kind.name,
                printable(wakeup.id),
            )
            self._index.put_back(kind.name, [wakeup])
            return
        try:
            result: EagerResult[Any] = task.apply(
                args=([[wakeup.id, wakeup.token]],), task_id=wakeup.task_id, retries=wakeup.retries
            )
        except Retry as retry:  # task_eager_propagates: show what went wrong, not how it goes on
            raise (retry.exc if isinstance(retry.exc, Exception) else retry) from None
        logger.debug("%s/%s: %s", kind.name, printable(wakeup.id), result.result)


def _messages(wakeups: Sequence[Wakeup], batch_size: int) -> Iterator[list[Wakeup]]:
    """Wake-ups that are due may share a message, unless they have a past of their own."""
    together: list[Wakeup] = []
    for wakeup in wakeups:
        if batch_size == 1 or wakeup.delay or wakeup.retries or wakeup.resent_at or wakeup.alone:
            yield [wakeup]
        else:
            together.append(wakeup)
    for start in range(0, len(together), batch_size):
        yield together[start : start + batch_size]


def _shown(kind: str, wakeups: Sequence[Wakeup]) -> str:
    """What Flower shows and searches: a literal of a dict, which it reads up to some length only."""
    one = len(wakeups) == 1
    names = ", ".join(f"{kind}/{wakeup.id}" for wakeup in wakeups)
    if len(repr(names)) > SHOWN:
        while (length := len(repr(names))) > SHOWN:  # what is escaped takes more room
            names = names[: len(names) * SHOWN // length]
        names += "…" if one else f"… {len(wakeups)} in all"
    return repr({"entity" if one else "entities": names})


def _delays_natively(app: Celery, producer: Any) -> bool:
    """Whether RabbitMQ itself holds delayed messages back, as quorum queues need it: Celery knows how."""
    return bool(detect_quorum_queues(app, producer.connection.transport.driver_type)[0])


class _EagerQueue(threading.local):
    def __init__(self) -> None:
        self.waiting: deque[tuple[Kind, Wakeup]] = deque()
        self.draining = False
