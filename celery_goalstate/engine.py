"""The engine: the public facade, and the one place that wires the rest together."""

from __future__ import annotations

import builtins
import enum
import random
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, TypeVar, overload

from celery import Celery, current_app

from celery_goalstate import index as indexes
from celery_goalstate.actions import Action, Context, Requeue
from celery_goalstate.backoff import FURTHEST, delay_seconds
from celery_goalstate.censor import hide_index_url
from celery_goalstate.entity import Entity, EntityRef, can_resync, checked_id
from celery_goalstate.exceptions import ImproperlyConfigured, UnknownKind
from celery_goalstate.index.base import Index, Policy, Record, Report, Request, Run, Scheduled, Verdict
from celery_goalstate.index.base import Status as IndexStatus
from celery_goalstate.kind import DEFAULT_NAMESPACE, Kind, milliseconds, random_id, task_name
from celery_goalstate.messages.publisher import Publisher
from celery_goalstate.settings import NAME, ROUTING_OPTIONS, KindOptions, Settings
from celery_goalstate.worker import bootsteps
from celery_goalstate.worker.lease import LeaseKeeper
from celery_goalstate.worker.sweeper import Sweeper
from celery_goalstate.worker.task import Evaluator, create_task, speaker

#: An entity, or a reference to one whose class this process need not know.
EntityLike = Entity | EntityRef
#: When to look: seconds from now, a timedelta from now, or an aware datetime; None: now.
Deadline = float | timedelta | datetime | None
#: A kind by its name or its entity class.
KindLike = str | type[Entity]

E = TypeVar("E", bound=type[Entity])

#: Entities that one round trip of `enqueue_many` and its like carries.
BATCH = 1000
_NEVER = datetime.max.replace(tzinfo=UTC)
#: The one entity of the kind that resyncs another kind.
RESYNC_ID = "all"


class Status(enum.StrEnum):
    """Where an entity stands. One that the engine does not track has none."""

    SCHEDULED = "scheduled"  #: an evaluation is pending
    RUNNING = "running"  #: a worker evaluates it now; a next evaluation may be pending
    IDLE = "idle"  #: evaluated; nothing is pending
    FAILED = "failed"  #: quarantined until somebody enqueues it


_PUBLIC = {
    IndexStatus.PARKED: Status.SCHEDULED,
    IndexStatus.SENT: Status.SCHEDULED,
    IndexStatus.RUNNING: Status.RUNNING,
    IndexStatus.IDLE: Status.IDLE,
    IndexStatus.FAILED: Status.FAILED,
}


@dataclass(frozen=True, slots=True)
class Enqueued:
    """What `enqueue` did. It has no truth value: say which of its fields is meant."""

    changed: bool  #: did it change the schedule?
    deadline: datetime | None  #: the one in force (UTC); None: nothing is pending
    sent: bool  #: was a message published? If not, the index sends it in time

    def __bool__(self) -> bool:
        raise TypeError("an Enqueued is neither true nor false; look at .changed or .sent")


@dataclass(frozen=True, slots=True)
class Description:
    """Everything that the index knows of an entity. Datetimes are UTC."""

    kind: str
    id: str
    status: Status
    deadline: datetime | None  #: of the pending evaluation
    sent: bool  #: is a message under way for it? If not, it is parked in the index
    failures: int  #: consecutive ones
    error: str | None  #: of the last evaluation
    task_id: str | None  #: of the Celery task under way, or of the last one
    converged: bool | None  #: did the last evaluation reach the goal? None: it did not look
    finished: datetime | None  #: when the last evaluation ended
    started: datetime | None  #: when the evaluation under way began
    lease_expires: datetime | None  #: when its worker counts as lost, unless it renews
    fencing_token: int | None  #: of the evaluation under way
    quarantined: datetime | None  #: since when


