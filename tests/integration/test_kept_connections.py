"""Connections that are kept: to the index (`index.server`) and to the broker (`broker`)."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from kombu import Connection, Exchange, Queue
from kombu.utils.uuid import uuid
from redis import Redis, Sentinel
from redis.backoff import NoBackoff
from redis.credentials import UsernamePasswordCredentialProvider
from redis.exceptions import ConnectionError as Unreachable
from redis.retry import Retry

from celery_goalstate import Engine, Entity, broker
from celery_goalstate.broker import Producers
from celery_goalstate.index import open_index
from celery_goalstate.index.base import Request, Wakeup
from celery_goalstate.index.server import Server, server_of
from celery_goalstate.settings import Settings
from tests.servers import HOST, Valkey, poll


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


def test_what_was_idle_is_looked_at_before_it_is_used(server: Server, valkey: Valkey) -> None:
    """A server or a proxy may have closed it: a call that is made once only must not fail for that."""
    before = own_id(server)
    with valkey.client() as other:
        assert other.client_kill_filter(_id=before) == 1
    assert server.exchange([("ECHO", "1")], fresh=0.0) == ["1"]
    assert own_id(server) != before


def test_what_breaks_between_two_calls_costs_one_error(server: Server, valkey: Valkey) -> None:
    before = own_id(server)
    with valkey.client() as other:
        assert other.client_kill_filter(_id=before) == 1
    [error] = server.exchange([("ECHO", "1")])
    assert isinstance(error, Unreachable)
    assert server.exchange([("ECHO", "1")]) == ["1"]


def test_whoever_is_interrupted_leaves_no_reply_to_the_next(server: Server, client: Any) -> None:
    before = own_id(server)
    connection = server._idle[-1].connection
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


def test_what_is_told_is_done_and_nobody_else_gets_its_replies(server: Server) -> None:
    before = own_id(server)
    server.tell([("RPUSH", "told", "1"), ("RPUSH", "told", "2")])
    assert server.exchange([("LRANGE", "told", "0", "-1")]) == [["1", "2"]]
    server.tell([("RPUSH", "told", "3")])
    server.tell([("RPUSH", "told", "4")])
    assert own_id(server) == before
    assert server.exchange([("LLEN", "told")]) == [4]


def test_what_is_told_and_refused_is_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.exchange([("SET", "text", "1")])
    for told in [
        [("RPUSH", "text", "2"), ("SET", "other", "3")],
        [("MULTI",), ("RPUSH", "text", "2"), ("SET", "other", "3"), ("EXEC",)],
    ]:
        server.tell(told)
        assert server.exchange([("MGET", "text", "other")]) == [["1", "3"]]
        assert "may not have done what it was told" in caplog.text
        assert "RPUSH text 2" in caplog.text
        assert "WRONGTYPE" in caplog.text
        caplog.clear()


def test_whoever_hangs_up_is_told_over_another_connection(server: Server, valkey: Valkey) -> None:
    before = own_id(server)
    server.tell([("CLIENT", "KILL", "ID", str(before), "SKIPME", "no"), ("SET", "told", "1")])
    assert server.exchange([("EXISTS", "told")], fresh=60) == [1]
    before = own_id(server)
    with valkey.client() as other:
        other.client_kill_filter(_id=before)
    server.tell([("SET", "once more", "1")])
    assert server.exchange([("EXISTS", "once more")]) == [1]


def lose_what_is_sent_next(server: Server) -> None:
    """As if the connection broke just then."""
    connection = server._idle[-1].connection

    def shut_down(*_: Any) -> None:
        del connection.send_packed_command
        connection._sock.shutdown(socket.SHUT_RDWR)

    connection.send_packed_command = shut_down


def test_what_is_told_and_lost_is_said_again(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    own_id(server)
    lose_what_is_sent_next(server)
    server.tell([("SET", "told", "1")])
    server.settle()
    assert server.exchange([("GET", "told")]) == ["1"]
    assert not caplog.text


def test_what_is_told_and_lost_is_not_said_again_after_a_while(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else may have said something since."""
    own_id(server)
    lose_what_is_sent_next(server)
    server.tell([("SET", "told", "1")])
    server._idle.append(server._idle.pop()._replace(since=time.monotonic() - 2))
    assert server.exchange([("EXISTS", "told")]) == [0]
    assert "SET told 1: no answer" in caplog.text


