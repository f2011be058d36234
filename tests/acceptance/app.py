"""The Celery app under test, the entities that it evaluates, and the world in which these live.

Everything that the processes of one test run share lies in one directory: `settings.json`, the ledger, and
the world's files. A worker gets the directory's name from its environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
from celery import Celery

from celery_goalstate import Action, Context, Engine, Entity, Requeue, Stop
from celery_goalstate.exceptions import PermanentError
from tests.acceptance.ledger import Ledger
from tests.servers import poll

MEGABYTE, HOARD = 2**20, 200
DIRECTORY = "GOALSTATE_ACCEPTANCE_DIRECTORY"


class World:
    """What entities are and do, in files: the source of truth that lives longer than any process.

    Each entity has steps, which become its actions; a version that is wanted, which is its goal; and the
    version that it has reached, which is its state.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _file(self, kind: str, name: str) -> Path:
        return self.directory / kind / name

    def _write(self, path: Path, content: str) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)

    def _read(self, path: Path, default: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return path.read_text()
        return default

    def script(self, id: str, *steps: str) -> None:
        """The steps of an entity. After the colon stands a number, or a gate's name.

        `ok`; `fail:N` fails the first N times; `permanent` fails for good the first time; `again:S` asks once
        for another look after S seconds; `stop`; `die:N` kills its own process the first N times;
        `die-by:WAY` dies each time, in a way that `die` knows; `work:S` takes S seconds; `hold:GATE` takes
        until the gate is open; `timeout:N` hangs the first N times, and has gevent cut it off; `reach` makes
        the state what the goal was when the evaluation began.
        """
        self._write(self._file("scripts", id), json.dumps(steps))

    def steps(self, id: str) -> list[str]:
        return json.loads(self._read(self._file("scripts", id), '["reach"]'))

    def want(self, id: str, version: int) -> None:
        self._write(self._file("wanted", id), str(version))

    def wanted(self, id: str) -> int:
        return int(self._read(self._file("wanted", id), "1"))

    def reach(self, id: str, version: int) -> None:
        self._write(self._file("reached", id), str(version))

    def reached(self, id: str) -> int:
        return int(self._read(self._file("reached", id), "0"))

    def open(self, gate: str) -> None:
        self._write(self._file("gates", gate), "")

    def is_open(self, gate: str) -> bool:
        return self._file("gates", gate).exists()

    def attempts(self, id: str, step: int) -> int:
        """How often this step of the entity has been tried, this time included."""
        path = self._file("attempts", f"{id}.{step}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(b".")
            return file.tell()


class PlannedError(Exception):
    """An action's failure, as planned."""


class Step:
    """One step of an entity's script as an action, with its lines in the ledger."""

    def __init__(self, world: World, ledger: Ledger, number: int, step: str) -> None:
        self.world = world
        self.ledger = ledger
        self.number = number
        self.verb, _, self.object = step.partition(":")

    def __call__(self, ctx: Context, entity: Entity) -> Requeue | Stop | None:
        id, action, token = entity.get_id(), f"{self.number}-{self.verb}", int(ctx.fencing_token)
        self.ledger.write("start", id, action=action, token=token, failures=ctx.failures)
        outcome = "raised"
        try:
            result = self._do(id, ctx)
            outcome = "again" if isinstance(result, Requeue) else "ok"
            return result
        finally:
            self.ledger.write("end", id, action=action, token=token, outcome=outcome)

    def _do(self, id: str, ctx: Context) -> Requeue | Stop | None:
        match self.verb:
            case "fail":
                if (attempt := self.world.attempts(id, self.number)) <= int(self.object):
                    raise PlannedError(f"attempt {attempt} of {id}")
            case "permanent":
                if self.world.attempts(id, self.number) == 1:
                    raise PermanentError(f"{id} is beyond repair")
            case "again":
                if self.world.attempts(id, self.number) == 1:
                    return Requeue(float(self.object))
            case "stop":
                return Stop()
            case "work":
                time.sleep(float(self.object))  # the work
            case "die":
                if self.world.attempts(id, self.number) <= int(self.object):
                    self.ledger.write("kill", pids=[os.getpid()])
                    os.kill(os.getpid(), signal.SIGKILL)
            case "die-by":
                die(self.object)
            case "hold":
                poll(f"gate {self.object} is open", lambda: self.world.is_open(self.object), timeout=60)
            case "timeout":
                if self.world.attempts(id, self.number) <= int(self.object):
                    with gevent.Timeout(0.1):
                        die("hang")
            case "reach":
                self.world.reach(id, ctx.goal_state)
        return None


def die(way: str) -> None:
    """How an action can take its process along; after `full`, Python can still say so."""
    match way:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(1)
        case "segfault":
            ctypes.string_at(0)
        case "hang":  # until a time limit, or whoever waits for it gives up
            poll("a time limit ends this", lambda: False, timeout=60)
        case "hoard":  # until somebody notices, and kills the process
            hoard = [b"x" * MEGABYTE for _ in range(HOARD)]
            poll("killed for the memory of this process", lambda: not hoard, timeout=60)
        case "full":  # more than the process may have
            before = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (2**30, before[1]))
            try:
                bytearray(2**31)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, before)