class Engine:
    """Keeps entities on the way to their goal states: one scheduled evaluation per entity, on Celery.

    `Engine(app)`, or `Engine()` and later `init_app(app)`. Settings are the `goalstate_*` of the app: read,
    checked and frozen when the engine is first used. A `namespace` keeps several engines of one app apart.
    """

    def __init__(self, app: Celery | None = None, *, namespace: str | None = None) -> None:
        self._app: Celery | None = None
        self._namespace = None if namespace is None else NAME("namespace", namespace)
        self._registered: dict[str, tuple[type[Entity], dict[str, Any]]] = {}
        self._kinds: dict[str, Kind] = {}
        self._settings: Settings | None = None
        self._opened: _Parts | None = None
        self._lock = threading.RLock()
        if app is not None:
            self.init_app(app)

    def __repr__(self) -> str:
        return f"<Engine of {self._app.main if self._app else 'no app yet'}: {', '.join(self._registered)}>"

    # -- setting up

    def init_app(self, app: Celery) -> None:
        """Attach the engine to a Celery app. Raises `ImproperlyConfigured` if it is attached already."""
        if self._app is not None:
            raise ImproperlyConfigured(f"this engine belongs to the app {self._app.main!r} already")
        engines, namespace = _engines_of(app), self._namespace or DEFAULT_NAMESPACE
        if namespace in engines:
            raise ImproperlyConfigured(
                f"the app {app.main!r} has an engine of namespace {namespace!r} already"
            )
        self._app = app
        engines[namespace] = self
        for cls, options in self._registered.values():
            self._create_task(cls, options)
        for cls, options in _shared:
            self.register(cls, **options)
        _all_engines.add(self)
        hide_index_url()
        bootsteps.install(
            app,
            namespace,
            settings=lambda: self.settings,
            open_sweeper=self._open_sweeper,
        )

    @property
    def app(self) -> Celery:
        """The Celery app. Raises `ImproperlyConfigured` before `init_app`."""
        if self._app is None:
            raise ImproperlyConfigured("this engine has no Celery app: Engine(app), or engine.init_app(app)")
        return self._app

    @property
    def settings(self) -> Settings:
        """The settings, as frozen when they were first used. Raises `ImproperlyConfigured`."""
        if self._settings is None:
            settings = Settings.from_conf(self.app.conf, namespace=self._namespace)
            other = _engines_of(self.app).get(settings.namespace, self)
            if other is not self:
                raise ImproperlyConfigured(
                    f"goalstate_namespace is {settings.namespace!r}, which another engine of the app"
                    f" {self.app.main!r} has: both would use the same entries of the index"
                )
            self._settings = settings
        return self._settings

    @overload
    def register(self, cls: E, /, **options: Any) -> E: ...
    @overload
    def register(self, /, **options: Any) -> Callable[[E], E]: ...
    def register(self, cls: E | None = None, /, **options: Any) -> E | Callable[[E], E]:
        """Register an entity class: bare, with options, or as a call. Options as in `KindOptions`.

        Raises `ImproperlyConfigured` for a kind that is taken, for an option that cannot work and for a class
        that is registered with other options, `TypeError` for anything but an entity class.
        """
        if cls is None:
            return lambda cls: self.register(cls, **options)
        _check_registration(cls, options)
        if cls.kind in self._registered:
            known, known_options = self._registered[cls.kind]
            if known is not cls:
                raise ImproperlyConfigured(
                    f"kind {cls.kind!r} of {_path(cls)} is taken by {_path(known)}; set `kind` on one of them"
                )
            if known_options != options:
                raise ImproperlyConfigured(
                    f"{_path(cls)} is registered already, with the options {known_options}, not {options}"
                )
            return cls
        if self._app is not None:
            self._create_task(cls, options)
        self._registered[cls.kind] = (cls, options)
        if can_resync(cls):
            self._register_resync(cls, options)
        return cls

    def _create_task(self, cls: type[Entity], options: dict[str, Any]) -> None:
        kind, name = cls.kind, self._task_name(cls.kind)
        for other in _engines_of(self.app).values():
            taken = {other._task_name(theirs): theirs for theirs in other._registered if other is not self}
            if name in taken:
                raise ImproperlyConfigured(
                    f"kind {kind!r} and kind {taken[name]!r} of another engine would both be the task {name};"
                    " set `kind` or the engine's namespace to another one"
                )
        of_task = KindOptions().override(**options).of_task
        create_task(
            self.app,
            name,
            kind,
            of_task,
            evaluator=lambda: self._evaluator(kind),
            eta_horizon=lambda: self.settings.eta_horizon,
        )

    def _task_name(self, kind: str) -> str:
        return task_name(kind, self._namespace or DEFAULT_NAMESPACE)

    def ref(self, kind: str, id: str | int) -> EntityRef:
        """A reference to an entity, which can be enqueued without importing its class."""
        return EntityRef(kind, id)  # type: ignore[arg-type]  # an int becomes its decimal string

    # -- scheduling

    def enqueue(
        self,
        entity: EntityLike,
        deadline: Deadline = None,
        *,
        eta: datetime | None = None,
        countdown: float | None = None,
        replace: bool = False,
        max_wait: float | timedelta | None = None,
    ) -> Enqueued:
        """Look at this entity then, or earlier if somebody asked for that: the earliest deadline wins.

        `deadline` (or Celery's words, `eta` and `countdown`) is an aware datetime, a timedelta, or seconds
        from now; none of them: now. The evaluation does not start before it.

        `replace=True` sets exactly this deadline, also a later one: a burst of calls leads to one evaluation
        (debounce), at the latest `max_wait` after the first of them.

        Raises `IndexUnavailable`: it may or may not have been noted, and saying it again is safe. Raises
        `ValueError`, `TypeError` or `UnknownKind` for bad input, before anything is written.
        """
        return self.prepare(
            entity, deadline, eta=eta, countdown=countdown, replace=replace, max_wait=max_wait
        )()

    def prepare(
        self,
        entity: EntityLike,
        deadline: Deadline = None,
        *,
        eta: datetime | None = None,
        countdown: float | None = None,
        replace: bool = False,
        max_wait: float | timedelta | None = None,
    ) -> Callable[[], Enqueued]:
        """Check the arguments of an `enqueue` now, to be done later: when a transaction is committed, say."""
        kind, id = self._identify(entity)
        request = _request(id, _one_deadline(deadline, eta, countdown))
        policy, bound = _policy(replace=replace, max_wait=max_wait)

        def enqueue() -> Enqueued:
            index = self._parts.index
            [scheduled] = index.enqueue(
                kind, [request], policy=policy, max_wait=bound, inside=_speaker_in(index, kind)
            )
            sent = self._dispatch(kind, [scheduled]) and scheduled.wakeup is not None
            return Enqueued(scheduled.changed, _datetime(scheduled.deadline), sent)

        return enqueue

    def enqueue_many(
        self,
        entities: Iterable[EntityLike],
        deadline: Deadline = None,
        *,
        eta: datetime | None = None,
        countdown: float | None = None,
        spread: float | timedelta | None = None,
        replace: bool = False,
        max_wait: float | timedelta | None = None,
    ) -> int:
        """`enqueue` for many entities, in few round trips; how many schedules it changed.

        `spread` (seconds or a timedelta) adds to each deadline a random part of it, so that they do not all
        come due at once. Raises as `enqueue` does: all entities are looked at before the first is written.
        """
        policy, bound = _policy(replace=replace, max_wait=max_wait)
        return self._enqueue_all(
            [self._identify(entity) for entity in entities],
            _one_deadline(deadline, eta, countdown),
            spread,
            policy,
            bound,
        )

    def _enqueue_all(
        self,
        identified: Iterable[tuple[str, str]],
        deadline: Deadline,
        spread: float | timedelta | None,
        policy: Policy,
        max_wait: int | None = None,
    ) -> int:
        width = 0.0 if spread is None else delay_seconds(spread, "spread")
        request = _request("checked", deadline)  # before anything is written
        index, changed = self._parts.index, 0
        for batch in _batches(identified):
            by_kind: defaultdict[str, builtins.list[Request]] = defaultdict(list)
            for kind, id in batch:
                part = random.random() * width  # noqa: S311 - spreads load, keeps no secret
                by_kind[kind].append(_spread(request, id, milliseconds(part)))
            for kind, requests in by_kind.items():
                scheduled = index.enqueue(
                    kind, requests, policy=policy, max_wait=max_wait, inside=_speaker_in(index, kind)
                )
                self._dispatch(kind, scheduled)
                changed += sum(each.changed for each in scheduled)
        return changed

    def resync(self, kind: KindLike, *, spread: float | timedelta | None = None, revive: bool = False) -> int:
        """Enqueue what the entity class's `iter_unconverged()` yields; how many were scheduled by that.

        Entities that are scheduled or evaluated already keep their deadline and back-off; quarantined ones
        stay so, unless `revive=True`. Rebuilds the schedule after a loss of the index.
        """
        name = self._kind_name(kind)
        cls = self._kind(name).entity_class
        if not can_resync(cls):
            raise ImproperlyConfigured(
                f"{name} cannot be resynced: define {cls.__name__}.iter_unconverged(), a class method that"
                " yields the ids of the entities whose state is not their goal state"
            )
        refs = (self.ref(name, id) for id in cls.iter_unconverged())
        policy = Policy.REVIVE if revive else Policy.RESYNC
        return self._enqueue_all(((ref.kind, ref.id) for ref in refs), None, spread, policy)

    def _dispatch(self, kind: str, scheduled: Iterable[Scheduled]) -> bool:
        wakeups = [each.wakeup for each in scheduled if each.wakeup is not None]
        known = self._kinds.get(kind)
        if known is None and kind in self._registered:
            known = self._kind(kind)
        return self._parts.publisher.dispatch(kind, wakeups, known.options if known else None)

    # -- looking

    def is_scheduled(self, entity: EntityLike) -> bool:
        """Whether an evaluation is pending: waiting for its deadline, or for a worker."""
        description = self.describe(entity)
        return description is not None and description.deadline is not None

    def describe(self, entity: EntityLike) -> Description | None:
        """Everything that the index knows of the entity; None: it does not know it."""
        return self.describe_many([entity])[0]

    def describe_many(self, entities: Iterable[EntityLike]) -> builtins.list[Description | None]:
        """`describe` for many entities, in few round trips."""
        described: builtins.list[Description | None] = []
        for batch in _batches(map(self._identify, entities)):
            found: dict[tuple[str, str], Description | None] = {}
            for kind, ids in _ids_by_kind(batch).items():
                for id, record in zip(ids, self._parts.index.describe(kind, ids), strict=True):
                    found[kind, id] = None if record is None else _description(kind, record)
            described += [found[identified] for identified in batch]
        return described

    def list(self, kind: KindLike, status: str | None = None, limit: int = 100) -> builtins.list[Description]:
        """Up to `limit` entities of a kind, in one status or in all: those that are due first come first."""
        name = self._kind_name(kind)
        wanted = list(IndexStatus) if status is None else _index_statuses(status)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"limit is {limit!r}; give an integer, 1 or more")
        found = [
            _description(name, record)
            for each in wanted
            for record in self._parts.index.records(name, each, limit)
        ]
        if status == Status.SCHEDULED:  # parked or sent: two orders
            found.sort(key=lambda description: description.deadline or _NEVER)
        return found[:limit]

    def counts(self, kind: KindLike | None = None) -> dict[str, dict[Status, int]]:
        """How many entities are in each status, by kind: of one kind, or of all that are registered."""
        names = self.kinds if kind is None else (self._kind_name(kind),)
        return {name: _public_counts(self._parts.index.counts(name)) for name in names}

    def orphans(self) -> dict[str, dict[Status, int]]:
        """Kinds that the index has entities of and this process no class; how many, as in `counts`.

        They are another app's on the same index, or were renamed or removed: then nobody evaluates them.
        """
        counted = {name: self._counts_as_kept(name) for name in self._foreign_kinds()}
        return {name: counts for name, counts in counted.items() if any(counts.values())}

    def _foreign_kinds(self) -> Iterable[str]:
        return (name for name in self._parts.index.kinds() if name not in self._registered)

    def _counts_as_kept(self, name: str) -> dict[Status, int]:
        """Raises `ImproperlyConfigured` for a kind in a layout of another release."""
        kept = self._parts.index.as_kept(name)
        return _public_counts(kept.counts(name) if kept else {})

    # -- operating

    def delete(self, entity: EntityLike) -> bool:
        """Forget the entity: its schedule, its failures, all of it; whether there was something to forget.

        No evaluation of it starts any more; one under way finishes, and nothing follows it.
        """
        return self.delete_many([entity]) == 1

    def delete_many(self, entities: Iterable[EntityLike]) -> int:
        """`delete` for many entities, in few round trips; how many there were to forget."""
        return sum(
            sum(self._parts.index.delete(kind, ids))
            for batch in _batches(map(self._identify, entities))
            for kind, ids in _ids_by_kind(batch).items()
        )

    def delete_kind(self, kind: KindLike) -> int:
        """`delete` for all entities of a kind; how many there were to forget."""
        name, deleted = self._kind_name(kind), 0
        index = self._parts.index.as_kept(name)
        if index is not None:
            for status in IndexStatus:
                while records := index.records(name, status, BATCH):
                    deleted += sum(index.delete(name, [record.id for record in records]))
                    _end_lost(index, name, records)
        return deleted

    def pause(self, kind: KindLike | None = None) -> None:
        """Let no evaluation of a kind start (no kind: of all that are registered); those under way finish."""
        for name in self._to_operate(kind):
            self._parts.index.pause(name)

    def resume(self, kind: KindLike | None = None) -> None:
        """Undo `pause`. What came due meanwhile is evaluated from the next sweep on."""
        for name in self._to_operate(kind):
            self._parts.index.resume(name)

    def paused(self, kind: KindLike) -> bool:
        """Whether a kind is paused."""
        return self._parts.index.paused(self._kind_name(kind))

    def stop(self) -> None:
        """Pause everything: the name that other goal state engines have for it."""
        self.pause()

    def start(self) -> None:
        """Resume everything."""
        self.resume()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the registered kinds, and of those that resync them every now and then."""
        return tuple(
            name
            for name, (cls, _) in list(self._registered.items())
            if not issubclass(cls, _Resync) or self._kind(name).standing
        )

    # -- the parts

    @property
    def _parts(self) -> _Parts:
        if self._opened is None:
            with self._lock:
                if self._opened is None:
                    self._opened = _Parts.open(self.app, self.settings, self._namespace or DEFAULT_NAMESPACE)
        return self._opened

    def _kind(self, name: str) -> Kind:
        if name not in self._kinds:
            if name not in self._registered:
                known = ", ".join(self.kinds) or "none"
                raise UnknownKind(
                    f"no entity class of kind {name!r} is registered with this engine; known: {known}"
                )
            cls, options = self._registered[name]
            standing = issubclass(cls, _Resync) and self._resync_every(cls.of) is not None
            resolved = self.settings.kind.override(**options)
            self._kinds[name] = Kind(name, cls, resolved, RESYNC_ID if standing else "")
        return self._kinds[name]

    def _evaluator(self, kind: str) -> Evaluator:
        parts = self._parts
        return Evaluator(
            self._kind(kind), engine=self, index=parts.index, publisher=parts.publisher, keeper=parts.keeper
        )

    def _open_sweeper(self, name: str) -> Sweeper:
        parts = self._parts
        return Sweeper(
            name,
            index=parts.index,
            publisher=parts.publisher,
            settings=self.settings,
            kinds=lambda: {name: self._kind(name) for name in self.kinds},
        )

    # -- what callers name

    def _identify(self, entity: EntityLike) -> tuple[str, str]:
        if isinstance(entity, EntityRef):
            return entity.kind, entity.id
        if not isinstance(entity, Entity):
            raise TypeError(f"{entity!r} is no entity; give an Entity or engine.ref(kind, id)")
        registered = self._registered.get(entity.kind)
        if registered is None or not isinstance(entity, registered[0]):
            raise UnknownKind(
                f"{_path(type(entity))} is not registered with this engine;"
                f" decorate it with @engine.register, or enqueue engine.ref({entity.kind!r}, ...)"
            )
        return entity.kind, checked_id(entity.get_id())  # an override may return anything

    def _kind_name(self, kind: KindLike) -> str:
        if isinstance(kind, type) and issubclass(kind, Entity):
            return kind.kind
        checked: str = NAME("kind", kind)
        return checked

    def _to_operate(self, kind: KindLike | None) -> tuple[str, ...]:
        if kind is not None:
            return (self._kind_name(kind),)
        if not self.kinds:
            raise UnknownKind("no entity class is registered in this process: name the kind that you mean")
        return self.kinds

    # -- resync_every

    def _register_resync(self, cls: type[Entity], options: dict[str, Any]) -> None:
        """Resync a kind by an entity of its own: one at a time, retried, and as visible as any other.

        Whether that is asked for is only known with the settings. Its tasks take the same way as those of
        the kind, to workers that know it; limits of a single evaluation are not for them.
        """
        resync = type(f"Resync{cls.__name__}", (_Resync,), {"kind": resync_kind(cls.kind), "of": cls.kind})
        routing = {name: value for name, value in options.items() if name in ROUTING_OPTIONS}
        self.register(resync, converge=False, max_failures=None, **routing)

    def _resync_every(self, kind: str) -> float | None:
        return self._kind(kind).options.resync_every


def resync_kind(kind: str) -> str:
    """The kind whose one entity resyncs this kind."""
    return f"{kind}.resync"


class _Resync(Entity):
    """A kind that is to be resynced every now and then."""

    kind = "resync"
    of: str

    def get_state(self) -> str:
        return "due"

    def get_goal_state(self) -> str:
        return "resynced"

    def get_action_list(self, state: str, goal_state: str) -> Action:  # noqa: ARG002 - there is only one
        return Action("resync", _resync)


def _resync(ctx: Context, entity: _Resync) -> Requeue | None:
    engine: Any = ctx.engine
    every = engine._resync_every(entity.of)
    ctx.log.info("%d entities of kind %s enqueued", engine.resync(entity.of, spread=every), entity.of)
    return None if every is None else Requeue(every)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What an engine is made of, opened when it is first used."""

    index: Index
    publisher: Publisher
    keeper: LeaseKeeper

    @classmethod
    def open(cls, app: Celery, settings: Settings, namespace: str) -> _Parts:
        """`namespace` is the one in the tasks' names; that of the index may be set otherwise."""
        index = indexes.open_index(settings)
        return cls(index, Publisher(app, index, namespace), LeaseKeeper(index, settings.lease))


