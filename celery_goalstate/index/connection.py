"""One Redis server, as the index talks to it: commands in one round trip, over redis-py's connections.

redis-py's client adds to a short command twice the time that the server and the way there need: it packs, it
notes for its own metrics, and it asks a connection before each use whether it is still there. Here a
connection that was in use just now is used as it is. If it has broken meanwhile the command fails, and is
repeated as after any lost reply.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from redis import VERSION
from redis import exceptions as errors

Argument = str | int | bytes
Command = tuple[Argument, ...]

#: Seconds. Who was silent for longer is asked whether it is still there: servers and proxies close idle ones.
FRESH = 1.0

#: Before redis-py 5.3 a pool must be told a command, of which it makes no use; a later one warns of that.
_FOR_COMMAND = ("_",) if VERSION < (5, 3) else ()

_servers: WeakKeyDictionary[Any, Server] = WeakKeyDictionary()


def server_of(client: Any) -> Server:
    """The one that talks over the connections of this client."""
    return _servers.get(client) or _servers.setdefault(client, Server(client))


class _Idle(NamedTuple):
    """A connection that nobody uses."""

    connection: Any
    since: float
    broken: bool = False  #: to be connected again


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
                connection.send_packed_command((packed(commands),))
                while len(replies) < len(commands):
                    replies.append(reply_of(connection))
            except BaseException:
                # Replies of this call must not be taken for those of the next.
                self._put_aside(_Idle(connection, time.monotonic(), broken=True))
                raise
            self._put_aside(_Idle(connection, time.monotonic()))
        except errors.RedisError as error:
            replies += [error] * (len(commands) - len(replies))
        return replies

    def _ready(self, fresh: float) -> Any:
        """A connection for the caller alone."""
        connection, since, broken = self._take()
        try:
            # Sentinels may have found another master.
            broken = broken or not self._pool.owns_connection(connection)
            if broken or (time.monotonic() - since >= fresh and is_closed(connection)):
                connection.disconnect()
                connection.connect()
        except BaseException:
            self._put_aside(_Idle(connection, since, broken=True))
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
        return _Idle(self._pool.get_connection(*_FOR_COMMAND), time.monotonic())

    def _put_aside(self, idle: _Idle) -> None:
        if idle.broken:
            idle.connection.disconnect()
        self._idle.append(idle)


def reply_of(connection: Any) -> Any:
    """The next reply; an error of the command is one. Raises `RedisError` if there is none."""
    try:
        return connection.read_response()
    except errors.ResponseError as error:
        return error


def raise_first(replies: Iterable[Any]) -> None:
    """Raise the first error among replies."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


def is_closed(connection: Any) -> bool:
    """Whether the other side has hung up, or else said what nobody asked for."""
    try:
        unasked: bool = connection.can_read()
    except errors.RedisError:
        return True
    return unasked  # nobody waits for a reply: whatever there is, no call could read on after it


def packed(commands: Sequence[Command]) -> bytes:
    """The commands in Redis' protocol; redis-py's own packing takes three times as long."""
    parts: list[bytes] = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for argument in command:
            value = argument if isinstance(argument, bytes) else str(argument).encode()
            parts.append(b"$%d\r\n%b\r\n" % (len(value), value))
    return b"".join(parts)
