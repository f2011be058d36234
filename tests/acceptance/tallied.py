"""An app whose workers note each evaluation in a file: what the index's counters are compared with.

A process is killed at points only where it is known what has been counted: within an action.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery import Celery, signals

from celery_goalstate import Context, Engine, Entity, Requeue
from celery_goalstate.exceptions import EntityGone, PermanentError
from celery_goalstate.signals import evaluation_finished, lease_lost
from tests.servers import poll

DIRECTORY = "GOALSTATE_TALLY_DIRECTORY"
#: In the environment of a worker that is to be killed while an entity holds it.
FRAGILE = "GOALSTATE_TALLY_FRAGILE"

KIND = "order"
#: What an entity does, by the remainder of its number; all others reach their goal at once.
WAYS = dict(enumerate(("die", "fail", "requeue", "permanent", "gone", "hold", "nothing")))
MODULUS = 20


class Notes:
    """One file, to which many processes append lines."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / "notes"

    def write(self, what: str, **fields: Any) -> None:
        line = json.dumps({"what": what, "pid": os.getpid(), "at": time.time(), **fields}) + "\n"
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line.encode())  # at once: a process may be killed next
        os.close(file)

    def read(self) -> list[dict[str, Any]]:
        return (
            [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []
        )

    def first_time(self, id: str) -> bool:
        """Whether nobody has asked before, of this entity."""
        try:
            (self.directory / f"tried-{id}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def reach(self, id: str) -> None:
        (self.directory / f"reached-{id}").touch()

    def has_reached(self, id: str) -> bool:
        return (self.directory / f"reached-{id}").exists()

    def open_gate(self) -> None:
        (self.directory / "gate").touch()

    def gate_is_open(self) -> bool:
        return (self.directory / "gate").exists()


class Tallied:
    """The app, its engine and its kind."""

    def __init__(self, directory: Path) -> None:
        notes = self.notes = Notes(directory)
        self.app = Celery("tallied", set_as_current=False)
        self.app.conf.update(json.loads((directory / "settings.json").read_text()))
        self.engine = Engine(self.app)

        @self.engine.register
        class Order(Entity):
            kind = KIND

            def get_state(self) -> str:
                return "reached" if notes.has_reached(self.id) else "new"

            def get_goal_state(self) -> str:
                return "reached"

            def get_action_list(self, state: str, goal_state: str) -> list[Any]:
                return [act, look_back] if state != goal_state else []

        def act(ctx: Context, entity: Entity) -> Requeue | None:
            return _act(notes, entity.get_id())

        def look_back(ctx: Context, entity: Entity) -> None:
            """One more action, to be counted by its own name."""

        @self.engine.around_action
        @contextlib.contextmanager
        def note_action(ctx: Context, action: Any) -> Iterator[None]:
            how = "failed"
            try:
                yield
                how = "ok"
            finally:
                notes.write("action", id=ctx.entity.get_id(), name=action.name, how=how)

        @self.engine.around_evaluation
        @contextlib.contextmanager
        def note_evaluation(evaluation: Any) -> Iterator[None]:
            notes.write("begin", id=evaluation.ref.id)
            yield

        @evaluation_finished.connect(weak=False)
        def note_outcome(id: str, outcome: Any, **_: Any) -> None:
            notes.write("end", id=id, outcome=_outcome(outcome))

        @lease_lost.connect(weak=False)
        def note_loss(id: str, **_: Any) -> None:
            notes.write("lost", id=id)

        @signals.task_prerun.connect(weak=False)
        def note_task(task: Any, **_: Any) -> None:
            if task.name == f"goalstate.{KIND}":
                notes.write("task")

        self.Order = Order


def _act(notes: Notes, id: str) -> Requeue | None:
    way = WAYS.get(int(id) % MODULUS)
    if way == "nothing":
        return None
    if way == "hold" and not notes.gate_is_open():
        if FRAGILE not in os.environ:
            return Requeue(0.1)  # until it comes to the fragile one
        notes.write("hold", id=id)
        poll("killed, or let go", notes.gate_is_open, timeout=120)
    elif way not in {None, "hold"} and notes.first_time(id):
        match way:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "fail":
                raise ConnectionError("no route")
            case "requeue":
                return Requeue(0.05)
            case "permanent":
                raise PermanentError("never")
            case "gone":
                raise EntityGone(id)
    notes.reach(id)
    return None


def _outcome(outcome: Any) -> str:
    """In the words of the documentation."""
    if outcome.gone:
        return "gone"
    if outcome.quarantined:
        return "quarantined"
    if outcome.error is not None:
        return "failed"
    if outcome.converged:
        return "converged"
    return "unconverged" if outcome.delay is None else "requeued"


@dataclass
class Tally:
    """What the notes say has happened."""

    evaluations: Counter[str] = field(default_factory=Counter)
    actions: Counter[tuple[str, str]] = field(default_factory=Counter)
    tasks: int = 0
    begun: int = 0
    fenced: int = 0
    killed: int = 0

    @classmethod
    def of(cls, notes: Notes) -> Tally:
        """A process evaluates one entity at a time: what it notes in between belongs to it."""
        tally, under_way, ended = cls(), dict[int, list[Any]](), dict[int, tuple[str, list[Any]]]()

        def accept(pid: int) -> None:
            if pid in ended:
                outcome, actions = ended.pop(pid)
                tally.evaluations[outcome] += 1
                tally.actions.update(actions)

        for note in notes.read():
            pid = note["pid"]
            match note["what"]:
                case "task":
                    tally.tasks += 1
                    accept(pid)
                case "begin":
                    accept(pid)
                    tally.begun += 1
                    under_way[pid] = []
                case "action":
                    under_way[pid].append((note["name"], note["how"]))
                case "end":
                    ended[pid] = note["outcome"], under_way.pop(pid)
                case "lost" if pid in ended:  # its outcome was dropped; the sweeper has ended it before
                    ended.pop(pid)
                    tally.fenced += 1
                    tally.evaluations["lost"] += 1
        for pid in list(ended):
            accept(pid)
        tally.killed = len(under_way)
        tally.evaluations["lost"] += tally.killed
        return tally


def from_environment() -> Celery:
    """The app of a worker process."""
    return Tallied(Path(os.environ[DIRECTORY])).app
