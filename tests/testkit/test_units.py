"""One action alone: `run_action`, `context`, `check_idempotent`."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

import pytest

from celery_goalstate import Action, Entity, Requeue, Stop
from celery_goalstate.exceptions import ActionTimeout, LeaseLost
from celery_goalstate.testing import NotRepeatable, check_idempotent, context, run_action
from tests.testkit.shop import Shop


@pytest.fixture
def order(shop: Shop) -> Entity:
    return shop.world(shop.order(charge_once=shop.charge_once, ship=shop.ship))()


def test_a_method_is_run_by_its_name(shop: Shop, order: Entity) -> None:
    assert run_action("ship", order) is None
    assert shop.state["42"] == "shipped"


def test_a_function_gets_what_is_given(order: Entity) -> None:
    seen = []

    def look(ctx: Any, entity: Entity) -> Requeue:
        seen.append((ctx.state, ctx.goal_state, ctx.failures, ctx.fencing_token, ctx.lateness, entity))
        return Requeue(3)

    assert run_action(look, order) == Requeue(3)
    assert run_action(look, order, state="packed", failures=2, fencing_token=7, lateness=1.5) == Requeue(3)
    assert seen == [("placed", "shipped", 0, 1, 0.0, order), ("packed", "shipped", 2, 7, 1.5, order)]


def test_what_an_action_raises_is_raised(order: Entity) -> None:
    def fail(ctx: Any, entity: Entity) -> None:
        raise OSError("no truck")

    with pytest.raises(OSError, match="no truck"):
        run_action(fail, order)


def test_what_no_action_may_return_is_refused(order: Entity) -> None:
    with pytest.raises(TypeError, match="action look returned 3"):
        run_action(lambda_named("look", 3), order)
    assert run_action(lambda_named("look", Stop()), order) == Stop()


def lambda_named(name: str, returned: Any) -> Action:
    return Action(name, lambda ctx, entity: returned)


def test_a_lease_that_is_lost_and_a_time_that_is_up(order: Entity) -> None:
    with pytest.raises(LeaseLost):
        context(order, lease_held=False).check()
    with pytest.raises(ActionTimeout):
        context(order, remaining=0).check()
    ctx = context(order, remaining=5)
    ctx.check()
    assert ctx.remaining() == 5
    assert context(order).remaining() is None


def test_the_timeout_of_an_action_is_its_own(order: Entity) -> None:
    left = []

    def look(ctx: Any, entity: Entity) -> None:
        left.append(ctx.remaining())

    run_action(Action("look", look, timeout=9), order)
    run_action(Action("look", look, timeout=9), order, remaining=2)
    assert left == [9, 2]


def test_what_an_action_enqueues_is_noted(order: Entity) -> None:
    ctx = context(order)
    notes: Any = ctx.engine
    ctx.enqueue(order)
    ctx.enqueue(order, countdown=60)
    ctx.enqueue_many([order], timedelta(hours=1), spread=5)
    ctx.delete(order)
    assert notes.enqueued == [(order.ref, None), (order.ref, 60), (order.ref, timedelta(hours=1))]
    assert notes.deleted == [order.ref]
    assert not ctx.is_scheduled(order)


def test_an_action_with_a_key_is_idempotent(shop: Shop, order: Entity) -> None:
    check_idempotent("charge_once", shop.world(type(order)), snapshot=shop.seen)


def test_an_action_without_a_key_is_not(shop: Shop, order: Entity) -> None:
    with pytest.raises(AssertionError) as raised:
        check_idempotent(shop.charge_twice, shop.world(type(order)), snapshot=shop.seen)
    assert str(raised.value) == (
        "charge_twice is not idempotent. Executed twice, it ends differently:\n"
        "    charges: expected [('42', 100)]\n"
        "             got      [('42', 100), ('42', 100)]"
    )


def test_an_action_that_fails_the_second_time_is_not(shop: Shop, order: Entity) -> None:
    def once(ctx: Any, entity: Entity) -> None:
        assert shop.state["42"] != "shipped", "shipped already"
        shop.ship(ctx, entity)

    with pytest.raises(AssertionError, match="The second time it raises AssertionError"):
        check_idempotent(once, shop.world(type(order)), snapshot=shop.seen)


def test_what_cannot_be_compared_is_refused(shop: Shop, order: Entity) -> None:
    with pytest.raises(NotRepeatable):
        check_idempotent("ship", shop.world(type(order)), snapshot=lambda _: uuid.uuid4())
