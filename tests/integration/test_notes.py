"""What an app adds to its messages (a tenant, a request) is on those that somebody else publishes, too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from celery import Celery, Task
from celery.signals import before_task_publish
from kombu.utils.uuid import uuid

from celery_goalstate import Engine, Entity, Requeue
from celery_goalstate.index.base import LONGEST_NOTE, Limits, Request, Wakeup
from celery_goalstate.index.memory import MemoryIndex
from celery_goalstate.messages import notes, open_publisher
from celery_goalstate.messages.notes import LINK, note_of, read_note
from celery_goalstate.registry import Kind
from celery_goalstate.settings import Settings
from tests.integration.conftest import MakeApp, Message, Truth, World

tenant: ContextVar[str | None] = ContextVar("tenant", default=None)


@contextmanager
def tenant_is(name: str | None) -> Iterator[None]:
    before = tenant.set(name)
    try:
        yield
    finally:
        tenant.reset(before)


def with_tenant(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "headers": {**(options.get("headers") or {}), "x_tenant": tenant.get()}}


class TenantApp(Celery):
    def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        result = super().send_task(name, args, kwargs, **with_tenant(options))
        assert result.id
        return result


class TenantTask(Task):
    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        return super().apply_async(args, kwargs, **with_tenant(options))


class RequestTask(Task):
    """Beside an app of tenants."""

    def apply_async(self, *args: Any, headers: Any = None, **options: Any) -> Any:
        return super().apply_async(*args, headers={**(headers or {}), "x_request": "r1"}, **options)


@pytest.fixture(autouse=True)
def nothing_was_warned_of() -> None:
    notes._warned_of.clear()


@pytest.fixture(params=["app", "base class"])
def world(request: pytest.FixtureRequest, make_app: MakeApp, truth: Truth) -> World:
    """An app whose messages say for which tenant they are, in either way."""
    by_app = request.param == "app"
    app = make_app(
        cls=TenantApp if by_app else Celery,
        task_cls=Task if by_app else TenantTask,
        goalstate_jitter=False,
        goalstate_failure_retry_delay=40,
    )
    app.task_cls = Task if by_app else TenantTask
    return World(app, truth)


def tenants(messages: Sequence[Message]) -> list[str]:
    return [message.headers["x_tenant"] for message in messages]


# Wherever a message comes from --------------------------------------------------------------------


def test_one_that_is_published_at_once(world: World) -> None:
    with tenant_is("acme"):
        world.engine.enqueue(world.entity("1"))
    assert tenants(world.messages()) == ["acme"]


def test_one_that_was_parked(world: World) -> None:
    with tenant_is("acme"):
        world.engine.enqueue(world.entity("1"), 60)
    world.clock.advance(59)
    world.sweeper().sweep()
    assert tenants(world.messages()) == ["acme"]


def test_who_enqueued_it_last_counts_if_that_changed_the_deadline(world: World) -> None:
    for name, delay in (("acme", 60), ("zenith", 50), ("later", 70)):
        with tenant_is(name):
            world.engine.enqueue(world.entity("1"), delay)
    world.clock.advance(49)
    world.sweeper().sweep()
    assert tenants(world.messages()) == ["zenith"]


def test_one_that_could_not_be_published(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with tenant_is("acme"), monkeypatch.context() as broken:
        broken.setattr(world.app.amqp, "send_task_message", _refuse)
        assert not world.engine.enqueue(world.entity("1")).sent
    world.sweeper().sweep()
    assert tenants(world.messages()) == ["acme"]


def _refuse(*args: Any, **options: Any) -> None:
    raise ConnectionError("no broker")


@pytest.mark.parametrize("delay", [10, 40], ids=["near", "parked"])
def test_retries(world: World, truth: Truth, delay: float) -> None:
    def fail(ctx: Any, entity: Entity) -> None:
        raise ConnectionError

    entity = world.engine.register(failure_retry_delay=delay)(truth.entity("host"))
    truth.set("1", fail)
    with tenant_is("acme"):
        world.engine.enqueue(entity("1"))
    for retry in range(4):
        [message] = world.messages()
        assert (message.headers["x_tenant"], message.retries) == ("acme", retry)
        with tenant_is("of the worker"):
            world.run(message)
        world.clock.advance(delay * 2**retry)
        world.sweeper().sweep()


def test_one_that_is_evaluated_again(world: World, truth: Truth) -> None:
    truth.set("1", lambda ctx, entity: Requeue(3))
    truth.actions["1"] = (_again,)
    with tenant_is("acme"):
        world.engine.enqueue(world.entity("1"))
    for _ in range(3):
        [message] = world.messages()
        assert message.headers["x_tenant"] == "acme"
        world.run(message)


def _again(ctx: Any, entity: Entity) -> Requeue:
    return Requeue(3)


def test_one_that_is_sent_again(world: World) -> None:
    with tenant_is("acme"):
        world.engine.enqueue(world.entity("1"))
    world.messages()
    world.clock.advance(600)
    world.sweeper().sweep()
    [message] = world.messages()
    assert (message.headers["x_tenant"], list(message.kwargs)) == ("acme", ["resent_at"])


def test_one_that_came_early(world: World) -> None:
    with tenant_is("acme"):
        world.engine.enqueue(world.entity("1"), 20)
    world.run()
    assert tenants(world.messages()) == ["acme"]


def test_batches_are_each_for_one_tenant(world: World, truth: Truth) -> None:
    entity = world.engine.register(batch_size=10)(truth.entity("host"))
    for name in ("acme", "zenith"):
        with tenant_is(name):
            world.engine.enqueue_many((entity(f"{name}-{n}") for n in range(3)), 60)
    world.clock.advance(60)
    world.sweeper().sweep()
    messages = world.messages()
    assert sorted(tenants(messages)) == ["acme", "zenith"]
    for message in messages:
        assert {id.split("-")[0] for id, _ in message.args[0]} == {message.headers["x_tenant"]}


def test_under_load_nothing_is_evaluated_without_its_message(world: World, truth: Truth) -> None:
    entity = world.engine.register(batch_size=10)(truth.entity("host"))
    with tenant_is("acme"):
        world.engine.enqueue(entity("1"))
    with tenant_is("zenith"):
        world.engine.enqueue(entity("2"), 60)
    world.clock.advance(60)
    [message] = world.messages()
    task = world.app.tasks[message.task]
    task.push_request(id=message.id, retries=0, is_eager=False)  # `apply`, which `World.run` uses, is eager
    try:
        world.evaluator("host").handle(task, message.args, message.kwargs)
    finally:
        task.pop_request()
    assert (truth.looks("1", "host"), truth.looks("2", "host")) == (1, 0)
    world.sweeper().sweep()
    assert tenants(world.messages()) == ["zenith"]


def test_a_batch_of_many_traces_has_no_link(make_app: MakeApp) -> None:
    app = make_app(cls=Adds)
    app.added = {"traceparent": "00-1-2-01", "x_tenant": "acme"}
    engine = Engine(app)
    engine.register(batch_size=2)(Truth().entity())
    assert read_note(note_of(app, engine.kind("order"), "1"))[:2] == ({"x_tenant": "acme"}, {})


def test_an_action_enqueues_for_the_tenant_that_it_works_for(world: World, truth: Truth) -> None:
    def enqueue(ctx: Any, entity: Entity) -> None:
        with tenant_is("zenith"):
            ctx.enqueue(world.entity("2"), 60)
            ctx.enqueue(world.entity("3"))
        truth.reach(ctx, entity)

    truth.set("1", enqueue)
    with tenant_is("acme"):
        world.engine.enqueue(world.entity("1"))
    world.run()
    world.clock.advance(59)
    world.sweeper().sweep()
    assert tenants(world.messages()) == ["zenith", "zenith"]


# What is noted ------------------------------------------------------------------------------------


def kind_of(app: Celery, base: Any = None) -> Any:
    engine = Engine(app)
    engine.register(**({"base": base} if base else {}))(Truth().entity())
    return engine.kind("order")


def test_an_app_that_adds_nothing_notes_nothing(make_app: MakeApp) -> None:
    app = make_app()
    assert note_of(app, kind_of(app), "1") == ""
    assert read_note("")[:2] == ({}, {})


def test_app_and_base_class_may_both_add_to_it(make_app: MakeApp) -> None:
    app = make_app(cls=TenantApp)
    kind = kind_of(app, RequestTask)
    with tenant_is("acme"):
        assert read_note(note_of(app, kind, "1")).headers == {"x_tenant": "acme", "x_request": "r1"}


def test_a_kind_of_another_code_base(make_app: MakeApp) -> None:
    engine = Engine(make_app(cls=TenantApp))
    engine.declare("invoice")
    with tenant_is("acme"):
        assert read_note(note_of(engine.app, engine.kind("invoice"), "1")).headers == {"x_tenant": "acme"}


@contextmanager
def nothing_published() -> Iterator[None]:
    def refuse(**_: Any) -> None:
        pytest.fail("something was published")

    before_task_publish.connect(refuse)
    try:
        yield
    finally:
        before_task_publish.disconnect(refuse)


class Raises(TenantApp):
    def send_task(self, *args: Any, **options: Any) -> Any:
        raise LookupError("no tenant here")


class Never(TenantApp):
    def send_task(self, *args: Any, **options: Any) -> Any:
        return None


class Outside(TenantApp):
    def send_task(self, *args: Any, **options: Any) -> Any:
        return Celery.send_task(self, *args, **with_tenant(options))


class TaskRaises(Task):
    def apply_async(self, *args: Any, **options: Any) -> Any:
        raise LookupError("no tenant here")


class TaskOutside(Task):
    def apply_async(self, *args: Any, **options: Any) -> Any:
        return Task.apply_async(self, *args, **with_tenant(options))


@pytest.mark.parametrize(
    ("cls", "base", "why"),
    [
        (Raises, None, "LookupError: no tenant here"),
        (Never, None, "TypeError: it does not call super()"),
        (Outside, None, "TypeError: it does not call super()"),
        (Celery, TaskRaises, "LookupError: no tenant here"),
        (Celery, TaskOutside, "TypeError: it does not call super()"),
        (Outside, TaskOutside, "TypeError: it does not call super()"),
    ],
)
def test_whoever_cannot_be_asked_is_named_once_and_nothing_is_noted_nor_published(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, cls: type[Celery], base: Any, why: str
) -> None:
    app = make_app(cls=cls)
    kind = kind_of(app, base)
    with nothing_published():
        for _ in range(3):
            assert note_of(app, kind, "1") == ""
    [record] = caplog.records
    assert record.getMessage() == (
        "what the app adds to messages of kind order is not noted by enqueue, so it is missing from messages"
        f" that are published later: {why}"
    )


class Adds(Celery):
    """Adds what a test says."""

    added: Any = None

    def send_task(self, name: str, *args: Any, **options: Any) -> Any:
        self.counted = getattr(self, "counted", 0) + 1
        return super().send_task(name, *args, **{**options, "headers": self.added})


def test_an_app_is_not_changed_by_being_asked(make_app: MakeApp) -> None:
    app = make_app(cls=Adds)
    app.added = {"x": 1}
    with nothing_published():
        assert json.loads(note_of(app, kind_of(app), "1")) == {"headers": {"x": 1}}
    assert not hasattr(app, "counted")


@pytest.mark.parametrize("added", [{}, None])
def test_an_app_that_adds_nothing_this_time(make_app: MakeApp, added: Any) -> None:
    app = make_app(cls=Adds)
    app.added = added
    assert note_of(app, kind_of(app), "1") == ""


def test_what_is_too_long_or_no_json_is_named_and_left_out(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(cls=Adds)
    app.added = {"x_short": "é" * 10, "x_fits": "y" * 300, "x_long": "z" * 400, "x_object": object()}
    kind = kind_of(app)
    for _ in range(2):
        noted = note_of(app, kind, "1")
    assert read_note(noted).headers == {"x_short": "é" * 10, "x_fits": "y" * 300}
    assert len(noted.encode()) <= LONGEST_NOTE
    told = sorted(record.getMessage() for record in caplog.records)
    assert len(told) == 2
    assert told[0].startswith("the header 'x_long' is too long (all of them together may have 512 bytes)")
    assert told[1].startswith("the header 'x_object' is not JSON (")


def test_headers_of_a_trace_come_back_as_a_link(make_app: MakeApp) -> None:
    app = make_app(cls=Adds)
    app.added = {"traceparent": "00-1-2-01", "Sentry-Trace": "1-2-1", "baggage": "a=1", "x_tenant": "acme"}
    kind = kind_of(app)
    note = note_of(app, kind, "1")
    link = {"traceparent": "00-1-2-01", "Sentry-Trace": "1-2-1"}
    assert read_note(note)[:2] == ({"x_tenant": "acme"}, link)
    published = headers_of(app, kind, note)
    assert (published["x_tenant"], published[LINK]) == ("acme", link)
    assert not {"traceparent", "Sentry-Trace", "baggage"} & published.keys()


def headers_of(app: Celery, kind: Kind, note: str) -> dict[str, Any]:
    """Of a message with this note that somebody else publishes."""
    seen = {}

    def keep(headers: Any, **_: Any) -> None:
        seen.update(headers)

    publisher = open_publisher(app, MemoryIndex(Limits()), Settings(index_url="memory://"))
    before_task_publish.connect(keep)
    try:
        assert publisher.dispatch(kind, [Wakeup("1", "1", 0, uuid(), note=note)])
    finally:
        before_task_publish.disconnect(keep)
    return seen


def test_a_link_alone_leaves_the_app_to_add_its_own(make_app: MakeApp) -> None:
    app = make_app(cls=Adds)
    app.added = {"traceparent": "00-1-2-01"}
    kind = kind_of(app)
    note = note_of(app, kind, "1")
    app.added = {"x_tenant": "of the worker"}
    assert headers_of(app, kind, note)["x_tenant"] == "of the worker"


def test_a_link_gives_way_to_headers(make_app: MakeApp) -> None:
    app = make_app(cls=Adds)
    app.added = {"traceparent": "00-1-2-01", "x_tenant": "t" * 470}
    assert read_note(note_of(app, kind_of(app), "1"))[:2] == ({"x_tenant": "t" * 470}, {})


def test_publishing_for_others_is_in_nobodys_context(world: World) -> None:
    """Nor may a handler leave anything in it for the next one."""
    seen = []

    def look(**_: Any) -> None:
        seen.append(tenant.get())
        tenant.set("left behind")

    wakeups = [Wakeup(str(n), "1", 0, uuid()) for n in range(2)]
    before_task_publish.connect(look)
    try:
        with tenant_is("of the worker"):
            world.engine.parts.publisher.dispatch(world.engine.kind("order"), wakeups)
            assert tenant.get() == "of the worker"
            world.engine.parts.publisher.dispatch(world.engine.kind("order"), wakeups[:1], enqueued=True)
    finally:
        before_task_publish.disconnect(look)
    assert seen == [None, None, "of the worker"]


def test_two_tenants_entity_of_one_id_is_one_entity_and_that_is_told(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with tenant_is("acme"):
        world.engine.enqueue(world.entity("7"), 60)
        world.engine.enqueue(world.entity("7"), 60)
    assert "scheduled already" not in caplog.text
    for id, deadline in (("8", 60), ("7", 30), ("7", 90)):
        with tenant_is("zenith"):
            world.engine.enqueue(world.entity(id), deadline)
    assert caplog.text.count("order/7 is scheduled already, with another x_tenant than this enqueue has") == 1


def test_one_without_a_tenant_is_not_evaluated_in_the_task_of_another(world: World, truth: Truth) -> None:
    entity = world.engine.register(batch_size=10)(truth.entity("host"))
    with tenant_is("acme"):
        world.engine.enqueue(entity("1"))
    world.index.enqueue("host", [Request("2", delay=60_000, task_id="t")])
    world.clock.advance(60)
    [message] = world.messages()
    task = world.app.tasks[message.task]
    task.push_request(id=message.id, retries=0, is_eager=False)
    try:
        world.evaluator("host").handle(task, message.args, message.kwargs)
    finally:
        task.pop_request()
    assert (truth.looks("1", "host"), truth.looks("2", "host")) == (1, 0)


correlation: ContextVar[str | None] = ContextVar("correlation", default=None)


def test_what_handlers_of_signals_add_goes_along_with_a_retry(make_app: MakeApp, truth: Truth) -> None:
    """As with Celery's own retries: they are published in the context of the task."""
    world = World(make_app(goalstate_jitter=False), truth)

    def fail(ctx: Any, entity: Entity) -> None:
        raise ConnectionError

    def add(sender: Any = None, headers: Any = None, **_: Any) -> None:
        headers["x_correlation"] = correlation.get()

    before_task_publish.connect(add)
    try:
        truth.set("1", fail)
        world.engine.enqueue(world.entity("1"))
        [message] = world.messages()
        before = correlation.set("r1")
        world.run(message)
        correlation.reset(before)
        [retry] = world.messages()
        assert (retry.retries, retry.headers["x_correlation"]) == (1, "r1")
    finally:
        before_task_publish.disconnect(add)