# Engines and shared entities ---------------------------------------------------------------------

_all_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_shared: list[tuple[type[Entity], dict[str, Any]]] = []


def _engines_of(app: Celery) -> dict[str, Engine]:
    """The engines of an app by namespace; kept on the app, which knows nothing of them."""
    engines: dict[str, Engine] | None = app.__dict__.get("goalstate_engines")
    if engines is None:
        engines = app.__dict__["goalstate_engines"] = {}
    return engines


def engine_of(app: Celery, namespace: str | None = None) -> Engine:
    """The engine of a Celery app; with several, the one of this namespace (None: the default one).

    Raises `ImproperlyConfigured` if the app has none.
    """
    engines = _engines_of(app)
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
    if not _engines_of(app):
        apps = {engine.app for engine in list(_all_engines)}
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
    _check_registration(cls, options)
    for engine in list(_all_engines):
        engine.register(cls, **options)
    _shared.append((cls, options))
    return cls


def _check_registration(cls: Any, options: dict[str, Any]) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Entity)) or cls is Entity:
        raise TypeError(f"{cls!r} cannot be registered; give a subclass of celery_goalstate.Entity")
    every = KindOptions().override(**options).resync_every
    if every is not None and not can_resync(cls):
        raise ImproperlyConfigured(
            f"resync_every={every:g} needs iter_unconverged(), which {_path(cls)} lacks"
        )


