"""One Redis server, as the index talks to it: commands in one round trip, over redis-py's connections.

redis-py's client adds to a short command twice the time that the server and the way there need: it packs, it
notes for its own metrics, and it asks a connection before each use whether it is still there. Here a
connection that was in use just now is used as it is. If it has broken meanwhile the command fails, and is
repeated as after any lost reply. What nobody waits for is only told: its replies are read when the connection
is used again.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from redis import exceptions as errors

logger = logging.getLogger(__name__)

Argument = str | int | bytes
Command = tuple[Argument, ...]

#: Seconds. Who was silent for longer is asked whether it is still there: servers and proxies close idle ones.
FRESH = 1.0

_servers: WeakKeyDictionary[Any, Server] = WeakKeyDictionary()


def server_of(client: Any) -> Server:
    """The one that talks over the connections of this client."""
    return _servers.get(client) or _servers.setdefault(client, Server(client))


class _Idle(NamedTuple):
    """A connection that nobody uses."""

    connection: Any
    since: float | None  #: None: it is to be connected again
    owed: int = 0  #: replies that were not waited for


class Server:
    """Sends commands to one server. `client` is redis-py's, and repeats nothing by itself."""

    def __init__(self, client: Any) -> None:
        self._pool = client.connection_pool
        self._idle: deque[_Idle] = deque()

    def __del__(self) -> None:
        while self._idle:
            self._idle.pop().connection.disconnect()

    def exchange(self, commands: Sequence[Command], *, fresh: float = FRESH) -> list[Any]:
        """What the server replies to each command. Errors are among the replies.

        Who cannot say a command again gives `fresh=0`: then it is said to a server that was there just now.
        """
        replies: list[Any] = []
        try:
            connection = self._ready(fresh)
            try:
                connection.send_packed_command((_packed(commands),))
                while len(replies) < len(commands):
                    try:
                        replies.append(connection.read_response())
                    except errors.ResponseError as error:
                        replies.append(error)
            except BaseException:
                self._give_up(connection)
                raise
            self._idle.append(_Idle(connection, time.monotonic()))
        except errors.RedisError as error:
            replies += [error] * (len(commands) - len(replies))
        return replies

    def tell(self, commands: Sequence[Command]) -> None:
        """Say commands to a server that was there just now, and wait for no reply. Raises `RedisError`.

        That it did not do them is noticed, and logged, when the connection is used again.
        """
        connection = self._ready(0.0)
        try:
            connection.send_packed_command((_packed(commands),))
        except BaseException:
            self._give_up(connection)
            raise
        self._idle.append(_Idle(connection, time.monotonic(), owed=len(commands)))

    def _ready(self, fresh: float) -> Any:
        """A connection for the caller alone."""
        connection, since, owed = self._take()
        try:
            if since is not None and (
                not self._pool.owns_connection(connection)  # sentinels say that the master is another one
                or (owed and not _has_answered(connection, owed))
                or (time.monotonic() - since >= fresh and _is_closed(connection))
            ):
                connection.disconnect()
                since = None
            if since is None:
                connection.connect()
        except BaseException:
            self._give_up(connection)
            raise
        return connection

    def _take(self) -> _Idle:
        while self._idle:
            try:
                idle = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if idle.connection.pid == os.getpid():  # and not of the process that this one was forked from
                return idle
        return _Idle(self._pool.get_connection(), time.monotonic())

    def _give_up(self, connection: Any) -> None:
        connection.disconnect()  # replies of this call must not be taken for those of the next
        self._idle.append(_Idle(connection, None))


def raise_first(replies: Iterable[Any]) -> None:
    """Raise the first error among replies."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


def _has_answered(connection: Any, owed: int) -> bool:
    """Whether the server has done all that it was told."""
    try:
        for _ in range(owed):
            connection.read_response()
    except errors.RedisError as error:
        logger.warning("Redis may not have done what it was told: %s", error)
        return False
    return True


def _is_closed(connection: Any) -> bool:
    try:
        unasked: bool = connection.can_read()
    except errors.RedisError:
        return True
    return unasked  # nobody waits for a reply: whatever there is, no call could read on after it


def _packed(commands: Sequence[Command]) -> bytes:
    """The commands in Redis' protocol; redis-py's own packing takes three times as long."""
    parts: list[bytes] = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for argument in command:
            value = argument if isinstance(argument, bytes) else str(argument).encode()
            parts.append(b"$%d\r\n%b\r\n" % (len(value), value))
    return b"".join(parts)
