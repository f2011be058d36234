"""pytest-celery's fixtures, overridden: real processes, no containers, and one set of them per lane.

A lane is a pool over a broker. The whole suite runs on each; in `make test`, lanes over brokers that have a
short list (`SHORT`) run only that.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from pytest_celery import (
    CeleryBrokerCluster,
    CeleryTestBroker,
    CeleryTestSetup,
    CeleryTestWorker,
    CeleryWorkerCluster,
)

from tests.acceptance.app import Things
from tests.acceptance.ledger import Line, Violation, violations
from tests.acceptance.nodes import BrokerProcess, WorkerProcess
from tests.servers import RabbitMQ, RedisServer, Valkey, poll

Broker = Valkey | RedisServer | RabbitMQ


@dataclass(frozen=True)
class Lane:
    """A pool over a broker, with the settings that this broker needs."""

    pool: str
    broker: type[Broker] = Valkey
    name: str = "valkey"
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.pool if self.broker is Valkey else f"{self.pool}+{self.name}"


# Queues that are replicated, and RabbitMQ's own delayed delivery, which wants a topic exchange.
QUORUM = (
    ("task_default_queue_type", "quorum"),
    ("task_default_exchange_type", "topic"),
    ("broker_transport_options", {"confirm_publish": True}),
)

LANES = [
    *(Lane(pool) for pool in ("prefork", "solo", "threads", "gevent")),
    Lane("prefork", RedisServer, "redis"),
    Lane("prefork", RabbitMQ, "rabbitmq"),
    Lane("prefork", RabbitMQ, "quorum", QUORUM),
]

if POOLS := os.environ.get("GOALSTATE_TEST_POOLS"):  # by name, over the embedded Valkey alone
    LANES = [lane for lane in LANES if str(lane) in POOLS.split(",")]

# What is worth its time in every run, where the pool and much of the broker are those of another lane.
SHORT = {
    "redis": re.compile(r"test_messages|a_handful_of_kills"),
    "quorum": re.compile(
        r"test_batch|a_handful_of_kills|deadline|restarts_empty|fails_three_times|stopped_engine|backs_off"
    ),
}

# Short, so that recovery takes seconds; long enough for a busy machine with two cores.
SETTINGS = {
    "broker_connection_retry_on_startup": True,
    "task_ignore_result": True,
    "worker_hijack_root_logger": False,
    "goalstate_failure_retry_delay": 0.2,
    "goalstate_max_retry_delay": 1.0,
    "goalstate_jitter": False,
    "goalstate_lease": 2.0,
    "goalstate_resend_after": 1.0,
    "goalstate_sweep_interval": 0.1,
    "goalstate_eta_horizon": 2.0,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            lane = item.callspec.params.get("lane")
            if isinstance(lane, Lane) and lane.name in SHORT and not SHORT[lane.name].search(item.nodeid):
                item.add_marker(pytest.mark.long)


@pytest.fixture(
    scope="session",
    params=[pytest.param(lane, id=str(lane), marks=pytest.mark.xdist_group(str(lane))) for lane in LANES],
)
def lane(request: pytest.FixtureRequest) -> Lane:
    """All tests of one lane run in one process, one after the other, and share its servers and workers."""
    return request.param


@pytest.fixture(scope="session")
def directory(lane: Lane, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all processes of one lane's tests share."""
    return tmp_path_factory.mktemp(str(lane))


@pytest.fixture(scope="session")
def index_server(directory: Path) -> Iterator[Valkey]:
    """The index's own server, so that tests can hurt broker and index each alone. It keeps its data."""
    with Valkey(directory / "index", appendonly=True) as server:
        yield server


@pytest.fixture(scope="session")
def broker_server(directory: Path, lane: Lane) -> Iterator[Broker]:
    with lane.broker(directory / "broker") as server:
        yield server


@pytest.fixture(scope="session")
def celery_broker(broker_server: Broker) -> CeleryTestBroker:
    return CeleryTestBroker(BrokerProcess(broker_server))


@pytest.fixture(scope="session")
def celery_broker_cluster(celery_broker: CeleryTestBroker) -> CeleryBrokerCluster:
    return CeleryBrokerCluster(celery_broker)


@pytest.fixture(scope="session")
def celery_backend_cluster() -> None:
    return None


