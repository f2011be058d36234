"""What `celery --app tests.topologies.polling` finds: entities that are evaluated again and again."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from celery import Celery

from celery_goalstate import Action, Context, Engine, Entity, Requeue
from tests.servers import Process

SETTINGS = "GOALSTATE_POLLING_SETTINGS"
ROOT = Path(__file__).parents[2]

#: As many as a cluster's nodes have some of each.
KINDS = [f"kind-{number}" for number in range(12)]


def again(ctx: Context, entity: Entity) -> Requeue:
    return Requeue(0.05)


class Polling(Entity):
    kind = "polling"

    def get_state(self) -> str:
        return "as ever"

    get_goal_state = get_state

    def get_action_list(self, state: str, goal_state: str) -> list[Action]:
        return [Action("again", again)]


def open_app(settings: dict[str, Any]) -> tuple[Celery, Engine]:
    app = Celery("polling", set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True, task_ignore_result=True, **settings)
    engine = Engine(app)
    for kind in KINDS:
        engine.register(type("Polling", (Polling,), {"kind": kind}), converge=False)
    return app, engine


class Worker(Process):
    """Two processes that evaluate them."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        super().__init__(
            [
                *(sys.executable, "-m", "celery", "--app", "tests.topologies.polling", "worker"),
                *("--concurrency", "2", "--without-mingle", "--without-gossip", "--loglevel", "INFO"),
            ],
            log=directory / "worker.log",
            env={SETTINGS: json.dumps(settings), "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
        )

    def evaluations(self) -> Counter[str]:
        """How many of each kind have ended."""
        return Counter(re.findall(r" succeeded in .*'(kind-\d+)/\S+: as ever: again ", self.output()))

    def lines(self, text: str) -> list[str]:
        """What it wrote that has this text."""
        return [line for line in self.output().splitlines() if text in line]


if settings := os.environ.get(SETTINGS):
    app, _ = open_app(json.loads(settings))