def test_to_settle_opens_no_connection_if_there_is_nothing_to_settle(server: Server, valkey: Valkey) -> None:
    mine = own_id(server)
    with valkey.client() as other:
        other.client_kill_filter(_id=mine)
        server._idle.append(server._idle.pop()._replace(since=time.monotonic() - 2))
        before = other.info("stats")["total_connections_received"]
        server.settle()
        assert other.info("stats")["total_connections_received"] == before


def test_what_was_said_long_ago_is_no_sign_of_life(valkey: Valkey) -> None:
    with Redis.from_url(valkey.url, health_check_interval=60) as client:
        server = server_of(client)
        server.tell([("SET", "told", "1")])
        server._idle[-1].connection.next_health_check = 0.0  # long ago
        before = client.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"]
        server.exchange([("GET", "told")])
        assert client.info("commandstats")["cmdstat_ping"]["calls"] == before + 1


def in_a_fork(what: Callable[[], Any]) -> str:
    """What a forked process has to say, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, str(what()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def test_a_fork_gets_a_connection_of_its_own(server: Server) -> None:
    mine = own_id(server)
    its = int(in_a_fork(lambda: own_id(server)))
    assert its != mine
    assert own_id(server) == mine, "which the fork did not close"


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
        first, second = server._take(), server._take()
        server._idle += [first, second]
        with valkey.client() as other:
            other.client_kill_filter(_id=own_id(server))
        master[0] = (HOST, successor.port)
        [lost] = server.exchange([("PING",)], fresh=60)  # or it would ask, and find out, after a second
        assert isinstance(lost, Unreachable)

        def port() -> int:
            [said] = server.exchange([("CONFIG", "GET", "port")])
            return int(dict(said)["port"] if isinstance(said, dict) else said[1])

        assert port() == successor.port
        server._idle.rotate()
        assert port() == successor.port
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
    producers = Producers(app)
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
    producers, took = Producers(app), []
    with valkey.client() as client:
        for _ in range(4):
            with producers.borrowed() as producer:
                publish(producer)
            took.append({each["id"] for each in client.client_list() if each["cmd"] == "lpush"})
    assert len(took[-1]) == 1
    assert took[-1] == took[-2]


def test_a_key_prefix_is_kept(app: Celery, valkey: Valkey) -> None:
    app.conf.broker_transport_options = {"global_keyprefix": "shop-"}
    producers = Producers(app)
    for _ in range(3):
        with producers.borrowed() as producer:
            publish(producer)
    with valkey.client() as client:
        assert client.llen("shop-wake-ups") == 3


def test_after_an_error_another_one_is_opened(app: Celery) -> None:
    producers = Producers(app)
    with suppress(KeyError), producers.borrowed() as first:
        publish(first)
        raise KeyError
    assert not first.connection.connected
    with producers.borrowed() as second:
        publish(second)
    assert second is not first


def test_as_many_as_the_limit_says(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    producers, came = Producers(app), threading.Event()
    monkeypatch.setattr(broker, "PATIENCE", 30.0)

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
    monkeypatch.setattr(broker, "PATIENCE", 0.01)
    producers = Producers(app)
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
            producers, together = Producers(app), threading.Barrier(8)

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
    with Producers(app).borrowed() as producer:
        publish(producer)
    poll("it is closed", lambda: ids_of(valkey) <= before)


def test_a_fork_publishes_by_a_producer_of_its_own(app: Celery, valkey: Valkey) -> None:
    producers = Producers(app)

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
        pass

    assert engine.enqueue(Order("1")).sent
    with valkey.client() as client:
        client.client_kill_filter(skipme=True)
    assert engine.enqueue(Order("2")).sent


@pytest.mark.parametrize("patient", [True, False])
def test_what_kombu_does_not_repeat_is_sent_though_the_broker_has_just_hung_up(
    app: Celery, valkey: Valkey, patient: bool
) -> None:
    topic = Queue("wake-ups", Exchange("topics", "topic"), routing_key="wake-ups.#")  # bindings are looked up
    app.conf.update(
        goalstate_index_url="memory://",
        task_queues=[topic],
        task_default_exchange="topics",
        task_default_exchange_type="topic",
        task_default_routing_key="wake-ups.1",
    )
    publisher = Engine(app)._parts.publisher
    wakeups = [Wakeup(str(n), "1", 0, uuid()) for n in range(1 + patient)]
    for _ in range(3):
        assert publisher.dispatch("order", wakeups, patient=patient)
        with valkey.client() as client:
            client.client_kill_filter(skipme=True)


def test_a_batch_is_sent_over_the_only_connection_that_is_allowed(app: Celery, valkey: Valkey) -> None:
    app.conf.update(goalstate_index_url="memory://", broker_transport_options={"max_connections": 1})
    publisher = Engine(app)._parts.publisher
    for _ in range(3):
        assert publisher.dispatch("order", [Wakeup("1", "1", 0, uuid())])
        assert publisher.dispatch("order", [Wakeup(id, "1", 0, uuid()) for id in "12"])
    with valkey.client() as client:
        assert client.llen("wake-ups") == 9


def test_a_worker_acknowledges_by_one_client_and_one_connection(
    app: Celery, valkey: Valkey, logging_as_it_was: None
) -> None:
    Engine(app)
    ran: list[int] = []

    @app.task(name="run", ignore_result=True, shared=False)
    def run(n: int) -> None:
        ran.append(n)

    with start_worker(app, perform_ping_check=False, shutdown_timeout=30) as worker:
        channel = worker.consumer.task_consumer.channel
        kept = channel._create_client()
        for n in range(20):
            app.send_task("run", (n,))
        poll("all have run", lambda: len(ran) == 20)
        with valkey.client() as client:
            poll("all are acknowledged", lambda: not client.exists("unacked", "unacked_index"))
        assert channel._create_client() is kept
        assert len(kept.line._server._idle) == 1


@pytest.fixture
def queue(app: Celery) -> Iterator[Any]:
    """What a consumer has that keeps its client."""
    with app.connection_for_read() as connection, connection.SimpleQueue("held") as queue:
        broker.keep_client(queue.consumer.channel)
        yield queue


def test_a_message_is_held_until_it_is_acknowledged_or_put_back(queue: Any, valkey: Valkey) -> None:
    with valkey.client() as client:

        def found() -> tuple[int, int, int]:
            return client.llen("held"), client.hlen("unacked"), client.zcard("unacked_index")

        queue.put({"n": 1})
        message = queue.get(timeout=5)
        assert found() == (0, 1, 1)
        message.requeue()
        assert found() == (1, 0, 0)
        queue.get(timeout=5).ack()
        poll("it is acknowledged", lambda: found() == (0, 0, 0))
        queue.put({"n": 2})
        queue.get(timeout=5).reject()
        poll("it is rejected", lambda: found() == (0, 0, 0))


def test_a_message_that_cannot_be_held_is_delivered_and_a_word_in_the_log(
    queue: Any, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """kombu raises, and loses the message: it is in no queue any more."""
    queue.put("a secret")
    with valkey.client() as client:
        client.set("unacked", "no hash")
        message = queue.get(timeout=5)
        assert message.payload == "a secret"
        queue.consumer.channel._create_client().line.settle()
        assert f"HSET unacked {message.delivery_tag}" in caplog.text
        assert "WRONGTYPE" in caplog.text
        assert b64encode(message.body).decode() not in caplog.text
        client.delete("unacked")


@pytest.fixture
def message(queue: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that its consumer says it holds, but the server is so far away that it hears it late."""
    queue.put({})
    queue.get(timeout=5).ack()
    line = queue.consumer.channel._create_client().line
    line.settle()
    connection, under_way = line._server._idle[-1].connection, []
    send, read = connection.send_packed_command, connection.read_response

    def arrive_and_read() -> Any:
        while under_way:
            send(*under_way.pop(0))
        return read()

    monkeypatch.setattr(connection, "send_packed_command", lambda *what: under_way.append(what))
    monkeypatch.setattr(connection, "read_response", arrive_and_read)
    queue.put({})
    message = queue.get(timeout=5)
    assert under_way, "nobody waited"
    return message