class Things:
    """The app, its engine and the class of its entities, all bound to one directory."""

    def __init__(self, directory: Path) -> None:
        world = self.world = World(directory)
        ledger = self.ledger = Ledger(directory / "ledger")
        self.app = Celery("acceptance", set_as_current=False)
        self.app.conf.update(json.loads((directory / "settings.json").read_text()))
        self.engine = Engine(self.app)

        @self.engine.register
        class Thing(Entity):
            def get_state(self) -> int:
                self.read_at = time.monotonic()
                return world.reached(self.get_id())

            def get_goal_state(self) -> int:
                return world.wanted(self.get_id())

            def get_action_list(self, state: int, goal_state: int) -> list[Action]:
                # Noted here, since the states are read a second time after the actions.
                ledger.write("look", self.get_id(), at=self.read_at)
                steps = enumerate(world.steps(self.get_id()))
                return [
                    Action(f"{n}-{step.split(':')[0]}", Step(world, ledger, n, step)) for n, step in steps
                ]

        @self.engine.register(batch_size=16, max_failures=2)
        class Small(Thing):
            """One of many."""

        @self.engine.register(max_failures=2, time_limit=2)
        class Poison(Thing):
            """One that takes its process along."""

        self.Thing, self.Small, self.Poison = Thing, Small, Poison

        @self.app.task(name="acceptance.marker", shared=False)
        def marker(name: str) -> None:
            """Shows that the workers have come so far."""
            ledger.write("marker", name)

        @self.app.task(name="acceptance.rogue", shared=False)
        def rogue(id: str, token: int) -> None:
            """What must never happen: an evaluation of an entity next to another one."""
            ledger.write("start", id, action="rogue", token=token)
            ledger.write("end", id, action="rogue", token=token, outcome="ok")

    @contextlib.contextmanager
    def _noted(self, event: str, done: str, id: str, **fields: Any) -> Iterator[None]:
        call = self.ledger.call()
        self.ledger.write(event, id, call=call, **fields)
        yield
        self.ledger.write(done, id, call=call)

    def enqueue(self, id: str, delay: float = 0.0, *, want: int | None = None, **options: Any) -> Any:
        """`engine.enqueue` with its lines in the ledger; `want` changes the goal just before."""
        with self._noted("enqueue", "enqueued", id, delay=delay):
            if want is not None:
                self.world.want(id, want)
            return self.engine.enqueue(self.Thing(id), delay, **options)

    def enqueue_all(self, ids: list[str]) -> None:
        """`engine.enqueue_many` of small things, with its lines in the ledger."""
        with contextlib.ExitStack() as stack:
            for id in ids:
                stack.enter_context(self._noted("enqueue", "enqueued", id, delay=0.0))
            assert self.engine.enqueue_many(map(self.Small, ids)) == len(ids)

    def delete(self, id: str) -> bool:
        with self._noted("delete", "deleted", id):
            return self.engine.delete(self.Thing(id))


def from_environment() -> Celery:
    """The app of a worker process."""
    return Things(Path(os.environ[DIRECTORY])).app
