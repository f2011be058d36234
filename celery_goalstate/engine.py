"""The engine: the public facade, and the one place that wires the rest together."""

from __future__ import annotations

import builtins
import logging
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, TypeVar, overload

from celery import Celery

from celery_goalstate import index as indexes
from celery_goalstate import registry
from celery_goalstate.backoff import delay_seconds
from celery_goalstate.deadlines import Deadline, milliseconds, one_deadline, policy_of, request_for, spread_by
from celery_goalstate.description import (
    Description,
    Enqueued,
    Status,
    datetime_of,
    description_of,
    index_statuses,
    public_counts,
)
from celery_goalstate.entity import Entity, EntityRef, can_resync, checked_id
from celery_goalstate.exceptions import ImproperlyConfigured, UnknownKind
from celery_goalstate.index.base import Index, Policy, Record, Report, Request, Run, Scheduled, Verdict
from celery_goalstate.index.base import Status as IndexStatus
from celery_goalstate.messages.publisher import Publisher
from celery_goalstate.registry import (
    DEFAULT_NAMESPACE,
    Kind,
    check_registration,
    engines_of,
    hide_index_url,
    path_of,
    task_name,
)
from celery_goalstate.resync import RESYNC_ID, Resync, resync_kind
from celery_goalstate.settings import NAME, ROUTING_OPTIONS, KindOptions, Settings
from celery_goalstate.worker import bootsteps
from celery_goalstate.worker.lease import LeaseKeeper
from celery_goalstate.worker.parts import Parts
from celery_goalstate.worker.sweeper import Sweeper
from celery_goalstate.worker.task import Evaluator, create_task, speaker

logger = logging.getLogger(__name__)

#: An entity, or a reference to one whose class this process need not know.
EntityLike = Entity | EntityRef
#: A kind by its name or its entity class.
KindLike = str | type[Entity]

E = TypeVar("E", bound=type[Entity])

