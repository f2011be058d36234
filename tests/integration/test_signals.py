"""Signals: what is sent of each entity, alone, in a batch, eagerly, and by a real worker's processes."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery.utils.dispatch import Signal
from celery.worker import state

from celery_goalstate import Engine, Requeue, signals
from celery_goalstate.evaluation import Outcome
from celery_goalstate.exceptions import EntityGone, IndexUnavailable, PermanentError, WorkerLost
from tests.integration.conftest import Truth, World
from tests.servers import Process, Valkey

ALL = {name: signal for name, signal in vars(signals).items() if isinstance(signal, Signal)}
FAILURE_RETRY_DELAY = 10


def fails(ctx: Any, entity: Any) -> None:
    raise ConnectionError("no route to host")


def is_beyond_repair(ctx: Any, entity: Any) -> None:
    raise PermanentError("card stolen")


class Received(list[tuple[str, str, dict[str, Any]]]):
    """What was received: the signal's name, the entity's, and all else."""

    def names(self, entity: str) -> list[str]:
        return [name for name, of, _ in self if of == entity]

    def one(self, signal: str, entity: str) -> dict[str, Any]:
        [found] = [named for name, of, named in self if (name, of) == (signal, entity)]
        return found


@pytest.fixture
def received() -> Iterator[Received]:
    found = Received()

    def receive(signal: Signal, sender: str, engine: Engine, kind: str, id: str, **named: Any) -> None:
        assert sender == kind
        found.append((signal.name, f"{kind}/{id}", {"engine": engine, **named}))

    for signal in ALL.values():
        signal.connect(receive, weak=False)
    yield found
    for signal in ALL.values():
        signal.disconnect(receive)


@pytest.fixture
def connect() -> Iterator[Callable[[Signal, Callable[..., Any]], None]]:
    connected = []

    def connect(signal: Signal, receiver: Callable[..., Any]) -> None:
        signal.connect(receiver, weak=False)
        connected.append((signal, receiver))

    yield connect
    for signal, receiver in connected:
        signal.disconnect(receiver)


def test_the_signals_are_those_of_the_contract() -> None:
    of_entity = {"engine", "kind", "id"}
    assert {name: set(signal.providing_args) - of_entity for name, signal in ALL.items()} == {
        "evaluation_started": set(),
        "evaluation_finished": {"outcome", "lateness", "seconds"},
        "wakeup_refused": {"reason"},
        "entity_quarantined": {"error"},
        "lease_lost": set(),
    }
    assert all(signal.name == name for name, signal in ALL.items())


# Evaluations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [False, True], ids=["message", "eager"])
def test_an_evaluation(
    make_world: Callable[..., World], truth: Truth, received: Received, eager: bool
) -> None:
    world = make_world(task_always_eager=eager)

    def slow(ctx: Any, entity: Any) -> None:
        world.clock.advance(3)
        truth.reach(ctx, entity)

    truth.set("1", slow)
    world.engine.enqueue(world.entity("1"))
    if not eager:
        world.clock.advance(2)
        world.run()
    assert received.names("order/1") == ["evaluation_started", "evaluation_finished"]
    assert received.one("evaluation_started", "order/1") == {"engine": world.engine}
    finished = received.one("evaluation_finished", "order/1")
    assert isinstance(finished["outcome"], Outcome)
    assert finished["outcome"].converged
    assert (finished["lateness"], finished["seconds"]) == (0 if eager else 2, 3)


@pytest.mark.parametrize(
    ("action", "outcome"),
    [
        (fails, {"failures": 1, "delay": FAILURE_RETRY_DELAY, "quarantined": False}),
        (is_beyond_repair, {"failures": 1, "delay": None, "quarantined": True}),
        (lambda ctx, entity: Requeue(7), {"failures": 0, "delay": 7, "error": None}),
    ],
)
def test_an_outcome(world: World, truth: Truth, received: Received, action: Any, outcome: Any) -> None:
    def act(ctx: Any, entity: Any) -> Any:
        return action(ctx, entity)

    truth.set("1", act)
    world.engine.enqueue(world.entity("1"))
    world.run()
    sent = received.one("evaluation_finished", "order/1")["outcome"]._asdict()
    assert {name: sent[name] for name in outcome} == outcome


def test_one_that_is_gone(world: World, truth: Truth, received: Received) -> None:
    def gone(ctx: Any, entity: Any) -> None:
        raise EntityGone

    truth.set("1", gone)
    world.engine.enqueue(world.entity("1"))
    world.run()
    assert received.one("evaluation_finished", "order/1")["outcome"].gone


def test_each_of_a_batch(world: World, truth: Truth, received: Received) -> None:
    host = world.register("host", batch_size=10)
    truth.set("1", truth.reach)
    truth.set("2", fails)
    truth.set("3", is_beyond_repair)
    world.engine.enqueue_many(map(host, "12345"))
    world.engine.delete(host("4"))
    world.run()
    both = ["evaluation_started", "evaluation_finished"]
    assert {id: received.names(f"host/{id}") for id in "12345"} == {
        "1": both,
        "2": both,
        "3": [*both, "entity_quarantined"],
        "4": ["wakeup_refused"],
        "5": both,
    }
    assert received.one("entity_quarantined", "host/3")["error"] == "PermanentError: card stolen"


def test_one_that_its_worker_s_end_cuts_off_has_not_ended(
    world: World, truth: Truth, received: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(ctx: Any, entity: Any) -> None:
        monkeypatch.setattr(state, "should_terminate", True)
        raise SystemError("a handler's error, in the main thread")

    truth.set("1", cut_off)
    world.engine.enqueue(world.entity("1"))
    world.run()
    assert received.names("order/1") == ["evaluation_started"]
    described = world.engine.describe(world.entity("1"))
    assert described is not None
    assert described.failures == 0


# Refusals ----------------------------------------------------------------------------------------


def missing(world: World) -> None:
    world.engine.delete(world.entity("1"))


def stale(world: World) -> None:
    world.engine.delete(world.entity("1"))
    world.engine.enqueue(world.entity("1"), timedelta(hours=1))


def paused(world: World) -> None:
    world.engine.pause("order")


@pytest.mark.parametrize("why", [missing, stale, paused], ids=lambda why: why.__name__)
def test_a_refusal(world: World, truth: Truth, received: Received, why: Callable[[World], None]) -> None:
    world.engine.enqueue(world.entity("1"))
    messages = world.messages()
    why(world)
    world.run(*messages)
    assert received == [
        ("wakeup_refused", "order/1", {"engine": world.engine, "reason": why.__name__}),
    ]
    assert not truth.log


def test_a_message_that_comes_too_early(world: World, received: Received) -> None:
    world.engine.enqueue(world.entity("1"), 5)
    world.run()
    assert received.one("wakeup_refused", "order/1")["reason"] == "early"


def test_an_index_that_is_away(world: World, received: Received, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise IndexUnavailable("no answer", away_for=60)

    world.engine.enqueue(world.entity("1"))
    monkeypatch.setattr(world.index, "claim", away)
    world.run()
    assert received.one("wakeup_refused", "order/1")["reason"] == "away"


# Quarantine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [False, True], ids=["message", "eager"])
def test_a_quarantine(
    make_world: Callable[..., World], truth: Truth, received: Received, eager: bool
) -> None:
    world = make_world(task_always_eager=eager)
    truth.set("1", is_beyond_repair)
    world.engine.enqueue(world.entity("1"))
    world.run()
    assert received.names("order/1")[-2:] == ["evaluation_finished", "entity_quarantined"]
    assert received.one("entity_quarantined", "order/1") == {
        "engine": world.engine,
        "error": "PermanentError: card stolen",
    }


def test_an_enqueue_from_outside_is_before_a_quarantine(
    world: World, truth: Truth, received: Received
) -> None:
    def enqueued_meanwhile(ctx: Any, entity: Any) -> None:
        world.outside(world.entity("1"))
        raise PermanentError("card stolen")

    truth.set("1", enqueued_meanwhile)
    world.engine.enqueue(world.entity("1"))
    world.run()
    assert received.names("order/1") == ["evaluation_started", "evaluation_finished"]


@pytest.mark.parametrize("signal", [signals.evaluation_finished, signals.entity_quarantined])
def test_what_a_receiver_enqueues_ends_no_quarantine(
    world: World, truth: Truth, connect: Callable[..., None], signal: Signal
) -> None:
    """As what the evaluation itself enqueues."""
    called = []

    def enqueue(engine: Engine, kind: str, id: str, **_: Any) -> None:
        called.append(id)
        engine.enqueue(engine.ref(kind, id))

    connect(signal, enqueue)
    truth.set("1", is_beyond_repair)
    world.engine.enqueue(world.entity("1"))
    world.run()
    assert called == ["1"]
    described = world.engine.describe(world.entity("1"))
    assert described is not None
    assert described.status == "failed"


# Lost leases -------------------------------------------------------------------------------------


def test_a_worker_that_fell_silent_and_comes_back(world: World, truth: Truth, received: Received) -> None:
    def stall(ctx: Any, entity: Any) -> None:
        world.keeper_sleeps()
        world.lose_workers()
        assert received.names("order/1") == ["evaluation_started", "lease_lost"], "by the sweeper"

    truth.set("1", stall)
    world.engine.enqueue(world.entity("1"))
    world.run()
    assert received.names("order/1") == [
        *("evaluation_started", "lease_lost"),
        *("evaluation_finished", "lease_lost"),
    ]
    assert received[-1][2] == {"engine": world.engine}


def test_a_worker_that_never_comes_back(
    make_world: Callable[..., World], truth: Truth, received: Received
) -> None:
    world = make_world(goalstate_max_failures=1)
    world.engine.enqueue(world.entity("1"))
    [message] = world.messages()
    [[id, token]] = message.args[0]
    world.index.claim("order", [(id, token)], nonce="nonce", task_id="task")
    world.lose_workers()
    assert received.names("order/1") == ["lease_lost", "entity_quarantined"]
    error = received.one("entity_quarantined", "order/1")["error"]
    assert error.startswith(WorkerLost.__name__)


# Receivers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [False, True], ids=["message", "eager"])
def test_a_receiver_that_raises_is_logged_and_changes_nothing(
    make_world: Callable[..., World],
    truth: Truth,
    connect: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    eager: bool,
) -> None:
    world = make_world(task_always_eager=eager)

    def raises(signal: Signal, **_: Any) -> None:
        raise LookupError(f"in {signal.name}")

    for signal in ALL.values():
        connect(signal, raises)
    truth.set("1", truth.reach)
    truth.set("2", is_beyond_repair)
    with caplog.at_level(logging.ERROR, "celery.utils.dispatch.signal"):
        for id in "12":
            world.engine.enqueue(world.entity(id))
        world.run()
    assert world.engine.counts("order")["order"] == {"scheduled": 0, "running": 0, "idle": 1, "failed": 1}
    for name in ("evaluation_started", "evaluation_finished", "entity_quarantined"):
        assert f"in {name}" in caplog.text


def test_a_receiver_of_one_kind(world: World, connect: Callable[..., None]) -> None:
    host, seen = world.register("host"), []

    def receive(kind: str, **_: Any) -> None:
        seen.append(kind)

    signals.evaluation_started.connect(receive, sender="host", weak=False)
    try:
        for entity in (world.entity("1"), host("1")):
            world.engine.enqueue(entity)
        world.run()
    finally:
        signals.evaluation_started.disconnect(receive, sender="host")
    assert seen == ["host"]


# A real worker -----------------------------------------------------------------------------------

PROJECT = """
    import json
    import os
    import signal
    from pathlib import Path

    from celery import Celery
    from celery_goalstate import Engine, Entity, Rules, signals
    from celery_goalstate.exceptions import PermanentError

    HERE = Path(__file__).parent
    app = Celery("shop", broker=os.environ["BROKER"])
    app.conf.update(
        broker_connection_retry_on_startup=True,
        goalstate_sweep_interval=0.1,
        goalstate_lease=1.0,
        goalstate_max_failures=1,
    )
    engine = Engine(app)

    def act(ctx, order):
        if order.id == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if order.id == "refused":
            raise PermanentError("card stolen")

    @engine.register
    class Order(Entity):
        rules = Rules({"new": {"old": act}})

        def get_state(self):
            return "old"

        def get_goal_state(self):
            return "new"

    def receive(signal, kind, id, **named):
        with (HERE / "received").open("a") as file:
            file.write(json.dumps([signal.name, f"{kind}/{id}", os.getpid()]) + "\\n")

    for each in ("evaluation_started", "evaluation_finished", "entity_quarantined", "lease_lost"):
        getattr(signals, each).connect(receive)
