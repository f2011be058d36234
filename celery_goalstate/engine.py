"""The engine: the public facade, and the one place that wires the rest together."""

from __future__ import annotations

import builtins
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial as call_of
from typing import Any, TypeVar, Unpack, overload

from celery import Celery

from celery_goalstate import index as indexes
from celery_goalstate import overview as overviews
from celery_goalstate import registry
from celery_goalstate.backoff import delay_seconds
from celery_goalstate.deadlines import Deadline, one_deadline, policy_of, request_for
from celery_goalstate.description import (
    Description,
    Enqueued,
    Status,
    datetime_of,
    description_of,
    public_listing,
)
from celery_goalstate.display import LONGEST_NAME, this_user
from celery_goalstate.entity import Entity, EntityLike, EntityRef, IdLike, can_resync, checked_id
from celery_goalstate.exceptions import ImproperlyConfigured, IndexUnavailable, UnknownKind
from celery_goalstate.hooks import AroundAction, AroundEvaluation, BeforeEnqueue, Hooks
from celery_goalstate.index.base import LONGEST_PAGE, Index, Partial, Policy, Request
from celery_goalstate.messages import open_publisher
from celery_goalstate.overview import Overview
from celery_goalstate.registry import (
    DEFAULT_NAMESPACE,
    PUBLIC_TASK,
    Kind,
    KindLike,
    Kinds,
    check_registration,
    check_task_name,
    engines_of,
    hide_index_url,
    name_of,
    task_name,
)
from celery_goalstate.scheduling import Scheduling, batches, ids_by_kind
from celery_goalstate.settings import NAME, KindKeywords, KindOptions, RoutingKeywords, Settings
from celery_goalstate.worker import bootsteps
from celery_goalstate.worker.lease import KeeperAsConfigured
from celery_goalstate.worker.parts import Parts
from celery_goalstate.worker.public import create_public_task
from celery_goalstate.worker.sweeper import Sweeper
from celery_goalstate.worker.task import Evaluator, create_task

logger = logging.getLogger(__name__)

E = TypeVar("E", bound=type[Entity])


