from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import logging
import math
import unittest.mock
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from celery_goalstate.actions import (
    Action,
    ActionList,
    Budget,
    Context,
    Requeue,
    Stop,
    action_logger,
    as_action_list,
)
from celery_goalstate.engine import Engine as RealEngine
from celery_goalstate.entity import Entity, EntityRef, can_resync
from celery_goalstate.exceptions import ActionTimeout, ImproperlyConfigured, LeaseLost


class Order(Entity):
    shipped = False

    def ship(self, ctx: Context) -> None:
        self.shipped = True

    async def fly(self, ctx: Context) -> None: ...


def reserve(ctx: Context, order: Order) -> None: ...


# Kinds and ids -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_name", "kind"),
    [
        ("Order", "order"),
        ("OrderItem", "order_item"),
        ("HTTPServer", "http_server"),
        ("Web2Host", "web2_host"),
        ("VPNTunnelV2", "vpn_tunnel_v2"),
        ("already_snake", "already_snake"),
    ],
)
def test_a_kind_is_the_class_name_in_snake_case(class_name: str, kind: str) -> None:
    assert type(class_name, (Entity,), {}).kind == kind


def test_a_kind_can_be_given_and_is_not_inherited() -> None:
    class Base(Entity):
        kind = "shop.order-2"

    class Derived(Base):
        pass

    assert Base.kind == "shop.order-2"
    assert Derived.kind == "derived"


@pytest.mark.parametrize(
    "kind", ["", "Order", "order/item", "or der", "a:b", "{a}", "ordér", "order\n", 7, None]
)
def test_an_odd_kind_is_refused(kind: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"Odd\.kind is .*; accepted: lower-case letters"):
        type("Odd", (Entity,), {"kind": kind})
    with pytest.raises(ImproperlyConfigured, match=r"kind is .*; accepted"):
        EntityRef(kind, "42")


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("given", "id_"),
    [
        ("42", "42"),
        (42, "42"),
        (-1, "-1"),
        (0, "0"),
        ("a/b:{c} d%", "a/b:{c} d%"),
        ("žluťoučký 🐎", "žluťoučký 🐎"),
        ("x" * 512, "x" * 512),
        ("é" * 256, "é" * 256),
        (Colour.RED, "red"),
        (uuid.UUID("{12345678-1234-5678-1234-56789ABCDEF0}"), "12345678-1234-5678-1234-56789abcdef0"),
    ],
)
def test_ids_that_are_accepted(given: Any, id_: str) -> None:
    order = Order(given)
    assert order.get_id() == id_
    assert type(order.get_id()) is str
    assert order.ref == EntityRef("order", given)
    assert Order.from_id(id_) == order


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("", ValueError),
        ("x" * 513, ValueError),
        ("é" * 257, ValueError),
        ("a\nb", ValueError),
        ("a\x00", ValueError),
        ("\x7f", ValueError),
        ("\x85", ValueError),
        ("\ud800", ValueError),
        (True, TypeError),
        (None, TypeError),
        (1.0, TypeError),
        (b"42", TypeError),
        (["42"], TypeError),
    ],
)
def test_ids_that_are_refused(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="an entity's id is ") as raised:
        Order(given)
    assert len(str(raised.value)) < 250
    with pytest.raises(error, match="an entity's id is "):
        EntityRef("order", given)


def test_an_entity_is_its_kind_and_id() -> None:
    class Host(Entity):
        pass

    assert Order("42") == Order(42)
    assert Order("42") != Order("43")
    assert Order("42") != Host("42")
    assert Order("42") != "42"
    assert len({Order("1"), Order("1"), Host("1")}) == 2
    assert repr(Order("42")) == "<Order order/42>"
    assert str(Order("42").ref) == "order/42"


def test_an_entity_may_say_itself_what_its_id_is() -> None:
    class Row(Entity):
        def __init__(self, pk: int) -> None:
            self.pk = pk

        def get_id(self) -> str:
            return f"row-{self.pk}"

    assert Row(7).ref == EntityRef("row", "row-7")
    assert Row(7) == Row(7)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda order: order.get_state(), "Order does not define get_state"),
        (lambda order: order.get_goal_state(), "Order does not define get_goal_state"),
        (lambda order: order.get_action_list("A", "B"), "Order defines neither `rules` nor get_action_list"),
        (
            lambda order: order.iter_unconverged(),
            "Order cannot be resynced: it does not define iter_unconverged",
        ),
    ],
)
def test_what_a_class_does_not_define_is_named(call: Any, says: str) -> None:
    with pytest.raises(NotImplementedError, match=says):
        call(Order("42"))


def test_rules_make_get_action_list_unnecessary() -> None:
    class Table:
        def actions(self, state: Any, goal_state: Any) -> list[str]:
            return [f"{state}_to_{goal_state}"]

    class Host(Entity):
        rules = Table()

    assert Host("1").get_action_list("up", "down") == ["up_to_down"]


