"""Connections that are kept: to the index (`index.connection`) and to the broker (`messages.producers`)."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Exchange, Queue
from kombu.utils.uuid import uuid
from redis import Redis, Sentinel
from redis.backoff import NoBackoff
from redis.credentials import UsernamePasswordCredentialProvider
from redis.exceptions import ConnectionError as Unreachable
from redis.exceptions import TimeoutError as TooLate
from redis.retry import Retry

from celery_goalstate import Engine, Entity, Rules
from celery_goalstate.index import open_index
from celery_goalstate.index.base import Request, Wakeup
from celery_goalstate.index.connection import Server, server_of
from celery_goalstate.messages.producers import Producers, keep_client
from celery_goalstate.registry import Kind
from celery_goalstate.settings import KindOptions, Settings
from tests.integration.conftest import MakeApp, worker_of
from tests.servers import HOST, Valkey, in_a_fork, poll
from tests.versions import needs_redis_py_8

ORDERS = Kind("order", "goalstate.order", None, KindOptions())


@pytest.fixture
def client(valkey: Valkey) -> Iterator[Any]:
    with Redis.from_url(valkey.url, decode_responses=True, retry=Retry(NoBackoff(), 0)) as client:
        yield client


@pytest.fixture
def server(client: Any) -> Server:
    return server_of(client)


def own_id(server: Server) -> int:
    [id] = server.exchange([("CLIENT", "ID")])
    return int(id)


def test_one_connection_for_one_call_after_the_other(server: Server) -> None:
    assert own_id(server) == own_id(server)


def test_errors_are_replies_and_the_others_stay_in_their_places(server: Server) -> None:
    first, wrong, last = server.exchange([("ECHO", "1"), ("NONSENSE",), ("ECHO", "3")])
    assert (first, last) == ("1", "3")
    assert "unknown command" in str(wrong)
    assert server.exchange([("ECHO", "é")]) == ["é"]


def test_a_connection_that_was_closed_between_two_calls_is_replaced(server: Server, valkey: Valkey) -> None:
    """By a server or a proxy: a call that is made once only must not fail for that."""
    before = own_id(server)
    with valkey.client() as other:
        assert other.client_kill_filter(_id=before) == 1
    assert server.exchange([("ECHO", "1")]) == ["1"]
    assert own_id(server) != before


def test_one_that_breaks_during_a_call_costs_one_error(server: Server, valkey: Valkey) -> None:
    with valkey.client() as other:
        waiting = threading.Thread(target=lambda: replies.extend(server.exchange([("BLPOP", "empty", 5)])))
        replies: list[Any] = []
        waiting.start()
        poll("it waits", lambda: [each for each in other.client_list() if each["cmd"] == "blpop"])
        assert other.client_kill_filter(skipme=True) >= 1
        waiting.join(5)
    [error] = replies
    assert isinstance(error, Unreachable)
    assert server.exchange([("ECHO", "1")]) == ["1"]


def test_whoever_is_interrupted_leaves_no_reply_to_the_next(server: Server, client: Any) -> None:
    before = own_id(server)
    connection = server._idle[-1]
    read = connection.read_response

    def interrupted() -> Any:
        del connection.read_response
        raise KeyboardInterrupt

    connection.read_response = interrupted
    with pytest.raises(KeyboardInterrupt):
        server.exchange([("ECHO", "to nobody")])
    assert connection.read_response == read
    assert server.exchange([("ECHO", "mine")]) == ["mine"]
    assert own_id(server) != before


def test_a_fork_gets_a_connection_of_its_own(server: Server) -> None:
    mine = own_id(server)
    its = int(in_a_fork(lambda: own_id(server)))
    assert its != mine
    assert own_id(server) == mine, "which the fork did not close"


def test_all_replies_share_the_time(valkey: Valkey) -> None:
    """Of a server that always answers at the last moment."""
    with Redis.from_url(
        valkey.url, decode_responses=True, retry=Retry(NoBackoff(), 0), socket_timeout=1.0
    ) as client:
        first, *others = server_of(client).exchange([("BLPOP", "empty", "0.6")] * 6)
        assert first is None
        assert all(isinstance(reply, TooLate) for reply in others)
        assert server_of(client).exchange([("ECHO", "mine")]) == ["mine"]


def test_threads_do_not_share_a_connection(server: Server) -> None:
    """While one waits, the other is served."""
    waiting = threading.Thread(target=server.exchange, args=([("BLPOP", "empty", 5)],))
    waiting.start()
    poll("it waits", lambda: "cmd=blpop" in server.exchange([("CLIENT", "LIST")])[0])
    assert server.exchange([("RPUSH", "empty", "1")]) == [1]
    waiting.join(5)
    assert not waiting.is_alive()
    assert len(server._idle) == 2


def test_delete_is_said_to_a_server_that_is_there(valkey: Valkey) -> None:
    index = open_index(Settings(index_url=valkey.url))
    index.enqueue("order", [Request("1", 60_000)])
    with valkey.client() as client:
        client.client_kill_filter(skipme=True)
    assert index.delete("order", ["1"]) == [True]


@needs_redis_py_8
def test_all_connections_go_on_with_the_successor_of_a_master(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them learns of it; the old master goes on to answer the others."""
    with Valkey(tmp_path) as successor:
        master = [(HOST, valkey.port)]
        monkeypatch.setattr(Sentinel, "discover_master", lambda *_: master[0])
        open_sentinel: Any = Sentinel  # untyped in redis-py
        client = open_sentinel([(HOST, 1)]).master_for("m", decode_responses=True)
        server = server_of(client)
        server._idle += [client.connection_pool.get_connection() for _ in range(3)]
        lost = own_id(server)
        master[0] = (HOST, successor.port)
        with valkey.client() as other:
            other.client_kill_filter(_id=lost)

        def port() -> int:
            [said] = server.exchange([("CONFIG", "GET", "port")])
            return int(dict(said)["port"] if isinstance(said, dict) else said[1])

        assert {port() for _ in range(3)} == {successor.port}
        client.close()


