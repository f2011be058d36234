"""Django: enqueue when the transaction has been committed.

An enqueue inside a transaction lets a worker read the row before the change can be seen: it evaluates the old
state, finds nothing to do, and the change is missed.

Settings are Celery's own: with `app.config_from_object("django.conf:settings", namespace="CELERY")` each
`goalstate_x` is `CELERY_GOALSTATE_X` in Django's settings.
"""

from __future__ import annotations

from typing import Any

from django.db import transaction

from celery_goalstate.deadlines import Deadline
from celery_goalstate.engine import Engine
from celery_goalstate.entity import EntityLike
from celery_goalstate.registry import current_engine

__all__ = ["enqueue_on_commit"]


def enqueue_on_commit(
    entity: EntityLike,
    deadline: Deadline = None,
    *,
    using: str | None = None,
    engine: Engine | None = None,
    **options: Any,
) -> None:
    """`engine.enqueue`, as soon as the transaction is committed; never if it is rolled back.

    Outside a transaction: at once. A relative deadline counts from the commit. `using` names the database,
    `engine` is by default the one of Celery's current app. Bad input raises here, as in `enqueue`.
    """
    chosen = engine or current_engine()
    transaction.on_commit(chosen.prepare(entity, deadline, **options), using=using)
