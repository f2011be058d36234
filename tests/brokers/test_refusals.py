"""What a broker refuses, and what it is too busy or too broken for: the sweeper tells one from the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from amqp.abstract_channel import AbstractChannel
from celery import Celery
from kombu import Connection, Queue
from kombu.utils.uuid import uuid

from celery_goalstate import Engine, Entity
from celery_goalstate.index.base import Wakeup
from celery_goalstate.messages.errors import BrokerUnavailable, MessagesRefused, NotPublished
from celery_goalstate.registry import Kind
from celery_goalstate.settings import KindOptions
from tests.servers import HOST, RabbitMQ, Valkey, free_port, frozen, poll

ORDERS = Kind("order", "goalstate.order", None, KindOptions())

Server = Valkey | RabbitMQ


@pytest.fixture(scope="module")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    with RabbitMQ(tmp_path_factory.mktemp("broker")) as server:
        yield server


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    with Valkey(tmp_path / "broker") as server:
        yield server


@pytest.fixture(params=["valkey", "rabbitmq"])
def server(request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue(request.param)
    return server


def engine_on(url: str, **conf: Any) -> Engine:
    app = Celery(uuid(), broker=url, set_as_current=False)
    app.conf.update(goalstate_index_url="memory://", goalstate_eta_horizon=0.0, task_default_queue=app.main)
    app.conf.update(conf)
    return Engine(app)


def why_not(engine: Engine, several: int = 1) -> NotPublished:
    """Why a wake-up, or several of them, cannot be published at once."""
    with pytest.raises(NotPublished) as raised:
        engine.parts.publisher.publish_at_once(ORDERS, [Wakeup("1", "1", 0, uuid())] * several)
    return raised.value


def register(engine: Engine, kind: str, **options: Any) -> Callable[[str], Entity]:
    class Thing(Entity):
        def get_action_list(self, state: Any, goal_state: Any) -> None: ...

    Thing.kind = kind
    return engine.register(**options)(Thing)


# A kind that is refused --------------------------------------------------------------------------


def test_others_go_on_beside_a_queue_that_is_declared_otherwise(
    rabbitmq: RabbitMQ, caplog: pytest.LogCaptureFixture
) -> None:
    """RabbitMQ answers 406, and closes the channel."""
    with Connection(rabbitmq.url) as connection:
        Queue("meters", durable=False)(connection.channel()).declare()
    assert_others_go_on(engine_on(rabbitmq.url), "PreconditionFailed", caplog)


def test_others_go_on_beside_a_queue_that_is_missing(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Celery's router raises `QueueNotFound`."""
    engine = engine_on(server.url, task_create_missing_queues=False)
    engine.app.conf.task_queues = [Queue(engine.app.conf.task_default_queue)]
    assert_others_go_on(engine, "QueueNotFound", caplog)


def assert_others_go_on(engine: Engine, words: str, caplog: pytest.LogCaptureFixture) -> None:
    gauge, valve = register(engine, "gauge", queue="meters"), register(engine, "valve")
    engine.enqueue(gauge("1"), 0.01)
    sweeper = engine._open_sweeper("test")
    for id in "abc":
        engine.enqueue(valve(id), 0.01)
        poll("it is sent", lambda id=id: sweeper.sweep() or engine.describe(valve(id)).sent)
    described = engine.describe(gauge("1"))
    assert described is not None
    assert not described.sent
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.message.startswith("the messages of gauge cannot be published")
    assert words in record.message


def test_a_key_that_is_no_queue_is_the_kinds_own_trouble(valkey: Valkey) -> None:
    engine = engine_on(valkey.url)
    with valkey.client() as client:
        client.set(engine.app.main, "a text")
    for several in (1, 2):
        assert isinstance(why_not(engine, several), MessagesRefused)


# A broker that is away ---------------------------------------------------------------------------


@pytest.mark.parametrize("several", [1, 2])
def test_a_broker_that_does_not_answer(server: Server, several: int) -> None:
    engine = engine_on(server.url, goalstate_lease=2)
    with frozen(server.pid):
        assert isinstance(why_not(engine, several), BrokerUnavailable)


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_nobody_listens(scheme: str) -> None:
    assert isinstance(why_not(engine_on(f"{scheme}://{HOST}:{free_port()}//")), BrokerUnavailable)


@pytest.mark.parametrize("several", [1, 2])
def test_a_full_redis_is_full_for_all(valkey: Valkey, several: int) -> None:
    with valkey.client() as client:
        client.config_set("maxmemory", 1)
        assert isinstance(why_not(engine_on(valkey.url), several), BrokerUnavailable)


def test_a_password_is_refused_to_all(server: Server) -> None:
    scheme = server.url.partition(":")[0]
    url = f"{scheme}://nobody:wrong@{HOST}:{server.port}//"
    assert isinstance(why_not(engine_on(url)), BrokerUnavailable)


# Several brokers ---------------------------------------------------------------------------------


def test_the_next_broker_is_tried_when_the_first_is_dead(server: Server) -> None:
    nobody = f"{server.url.partition(':')[0]}://{HOST}:{free_port()}//"
    assert_swept(engine_on(f"{nobody};{server.url}"))


def test_the_next_broker_is_tried_when_the_first_is_frozen(server: Server, tmp_path: Path) -> None:
    with type(server)(tmp_path / "first") as first, frozen(first.pid):
        assert_swept(engine_on(f"{first.url};{server.url}", goalstate_lease=5))


def test_a_list_of_brokers_makes_no_wait_longer(rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch) -> None:
    """kombu takes leave of the one that it gives up, which does not answer to that, either."""
    nobody = f"amqp://{HOST}:{free_port()}//"
    engine = engine_on(f"{rabbitmq.url};{nobody}", broker_transport_options={"confirm_publish": True})
    engine.parts.publisher.publish_at_once(ORDERS, [Wakeup("1", "1", 0, uuid())])
    waits, wait = [], AbstractChannel.wait

    def noted(channel: AbstractChannel, *args: Any, **options: Any) -> Any:
        waits.append(channel)
        return wait(channel, *args, **options)

    monkeypatch.setattr(AbstractChannel, "wait", noted)
    with frozen(rabbitmq.pid):
        assert isinstance(why_not(engine), BrokerUnavailable)
    assert len(waits) == 1


def assert_swept(engine: Engine) -> None:
    order = register(engine, "order")
    engine.enqueue(order("1"), 0.01)
    sweeper = engine._open_sweeper("test")
    poll("it is sent", lambda: sweeper.sweep() or engine.describe(order("1")).sent)
