"""What publishing a message does not need: producers and clients that are made each time.

Around every message Celery's pool takes a producer and its connection apart and puts them together again, and
kombu's transport for Redis makes a new client of redis-py. That is half of what publishing costs.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from queue import Empty, LifoQueue
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from celery import Celery
from kombu import Producer

logger = logging.getLogger(__name__)

#: Seconds to wait for one that others use.
PATIENCE = 1.0

#: Seconds. Of one that was idle for longer it is asked whether the broker, or a proxy, has hung up.
FRESH = 1.0


class Producers:
    """As many as `broker_pool_limit` says, opened when they are needed. Without a limit none is kept."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        # By process: those of a parent are not its fork's. Each with the time of its last use.
        self._kept: dict[int, LifoQueue[tuple[Any, float]]] = {}

    def __del__(self) -> None:
        kept = self._kept.get(os.getpid())
        while kept and kept.qsize():
            if producer := kept.get_nowait()[0]:
                producer.connection.collect()

    def _open(self) -> LifoQueue[Any] | None:
        """Places for producers, one for all threads of this process; None: there is no limit."""
        limit = self._app.conf.broker_pool_limit
        return self._kept.setdefault(os.getpid(), _places(limit)) if limit else None

    @contextmanager
    def borrowed(self) -> Iterator[Any]:
        """A producer that nobody else uses meanwhile. After an error it is closed: who knows what it sent.

        If all are in use for long, by whoever called this perhaps, it is another one that is not kept.
        """
        kept = self._kept.get(os.getpid()) or self._open()
        if kept is None:
            with self._app.producer_or_acquire() as producer:
                yield producer
            return
        try:
            producer, used = kept.get(timeout=PATIENCE)
        except Empty:
            with self._app.connection_for_write() as connection:
                yield Producer(connection, auto_declare=False)
            return
        try:
            if producer is not None and time.monotonic() - used >= FRESH and _has_hung_up(producer.channel):
                producer.connection.collect()
                producer = None
            if producer is None:
                producer = Producer(self._app.connection_for_write(), auto_declare=False)
            yield producer
            keep_client(producer.channel)
        except BaseException:
            if producer is not None:
                producer.connection.collect()  # without a word to a broker that may not listen any more
                producer = None
            raise
        finally:
            kept.put((producer, time.monotonic()))


def _places(number: int) -> LifoQueue[tuple[Any, float]]:
    places: LifoQueue[tuple[Any, float]] = LifoQueue()
    for _ in range(number):
        places.put((None, 0.0))
    return places


def _has_hung_up(channel: Any) -> bool:
    """Whether RabbitMQ says something to a producer, which waits for nothing: the end, as a rule.

    Or a heartbeat; it hangs up on who does not answer these. Of Redis, redis-py's pool asks before each use.
    """
    socket = getattr(channel.connection, "sock", None)
    if socket is None:
        return False
    with DefaultSelector() as selector:
        selector.register(socket, EVENT_READ)
        return bool(selector.select(0))


def flushed_together(producer: Any, messages: int) -> AbstractContextManager[Any]:
    """Have a producer send what it is given meanwhile in few round trips, at most so many messages in each.

    Before kombu 5.7 it sends each message by itself.
    """
    batch = getattr(producer, "batch", None)
    return nullcontext() if batch is None else batch(messages)


def keep_client(channel: Any) -> None:
    """Let a channel of kombu's transport for Redis make one client of its own class, not one per operation.

    Nothing changes of how messages are held, acknowledged or restored. Other transports' channels, and those
    of a kombu that makes its clients in another way, are left as they are.
    """
    make = getattr(channel, "Client", None)
    if make is None or hasattr(make, "cache_info"):
        return
    if not callable(getattr(channel, "_create_client", None)):
        logger.warning(
            "this kombu makes its Redis clients in a way that celery-goalstate does not know, so each"
            " operation of a channel makes a new one: that costs time and breaks nothing"
        )
        return
    channel.Client = cache(make)
