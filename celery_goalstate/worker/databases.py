"""Django's database connections, between two entities that are evaluated in one task.

Celery closes them between two tasks. Within one, an entity that leaves its connection broken would fail the
next one, and one that leaves a transaction open would take the next one's writes along. So such connections
are closed, and the next entity gets a fresh one; a healthy one is kept, however old it is.

Where Django is not in use, or no connection was opened, nothing is done.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

#: What libpq calls a connection that is in no transaction.
IDLE = 0


@contextmanager
def usable_afterwards() -> Iterator[None]:
    """Close what the block leaves unusable, of this thread's connections.

    A transaction that was open before, of a base class that surrounds each task with one, is not the block's.
    """
    before = {connection.alias for connection in _opened() if connection.in_atomic_block}
    try:
        yield
    finally:
        for connection in _opened():
            if connection.alias not in before and not _is_usable(connection):
                _close(connection)


def _opened() -> list[Any]:
    database = sys.modules.get("django.db")
    if database is None or not sys.modules["django.conf"].settings.configured:
        return []
    opened: list[Any] = database.connections.all(initialized_only=True)
    return opened


def _is_usable(connection: Any) -> bool:
    """Without a question to the server, which would cost more than many an evaluation."""
    if connection.in_atomic_block or connection.errors_occurred:
        return False
    if connection.connection is None:
        return True  # closed: it is opened when somebody needs it
    as_set: bool = connection.autocommit == connection.settings_dict["AUTOCOMMIT"]
    return as_set and not _in_transaction(connection.connection)


def _in_transaction(driver: Any) -> bool:
    """Whether the driver knows of a transaction. Django may not: BEGIN is a statement like any other."""
    status: int = getattr(getattr(driver, "info", None), "transaction_status", IDLE)  # psycopg
    try:
        return status != IDLE or bool(getattr(driver, "in_transaction", False))  # sqlite3
    except Exception:  # noqa: BLE001 - it was closed; psycopg's status tells that, too
        return True


def _close(connection: Any) -> None:
    logger.debug("the connection to the database %s is closed: it was left unusable", connection.alias)
    # In a block that nobody leaves any more Django would not open another one.
    connection.in_atomic_block = False
    try:
        connection.close()
    except Exception:
        logger.debug("it could not even be closed", exc_info=True)