# Arguments and replies ---------------------------------------------------------------------------


def _one_deadline(deadline: Deadline, eta: datetime | None, countdown: float | None) -> Deadline:
    if eta is None and countdown is None:
        return deadline
    given = {"deadline": deadline, "eta": eta, "countdown": countdown}
    values = {name: value for name, value in given.items() if value is not None}
    if len(values) > 1:
        raise TypeError(f"give only one of {' and '.join(values)}: each says when to look")
    if eta is not None and not isinstance(eta, datetime):
        raise TypeError(f"eta is {eta!r}; give an aware datetime")
    if countdown is not None and isinstance(countdown, datetime):
        raise TypeError(f"countdown is {countdown!r}; give seconds, or the datetime as eta=")
    return next(iter(values.values()), None)


def _request(id: str, deadline: Deadline) -> Request:
    """Relative deadlines stay relative: the index adds them to its own clock."""
    if deadline is None:
        return Request(id, delay=0, task_id=random_id())
    if isinstance(deadline, datetime):
        if deadline.utcoffset() is None:
            raise ValueError(f"deadline is {deadline!r}, which has no time zone; give an aware datetime")
        if deadline - datetime.now(UTC) > FURTHEST:
            raise ValueError(f"deadline is {deadline!r}; give one within the next hundred years")
        return Request(id, at=milliseconds(deadline.timestamp()), task_id=random_id())
    if not isinstance(deadline, (int, float, timedelta)):
        raise TypeError(f"deadline is {deadline!r}; give an aware datetime, a timedelta or seconds from now")
    return Request(id, delay=milliseconds(delay_seconds(deadline, "deadline")), task_id=random_id())