class PatientApp(TenantApp):
    def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        return super().send_task(name, args, kwargs, **{**options, "priority": 7})


def test_where_the_app_sends_a_message_goes_along(make_app: MakeApp, truth: Truth) -> None:
    world = World(make_app(cls=PatientApp), truth)
    with tenant_is("acme"):
        world.engine.enqueue(world.entity("1"), 60)
    world.clock.advance(60)
    world.sweeper().sweep()
    with world.app.connection_for_write() as connection, connection.SimpleQueue(world.app.main) as queue:
        message = queue.get(timeout=5)
        message.ack()
    assert (message.headers["x_tenant"], message.properties["priority"]) == ("acme", 7)


def test_a_tracer_that_fails_costs_the_link_and_not_the_tenant(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(
        notes.sys.modules, "sentry_sdk", object()
    )  # an old one, say, that lacks what is asked
    kind = world.engine.kind("order")
    with tenant_is("acme"):
        assert read_note(note_of(world.app, kind, "1")).headers == {"x_tenant": "acme"}
    assert "the trace of an enqueue is not noted" in caplog.text


def test_an_override_is_asked_with_a_message_as_it_will_be(make_app: MakeApp, truth: Truth) -> None:
    class ByEntity(Celery):
        def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            headers = {"x_first": args[0][0][0], "x_task": bool(options["task_id"])}
            return super().send_task(name, args, kwargs, **{**options, "headers": headers})

    world = World(make_app(cls=ByEntity), truth)
    noted = note_of(world.app, world.engine.kind("order"), "42")
    assert read_note(noted).headers == {"x_first": "42", "x_task": True}