@pytest.fixture(scope="session")
def things(
    directory: Path, lane: Lane, celery_broker: CeleryTestBroker, index_server: Valkey
) -> Iterator[Things]:
    """The app, engine and world, as producers and tests see them."""
    settings = {
        **SETTINGS,
        **dict(lane.settings),
        "broker_url": celery_broker.config()["url"],
        "goalstate_index_url": index_server.url,
    }
    (directory / "settings.json").write_text(json.dumps(settings))
    things = Things(directory)
    yield things
    things.app.close()


@pytest.fixture(scope="session")
def celery_worker_cluster(things: Things, directory: Path, lane: Lane) -> Iterator[CeleryWorkerCluster]:
    """Two workers, so that they race each other and can stand in for each other."""
    workers = [WorkerProcess(directory, pool=lane.pool, number=number) for number in (1, 2)]
    with contextlib.ExitStack() as stack:
        for worker in workers:
            worker.start()
            stack.callback(worker.teardown)
        cluster = CeleryWorkerCluster(*(CeleryTestWorker(worker, things.app) for worker in workers))
        assert cluster.ready()
        yield cluster


@pytest.fixture(scope="session")
def celery_worker(celery_worker_cluster: CeleryWorkerCluster) -> CeleryTestWorker:
    return celery_worker_cluster[0]


@pytest.fixture(scope="session")
def celery_setup_app(things: Things) -> Celery:
    return things.app


class Scene:
    """What a test plays on: pytest-celery's setup, the things, and a name that no other test uses."""

    def __init__(self, setup: CeleryTestSetup, things: Things, name: str) -> None:
        self.setup = setup
        self.things = things
        self.engine = things.engine
        self.world = things.world
        self.name = name
        self._markers = 0

    @property
    def workers(self) -> list[WorkerProcess]:
        return [node.container for node in self.setup.worker_cluster]

    def id(self, number: int = 1) -> str:
        return f"{self.name}.{number}"

    def lines(self, *events: str, id: str = "") -> list[Line]:
        """This test's lines in the ledger, or one entity's."""
        lines = self.things.ledger.lines(f"{self.name}.", *events)
        return [line for line in lines if line.entity == id] if id else lines

    def looks(self, id: str = "") -> list[float]:
        """When evaluations began; of the only entity, unless told otherwise."""
        return [line.at for line in self.lines("look", id=id or self.id())]

    def reached(self, id: str = "", *, looks: int = 1, timeout: float = 15) -> None:
        """Wait until an entity has been looked at so often, and is at its goal and idle."""
        id = id or self.id()

        def done() -> bool:
            return (
                len(self.looks(id)) >= looks
                and self.world.reached(id) == self.world.wanted(id)
                and self.status(id) == "idle"
            )

        try:
            poll(f"{id} has reached its goal", done, timeout=timeout)
        except pytest.fail.Exception as error:
            record = self.engine.describe(self.things.Thing(id))
            pytest.fail(f"{error}; {len(self.looks(id))} looks, {record}")

    def status(self, id: str = "") -> str | None:
        record = self.engine.describe(self.things.Thing(id or self.id()))
        return None if record is None else str(record.status)

    def is_scheduled(self, id: str = "") -> bool:
        return self.engine.is_scheduled(self.things.Thing(id or self.id()))

    def settle(self, seconds: float = 0.0) -> None:
        """Let time pass in which nothing may happen, until a plain task with a countdown is run."""
        if self.things.app.conf.task_default_queue_type == "quorum":
            seconds = math.ceil(seconds)  # Celery refuses other delays than whole seconds
        self._markers += 1
        name = f"{self.name}.marker-{self._markers}"
        self.things.app.send_task("acceptance.marker", (name,), countdown=seconds)
        poll("the marker is run", lambda: self.lines("marker", id=name), timeout=seconds + 15)

    def violations(self) -> list[Violation]:
        return violations(self.lines(), lease=SETTINGS["goalstate_lease"])


@pytest.fixture
def scene(celery_setup: CeleryTestSetup, things: Things, request: pytest.FixtureRequest) -> Scene:
    assert celery_setup.ready()
    return Scene(celery_setup, things, re.sub(r"\W+", "-", request.node.name).strip("-"))
