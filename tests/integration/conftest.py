"""A whole engine in one process: its messages on kombu's in-memory broker, its time in the test's hands."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from kombu.asynchronous import set_event_loop
from kombu.utils.uuid import uuid

from celery_goalstate import Engine, Entity
from celery_goalstate.index.base import Index, Limits
from celery_goalstate.index.memory import MemoryIndex
from celery_goalstate.messages import open_publisher
from celery_goalstate.worker.lease import EagerKeeper, LeaseKeeper
from celery_goalstate.worker.parts import Parts
from celery_goalstate.worker.sweeper import Sweeper
from celery_goalstate.worker.task import Evaluator
from tests.servers import Valkey, poll

NOW = 1_800_000_000.0

MakeApp = Callable[..., Celery]


class Clock:
    """Stands still until it is moved. Seconds."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now

    def milliseconds(self) -> int:
        return round(self.now * 1000)

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Truth:
    """The source of truth of the test's entities, and what they do. Ids that it does not know are at rest."""

    states: dict[str, Any] = field(default_factory=dict)
    goals: dict[str, Any] = field(default_factory=dict)
    actions: dict[str, Any] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)

    def set(self, id: str, *actions: Any, state: Any = "old", goal: Any = "new") -> None:
        """From now on these actions lead this entity from its state to its goal."""
        self.states[id], self.goals[id], self.actions[id] = state, goal, actions

    def entity(self, kind: str = "order", base: type[Entity] = Entity) -> type[Entity]:
        """An entity class whose evaluations are noted in `log`."""
        truth = self

        class Tested(base):
            def get_state(self) -> Any:
                return truth.states.get(self.id, "new")

            def get_goal_state(self) -> Any:
                return truth.goals.get(self.id, "new")

            def get_action_list(self, state: Any, goal_state: Any) -> Any:
                truth.log.append((self.kind, self.id))
                return truth.actions.get(self.id, ())

            @classmethod
            def iter_unconverged(cls) -> Any:
                return [id for id in truth.states if truth.states[id] != truth.goals[id]]

        Tested.kind = kind
        Tested.__name__ = Tested.__qualname__ = f"Tested{kind.title()}"
        return Tested

    def reach(self, ctx: Any, entity: Entity) -> None:
        """An action that reaches the goal."""
        self.states[entity.id] = self.goals[entity.id]

    def looks(self, id: str, kind: str = "order") -> int:
        """How often the entity was evaluated."""
        return self.log.count((kind, id))


@dataclass
class Message:
    """A wake-up as it lies in its queue."""

    task: str
    id: str
    args: Any
    kwargs: Any
    headers: dict[str, Any]
    delay: float

    @property
    def retries(self) -> int:
        return self.headers["retries"]