def _spread(request: Request, id: str, more: int) -> Request:
    if request.at is not None:
        return Request(id, at=request.at + more, task_id=random_id())
    return Request(id, delay=(request.delay or 0) + more, task_id=random_id())


def _policy(*, replace: bool, max_wait: float | timedelta | None) -> tuple[Policy, int | None]:
    if max_wait is None:
        return (Policy.REPLACE if replace else Policy.EARLIEST), None
    if not replace:
        raise TypeError(f"max_wait={max_wait!r} bounds replace=True, which is not given")
    return Policy.REPLACE, milliseconds(delay_seconds(max_wait, "max_wait"))


def _speaker_in(index: Index, kind: str) -> Run | None:
    """The evaluation of this engine and kind that speaks, if there is one."""
    who = speaker.get()
    if who is None or who.ended or who.index is not index or who.kind != kind:
        return None
    return who.run


def _batches(identified: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    iterator = iter(identified)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def _ids_by_kind(identified: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    by_kind: defaultdict[str, list[str]] = defaultdict(list)
    for kind, id in dict.fromkeys(identified):
        by_kind[kind].append(id)
    return by_kind


def _index_statuses(status: str) -> list[IndexStatus]:
    found = [inner for inner, public in _PUBLIC.items() if public == status]
    if not found:
        raise ValueError(f"status is {status!r}; give one of {', '.join(Status)}")
    return found


def _end_lost(index: Index, kind: str, records: Iterable[Record]) -> None:
    """End evaluations whose worker is lost: nobody sweeps a kind that is not registered."""
    runs = [record for record in records if record.lease]
    index.finish(
        kind, [Report(run.id, run.lease, Verdict.FAILED, delay=0, expired_only=True) for run in runs]
    )


def _public_counts(counts: Mapping[IndexStatus, int]) -> dict[Status, int]:
    counted = dict.fromkeys(Status, 0)
    for status, count in counts.items():
        counted[_PUBLIC[status]] += count
    return counted


def _datetime(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


def _description(kind: str, record: Record) -> Description:
    return Description(
        kind=kind,
        id=record.id,
        status=_PUBLIC[record.status],
        deadline=_datetime(record.deadline),
        sent=record.status is IndexStatus.SENT,
        failures=record.failures,
        error=record.error or None,
        task_id=record.task_id or None,
        converged=record.converged,
        finished=_datetime(record.finished),
        started=_datetime(record.started),
        lease_expires=_datetime(record.lease_expires),
        fencing_token=int(record.lease) if record.lease else None,
        quarantined=_datetime(record.since),
    )


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
