"""A broker or an index that is down: `enqueue` says what it did, and nothing is lost."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery

from celery_goalstate import Engine, Entity, Requeue
from celery_goalstate.exceptions import IndexUnavailable
from tests.integration.conftest import MakeApp, Truth, World, worker_of
from tests.servers import HOST, Cluster, Process, Valkey, free_port, frozen, poll, require
from tests.versions import needs_redis_py_8

PASSWORD = "s3cr%3At"
TIMEOUT = 0.5  # seconds
SLACK = 1.5  # on a busy machine


def nobody(scheme: str = "redis") -> str:
    return f"{scheme}://user:{PASSWORD}@{HOST}:{free_port()}/0"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    """A server of the test's own, to be killed."""
    with Valkey(tmp_path / "valkey") as server:
        yield server


def engine_on(app: Celery, truth: Truth) -> tuple[Engine, type[Entity]]:
    engine = Engine(app)
    return engine, engine.register(truth.entity(), failure_retry_delay=0.01)


def no_secret(text: str) -> bool:
    return "s3cr" not in text


# The broker --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_without_a_broker_an_enqueue_succeeds_with_a_warning(
    make_app: MakeApp, truth: Truth, valkey: Valkey, caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    app = make_app(broker=nobody(scheme), goalstate_index_url=valkey.url)
    engine, entity = engine_on(app, truth)
    enqueued = engine.enqueue(entity("1"))
    assert enqueued.changed
    assert not enqueued.sent
    assert engine.is_scheduled(entity("1"))
    described = engine.describe(entity("1"))
    assert described is not None
    assert not described.sent, "parked: nobody believes that a message is under way"
    [record] = [record for record in caplog.records if record.name.startswith("celery_goalstate")]
    assert record.levelno == logging.WARNING
    assert "could not publish 1 of kind order, the sweeper will send them later" in caplog.text
    assert no_secret(caplog.text)

    assert engine.enqueue_many(entity(id) for id in range(300)) == 299
    assert engine.counts("order")["order"]["scheduled"] == 300

    working = make_app(broker=valkey.url, task_default_queue=app.main)
    engine_on(working, truth)
    with worker_of(working):
        poll("all evaluated by way of the sweeper", lambda: len(truth.log) == 300, timeout=20)


def test_a_broker_that_is_killed_and_returns(
    make_app: MakeApp, truth: Truth, valkey: Valkey, server: Valkey
) -> None:
    app = make_app(broker=server.url, goalstate_index_url=valkey.url, goalstate_sweep_interval=0.05)
    engine, entity = engine_on(app, truth)
    assert engine.enqueue(entity("before")).sent
    server.kill()
    assert not engine.enqueue(entity("1")).sent
    assert engine.enqueue_many([entity("1"), entity("2")]) == 1
    sweeper = engine._open_sweeper("test")
    assert sweeper.sweep() is False
    server.start()
    assert engine.enqueue(entity("3")).sent, "at once, over the same pool of connections"
    poll("all but the lost one sent", lambda: sweeper.sweep() or _sent(engine) == 4)
    with worker_of(app):
        poll("evaluated", lambda: {"1", "2", "3"} == {id for _, id in truth.log})


def _sent(engine: Engine) -> int:
    return sum(described.sent for described in engine.list("order", status="scheduled"))