def test_whether_a_class_can_be_resynced_is_known_without_a_call() -> None:
    class Host(Entity):
        @classmethod
        def iter_unconverged(cls) -> Iterable[str]:
            raise AssertionError

    class Rack(Host):
        pass

    class Shelf(Entity):
        @staticmethod
        def iter_unconverged() -> Iterable[str]:
            return []

    assert [can_resync(cls) for cls in (Order, Host, Rack, Shelf)] == [False, True, True, True]


# What an action can say --------------------------------------------------------------------------


def test_requeue_takes_seconds_or_a_timedelta() -> None:
    assert Requeue(30).after == 30.0
    assert Requeue(timedelta(minutes=1), stop=True) == Requeue(60, True)
    assert Requeue(0) != Requeue(0, stop=True)
    assert Stop() == Stop()


@pytest.mark.parametrize("after", [-1, math.nan, math.inf, 1_764_000_000, "30", None, True])
def test_requeue_refuses_what_is_no_delay(after: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="Requeue's delay is"):
        Requeue(after)


# Actions -----------------------------------------------------------------------------------------


def names(action_list: ActionList) -> list[str]:
    return [action.name for action in action_list.actions]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ([], []),
        ((), []),
        ([reserve], ["reserve"]),
        ([reserve, "ship", Action("pack", reserve)], ["reserve", "ship", "pack"]),
        ((reserve,), ["reserve"]),
        (reserve, ["reserve"]),
        ("ship", ["ship"]),
        (Action("pack", reserve), ["pack"]),
        (Action("pack", functools.partial(reserve)), ["pack"]),
        (ActionList(["ship", reserve]), ["ship", "reserve"]),
    ],
)
def test_what_an_action_list_may_be(value: Any, expected: list[str]) -> None:
    assert names(as_action_list(value, Order("42"))) == expected


def test_an_action_list_keeps_its_timeout() -> None:
    action_list = ActionList([reserve], timeout=timedelta(seconds=5))
    assert action_list.timeout == 5.0
    assert as_action_list(action_list, Order("42")) is action_list


def test_a_name_is_a_method_of_the_entity() -> None:
    order = Order("42")
    (action,) = as_action_list(["ship"], order).actions
    action.execute(None, order)
    assert order.shipped


class Unnamed:
    def __call__(self, ctx: Context, order: Order) -> None: ...


async def teleport(ctx: Context, order: Order) -> None: ...


