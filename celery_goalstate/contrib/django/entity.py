"""`ModelEntity`: a row of a model as an entity. The row is the source of truth, the entity holds its key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, cached_property
from typing import Any, ClassVar, Self, TypeGuard

from django.db import InterfaceError, OperationalError, connections, router, transaction
from django.db.models import F, Model, Q, QuerySet

from celery_goalstate.actions import ActionsLike
from celery_goalstate.contrib.django.columns import (
    check_value,
    choices_of,
    column_of,
    id_of_key,
    key_of,
    touched,
    unconverged,
)
from celery_goalstate.display import did_you_mean
from celery_goalstate.engine import Engine
from celery_goalstate.entity import Entity
from celery_goalstate.exceptions import EntityGone, PermanentError, RetryAfter, UnknownKind

#: Rows that a resync reads at once.
PAGE = 2000


class StateChanged(RetryAfter):
    """The row's state is no longer the one that was expected: somebody else has changed it meanwhile.

    Raised by an action, it leads to another evaluation at once, and is not counted as a failure.
    """

    def __init__(self, seconds: float = 0, message: str | None = None) -> None:
        super().__init__(seconds, message)


class ModelEntity(Entity):
    """A row of `model`, whose columns `state_field` and `goal_field` say where it is and is meant to be.

    It is named by an instance, a primary key, or the text of one: `OrderEntity(order)`, `OrderEntity(42)`.
    A row whose goal is NULL has nothing to do. One that does not exist (any more) is forgotten.

    Raises `TypeError` or `ValueError` for what can be no primary key of the model.
    """

    model: ClassVar[type[Model]]
    state_field: ClassVar[str] = "state"
    goal_field: ClassVar[str] = "goal"

    #: The alias of the database; None: the one that the routers write to.
    using: ClassVar[str | None] = None

    #: The values of `goal_field` that may be goals; None: all of its choices.
    goals: ClassVar[Iterable[Any] | None] = None

    def __init__(self, row: object) -> None:
        if isinstance(row, Model):
            if not isinstance(row, self.model._meta.concrete_model or self.model):
                raise TypeError(f"{row!r} is no {self.model._meta.label}, whose rows are of kind {self.kind}")
            row = row.pk
        self.pk = key_of(self.model, row)
        super().__init__(id_of_key(self.pk))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        model: type[Model] | None = getattr(cls, "model", None)
        if model is not None and "kind" not in cls.__dict__:
            cls.kind = str(model._meta.model_name)
        super().__init_subclass__(**kwargs)
        if model is not None:
            _defined.append(cls)
            columns_of.cache_clear()

    @classmethod
    def id_of(cls, pk: object) -> str:
        """The id of the row with this primary key, however that is spelled. Raises as the class does."""
        return id_of_key(key_of(cls.model, pk))

    @classmethod
    def from_id(cls, id: str) -> Self:
        """The entity of this id. Raises `PermanentError` for an id that is not the one of a row."""
        try:
            entity = cls(id)
        except (TypeError, ValueError) as error:
            raise PermanentError(str(error)) from error
        if entity.id != id:  # it would be evaluated beside the row's own entity
            raise PermanentError(f"{id!r} is not the id of a row; its entity is {entity.ref}: enqueue that")
        return entity

    # -- the row

    @classmethod
    def get_queryset(cls) -> QuerySet[Any]:
        """The rows, in the database that is written to: a replica may lag behind the goal just committed."""
        return cls.model._default_manager.using(cls.using or router.db_for_write(cls.model))

    @cached_property
    def obj(self) -> Any:
        """The row, read when it is first asked for. Raises `EntityGone`.

        If the connection turns out to be broken, outside a transaction, it is read once more over a new one.
        """
        rows = self._rows()
        try:
            return self._one(rows)
        except (OperationalError, InterfaceError):
            connection = connections[rows.db]
            in_use = connection.in_atomic_block or not connection.autocommit
            if in_use or connection.connection is None or connection.is_usable():
                raise
            connection.close()
        return self._one(rows)

    def _rows(self) -> QuerySet[Any]:
        return self.get_queryset().filter(pk=self.pk)

    def _one(self, rows: QuerySet[Any]) -> Any:
        try:
            return rows.get()
        except self.model.DoesNotExist:
            raise EntityGone(f"there is no {self.model._meta.verbose_name} {self.id}") from None

    # -- what the engine asks

    def get_state(self) -> Any:
        """The row's `state_field`."""
        return getattr(self.obj, self.state_field)

    def get_goal_state(self) -> Any:
        """The row's `goal_field`."""
        return getattr(self.obj, self.goal_field)

    def get_action_list(self, state: Any, goal_state: Any) -> ActionsLike:
        """What the rules say; nothing without a goal."""
        return None if goal_state is None else super().get_action_list(state, goal_state)

    def is_converged(self, state: Any, goal_state: Any) -> bool:
        """Whether the row is at its goal, or has none."""
        return goal_state is None or super().is_converged(state, goal_state)

    @classmethod
    def iter_unconverged(cls) -> Iterator[str]:
        """The ids of the rows that are off their goals, page by page: between two pages no cursor is open."""
        wanted = cls.get_queryset().filter(unconverged(cls.state_field, cls.goal_field))
        keys = wanted.order_by("pk").values_list("pk", flat=True)
        page = list(keys[:PAGE])
        while page:
            yield from map(cls.id_of, page)
            page = list(keys.filter(pk__gt=page[-1])[:PAGE]) if len(page) == PAGE else []

    # -- what actions do

    def transition(self, from_: Any, to: Any, **fields: Any) -> None:
        """Write the state `to`, and other fields, in one UPDATE, if the row is in the state `from_`.

        `from_` is a state, or a list, tuple or set of states. Raises `StateChanged` if the row is in none of
        them: another evaluation begins at once, with what is there now. Raises `ValueError` for a `to` that
        is none of the field's choices.
        """
        check_value(self.model, self.state_field, to)
        states = set(from_) if isinstance(from_, (list, tuple, set, frozenset)) else {from_}
        expected = Q(**{f"{self.state_field}__in": states - {None}})
        if None in states:
            expected |= Q(**{f"{self.state_field}__isnull": True})
        values = {**touched(self.model), **fields, self.state_field: to}
        self.__dict__.pop("obj", None)
        if not self._rows().filter(expected).update(**values):
            named = " or ".join(sorted(map(repr, map(str, states))))
            raise StateChanged(message=f"{self.ref} is not in state {named} (any more)")

    @contextmanager
    def locked(self, **options: Any) -> Iterator[Any]:
        """The row, read afresh and locked until the block ends, which then saves the columns that changed.

        All in one transaction: an exception undoes it. `options` are those of `select_for_update`. Raises
        `EntityGone`.
        """
        rows = self._rows().select_for_update(**options)
        self.__dict__.pop("obj", None)
        with transaction.atomic(using=rows.db):
            if not connections[rows.db].features.has_select_for_update:
                # SQLite locks for who writes, and refuses to write what was read before somebody else wrote.
                rows.update(**{self.state_field: F(self.state_field)})
            row = self._one(rows)
            before = _values(row)
            yield row
            after = _values(row)
            changed = [name for name in after if name not in before or before[name] != after[name]]
            if changed:
                row.save(using=rows.db, update_fields={*changed, *touched(self.model)})

    # -- goals

    @classmethod
    def goal_choices(cls) -> list[tuple[Any, str]]:
        """The goals that a row may be given, each with its label; empty: any."""
        labels = dict(choices_of(cls.model, cls.goal_field))
        goals = labels if cls.goals is None else cls.goals
        return [(goal, labels.get(goal, str(goal))) for goal in goals]

    @classmethod
    def check_goal(cls, goal: Any) -> None:
        """Raise `ValueError` for what a row cannot have as its goal."""
        check_value(cls.model, cls.goal_field, goal, [value for value, _ in cls.goal_choices()])


