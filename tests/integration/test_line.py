"""What a consumer tells Redis of its messages, without waiting (`line`), by way of kombu's own channel."""

from __future__ import annotations

import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Empty
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from kombu import Connection
from redis.exceptions import ConnectionError as Unreachable
from redis.exceptions import OutOfMemoryError, ResponseError

from celery_goalstate import Engine, broker
from celery_goalstate.line import Line
from tests.servers import Valkey, in_a_fork, poll


@pytest.fixture
def client(valkey: Valkey) -> Iterator[Any]:
    with valkey.client() as client:
        yield client
        client.config_set("maxmemory", 0)


@pytest.fixture
def queue(valkey: Valkey) -> Iterator[Any]:
    """A consumer's, whose channel has a line."""
    with Connection(valkey.url) as connection, connection.SimpleQueue("held") as queue:
        broker.keep_client(queue.consumer.channel)
        yield queue


@pytest.fixture
def line(queue: Any) -> Line:
    """The queue's, which was in use just now."""
    queue.put({})
    queue.get(timeout=5).ack()
    line: Line = queue.consumer.channel._create_client()._line
    line.settle()
    return line


@pytest.fixture
def held(queue: Any, line: Line) -> Any:
    """A message that is known to be held."""
    queue.put({})
    message = queue.get(timeout=5)
    line.settle()
    return message


def found(client: Any) -> tuple[int, int, int]:
    """Messages that wait, and those that are held: both of kombu's keys."""
    return client.llen("held"), client.hlen("unacked"), client.zcard("unacked_index")


def raising(error: type[BaseException]) -> Callable[..., None]:
    """Something that goes wrong whenever it is called."""

    def fail(*_: Any) -> None:
        raise error

    return fail


def lose_what_is_said_next(line: Line) -> None:
    """As if the connection broke just then."""
    connection = line._connection

    def shut_down(*_: Any) -> None:
        del connection.send_packed_command
        connection._sock.shutdown(socket.SHUT_RDWR)

    connection.send_packed_command = shut_down


def test_a_message_is_held_until_it_is_acknowledged_or_put_back(queue: Any, client: Any) -> None:
    queue.put({"n": 1})
    message = queue.get(timeout=5)
    poll("it is held", lambda: found(client) == (0, 1, 1))
    message.requeue()
    assert found(client) == (1, 0, 0)
    queue.get(timeout=5).ack()
    poll("it is acknowledged", lambda: found(client) == (0, 0, 0))
    queue.put({"n": 2})
    queue.get(timeout=5).reject()
    poll("it is rejected", lambda: found(client) == (0, 0, 0))


def test_a_worker_needs_one_connection_for_it(
    valkey: Valkey, client: Any, queue: Any, line: Line, logging_as_it_was: None
) -> None:
    for _ in range(20):
        queue.put({})
        queue.get(timeout=5).ack()
    line.settle()
    assert len(queue.consumer.channel.pool._in_use_connections) == 2, "the other one waits for messages"

    app = Celery("worker", broker=valkey.url, set_as_current=False)
    Engine(app)
    ran: list[int] = []

    @app.task(name="run", ignore_result=True, shared=False)
    def run(n: int) -> None:
        ran.append(n)

    with start_worker(app, perform_ping_check=False, shutdown_timeout=30) as worker:
        channel = worker.consumer.task_consumer.channel
        for n in range(20):
            app.send_task("run", (n,))
        poll("all have run", lambda: len(ran) == 20)
        poll("all are acknowledged", lambda: not client.exists("unacked", "unacked_index"))
        assert channel._create_client()._line._connection is not None


# What is refused ----------------------------------------------------------------------------------


