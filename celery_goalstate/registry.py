"""The kinds and the engines of a process."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, TypeVar, Unpack, overload

import celery.app.utils
from celery import Celery, Task, current_app
from celery.fixups.django import DjangoFixup

from celery_goalstate.display import did_you_mean
from celery_goalstate.entity import Entity, EntityLike, EntityRef, can_resync, checked_id
from celery_goalstate.exceptions import ImproperlyConfigured, UnknownKind
from celery_goalstate.resync import RESYNC_ID, Resync, resync_class
from celery_goalstate.rules import check_entity_class
from celery_goalstate.settings import NAME, ROUTING_OPTIONS, KindKeywords, KindOptions

if TYPE_CHECKING:
    from celery_goalstate.engine import Engine

E = TypeVar("E", bound=type[Entity])

#: A kind by its name or its entity class.
KindLike = str | type[Entity]

DEFAULT_NAMESPACE = "default"

#: An entity class, and the options that it is registered with.
Registration: TypeAlias = "tuple[type[Entity], Mapping[str, Any]]"

#: Seconds that a thread waits for another one that imports the app's modules.
IMPORT_TIMEOUT = 10.0

#: What the public task is called after the namespace; no kind can have this name.
PUBLIC_TASK = "enqueue"


def task_name(kind: str, namespace: str) -> str:
    """The Celery task that evaluates a kind. It never changes: old workers know only old names."""
    return f"goalstate.{kind}" if namespace == DEFAULT_NAMESPACE else f"goalstate.{namespace}.{kind}"


@dataclass(frozen=True, slots=True)
class _Import:
    """An import of the app's modules that is under way."""

    thread: int
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """What a process has to know to enqueue entities of one kind, and a worker to evaluate them."""

    name: str
    task: str  #: the name of its Celery task
    entity_class: type[Entity] | None  #: None: another code base evaluates it
    options: KindOptions
    standing: str = ""  #: id of an entity that is always scheduled: the sweeper enqueues it when it is not


