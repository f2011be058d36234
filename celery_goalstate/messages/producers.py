"""The engine's own producers: kept from message to message, and bounded in time.

Around every message Celery's pool takes a producer and its connection apart and puts them together again, and
kombu's transport for Redis makes a new client of redis-py: half of what publishing costs. And a broker that
accepts connections but answers nothing would hold up a producer for ever.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from queue import Empty, LifoQueue
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from celery import Celery
from kombu import Producer
from kombu.exceptions import KombuError
from redis.backoff import NoBackoff
from redis.retry import Retry

from celery_goalstate.index.redis import is_absence
from celery_goalstate.messages.errors import BrokerUnavailable

logger = logging.getLogger(__name__)

#: Seconds to wait for one of the kept producers, if others use all of them ...
BORROW_TIMEOUT = 1.0
#: ... and no more than this part of the time that there is.
BORROW_SHARE = 1 / 5

#: Seconds. Of one that was idle for longer it is asked whether the broker, or a proxy, has hung up.
FRESH = 1.0

#: The transport options that say, in seconds, how long a socket waits; by the driver of the transport.
SOCKET_TIMEOUTS: Mapping[str, tuple[str, ...]] = {
    "redis": ("socket_timeout", "socket_connect_timeout"),
    "amqp": ("read_timeout", "write_timeout"),
}


class Producers:
    """As many as `broker_pool_limit` says, opened when they are needed. Without a limit none is kept.

    None of them waits for a broker that does not answer for longer than `timeout` seconds. If `broker_url`
    names several, another one is tried next: at once while there is time, or else by whoever borrows next.
    """

    def __init__(self, app: Celery, timeout: float) -> None:
        self._app = app
        self._borrow_timeout = min(BORROW_TIMEOUT, timeout * BORROW_SHARE)
        self._timeout = timeout - self._borrow_timeout  # in all no longer than `timeout`
        # By process: those of a parent are not its fork's. Each with the time of its last use.
        self._kept: dict[int, LifoQueue[tuple[Any, float]]] = {}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close those of this process that are not borrowed."""
        kept = self._kept.get(os.getpid())
        while kept and kept.qsize():
            if producer := kept.get_nowait()[0]:
                producer.connection.collect()

    def _places(self) -> LifoQueue[tuple[Any, float]] | None:
        """Places for producers, one for all threads of this process; None: there is no limit."""
        limit = self._app.conf.broker_pool_limit
        return self._kept.setdefault(os.getpid(), _places(limit)) if limit else None

    @contextmanager
    def borrowed(self) -> Iterator[Any]:
        """A producer of the caller's own meanwhile. After an error it is closed: who knows what it sent.

        If all are in use for long, by whoever called this perhaps, it is another one that is not kept.
        Raises `BrokerUnavailable` for an error of the broker's that tells of no message; others as they are.
        """
        kept = self._kept.get(os.getpid()) or self._places()
        producer: Any
        try:
            producer, used = kept.get(timeout=self._borrow_timeout) if kept is not None else (None, 0.0)
        except Empty:
            kept, producer, used = None, None, 0.0
        try:
            if producer is not None and time.monotonic() - used >= FRESH and producer.has_hung_up():
                producer = producer.renewed()
            if producer is None:
                producer = BoundedProducer(self._app.connection_for_write(), self._timeout)
            yield producer
            if kept is None:
                producer.connection.release()
            else:
                keep_client(producer.channel)
        except BaseException as error:
            if producer is None:
                raise
            broken, producer = producer, producer.renewed()
            if broken.lost:
                raise BrokerUnavailable(str(error)) from error
            raise
        finally:
            if kept is not None:
                kept.put((producer, time.monotonic()))


