"""A wake-up is a task of Celery like any other in what others see: options, routers, signals, wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery, Task
from celery.signals import after_task_publish, before_task_publish
from kombu import Exchange, Queue
from kombu.utils.uuid import uuid

from celery_goalstate import Engine, Entity
from tests.integration.conftest import MakeApp, Truth, World, worker_of
from tests.servers import poll


@contextmanager
def published() -> Iterator[list[dict[str, Any]]]:
    """What handlers of `before_task_publish` are given."""
    seen: list[dict[str, Any]] = []

    def note(sender: str, declare: Any, properties: Any, headers: Any, **given: Any) -> None:
        queues = [queue.name for queue in declare or ()]
        seen.append({"name": sender, "declare": queues, **given, **properties, "headers": dict(headers)})

    before_task_publish.connect(note)
    try:
        yield seen
    finally:
        before_task_publish.disconnect(note)


# Options and routing ------------------------------------------------------------------------------


class Slow(Task):
    queue = "guests-slow"


class Urgent(Task):
    priority = 7


class Elsewhere(Task):
    exchange, routing_key = "guests-others", "guests-others.fast"


class Compressed(Task):
    compression, time_limit, soft_time_limit = "zlib", 50, 40


def route(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> Any:
    return (
        {"queue": f"guests-by-router-{task.priority}"}
        if task is not None
        else {"queue": "guests-unknown task"}
    )


ANNOTATED = {"*": {"priority": 2, "delivery_mode": 1}}


@pytest.mark.parametrize(
    ("base", "conf"),
    [
        (Task, {}),
        (Task, {"task_default_priority": 5}),
        (Task, {"task_annotations": ANNOTATED}),
        (
            Task,
            {
                "task_routes": {
                    "goalstate.*": {"queue": "guests-routed", "priority": 1},
                    "plain": {"queue": "guests-routed", "priority": 1},
                }
            },
        ),
        (Task, {"task_routes": (route,), "task_default_priority": 4}),
        (Task, {"task_time_limit": 70, "task_soft_time_limit": 60}),
        (
            Task,
            {
                "task_queues": [Queue("guests-wide", Exchange("guests-wide", "topic"), "guests-wide.#")],
                "task_default_queue": "guests-wide",
            },
        ),
        (Slow, {}),
        (Slow, {"task_default_priority": 5, "task_routes": (route,)}),
        (Urgent, {"task_default_priority": 5}),
        (Elsewhere, {}),
        (Compressed, {"task_default_delivery_mode": 1}),
        (Urgent, {"task_inherit_parent_priority": True, "task_publish_retry_policy": {"max_retries": 9}}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or ", ".join(value) or "as it is",
)
def test_options_of_the_app_and_of_the_base_class_hold(
    make_app: MakeApp, truth: Truth, base: type[Task[Any, Any]], conf: dict[str, Any]
) -> None:
    app = make_app(**conf)
    engine = Engine(app)
    entity = engine.register(base=base)(truth.entity())

    @app.task(name="plain", base=base, ignore_result=True, shared=False)
    def plain(pairs: Any) -> None:
        pass

    own = {"name", "headers", "body", "correlation_id", "argsrepr", "kwargsrepr"}
    with published() as seen:
        for id in range(3):
            plain.apply_async(([[str(id), "1"]],))
            assert engine.enqueue(entity(id)).sent
    plains, wakeups = seen[::2], seen[1::2]
    assert {message["name"] for message in wakeups} == {"goalstate.order"}
    for theirs, ours in zip(plains, wakeups, strict=True):
        assert {name: value for name, value in ours.items() if name not in own} == {
            name: value for name, value in theirs.items() if name not in own
        }
        assert ours["declare"], "an empty list would be of no use to handlers"
        assert ours["headers"]["timelimit"] == theirs["headers"]["timelimit"]


def test_options_of_the_kind_come_before_those_of_its_base_class(make_app: MakeApp, truth: Truth) -> None:
    engine = Engine(make_app())
    entity = engine.register(base=Slow, queue="guests-fast", priority=3)(truth.entity())
    with published() as seen:
        engine.enqueue(entity("1"))
    assert (seen[0]["routing_key"], seen[0]["priority"]) == ("guests-fast", 3)


def test_a_base_class_cannot_let_wake_ups_expire(make_app: MakeApp, truth: Truth) -> None:
    class Short(Task):
        expires = 30

    engine = Engine(make_app())
    entity = engine.register(base=Short)(truth.entity())
    with published() as seen:
        engine.enqueue(entity("1"))
    assert seen[0]["headers"]["expires"] is None
    assert "expiration" not in seen[0]


def test_a_handler_can_add_to_what_is_declared(make_app: MakeApp, truth: Truth) -> None:
    engine = Engine(make_app())
    entity = engine.register(truth.entity())

    def declare_copy(declare: list[Any], **_: Any) -> None:
        declare.append(Queue("guests-copies", durable=False))

    before_task_publish.connect(declare_copy)
    try:
        for id in range(2):
            assert engine.enqueue(entity(id)).sent
    finally:
        before_task_publish.disconnect(declare_copy)
    with engine.app.connection_for_write() as connection:
        assert connection.channel().queue_declare("guests-copies", passive=True)


def test_handlers_are_told_before_and_after(world: World) -> None:
    heard = []

    def before(sender: str, **_: Any) -> None:
        heard.append(f"before {sender}")

    def after(sender: str, headers: Any, **_: Any) -> None:
        heard.append(f"after {sender} {headers['kwargsrepr']}")

    before_task_publish.connect(before)
    after_task_publish.connect(after)
    try:
        world.engine.enqueue(world.entity("1"))
    finally:
        before_task_publish.disconnect(before)
        after_task_publish.disconnect(after)
    assert heard == ["before goalstate.order", "after goalstate.order {'entity': 'order/1'}"]


# Those who wrap how messages are sent -------------------------------------------------------------

tenant: ContextVar[str] = ContextVar("tenant", default="public")


class TenantApp(Celery):
    """As packages for many tenants do it."""

    def send_task(self, name: str, *args: Any, **options: Any) -> Any:
        options["headers"] = {**(options.get("headers") or {}), "x_tenant": tenant.get()}
        return super().send_task(name, *args, **options)


class TenantTask(Task):
    """As others do it."""

    def apply_async(self, *args: Any, headers: Any = None, **options: Any) -> Any:
        return super().apply_async(*args, headers={**(headers or {}), "x_tenant": tenant.get()}, **options)


def wrap_instance(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    send: Any = app.send_task
    monkeypatch.setattr(app, "send_task", lambda *args, **more: send(*args, **_with_tenant(more)))


def wrap_class(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tracers do it, once for the process."""
    send: Any = Celery.send_task
    monkeypatch.setattr(Celery, "send_task", lambda *args, **more: send(*args, **_with_tenant(more)))


