"""What a model may be built on: `GoalStateModel`, whose `save` undoes nothing that the engine did meanwhile.

An ordinary `save` writes all columns, also those that somebody else has changed since the row was read: a
view that edits a note sets back the state, and the action runs again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Self

from django.db import models

from celery_goalstate.contrib.django.columns import unconverged
from celery_goalstate.contrib.django.entity import ModelEntity, StateChanged, columns_of, entity_class_of
from celery_goalstate.contrib.django.scheduling import (
    aenqueue_on_commit,
    aset_goal,
    enqueue_many_on_commit,
    enqueue_on_commit,
    set_goal,
)
from celery_goalstate.deadlines import Deadline
from celery_goalstate.registry import current_engine

__all__ = ["GoalStateModel", "GoalStateQuerySet", "unconverged_index"]


def unconverged_index(state: str, goal: str, *, name: str, key: str = "id") -> models.Index:
    """An index of the rows that are off their goals, for a model's `Meta.indexes`: small, whatever the table.

    A resync then reads nothing else. `key` is the field that is the primary key; a model whose primary key
    is a composite one needs an index of its own. A plain index of Django's: migrations import nothing else.
    """
    if not isinstance(key, str) or key == "pk":
        raise ValueError(f"key is {key!r}; give the name of the one field that is the primary key")
    return models.Index(fields=[key], condition=unconverged(state, goal), name=name)


class GoalStateQuerySet(models.QuerySet[Any]):
    """Rows that can be given goals. `objects = GoalStateQuerySet.as_manager()`."""

    def set_goal(self, goal: Any, **options: Any) -> int:
        """`contrib.django.set_goal` for these rows; how many there were."""
        return set_goal(self, goal, **options)

    set_goal.alters_data = True  # type: ignore[attr-defined]  # no template calls it

    async def aset_goal(self, goal: Any, **options: Any) -> int:
        """`set_goal`, from asynchronous code."""
        return await aset_goal(self, goal, **options)

    aset_goal.alters_data = True  # type: ignore[attr-defined]

    def unconverged(self, kind: str | None = None) -> Self:
        """Those that are off their goals."""
        cls = entity_class_of(current_engine(), self.model, kind)
        return self.filter(unconverged(cls.state_field, cls.goal_field))

    def enqueue_on_commit(
        self, deadline: Deadline = None, *, spread: float | timedelta | None = None, **options: Any
    ) -> None:
        """`contrib.django.enqueue_many_on_commit` for these rows."""
        enqueue_many_on_commit(self, deadline, spread=spread, **options)

    enqueue_on_commit.alters_data = True  # type: ignore[attr-defined]


class GoalStateModel(models.Model):
    """A model whose rows the engine brings to their goals. Abstract, and optional.

    The columns that a `ModelEntity` names as state or goal are its own. `save` leaves them out when they are
    as they were loaded. One that was changed is compared in the UPDATE: `StateChanged` is raised if it is no
    longer what was loaded. To write a value that is the loaded one, name it in `update_fields`.
    """

    objects = GoalStateQuerySet.as_manager()

    class Meta:  # noqa: D106 - Django's
        abstract = True

    #: The columns of the engine as they were last read or written; replaced, never changed.
    _loaded_states: Mapping[str, Any] = MappingProxyType({})

    @property
    def entity(self) -> ModelEntity:
        """The row's entity. Raises `UnknownKind` if there is none, or several."""
        return entity_class_of(current_engine(), type(self))(self)

    def set_goal(self, goal: Any, **options: Any) -> None:
        """`contrib.django.set_goal` for this row."""
        set_goal(self, goal, **options)

    set_goal.alters_data = True  # type: ignore[attr-defined]

    async def aset_goal(self, goal: Any, **options: Any) -> None:
        """`set_goal`, from asynchronous code."""
        await aset_goal(self, goal, **options)

    aset_goal.alters_data = True  # type: ignore[attr-defined]

    def enqueue_on_commit(self, deadline: Deadline = None, **options: Any) -> None:
        """`contrib.django.enqueue_on_commit` for this row."""
        enqueue_on_commit(self, deadline, **options)

    enqueue_on_commit.alters_data = True  # type: ignore[attr-defined]

    async def aenqueue_on_commit(self, deadline: Deadline = None, **options: Any) -> None:
        """`enqueue_on_commit`, from asynchronous code."""
        await aenqueue_on_commit(self, deadline, **options)

    aenqueue_on_commit.alters_data = True  # type: ignore[attr-defined]

    # -- saving

    @classmethod
    def from_db(
        cls, db: str | None, field_names: Collection[str], values: Collection[Any], **options: Any
    ) -> Self:
        """As Django's; notes the columns of the engine."""
        row = super().from_db(db, field_names, values, **options)
        row._note_states(columns_of(cls))
        return row

    def refresh_from_db(self, *args: Any, **options: Any) -> None:
        """As Django's; notes the columns of the engine."""
        super().refresh_from_db(*args, **options)
        self._note_states(self._columns_among(options.get("fields", args[1] if len(args) > 1 else None)))

    def save(self, *args: Any, update_fields: Iterable[str] | None = None, **options: Any) -> None:
        """As Django's, with the columns of the engine as this class says.

        Raises `StateChanged`; inside a transaction, catch it around an `atomic()` of its own, as any error of
        a save.
        """
        if update_fields is not None:
            update_fields = frozenset(update_fields)
        columns, loaded = self._columns_among(update_fields), self._loaded_states
        if update_fields is not None:
            unchanged = {name for name in columns if loaded.get(name) == self.__dict__.get(name)}
            self._loaded_states = {name: loaded[name] for name in loaded.keys() - unchanged}
        try:
            super().save(*args, update_fields=update_fields, **options)
        finally:
            self._loaded_states = loaded
        self._note_states(columns)

    save.alters_data = True  # type: ignore[attr-defined]

    def _do_update(
        self, base_qs: Any, using: str | None, pk_val: Any, values: Any, *args: Any, **options: Any
    ) -> Any:
        """Django's, where `values` are (field, None, value): the one place to narrow the UPDATE of a save."""
        loaded = self._loaded_states if using == self._state.db else {}
        kept, expected = [], {}
        for column in values:
            field, _, value = column
            if field.attname not in loaded:
                kept.append(column)
            elif value != loaded[field.attname]:
                kept.append(column)
                expected[field.attname] = loaded[field.attname]
        found = base_qs.filter(_as_loaded(expected)) if expected else base_qs
        updated = super()._do_update(found, using, pk_val, kept, *args, **options)
        if not updated and expected and base_qs.filter(pk=pk_val).exists():
            named = ", ".join(f"{name} {value!s}" for name, value in expected.items())
            raise StateChanged(
                message=f"{self._meta.label} {pk_val} was loaded with {named}, and has changed"
            )
        return updated

    def _columns_among(self, names: Collection[str] | None) -> Collection[str]:
        """The columns of the engine among these fields; None: all of them."""
        columns = columns_of(type(self))
        if names is None:
            return columns
        fields = self._meta.concrete_fields
        return columns & {each.attname for each in fields if each.name in names or each.attname in names}

    def _note_states(self, columns: Collection[str]) -> None:
        """Note what these columns are now; of an expression only the database knows that."""
        known = {
            name: self.__dict__[name]
            for name in columns
            if name in self.__dict__ and not hasattr(self.__dict__[name], "resolve_expression")
        }
        kept = {name: value for name, value in self._loaded_states.items() if name not in columns}
        self._loaded_states = {**kept, **known}


def _as_loaded(states: Mapping[str, Any]) -> models.Q:
    """The rows whose columns are these."""
    nulls = {f"{name}__isnull": True for name, value in states.items() if value is None}
    return models.Q(**nulls, **{name: value for name, value in states.items() if value is not None})


class Overview(models.Model):
    """No table: what the engine's page in the admin is named after, and its permissions."""

    class Meta:
        managed = False
        app_label = "goalstate"
        default_permissions = ()
        permissions = [  # noqa: RUF012 - as Django reads it
            ("view_overview", "Can see how entities stand"),
            ("operate_overview", "Can pause, resume and resync kinds"),
        ]
        verbose_name = verbose_name_plural = "overview"
