"""Goals and enqueues of rows, each when the transaction that they belong to is committed.

An enqueue inside a transaction lets a worker read the row before the change can be seen: it evaluates the old
state, finds nothing to do, and the change is missed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias

from asgiref.sync import sync_to_async
from django.db import router, transaction
from django.db.models import Model, QuerySet
from django.dispatch import Signal

from celery_goalstate.contrib.django.columns import touched
from celery_goalstate.contrib.django.entity import ModelEntity, entity_class_of
from celery_goalstate.deadlines import Deadline
from celery_goalstate.description import Enqueued
from celery_goalstate.engine import Engine
from celery_goalstate.entity import EntityLike, EntityRef
from celery_goalstate.exceptions import IndexUnavailable
from celery_goalstate.registry import Kind, current_engine

logger = logging.getLogger(__name__)

#: What is enqueued: a row, an entity, or a reference to one.
Target: TypeAlias = "Model | EntityLike"

#: Rows that one UPDATE gives a goal.
ROWS = 5000

#: Sent when the index was away after a commit, so that `refs`, a list of `EntityRef`, are saved and not
#: enqueued; `error` is the `IndexUnavailable`. The sender is the `Engine`.
not_enqueued = Signal()


def set_goal(
    target: Model | QuerySet[Any],
    goal: Any,
    *,
    kind: str | None = None,
    deadline: Deadline = None,
    spread: float | timedelta | None = None,
    robust: bool = True,
    **fields: Any,
) -> int:
    """Write a goal, and other fields, to a row or to the rows of a queryset; enqueue them on commit.

    Returns how many rows there were. They are enqueued also if they had this goal. `deadline` and `spread`
    (seconds or a timedelta) are those of `Engine.enqueue_many`; `kind` says which, if rows of this model are
    of several kinds; `robust` is that of `enqueue_on_commit`.

    Raises `ValueError` for what is no goal of the kind, `UnknownKind`, and the model's `DoesNotExist` if the
    row of an instance is gone.
    """
    engine, model = current_engine(), target.model if isinstance(target, QuerySet) else type(target)
    cls = entity_class_of(engine, model, kind)
    cls.check_goal(goal)
    values = {**touched(model), **fields, cls.goal_field: goal}
    if isinstance(target, QuerySet):
        return _set_goals(engine, cls, target, values, deadline=deadline, spread=spread, robust=robust)
    entity = cls(target)
    using = _database(entity, target)
    enqueue = engine.prepare_many([entity], deadline, spread=spread)
    with transaction.atomic(using=using):
        if not model._base_manager.using(using).filter(pk=target.pk).update(**values):
            raise model.DoesNotExist(f"there is no {model._meta.verbose_name} {entity.id}")
        target.refresh_from_db(using=using, fields=[*values])
        _on_commit(engine, enqueue, [entity.ref], using=using, robust=robust)
    return 1


def _set_goals(
    engine: Engine,
    cls: type[ModelEntity],
    rows: QuerySet[Any],
    values: dict[str, Any],
    *,
    deadline: Deadline,
    spread: float | timedelta | None,
    robust: bool,
) -> int:
    using = _database_of(cls, rows)
    rows = rows.using(using).select_for_update()
    if not rows.query.is_sliced:
        rows = rows.order_by("pk")  # or two of these calls could wait for each other
    with transaction.atomic(using=using):
        keys = list(rows.values_list("pk", flat=True))
        for start in range(0, len(keys), ROWS):
            some = rows.model._base_manager.using(using).filter(pk__in=keys[start : start + ROWS])
            some.update(**values)
        entities = list(map(cls, keys))
        enqueue = engine.prepare_many(entities, deadline, spread=spread)
        _on_commit(engine, enqueue, [entity.ref for entity in entities], using=using, robust=robust)
    return len(keys)


def enqueue_on_commit(
    target: Target,
    deadline: Deadline = None,
    *,
    kind: str | None = None,
    using: str | None = None,
    engine: Engine | None = None,
    robust: bool = True,
    **options: Any,
) -> None:
    """`engine.enqueue`, as soon as the transaction is committed; never if it is rolled back.

    `target` is a row, an entity or a reference; `kind` says which, if rows of this model are of several.
    Outside a transaction: at once. A relative deadline counts from the commit. `using` names the database, by
    default that of the row; `engine` is by default the one of Celery's current app.

    An index that does not answer then is logged as an error and sent as the signal `not_enqueued`: the row is
    saved, later callbacks run, and a resync finds it. With `robust=False`, `IndexUnavailable` is raised.
    Bad input raises here, as in `enqueue`.
    """
    chosen = engine or current_engine()
    entity = _entity(chosen, target, kind)
    enqueue = chosen.prepare(entity, deadline, **options)
    database = using or _database(entity, target)
    _on_commit(chosen, enqueue, [_ref_of(entity)], using=database, robust=robust)


def enqueue_many_on_commit(
    targets: Iterable[Target] | QuerySet[Any],
    deadline: Deadline = None,
    *,
    kind: str | None = None,
    using: str | None = None,
    engine: Engine | None = None,
    robust: bool = True,
    **options: Any,
) -> None:
    """`engine.enqueue_many`, as soon as the transaction is committed; see `enqueue_on_commit`.

    Of a queryset only the primary keys are read, now. `spread` is an option, too.
    """
    chosen = engine or current_engine()
    by_database: defaultdict[str | None, list[EntityLike]] = defaultdict(list)
    if isinstance(targets, QuerySet):
        cls = entity_class_of(chosen, targets.model, kind)
        alias = using or _database_of(cls, targets)
        by_database[alias] += map(cls, targets.using(alias).values_list("pk", flat=True))
    else:
        for target in targets:
            entity = _entity(chosen, target, kind)
            by_database[using or _database(entity, target)].append(entity)
    prepared = [
        (database, chosen.prepare_many(entities, deadline, **options), list(map(_ref_of, entities)))
        for database, entities in by_database.items()
    ]
    for database, enqueue, refs in prepared:
        _on_commit(chosen, enqueue, refs, using=database, robust=robust)


# From asynchronous code --------------------------------------------------------------------------


async def aset_goal(target: Model | QuerySet[Any], goal: Any, **options: Any) -> int:
    """`set_goal`, in the thread that Django's ORM has for asynchronous code."""
    return await sync_to_async(set_goal, thread_sensitive=True)(target, goal, **options)