# The broker's -------------------------------------------------------------------------------------


@pytest.fixture
def app(valkey: Valkey) -> Celery:
    app = Celery(uuid(), broker=valkey.url, set_as_current=False)
    app.conf.update(broker_pool_limit=1, task_default_queue="wake-ups")
    return app


def ids_of(valkey: Valkey) -> set[str]:
    """The connections that the server has, but for the one that asks."""
    with valkey.client() as client:
        mine = str(client.client_id())
        return {each["id"] for each in client.client_list()} - {mine}


def publish(producer: Any) -> None:
    producer.publish({}, routing_key="wake-ups")


def test_a_producer_keeps_its_connection_and_its_client(app: Celery, valkey: Valkey) -> None:
    producers = Producers(app, 5.0)
    with producers.borrowed() as first:
        publish(first)
    with producers.borrowed() as first:
        publish(first)
    before = ids_of(valkey)
    with producers.borrowed() as second:
        channel = second.channel
        publish(second)
        assert channel._create_client() is channel._create_client()
    assert second is first
    assert ids_of(valkey) == before
    with valkey.client() as client:
        assert client.llen("wake-ups") == 3


def test_a_message_goes_over_the_connection_that_the_last_one_took(app: Celery, valkey: Valkey) -> None:
    producers, took = Producers(app, 5.0), []
    with valkey.client() as client:
        for _ in range(4):
            with producers.borrowed() as producer:
                publish(producer)
            took.append({each["id"] for each in client.client_list() if each["cmd"] == "lpush"})
    assert len(took[-1]) == 1
    assert took[-1] == took[-2]


def test_a_key_prefix_is_kept(app: Celery, valkey: Valkey) -> None:
    app.conf.broker_transport_options = {"global_keyprefix": "shop-"}
    producers = Producers(app, 5.0)
    for _ in range(3):
        with producers.borrowed() as producer:
            publish(producer)
    with valkey.client() as client:
        assert client.llen("shop-wake-ups") == 3


def test_after_an_error_another_one_is_opened(app: Celery) -> None:
    producers = Producers(app, 5.0)
    with suppress(KeyError), producers.borrowed() as first:
        publish(first)
        raise KeyError
    assert not first.connection.connected
    with producers.borrowed() as second:
        publish(second)
    assert second is not first


