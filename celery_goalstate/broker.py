"""What publishing and handling a message do not need: producers and clients that are made each time.

Around every message Celery's pool takes a producer and its connection apart and puts them together again, and
kombu's transport for Redis makes a new client of redis-py. That is half of what publishing costs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from queue import LifoQueue
from typing import Any

from celery import Celery
from kombu import Producer


class Producers:
    """As many as `broker_pool_limit` says, opened when they are needed. Without a limit none is kept."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._pid = 0
        self._kept: LifoQueue[Any] = LifoQueue()

    @contextmanager
    def borrowed(self) -> Iterator[Any]:
        """A producer that nobody else uses meanwhile. After an error it is closed: who knows what it sent."""
        limit = self._app.conf.broker_pool_limit
        if not limit:
            with self._app.producer_or_acquire() as producer:
                yield producer
            return
        if self._pid != os.getpid():  # those of the process that this one was forked from are not ours
            self._kept = LifoQueue()
            for _ in range(limit):
                self._kept.put(None)
            self._pid = os.getpid()
        kept = self._kept
        producer = kept.get()
        try:
            if producer is None:
                producer = Producer(self._app.connection_for_write(), auto_declare=False)
            yield producer
            keep_client(producer.channel)
        except BaseException:
            if producer is not None:
                producer.connection.release()
                producer = None
            raise
        finally:
            kept.put(producer)


def keep_client(channel: Any) -> None:
    """Let a channel of kombu's transport for Redis have one client of its pool, not one for every message."""
    make = getattr(channel, "Client", None)
    if make is not None and not hasattr(make, "cache_info"):
        channel.Client = cache(make)
