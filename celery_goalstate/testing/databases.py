"""Django's transactions in a simulation: where they commit, and what becomes of them when a worker dies.

A test of Django's is itself in a transaction, which is rolled back. What the code under test takes for the
whole of a transaction is a savepoint there: the outermost `atomic` that is not the test's own. Its end is
where a worker may die before or after, and where what waits for the commit runs. The same holds without a
test's transaction (`transactional_db`), where it is the database's own.

While a simulation runs, four methods of Django are replaced for that. Without Django, nothing is done.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

logger = logging.getLogger(__name__)

BEFORE_COMMIT, AFTER_COMMIT = "before commit", "after commit"
#: The statements that commit by themselves, where no transaction is open.
_WRITES = ("INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE", "TRUNCATE")


def _connections() -> Any:
    """Django's connections; None: it is not in use."""
    database = sys.modules.get("django.db")
    if database is None or not sys.modules["django.conf"].settings.configured:
        return None
    return database.connections


def _opened() -> list[Any]:
    connections = _connections()
    return [] if connections is None else list(connections.all(initialized_only=True))


def _of_test(connection: Any) -> int:
    """How many of the open blocks are the test's own: those that Django has marked, which come first."""
    blocks = connection.atomic_blocks
    return next((n for n, block in enumerate(blocks) if not block._from_testcase), len(blocks))


def _depth(connection: Any) -> int:
    """How many blocks of the code under test are open."""
    return len(connection.atomic_blocks) - _of_test(connection)


def in_transaction() -> bool:
    """Whether the code under test is in a transaction."""
    return any(_depth(connection) for connection in _opened())


def wrappers() -> list[tuple[Any, int]]:
    """The open connections, and around how many wrappers their statements are executed."""
    return [(connection, len(connection.execute_wrappers)) for connection in _opened()]


def break_off(before: list[tuple[Any, int]]) -> None:
    """What databases do when their clients die: they roll back what is open. `before`: `wrappers()`, then."""
    for connection, count in before:
        del connection.execute_wrappers[count:]
    for connection in _opened():
        if _depth(connection):
            of_test = _of_test(connection)
            del connection.atomic_blocks[of_test:]
            connection.needs_rollback = False
            if of_test:  # the first block is the transaction, and each other one a savepoint
                oldest = connection.savepoint_ids[of_test - 1]
                del connection.savepoint_ids[of_test - 1 :]
                connection.savepoint_rollback(oldest)
            else:
                connection.savepoint_ids.clear()
                connection.run_on_commit.clear()
                connection.in_atomic_block = False
                connection.rollback()
                connection.set_autocommit(True)


@contextmanager
def rolled_back() -> Iterator[None]:
    """Undo what the block does to those databases that the test may use."""
    with ExitStack() as stack:
        for alias in _usable():
            stack.enter_context(_undone(alias))
        yield


def _usable() -> list[str]:
    usable = []
    for alias in _connections() or ():
        connection = _connections()[alias]
        if connection.connection is not None or connection.in_atomic_block or alias == "default":
            with suppress(Exception):  # pytest-django's, or Django's own: not for this test
                connection.ensure_connection()
                usable.append(alias)
    return usable


@contextmanager
def _undone(alias: str) -> Iterator[None]:
    from django.db import transaction

    block: Any = transaction.atomic(using=alias)
    block._from_testcase = True
    with block:
        yield
        transaction.set_rollback(True, using=alias)


class Commits:
    """The points before and after each commit: `reach` is called with them, `note` between the two."""

    def __init__(self, reach: Callable[[str], None], note: Callable[[], None]) -> None:
        self._reach, self._note = reach, note
        self._goes_on = False

    def before(self) -> None:
        """A commit follows."""
        self._reach(BEFORE_COMMIT)

    def after(self) -> None:
        """It has been made."""
        self._note()
        self._reach(AFTER_COMMIT)

    def after_statement(self) -> None:
        """It has been made by a statement, whose reply is not read yet: nothing else can be asked now."""
        self._note()
        self._goes_on = True

    def catch_up(self) -> None:
        """The code goes on, so the reply has been read."""
        if self._goes_on:
            self._goes_on = False
            self._reach(AFTER_COMMIT)

    def forget(self) -> None:
        """Whoever read the reply is gone."""
        self._goes_on = False


@contextmanager
def observed(commits: Commits) -> Iterator[None]:
    """Pass the points of the commits that are made while the block runs."""
    if _connections() is None:
        yield
        return
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.utils import CursorWrapper
    from django.db.transaction import Atomic, get_connection

    enter, leave = Atomic.__enter__, Atomic.__exit__
    cursors: Any = CursorWrapper  # whose stubs lack the method
    on_commit, execute = BaseDatabaseWrapper.on_commit, cursors._execute_with_wrappers

    def enter_block(block: Any) -> None:
        connection = get_connection(block.using)
        if block._from_testcase or _depth(connection) or not connection.in_atomic_block:
            enter(block)
            return
        # In the test's transaction it takes a savepoint to undo what would be a transaction of its own.
        with mock.patch.object(block, "savepoint", True):
            enter(block)

    def leave_block(block: Any, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        connection = get_connection(block.using)
        if _depth(connection) != 1 or exc_type is not None or connection.needs_rollback:
            leave(block, exc_type, exc_value, traceback)
            return
        savepoint = connection.savepoint_ids[-1] if connection.savepoint_ids else None
        try:
            commits.before()
        except BaseException as error:
            leave(block, type(error), error, error.__traceback__)
            raise
        leave(block, None, None, None)
        commits.after()
        if savepoint is not None:  # else Django has called them
            _call_hooks(connection, savepoint)

    def call_on_commit(connection: Any, func: Callable[[], object], robust: bool = False) -> None:
        if connection.in_atomic_block and not _depth(connection):
            _call(func, robust)
        else:
            on_commit(connection, func, robust)

    def execute_statement(cursor: Any, sql: Any, params: Any, many: bool, executor: Any) -> Any:
        commits.catch_up()
        # A composed statement of a driver (psycopg's `sql`) is no text.
        writes = str(sql).lstrip()[:8].upper().startswith(_WRITES)
        if not writes or _depth(cursor.db):
            return execute(cursor, sql, params, many, executor)
        commits.before()
        result = execute(cursor, sql, params, many, executor)
        commits.after_statement()
        return result

    with (
        mock.patch.object(Atomic, "__enter__", enter_block),
        mock.patch.object(Atomic, "__exit__", leave_block),
        mock.patch.object(BaseDatabaseWrapper, "on_commit", call_on_commit),
        mock.patch.object(CursorWrapper, "_execute_with_wrappers", execute_statement),
    ):
        yield


def _call_hooks(connection: Any, savepoint: str) -> None:
    """Call what waits for this commit, as Django does after a real one."""
    waiting = [hook for hook in connection.run_on_commit if savepoint in hook[0]]
    connection.run_on_commit = [hook for hook in connection.run_on_commit if savepoint not in hook[0]]
    for _, func, robust in waiting:
        _call(func, robust)


def _call(func: Callable[[], object], robust: bool) -> None:
    try:
        func()
    except Exception:
        if not robust:
            raise
        logger.exception("an on-commit hook failed, which is robust")
