"""`check_concurrent`: somebody changes the goal in the midst of an evaluation."""

from __future__ import annotations

from typing import Any

import pytest

from celery_goalstate import Entity
from celery_goalstate.testing import NotConcurrencySafe, check_concurrent
from tests.testkit.shop import Shop


def order_of(shop: Shop, *, saves_all: bool) -> type[Entity]:
    """Ships or cancels. One class saves the whole row that it has read, the goal in it, as an ORM may."""

    class Order(Entity):
        def get_state(self) -> str:
            return shop.state[self.id]

        def get_goal_state(self) -> str:
            return shop.goal[self.id]

        def get_action_list(self, state: str, goal_state: str) -> Any:
            if state == goal_state:
                return []
            return ["pack", "ship"] if goal_state == "shipped" else ["cancel"]

        def pack(self, ctx: Any) -> None:
            """Nothing is to be seen of it."""

        def ship(self, ctx: Any) -> None:
            shop.state[self.id] = "shipped"
            if saves_all:
                shop.goal[self.id] = ctx.goal_state

        def cancel(self, ctx: Any) -> None:
            shop.state[self.id] = "cancelled"

    return shop.engine.register(Order)


def seen(shop: Shop) -> Any:
    return lambda order: (shop.state[order.id], shop.goal[order.id])


def test_a_row_of_which_each_writes_its_own_part(shop: Shop) -> None:
    def cancel(order: Entity) -> None:
        shop.goal[order.id] = "cancelled"
        shop.engine.enqueue(order)

    world = shop.world(order_of(shop, saves_all=False))
    checked = check_concurrent(world, cancel, snapshot=seen(shop), engine=shop.engine)
    assert checked.schedules == 6  # before and after the look, and at four points of it


def test_a_change_without_an_enqueue_is_missed(shop: Shop) -> None:
    def cancel(order: Entity) -> None:
        shop.goal[order.id] = "cancelled"

    world = shop.world(order_of(shop, saves_all=False))
    with pytest.raises(AssertionError, match="cancel between two looks, and it does not converge: it rests"):
        check_concurrent(world, cancel, snapshot=seen(shop), engine=shop.engine)
    checked = check_concurrent(world, cancel, any_end=True, engine=shop.engine)
    assert checked.schedules == 6


def test_a_goal_that_is_read_once_and_kept_is_found(shop: Shop) -> None:
    def cancel(order: Entity) -> None:
        shop.goal[order.id] = "cancelled"
        shop.engine.enqueue(order)

    world = shop.world(order_of(shop, saves_all=True))
    with pytest.raises(NotConcurrencySafe) as raised:
        check_concurrent(world, cancel, snapshot=seen(shop), engine=shop.engine)
    assert str(raised.value) == REPORT
    assert raised.value.schedule == "cancel before pack"


REPORT = """\
not safe when cancel comes in the midst of an evaluation, before pack:

      0.0 s  order/42: placed, goal shipped
                 pack
                 ⚡ meanwhile, before pack: cancel
                 ship
               converged
             order/42: shipped, goal shipped
               converged

No order of whole looks ends so:
    ('shipped', 'shipped')
They end so:
    ('cancelled', 'cancelled')   if it comes before look 1
    ('cancelled', 'cancelled')   if it comes after the last look"""