def wrap_task_class(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    send: Any = Task.apply_async
    monkeypatch.setattr(Task, "apply_async", lambda *args, **more: send(*args, **_with_tenant(more)))


def _with_tenant(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "headers": {**(options.get("headers") or {}), "x_tenant": tenant.get()}}


@pytest.mark.parametrize("wrap", [wrap_instance, wrap_class, wrap_task_class])
@pytest.mark.parametrize("many", [False, True])
def test_whoever_wraps_it_is_asked(
    world: World, monkeypatch: pytest.MonkeyPatch, wrap: Callable[..., None], many: bool
) -> None:
    wrap(world.app, monkeypatch)
    tenant_was = tenant.set("acme")
    try:
        world.engine.enqueue_many(map(world.entity, range(3 if many else 1)))
    finally:
        tenant.reset(tenant_was)
    messages = world.messages()
    assert len(messages) == (3 if many else 1)
    assert {message.headers["x_tenant"] for message in messages} == {"acme"}


def test_a_kind_of_another_code_base_is_sent_by_the_app(make_app: MakeApp) -> None:
    app = TenantApp(uuid(), broker="memory://", set_as_current=False)
    engine = Engine(app)
    engine.declare("invoice", queue="guests-billing")
    with published() as seen:
        engine.enqueue(engine.ref("invoice", "1"))
    assert (seen[0]["routing_key"], seen[0]["headers"]["x_tenant"]) == ("guests-billing", "public")
    assert seen[0]["headers"]["ignore_result"] is True
    app.close()


def test_what_flower_shows_is_the_same_however_it_is_sent(world: World) -> None:
    world.engine.enqueue(world.entity("1"))
    [message] = world.messages()
    assert message.headers["kwargsrepr"] == "{'entity': 'order/1'}"
    assert message.headers["shadow"] is None


def test_a_base_class_that_gives_tasks_other_names_to_show(make_app: MakeApp, truth: Truth) -> None:
    class Shown(Task):
        def shadow_name(self, args: Any, kwargs: Any, options: Any) -> str:
            return f"{self.name} of {args[0][0][0]}"

    engine = Engine(make_app())
    entity = engine.register(base=Shown)(truth.entity())
    with published() as seen:
        engine.enqueue(entity("1"))
    assert seen[0]["headers"]["shadow"] == "goalstate.order of 1"


# Parents ------------------------------------------------------------------------------------------


def test_an_enqueue_by_an_action_is_the_child_of_that_evaluation_and_nothing_else_is_anybodys(
    make_app: MakeApp, truth: Truth, logging_as_it_was: None
) -> None:
    """As with Celery's tasks and their retries. An entity that is evaluated for ever is no endless chain."""
    app = make_app(broker="memory://", goalstate_failure_retry_delay=0.01)
    engine = Engine(app)
    entity, seen = engine.register(truth.entity()), []

    def see(ctx: Any, entity: Entity) -> None:
        request = ctx.task
        seen.append((entity.id, request.id, request.root_id, request.parent_id, request.children))
        if entity.id == "parent" and len(seen) == 1:
            ctx.enqueue(engine.ref("order", "child"))
            ctx.enqueue(entity)  # published when this has ended
        elif entity.id == "parent" and len(seen) <= 4:
            raise ConnectionError
        truth.reach(ctx, entity)

    truth.set("parent", see)
    truth.set("child", see)
    with worker_of(app):
        engine.enqueue(entity("parent"))
        poll("all are evaluated", lambda: len(seen) >= 4 and not engine.is_scheduled(entity("parent")))
    first = next(id for entity_id, id, *_ in seen)
    for entity_id, id, root, parent, children in seen:
        assert not children
        if entity_id == "child":
            assert (root, parent) == (first, first)
        else:
            assert root == id
            assert parent in (None, id)


def test_a_sweepers_messages_have_no_parent(world: World) -> None:
    world.engine.enqueue(world.entity("1"), timedelta(minutes=1))
    world.clock.advance(59)
    world.sweeper().sweep()
    [message] = world.messages()
    assert (message.headers["root_id"], message.headers["parent_id"]) == (message.id, None)