class World:
    """An engine whose index is in memory and whose clock the test moves."""

    def __init__(self, app: Celery, truth: Truth, **limits: int) -> None:
        self.app, self.truth, self.clock = app, truth, Clock()
        self.engine = Engine(app)
        self.index = MemoryIndex(Limits(**limits), clock=self.clock.milliseconds)
        settings = self.engine.settings
        keeper = EagerKeeper if app.conf.task_always_eager else LeaseKeeper
        self.keeper = keeper(self.index, settings.lease, clock=self.clock)
        self.engine._opened = Parts(
            index=self.index,
            publisher=open_publisher(app, self.index, settings),
            keeper=self.keeper,
            clock=self.clock,
        )
        self.entity = self.engine.register(truth.entity())

    def register(self, kind: str, **options: Any) -> type[Entity]:
        return self.engine.register(**options)(self.truth.entity(kind))

    def messages(self) -> list[Message]:
        """Take all messages out of the queue."""
        found = []
        with self.app.connection_for_write() as connection, connection.channel() as channel:
            queue = self.app.amqp.queues[self.app.conf.task_default_queue]
            queue(channel).declare()
            while message := queue(channel).get(no_ack=True):
                args, kwargs, _ = message.payload
                eta = message.headers["eta"]
                delay = (datetime.fromisoformat(eta) - datetime.now(UTC)).total_seconds() if eta else 0.0
                found.append(
                    Message(
                        message.headers["task"],
                        message.headers["id"],
                        args,
                        kwargs,
                        message.headers,
                        max(0.0, delay),
                    )
                )
        return found

    def run(self, *messages: Message) -> list[Any]:
        """Evaluate these messages, or else all that are in the queue; what Celery is told of each."""
        return [
            self.app.tasks[message.task].apply(
                message.args, message.kwargs, task_id=message.id, retries=message.retries, throw=False
            )
            for message in messages or self.messages()
        ]

    def outside(self, *args: Any, **kwargs: Any) -> None:
        """`enqueue`, said by somebody who is no part of the evaluation under way."""
        thread = threading.Thread(target=self.engine.enqueue, args=args, kwargs=kwargs)
        thread.start()
        thread.join()

    def keeper_sleeps(self) -> None:
        """Wait until the keeper has seen all there is: when its clock is moved then, it sleeps on."""

        def asleep() -> bool:
            with self.keeper._changed:
                times = {lease.renew_at for lease in self.keeper._leases}
                times |= {alarm.at for alarm in self.keeper._alarms}
                return self.keeper._wakes_at == min(times)

        poll("the lease keeper sleeps", asleep)

    def keeper_wakes_in(self, seconds: float) -> None:
        """Move the clock, and let the keeper see it."""
        self.keeper_sleeps()
        self.clock.advance(seconds)
        with self.keeper._changed:
            self.keeper._changed.notify()

    def evaluator(self, kind: str) -> Evaluator:
        """What evaluates entities of a kind, without its Celery task."""
        return Evaluator(self.engine.kind(kind), engine=self.engine, parts=self.engine.parts)

    def sweeper(self, name: str = "worker-1") -> Sweeper:
        return Sweeper(
            name,
            engine=self.engine,
            parts=self.engine.parts,
            settings=self.engine.settings,
            kinds=lambda: {kind: self.engine.kind(kind) for kind in self.engine.kinds},
        )

    def sweep_for(self, seconds: float, name: str = "worker-1") -> None:
        """Let time pass while a worker sweeps: leases are only as old as it counts."""
        sweeper, every = self.sweeper(name), self.engine.settings.sweep_every
        sweeper.sweep()
        while seconds > 0:
            self.clock.advance(min(every, seconds))
            sweeper.sweep()
            seconds -= every

    def lose_workers(self, name: str = "worker-1") -> None:
        """Whatever runs is taken for lost, since nobody renews its lease."""
        self.sweep_for(1.1 * self.engine.settings.lease, name)


def engine_of_others(engine: Engine, *kinds: str) -> Engine:
    """Another app's engine on the same index, which knows other kinds."""
    other = Engine(Celery(uuid(), broker=engine.app.conf.broker_url, set_as_current=False))
    other.app.conf.goalstate_index_url = engine.settings.index_url
    other._opened = engine.parts
    for kind in kinds:
        other.declare(kind)
    return other


def untimed(text: str) -> str:
    """A line for people, as if nothing took any time: on a busy machine an action takes a millisecond."""
    return re.sub(r"\b\d+ ms\b", "0 ms", text)


@contextlib.contextmanager
def worker_of(app: Celery, pool: str = "solo", **options: Any) -> Iterator[Any]:
    """A worker in a thread of this process."""
    with start_worker(
        app, pool=pool, perform_ping_check=False, shutdown_timeout=10, loglevel="INFO", **options
    ) as worker:
        yield worker
    set_event_loop(None)  # before kombu 5.6 the next worker took this one's, which knows not of its timer


@pytest.fixture
def make_app() -> Iterator[MakeApp]:
    """Creates apps on the in-memory broker, each with a queue of its own."""
    apps = []

    def make(broker: str = "memory://", cls: type[Celery] = Celery, **conf: Any) -> Celery:
        app = cls(uuid(), broker=broker, set_as_current=False)
        app.conf.update(
            task_default_queue=app.main,
            broker_connection_retry_on_startup=True,
            worker_hijack_root_logger=False,
            worker_redirect_stdouts=False,
        )
        if broker == "memory://":
            app.conf.broker_transport_options = {"polling_interval": 0.01}
        app.conf.update(conf)
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.close()


@pytest.fixture
def truth() -> Truth:
    return Truth()


@pytest.fixture
def make_world(make_app: MakeApp, truth: Truth) -> Callable[..., World]:
    def make(limits: dict[str, int] | None = None, **conf: Any) -> World:
        return World(make_app(**conf), truth, **(limits or {}))

    return make


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    """Without jitter: delays are as the formula has them."""
    return make_world(goalstate_jitter=False)


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def valkey(valkey_server: Valkey) -> Iterator[Valkey]:
    """A real server, empty."""
    yield valkey_server
    with valkey_server.client() as client:
        client.flushall()


def is_empty(index: Index, *kinds: str) -> bool:
    """Whether the index tracks nothing of these kinds."""
    return not any(sum(index.counts(kind).values()) for kind in kinds)
