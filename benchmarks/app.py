"""The app that is measured: a plain task that does nothing, and an entity that has nothing to do."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from celery_goalstate import Engine, Entity

app = Celery("benchmark", broker=os.environ.get("BENCHMARK_BROKER", "redis://"))
app.conf.update(
    task_ignore_result=True,
    worker_send_task_events=False,
    goalstate_window=1_000_000,  # so that every entity has its message, as every plain task has
    broker_connection_retry_on_startup=True,
)
engine = Engine(app)


@app.task(name="plain")
def plain(id: str) -> None:
    """Do nothing, as a task."""


@engine.register
class Order(Entity):
    """Does nothing, as an entity that is at its goal."""

    def get_state(self) -> str:
        return "done"

    def get_goal_state(self) -> str:
        return "done"

    def get_action_list(self, state: str, goal_state: str) -> Any:  # noqa: ARG002
        return None


@engine.register(batch_size=64)
class Small(Order):
    """The same, as one of many that share a task."""
