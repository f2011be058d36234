"""A shop whose orders end as their ids say: `fail-1` fails for ever, `hang-1` hangs, `gone-1` is given up."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import Any

from celery import Celery

from celery_goalstate import Engine, Entity, Rules
from celery_goalstate.exceptions import PermanentError

#: Seconds.
LEASE = 6.0
INDEX_TIMEOUT = 3.0


class State(enum.Enum):
    CART = 1
    PAID = 2
    SHIPPED = 3


def make_engine(broker: str, index: str, hanging: Path) -> Engine:
    """The shop. As long as there is a file `hanging`, what hangs, hangs."""
    app = Celery("shop", broker=broker, set_as_current=False)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        goalstate_index_url=index,
        goalstate_index_timeout=INDEX_TIMEOUT,
        goalstate_lease=LEASE,
    )
    engine = Engine(app)

    def charge(ctx: Any, order: Order) -> None:
        if order.id.startswith("fail"):
            raise ConnectionError("the carrier does not answer: <b>500</b>")
        if order.id.startswith("gone"):
            raise PermanentError("there is no such address")

    def call_carrier() -> None:
        while hanging.exists():
            time.sleep(0.05)  # polls: the test removes it

    def ship(ctx: Any, order: Order) -> None:
        if order.id.startswith("hang"):
            call_carrier()

    @engine.register
    class Order(Entity):
        rules = Rules({State.SHIPPED: {State.PAID: [charge, ship], State.SHIPPED: []}})

        def get_state(self) -> State:
            return State.SHIPPED if self.id.startswith("done") else State.PAID

        def get_goal_state(self) -> State:
            return State.SHIPPED

    @engine.register
    class Invoice(Entity):
        def get_state(self) -> str:
            return "open"

        def get_goal_state(self) -> str:
            return "open"

        def get_action_list(self, state: str, goal: str) -> list[Any]:
            return []

    return engine
