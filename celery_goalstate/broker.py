"""What publishing and handling a message do not need: producers and clients that are made each time.

Around every message Celery's pool takes a producer and its connection apart and puts them together again, and
kombu's transport for Redis makes a new client of redis-py. That is half of what publishing costs. What a
worker says of its messages is in `line`.
"""

from __future__ import annotations

import logging
import math
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
from redis import Redis
from redis.client import Pipeline

from celery_goalstate.index.server import Command, Server, raise_first
from celery_goalstate.line import Line

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

    Or a heartbeat; it hangs up on who does not answer these. Of Redis, `_Client` asks.
    """
    socket = getattr(channel.connection, "sock", None)
    if socket is None:
        return False
    with DefaultSelector() as selector:
        selector.register(socket, EVENT_READ)
        return bool(selector.select(0))


class _Client(Redis):
    """redis-py's client, but what every message needs goes the index's way.

    A producer puts it into its queue; a consumer notes that it holds it, and acknowledges it.
    """

    def __init__(self, line: Line, **options: Any) -> None:
        super().__init__(**options)
        self._line = line
        self._server = Server(self)

    def lpush(self, name: Any, *values: Any) -> Any:
        # To a server that was there just now: not everybody sends again what fails.
        replies = self._server.exchange([("LPUSH", name, *values)], fresh=0.0)
        raise_first(replies)
        return replies[0]

    def pipeline(self, transaction: Any = True, shard_hint: Any = None) -> Pipeline:
        return _Pipeline(self._line, self.connection_pool, self.response_callbacks, transaction, shard_hint)

    def transaction(self, *arguments: Any, **options: Any) -> Any:
        """In which kombu puts back a message that it finds held."""
        self._line.settle()
        return super().transaction(*arguments, **options)


class _Pipeline(Pipeline):
    """redis-py's, but for a consumer's two transactions around every message."""

    def __init__(self, line: Line, *pipeline: Any) -> None:
        super().__init__(*pipeline)
        self._line = line

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        said = [command for command, _ in self.command_stack]
        transaction: list[Command] = [("MULTI",), *said, ("EXEC",)]
        match said:
            case [("ZADD", *_), ("HSET", _, tag, _)] if not self.watching:
                self.reset()
                self._line.hold(tag, transaction)
            case [("ZREM", *_), ("HDEL", _, tag)] if not self.watching:
                self.reset()
                self._line.acknowledge(tag, transaction)
            case _:
                return super().execute(raise_on_error)
        return []  # nobody waits for what it did


def keep_client(channel: Any) -> None:
    """Let a channel of kombu's transport for Redis have one client, not one for every message.

    It is one of ours, unless redis-py's is to do more than ours would.
    """
    make = getattr(channel, "Client", None)
    if make is None or hasattr(make, "cache_info"):
        return
    options = channel.pool.connection_kwargs
    if options.get("credential_provider"):
        return  # such a connection logs in again when it returns to its pool
    repeats = any(options.get(name) for name in ("retry_on_timeout", "retry_on_error", "retry"))
    # kombu itself uses two at a time, ours keep two.
    if make is Redis and not repeats and (channel.max_connections or math.inf) > 3:
        _keep_ours(channel)
    else:
        channel.Client = cache(make)


def _keep_ours(channel: Any) -> None:
    line, close = Line(channel), channel.close
    channel.Client = cache(partial(_Client, line))

    def settle_and_close() -> None:
        if not channel.closed:
            try:
                line.settle()
            except Exception as error:  # noqa: BLE001 - the channel is to be closed whatever is wrong
                problem = type(error).__name__  # its text may show a message's contents
                logger.warning("a channel is closed before Redis knows of all its messages: %s", problem)
        try:
            close()
        except Exception:
            if not channel.closed:
                close()  # the first time it broke off, at the connection on which it waited for messages
            raise

    channel.close = settle_and_close