def _values(row: Model) -> dict[str, Any]:
    """What is loaded of the row's columns, as it is now."""
    columns = {
        field.attname for field in row._meta.concrete_fields if not field.primary_key and not field.generated
    }
    return {name: deepcopy(value) for name, value in row.__dict__.items() if name in columns}


# From models to entities -------------------------------------------------------------------------

_defined: list[type[ModelEntity]] = []


@cache
def columns_of(model: type[Model]) -> frozenset[str]:
    """The attributes of a row, one for each column, that hold a state or a goal state of an entity."""
    fields = [
        column_of(model, name)
        for cls in _defined
        if issubclass(model, cls.model._meta.concrete_model or cls.model)
        for name in (cls.state_field, cls.goal_field)
    ]
    return frozenset(field.attname for field in fields if field is not None)


def is_of_model(cls: type[Entity]) -> TypeGuard[type[ModelEntity]]:
    """Whether its entities are rows; without a `model`, which a check complains of, they are not."""
    return issubclass(cls, ModelEntity) and hasattr(cls, "model")


def entity_classes_of(engine: Engine, model: type[Model]) -> Sequence[type[ModelEntity]]:
    """The registered classes whose entities are rows of this model, or of a parent of it."""
    classes = (engine.kind(name).entity_class for name in engine.kinds)
    found = [cls for cls in classes if cls is not None and is_of_model(cls)]
    concrete = model._meta.concrete_model or model
    return [cls for cls in found if cls.model is model] or [
        cls for cls in found if issubclass(concrete, cls.model._meta.concrete_model or cls.model)
    ]


def entity_class_of(engine: Engine, model: type[Model], kind: str | None = None) -> type[ModelEntity]:
    """The class whose entities are rows of this model; with several kinds, `kind` says which.

    Raises `UnknownKind`.
    """
    classes = entity_classes_of(engine, model)
    chosen = [cls for cls in classes if kind is None or cls.kind == kind]
    if len(chosen) == 1:
        return chosen[0]
    kinds = ", ".join(cls.kind for cls in classes) or "none"
    if kind is not None:
        near = did_you_mean(kind, (cls.kind for cls in classes))
        raise UnknownKind(f"no kind {kind!r} is of rows of {model._meta.label}.{near} Known: {kinds}")
    if chosen:
        raise UnknownKind(f"rows of {model._meta.label} are of several kinds ({kinds}): give kind=")
    raise UnknownKind(
        f"no entity class for {model._meta.label} is registered in this process: define a ModelEntity with"
        " this model in the module `entities` of an app in INSTALLED_APPS, and register it"
    )