async def aenqueue_on_commit(target: Target, deadline: Deadline = None, **options: Any) -> None:
    """`enqueue_on_commit`, in the thread that Django's ORM has for asynchronous code."""
    await sync_to_async(enqueue_on_commit, thread_sensitive=True)(target, deadline, **options)


async def aenqueue(
    target: Target,
    deadline: Deadline = None,
    *,
    kind: str | None = None,
    engine: Engine | None = None,
    **options: Any,
) -> Enqueued:
    """`engine.enqueue`, at once, in a thread that keeps nobody's database connection. Raises as that does."""
    chosen = engine or current_engine()
    entity = _entity(chosen, target, kind)
    return await sync_to_async(chosen.enqueue, thread_sensitive=False)(entity, deadline, **options)


# -------------------------------------------------------------------------------------------------


def _entity(engine: Engine, target: Target, kind: str | None) -> EntityLike:
    """The entity that is meant; a reference to a row gets the one id of that row."""
    if isinstance(target, Model):
        return entity_class_of(engine, type(target), kind)(target)
    if kind is not None:
        raise TypeError(f"kind={kind!r} goes with a row; {target!r} has its own")
    if isinstance(target, EntityRef):
        cls = engine.kind(target.kind).entity_class
        if cls is not None and issubclass(cls, ModelEntity):
            return cls(target.id)
    return target


def _ref_of(entity: EntityLike) -> EntityRef:
    return entity if isinstance(entity, EntityRef) else entity.ref


def _database(entity: EntityLike, target: object) -> str | None:
    """The database that the entity's row is written to; None: an entity that is no row."""
    if not isinstance(entity, ModelEntity):
        return None
    hints = {"instance": target} if isinstance(target, Model) else {}
    return entity.using or router.db_for_write(entity.model, **hints)


def _database_of(cls: type[ModelEntity], rows: QuerySet[Any]) -> str:
    """The database that these rows are written to: the one of the kind, of the queryset, or of the router."""
    return cls.using or rows.select_for_update().db


def _on_commit(
    engine: Engine,
    enqueue: Callable[[], object],
    refs: Sequence[EntityRef],
    *,
    using: str | None,
    robust: bool,
) -> None:
    if refs:
        call = partial(_enqueue_robustly, engine, enqueue, refs) if robust else enqueue
        transaction.on_commit(call, using=using)


def _enqueue_robustly(engine: Engine, enqueue: Callable[[], object], refs: Sequence[EntityRef]) -> None:
    try:
        enqueue()
    except IndexUnavailable as error:
        first, others = refs[0], len(refs) - 1
        logger.error(  # noqa: TRY400 - where it comes from is no news, and this may be a busy site
            "%s%s saved, but not enqueued: %s %s",
            first,
            f" and {others} others are" if others else " is",
            error,
            _remedy(engine.kind(first.kind)),
        )
        not_enqueued.send_robust(sender=engine, refs=list(refs), error=error)


def _remedy(kind: Kind) -> str:
    every = kind.options.resync_every
    if every is not None:
        return f"The resync of its kind, every {every:g} s, finds it if it is off its goal"
    if kind.entity_class is None:
        return "Whether a resync finds it is up to the code base that evaluates its kind"
    return "Its kind has no resync_every, so nothing enqueues it by itself"