def test_after_a_message_that_could_not_be_held_none_is_taken(
    queue: Any, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    client.set("unacked", "no hash")
    queue.put("a secret")
    queue.put("another")
    message = queue.get(timeout=5)
    assert message.payload == "a secret"
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        queue.get(timeout=5)
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        queue.consumer.channel._create_client()._line.settle()
    assert caplog.text.count(f"{message.delivery_tag} is held: WRONGTYPE") == 1, "nobody needs it twice"
    assert b64encode(message.body).decode() not in caplog.text
    client.delete("unacked")


def test_when_there_is_room_again_all_are_held(queue: Any, line: Line, client: Any) -> None:
    queue.put({"n": 1})
    queue.put({"n": 2})
    client.config_set("maxmemory", 1)
    queue.get(timeout=5)
    line._hear()
    client.config_set("maxmemory", 0)
    assert queue.get(timeout=5).payload == {"n": 2}
    assert found(client) == (0, 2, 2)


def test_an_acknowledgement_that_is_refused_is_not_said_with_each_other_one(
    queue: Any, line: Line, client: Any
) -> None:
    for _ in range(5):
        queue.put({})
    messages = [queue.get(timeout=5) for _ in range(5)]
    line.settle()
    client.delete("unacked_index")
    client.set("unacked_index", "no sorted set")
    client.config_resetstat()
    for message in messages:
        message.ack()
    line._hear()
    assert client.info("commandstats")["cmdstat_zrem"]["calls"] == 5
    client.delete("unacked_index")
    line.settle()
    assert not client.hlen("unacked")


def test_a_message_that_a_full_server_could_not_note_is_put_back_when_there_is_room(
    queue: Any, line: Line, client: Any
) -> None:
    queue.put({"n": 1})
    client.config_set("maxmemory", 1)
    message = queue.get(timeout=5)
    with pytest.raises(OutOfMemoryError):
        message.requeue()
    client.config_set("maxmemory", 0)
    message.requeue()
    assert found(client) == (1, 0, 0)


def test_messages_that_a_full_server_could_not_note_are_put_back_when_the_channel_closes(
    queue: Any, line: Line, client: Any
) -> None:
    queue.put({"n": 1})
    client.config_set("maxmemory", 1)
    queue.get(timeout=5)
    client.config_set("maxmemory", 0)
    queue.consumer.channel.close()
    assert found(client) == (1, 0, 0)


def test_a_channel_closes_though_something_is_refused(
    queue: Any, line: Line, held: Any, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    client.delete("unacked_index")
    client.set("unacked_index", "no sorted set")
    held.ack()
    queue.consumer.channel.close()
    assert f"{held.delivery_tag} is acknowledged: WRONGTYPE" in caplog.text
    assert "closed before Redis knows" in caplog.text
    client.delete("unacked_index")


def test_a_channel_closes_though_the_connection_breaks_on_which_it_waits(queue: Any, client: Any) -> None:
    """kombu's own way of closing breaks off there, and a worker could not connect again."""
    with pytest.raises(Empty):
        queue.get(timeout=0.1)
    channel = queue.consumer.channel
    assert channel._in_poll
    client.client_kill_filter(skipme=True)
    with pytest.raises(channel.connection_errors):
        channel.close()
    assert channel.closed


def test_an_interrupt_is_not_kept_waiting_by_closing_once_more(
    queue: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, reads = queue.consumer.channel, []

    def interrupted() -> None:
        reads.append("one")
        raise KeyboardInterrupt

    with pytest.raises(Empty):
        queue.get(timeout=0.1)
    assert channel._in_poll
    with monkeypatch.context() as patched:
        patched.setattr(channel, "_brpop_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            channel.close()
    assert len(reads) == 1


def test_what_cannot_be_said_is_in_nobody_s_way(queue: Any, line: Line, client: Any) -> None:
    with pytest.raises(UnicodeEncodeError):
        line.acknowledge("\ud800", [("HDEL", "unacked", "\ud800")])
    queue.put({})
    queue.get(timeout=5).ack()
    line.settle()
    assert found(client) == (0, 0, 0)


def test_a_channel_closes_whatever_is_wrong_with_its_line(
    queue: Any, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "settle", raising(ValueError))
    queue.consumer.channel.close()
    assert queue.consumer.channel.closed


def test_what_redis_shows_of_a_command_that_it_does_not_know_is_not_logged(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    line.hold("1", [("MULTI",), ("NO_HSET", "unacked", "1", "a secret"), ("EXEC",)])
    with pytest.raises(ResponseError):
        line.settle()
    assert "unknown command" in caplog.text
    assert "secret" not in caplog.text


# What is lost -------------------------------------------------------------------------------------


def test_a_message_whose_hold_was_lost_is_held_again_however_late(
    queue: Any, line: Line, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lose_what_is_said_next(line)
    queue.put({"n": 1})
    message = queue.get(timeout=5)
    assert not client.hlen("unacked")
    line._undone[message.delivery_tag].since = time.monotonic() - 3600
    message.requeue()
    assert found(client) == (1, 0, 0)
    assert not caplog.text


def test_an_acknowledgement_that_was_lost_is_said_again(
    line: Line, held: Any, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lose_what_is_said_next(line)
    held.ack()
    assert client.hlen("unacked") == 1
    line.settle()
    assert found(client) == (0, 0, 0)
    assert not caplog.text


def test_an_acknowledgement_is_not_said_again_after_a_second(
    line: Line, held: Any, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The message may be another worker's by then."""
    lose_what_is_said_next(line)
    held.ack()
    line._undone[held.delivery_tag].since = time.monotonic() - 2
    line.settle()
    assert client.hlen("unacked") == 1
    assert f"{held.delivery_tag} is acknowledged: no answer" in caplog.text


def test_nor_is_it_when_it_took_more_than_a_second_to_connect(
    queue: Any, line: Line, held: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_what_is_said_next(line)
    held.ack()
    pool = queue.consumer.channel.pool
    connect = pool.get_connection

    def connect_slowly() -> Any:
        line._undone[held.delivery_tag].since -= 2
        return connect()

    monkeypatch.setattr(pool, "get_connection", connect_slowly)
    line.settle()
    assert client.hlen("unacked") == 1


def test_nor_is_it_when_nobody_was_there_for_more_than_a_second(
    queue: Any, line: Line, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.put({})
    queue.put({})
    first, second = queue.get(timeout=5), queue.get(timeout=5)
    line.settle()
    with monkeypatch.context() as away:
        away.setattr(line, "_connect", raising(Unreachable))
        with pytest.raises(Unreachable):
            first.ack()
    line._undone[first.delivery_tag].since -= 2
    second.ack()
    line.settle()
    assert client.hkeys("unacked") == [first.delivery_tag]


def test_whoever_is_interrupted_while_it_hangs_up_leaves_a_line_that_works(
    queue: Any, line: Line, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.put({})
    message = queue.get(timeout=5)
    line._connection.disconnect()
    with monkeypatch.context() as interrupted:
        interrupted.setattr(queue.consumer.channel.pool, "release", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            message.ack()
    line.settle()
    assert found(client) == (0, 0, 0)


def test_what_was_refused_and_then_lost_is_no_refusal(queue: Any, line: Line, client: Any) -> None:
    """A worker ends when it is refused, and connects again when its connection breaks."""
    queue.put({})
    client.config_set("maxmemory", 1)
    message = queue.get(timeout=5)
    line._hear()
    lose_what_is_said_next(line)
    with pytest.raises(Unreachable):
        line.settle()
    client.config_set("maxmemory", 0)
    message.requeue()
    assert found(client) == (1, 0, 0)


def test_who_has_hung_up_is_told_over_another_connection(queue: Any, line: Line, client: Any) -> None:
    """At once: nobody may look at the reply for as long as the task runs."""
    in_use = queue.consumer.channel.pool._in_use_connections
    before = len(in_use)
    for each in client.client_list():
        if each["cmd"] == "exec":
            client.client_kill_filter(_id=each["id"])
    queue.put({})
    queue.get(timeout=5)
    poll("it is held", lambda: client.hlen("unacked") == 1)
    assert len(in_use) == before


def test_to_settle_connects_nobody_if_nothing_is_undone(line: Line, client: Any) -> None:
    client.client_kill_filter(skipme=True)
    before = client.info("stats")["total_connections_received"]
    line.settle()
    assert client.info("stats")["total_connections_received"] == before


def test_what_was_said_long_ago_is_no_sign_of_life(queue: Any, line: Line, client: Any) -> None:
    queue.put({})
    message = queue.get(timeout=5)
    line._connection.health_check_interval = 60
    line._connection.next_health_check = 0.001  # long ago
    before = client.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"]
    message.ack()
    assert client.info("commandstats")["cmdstat_ping"]["calls"] == before + 1


# What comes late ----------------------------------------------------------------------------------


@pytest.fixture
def far_away(line: Line, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is said arrives at the server only when somebody listens to its reply."""
    connection, under_way = line._connection, []
    send, read = connection.send_packed_command, connection.read_response

    def depart(command: Any, *, check_health: bool = True) -> None:
        if check_health:
            under_way.append(command)
        else:  # said on connecting
            send(command, check_health=False)

    def arrive_and_read(**options: Any) -> Any:
        while under_way:
            command = under_way.pop(0)
            if connection._sock is not None:  # or else it is lost
                send(command)
        return read(**options)

    monkeypatch.setattr(connection, "send_packed_command", depart)
    monkeypatch.setattr(connection, "read_response", arrive_and_read)
    return under_way


@pytest.fixture
def message(queue: Any, far_away: list[Any]) -> Any:
    """Its consumer has said that it holds it."""
    queue.put({})
    message = queue.get(timeout=5)
    assert far_away, "nobody waited"
    return message


def test_a_message_is_put_back_once_it_is_held(message: Any, client: Any) -> None:
    message.requeue()
    assert found(client) == (1, 0, 0)


def test_a_message_is_acknowledged_once_it_is_held(queue: Any, message: Any, client: Any) -> None:
    with ThreadPoolExecutor(1) as another:
        another.submit(message.ack).result()
    queue.consumer.channel.close()
    assert found(client) == (0, 0, 0)


@pytest.mark.usefixtures("far_away")
def test_a_message_that_comes_while_the_channel_closes_is_put_back(
    queue: Any, valkey: Valkey, client: Any
) -> None:
    """kombu takes it from the connection on which it waits for messages."""
    with pytest.raises(Empty):
        queue.get(timeout=0.1)
    assert queue.consumer.channel._in_poll
    with Connection(valkey.url) as another, another.SimpleQueue("held") as producer:
        producer.put({})
    queue.consumer.channel.close()
    assert found(client) == (1, 0, 0)


# Who speaks ---------------------------------------------------------------------------------------


def test_threads_that_acknowledge_at_once_share_the_connection(queue: Any, client: Any) -> None:
    channel, together = queue.consumer.channel, threading.Barrier(8)

    def acknowledge(message: Any) -> None:
        together.wait()
        message.ack()

    for n in range(80):
        queue.put({"n": n})
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            list(pool.map(acknowledge, [queue.get(timeout=5) for _ in range(8)]))
    channel._create_client()._line.settle()
    assert found(client) == (0, 0, 0)
    assert len(channel.pool._in_use_connections) == 2, "the other one waits for messages"


@pytest.mark.parametrize("speaking", ["send_packed_command", "read_response"])
def test_whoever_speaks_says_what_comes_meanwhile(
    queue: Any, line: Line, client: Any, speaking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another thread; or of his own, which a signal's handler interrupts."""
    queue.put({})
    queue.put({})
    first, second = queue.get(timeout=5), queue.get(timeout=5)
    speak = getattr(line._connection, speaking)

    def interrupted(*what: Any, **options: Any) -> Any:
        monkeypatch.undo()
        second.ack()
        return speak(*what, **options)

    monkeypatch.setattr(line._connection, speaking, interrupted)
    first.ack()
    poll("both are acknowledged", lambda: found(client) == (0, 0, 0))


def test_what_comes_while_somebody_waits_is_said_then(
    queue: Any, line: Line, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.put({})
    queue.put({})
    first, second = queue.get(timeout=5), queue.get(timeout=5)
    line.settle()
    lose_what_is_said_next(line)
    first.ack()
    read = line._connection.read_response

    def interrupted(**options: Any) -> Any:
        reply = read(**options)  # to what is said once more
        monkeypatch.undo()
        second.ack()
        return reply

    monkeypatch.setattr(line._connection, "read_response", interrupted)
    line.settle()
    poll("both are acknowledged", lambda: found(client) == (0, 0, 0))


def test_a_fork_settles_nothing_for_its_parent(line: Line) -> None:
    """It was forked while another thread spoke, which is not there to end it."""
    with line._speaking:
        assert in_a_fork(line.settle) == "None"


def test_nobody_waits_for_ever_for_who_speaks(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_goalstate.line.PATIENCE", 0.01)
    with line._speaking, pytest.raises(Exception, match="another thread waits"):
        line.settle()
