"""A worker that is told to end gives back what it evaluates, without a failure; one that is killed counts."""

from __future__ import annotations

import contextlib
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import billiard
import pytest
from celery import Celery
from celery.worker import state

from celery_goalstate import Engine
from celery_goalstate.description import Description
from celery_goalstate.index.base import Claim, Report, Status, Verdict
from celery_goalstate.worker import shutdown
from celery_goalstate.worker.bootsteps import GiveBackStep
from celery_goalstate.worker.shutdown import claiming, give_back
from tests.integration.conftest import World, worker_of
from tests.servers import Process, Valkey, poll

LEASE = 6.0
#: An entity's first action ends when the test lets it. Its back-off is longer than the test.
PROJECT = """
    import os
    import time
    from pathlib import Path

    from celery import Celery
    from celery_goalstate import Engine, Entity

    HERE = Path(__file__).parent
    app = Celery("shop", broker=os.environ["BROKER"])
    app.conf.update(
        broker_connection_retry_on_startup=True,
        goalstate_sweep_interval=0.1,
        goalstate_lease=6.0,
        goalstate_failure_retry_delay=600,
        goalstate_max_failures=2,
        worker_soft_shutdown_timeout=float(os.environ.get("SOFT", "0")),
    )
    engine = Engine(app)

    def begun(action, entity):
        with (HERE / "begun").open("a") as file:
            file.write(f"{action} {entity.kind}/{entity.id}\\n")
        return (HERE / "begun").read_text().count(f"{action} {entity.kind}/{entity.id}\\n")

    def wait_for(gate):
        while not (HERE / gate).exists():
            time.sleep(0.02)  # the action that hangs; polls until a test opens the gate

    @engine.register
    class Order(Entity):
        def get_state(self):
            return "new" if (HERE / f"{self.kind}-{self.id}").exists() else "old"

        def get_goal_state(self):
            return "new"

        def get_action_list(self, state, goal_state):
            return [] if state == "new" else ["first", "second"]

        def first(self, ctx):
            wait_for(f"gate-{begun('first', self)}")

        def second(self, ctx):
            begun("second", self)
            (HERE / f"{self.kind}-{self.id}").touch()

    @engine.register(acks_late=True)
    class Late(Order):
        pass

    @engine.register(batch_size=8)
    class Parcel(Order):
        pass

    @engine.register
    class Stubborn(Order):
        def first(self, ctx):
            try:
                super().first(ctx)
            except SystemExit:
                begun("survived", self)
                wait_for("gate-of-survivors")
"""


class Shop:
    """The project, what its entities did, and what the index knows of them."""

    def __init__(self, directory: Path, broker: Valkey) -> None:
        (directory / "shop.py").write_text(textwrap.dedent(PROJECT))
        self.directory, self.broker = directory, broker
        self.engine = Engine(Celery("shop", broker=broker.url, set_as_current=False))
        for kind in ("order", "late", "parcel", "stubborn"):
            self.engine.declare(kind)

    def worker(self, pool: str, **env: str) -> Process:
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "shop",
            "worker",
            "--pool",
            pool,
            "--concurrency",
            "1",
        ]
        return Process(
            [*command, "--loglevel", "DEBUG"],
            log=self.directory / "worker.log",
            env={"BROKER": self.broker.url, **env},
            cwd=self.directory,
        )

    @contextlib.contextmanager
    def running(self, pool: str, **env: str) -> Iterator[Process]:
        with self.worker(pool, **env) as worker:
            worker.poll_until("the worker is ready", lambda: " ready." in worker.output(), timeout=40)
            yield worker

    def begun(self, action: str, entity: str = "order/1") -> int:
        """How often an action was."""
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / "begun").read_text().splitlines().count(f"{action} {entity}")
        return 0

    def open(self, gate: str) -> None:
        (self.directory / gate).touch()

    def described(self, kind: str = "order", id: str = "1") -> Description:
        described = self.engine.describe(self.engine.ref(kind, id))
        assert described
        return described


@pytest.fixture
def shop(tmp_path: Path, valkey: Valkey) -> Shop:
    return Shop(tmp_path, valkey)


