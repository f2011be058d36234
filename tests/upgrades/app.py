"""The app before and after an upgrade: the same entities, kept elsewhere or evaluated by another release.

All processes of a test share a directory: one file of settings for each stage (`old`, `new`), the ledger, and
what the entities do. `python -m tests.upgrades.app DIRECTORY STAGE PREFIX` is a producer, which enqueues
entities whose ids begin with PREFIX until the test tells it to stop.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from celery import Celery

import celery_goalstate
from celery_goalstate import Action, Engine, Entity
from tests.acceptance.app import Step, World
from tests.acceptance.ledger import Ledger

DIRECTORY = "GOALSTATE_UPGRADES_DIRECTORY"
STAGE = "GOALSTATE_UPGRADES_STAGE"

#: Where this process has the package from.
PACKAGE = str(Path(celery_goalstate.__file__).parents[1])

#: What entities do, one after the other: nothing that takes long.
SCRIPTS = (["reach"], ["fail:2", "reach"], ["again:0.3", "reach"], ["work:0.05", "reach"])


class Things:
    """The app of one stage. Its settings say under which kind it knows the entities."""

    def __init__(self, directory: Path, stage: str) -> None:
        settings: dict[str, Any] = json.loads((directory / f"{stage}.json").read_text())
        world = self.world = World(directory)
        ledger = self.ledger = Ledger(directory / "ledger")
        kind = settings.pop("kind")
        self.app = Celery("upgrades", set_as_current=False)
        self.app.conf.update(settings)
        self.engine = Engine(self.app)

        class Thing(Entity):
            def get_state(self) -> int:
                self.read_at = time.monotonic()
                return world.reached(self.get_id())

            def get_goal_state(self) -> int:
                return world.wanted(self.get_id())

            def get_action_list(self, state: int, goal_state: int) -> list[Action]:
                ledger.write("look", self.get_id(), at=self.read_at, package=PACKAGE)
                steps = enumerate(world.steps(self.get_id()))
                return [
                    Action(f"{n}-{step.split(':')[0]}", Step(world, ledger, n, step)) for n, step in steps
                ]

        Thing.kind = kind
        # A new goal is a reason to look at once, also before the deadline that comes with it: not here.
        self.Thing = self.engine.register(Thing, converge=False)

    def enqueue(self, id: str, delay: float = 0.0) -> None:
        """`engine.enqueue`, with a new goal and lines in the ledger."""
        call = self.ledger.call()
        self.ledger.write("enqueue", id, delay=delay, call=call)
        self.world.want(id, self.world.wanted(id) + 1)
        self.engine.enqueue(self.Thing(id), delay)
        self.ledger.write("enqueued", id, call=call)


def produce(things: Things, prefix: str, entities: int) -> None:
    """Enqueue some entities again and again, until the gate with the prefix' name opens."""
    ids = [f"{prefix}{number}" for number in range(entities)]
    for number, id in enumerate(ids):
        things.world.script(id, *SCRIPTS[number % len(SCRIPTS)])
    while not things.world.is_open(prefix):
        things.enqueue(random.choice(ids), random.choice([0.0, 0.0, 0.2, 1.0]))
        time.sleep(0.005)  # there is a limit to what two workers bear


def from_environment() -> Celery:
    """The app of a worker process."""
    return Things(Path(os.environ[DIRECTORY]), os.environ[STAGE]).app


if __name__ == "__main__":
    produce(Things(Path(sys.argv[1]), sys.argv[2]), sys.argv[3], entities=40)
