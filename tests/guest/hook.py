"""Gives an engine to every Celery app of this process, and of its forks, if `GUEST_ENGINE` says so.

`GUEST_ENGINE` holds the engine's settings as JSON. If that is null nothing is given, and nothing else
differs: each app and each consumer passes here all the same.
"""

from __future__ import annotations

import json
import os
from functools import cache
from types import SimpleNamespace
from typing import Any

from celery import Celery
from kombu import Consumer

SETTINGS: dict[str, Any] | None = json.loads(os.environ.get("GUEST_ENGINE", "null"))

given = 0  # engines to apps, and an engine's steps to consumers


def give_engine(app: Celery) -> None:
    """Celery calls this for each new app."""
    global given
    if SETTINGS is None:
        return
    from celery_goalstate import Engine, Entity, Rules

    class Guest(Entity):
        kind = "guest"
        rules = Rules({"home": {"away": [], "home": []}})

        def get_state(self) -> str:
            return "home"

        def get_goal_state(self) -> str:
            return "home"

    app.add_defaults(SETTINGS)
    Engine(app).register(Guest)
    given += 1


@cache
def app_of_consumers() -> Celery:
    return Celery("guest", set_as_current=False)


def consume_as_in_a_worker(self: Consumer, no_ack: bool | None = None) -> None:
    """Kombu's tests have consumers but no worker: each gets what an engine adds to a worker's consumer."""
    global given
    app = app_of_consumers()
    for step in app.steps["consumer"]:
        parent = SimpleNamespace(app=app, task_consumer=self, controller=SimpleNamespace(steps=()))
        step(parent).start(parent)
        given += 1
    consume(self, no_ack)


Celery.on_init = give_engine
consume = Consumer.consume
if os.environ.get("GUEST_CONSUMERS"):
    Consumer.consume = consume_as_in_a_worker
