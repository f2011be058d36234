"""The app that is measured: plain Celery's with an engine, and entities that have nothing to do."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.plain import app, note_lateness
from celery_goalstate import Engine, Entity

app.conf.goalstate_eta_horizon = float(os.environ.get("BENCHMARK_ETA_HORIZON", "30"))
engine = Engine(app)


@engine.register
class Order(Entity):
    """Is at its goal: an evaluation reads both states and does nothing."""

    def get_state(self) -> str:
        return "done"

    def get_goal_state(self) -> str:
        return "done"

    def get_action_list(self, state: str, goal_state: str) -> Any:  # noqa: ARG002 - the signature is given
        return None


@engine.register(batch_size=64)
class Small(Order):
    """The same, as one of many that share a task."""


@engine.register(batch_size=64)
class Crowd(Order):
    """One of a million such."""


@engine.register
class Punctual(Order):
    """Notes how late it is looked at."""

    def get_action_list(self, state: str, goal_state: str) -> Any:  # noqa: ARG002 - the signature is given
        note_lateness(self.id)  # here: the states are read once more at the end
