"""Plain tasks that note when they run: what `celery --app tests.chaos.plain` finds. See `paired`.

What the script and its worker share lies in one directory, whose name is in the worker's environment.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import redis
from celery import Celery

from celery_goalstate import Action, Engine, Entity

DIRECTORY = "GOALSTATE_PAIRED_DIRECTORY"
TASK = "plain"
WORK = 0.02  # seconds that a task takes; half of it before it notes that it runs

#: The points of a task at which it can be hit: before it has noted that it runs, and after.
BEFORE, AFTER = "before", "after"
PATIENCE = 90  # seconds that a task waits to be hit; the script has ended if it takes longer


class Arrival(NamedTuple):
    """A task that waits to be hit."""

    number: int
    pid: int


class Notes:
    """Which tasks have run, and which one waits to be hit: on a server that no fault reaches."""

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(url, decode_responses=True, socket_timeout=None)

    # What tasks call

    def ran(self, number: int) -> None:
        self._redis.rpush("runs", number)

    def come_to(self, point: str, number: int) -> None:
        """Wait here, if this is where a task is to be hit."""
        if (armed := self._redis.get("armed")) is None:
            return
        at, first = armed.split()
        if at == point and number >= int(first) and self._redis.delete("armed"):  # one takes it
            self._redis.rpush("arrivals", f"{number} {os.getpid()}")
            self._redis.blpop([f"go on {number}"], timeout=PATIENCE)

    # What the script calls

    def arm(self, point: str, first: int) -> None:
        """Let the next task that comes to this point wait, of those that are numbered from the first on."""
        self._redis.set("armed", f"{point} {first}")

    def arrival(self) -> Arrival | None:
        """The task that waits, if one does."""
        popped = self._redis.lpop("arrivals")
        return Arrival(*map(int, popped.split())) if popped else None

    def let_go(self, number: int) -> None:
        self._redis.rpush(f"go on {number}", "")

    def runs(self) -> list[int]:
        """The number of each task, as often as it ran."""
        return [int(number) for number in self._redis.lrange("runs", 0, -1)]


class Quiet(Entity):
    """Of a kind of which nothing is ever enqueued."""

    kind = "quiet"

    def get_state(self) -> str:
        return "there"

    def get_goal_state(self) -> str:
        return "there"

    def get_action_list(self, state: str, goal_state: str) -> list[Action]:
        return []


def make_app(settings: dict[str, Any], notes: Notes, *, engine: bool) -> Celery:
    app = Celery("paired", set_as_current=False)
    app.conf.update(settings)
    if engine:
        Engine(app).register(Quiet)

    @app.task(name=TASK)
    def plain(number: int) -> None:
        notes.come_to(BEFORE, number)
        time.sleep(WORK / 2)  # the work
        notes.ran(number)
        notes.come_to(AFTER, number)
        time.sleep(WORK / 2)  # the rest of it

    return app


if DIRECTORY in os.environ:
    shared = json.loads((Path(os.environ[DIRECTORY]) / "settings.json").read_text())
    app = make_app(shared["celery"], Notes(shared["notes"]), engine=shared["engine"])
