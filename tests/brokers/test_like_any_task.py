"""On every kind of broker a wake-up is, to others, what Celery itself makes of the same call."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import pytest
from celery import Celery, Task
from celery.signals import after_task_publish, before_task_publish
from kombu import Queue
from kombu.transport.native_delayed_delivery import declare_native_delayed_delivery_exchanges_and_queues
from kombu.utils.uuid import uuid

from celery_goalstate import Engine, Entity, Rules
from celery_goalstate.index.base import Wakeup
from celery_goalstate.messages.wakeup import contents_of
from tests.acceptance.conftest import QUORUM
from tests.servers import RabbitMQ, Valkey, poll

BROKERS: dict[str, tuple[type[Valkey | RabbitMQ], dict[str, Any]]] = {
    "valkey": (Valkey, {}),
    "rabbitmq": (RabbitMQ, {}),
    "quorum": (RabbitMQ, dict(QUORUM)),
}


def route(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> Any:
    return {"queue": task.app.main, "delivery_mode": 1, "priority": task.priority}


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "all that an app may say": {
        "task_default_priority": 5,
        "task_annotations": {"*": {"time_limit": 9, "soft_time_limit": 8}},
        "task_routes": (route,),
        "task_ignore_result": False,
    },
}


class Base(Task):
    def shadow_name(self, args: Any, kwargs: Any, options: Any) -> str:
        return f"shadow of {self.name}"

    def apply_async(self, *args: Any, headers: Any = None, **options: Any) -> Any:
        return super().apply_async(*args, headers={**(headers or {}), "tenant": "acme"}, **options)


@pytest.fixture(scope="module", params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    kind, needed = BROKERS[request.param]
    with kind(tmp_path_factory.mktemp("broker")) as server:
        if needed:
            with Celery(broker=server.url, set_as_current=False).connection() as connection:
                declare_native_delayed_delivery_exchanges_and_queues(connection, "quorum")
        yield server, needed


@contextmanager
def seen_by_others(app: Celery) -> Iterator[list[dict[str, Any]]]:
    """What signals and events tell of each message."""
    seen: list[dict[str, Any]] = []

    def before(sender: str, declare: Any, exchange: Any, headers: Any, **given: Any) -> None:
        queues = [queue.name for queue in declare or ()]
        given |= {"sender": sender, "declare": queues, "exchange": str(exchange), "headers": dict(headers)}
        seen.append(given)

    def after(sender: str, headers: Any, body: Any, exchange: Any, routing_key: str, **_: Any) -> None:
        seen[-1]["after"] = (sender, dict(headers), body, str(exchange), routing_key)

    with app.connection_for_read() as connection:
        sent = []
        receiver = app.events.Receiver(connection, handlers={"task-sent": sent.append})
        with receiver.consumer_context() as (listening, _, _):
            with suppress(TimeoutError):  # on Redis this subscribes
                listening.drain_events(timeout=0.1)
            before_task_publish.connect(before)
            after_task_publish.connect(after)
            try:
                yield seen
            finally:
                before_task_publish.disconnect(before)
                after_task_publish.disconnect(after)

            def all_came() -> bool:
                listening.drain_events(timeout=5)
                return len(sent) == len(seen)

            poll("all events came", all_came)
    for message, event in zip(seen, sent, strict=True):
        own = {"timestamp", "local_received", "clock"}
        message["event"] = {name: value for name, value in event.items() if name not in own}


def in_the_queue(app: Celery, name: str) -> dict[str, Any]:
    """A message as it lies there."""
    with app.connection_for_read() as connection, connection.channel() as channel:
        queue: Queue = app.amqp.queues[name](channel)
        message = poll("a message came", lambda: queue.get(no_ack=True), timeout=10)
        own = {"delivery_tag"}
        properties = {name: value for name, value in message.properties.items() if name not in own}
        info = {name: value for name, value in message.delivery_info.items() if name not in own}
        info.pop("message_count", None)
        return {
            "headers": message.headers,
            "properties": properties,
            "body": message.payload,
            "type": (message.content_type, message.content_encoding),
            "info": info,
        }


class Time(NamedTuple):
    """Equal to those within a few seconds."""

    at: datetime

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Time) and abs((self.at - other.at).total_seconds()) < 5

    __hash__ = None  # type: ignore[assignment]  # as a class without a hash has it


def with_times(value: Any) -> Any:
    match value:
        case dict():
            return {key: with_times(each) for key, each in value.items()}
        case list() | tuple():
            return [with_times(each) for each in value]
        case str() if re.match(r"20\d\d-\d\d-\d\dT", value):
            return Time(datetime.fromisoformat(value))
    return value


@pytest.mark.parametrize(("retries", "delay"), [(0, 0.0), (2, 4.5)])
@pytest.mark.parametrize("base", [Task, Base])
@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_what_celery_makes_of_the_same_call(
    broker: Any, options: str, base: Any, retries: int, delay: float
) -> None:
    server, needed = broker
    app = Celery(uuid(), broker=server.url, set_as_current=False)
    app.conf.update(
        goalstate_index_url="memory://", task_send_sent_event=True, task_default_queue=app.main, **needed
    )
    app.conf.update(OPTIONS[options])
    engine = Engine(app)

    @engine.register(base=base)
    class Order(Entity):
        rules = Rules({})

    wakeup = Wakeup("1", "17", int(1000 * delay), uuid(), retries)
    args, kwargs, argsrepr, kwargsrepr = contents_of("order", [wakeup])
    more = {"serializer": "json", "argsrepr": argsrepr, "kwargsrepr": kwargsrepr, "retries": retries}
    task = app.tasks["goalstate.order"]
    by_celery = partial(
        task.apply_async, args, kwargs, task_id=wakeup.task_id, countdown=delay or None, **more
    )
    publisher = engine.parts.publisher
    with seen_by_others(app) as seen:
        by_celery()
        assert publisher.dispatch(engine.kind("order"), [wakeup], enqueued=True)
        publisher.publish_at_once(engine.kind("order"), [wakeup])
        by_celery()
        assert publisher.dispatch(engine.kind("order"), [wakeup] * 2, enqueued=True)
    celerys, *ours = with_times(seen)
    for each in ours[:1] + ours[2:]:
        assert each == celerys
    ours[1].pop("retry_policy"), celerys.pop("retry_policy")
    assert ours[1] == celerys, "which a sweeper does not try again"
    if not (needed and delay):  # else it is RabbitMQ's for some seconds
        first, *others = with_times([in_the_queue(app, app.main) for _ in seen])
        assert all(each == first for each in others)
    app.close()


@pytest.mark.parametrize("delay", [0.02, 0.4, 1.4])
def test_delays_of_less_than_a_second_are_kept(broker: Any, delay: float) -> None:
    """RabbitMQ itself knows whole seconds only; Celery raises an error for less."""
    server, needed = broker
    app = Celery(uuid(), broker=server.url, set_as_current=False)
    app.conf.update(goalstate_index_url="memory://", task_default_queue=app.main, **needed)
    engine = Engine(app)

    @engine.register
    class Order(Entity):
        rules = Rules({})

    sent: list[tuple[float, bool]] = []

    def before(headers: Any, routing_key: str, **_: Any) -> None:
        now = datetime.now(UTC)
        # None: it took longer than the delay until it was published.
        ahead = (datetime.fromisoformat(headers["eta"]) - now).total_seconds() if headers["eta"] else 0.0
        sent.append((ahead, routing_key.startswith("0.")))

    before_task_publish.connect(before)
    try:
        assert engine.enqueue(Order("1"), delay).sent
    finally:
        before_task_publish.disconnect(before)
    assert sent == [(pytest.approx(delay, abs=0.3), bool(needed) and delay > 1)]
    app.close()