class Kinds:
    """The kinds of one engine: registered with an entity class, or declared, for another code base has that.

    `namespace` is the one in the tasks' names; that of the index may be set otherwise. `defaults` are options
    that the settings give to all kinds.
    """

    def __init__(
        self, namespace: str, *, app: Callable[[], Celery], defaults: Callable[[], KindOptions]
    ) -> None:
        self.namespace = namespace
        self._app = app
        self._defaults = defaults
        self._registered: dict[str, Registration] = {}
        self._declared: dict[str, Mapping[str, Any]] = {}
        self._resolved: dict[str, Kind] = {}
        self._resolved_with: KindOptions | None = None
        self._lock = threading.Lock()
        self._imported = False  # have the app's modules been, for a kind that was not known?
        self._import: _Import | None = None  # under way

    # -- what the project's modules say

    def register(
        self, cls: type[Entity], options: Mapping[str, Any]
    ) -> list[tuple[type[Entity], Mapping[str, Any]]]:
        """Add an entity class; what is new: it, and the class that resyncs it.

        Raises `ImproperlyConfigured` for a kind that is taken, or registered with other options.
        """
        _refuse_public_task(cls.kind, path_of(cls))
        if cls.kind in self._registered:
            known, known_options = self._registered[cls.kind]
            if known is not cls:
                raise ImproperlyConfigured(
                    f"kind {cls.kind!r} of {path_of(cls)} is taken by {path_of(known)};"
                    " set `kind` on one of them"
                )
            if known_options != options:
                raise ImproperlyConfigured(
                    f"{path_of(cls)} is registered already, with the options {known_options}, not {options}"
                )
            return []
        self._registered[cls.kind] = (cls, options)
        self._resolved.pop(cls.kind, None)  # it was declared until now
        new = [(cls, options)]
        if can_resync(cls):
            # Its tasks go where those of the kind go, to workers that know it; limits of a single evaluation
            # are not for them. Whether it is asked for is only known with the settings.
            routing = {name: value for name, value in options.items() if name in ROUTING_OPTIONS}
            own = {"converge": False, "max_failures": None, "batch_size": 1}
            new += self.register(resync_class(cls), {**own, **routing})
        return new

    def registered(self) -> list[Registration]:
        """The entity classes and their options, in the order of their registration."""
        return list(self._registered.values())

    def declare(self, name: str, routing: Mapping[str, Any]) -> None:
        """Add a kind without a class. Raises `ImproperlyConfigured`."""
        _refuse_public_task(NAME("kind", name), "declare()")
        if others := sorted(routing.keys() - ROUTING_OPTIONS):
            raise ImproperlyConfigured(
                f"declare({name!r}) takes where messages go, not {', '.join(others)}."
                f"{did_you_mean(others[0], ROUTING_OPTIONS)} Accepted: {', '.join(sorted(ROUTING_OPTIONS))};"
                " other options are for the code base that evaluates the kind"
            )
        if self._declared.setdefault(name, routing) != routing:
            raise ImproperlyConfigured(
                f"kind {name!r} is declared already, with the options {self._declared[name]}, not {routing}"
            )

    # -- what a process knows by that

    def __contains__(self, name: str) -> bool:
        return name in self._registered or name in self._declared

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._registered, *self._declared]))

    def known(self) -> list[Kind]:
        """The kinds, without unused resyncs, as far as modules were imported until now."""
        found = (self.find(name) for name in self)
        return [kind for kind in found if kind and (kind.standing or not _is_resync(kind.entity_class))]

    def names(self) -> tuple[str, ...]:
        """The names of all kinds that a worker would know. Raises the `ImportError` of a module."""
        self._import_modules()
        return tuple(kind.name for kind in self.known())

    def get(self, name: str) -> Kind:
        """The kind of this name. If there is none, the app's modules are imported first, once per process.

        Raises `UnknownKind`, and the `ImportError` of a module: the next call tries again.
        """
        found = self.find(name)
        if found is None:
            self._import_modules()
            found = self.find(name)
        if found is None:
            raise UnknownKind(self._unknown(name))
        return found

    def identify(self, entity: EntityLike) -> tuple[Kind, str]:
        """Kind and id of an entity that is to be enqueued. Raises `TypeError` or `UnknownKind`."""
        if isinstance(entity, EntityRef):
            return self.get(entity.kind), entity.id
        if not isinstance(entity, Entity):
            raise TypeError(f"{entity!r} is no entity; give an Entity or engine.ref(kind, id)")
        kind = self.find(entity.kind)
        if kind is None:
            self._import_modules()
            kind = self.find(entity.kind)
        if kind is None or kind.entity_class is None or not isinstance(entity, kind.entity_class):
            raise UnknownKind(
                f"{path_of(type(entity))} is not registered with this engine;"
                " decorate it with @engine.register. If another code base evaluates the kind, declare it, and"
                f" enqueue engine.ref({entity.kind!r}, ...)"
            )
        return kind, checked_id(entity.get_id())  # an override may return anything

    def find(self, name: str) -> Kind | None:
        """The kind of this name, as far as the modules say that were imported until now."""
        defaults = self._defaults()
        if defaults is not self._resolved_with:
            self._resolved_with, self._resolved = defaults, {}
        found = self._resolved.get(name)
        if found is None and name in self:
            found = self._resolved[name] = self._resolve(name, defaults)
        return found

    def _resolve(self, name: str, defaults: KindOptions) -> Kind:
        cls, options = self._registered.get(name) or (None, self._declared.get(name, {}))
        standing = _is_resync(cls) and self._resolve(cls.of, defaults).options.resync_every is not None
        try:
            resolved = defaults.override(**options)
        except ImproperlyConfigured as error:  # what goes together is known with the settings
            raise ImproperlyConfigured(f"kind {name!r}: {error}") from None
        return Kind(name, task_name(name, self.namespace), cls, resolved, RESYNC_ID if standing else "")

    def task(self, kind: str) -> str:
        """The name of a kind's Celery task."""
        return task_name(kind, self.namespace)

    def tasks(self) -> dict[str, str]:
        """Which kind each Celery task of this engine is of. The public task is of the kind that cannot be."""
        return {task_name(name, self.namespace): name for name in (PUBLIC_TASK, *self._registered)}

    def _import_modules(self) -> None:
        """Import what a worker of the app would import, where the entity classes are.

        Not under Celery's Django fixup, where that would run Django's set-up and all of its checks: there
        `celery_goalstate.contrib.django` has imported them already.
        """
        with self._lock:
            if self._imported:
                return
            mine = self._import is None
            under_way = self._import = self._import or _Import(threading.get_ident())
        if not mine:
            # A module that is being imported may ask, itself or by a thread that waits for it: so none waits
            # for the import for ever.
            if under_way.thread != threading.get_ident() and under_way.ended.wait(IMPORT_TIMEOUT):
                self._import_modules()  # if it failed, again
            return
        try:
            if not _under_django(self._app()):
                self._app().loader.import_default_modules()
            self._imported = True
        finally:
            self._import = None
            under_way.ended.set()

    def _unknown(self, name: str) -> str:
        if _under_django(self._app()) and "celery_goalstate.contrib.django" not in _installed_apps():
            hint = "Add 'celery_goalstate.contrib.django' to INSTALLED_APPS: it imports each app's entities"
        else:
            hint = (
                "Register its class, or say that another code base evaluates it:"
                f" engine.declare({name!r}, queue=...)"
            )
        return (
            f"no entity class of kind {name!r} is registered in this process, nor is the kind declared."
            f"{did_you_mean(name, self)} Known: {', '.join(self.names()) or 'none'}. {hint}"
        )