def test_a_retry_without_a_broker_is_sent_later(
    make_app: MakeApp, truth: Truth, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message of a failing evaluation cannot be published: it still ends as a RETRY, and goes on."""
    app = make_app(broker=nobody(), goalstate_index_url=valkey.url)
    engine, entity = engine_on(app, truth)

    def fail(ctx: Any, entity: Any) -> None:
        raise ValueError("no")

    truth.set("1", fail)
    engine.enqueue(entity("1"))
    [wakeup] = engine.parts.index.promote("order", {"1": "task-1"})
    result = app.tasks["goalstate.order"].apply([[["1", wakeup.token]]], task_id="task-1", throw=False)
    assert result.state == "RETRY"
    described = engine.describe(entity("1"))
    assert described is not None
    assert (described.status, described.sent, described.failures) == ("scheduled", False, 1)
    assert described.task_id == "task-1", "kept for the retry"


def test_a_soft_time_limit_that_strikes_while_publishing_is_the_actions(
    world: World, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it taken for an error of the broker, the action would go on until it is killed."""
    done = []

    def enqueue(ctx: Any, entity: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(world.app.amqp, "send_task_message", _raise(SoftTimeLimitExceeded()))
            ctx.enqueue(world.entity("2"))
        done.append("too far")

    truth.set("1", enqueue)
    world.engine.enqueue(world.entity("1"))
    [result] = world.run()
    assert result.state == "RETRY"
    assert "SoftTimeLimitExceeded" in str(result.result)
    assert not done
    assert world.engine.is_scheduled(world.entity("2")), "noted all the same"


def test_an_evaluation_ends_well_whatever_becomes_of_its_wake_up(
    world: World, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_again(ctx: Any, entity: Any) -> Requeue:
        return Requeue(5)

    truth.set("1", ask_again)
    for error in (SoftTimeLimitExceeded(), IndexUnavailable()):
        world.engine.enqueue(world.entity("1"))
        [message] = world.messages()
        with monkeypatch.context() as patch:
            patch.setattr(world.app.amqp, "send_task_message", _raise(error))
            patch.setattr(world.index, "put_back", _raise(error))
            [result] = world.run(message)
        assert result.state == "SUCCESS"
        world.clock.advance(70)
        world.sweeper().sweep()
        [lost] = world.messages()
        world.run(lost)
        assert truth.looks("1") == 2
        truth.log.clear()
        world.engine.delete(world.entity("1"))
        world.messages()


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


# The index ---------------------------------------------------------------------------------------


def calls(engine: Engine, entity: Any) -> dict[str, Callable[[], Any]]:
    return {
        "enqueue": lambda: engine.enqueue(entity),
        "prepare": engine.prepare(entity),
        "enqueue_many": lambda: engine.enqueue_many([entity]),
        "is_scheduled": lambda: engine.is_scheduled(entity),
        "describe": lambda: engine.describe(entity),
        "describe_many": lambda: engine.describe_many([entity]),
        "delete": lambda: engine.delete(entity),
        "delete_many": lambda: engine.delete_many([entity]),
        "pause": engine.pause,
        "resume": engine.resume,
        "stop": engine.stop,
        "start": engine.start,
        "paused": lambda: engine.paused("order"),
        "resync": lambda: engine.resync("order"),
        "list": lambda: engine.list("order"),
        "counts": engine.counts,
        "sweep": lambda: engine._open_sweeper("test").sweep(),
    }


@pytest.mark.parametrize(
    "url",
    [
        nobody(),
        nobody("rediss"),
        pytest.param(nobody("redis+cluster"), marks=needs_redis_py_8),
        pytest.param(
            f"{nobody('sentinel')}?master_name=m&sentinel_password={PASSWORD}", marks=needs_redis_py_8
        ),
        f"unix://:{PASSWORD}@/nowhere/redis.sock",
    ],
    ids=lambda url: url.partition("@")[0].partition(":")[0],
)
def test_without_an_index_every_call_says_so(
    make_app: MakeApp, truth: Truth, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    caplog.set_level(logging.DEBUG)
    truth.set("1")
    engine, entity = engine_on(make_app(goalstate_index_url=url), truth)
    for name, call in calls(engine, entity("1")).items():
        with pytest.raises(IndexUnavailable, match=r"^the index did not answer") as caught:
            call()
        error: BaseException | None = caught.value
        while error:
            assert no_secret(f"{error} {error!r}"), name
            error = error.__cause__ or error.__context__
    assert no_secret(caplog.text)
    assert no_secret(repr(engine.settings))


def test_an_index_that_refuses_the_password(make_app: MakeApp, truth: Truth, valkey: Valkey) -> None:
    url = valkey.url.replace("//", f"//user:{PASSWORD}@")
    engine, entity = engine_on(make_app(goalstate_index_url=url), truth)
    with pytest.raises(IndexUnavailable, match=r"^the index refused the user or the password: ") as caught:
        engine.enqueue(entity("1"))
    assert no_secret(str(caught.value))


@needs_redis_py_8
def test_a_cluster_that_refuses_the_password(make_app: MakeApp, truth: Truth, tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        url = cluster.url.replace("//", f"//user:{PASSWORD}@")
        engine, entity = engine_on(make_app(goalstate_index_url=url), truth)
        with pytest.raises(
            IndexUnavailable, match=r"^the index refused the user or the password: "
        ) as caught:
            engine.enqueue(entity("1"))
        assert no_secret(str(caught.value))


def test_an_index_that_accepts_and_says_nothing(
    make_app: MakeApp, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server((HOST, 0)) as silent:
        url = f"redis://{HOST}:{silent.getsockname()[1]}/0"
        engine, entity = engine_on(make_app(goalstate_index_url=url, goalstate_index_timeout=0.05), truth)
        with pytest.raises(IndexUnavailable, match=r"Timeout"):
            engine.enqueue(entity("1"))


def test_a_frozen_index_holds_no_call_up_for_longer_than_the_time(
    make_app: MakeApp, truth: Truth, server: Valkey
) -> None:
    """Whether connected to it or not, and however much the call is about."""
    app = make_app(goalstate_index_url=server.url, goalstate_index_timeout=TIMEOUT)
    engine, entity = engine_on(app, truth)
    for number in range(3):
        engine.register(truth.entity(f"kind-{number}"))
    engine.enqueue(entity("1"))
    many = [entity(str(number)) for number in range(5000)]
    every = {**calls(engine, entity("1")), "enqueue_many": lambda: engine.enqueue_many(many)}
    del every["resync"]
    with frozen(server.pid):
        for name, call in every.items():
            began = time.monotonic()
            with pytest.raises(IndexUnavailable, match="Timeout"):
                call()
            assert time.monotonic() - began < TIMEOUT + SLACK, name


def test_an_index_that_comes_up_later(make_app: MakeApp, truth: Truth, tmp_path: Path) -> None:
    server = Valkey(tmp_path / "index")
    engine, entity = engine_on(make_app(goalstate_index_url=server.url), truth)
    with pytest.raises(IndexUnavailable):
        engine.enqueue(entity("1"))
    with server:
        assert engine.enqueue(entity("1")).sent
        server.kill()
        with pytest.raises(IndexUnavailable):
            engine.enqueue(entity("1"))
        server.start()
        assert engine.enqueue(entity("1")).changed, "a server that saves nothing: it is all new to it"


@needs_redis_py_8
def test_an_index_found_by_a_sentinel(
    make_app: MakeApp, truth: Truth, tmp_path: Path, server: Valkey
) -> None:
    port = free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(f"port {port}\nbind {HOST}\nsentinel monitor shop {HOST} {server.port} 1\n")
    with Process(
        [require("redis-server"), str(config), "--sentinel"], log=tmp_path / "sentinel.log"
    ) as process:
        process.poll_until("it monitors", lambda: "+monitor master shop" in process.output(), timeout=10)
        url = f"sentinel://{HOST}:{free_port()}/1;sentinel://{HOST}:{port}/1?master_name=shop"
        engine, entity = engine_on(make_app(goalstate_index_url=url), truth)
        assert engine.enqueue(entity("1")).changed
        with server.client() as client:
            assert client.info("keyspace").keys() == {"db1"}


def test_both_down(make_app: MakeApp, truth: Truth, server: Valkey) -> None:
    """The index took it, then both went away: it may or may not have been noted."""
    engine, entity = engine_on(make_app(broker=nobody(), goalstate_index_url=server.url), truth)
    put_back = engine.parts.index.put_back

    def after_a_crash(*args: Any) -> None:
        server.kill()
        put_back(*args)

    engine.parts.index.put_back = after_a_crash
    with pytest.raises(IndexUnavailable):
        engine.enqueue(entity("1"))


def test_a_worker_waits_for_its_index(
    make_app: MakeApp, truth: Truth, tmp_path: Path, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    index = Valkey(tmp_path / "index")
    app = make_app(broker=valkey.url, goalstate_index_url=index.url, goalstate_sweep_interval=0.02)
    engine, entity = engine_on(app, truth)
    caplog.set_level(logging.INFO, "celery_goalstate")
    with worker_of(app):
        poll("the sweeper waits", lambda: "the sweeper waits for the index" in caplog.text)
        with index:
            poll("it works", lambda: "the sweeper works again" in caplog.text)
            engine.enqueue(entity("1"), 0.1)
            poll("evaluated", lambda: getattr(engine.describe(entity("1")), "converged", None))
            index.kill()
            poll("it waits again", lambda: caplog.text.count("the sweeper waits for the index") == 2)
            index.start()
            poll("and works again", lambda: caplog.text.count("the sweeper works again") == 2)
            engine.enqueue(entity("2"))
            poll("evaluated", lambda: truth.looks("2"))
            assert caplog.text.count("the sweeper waits for the index") == 2, "told once, not every time"