#: What a worker is sent, one after the other, and what it says before it is sent the next.
STOPS: dict[str, list[tuple[signal.Signals, str]]] = {
    "cold": [(signal.SIGQUIT, "Hitting Ctrl+C again")],
    "soft": [(signal.SIGQUIT, "Initiating Soft Shutdown")],
    "remapped": [(signal.SIGTERM, "Hitting Ctrl+C again")],
    "warm, then cold": [(signal.SIGTERM, "Stopping Pool"), (signal.SIGQUIT, "Hitting Ctrl+C again")],
    "interrupted twice": [(signal.SIGINT, "Hitting Ctrl+C again"), (signal.SIGINT, "terminate all running")],
}
ENV = {"soft": {"SOFT": "1.0"}, "remapped": {"REMAP_SIGTERM": "SIGQUIT"}}

#: What an evaluation in the main thread keeps it from doing, and saying; what it says instead.
BUSY = {("solo", "Stopping Pool"): "Warm shutdown"}
#: What Celery says of threads, which it cannot cut off: an evaluation there ends before its next action.
CANNOT_CUT_OFF = "does not implement kill_job"

SHORT = {
    ("prefork", "soft"),
    ("prefork", "warm, then cold"),
    ("solo", "cold"),
    ("threads", "warm, then cold"),
    ("gevent", "cold"),
    ("prefork", "remapped"),
}
POOLS = ["prefork", "solo", "threads", "gevent"]


def says_it(worker: Process, text: str) -> None:
    worker.poll_until(f"it says {text!r}", lambda: text in worker.output(), timeout=10)


@pytest.mark.parametrize(
    ("pool", "how"),
    [
        pytest.param(pool, how, marks=[] if (pool, how) in SHORT else pytest.mark.long)
        for pool in POOLS
        for how in STOPS
        # Celery's wait in the handler of the signal fails under gevent if the signal meets the hub.
        if (pool, how) != ("gevent", "soft")
    ],
)
def test_two_planned_stops_count_no_failure(shop: Shop, pool: str, how: str) -> None:
    shop.engine.enqueue(shop.engine.ref("order", "1"))
    for stop in (1, 2):
        with shop.running(pool, **ENV.get(how, {})) as worker:
            poll("the evaluation has begun", lambda stop=stop: shop.begun("first") == stop, timeout=30)
            for number, says in STOPS[how]:
                worker.signal(number)
                says_it(worker, BUSY.get((pool, says), says))
            if pool == "threads":
                says_it(worker, CANNOT_CUT_OFF)
                shop.open(f"gate-{stop}")
            worker.wait(20)
            given_back = shop.described()
        assert (given_back.failures, given_back.error) == (0, None), worker.output()[-3000:]
        assert given_back.status == "scheduled", worker.output()[-3000:]
    shop.open("gate-3")
    with shop.running(pool):
        poll("it is evaluated again, at once", lambda: shop.described().converged, timeout=LEASE / 2)
    assert (shop.begun("first"), shop.begun("second")) == (3, 1)


@pytest.mark.parametrize("kind", ["late", "parcel"])
def test_whatever_the_kind(shop: Shop, kind: str) -> None:
    """A message that is acknowledged late comes back beside the new one, and may not claim."""
    shop.engine.enqueue_many(shop.engine.ref(kind, id) for id in "12")
    with shop.running("prefork") as worker:
        poll("an evaluation has begun", lambda: shop.begun("first", f"{kind}/1"), timeout=10)
        worker.signal(signal.SIGQUIT)
        worker.wait(20)
        for id in "12":
            assert (shop.described(kind, id).status, shop.described(kind, id).failures) == ("scheduled", 0)
    [record] = shop.engine.parts.index.describe(kind, ["1"])
    assert record
    assert not record.alone
    for gate in ("gate-1", "gate-2"):
        shop.open(gate)
    with shop.running("prefork"):
        for id in "12":
            poll("it is evaluated again", lambda id=id: shop.described(kind, id).converged, timeout=10)
    assert [shop.begun("second", f"{kind}/{id}") for id in "12"] == [1, 1]


def test_another_worker_goes_on_at_once(shop: Shop) -> None:
    shop.engine.enqueue(shop.engine.ref("order", "1"))
    with shop.running("prefork") as ends:
        poll("the evaluation has begun", lambda: shop.begun("first"), timeout=30)
        shop.open("gate-2")
        with shop.running("prefork", OTHER="1"):
            ends.signal(signal.SIGQUIT)
            ends.wait(20)
            poll("the other one has evaluated it", lambda: shop.described().converged, timeout=LEASE / 2)
    assert shop.described().failures == 0