def _is_resync(cls: type[Entity] | None) -> TypeGuard[type[Resync]]:
    return cls is not None and issubclass(cls, Resync)


def _installed_apps() -> Sequence[str]:
    from django.conf import settings

    installed: Sequence[str] = settings.INSTALLED_APPS
    return installed


def _under_django(app: Celery) -> bool:
    """Whether Celery has set the app up for Django."""
    return any(isinstance(fixup, DjangoFixup) for fixup in vars(app).get("_fixups") or ())


def _refuse_public_task(kind: str, where: str) -> None:
    if kind == PUBLIC_TASK:
        raise ImproperlyConfigured(
            f"the kind {kind!r} of {where} is taken: goalstate.{PUBLIC_TASK} is the public task that"
            " enqueues. Set `kind` to another name"
        )


# Engines and shared entities ---------------------------------------------------------------------

all_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
shared: list[Registration] = []


def engines_of(app: Celery) -> dict[str, Engine]:
    """The engines of an app by namespace; kept on the app, which knows nothing of them."""
    engines: dict[str, Engine] | None = app.__dict__.get("goalstate_engines")
    if engines is None:
        engines = app.__dict__["goalstate_engines"] = {}
    return engines


def check_task_name(engine: Engine, kind: str, name: str) -> None:
    """Raise `ImproperlyConfigured` if another engine of the app has this task."""
    for other in engines_of(engine.app).values():
        if other is not engine and name in other.tasks:
            raise ImproperlyConfigured(
                f"kind {kind!r} and kind {other.tasks[name]!r} of another engine would both be the task"
                f" {name}; set `kind` or the engine's namespace to another one"
            )


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
def shared_entity(cls: E, /, **options: Unpack[KindKeywords]) -> E: ...
@overload
def shared_entity(**options: Unpack[KindKeywords]) -> Callable[[E], E]: ...
def shared_entity(cls: E | None = None, /, **options: Unpack[KindKeywords]) -> E | Callable[[E], E]:
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


def check_registration(cls: Any, options: Mapping[str, Any]) -> None:
    """Raise `TypeError` or `ImproperlyConfigured` for what cannot be registered."""
    if not (isinstance(cls, type) and issubclass(cls, Entity)) or cls is Entity:
        raise TypeError(f"{cls!r} cannot be registered; give a subclass of celery_goalstate.Entity")
    check_entity_class(cls)
    checked = KindOptions().override(**options)
    for name, value in checked.of_task.items():
        if name != "base" and not hasattr(Task, name):
            raise ImproperlyConfigured(
                f"{name}={value!r} cannot be given: Celery {celery.__version__} has no such task option,"
                " a newer one has"
            )
    every = checked.resync_every
    if every is not None and not can_resync(cls):
        raise ImproperlyConfigured(
            f"resync_every={every:g} needs iter_unconverged(), which {path_of(cls)} lacks"
        )


def name_of(kind: KindLike) -> str:
    """The kind's name. Raises `ImproperlyConfigured` if it cannot be one."""
    if isinstance(kind, type) and issubclass(kind, Entity):
        return kind.kind
    checked: str = NAME("kind", kind)
    return checked


def path_of(cls: type) -> str:
    """Where the class is defined, for messages."""
    return f"{cls.__module__}.{cls.__qualname__}"


# Passwords ---------------------------------------------------------------------------------------

# Also behind a prefix, as in Django's settings. There it is the broker's URL too, which by default is that of
# the index: Celery hides its password only where the setting has no prefix, before 5.7 in broker_url only.
_NAMES = "GOALSTATE_INDEX_URL|_BROKER_URL|BROKER_(READ|WRITE)_URL"


def hide_index_url() -> None:
    """Have Celery mask the URLs of index and broker in this process. Saying it again changes nothing."""
    utils: Any = celery.app.utils  # whose stubs know none of it
    hidden: re.Pattern[str] = utils.HIDDEN_SETTINGS
    if _NAMES not in hidden.pattern:
        utils.HIDDEN_SETTINGS = re.compile(f"{hidden.pattern}|{_NAMES}", hidden.flags)
