"""Mistakes that people make, planted one by one in an order that is right: a check of the kit finds each."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import pytest

from celery_goalstate import Entity
from celery_goalstate.testing import check_concurrent, check_crash_safe
from tests.testkit.shop import Provider, Shop


class Row(NamedTuple):
    state: str
    goal: str
    fence: int = 0


class Store:
    """Orders in a database that hands out rows, and parcels of a carrier that sends what it is told to."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.rows: dict[str, Row] = {}
        self.keys: dict[str, str] = {}
        self.provider = Provider()

    def reset(self) -> None:
        self.rows, self.keys = {"42": Row("placed", "shipped")}, {}
        self.provider.charges.clear()
        self.provider.keys.clear()

    def seen(self, _: Entity) -> Any:
        return self.rows["42"][:2], self.provider.charges

    def charge(self, id: str, key: str) -> None:
        self.provider.charge(id, 100, key)

    def write(self, id: str, fence: int, **changes: str) -> None:
        row = self.rows[id]
        if fence < row.fence:
            raise RuntimeError("a newer evaluation has written to this order")
        self.rows[id] = row._replace(fence=fence, **changes)


Mutant = str | None


def order_of(store: Store, mutant: Mutant) -> type[Entity]:
    class Order(Entity):
        def get_state(self) -> str:
            return store.rows[self.id].state

        def get_goal_state(self) -> str:
            return store.rows[self.id].goal

        def get_action_list(self, state: str, goal_state: str) -> Any:
            if state == goal_state:
                return []
            return ["cancel"] if goal_state == "cancelled" else ["charge", "ship"]

        def charge(self, ctx: Any) -> None:
            key = store.keys.get(self.id) or f"charge-{self.id}-{len(store.keys)}"
            if mutant == "key from uuid4":
                key = str(uuid.uuid4())
            if mutant == "effect before its intent":
                key = key if self.id in store.keys else f"{key}-{ctx.fencing_token}"
                store.charge(self.id, key)
                store.keys[self.id] = key
            elif mutant == "swallowed exception":
                store.keys[self.id] = key
                with suppress(OSError):
                    store.charge(self.id, key)
            else:
                store.keys[self.id] = key
                store.charge(self.id, key)

        def ship(self, ctx: Any) -> None:
            changes = {"state": "shipped"}
            if mutant == "goal read once and kept":
                changes["goal"] = ctx.goal_state
            store.write(self.id, ctx.fencing_token, **changes)

        def cancel(self, ctx: Any) -> None:
            store.write(self.id, ctx.fencing_token, state="cancelled")

    return store.shop.engine.register(Order)


def crashes(store: Store, world: Callable[[], Entity]) -> Any:
    return check_crash_safe(
        world,
        snapshot=store.seen,
        effects=[(store, "charge"), (store, "write")],
        faults=["kill", "lose_lease", "timeout"],
        engine=store.shop.engine,
    )


def cancels(store: Store, world: Callable[[], Entity]) -> Any:
    def cancel(order: Entity) -> None:
        store.rows[order.id] = store.rows[order.id]._replace(goal="cancelled")
        store.shop.engine.enqueue(order)

    return check_concurrent(
        world, cancel, snapshot=lambda order: store.rows[order.id][:2], engine=store.shop.engine
    )


CHECKS = [crashes, cancels]


def run(shop: Shop, mutant: Mutant) -> set[str]:
    """The checks that fail."""
    store = Store(shop)
    cls = order_of(store, mutant)

    def world() -> Entity:
        store.reset()
        return cls("42")

    failing = set()
    for check in CHECKS:
        try:
            check(store, world)
        except AssertionError:
            failing.add(check.__name__)
    return failing


def test_the_order_that_is_right_passes(shop: Shop) -> None:
    assert run(shop, None) == set()


@pytest.mark.parametrize(
    ("mutant", "by"),
    [
        ("effect before its intent", "crashes"),
        ("key from uuid4", "crashes"),
        ("swallowed exception", "crashes"),
        ("goal read once and kept", "cancels"),
    ],
)
def test_each_mutant_is_found(shop: Shop, mutant: str, by: str) -> None:
    """`enqueue` outside of `on_commit` is planted in test_django."""
    assert by in run(shop, mutant)
