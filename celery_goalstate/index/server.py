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
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from redis import exceptions as errors

Argument = str | int | bytes
Command = tuple[Argument, ...]

#: Seconds. Who was silent for longer is asked whether it is still there: servers and proxies close idle ones.
FRESH = 1.0

_servers: WeakKeyDictionary[Any, Server] = WeakKeyDictionary()


def server_of(client: Any) -> Server:
    """The one that talks over the connections of this client."""
    return _servers.get(client) or _servers.setdefault(client, Server(client))


class Server:
    """Sends commands to one server. `client` is redis-py's, and repeats nothing by itself."""

    def __init__(self, client: Any) -> None:
        self._pool = client.connection_pool
        self._idle: deque[tuple[Any, float | None]] = deque()  # connections, and since when; None: broken

    def __del__(self) -> None:
        while self._idle:
            self._idle.pop()[0].disconnect()

    def exchange(self, commands: Sequence[Command], *, fresh: float = FRESH) -> list[Any]:
        """What the server replies to each command. Errors are among the replies.

        Who cannot say a command again gives `fresh=0`: then it is said to a server that was there just now.
        """
        replies: list[Any] = []
        try:
            connection, since = self._connection()
            try:
                if since is not None and (
                    not self._pool.owns_connection(connection)  # sentinels say that the master is another one
                    or (time.monotonic() - since >= fresh and _is_closed(connection))
                ):
                    connection.disconnect()
                    since = None
                if since is None:
                    connection.connect()
                connection.send_packed_command((_packed(commands),))
                while len(replies) < len(commands):
                    try:
                        replies.append(connection.read_response())
                    except errors.ResponseError as error:
                        replies.append(error)
            except BaseException:
                connection.disconnect()  # replies of this call must not be taken for those of the next
                self._idle.append((connection, None))
                raise
            self._idle.append((connection, time.monotonic()))
        except errors.RedisError as error:
            replies += [error] * (len(commands) - len(replies))
        return replies

    def _connection(self) -> tuple[Any, float | None]:
        """A connection that nobody uses, and since when; None: it is to be connected again."""
        while self._idle:
            try:
                connection, since = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if connection.pid == os.getpid():  # and not of the process that this one was forked from
                return connection, since
        return self._pool.get_connection(), time.monotonic()


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