class Async:
    __name__ = "asynchronous"

    async def __call__(self, ctx: Context, order: Order) -> None: ...


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([lambda ctx, order: None], r'has no name of its own; give it one: Action\("\.\.\.", lambda\)'),
        ([functools.partial(reserve)], "has no name of its own"),
        (Unnamed(), "has no name of its own"),
        ([42], "42 is no action; give"),
        ([None], "None is no action; give"),
        ([[reserve]], "is no action; give"),
        (42, "42 is no action list; give"),
        ({"ship": reserve}, "is no action list; give"),
        ((action for action in [reserve]), "is no action list; give"),
        (["shipp"], "<Order order/42> has no method 'shipp'"),
        (["shipped"], "<Order order/42> has no method 'shipped'"),
        (["fly"], "action fly is a coroutine function"),
        ([teleport], "action teleport is a coroutine function"),
        ([Async()], "action asynchronous is a coroutine function"),
    ],
)
def test_what_is_no_action_is_refused_by_name(value: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        as_action_list(value, Order("42"))


class Pallet:
    """What is called with (ctx, entity) in many ways."""

    def __call__(self, ctx: Context, entity: Order) -> None: ...

    def move(self, ctx: Context, entity: Order) -> None: ...

    @classmethod
    def stack(cls, ctx: Context, entity: Order) -> None: ...

    @staticmethod
    def wrap(ctx: Context, entity: Order, *, tape: int = 1) -> None: ...


def gives_one_more(function: Any) -> Any:
    """A decorator whose wrapper takes other arguments than what it wraps."""

    @functools.wraps(function)
    def wrapper(ctx: Context, entity: Order) -> None:
        function(ctx, entity, "more")

    return wrapper


@gives_one_more
def with_more(ctx: Context, entity: Order, more: str) -> None: ...


def any_arguments(*args: Any, **kwargs: Any) -> None: ...


def three(ctx: Context, entity: Order, third: int) -> None: ...


def keyword_only(ctx: Context, *, entity: Order) -> None: ...


@pytest.mark.parametrize(
    "function",
    [
        Pallet(),
        Pallet().move,
        Pallet.stack,
        Pallet.wrap,
        with_more,
        any_arguments,
        functools.partial(three, third=3),
        lambda ctx, entity=None: None,
        print,
        max,  # a builtin without a signature
        unittest.mock.Mock(),
    ],
)
def test_what_can_be_called_with_a_context_and_an_entity(function: Any) -> None:
    assert Action("pack", function).execute is function


@pytest.mark.parametrize(
    "function",
    [
        lambda: None,
        lambda ctx: None,
        three,
        keyword_only,
        functools.partial(reserve, None),
        Pallet.move,
        gives_one_more,
    ],
)
def test_what_cannot_is_refused_when_the_action_is_built(function: Any) -> None:
    with pytest.raises(
        TypeError, match=r"action pack executes .*, which cannot be called with \(ctx, entity\); define it so"
    ):
        Action("pack", function)


def test_a_method_that_takes_more_than_a_context_is_refused() -> None:
    class Parcel(Entity):
        def pack(self, ctx: Context, box: str) -> None: ...

        def wrap(self) -> None: ...

    for name in ("pack", "wrap"):
        with pytest.raises(TypeError, match=rf"action {name} executes .*cannot be called with \(ctx\)"):
            as_action_list([name], Parcel("1"))


def test_the_same_function_is_one_thing_bound_and_another_unbound() -> None:
    """`Pallet.weigh` is called with two arguments of its own, `pallet.weigh` would need one less."""

    class Pallet:
        def weigh(self, ctx: Context) -> None: ...

    Action("weigh", Pallet.weigh)
    with pytest.raises(TypeError, match="cannot be called"):
        Action("weigh", Pallet().weigh)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("", reserve), ValueError, "an action's name is ''"),
        (("a\nb", reserve), ValueError, "an action's name is"),
        ((7, reserve), ValueError, "an action's name is 7"),
        (("pack", None), TypeError, "action pack executes None"),
        (("pack", functools.partial(teleport)), TypeError, "action pack is a coroutine function"),
        (("pack", reserve, 0), ValueError, "the timeout of action pack is 0"),
        (("pack", reserve, -1), ValueError, "the timeout of action pack is -1"),
        (("pack", reserve, "5"), TypeError, "the timeout of action pack is '5'"),
    ],
)
def test_an_action_that_cannot_be_one_is_refused(
    arguments: tuple[Any, ...], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Action(*arguments)


def test_the_timeout_of_a_list_is_checked() -> None:
    with pytest.raises(ValueError, match="the timeout of an action list is nan"):
        ActionList([], timeout=math.nan)


# What an action gets -----------------------------------------------------------------------------


class Engine:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append((name, args, options)) or name


def context(now: float = 0.0, held: bool = True, *budgets: Budget) -> Context:
    return Context(
        engine=Engine(),
        entity=Order("42"),
        state="NEW",
        goal_state="SHIPPED",
        failures=2,
        deadline=datetime(2026, 1, 1, tzinfo=UTC),
        lateness=0.5,
        fencing_token=7,
        task=None,
        log=action_logger(EntityRef("order", "42"), "ship"),
        budgets=budgets,
        clock=lambda: now,
        held=lambda: held,
        calling=contextlib.nullcontext,
    )


#: What an action may ask the engine for.
OF_THE_ENGINE = ["enqueue", "enqueue_many", "delete", "delete_many", "is_scheduled"]


@pytest.mark.parametrize("name", OF_THE_ENGINE)
def test_an_action_may_ask_the_engine(name: str) -> None:
    """With all its arguments: each is handed on, under its name."""
    ctx, method = context(), getattr(RealEngine, name)
    assert inspect.signature(getattr(Context, name)) == inspect.signature(method)
    _, _, *parameters = inspect.signature(method).parameters.values()
    given = {each.name: object() for each in parameters}
    assert getattr(ctx, name)("entity", **given) == name
    [(called, args, options)] = ctx.engine.calls
    positional = [given[each.name] for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert (called, args) == (name, ("entity", *positional))
    assert options == {each.name: given[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}


@pytest.mark.parametrize("name", ["cache", "state", "_clock"])
def test_a_value_set_on_the_context_is_an_error_that_says_where_it_belongs(name: str) -> None:
    ctx = context()
    with pytest.raises(
        AttributeError, match=rf"ctx\.{name} cannot be set.* on the entity: entity\.{name} = "
    ):
        setattr(ctx, name, 1)


@pytest.mark.parametrize(
    ("now", "ends", "remaining"),
    [(0, [], None), (3, [10], 7), (3, [10, 5], 2), (3, [4, 10], 1), (10, [10], 0), (99, [10, 5], 0)],
)
def test_remaining_is_the_tighter_budget(now: float, ends: list[float], remaining: float | None) -> None:
    assert context(now, True, *(Budget(end, "x") for end in ends)).remaining() == remaining


def test_check_raises_when_time_is_up_or_the_lease_is_lost() -> None:
    budget = Budget(10, "timeout of the action list (5 s)")
    context(9.9, True, budget).check()
    context().check()
    with pytest.raises(ActionTimeout, match=r"the timeout of the action list \(5 s\) is over"):
        context(10, True, budget).check()
    with pytest.raises(LeaseLost):
        context(99, False, budget).check()


def test_log_records_carry_kind_id_and_action(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "celery_goalstate.action"):
        context().log.info("picked %d%%", 50, extra={"shelf": "B7"})
    (record,) = caplog.records
    assert record.getMessage() == "order/42 ship: picked 50%"
    assert (record.kind, record.id, record.action, record.shelf) == ("order", "42", "ship", "B7")
