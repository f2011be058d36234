"""One Redis server, as the index talks to it: commands in one round trip, over redis-py's connections.

What redis-py's client and its pool do around each command, they count for their own metrics, takes a quarter
of the time of a short one. So each call takes a connection from those that are kept here. The pool opens
them, knows which server they are to lead to, and ends them.
"""

from __future__ import annotations

import os
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
        self._idle: deque[Any] = deque()  # connections between two calls; the pool counts them as in use

    def __del__(self) -> None:
        while self._idle:
            self._idle.pop().disconnect()

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """The server's reply to each command. Errors are among the replies."""
        replies: list[Any] = []
        try:
            connection = self._take_idle() or self._pool.get_connection(*_FOR_COMMAND)
            try:
                # Sentinels may have found another master, or the other side may have hung up.
                if not self._pool.owns_connection(connection) or _is_closed(connection):
                    connection.disconnect()
                    connection.connect()
                connection.send_packed_command(connection.pack_commands(commands))
                while len(replies) < len(commands):
                    replies.append(_reply_of(connection))
            except BaseException:
                self._give_up(connection)  # replies to this call must not be taken for those to the next
                raise
            self._idle.append(connection)
        except errors.RedisError as error:
            replies += [error] * (len(commands) - len(replies))
        return replies

    def _take_idle(self) -> Any:
        while self._idle:
            with suppress(IndexError):  # another thread was faster
                connection = self._idle.pop()
                if connection.pid == os.getpid():  # and not of the process that this one was forked from
                    return connection
        return None

    def _give_up(self, connection: Any) -> None:
        """Close a connection that broke, and those that are idle: they may lead to a former master, too."""
        while connection:
            connection.disconnect()
            self._pool.release(connection)
            connection = self._take_idle()


def _reply_of(connection: Any) -> Any:
    """The next reply; an error of the command is one. Raises `RedisError` if there is none."""
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
