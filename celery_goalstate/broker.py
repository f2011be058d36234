"""What publishing and handling a message do not need: producers and clients that are made each time.

Around every message Celery's pool takes a producer and its connection apart and puts them together again,
kombu's transport for Redis makes a new client of redis-py, and that asks a pool for a connection. That is
half of what publishing costs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from queue import Empty, LifoQueue
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from celery import Celery
from kombu import Producer
from redis import RedisError

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
    def borrowed(self, fresh: float = FRESH) -> Iterator[Any]:
        """A producer that nobody else uses meanwhile. After an error it is closed: who knows what it sent.

        If all are in use for long, by whoever called this perhaps, it is another one that is not kept. Who
        cannot send again what fails gives `fresh=0`: then it is one whose broker was there just now.
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
            if producer is not None and time.monotonic() - used >= fresh and _has_hung_up(producer.channel):
                producer.connection.collect()
                producer = None
            if producer is None:
                producer = Producer(self._app.connection_for_write(), auto_declare=False)
            yield producer
            channel = producer.channel  # batches need a connection of the pool besides
            keep_client(channel, single_connection_client=getattr(channel, "max_connections", 0) > 1)
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
    """Whether there is something to read for a producer, which waits for nothing: the end, as a rule.

    Or a heartbeat of RabbitMQ, which hangs up on who does not answer.
    """
    if hasattr(channel, "Client"):
        client = channel._create_client()
        with client.single_connection_lock:
            try:
                return client.connection is not None and bool(client.connection.can_read())
            except RedisError:
                return True
    connection = getattr(channel.connection, "sock", None)
    if connection is None:
        return False
    with DefaultSelector() as selector:
        selector.register(connection, EVENT_READ)
        return bool(selector.select(0))


def keep_client(channel: Any, **options: Any) -> None:
    """Let a channel of kombu's transport for Redis have one client of its pool, not one for every message."""
    make = getattr(channel, "Client", None)
    if make is not None and not hasattr(make, "cache_info"):
        channel.Client = cache(partial(make, **options))