"""


def test_a_worker_sends_them_where_they_happen(valkey: Valkey, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(textwrap.dedent(PROJECT))
    env = {"BROKER": valkey.url, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    celery = [sys.executable, "-m", "celery", "-A", "shop"]
    command = [*celery, "worker", "--pool=prefork", "--concurrency=1", "--loglevel=INFO"]
    file = tmp_path / "received"

    def received() -> list[list[Any]]:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    with Process(command, log=tmp_path / "worker.log", env=env, cwd=tmp_path) as worker:
        ids = ["done", "refused", "killed"]
        producer = Process(
            [*celery, "goalstate", "enqueue", "order", *ids],
            log=tmp_path / "enqueue.log",
            env=env,
            cwd=tmp_path,
        )
        producer.start()
        assert producer.wait(60) == 0
        worker.poll_until(
            "two are quarantined",
            lambda: [name for name, *_ in received()].count("entity_quarantined") == 2,
            timeout=60,
        )
        main = worker.pid
    of = {id: [name for name, entity, _ in received() if entity == f"order/{id}"] for id in ids}
    both = ["evaluation_started", "evaluation_finished"]
    assert of == {
        "done": both,
        "refused": [*both, "entity_quarantined"],
        "killed": ["evaluation_started", "lease_lost", "entity_quarantined"],
    }
    in_main = {(name, entity) for name, entity, pid in received() if pid == main}
    assert in_main == {("lease_lost", "order/killed"), ("entity_quarantined", "order/killed")}