def test_as_many_as_the_limit_says(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    producers, came = Producers(app, 5.0), threading.Event()
    monkeypatch.setattr("celery_goalstate.messages.producers.BORROW_TIMEOUT", 30.0)

    def other() -> None:
        with producers.borrowed():
            came.set()

    with producers.borrowed():
        thread = threading.Thread(target=other)
        thread.start()
        assert not came.wait(0.2)
    assert came.wait(5)
    thread.join()


def test_whoever_publishes_while_publishing_does_not_wait_for_ever(
    app: Celery, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_goalstate.messages.producers.BORROW_TIMEOUT", 0.01)
    producers = Producers(app, 5.0)
    with producers.borrowed() as outer, producers.borrowed() as inner:
        publish(outer)
        publish(inner)
    assert inner is not outer
    with producers.borrowed() as again:
        assert again is outer
    with valkey.client() as client:
        assert client.llen("wake-ups") == 2


def test_threads_that_come_first_share_the_same_places(app: Celery) -> None:
    app.conf.broker_pool_limit = 2
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):
            producers, together = Producers(app, 5.0), threading.Barrier(8)

            def borrow(producers: Producers = producers, together: threading.Barrier = together) -> None:
                together.wait()
                with producers.borrowed() as producer:
                    assert producer is not None

            with ThreadPoolExecutor(8) as pool:
                for done in [pool.submit(borrow) for _ in range(8)]:
                    done.result()
            [places] = producers._kept.values()
            assert places.qsize() == 2
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("limit", [None, 0])
def test_without_a_limit_none_is_kept(app: Celery, limit: int | None, valkey: Valkey) -> None:
    app.conf.broker_pool_limit = limit
    before = ids_of(valkey)
    with Producers(app, 5.0).borrowed() as producer:
        publish(producer)
    poll("it is closed", lambda: ids_of(valkey) <= before)


def test_a_fork_publishes_by_a_producer_of_its_own(app: Celery, valkey: Valkey) -> None:
    producers = Producers(app, 5.0)

    def borrow() -> int:
        with producers.borrowed() as producer:
            publish(producer)
            return id(producer)

    mine = borrow()
    before = ids_of(valkey)
    assert int(in_a_fork(borrow)) != mine
    assert borrow() == mine
    assert ids_of(valkey) == before
    with valkey.client() as client:
        assert client.llen("wake-ups") == 3


def test_a_broker_that_comes_back_is_found_again(app: Celery, valkey: Valkey) -> None:
    app.conf.goalstate_eta_horizon = 30
    engine = Engine(app)

    @engine.register
    class Order(Entity):
        rules = Rules({})

    assert engine.enqueue(Order("1")).sent
    with valkey.client() as client:
        client.client_kill_filter(skipme=True)
    assert engine.enqueue(Order("2")).sent


@pytest.mark.parametrize("wait", [True, False])
def test_what_kombu_does_not_repeat_is_sent_though_the_broker_has_just_hung_up(
    app: Celery, valkey: Valkey, wait: bool
) -> None:
    topic = Queue("wake-ups", Exchange("topics", "topic"), routing_key="wake-ups.#")  # bindings are looked up
    app.conf.update(
        goalstate_index_url="memory://",
        task_queues=[topic],
        task_default_exchange="topics",
        task_default_exchange_type="topic",
        task_default_routing_key="wake-ups.1",
    )
    publisher = Engine(app).parts.publisher
    wakeups = [Wakeup(str(n), "1", 0, uuid()) for n in range(1 + wait)]
    for _ in range(3):
        if wait:
            assert publisher.dispatch(ORDERS, wakeups)
        else:
            publisher.publish_at_once(ORDERS, wakeups)
        with valkey.client() as client:
            client.client_kill_filter(skipme=True)


def test_a_batch_is_sent_over_the_only_connection_that_is_allowed(app: Celery, valkey: Valkey) -> None:
    app.conf.update(goalstate_index_url="memory://", broker_transport_options={"max_connections": 1})
    publisher = Engine(app).parts.publisher
    for _ in range(3):
        assert publisher.dispatch(ORDERS, [Wakeup("1", "1", 0, uuid())])
        assert publisher.dispatch(ORDERS, [Wakeup(id, "1", 0, uuid()) for id in "12"])
    with valkey.client() as client:
        assert client.llen("wake-ups") == 9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"transport_options": {"global_keyprefix": "shop-"}},
        {"credential_provider": UsernamePasswordCredentialProvider("default", "any")},
    ],
    ids=["as usual", "prefixed", "logs in again"],
)
def test_a_channel_keeps_one_client_of_its_own_class(valkey: Valkey, options: dict[str, Any]) -> None:
    with Connection(valkey.url, **options) as connection, connection.SimpleQueue("held") as queue:
        channel = queue.consumer.channel
        before = type(channel._create_client())
        keep_client(channel)
        assert channel._create_client() is channel._create_client()
        assert type(channel._create_client()) is before
        queue.put({})
        queue.get(timeout=5).requeue()
        queue.get(timeout=5).ack()
        channel.qos.restore_visible()
    with valkey.client() as client:
        assert not client.exists("unacked", "shop-unacked", "held", "shop-held")


def test_a_kombu_that_makes_its_clients_otherwise_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Channel:
        def Client(self) -> object:  # noqa: N802 - kombu's own name
            return object()

    channel = Channel()
    keep_client(channel)
    assert channel.Client() is not channel.Client()
    assert "makes its Redis clients in a way that celery-goalstate does not know" in caplog.text


@pytest.mark.parametrize("kept", [True, False])
def test_a_worker_keeps_the_consumers_client_if_it_may(
    make_app: MakeApp, valkey: Valkey, logging_as_it_was: None, kept: bool
) -> None:
    app = make_app(valkey.url, goalstate_keep_client=kept)
    Engine(app)
    with worker_of(app) as worker:
        channel = worker.consumer.task_consumer.channel
        assert (channel._create_client() is channel._create_client()) is kept
        assert type(channel._create_client()) is Redis


def test_what_is_not_needed_any_more_is_closed(app: Celery, valkey: Valkey) -> None:
    before = ids_of(valkey)  # some of them other tests', and closed at any moment
    engine = Engine(app)

    @engine.register
    class Order(Entity):
        rules = Rules({})

    assert engine.enqueue(Order("1")).sent
    parts = engine.parts
    engine._opened = None
    assert ids_of(valkey) - before
    del parts
    gc.collect()
    poll("all are closed", lambda: ids_of(valkey) <= before)
