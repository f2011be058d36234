"""The transaction guard: says where an enqueue comes before the commit that it is about.

A worker may be quicker than the commit: it evaluates the old row, finds nothing to do, and nobody enqueues
again.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from django.db import connections

import celery_goalstate
from celery_goalstate.engine import Engine
from celery_goalstate.exceptions import GoalStateError

#: Where this package's own modules are: a warning points at the line that called them.
_HERE = str(Path(celery_goalstate.__file__).parent)


class EnqueuedInTransaction(GoalStateError, UserWarning):
    """An entity is enqueued inside a transaction, so before the commit: use `enqueue_on_commit`.

    A warning, or an error, as `CELERY_GOALSTATE_ENQUEUE_IN_TRANSACTION` says.
    """


@dataclass(frozen=True, slots=True)
class TransactionGuard:
    """A hook of `Engine.before_enqueue`."""

    engine: Engine

    def __call__(self, kind: str, ids: Sequence[str]) -> None:
        """Raises `EnqueuedInTransaction`, if the setting says so."""
        reaction = self.engine.settings.enqueue_in_transaction
        if reaction == "allow":
            return
        databases = _in_transaction()
        if not databases:
            return
        what = f"{kind}/{ids[0]}" if len(ids) == 1 else f"{len(ids)} entities of kind {kind}"
        found = EnqueuedInTransaction(
            f"{what} enqueued inside a transaction on the database {', '.join(databases)}: a worker may"
            " evaluate before the commit, and see the old row. Use enqueue_on_commit or set_goal; if that is"
            " meant, set CELERY_GOALSTATE_ENQUEUE_IN_TRANSACTION = 'allow'"
        )
        if reaction == "error":
            raise found
        warnings.warn(found, stacklevel=_stacklevel())


def _in_transaction() -> list[str]:
    """The databases on which this thread is inside a transaction that is not only the one of a test case."""
    return [
        connection.alias
        for connection in connections.all(initialized_only=True)
        if any(not getattr(block, "_from_testcase", False) for block in connection.atomic_blocks)
    ]


def _stacklevel() -> int:
    """How far up the caller is that is not of this package, counted from the function that warns."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        level, frame = level + 1, frame.f_back
    return level
