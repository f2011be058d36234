"""Bad input: refused with a text that names the value and what is accepted, before anything is written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Task

from celery_goalstate import ANY, Engine, Entity, Rules, shared_entity
from celery_goalstate.exceptions import GoalStateError, ImproperlyConfigured, UnknownKind
from tests.integration.conftest import MakeApp, Truth, World, is_empty

NAIVE = datetime(2030, 1, 1)  # noqa: DTZ001 - the point
BAD_DEADLINES = [
    (NAIVE, "datetime.datetime(2030, 1, 1, 0, 0)", "aware datetime"),
    (-1, "-1", "0 or more"),
    (-0.001, "-0.001", "0 or more"),
    (timedelta(seconds=-1), "seconds=86399", "0 or more"),
    (math.nan, "nan", "finite"),
    (math.inf, "inf", "finite"),
    (1_800_000_000, "1800000000", "timestamp"),
    (1e9, "1000000000.0", "timestamp"),
    (True, "True", "number of seconds"),
    ("5", "'5'", "aware datetime, a timedelta or seconds"),
    ([], "[]", "aware datetime, a timedelta or seconds"),
    (timedelta(days=40_000), "days=40000", "hundred years"),
    (datetime(9999, 12, 31, tzinfo=UTC), "9999", "hundred years"),
]


@pytest.mark.parametrize(("deadline", "value", "accepted"), BAD_DEADLINES, ids=str)
def test_a_bad_deadline(world: World, deadline: Any, value: str, accepted: str) -> None:
    for enqueue in (world.engine.enqueue, lambda *args: world.engine.enqueue_many([args[0]], args[1])):
        with pytest.raises((ValueError, TypeError)) as caught:
            enqueue(world.entity("1"), deadline)
        assert value in str(caught.value)
        assert accepted in str(caught.value)
    assert is_empty(world.index, "order")
    assert world.messages() == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"eta": NAIVE}, "datetime.datetime"),
        ({"eta": 5}, "eta is 5"),
        ({"countdown": -1}, "-1"),
        ({"countdown": datetime(2030, 1, 1, tzinfo=UTC)}, "eta="),
        ({"eta": datetime(2030, 1, 1, tzinfo=UTC), "countdown": 1}, "eta and countdown"),
        ({"deadline": 1, "countdown": 1}, "deadline and countdown"),
        ({"max_wait": 5}, "max_wait=5"),
        ({"replace": True, "max_wait": -5}, "-5"),
        ({"replace": True, "max_wait": math.nan}, "nan"),
    ],
    ids=str,
)
def test_bad_options_of_an_enqueue(world: World, options: dict[str, Any], text: str) -> None:
    for enqueue in (
        lambda: world.engine.enqueue(world.entity("1"), **options),
        lambda: world.engine.enqueue_many([world.entity("1")], **options),
        lambda: world.engine.prepare(world.entity("1"), **options),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            enqueue()
    assert is_empty(world.index, "order")


def test_a_bad_spread(world: World) -> None:
    for spread in (-1, math.nan, "x", 1e9):
        with pytest.raises((ValueError, TypeError), match=r"spread"):
            world.engine.enqueue_many([world.entity("1")], spread=spread)
    assert is_empty(world.index, "order")


BAD_IDS: list[Any] = [
    "",
    "x" * 513,
    "ü" * 257,
    "a\nb",
    "a\x00",
    "\x7f",
    "\x9b",
    "\ud800",
    None,
    1.5,
    True,
    b"x",
    ["x"],
]


@pytest.mark.parametrize("id", BAD_IDS, ids=lambda id: repr(id)[:12])
def test_a_bad_id(world: World, id: Any) -> None:
    for make in (world.entity, lambda id: world.engine.ref("order", id)):
        with pytest.raises((ValueError, TypeError)) as caught:
            world.engine.enqueue(make(id))
        assert repr(id)[:40].rstrip("'") in str(caught.value)
        assert "512 bytes" in str(caught.value) or "a string, an int or a UUID" in str(caught.value)
    assert is_empty(world.index, "order")


@pytest.mark.parametrize("id", BAD_IDS, ids=lambda id: repr(id)[:12])
def test_a_bad_id_that_only_get_id_tells(world: World, truth: Truth, id: Any) -> None:
    class Evasive(Entity):
        rules = Rules({})

        def get_id(self) -> Any:
            return id

    world.engine.register(Evasive)
    for call in (world.engine.enqueue, world.engine.describe, world.engine.delete, world.engine.is_scheduled):
        with pytest.raises((ValueError, TypeError), match=r"an entity's id is"):
            call(Evasive("fine"))
    assert is_empty(world.index, "evasive")


def test_the_longest_id_and_an_int(world: World) -> None:
    longest = "ü" * 256
    world.engine.enqueue(world.entity(longest))
    world.engine.enqueue(world.entity(42))
    world.engine.enqueue(world.engine.ref("order", 42))
    assert {each.id for each in world.engine.list("order")} == {longest, "42"}


def test_an_unregistered_class(world: World) -> None:
    class Stranger(Entity):
        pass

    class Impostor(Entity):
        kind = "order"

    for entity in (Stranger("1"), Impostor("1")):
        with pytest.raises(UnknownKind, match=rf"{type(entity).__name__} is not registered.*engine.register"):
            world.engine.enqueue(entity)
        with pytest.raises(UnknownKind):
            world.engine.enqueue_many([world.entity("1"), entity])
    with pytest.raises(UnknownKind, match=r"'stranger' is registered .*Known: order\. Register its class"):
        world.engine.resync("stranger")
    assert is_empty(world.index, "order", "stranger")


@pytest.mark.parametrize("entity", ["order/1", None, 1, Entity, ("order", "1")], ids=repr)
def test_no_entity_at_all(world: World, entity: Any) -> None:
    for call in (world.engine.enqueue, world.engine.describe, world.engine.delete, world.engine.is_scheduled):
        with pytest.raises(TypeError, match=r"is no entity; give an Entity or engine.ref"):
            call(entity)
    for call_many in (world.engine.enqueue_many, world.engine.describe_many, world.engine.delete_many):
        with pytest.raises(TypeError, match=r"is no entity"):
            call_many([world.entity("1"), entity])
    assert is_empty(world.index, "order")


def test_two_classes_of_one_kind(world: World, truth: Truth) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"kind 'order' of .* is taken by .*; set `kind`"):
        world.engine.register(truth.entity("order"))
    assert world.engine.register(world.entity) is world.entity  # the same class again is no second one


@pytest.mark.parametrize(
    "kind", ["", "Order", "a b", "ordér", "a{b}", "a:b", "a/b", "a\n", None, 5], ids=repr
)
def test_a_kind_with_odd_characters(world: World, kind: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"lower-case letters, digits"):
        type("Odd", (Entity,), {"kind": kind})
    for call in (
        lambda: world.engine.ref(kind, "1"),
        lambda: world.engine.list(kind),
        lambda: world.engine.counts(kind or ""),
        lambda: world.engine.resync(kind),
    ):
        with pytest.raises((ValueError, TypeError), match=r"kind is .*lower-case letters, digits"):
            call()


def test_a_class_that_is_no_entity_is_no_kind(world: World) -> None:
    with pytest.raises((TypeError, ValueError), match=r"int"):
        world.engine.pause(int)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"no_such": 1}, "unknown option no_such=1"),
        ({"max_failure": 1}, "Did you mean max_failures?"),
        ({"failure_retry_delay": -1}, "failure_retry_delay is -1; accepted: seconds"),
        ({"max_failures": 0}, "max_failures is 0; accepted: an integer, 1 or more"),
        ({"jitter": "yes"}, "jitter is 'yes'; accepted: True or False"),
        ({"idle_ttl": "1d"}, "idle_ttl is '1d'"),
        ({"max_run": math.inf}, "max_run is inf"),
        ({"name": "x"}, "name='x' cannot be given"),
        ({"bind": True}, "bind=True cannot be given"),
        ({"serializer": "pickle"}, "serializer='pickle' cannot be given"),
        ({"expires": 5}, "expires=5 cannot be given"),
        ({"autoretry_for": (ValueError,)}, "cannot be given"),
        ({"max_retries": 5}, "max_retries=5 cannot be given: see max_failures"),
    ],
    ids=str,
)
def test_bad_options_of_a_kind(world: World, truth: Truth, options: dict[str, Any], text: str) -> None:
    kind = truth.entity("refused")
    for register in (world.engine.register, shared_entity):
        with pytest.raises(GoalStateError) as caught:
            register(**options)(kind)
        assert isinstance(caught.value, ValueError)
        assert text in str(caught.value)
    assert world.engine.kinds == ("order",)
    assert "goalstate.refused" not in world.app.tasks


def test_an_option_that_only_a_newer_celery_knows(
    world: World, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Task, "acks_on_timeout", raising=False)
    kind = truth.entity("refused")
    for register in (world.engine.register, shared_entity):
        with pytest.raises(
            ImproperlyConfigured,
            match=r"acks_on_timeout=True cannot be given: Celery \S+ has no such task option, a newer",
        ):
            register(acks_on_timeout=True)(kind)
    assert world.engine.kinds == ("order",)
    assert "goalstate.refused" not in world.app.tasks


def test_a_resync_of_what_cannot_be_resynced(world: World) -> None:
    class Mute(Entity):
        rules = Rules({})

    with pytest.raises(ImproperlyConfigured, match=r"resync_every=60 needs iter_unconverged\(\).*Mute"):
        world.engine.register(resync_every=60)(Mute)
    world.engine.register(Mute)
    with pytest.raises(ImproperlyConfigured, match=r"define Mute.iter_unconverged\(\)"):
        world.engine.resync("mute")


@pytest.mark.parametrize("what", ["order", 5, object, Entity("1")], ids=repr)
def test_what_cannot_be_registered(world: World, what: Any) -> None:
    for register in (world.engine.register, shared_entity):
        with pytest.raises(
            TypeError, match=r"cannot be registered; give a subclass of celery_goalstate\.Entity"
        ):
            register(what)


class Base(Entity):
    """Never registered: its subclasses say what is to be done."""

    get_state = get_goal_state = lambda self: "new"

    def pack(self, ctx: Any) -> None: ...

    def send(self, ctx: Any, carrier: str) -> None: ...


class Listed(Base):
    def get_action_list(self, state: Any, goal_state: Any) -> Any: ...


def takes_too_little(ctx: Any) -> None: ...


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (Base, "defines neither `rules` nor get_action_list(): its entities could never be evaluated"),
        (type("Dict", (Base,), {"rules": {"new": {}}}), "Dict is {'new': {}}; give Rules({goal state:"),
        (
            type("Typo", (Base,), {"rules": Rules({ANY: {ANY: ["pakc"]}})}),
            "name 'pakc': Typo has no method 'pakc'",
        ),
        (type("More", (Base,), {"rules": Rules({ANY: {ANY: "send"}})}), "cannot be called with (ctx)"),
    ],
    ids=["neither", "no rules", "typo", "more"],
)
def test_a_class_of_which_no_entity_could_be_evaluated(world: World, cls: type[Entity], text: str) -> None:
    for register in (world.engine.register, shared_entity):
        with pytest.raises(ImproperlyConfigured) as caught:
            register(cls)
        assert text in str(caught.value)
        assert cls.__qualname__ in str(caught.value)
    assert world.engine.kinds == ("order",)
    assert f"goalstate.{cls.kind}" not in world.app.tasks


def test_a_class_that_leaves_the_rest_to_its_base(world: World) -> None:
    for cls in (Listed, type("Ruled", (Base,), {"rules": Rules({ANY: {ANY: ["pack"]}})})):
        assert world.engine.register(cls) is cls


def test_an_action_that_cannot_be_called_as_one(world: World, truth: Truth) -> None:
    with pytest.raises(
        TypeError, match=r"Rules\[up\]\[down\]: action takes_too_little executes .* \(ctx, entity\)"
    ):
        Rules({"up": {"down": [takes_too_little]}})
    truth.set("1", takes_too_little)
    world.engine.enqueue(world.entity("1"))
    world.run()
    described = world.engine.describe(world.entity("1"))
    assert described is not None
    assert (described.status, described.failures) == ("scheduled", 1), "in a list made afresh: a failure"
    assert "cannot be called with (ctx, entity)" in str(described.error)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, None, "5", 1001], ids=repr)
def test_a_bad_limit(world: World, limit: Any) -> None:
    with pytest.raises(ValueError, match=rf"limit is {limit!r}; give an integer"):
        world.engine.list("order", limit=limit)


@pytest.mark.parametrize(
    "after",
    ["", "1", 5, "failed/order/x/1", "failed/order/1/", "lost/order/1/1", f"failed/order/{10**20}/1"],
    ids=repr,
)
def test_a_bad_cursor(world: World, after: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"after is {after!r}; give the `cursor` of")):
        world.engine.list("order", after=after)


@pytest.mark.parametrize("after", ["failed/host/1/1", "running/order/1/1"])
def test_a_cursor_of_another_list(world: World, after: str) -> None:
    with pytest.raises(ValueError, match=f"after is {after!r}, which is on no page of failed of 'order'"):
        world.engine.list("order", "failed", after=after)


def test_a_bad_status(world: World) -> None:
    with pytest.raises(ValueError, match=r"status is 'parked'; give one of scheduled, running, idle, failed"):
        world.engine.list("order", status="parked")


@pytest.mark.parametrize("namespace", ["", "Shop", "a b", "{x}", 5], ids=repr)
def test_a_bad_namespace(make_app: MakeApp, namespace: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"namespace is .*lower-case letters"):
        Engine(make_app(), namespace=namespace)


def test_an_engine_without_an_app(truth: Truth) -> None:
    engine = Engine()
    entity = engine.register(truth.entity())
    calls: list[Callable[[], Any]] = [
        lambda: engine.enqueue(entity("1")),
        lambda: engine.describe(entity("1")),
        engine.counts,
        lambda: engine.settings,
    ]
    for call in calls:
        with pytest.raises(ImproperlyConfigured, match=r"Engine\(app\), or engine\.init_app\(app\)"):
            call()


def test_an_enqueued_has_no_truth_value(world: World) -> None:
    with pytest.raises(TypeError, match=r"\.changed or \.sent"):
        bool(world.engine.enqueue(world.entity("1")))


def test_enqueue_many_writes_nothing_if_the_last_of_many_is_bad(world: World) -> None:
    entities = [*(world.engine.ref("order", number) for number in range(2_500)), object()]
    with pytest.raises(TypeError, match="is no entity"):
        world.engine.enqueue_many(entities)
    assert sum(world.engine.counts("order")["order"].values()) == 0
