"""A shop to be checked: orders that are right, and others that are wrong, each in a way of its own."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from celery import Celery

from celery_goalstate import Engine, Entity, Requeue


class Provider:
    """Somebody else's payment service: it charges each time that it is asked, but once for a key."""

    def __init__(self) -> None:
        self.charges: list[tuple[str, int]] = []
        self.keys: set[str] = set()

    def charge(self, id: str, amount: int, key: str = "") -> None:
        if not key or key not in self.keys:
            self.charges.append((id, amount))
        self.keys.add(key)

    def refund(self, id: str) -> None:
        self.charges.remove((id, 100))


class Shop:
    """An engine, its entity classes, and the world that they are about."""

    def __init__(self) -> None:
        self.app = Celery("shop", broker="amqp://nowhere", set_as_current=False)
        self.engine = Engine(self.app)
        self.provider = Provider()
        self.state: dict[str, str] = {}
        self.goal: dict[str, str] = {}
        self.intents: dict[str, str] = {}

    def order(self, **actions: Callable[[Any, Any], Any]) -> type[Entity]:
        """An entity class with these actions: from "placed" all of them, in this order."""
        shop = self

        class Order(Entity):
            def get_state(self) -> str:
                return shop.state[self.id]

            def get_goal_state(self) -> str:
                return shop.goal[self.id]

            def get_action_list(self, state: str, goal_state: str) -> Any:
                if state == goal_state:
                    return []
                return [*actions] if state == "placed" else ["ship"]

        for name, action in {"ship": self.ship, **actions}.items():
            setattr(Order, name, _method(action))
        return self.engine.register(Order)

    def world(self, cls: type[Entity]) -> Callable[[], Entity]:
        def world() -> Entity:
            self.provider.charges.clear()
            self.provider.keys.clear()
            self.intents.clear()
            self.state["42"], self.goal["42"] = "placed", "shipped"
            return cls("42")

        return world

    def seen(self, order: Entity) -> dict[str, Any]:
        return {"status": self.state[order.id], "charges": self.provider.charges}

    # -- actions

    def ship(self, ctx: Any, order: Entity) -> None:
        self.state[order.id] = "shipped"

    def charge_twice(self, ctx: Any, order: Entity) -> None:
        """No key: what was charged before a kill is charged again."""
        self.provider.charge(order.id, 100)

    def charge_once(self, ctx: Any, order: Entity) -> None:
        """The key is noted before it is used."""
        key = self.intents.setdefault(order.id, f"charge-{order.id}")
        self.provider.charge(order.id, 100, key)

    def charge_with_cleanup(self, ctx: Any, order: Entity) -> None:
        """What a `finally` undoes, no killed worker undoes."""
        shipped = False
        try:
            self.provider.charge(order.id, 100)
            self.ship(ctx, order)
            shipped = True
        finally:
            if not shipped:
                self.provider.refund(order.id)

    def pay(self, ctx: Any, order: Entity) -> None:
        self.state[order.id] = "paid"

    def unship(self, ctx: Any, order: Entity) -> None:
        self.state[order.id] = "placed"

    def poll(self, ctx: Any, order: Entity) -> Requeue:
        return Requeue(1)

    def charge_with_new_key(self, ctx: Any, order: Entity) -> None:
        self.provider.charge(order.id, 100, str(uuid.uuid4()))


def _method(action: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: Entity, ctx: Any) -> Any:
        return action(ctx, self)

    return method