def test_nothing_is_given_back_while_the_process_still_acts(shop: Shop) -> None:
    """An action that survives its process's end goes on, under its own lease."""
    shop.engine.enqueue(shop.engine.ref("stubborn", "1"))
    with shop.running("prefork") as worker:
        poll("the evaluation has begun", lambda: shop.begun("first", "stubborn/1"), timeout=30)
        lease = shop.described("stubborn").fencing_token
        worker.signal(signal.SIGQUIT)
        poll("it was to end", lambda: shop.begun("survived", "stubborn/1"), timeout=10)
        assert shop.described("stubborn").fencing_token == lease
        shop.open("gate-of-survivors")
        worker.wait(20)
    assert (shop.described("stubborn").status, shop.described("stubborn").failures) == ("idle", 0)
    assert (shop.begun("first", "stubborn/1"), shop.begun("second", "stubborn/1")) == (1, 1)


def test_a_killed_worker_counts(shop: Shop) -> None:
    shop.engine.enqueue(shop.engine.ref("order", "1"))
    with shop.running("prefork") as worker:
        poll("the evaluation has begun", lambda: shop.begun("first"), timeout=30)
        worker.kill()
    with shop.running("prefork") as worker:
        poll("its loss is found", lambda: shop.described().failures == 1, timeout=3 * LEASE)
        worker.signal(signal.SIGQUIT)
        worker.wait(20)
    assert str(shop.described().error).startswith("WorkerLost")


# What is given back, and what is not -------------------------------------------------------------


@pytest.fixture
def claimed(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Report]:
    """Claims an entity in this worker's name, or in another's; the report that ends the evaluation."""
    monkeypatch.setenv(shutdown.VARIABLE, "me")
    monkeypatch.setitem(state.total_count, "goalstate.order", 1)

    def claimed(nonce: str) -> Report:
        world.engine.enqueue(world.entity("1"))
        [message] = world.messages()
        [claim] = world.index.claim("order", message.args[0], nonce=nonce, task_id="t")
        assert isinstance(claim, Claim)
        return Report("1", claim.lease, Verdict.DONE, delay=None)

    return claimed


def given_back(world: World, **options: Any) -> bool:
    give_back(world.engine.parts, [world.engine.kind("order")], **{"wait": 0.0, **options})
    assert not world.messages(), "which might come to this worker"
    return bool(world.index.counts("order")[Status.PARKED])


def test_what_this_worker_left(world: World, claimed: Callable[[str], Report]) -> None:
    claimed("me:1")
    assert given_back(world)


def test_not_what_another_worker_evaluates(world: World, claimed: Callable[[str], Report]) -> None:
    claimed("another:1")
    assert not given_back(world)


def test_not_what_a_thread_still_evaluates(world: World, claimed: Callable[[str], Report]) -> None:
    with claiming() as nonce:
        claimed(nonce)
        assert not given_back(world)
    assert given_back(world)


def test_a_thread_is_waited_for(world: World, claimed: Callable[[str], Report]) -> None:
    ends = threading.Event()

    def evaluate() -> None:
        with claiming() as nonce:
            report = claimed(nonce)
            ends.wait()
            world.index.finish("order", [report])

    thread = threading.Thread(target=evaluate)
    thread.start()
    poll("it is claimed", lambda: world.index.counts("order")[Status.RUNNING])
    timer = threading.Timer(0.1, ends.set)
    timer.start()
    assert not given_back(world, wait=30.0)
    assert ends.is_set()
    thread.join()
    timer.join()


def test_all_else_has_stopped_by_then(world: World) -> None:
    with worker_of(world.app) as worker:
        assert isinstance(worker.steps[0], GiveBackStep)


def test_nothing_while_a_process_of_the_pool_lives(
    world: World, claimed: Callable[[str], Report], caplog: pytest.LogCaptureFixture
) -> None:
    claimed("me:1")
    process = billiard.get_context("spawn").Process(target=signal.pause, name="ForkPoolWorker-1")
    process.start()
    try:
        assert not given_back(world)
    finally:
        process.terminate()
        process.join()
    assert "ForkPoolWorker-1 did not end" in caplog.text
    assert given_back(world)
