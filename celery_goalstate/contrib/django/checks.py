"""What `manage.py check` finds (tag `goalstate`). The index is not asked: it may be away, or elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from django.apps import apps
from django.core.checks import CheckMessage, Error, Warning, register  # noqa: A004 - Django's name
from django.db.models import Model

from celery_goalstate.contrib.django.columns import choices_of, column_of
from celery_goalstate.contrib.django.entity import ModelEntity, is_of_model
from celery_goalstate.engine import Engine
from celery_goalstate.entity import Entity
from celery_goalstate.exceptions import ImproperlyConfigured
from celery_goalstate.registry import all_engines
from celery_goalstate.rules import Rules, check_entity_class

#: Cells or values that one message names.
SHOWN = 5


@register("goalstate")
def check_engines(app_configs: object, **options: Any) -> list[CheckMessage]:  # noqa: ARG001 - as Django calls it
    """The settings, the kinds, and how these fit their models, of all engines of the process."""
    engines = list(all_engines)
    if not engines:
        return [
            Error(
                "No Celery app with an engine is there in this process.",
                hint="Create one beside your Celery app, engine = Engine(app), and import that app in the"
                " __init__.py of your project: from .celery import app as celery_app.",
                id="goalstate.E001",
            )
        ]
    return [message for engine in engines for message in _of_engine(engine)]


def _of_engine(engine: Engine) -> Iterator[CheckMessage]:
    try:
        settings, kinds = engine.settings, [engine.kind(name) for name in engine.kinds]
    except ImproperlyConfigured as error:
        yield Error(_in_djangos_words(engine, str(error)), id="goalstate.E002")
        return
    if settings.index_url == "memory://" and not engine.app.conf.task_always_eager:
        yield Warning(
            "The index is memory://, and CELERY_TASK_ALWAYS_EAGER is not set: each process has an index of"
            " its own, so no worker knows what a web process enqueues.",
            hint="Set CELERY_GOALSTATE_INDEX_URL, or a Redis as CELERY_BROKER_URL.",
            id="goalstate.W001",
        )
    for kind in kinds:
        cls = kind.entity_class
        if cls is None:
            continue
        yield from _of_rules(cls)
        if issubclass(cls, ModelEntity) and not is_of_model(cls):
            yield Error(
                f"{cls.__name__} has no `model`, so its entities are no rows.",
                hint="Name it: model = Order.",
                obj=cls,
                id="goalstate.E004",
            )
        elif is_of_model(cls):
            columns = list(_of_columns(cls))
            yield from columns
            if not columns:
                yield from _of_choices(cls)
                yield from _of_admin(cls)
            if kind.options.resync_every is None:
                yield Warning(
                    f"The kind {kind.name!r} has no resync_every: a goal that is saved while the index is"
                    " away is not found again, nor are any if the index loses its data.",
                    hint="@engine.register(resync_every=600), say.",
                    obj=cls,
                    id="goalstate.W004",
                )


def _of_rules(cls: type[Entity]) -> Iterator[CheckMessage]:
    try:
        check_entity_class(cls)
    except ImproperlyConfigured as error:
        yield Error(str(error), obj=cls, id="goalstate.E003")


def _of_columns(cls: type[ModelEntity]) -> Iterator[CheckMessage]:
    for attribute in ("state_field", "goal_field"):
        name = getattr(cls, attribute)
        if column_of(cls.model, name) is None:
            names = ", ".join(field.name for field in cls.model._meta.concrete_fields)
            yield Error(
                f"{attribute} is {name!r}, which is no column of {cls.model._meta.label}.",
                hint=f"Its columns are: {names}.",
                obj=cls,
                id="goalstate.E004",
            )


def _of_choices(cls: type[ModelEntity]) -> Iterator[CheckMessage]:
    """How the rules fit the choices, where there are both."""
    if not isinstance(cls.rules, Rules):
        return
    states = [value for value, _ in choices_of(cls.model, cls.state_field)]
    goals = [value for value, _ in cls.goal_choices()]
    missing = cls.rules.missing(states, goals)
    if missing:
        cells = _some(f"{state} → {goal}" for state, goal in missing)
        yield Warning(
            f"The rules have no cell for {cells}: nothing is done there, and each evaluation logs a warning.",
            hint="Add the cells, [] where nothing is to be done; or set `goals` on the class to the choices"
            " that may be goals.",
            obj=cls,
            id="goalstate.W002",
        )
    named_states, named_goals = cls.rules.named()
    for what, named, accepted in (
        ("state", named_states, states),
        ("goal state", named_goals, [value for value, _ in choices_of(cls.model, cls.goal_field)]),
    ):
        strange = [value for value in named if accepted and value not in accepted]
        if strange:
            yield Warning(
                f"The rules name the {what} {_some(strange)}, which no row can have.",
                hint=f"The choices are: {', '.join(map(str, accepted))}.",
                obj=cls,
                id="goalstate.W003",
            )


def _some(values: Iterable[object]) -> str:
    texts = list(map(str, values))
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def _in_djangos_words(engine: Engine, text: str) -> str:
    """The text with the names of settings as they are written in Django's."""
    prefix = vars(engine.app).get("namespace")
    if not prefix:
        return text
    return re.sub(r"\bgoalstate_[a-z_]+", lambda name: f"{prefix}_{name[0]}".upper(), text)


# The admin ---------------------------------------------------------------------------------------


def _of_admin(cls: type[ModelEntity]) -> Iterator[CheckMessage]:
    """Where the admin writes a state by itself."""
    if not apps.is_installed("django.contrib.admin"):
        return
    from django.contrib.admin.sites import all_sites

    from celery_goalstate.contrib.django.admin import GoalStateAdmin

    for model, model_admin in ((m, a) for site in all_sites for m, a in site._registry.items()):
        if (
            issubclass(model, cls.model)
            and not isinstance(model_admin, GoalStateAdmin)
            and _writes(model_admin, model, cls.state_field)
        ):
            yield Warning(
                f"The form of {type(model_admin).__name__} writes {cls.state_field!r}: whoever saves it sets"
                " back what the engine did since the form was opened.",
                hint="Derive it from celery_goalstate.contrib.django.admin.GoalStateAdmin, or put"
                f" {cls.state_field!r} into readonly_fields.",
                obj=type(model_admin),
                id="goalstate.W005",
            )


def _writes(model_admin: Any, model: type[Model], name: str) -> bool:
    """Whether a form of the admin has the field, as far as its class says."""
    from django.contrib.admin.utils import flatten, flatten_fieldsets

    if name in model_admin.list_editable:
        return True
    if name in model_admin.readonly_fields or name in (model_admin.exclude or ()):
        return False
    if model_admin.fieldsets:
        return name in flatten_fieldsets(model_admin.fieldsets)
    if model_admin.fields:
        return name in flatten(model_admin.fields)
    field = column_of(model, name)
    return field is not None and field.editable