#: Entities that one round trip of `enqueue_many` and its like carries.
BATCH = 1000
_NEVER = datetime.max.replace(tzinfo=UTC)


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
        self._opened: Parts | None = None
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
        engines, namespace = engines_of(app), self._namespace or DEFAULT_NAMESPACE
        if namespace in engines:
            raise ImproperlyConfigured(
                f"the app {app.main!r} has an engine of namespace {namespace!r} already"
            )
        self._app = app
        engines[namespace] = self
        for cls, options in self._registered.values():
            self._create_task(cls, options)
        for cls, options in registry.shared:
            self.register(cls, **options)
        registry.all_engines.add(self)
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
            other = engines_of(self.app).get(settings.namespace, self)
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
        check_registration(cls, options)
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
            return cls
        if self._app is not None:
            self._create_task(cls, options)
        self._registered[cls.kind] = (cls, options)
        if can_resync(cls):
            self._register_resync(cls, options)
        return cls

    def _create_task(self, cls: type[Entity], options: dict[str, Any]) -> None:
        kind, name = cls.kind, self._task_name(cls.kind)
        for other in engines_of(self.app).values():
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
        request = request_for(id, one_deadline(deadline, eta, countdown))
        policy, bound = policy_of(replace=replace, max_wait=max_wait)

        def enqueue() -> Enqueued:
            index = self.parts.index
            [scheduled] = index.enqueue(
                kind, [request], policy=policy, max_wait=bound, inside=_speaker_in(index, kind)
            )
            sent = self._dispatch(kind, [scheduled]) and scheduled.wakeup is not None
            return Enqueued(scheduled.changed, datetime_of(scheduled.deadline), sent)

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
        policy, bound = policy_of(replace=replace, max_wait=max_wait)
        return self._enqueue_all(
            [self._identify(entity) for entity in entities],
            one_deadline(deadline, eta, countdown),
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
        request = request_for("checked", deadline)  # before anything is written
        index, changed = self.parts.index, 0
        for batch in _batches(identified):
            by_kind: defaultdict[str, builtins.list[Request]] = defaultdict(list)
            for kind, id in batch:
                part = random.random() * width  # noqa: S311 - spreads load, keeps no secret
                by_kind[kind].append(spread_by(request, id, milliseconds(part)))
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
        assert cls is not None  # noqa: S101
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
        if known is None:
            registered = kind in self._registered
            known = self._kind(kind) if registered else Kind(kind, self._task_name(kind), None, KindOptions())
        return self.parts.publisher.dispatch(known, wakeups)

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
                for id, record in zip(ids, self.parts.index.describe(kind, ids), strict=True):
                    found[kind, id] = None if record is None else description_of(kind, record)
            described += [found[identified] for identified in batch]
        return described

    def list(self, kind: KindLike, status: str | None = None, limit: int = 100) -> builtins.list[Description]:
        """Up to `limit` entities of a kind, in one status or in all: those that are due first come first."""
        name = self._kind_name(kind)
        wanted = list(IndexStatus) if status is None else index_statuses(status)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"limit is {limit!r}; give an integer, 1 or more")
        found = [
            description_of(name, record)
            for each in wanted
            for record in self.parts.index.records(name, each, limit)
        ]
        if status == Status.SCHEDULED:  # parked or sent: two orders
            found.sort(key=lambda description: description.deadline or _NEVER)
        return found[:limit]

    def counts(self, kind: KindLike | None = None) -> dict[str, dict[Status, int]]:
        """How many entities are in each status, by kind: of one kind, or of all that are registered."""
        names = self.kinds if kind is None else (self._kind_name(kind),)
        return {name: public_counts(self.parts.index.counts(name)) for name in names}

    def orphans(self) -> dict[str, dict[Status, int]]:
        """Kinds that the index has entities of and this process no class; how many, as in `counts`.

        They are another app's on the same index, or were renamed or removed: then nobody evaluates them.
        """
        counted = {name: self._counts_as_kept(name) for name in self._foreign_kinds()}
        return {name: counts for name, counts in counted.items() if any(counts.values())}

    def _foreign_kinds(self) -> Iterable[str]:
        return (name for name in self.parts.index.kinds() if name not in self._registered)

    def _counts_as_kept(self, name: str) -> dict[Status, int]:
        """Raises `ImproperlyConfigured` for a kind in a layout of another release."""
        kept = self.parts.index.as_kept(name)
        return public_counts(kept.counts(name) if kept else {})

    # -- operating

    def delete(self, entity: EntityLike) -> bool:
        """Forget the entity: its schedule, its failures, all of it; whether there was something to forget.

        No evaluation of it starts any more; one under way finishes, and nothing follows it.
        """
        return self.delete_many([entity]) == 1

    def delete_many(self, entities: Iterable[EntityLike]) -> int:
        """`delete` for many entities, in few round trips; how many there were to forget."""
        return sum(
            sum(self.parts.index.delete(kind, ids))
            for batch in _batches(map(self._identify, entities))
            for kind, ids in _ids_by_kind(batch).items()
        )

    def delete_kind(self, kind: KindLike) -> int:
        """`delete` for all entities of a kind; how many there were to forget."""
        name, deleted = self._kind_name(kind), 0
        index = self.parts.index.as_kept(name)
        if index is not None:
            for status in IndexStatus:
                while records := index.records(name, status, BATCH):
                    deleted += sum(index.delete(name, [record.id for record in records]))
                    _end_lost(index, name, records)
        return deleted

    def pause(self, kind: KindLike | None = None) -> None:
        """Let no evaluation of a kind start (no kind: of all that are registered); those under way finish.

        This holds on every worker, and until `resume`, also when this process has ended.
        """
        for name in self._to_operate(kind):
            self.parts.index.pause(name)

    def resume(self, kind: KindLike | None = None) -> None:
        """Undo `pause`. What came due meanwhile is evaluated from the next sweep on."""
        for name in self._to_operate(kind):
            self.parts.index.resume(name)

    def paused(self, kind: KindLike) -> bool:
        """Whether a kind is paused."""
        return self.parts.index.paused(self._kind_name(kind))

    def stop(self) -> None:
        """Pause all registered kinds on **every worker, until `start`**, also when this process has ended.

        Do not call it when a process ends. Elsewhere this name ends the engine of one process; here it stops
        the whole deployment. A process that ends needs no call.
        """
        self.pause()
        logger.warning(
            "all kinds are paused on every worker (%s), also when this process has ended. `engine.start()` or"
            " `celery goalstate resume` ends that",
            ", ".join(self.kinds),
        )

    def start(self) -> None:
        """Resume all registered kinds on every worker, whoever paused them."""
        self.resume()
        logger.info("all kinds are resumed on every worker (%s)", ", ".join(self.kinds))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the registered kinds, and of those that resync them every now and then."""
        return tuple(
            name
            for name, (cls, _) in list(self._registered.items())
            if not issubclass(cls, Resync) or self._kind(name).standing
        )

    # -- the parts

    @property
    def parts(self) -> Parts:
        """What the engine is made of, opened when it is first used."""
        if self._opened is None:
            with self._lock:
                if self._opened is None:
                    self._opened = self._open()
        return self._opened

    def _open(self) -> Parts:
        index = indexes.open_index(self.settings)
        return Parts(
            index=index, publisher=Publisher(self.app, index), keeper=LeaseKeeper(index, self.settings.lease)
        )

    @contextmanager
    def opened_with(self, parts: Parts, settings: Settings | None = None) -> Iterator[None]:
        """Replace the parts, and the frozen settings, while the block runs: for tests."""
        with self._lock:
            before = self._opened, self._settings, self._kinds
            self._opened, self._settings, self._kinds = parts, settings or self.settings, {}
        try:
            yield
        finally:
            with self._lock:
                self._opened, self._settings, self._kinds = before

    def _kind(self, name: str) -> Kind:
        if name not in self._kinds:
            if name not in self._registered:
                known = ", ".join(self.kinds) or "none"
                raise UnknownKind(
                    f"no entity class of kind {name!r} is registered with this engine; known: {known}"
                )
            cls, options = self._registered[name]
            standing = issubclass(cls, Resync) and self._resync_every(cls.of) is not None
            resolved = self.settings.kind.override(**options)
            self._kinds[name] = Kind(
                name, self._task_name(name), cls, resolved, RESYNC_ID if standing else ""
            )
        return self._kinds[name]

    def _evaluator(self, kind: str) -> Evaluator:
        return Evaluator(self._kind(kind), engine=self, parts=self.parts)

    def _open_sweeper(self, name: str) -> Sweeper:
        return Sweeper(
            name,
            parts=self.parts,
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
                f"{path_of(type(entity))} is not registered with this engine;"
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
        resync = type(f"Resync{cls.__name__}", (Resync,), {"kind": resync_kind(cls.kind), "of": cls.kind})
        routing = {name: value for name, value in options.items() if name in ROUTING_OPTIONS}
        self.register(resync, converge=False, max_failures=None, **routing)

    def _resync_every(self, kind: str) -> float | None:
        return self._kind(kind).options.resync_every


# Arguments and replies ---------------------------------------------------------------------------


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


def _end_lost(index: Index, kind: str, records: Iterable[Record]) -> None:
    """End evaluations whose worker is lost: nobody sweeps a kind that is not registered."""
    runs = [record for record in records if record.lease]
    index.finish(
        kind, [Report(run.id, run.lease, Verdict.FAILED, delay=0, expired_only=True) for run in runs]
    )
