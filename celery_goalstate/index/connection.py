"""One Redis server, as the index talks to it: commands in one round trip, over redis-py's connections.

What redis-py's client and its pool do around each command, they count for their own metrics, takes a quarter
of the time of a short one. So each call takes a connection from those that are kept here. The pool opens
them, knows which server they are to lead to, and ends them.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from redis import VERSION
from redis import exceptions as errors

Argument = str | int | bytes
Command = tuple[Argument, ...]

#: Before redis-py 5.3 a pool must be given a command, of which it makes no use; a later one warns of that.
_FOR_COMMAND = ("_",) if VERSION < (5, 3) else ()

_servers: WeakKeyDictionary[Any, Server] = WeakKeyDictionary()


def server_of(client: Any) -> Server:
    """The one that talks over the connections of this client."""
    return _servers.get(client) or _servers.setdefault(client, Server(client))


class Server:
    """Sends commands to one server. `client` is redis-py's, and repeats nothing by itself."""

    def __init__(self, client: Any) -> None:
        self._pool = client.connection_pool
        #: Seconds that it has for its replies; infinite: what the connections have.
        self.timeout: float = self._pool.connection_kwargs.get("socket_timeout") or math.inf
        self._idle: deque[Any] = deque()  # connections between two calls; the pool counts them as in use

    def __del__(self) -> None:
        while self._idle:
            self._idle.pop().disconnect()

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """The server's reply to each command. Errors are among the replies.

        The time-out is that of all replies together; that of a single one the connection keeps by itself.
        """
        until = math.inf if len(commands) == 1 else time.monotonic() + self.timeout
        return self.send(commands).replies(until)

    def send(self, commands: Sequence[Command]) -> Sent:
        """Send commands, and wait for no reply."""
        try:
            connection = self._take_idle() or self._pool.get_connection(*_FOR_COMMAND)
            try:
                # Sentinels may have found another master, or the other side may have hung up.
                if not self._pool.owns_connection(connection) or _is_closed(connection):
                    connection.disconnect()
                    connection.connect()
                connection.send_packed_command(connection.pack_commands(commands))
            except BaseException:
                self.give_up(connection)
                raise
        except errors.RedisError as error:
            return Sent(self, len(commands), error=error)
        return Sent(self, len(commands), connection)

    @property
    def is_connected(self) -> bool:
        """Whether the next call probably finds a connection."""
        with suppress(IndexError):
            return bool(self._idle[-1].pid == os.getpid())
        return False

    def connect(self) -> None:
        """Have a connection for the next call. Raises `RedisError`."""
        if connection := self._take_idle():
            self.keep(connection)
        else:
            self.keep(self._pool.get_connection(*_FOR_COMMAND))

    def try_out(self, timeout: float) -> None:
        """Raise `RedisError` if the server does not answer a fresh connection within so many seconds."""
        bounds = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), min(timeout, self.timeout))
        connection = self._pool.connection_class(**{**self._pool.connection_kwargs, **bounds})
        try:
            connection.send_command("TIME")  # which our user may say, unlike PING
            connection.read_response()
        finally:
            connection.disconnect()

    def keep(self, connection: Any) -> None:
        """Keep a connection for the next call."""
        self._idle.append(connection)

    def _take_idle(self) -> Any:
        while self._idle:
            with suppress(IndexError):  # another thread was faster
                connection = self._idle.pop()
                if connection.pid == os.getpid():  # and not of the process that this one was forked from
                    return connection
        return None

    def give_up(self, connection: Any) -> None:
        """Close a connection whose replies must not be taken for those to the next call.

        And those that are idle: they may lead to a former master, too.
        """
        while connection:
            connection.disconnect()
            self._pool.release(connection)
            connection = self._take_idle()


class Sent:
    """Commands that were sent to one server, or could not be."""

    def __init__(
        self, server: Server, number: int, connection: Any = None, error: Exception | None = None
    ) -> None:
        self._server = server
        self._number = number
        self._connection = connection
        self._error = error

    def replies(self, until: float) -> list[Any]:
        """The reply to each command. Errors are among the replies.

        They are waited for until a time of the monotonic clock.
        """
        replies: list[Any] = []
        error = self._error
        if error is None:
            try:
                while len(replies) < self._number:
                    replies.append(_reply_of(self._connection, until))
            except errors.RedisError as lost:
                self.give_up()
                error = lost
            except BaseException:
                self.give_up()
                raise
            else:
                self._server.keep(self._connection)
        return replies + [error] * (self._number - len(replies))

    def give_up(self) -> None:
        """Wait for no reply any more."""
        if self._connection is not None:
            self._server.give_up(self._connection)


def _reply_of(connection: Any, until: float) -> Any:
    """The next reply; an error of the command is one. Raises `RedisError` if there is none."""
    if until != math.inf and not connection.can_read(timeout=max(0.0, until - time.monotonic())):
        raise errors.TimeoutError("Timeout reading from socket")
    try:
        return connection.read_response()
    except errors.ResponseError as error:
        return error


def _is_closed(connection: Any) -> bool:
    """Whether the other side has hung up, or has sent what is no reply to anything."""
    try:
        unexpected: bool = connection.can_read()
    except errors.RedisError:
        return True
    return unexpected


def raise_first(replies: Iterable[Any]) -> None:
    """Raise the first error among replies."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
