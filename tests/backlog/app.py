"""The app of a backlog: slow entities, other tasks in the same queue, and every message noted.

All processes of one test share a directory: `settings.json` and the ledger. They get its name from their
environment.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import before_task_publish

from celery_goalstate import Action, Context, Engine, Entity
from tests.acceptance.ledger import Ledger

DIRECTORY = "GOALSTATE_BACKLOG_DIRECTORY"
TASK = "goalstate.item"


class Things:
    """The app, its engine and its entities, bound to one directory."""

    def __init__(self, directory: Path) -> None:
        ledger = self.ledger = Ledger(directory / "ledger")
        settings = json.loads((directory / "settings.json").read_text())
        work, other_work = settings.pop("work"), settings.pop("other_work")
        app = self.app = Celery("backlog", set_as_current=False)
        app.conf.update(settings)
        self.engine = Engine(app)

        def do_nothing(ctx: Context, entity: Entity) -> None:
            due = ctx.deadline.timestamp() if ctx.deadline else 0.0
            ledger.write("look", entity.get_id(), due=due, lateness=ctx.lateness)
            time.sleep(work)  # what an evaluation costs

        @self.engine.register(converge=False)
        class Item(Entity):
            def get_state(self) -> str:
                return "as ever"

            get_goal_state = get_state

            def get_action_list(self, state: str, goal_state: str) -> list[Action]:
                return [Action("do_nothing", do_nothing)]

        self.Item = Item

        @app.task(name="backlog.other", shared=False)
        def other() -> None:
            """Another task of the app, followed by the next one until there is a file that says stop."""
            time.sleep(other_work)  # what the task costs
            if not (directory / "stop").exists():
                other.apply_async()

        self.other = other
        before_task_publish.connect(self._note, weak=False)

    def _note(self, sender: str, body: Any, **_: Any) -> None:
        if sender == TASK:
            for id, _token in body[0][0]:
                self.ledger.write("sent", id)


def from_environment() -> Things:
    return Things(Path(os.environ[DIRECTORY]))