def test_a_message_is_put_back_once_it_is_held(message: Any, valkey: Valkey) -> None:
    message.requeue()
    with valkey.client() as client:
        assert (client.llen("held"), client.hlen("unacked"), client.zcard("unacked_index")) == (1, 0, 0)


def test_a_message_is_acknowledged_once_it_is_held(queue: Any, message: Any, valkey: Valkey) -> None:
    with ThreadPoolExecutor(1) as another, valkey.client() as client:
        another.submit(message.ack).result()
        queue.consumer.channel.close()
        assert client.hlen("unacked") == 0


def test_a_signals_handler_may_speak_while_its_thread_speaks(queue: Any, valkey: Valkey) -> None:
    """On a cold shutdown Celery acknowledges in one."""
    queue.put({})
    queue.put({})
    first, second = queue.get(timeout=5), queue.get(timeout=5)
    line = queue.consumer.channel._create_client().line
    line.settle()
    connection = line._server._idle[-1].connection
    send = connection.send_packed_command

    def interrupted(*what: Any) -> None:
        del connection.send_packed_command
        second.ack()
        send(*what)

    connection.send_packed_command = interrupted
    first.ack()
    with valkey.client() as client:
        poll("both are acknowledged", lambda: not client.exists("unacked", "unacked_index"))