class BoundedProducer(Producer):
    """Gives up after `timeout` seconds, and declares a queue once for each connection."""

    def __init__(self, connection: Any, timeout: float) -> None:
        _bound(connection, timeout)
        super().__init__(connection, auto_declare=False)
        self._timeout = timeout
        self._gives_up_at = 0.0
        self._declared = connection.declared_entities
        self._address = _address(connection)
        self.lost = False  #: whether it failed for the broker was away

    def publish(self, body: Any, *args: Any, **options: Any) -> Any:
        """As kombu does, but what fails is not tried again when the time is over."""
        self._gives_up_at = time.monotonic() + self._timeout
        options["retry_policy"] = {**(options.get("retry_policy") or {}), "errback": self._raise_if_late}
        with self._noting_loss():
            return super().publish(body, *args, **options)

    @contextmanager
    def flushed_together(self, messages: int) -> Iterator[None]:
        """Send what is published meanwhile in few round trips, at most so many messages in each.

        Before kombu 5.7 each message is sent by itself.
        """
        batch = getattr(self, "batch", None)
        if batch is None:
            yield
            return
        with batch(messages) as pending:
            yield
            with self._noting_loss():
                pending.flush()

    @contextmanager
    def _noting_loss(self) -> Iterator[None]:
        """Around what the broker does, and nothing else: what a router raises says nothing of a broker."""
        self.lost = False
        try:
            yield
        except Exception as error:
            cause = (error.__cause__ or error) if isinstance(error, KombuError) else error
            connection: Any = self.connection
            away = isinstance(cause, connection.connection_errors) or is_absence(cause)
            self.lost = away or not connection.connected  # a log-in is refused as a queue is, but to all
            raise

    def has_hung_up(self) -> bool:
        """Whether RabbitMQ has sent something to a producer, which waits for nothing: the end, as a rule.

        Or a heartbeat; and it hangs up on those who answer none. On Redis, redis-py's pool checks before use.
        """
        connection: Any = self.connection
        socket = getattr(connection.connection, "sock", None) if connection.connected else None
        if socket is None:
            return False
        with DefaultSelector() as selector:
            selector.register(socket, EVENT_READ)
            return bool(selector.select(0))

    def renewed(self) -> BoundedProducer:
        """Another one in its place, with the same connection, closed without a word to who may not listen.

        If the broker was away, with the next one of those that `broker_url` names.
        """
        connection: Any = self.connection
        connection.collect()
        if (
            self.lost and _address(connection) == self._address
        ):  # kombu itself goes on to the next one at times
            connection.maybe_switch_next()
        return BoundedProducer(connection, self._timeout)

    def _raise_if_late(self, error: Exception, interval: float) -> None:
        if time.monotonic() + interval >= self._gives_up_at:
            raise error

    def maybe_declare(self, entity: Any, retry: bool = False, **policy: Any) -> Any:
        """As kombu does, which finds out that there is nothing to do at the cost of copies of the queue."""
        if entity and hash(entity) in self._declared:
            return False
        return super().maybe_declare(entity, retry, **policy)


def _bound(connection: Any, timeout: float) -> None:
    """Let nothing that this connection does wait for longer. Shorter times of the user's own hold."""
    options = connection.transport_options
    for name in SOCKET_TIMEOUTS.get(connection.transport.driver_type, ()):
        options[name] = min(options.get(name) or timeout, timeout)
    options.pop("retry_on_timeout", None)  # kombu itself tries again, for as long as there is time
    if "master_name" in options:  # sentinels are asked first, over connections of their own
        own = options.get("sentinel_kwargs") or {}
        several = max(1, len(connection.alt))  # asked one after the other, until one answers
        bounds = {name: options[name] / several for name in SOCKET_TIMEOUTS["redis"]}
        options["sentinel_kwargs"] = {**own, **bounds, "retry": Retry(NoBackoff(), 0)}
    connection.connect_timeout = min(connection.connect_timeout or timeout, timeout)
    connection.switch = partial(_switch, connection)


def _address(connection: Any) -> tuple[Any, Any]:
    return connection.hostname, connection.port


def _switch(connection: Any, url: str) -> None:
    """As kombu does, which takes leave of RabbitMQ first, and waits for its answers."""
    connection.collect()
    type(connection).switch(connection, url)


def _places(number: int) -> LifoQueue[tuple[Any, float]]:
    places: LifoQueue[tuple[Any, float]] = LifoQueue()
    for _ in range(number):
        places.put((None, 0.0))
    return places


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