class Engine:
    """Keeps entities on the way to their goal states: one scheduled evaluation per entity, on Celery.

    `Engine(app)`, or `Engine()` and later `init_app(app)`. Settings are the `goalstate_*` of the app: read,
    checked and frozen when the engine is first used. A `namespace` keeps several engines of one app apart.
    """

    def __init__(self, app: Celery | None = None, *, namespace: str | None = None) -> None:
        self._app: Celery | None = None
        self._namespace = None if namespace is None else NAME("namespace", namespace)
        self._kinds = Kinds(
            self._namespace or DEFAULT_NAMESPACE,
            app=lambda: self.app,
            defaults=lambda: self.settings.kind,
        )
        self._settings: Settings | None = None
        self._opened: Parts | None = None
        self._lock = threading.RLock()
        self.hooks = Hooks()  #: what the app adds around evaluations and actions
        if app is not None:
            self.init_app(app)

    def __repr__(self) -> str:
        return f"<Engine of {self._app.main if self._app else 'no app yet'}: {', '.join(self._kinds)}>"

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
        check_task_name(self, PUBLIC_TASK, task_name(PUBLIC_TASK, namespace))
        create_public_task(app, task_name(PUBLIC_TASK, namespace), self)
        for cls, options in self._kinds.registered():
            self._create_task(cls, options)
        for cls, options in registry.shared:
            self.register(cls, **options)
        registry.all_engines.add(self)
        hide_index_url()
        bootsteps.install(
            app,
            namespace,
            settings=lambda: self.settings,
            kinds=self._swept,
            parts=lambda: self.parts,
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
            settings = self.read_settings(self.app.conf)
            other = engines_of(self.app).get(settings.namespace, self)
            if other is not self:
                raise ImproperlyConfigured(
                    f"goalstate_namespace is {settings.namespace!r}, which another engine of the app"
                    f" {self.app.main!r} has: both would use the same entries of the index"
                )
            self._settings = settings
        return self._settings

    def read_settings(self, conf: Mapping[str, Any]) -> Settings:
        """What these settings would be for this engine. Raises `ImproperlyConfigured`."""
        return Settings.from_conf(conf, namespace=self._namespace)

    @overload
    def register(self, cls: E, /, **options: Unpack[KindKeywords]) -> E: ...
    @overload
    def register(self, /, **options: Unpack[KindKeywords]) -> Callable[[E], E]: ...
    def register(self, cls: E | None = None, /, **options: Unpack[KindKeywords]) -> E | Callable[[E], E]:
        """Register an entity class: bare, with options, or as a call. Options as in `KindKeywords`.

        Raises `ImproperlyConfigured` for a kind that is taken, for an option that cannot work and for a class
        that is registered with other options, `TypeError` for anything but an entity class.
        """
        if cls is None:
            return lambda cls: self.register(cls, **options)
        check_registration(cls, options)
        if self._app is not None and cls.kind not in self._kinds:
            check_task_name(self, cls.kind, self._kinds.task(cls.kind))
        for new, its_options in self._kinds.register(cls, options):
            if self._app is not None:
                self._create_task(new, its_options)
        return cls

    def declare(self, kind: str, **routing: Unpack[RoutingKeywords]) -> None:
        """Say that another code base evaluates this kind, and where its messages go: `queue`, `priority`, ...

        So a process without the class can enqueue, describe and delete entities of the kind. Without a queue,
        messages go to the app's default one, where a worker that lacks the class drops them.
        Raises `ImproperlyConfigured` for options that say no routing, or that differ from an earlier call's.
        """
        self._kinds.declare(kind, routing)

    def _create_task(self, cls: type[Entity], options: Mapping[str, Any]) -> None:
        kind, name = cls.kind, self._kinds.task(cls.kind)
        check_task_name(self, kind, name)
        create_task(
            self.app,
            name,
            kind,
            KindOptions().override(**options).of_task,
            evaluator=lambda: Evaluator(self.kind(kind), engine=self, parts=self.parts),
            eta_horizon=lambda: self.settings.eta_horizon,
        )

    @property
    def tasks(self) -> dict[str, str]:
        """The names of this engine's Celery tasks, and the kind of each."""
        return self._kinds.tasks()

    def ref(self, kind: str, id: IdLike) -> EntityRef:
        """A reference to an entity, which can be enqueued without importing its class. Checks its form."""
        return EntityRef(kind, id)  # type: ignore[arg-type]  # an int or a UUID becomes its text

    # -- hooks: methods and decorators, see `celery_goalstate.hooks`

    def before_enqueue(self, hook: BeforeEnqueue) -> BeforeEnqueue:
        """Call `hook(kind, ids)` before each enqueue, in its caller's thread, which gets what it raises."""
        self.hooks.before_enqueue.append(hook)
        return hook

    def around_evaluation(self, hook: AroundEvaluation) -> AroundEvaluation:
        """Enter the context manager `hook(evaluation)` for each evaluation, also of those in a batch."""
        self.hooks.around_evaluation.append(hook)
        return hook

    def around_action(self, hook: AroundAction) -> AroundAction:
        """Enter the context manager `hook(ctx, action)` for each action."""
        self.hooks.around_action.append(hook)
        return hook

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
        """Schedule an evaluation of the entity. Of all deadlines asked for, the earliest wins.

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
        kind, id = self._kinds.identify(entity)
        request = request_for(id, one_deadline(deadline, eta, countdown), now=self._now)
        policy, bound = policy_of(replace=replace, max_wait=max_wait)

        def enqueue() -> Enqueued:
            [scheduled], published = self._scheduling.enqueue(kind, [request], policy, bound)
            sent = published and scheduled.wakeup is not None
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
        come due at once. Raises as `enqueue` does: all entities are checked before the first is written.
        """
        return self.prepare_many(
            entities,
            deadline,
            eta=eta,
            countdown=countdown,
            spread=spread,
            replace=replace,
            max_wait=max_wait,
        )()

    def prepare_many(
        self,
        entities: Iterable[EntityLike],
        deadline: Deadline = None,
        *,
        eta: datetime | None = None,
        countdown: float | None = None,
        spread: float | timedelta | None = None,
        replace: bool = False,
        max_wait: float | timedelta | None = None,
    ) -> Callable[[], int]:
        """Check the arguments of an `enqueue_many` now, to be done later."""
        policy, bound = policy_of(replace=replace, max_wait=max_wait)
        request = request_for("any", one_deadline(deadline, eta, countdown), now=self._now)
        width = 0.0 if spread is None else delay_seconds(spread, "spread")
        identified = [self._kinds.identify(entity) for entity in entities]
        return lambda: self._scheduling.enqueue_all(identified, request, policy, spread=width, max_wait=bound)

    @property
    def _scheduling(self) -> Scheduling:
        return Scheduling(self.app, self.parts, self.hooks)

    def _now(self) -> datetime:
        return self._opened.now() if self._opened else datetime.now(UTC)

    def resync(self, kind: KindLike, *, spread: float | timedelta | None = None, revive: bool = False) -> int:
        """Enqueue what the entity class's `iter_unconverged()` yields; how many were scheduled by that.

        Entities that are scheduled or evaluated already keep their deadline and back-off; quarantined ones
        stay so, unless `revive=True`. Rebuilds the schedule after a loss of the index.
        """
        found = self.kind(name_of(kind))
        cls = found.entity_class
        if cls is None or not can_resync(cls):
            where = "its class" if cls is None else cls.__name__
            raise ImproperlyConfigured(
                f"{found.name} cannot be resynced here: define {where}.iter_unconverged(), a class method"
                " that yields the ids of the entities whose state is not their goal state"
            )
        policy = Policy.REVIVE if revive else Policy.RESYNC
        ids = (checked_id(id) for id in cls.iter_unconverged())
        now = Request("any", delay=0)
        return self._scheduling.enqueue_all(((found, id) for id in ids), now, policy, spread=spread)

    # -- what is there

    def is_scheduled(self, entity: EntityLike) -> bool:
        """Whether an evaluation is pending: waiting for its deadline, or for a worker."""
        description = self.describe(entity)
        return description is not None and description.deadline is not None

    def describe(self, entity: EntityLike) -> Description | None:
        """Everything that the index knows of the entity; None: it does not know it."""
        kind, id = self._locate(entity)
        [record] = self.parts.index.describe(kind, [id], history=True)
        return None if record is None else description_of(kind, record)

    def describe_many(self, entities: Iterable[EntityLike]) -> builtins.list[Description | None]:
        """`describe` for many entities, in few round trips; of each history the newest failure only."""
        described: builtins.list[Description | None] = []
        for batch in batches(map(self._locate, entities)):
            found: dict[tuple[str, str], Description | None] = {}
            for kind, ids in ids_by_kind(batch).items():
                for id, record in zip(ids, self.parts.index.describe(kind, ids), strict=True):
                    found[kind, id] = None if record is None else description_of(kind, record)
            described += [found[located] for located in batch]
        return described

    def list(
        self, kind: KindLike, status: str | None = None, limit: int = 100, after: str | None = None
    ) -> builtins.list[Description]:
        """A page of up to `limit` (1 to 1,000) entities of a kind, in one status or in all.

        In order of deadline; running ones in that of their lease's end, idle ones of their expiry,
        quarantined ones of since when. Without a status: scheduled ones, then running, idle, failed ones.
        There are more lists. The longest first: those that are `"failing"`, that is tried again after a
        failure; `"overdue"`; and `"long"`, those whose evaluation lasts for longer than a third of a lease.
        And `"next"`, the scheduled ones that are not due yet.

        `after` is the `cursor` of the last entity of the page before. An entity that stays where it is, is on
        one page; one that moves on between two calls may be on two, or on none.

        Raises `IndexUnavailable`: what is known all the same, where a part of a cluster answers, is in its
        `known`, and what is missing there in `away`.
        """
        name = self._known_name(kind)
        if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= LONGEST_PAGE:
            raise ValueError(
                f"limit is {limit!r}; give an integer from 1 to {LONGEST_PAGE}: a page, and `after`"
            )
        listings = [public_listing(each) for each in (Status if status is None else [status])]
        return overviews.page(self.parts.index, name, listings, limit, after, self.parts.now())

    def counts(self, kind: KindLike | None = None) -> dict[str, dict[Status, int]]:
        """How many entities are in each status, by kind: of one kind, or of all that this process knows.

        Raises `IndexUnavailable` as `list` does.
        """
        index = self.parts.index
        if kind is None:
            return overviews.counts(dict.fromkeys(self.kinds, index))
        name = self._known_name(kind)
        return overviews.counts({name: index if name in self._kinds else index.as_kept(name)})

    def overview(self, kind: KindLike | None = None) -> dict[str, Overview]:
        """A kind at a glance (no kind: all that this process knows): what is late, or fails; is it swept.

        One round trip per node of the index. Raises `IndexUnavailable` as `list` does.
        """
        if kind is None:
            return overviews.overviews(self.parts.index, self.kinds)
        name = self._known_name(kind)
        kept = self.parts.index if name in self._kinds else self.parts.index.as_kept(name)
        return overviews.overviews(kept, [name]) if kept else {}

    def foreign_kinds(self) -> builtins.list[str]:
        """Kinds that the index keeps and this process does not know.

        They are another app's on the same index, or were renamed or removed: then no worker evaluates them.
        """
        return [name for name in self.parts.index.kinds() if name not in self._kinds]

    def orphans(self) -> dict[str, dict[Status, int]]:
        """Foreign kinds that have entities; how many, as in `counts`."""
        counted: dict[str, dict[Status, int]] = {}
        partial = Partial()
        for name in self.foreign_kinds():
            counted |= partial.known(call_of(self.counts, name)) or {}
        orphans = {name: counts for name, counts in counted.items() if any(counts.values())}
        partial.raise_if_away(orphans)
        return orphans

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
            for batch in batches(map(self._locate, entities))
            for kind, ids in ids_by_kind(batch).items()
        )

    def delete_kind(self, kind: KindLike) -> int:
        """`delete` for all entities of a kind; how many there were to forget.

        However many there are and whatever they do meanwhile, none of those that are there when the call
        begins is left; what is enqueued from outside after that lives. Those that are being evaluated finish.
        When there are none, and no pause, the index forgets the kind's name and number of shards, too.

        Raises `IndexUnavailable` if shards did not answer, once all others are done: its `left` has the
        numbers of these. Call it again for them.
        """
        name = self._known_name(kind)
        index = self.parts.index.as_kept(name)
        if index is None:
            return 0
        done = index.delete_all(name)
        if done.runs and name not in self._kinds:
            self._sweep_out(name, index)
        if done.away:
            shards, why = ", ".join(map(str, done.away)), next(iter(done.away.values()))
            raise IndexUnavailable(
                f"{done.count} entities of kind {name!r} are deleted, and some may be left in shards that did"
                f" not answer ({shards}): delete the kind again. {why}",
                left=done.away,
            )
        index.forget_kind(name)
        return done.count

    def pause(self, kind: KindLike | None = None, *, by: str | None = None) -> None:
        """Let no evaluation of a kind start (no kind: of all that are registered); those under way finish.

        This holds on every worker, and until `resume`, also when this process has ended. `by` is who pauses
        it, as others are told: the user of this process and its machine, if nobody else is named.
        """
        if by is None:
            by = this_user()
        elif not isinstance(by, str) or not by.strip() or len(by) > LONGEST_NAME:
            raise ValueError(f"by is {by!r}; give a text of 1 to {LONGEST_NAME} characters")
        for name in self._to_operate(kind):
            self.parts.index.pause(name, by=by)

    def resume(self, kind: KindLike | None = None) -> None:
        """Undo `pause`. What came due meanwhile is evaluated from the next sweep on."""
        for name in self._to_operate(kind):
            self.parts.index.resume(name)

    def paused(self, kind: KindLike | None = None) -> bool:
        """Whether a kind is paused (no kind: whether all are that this process knows)."""
        return all(self.parts.index.paused(name) is not None for name in self._to_operate(kind))

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

    # -- the kinds

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the kinds that this process knows, and of those that resync one of them on time."""
        return self._kinds.names()

    def kind(self, name: str) -> Kind:
        """A kind that is registered or declared. Raises `UnknownKind`, and the `ImportError` of a module."""
        return self._kinds.get(name)

    def is_registered(self, cls: type[Entity]) -> bool:
        """Whether this entity class is registered here, or one that it derives from."""
        return any(cls.kind == known.kind and issubclass(cls, known) for known, _ in self._kinds.registered())

    def _known_name(self, kind: KindLike) -> str:
        """The name of a kind that this process knows, or at least the index. Raises `UnknownKind`."""
        name = kind.kind if isinstance(kind, type) and issubclass(kind, Entity) else kind
        if name not in self._kinds and name not in self.parts.index.kinds():
            self.kind(name_of(kind))
        return name

    def _to_operate(self, kind: KindLike | None) -> tuple[str, ...]:
        if kind is not None:
            return (self._known_name(kind),)
        if not self.kinds:
            raise UnknownKind("no entity class is registered in this process: name the kind that you mean")
        return self.kinds

    def _locate(self, entity: EntityLike) -> tuple[str, str]:
        """Kind and id of an entity that exists: its kind may be one that only the index knows."""
        if isinstance(entity, EntityRef):
            return self._known_name(entity.kind), entity.id
        kind, id = self._kinds.identify(entity)
        return kind.name, id

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
        settings = self.settings
        index = indexes.open_index(settings)
        hasty = replace(settings, index_timeout=min(settings.index_timeout, settings.sweep_timeout))
        in_memory = settings.index_url == "memory://"
        return Parts(
            index=index,
            open_hasty_index=None if in_memory else call_of(indexes.open_index, hasty),
            publisher=open_publisher(self.app, index, settings),
            keeper=KeeperAsConfigured(
                index, settings.lease, eager=lambda: bool(self.app.conf.task_always_eager)
            ),
        )

    @contextmanager
    def opened_with(self, parts: Parts, settings: Settings | None = None) -> Iterator[None]:
        """Replace the parts, and the frozen settings, while the block runs: for tests."""
        with self._lock:
            before = self._opened, self._settings
            self._opened, self._settings = parts, settings or self.settings
        try:
            yield
        finally:
            with self._lock:
                self._opened, self._settings = before

    def _open_sweeper(self, name: str) -> Sweeper:
        parts = self.parts
        if parts.open_hasty_index is not None:
            parts = replace(parts, index=parts.open_hasty_index())
        return Sweeper(name, engine=self, parts=parts, settings=self.settings, kinds=self._swept)

    def _sweep_out(self, name: str, index: Index) -> None:
        """End the evaluations of a kind that no worker of this app sweeps, where their workers are lost."""
        kind = Kind(name, self._kinds.task(name), entity_class=None, options=self.settings.kind)
        parts = replace(self.parts, index=index)
        Sweeper(
            "delete", engine=self, parts=parts, settings=self.settings, kinds=lambda: {name: kind}
        ).sweep_out()

    def _swept(self) -> dict[str, Kind]:
        """The kinds that this process evaluates, whose options say how what is lost goes on."""
        return {kind.name: kind for kind in self._kinds.known() if kind.entity_class is not None}
