"""What is read from a model: its primary key as an entity's id, its choices, what is off its goal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

from django.core.exceptions import FieldDoesNotExist, ValidationError
from django.db.models import CompositePrimaryKey, F, Field, Model, Q

from celery_goalstate.display import did_you_mean

AnyField: TypeAlias = "Field[Any, Any]"

# Primary keys ------------------------------------------------------------------------------------


def key_of(model: type[Model], given: object) -> Any:
    """The primary key, as the model's rows have it: `"0042"` is 42, any spelling of a UUID is that UUID.

    A composite one is a tuple; it may be given as the JSON of an id. Raises `TypeError` or `ValueError`.
    """
    fields = cast("Sequence[AnyField]", model._meta.pk_fields)
    if not isinstance(model._meta.pk, CompositePrimaryKey):
        return _to_python(fields[0], given)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise ValueError(_not_a_key(model, fields, given)) from None
    if not isinstance(given, (list, tuple)) or len(given) != len(fields):
        raise ValueError(_not_a_key(model, fields, given))
    return tuple(map(_to_python, fields, given))


def id_of_key(key: Any) -> str:
    """The one text of a primary key that `key_of` returned."""
    if not isinstance(key, tuple):
        return str(key)
    values = [value if isinstance(value, (int, str)) else str(value) for value in key]
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def _to_python(field: AnyField, value: object) -> Any:
    if value is None or isinstance(value, (bool, float)):  # an integer field would cut 1.7 to 1
        raise TypeError(f"{field} is {value!r}; give the primary key of a row that is saved")
    try:
        return field.to_python(value)
    except (ValidationError, ValueError, TypeError) as error:
        raise ValueError(f"{field} is {value!r}; give the primary key of a row, or its text") from error


def _not_a_key(model: type[Model], fields: Iterable[AnyField], given: object) -> str:
    names = ", ".join(field.name for field in fields)
    return f"the primary key of {model._meta.label} is {given!r}; give ({names}), or a JSON list of these"


# Columns -----------------------------------------------------------------------------------------


def column_of(model: type[Model], name: str) -> AnyField | None:
    """The field of this name, if there is one and it has a column."""
    try:
        field = model._meta.get_field(name)
    except FieldDoesNotExist:
        return None
    return field if isinstance(field, Field) and field.concrete else None


def choices_of(model: type[Model], name: str) -> list[tuple[Any, str]]:
    """The values that a field may have, each with its label; empty: any value."""
    field = column_of(model, name)
    return [(value, str(label)) for value, label in (field.flatchoices if field else ()) if value != ""]


def check_value(model: type[Model], name: str, value: Any, accepted: Iterable[Any] | None = None) -> None:
    """Raise `ValueError` for a value that the field cannot have: by default, one that is no choice of it."""
    field = column_of(model, name)
    values = [choice for choice, _ in choices_of(model, name)] if accepted is None else [*accepted]
    if values and value not in values and not (value is None and field is not None and field.null):
        raise ValueError(
            f"{name} of {model._meta.label} is {value!r}.{did_you_mean(str(value), map(str, values))}"
            f" Accepted: {', '.join(map(str, values))}"
        )


def unconverged(state: str, goal: str) -> Q:
    """The rows that are not where they are meant to be; one without a goal is."""
    return Q(**{f"{goal}__isnull": False}) & ~Q(**{state: F(goal)})


def touched(model: type[Model]) -> dict[str, Any]:
    """The `auto_now` fields with their values of now, which a queryset's `update` leaves out."""
    row = model.__new__(model)  # not a call: the defaults of other fields may do something
    return {
        field.name: field.pre_save(row, add=False)
        for field in model._meta.concrete_fields
        if getattr(field, "auto_now", False)
    }