def test_a_fork_settles_nothing_for_its_parent(queue: Any) -> None:
    """It was forked while another thread had its turn, who is not there to end it."""
    line = queue.consumer.channel._create_client().line
    began, ends = threading.Event(), threading.Event()

    def take_long() -> None:
        with line._turn:
            began.set()
            ends.wait(30)

    with ThreadPoolExecutor(1) as another:
        another.submit(take_long)
        assert began.wait(5)
        assert in_a_fork(line.settle) == "None"
        ends.set()


def test_many_that_acknowledge_at_once_leave_connections_to_others(queue: Any, valkey: Valkey) -> None:
    channel, together = queue.consumer.channel, threading.Barrier(8)

    def acknowledge(message: Any) -> None:
        together.wait()
        message.ack()

    for n in range(80):
        queue.put({"n": n})
    with ThreadPoolExecutor(8) as pool, valkey.client() as client:
        for _ in range(10):
            list(pool.map(acknowledge, [queue.get(timeout=5) for _ in range(8)]))
        channel._create_client().line.settle()
        assert client.hlen("unacked") == 0
    assert len(channel.pool._in_use_connections) == 1


def test_an_acknowledgement_is_done_before_the_channel_is_closed(
    app: Celery, queue: Any, valkey: Valkey
) -> None:
    queue.put({})
    message = queue.get(timeout=5)
    with valkey.client() as client:
        client.client_pause(500, all=False)  # writes only: as when a master hands over
        message.ack()
        queue.consumer.channel.close()
        assert client.hlen("unacked") == 0


def transport(**options: Any) -> dict[str, Any]:
    return {"transport_options": options}


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({}, True),
        (transport(max_connections=None), True),
        (transport(max_connections=3), True),
        (transport(max_connections=2), False),
        (transport(retry_on_timeout=True), False),
        (transport(global_keyprefix="shop-"), False),
        ({"credential_provider": UsernamePasswordCredentialProvider("default", "any")}, False),
    ],
    ids=["as usual", "no limit", "three", "two", "repeated", "prefixed", "logs in again"],
)
def test_what_ours_cannot_do_is_left_to_redis_py(valkey: Valkey, options: dict[str, Any], ours: bool) -> None:
    with Connection(valkey.url, **options) as connection, connection.SimpleQueue("held") as queue:
        channel = queue.consumer.channel
        broker.keep_client(channel)
        assert isinstance(channel._create_client(), broker._Client) is ours
        queue.put({})
        queue.get(timeout=5).requeue()
        queue.get(timeout=5).ack()
        channel.qos.restore_visible()
    with valkey.client() as client:
        assert not client.exists("unacked", "shop-unacked", "held", "shop-held")


def test_what_is_not_needed_any_more_is_closed(app: Celery, valkey: Valkey) -> None:
    before = ids_of(valkey)  # some of them other tests', and closed at any moment
    engine = Engine(app)

    @engine.register
    class Order(Entity):
        pass

    assert engine.enqueue(Order("1")).sent
    parts = engine._parts
    engine._opened = None
    assert ids_of(valkey) - before
    del parts
    gc.collect()
    poll("all are closed", lambda: ids_of(valkey) <= before)
