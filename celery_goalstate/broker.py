"""What publishing and handling a message do not need: producers and clients that are made each time.

Around every message Celery's pool takes a producer and its connection apart and puts them together again, and
kombu's transport for Redis makes a new client of redis-py. That is half of what publishing costs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from queue import Empty, LifoQueue
from typing import Any

from celery import Celery
from kombu import Producer

#: Seconds to wait for one that others use.
PATIENCE = 1.0


class Producers:
    """As many as `broker_pool_limit` says, opened when they are needed. Without a limit none is kept."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._kept: dict[int, LifoQueue[Any]] = {}  # by process: those of a parent are not its fork's

    def __del__(self) -> None:
        kept = self._kept.get(os.getpid())
        while kept and kept.qsize():
            if producer := kept.get_nowait():
                producer.connection.collect()

    @contextmanager
    def borrowed(self) -> Iterator[Any]:
        """A producer that nobody else uses meanwhile. After an error it is closed: who knows what it sent.

        If all are in use for long, by whoever called this perhaps, it is another one that is not kept.
        """
        limit = self._app.conf.broker_pool_limit
        if not limit:
            with self._app.producer_or_acquire() as producer:
                yield producer
            return
        kept = self._kept.get(os.getpid()) or self._kept.setdefault(os.getpid(), _places(limit))
        try:
            producer = kept.get(timeout=PATIENCE)
        except Empty:
            with self._app.connection_for_write() as connection:
                yield Producer(connection, auto_declare=False)
            return
        try:
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
            kept.put(producer)


def _places(number: int) -> LifoQueue[Any]:
    places: LifoQueue[Any] = LifoQueue()
    for _ in range(number):
        places.put(None)
    return places


def keep_client(channel: Any) -> None:
    """Let a channel of kombu's transport for Redis have one client of its pool, not one for every message."""
    make = getattr(channel, "Client", None)
    if make is not None and not hasattr(make, "cache_info"):
        channel.Client = cache(make)
