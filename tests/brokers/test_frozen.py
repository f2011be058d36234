"""A broker that accepts connections and answers nothing holds nobody up for long, and nothing is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu.utils.uuid import uuid

from celery_goalstate import Engine, Entity
from celery_goalstate.index.base import Request, Wakeup
from celery_goalstate.messages import producers
from celery_goalstate.registry import Kind
from celery_goalstate.settings import KindOptions
from tests.servers import RabbitMQ, Valkey, frozen, poll

TIMEOUT = 1.5
SLACK = 3.0  # on a busy machine
ORDERS = Kind("order", "goalstate.order", None, KindOptions())

Server = Valkey | RabbitMQ


@pytest.fixture(scope="module", params=[Valkey, RabbitMQ], ids=["valkey", "rabbitmq"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with request.param(tmp_path_factory.mktemp("broker")) as server:
        yield server


class Shop:
    """An engine on a broker, with the index in this process."""

    def __init__(self, server: Server, **conf: Any) -> None:
        self.app = Celery(uuid(), broker=server.url, set_as_current=False)
        self.app.conf.update(
            goalstate_index_url="memory://",
            goalstate_broker_timeout=TIMEOUT,
            task_default_queue=self.app.main,
            **conf,
        )
        self.engine = Engine(self.app)

        @self.engine.register
        class Order(Entity):
            def get_action_list(self, state: Any, goal_state: Any) -> None: ...

        self.entity = Order

    def sent(self) -> int:
        return sum(described.sent for described in self.engine.list("order", limit=1000))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + SLACK


def test_an_enqueue_succeeds_and_its_message_is_sent_later(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """By a process that connects only then: one that is connected to RabbitMQ waits for no answers."""
    shop = Shop(server)
    with frozen(server.pid):
        with within(TIMEOUT):
            enqueued = shop.engine.enqueue(shop.entity("1"))
        assert (enqueued.changed, enqueued.sent) == (True, False)
        assert shop.sent() == 0, "nobody believes that a message is under way"
        [record] = [record for record in caplog.records if record.name.startswith("celery_goalstate")]
        assert "could not publish 1 of kind order, the sweeper will send them later" in record.message
    shop.engine._open_sweeper("test").sweep()
    assert shop.sent() == 1


def test_a_connection_that_was_good_until_then(tmp_path: Path) -> None:
    with Valkey(tmp_path) as server:
        shop = Shop(server)
        assert shop.engine.enqueue(shop.entity("before")).sent
        with frozen(server.pid), within(TIMEOUT):
            assert not shop.engine.enqueue(shop.entity("1")).sent
        assert shop.engine.enqueue(shop.entity("2")).sent


def test_many_wait_no_longer_than_one(server: Server) -> None:
    shop = Shop(server)
    with frozen(server.pid):
        with within(TIMEOUT):
            assert shop.engine.enqueue_many(map(shop.entity, range(4500))) == 4500
        assert shop.sent() == 0
    sweeper = shop.engine._open_sweeper("test")
    poll("many are sent", lambda: sweeper.sweep() or shop.sent() >= 400)


def test_many_threads_wait_no_longer_than_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though they use the same few producers, and wait for each other."""
    monkeypatch.setattr(producers, "BORROW_TIMEOUT", 60.0)
    shop = Shop(server, broker_pool_limit=1)
    took: list[float] = []

    def enqueue(id: str) -> None:
        began = time.monotonic()
        shop.engine.enqueue(shop.entity(id))
        took.append(time.monotonic() - began)

    with frozen(server.pid):
        threads = [threading.Thread(target=enqueue, args=(str(n),)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(took) == 12
    assert max(took) < TIMEOUT + SLACK
    assert shop.sent() == 0


def test_an_evaluation_that_fails_ends_and_its_retry_is_sent_later(server: Server) -> None:
    shop = Shop(server)

    @shop.engine.register(failure_retry_delay=0.01)
    class Broken(Entity):
        def get_state(self) -> None:
            raise ValueError("no")

        def get_action_list(self, state: Any, goal_state: Any) -> None: ...

    index = shop.engine.parts.index
    [scheduled] = index.enqueue("broken", [Request("1", 0)])
    assert scheduled.wakeup
    task = shop.app.tasks["goalstate.broken"]
    with frozen(server.pid):
        with within(TIMEOUT):
            result = task.apply([[["1", scheduled.wakeup.token]]], throw=False)
        assert result.state == "RETRY"
        described = shop.engine.describe(Broken("1"))
        assert described is not None
        assert (described.status, described.failures, described.sent) == ("scheduled", 1, False)
    poll(
        "it is sent",
        lambda: shop.engine._open_sweeper("test").sweep() or shop.engine.describe(Broken("1")).sent,
    )


def test_a_sweep_waits_for_a_second_at_most(server: Server) -> None:
    """However many kinds have something to publish."""
    shop = Shop(server)
    index = shop.engine.parts.index
    kinds = [f"kind-{n}" for n in range(30)]
    for kind in kinds:
        shop.engine.register(type("Thing", (shop.entity,), {"kind": kind}))
        [scheduled] = index.enqueue(kind, [Request("1", delay=0, task_id=uuid())])
        index.put_back(kind, [scheduled.wakeup] if scheduled.wakeup else [])
    with frozen(server.pid):
        shop.engine.enqueue_many(map(shop.entity, range(300)))
        sweeper = shop.engine._open_sweeper("test")
        with within(shop.engine.settings.sweep_timeout):
            assert sweeper.sweep() is False
    assert [index.counts(kind)["parked"] for kind in ("order", *kinds)] == [300] + [1] * 30


@pytest.mark.parametrize(
    "options",
    [
        {"broker_transport_options": {"retry_on_timeout": True, "socket_timeout": 60, "read_timeout": 60}},
        {"broker_transport_options": {"socket_connect_timeout": 0.2, "write_timeout": 0.2}},
        {"task_publish_retry_policy": {"max_retries": None}},
        {"task_publish_retry": False},
        {"broker_pool_limit": None},
        {"broker_connection_timeout": 60},
    ],
    ids=str,
)
def test_whatever_the_app_says_of_its_own_patience(server: Server, options: dict[str, Any]) -> None:
    shop = Shop(server, **options)
    with frozen(server.pid), within(TIMEOUT):
        assert not shop.engine.enqueue(shop.entity("1")).sent
    assert shop.engine.enqueue(shop.entity("2")).sent


def test_a_shorter_patience_of_the_app_holds(server: Server) -> None:
    """It gives up what is under way after that, and tries again for as long as it may."""
    short = dict.fromkeys(("socket_timeout", "read_timeout"), 0.1)
    policy = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
    shop = Shop(
        server,
        broker_transport_options=short,
        broker_connection_timeout=0.1,
        task_publish_retry_policy=policy,
    )
    with frozen(server.pid), within(0.2):
        assert not shop.engine.enqueue(shop.entity("1")).sent


@pytest.mark.parametrize("options", [{}, {"confirm_publish": True}], ids=str)
def test_rabbitmq_that_takes_no_more_of_what_is_written(
    tmp_path: Path, options: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    """Without confirmations what is written is under way, until the system's buffers are full."""
    with RabbitMQ(tmp_path) as server:
        shop = Shop(server, broker_transport_options=options)
        batch = [Wakeup(f"{n:0>500}", "1", 0, uuid()) for n in range(50)]
        poll("it answers", lambda: shop.engine.parts.publisher.dispatch(ORDERS, batch))
        with frozen(server.pid):
            accepted, is_sent = 0, True
            while is_sent:
                with within(TIMEOUT):
                    is_sent = shop.engine.parts.publisher.dispatch(ORDERS, batch)
                accepted += is_sent
        assert (accepted == 0) is bool(options)
        poll("it answers", lambda: shop.engine.parts.publisher.dispatch(ORDERS, batch))
    record_property("summary", f"RabbitMQ, {options}: {50 * accepted} messages into a frozen one's socket")
