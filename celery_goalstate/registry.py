"""The kinds and the engines of a process."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, overload

import celery.app.utils
from celery import Celery, current_app

from celery_goalstate.entity import Entity, can_resync
from celery_goalstate.exceptions import ImproperlyConfigured
from celery_goalstate.settings import KindOptions

if TYPE_CHECKING:
    from celery_goalstate.engine import Engine

E = TypeVar("E", bound=type[Entity])

DEFAULT_NAMESPACE = "default"


def task_name(kind: str, namespace: str) -> str:
    """The Celery task that evaluates a kind. It never changes: old workers know only old names."""
    return f"goalstate.{kind}" if namespace == DEFAULT_NAMESPACE else f"goalstate.{namespace}.{kind}"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a process has to know to enqueue entities of one kind, and a worker to evaluate them."""

    name: str
    task: str  #: the name of its Celery task
    entity_class: type[Entity] | None  #: None: another code base evaluates it
    options: KindOptions
    standing: str = ""  #: id of an entity that is always scheduled: the sweeper enqueues it when it is not


# Engines and shared entities ---------------------------------------------------------------------

all_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
shared: list[tuple[type[Entity], dict[str, Any]]] = []


def engines_of(app: Celery) -> dict[str, Engine]:
    """The engines of an app by namespace; kept on the app, which knows nothing of them."""
    engines: dict[str, Engine] | None = app.__dict__.get("goalstate_engines")
    if engines is None:
        engines = app.__dict__["goalstate_engines"] = {}
    return engines


def engine_of(app: Celery, namespace: str | None = None) -> Engine:
    """The engine of a Celery app; with several, the one of this namespace (None: the default one).

    Raises `ImproperlyConfigured` if the app has none.
    """
    engines = engines_of(app)
    if not engines:
        raise ImproperlyConfigured(
            f"the Celery app {app.main!r} has no engine; create one beside it: engine = Engine(app)"
        )
    if namespace is None and len(engines) == 1:
        return next(iter(engines.values()))
    wanted = namespace or DEFAULT_NAMESPACE
    if wanted not in engines:
        raise ImproperlyConfigured(
            f"the Celery app {app.main!r} has no engine of namespace {wanted!r}; known: {', '.join(engines)}"
        )
    return engines[wanted]


def current_engine(namespace: str | None = None) -> Engine:
    """The engine of Celery's current app, for code that cannot import the project's own.

    Celery knows its current app only in the thread that created it, and web servers have others: there it is
    the app of the process that has an engine, if there is only one. Raises `ImproperlyConfigured` otherwise.
    """
    app: Any = current_app._get_current_object()  # type: ignore[attr-defined]  # of the proxy, not of the app
    if not engines_of(app):
        apps = {engine.app for engine in list(all_engines)}
        app = apps.pop() if len(apps) == 1 else app
    return engine_of(app, namespace)


@overload
def shared_entity(cls: E, /, **options: Any) -> E: ...
@overload
def shared_entity(**options: Any) -> Callable[[E], E]: ...
def shared_entity(cls: E | None = None, /, **options: Any) -> E | Callable[[E], E]:
    """Register an entity class with every engine, present and future, as `shared_task` does for tasks.

    For reusable apps, which do not import the project's engine.
    """
    if cls is None:
        return lambda cls: shared_entity(cls, **options)
    check_registration(cls, options)
    for engine in list(all_engines):
        engine.register(cls, **options)
    shared.append((cls, options))
    return cls


def check_registration(cls: Any, options: dict[str, Any]) -> None:
    """Raise `TypeError` or `ImproperlyConfigured` for what cannot be registered."""
    if not (isinstance(cls, type) and issubclass(cls, Entity)) or cls is Entity:
        raise TypeError(f"{cls!r} cannot be registered; give a subclass of celery_goalstate.Entity")
    every = KindOptions().override(**options).resync_every
    if every is not None and not can_resync(cls):
        raise ImproperlyConfigured(
            f"resync_every={every:g} needs iter_unconverged(), which {path_of(cls)} lacks"
        )


def path_of(cls: type) -> str:
    """Where the class is defined, for messages."""
    return f"{cls.__module__}.{cls.__qualname__}"


# Passwords ---------------------------------------------------------------------------------------

# Also behind a prefix, as in Django's settings. There it is the broker's URL too, which by default is that of
# the index: Celery 5.7 hides its password only where the setting has no prefix.
_NAMES = "GOALSTATE_INDEX_URL|_BROKER_(READ_|WRITE_)?URL"


def hide_index_url() -> None:
    """Have Celery mask the URLs of index and broker in this process. Saying it again changes nothing."""
    utils: Any = celery.app.utils  # whose stubs know none of it
    hidden: re.Pattern[str] = utils.HIDDEN_SETTINGS
    if _NAMES not in hidden.pattern:
        utils.HIDDEN_SETTINGS = re.compile(f"{hidden.pattern}|{_NAMES}", hidden.flags)
