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
    since: float
    told: Sequence[Command] = ()  #: what it has not answered yet
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
                connection.send_packed_command((_packed(commands),))
                while len(replies) < len(commands):
                    replies.append(_reply(connection))
            except BaseException:
                # Replies of this call must not be taken for those of the next.
                self._put_aside(_Idle(connection, time.monotonic(), broken=True))
                raise
            self._put_aside(_Idle(connection, time.monotonic()))
        except errors.RedisError as error:
            replies += [error] * (len(commands) - len(replies))
        return replies

    def tell(self, commands: Sequence[Command]) -> None:
        """Say commands that may be said twice, and wait for no reply. Raises `RedisError` if nobody is there.

        The replies are read before the connection is used again. If there are none, the commands are said
        once more; if there are errors, they are logged. Whoever tells something calls nothing else meanwhile:
        another call would go over another connection, and might come first.
        """
        connection = self._ready(FRESH)
        try:
            connection.send_packed_command((_packed(commands),))
        except BaseException:
            self._put_aside(_Idle(connection, time.monotonic(), broken=True))
            raise
        self._put_aside(_Idle(connection, time.monotonic(), commands))

    def settle(self) -> None:
        """Wait until the server has done what it was told. Raises `RedisError`."""
        if any(idle.told for idle in list(self._idle)):
            self._put_aside(_Idle(self._ready(FRESH), time.monotonic()))

    def _ready(self, fresh: float) -> Any:
        """A connection for the caller alone, whose server has done what it was told."""
        connection, since, told, broken = self._take()
        idle_for = time.monotonic() - since
        try:
            # Sentinels may have found another master.
            broken = broken or not self._pool.owns_connection(connection)
            if told and not broken and _has_answered(connection, told):
                told = ()
            if broken or told or (idle_for >= fresh and _is_closed(connection)):
                connection.disconnect()
                connection.connect()
            if told:
                _say_again(connection, told, idle_for)
        except BaseException:
            self._put_aside(_Idle(connection, since, told, broken=True))
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

    def _put_aside(self, idle: _Idle) -> None:
        if idle.broken:
            idle.connection.disconnect()
        self._idle.append(idle)


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except errors.ResponseError as error:
        return error


def _has_answered(connection: Any, told: Sequence[Command]) -> bool:
    """Whether there are replies to what was told; what the server did not do is logged."""
    looked_at = connection.next_health_check
    try:
        replies = [_reply(connection) for _ in told]
    except errors.RedisError:
        return False
    connection.next_health_check = looked_at  # what was said long ago tells nothing of now
    in_transactions = [each for reply in replies if isinstance(reply, list) for each in reply]
    for reply in (*replies, *in_transactions):
        if isinstance(reply, Exception):
            _log_undone(told, reply)
            break
    return True


def _say_again(connection: Any, told: Sequence[Command], ago: float) -> None:
    """If it was told just now: after a while somebody else may have said something that this would undo."""
    if ago < FRESH:
        connection.send_packed_command((_packed(told),))
        if _has_answered(connection, told):
            return
    _log_undone(told, "no answer")


def _log_undone(told: Sequence[Command], why: object) -> None:
    shown = "; ".join(" ".join(map(str, command[:3])) for command in told)  # the rest is a message's contents
    logger.warning("Redis may not have done what it was told, %s: %s", shown, why)


def raise_first(replies: Iterable[Any]) -> None:
    """Raise the first error among replies."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


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
