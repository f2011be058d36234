"""What a consumer tells Redis of its messages without waiting: that it holds one, that it is done with it.

kombu waits for both, a third of what a task costs that does nothing. Here they go over one connection of the
channel, in the order in which they are said, and each reply is read before the next thing is said.

What may not be done, since the connection broke, is said again with whatever is next: that a message is held
until it is acknowledged, however late that is; that it is acknowledged for a second, since after that it may
be another worker's. `settle` waits until all is done, and says again what was refused, too.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from redis import exceptions as errors

from celery_goalstate.index.server import FRESH, Command, is_closed, packed, reply_of

logger = logging.getLogger(__name__)

#: Seconds that `settle` waits for another thread that speaks: the server may let that one wait.
PATIENCE = 10.0

#: What redis-py raises when a connection is lost; the latter two if its pool has just closed it.
LOST = (errors.RedisError, AttributeError, ValueError)


class _Told:
    """What is to be done about one message."""

    def __init__(self, commands: Sequence[Command], *, held: bool) -> None:
        self.packed = packed(commands)
        self.replies = len(commands)
        self.held = held  #: or else acknowledged
        self.since: float | None = None  #: when it was to be said first
        self.error: Exception | None = None  #: why it was refused


class Line:
    """The one connection of a channel of kombu's on which it tells things."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._pool: Any = None
        self._connection: Any = None
        self._pid = os.getpid()
        self._speaking = threading.Lock()
        #: What is not said yet, in its order.
        self._unsaid: deque[tuple[str, _Told]] = deque()
        #: What was said on this connection and is not answered, in its order. Nothing else is said before.
        self._unanswered: deque[tuple[str, _Told]] = deque()
        #: Of each message what was said last, unless it is known to be done.
        self._undone: dict[str, _Told] = {}

    def hold(self, tag: str, commands: Sequence[Command]) -> None:
        """Say that the message of this tag is held.

        Raises `RedisError` if nobody is there, or if another message is in hand that could not be held and
        still cannot: kombu ends a worker then, which must not take more and more that it could not put back.
        """
        self._tell(tag, _Told(commands, held=True))
        if any(told.held and told.error for told in list(self._undone.values())):
            self.settle()

    def acknowledge(self, tag: str, commands: Sequence[Command]) -> None:
        """Say that the message of this tag is held no more. Raises `RedisError` if nobody is there."""
        self._tell(tag, _Told(commands, held=False))

    def settle(self) -> None:
        """Wait until all that was told is done. Raises `RedisError` if something is not."""
        if self._pid != os.getpid():
            return  # a fork closes the channel of its parent, whose threads may have spoken just then
        if not self._speaking.acquire(timeout=PATIENCE):
            raise errors.TimeoutError("another thread waits for Redis")
        try:
            self._hear()
            if self._unsaid or self._undone:
                self._say(also_refused=True)
                self._hear()
            for told in self._undone.values():
                raise told.error or errors.ConnectionError("Redis did not answer")
        finally:
            self._speaking.release()
            self._speak()

    def _tell(self, tag: str, told: _Told) -> None:
        self._unsaid.append((tag, told))
        self._speak()

    def _speak(self) -> None:
        """Say what is unsaid, unless somebody speaks who will say it before he ends.

        That is another thread, or this one, which a signal's handler interrupts. If he fails, what is unsaid
        waits for the next one.
        """
        while self._unsaid and self._speaking.acquire(blocking=False):
            try:
                self._hear()
                self._say()
            finally:
                self._speaking.release()

    def _say(self, *, also_refused: bool = False) -> None:
        """Say what is new and what may not be done. Everything else was answered."""
        while self._unsaid:
            tag, told = self._unsaid.popleft()
            self._undone.pop(tag, None)
            self._undone[tag] = told
        now = time.monotonic()
        try:
            self._connect()
            self._forget_late_acknowledgements()  # to connect may take long
        finally:
            for told in self._undone.values():
                told.since = told.since or now
        saying = [(tag, told) for tag, told in self._undone.items() if also_refused or told.error is None]
        try:
            self._connection.send_packed_command((b"".join(told.packed for _, told in saying),))
            self._unanswered.extend(saying)
        except BaseException:
            self._hang_up()
            raise

    def _hear(self) -> None:
        """Read what the server says to what it was told."""
        while self._unanswered:
            tag, told = self._unanswered[0]
            looked_at = self._connection.next_health_check
            try:
                replies = [reply_of(self._connection) for _ in range(told.replies)]
            except BaseException as error:
                self._hang_up()
                if isinstance(error, LOST):
                    return  # it is said again
                raise
            self._connection.next_health_check = looked_at  # what was said long ago tells nothing of now
            self._unanswered.popleft()
            refusal = _first_error(replies)
            if refusal is None:
                del self._undone[tag]
            elif told.error is None:
                _log_undone(tag, told, refusal)
            told.error = refusal

    def _forget_late_acknowledgements(self) -> None:
        now = time.monotonic()
        for tag, told in list(self._undone.items()):
            if not told.held and told.since is not None and now - told.since >= FRESH:
                del self._undone[tag]
                if told.error is None:
                    _log_undone(tag, told, "no answer")

    def _connect(self) -> None:
        """Have a connection whose server is there; sentinels may have found another master."""
        if self._connection is not None:
            if self._pool.owns_connection(self._connection) and not is_closed(self._connection):
                return
            self._hang_up()
        self._pool = self._channel.pool
        self._connection = self._pool.get_connection()

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        for _, told in self._unanswered:
            told.error = None  # it was said again, and nobody knows
        self._unanswered.clear()
        connection.disconnect()
        self._pool.release(connection)


def _first_error(replies: Sequence[Any]) -> Exception | None:
    """Of commands in a transaction, whose last reply has those of all."""
    *queued, done = replies
    every = [*queued, *done] if isinstance(done, list) else replies
    return next((reply for reply in every if isinstance(reply, Exception)), None)


def _log_undone(tag: str, told: _Told, why: object) -> None:
    what = "held" if told.held else "acknowledged"
    said = str(why).partition(", with args")[0]  # there Redis shows the message's contents
    logger.warning("Redis may not know that message %s is %s: %s", tag, what, said)
