"""The app under chaos: its entities, the world that they change, and the notes that its processes take.

Everything that the processes of one run share lies in one directory: `settings.json`, the ledger, the world's
files. Processes get the directory's name from their environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery import Celery

from celery_goalstate import Action, Context, Engine, Entity, EntityRef, Requeue
from celery_goalstate import index as indexes
from celery_goalstate.exceptions import EntityGone, IndexUnavailable, PermanentError
from celery_goalstate.index.base import Claim, Index
from tests.acceptance.app import die
from tests.acceptance.ledger import Ledger

DIRECTORY = "GOALSTATE_CHAOS_DIRECTORY"
INDEX = "GOALSTATE_CHAOS_INDEX"  # an URL in place of the one of the settings

#: Messages are published to the one queue, and taken by the workers from the other: the harness carries them,
#: not always faithfully.
POST, WORK = "post", "work"

# Short, so that recovery takes seconds.
LEASE = 1.5
HORIZON = 2.0
RETRY_DELAY, MAX_RETRY_DELAY = 0.1, 2.0
MAX_FAILURES = 3  # of poison
BROKER_TIMEOUT = 2.0
#: Nobody waits for longer for a broker that does not answer: to connect, to publish, and on a busy machine.
HELD_UP = 2 * BROKER_TIMEOUT + 2
SETTINGS = {
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "task_ignore_result": True,
    "task_default_queue": POST,
    "worker_hijack_root_logger": False,
    "goalstate_failure_retry_delay": RETRY_DELAY,
    "goalstate_max_retry_delay": MAX_RETRY_DELAY,
    "goalstate_jitter": False,
    "goalstate_lease": LEASE,
    "goalstate_resend_after": 1.5,
    "goalstate_sweep_interval": 0.15,
    "goalstate_eta_horizon": HORIZON,
    "goalstate_broker_timeout": BROKER_TIMEOUT,
}
#: So that each kind has entities on every node.
CLUSTER = {"goalstate_shards": 3}
#: RabbitMQ then holds back the messages that are not due.
QUORUM = {
    "task_default_queue_type": "quorum",
    "task_default_exchange_type": "topic",
    "task_create_missing_queue_type": "quorum",
    "task_create_missing_queue_exchange_type": "topic",
}


@dataclass(frozen=True)
class Plan:
    """What entities of one kind do, how many there are, and how they are to end."""

    steps: tuple[str, ...]  #: their actions, each of what `Things._do` knows; several are joined by "+"
    entities: int
    weight: float  #: how often producers choose them
    error: str = ""  #: what they are quarantined for in the end; empty: they reach their goals
    far: bool = False  #: they are enqueued for days or years ahead only, and never looked at
    vanishes: bool = False  #: at times they are gone from the source of truth while they are scheduled
    refused: bool = False  #: at times their messages cannot be published
    options: dict[str, Any] = field(default_factory=dict)

    def does(self, verb: str) -> bool:
        """Whether one of its actions does this."""
        return any(part.partition(":")[0] == verb for step in self.steps for part in step.split("+"))


def _poison(how: str, error: str = "WorkerLost", **options: Any) -> Plan:
    return Plan((f"die-by:{how}",), 2, 0, error, options={"max_failures": MAX_FAILURES, **options})


KINDS = {
    # The first that a sweep comes to: it is to hold up none of the others.
    "refused": Plan(("write",), 20, 5, refused=True),
    "steady": Plan(("work:0.1", "write"), 120, 60),
    "many": Plan(("write",), 5000, 60),
    "slow": Plan((f"work:{LEASE * 1.3}", f"work:{LEASE * 0.5}", "write"), 12, 3),
    "flaky": Plan(("work:0.02", "fail:2", "write"), 30, 12),
    "patient": Plan(("again:0.4", "write"), 30, 12),
    "chain": Plan(("write", "pass-on"), 20, 8),
    "crowd": Plan(("work:0.03", "write"), 40, 15, options={"batch_size": 8}),
    "risky": Plan(("work:0.03", "die:1", "write"), 8, 1, options={"batch_size": 4}),
    "broken": Plan(("permanent",), 8, 2, "PermanentError"),
    "distant": Plan((), 20, 4, far=True),
    "deadly": Plan(("die:1", "write"), 6, 1),
    "polling": Plan(("write", "poll:2"), 12, 4),
    "guarded": Plan(("stall+write",), 10, 4),
    "careless": Plan(("stall+overwrite",), 10, 4),
    "restless": Plan(("stall+self:ctx+self:ctx-in-thread", "work:0.3", "self:engine", "write"), 12, 5),
    "outsider": Plan(("self:engine-in-thread", "write"), 8, 2),
    "delicate": Plan((f"work:{LEASE * 0.4}", "write"), 12, 3, options={"max_failures": 2}),
    "vanishing": Plan(("work:0.02", "write"), 12, 5, vanishes=True),
    "poison-kill": _poison("kill"),
    "poison-exit": _poison("exit"),
    "poison-segfault": _poison("segfault"),
    "poison-hang": _poison("hang", time_limit=1),
    "poison-full": _poison("full", "MemoryError"),
}
POISON = [kind for kind in KINDS if kind.startswith("poison-")]
STALLING = [kind for kind, plan in KINDS.items() if plan.does("stall")]


class Mark:
    """Yes or no, for all processes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __bool__(self) -> bool:
        return self._path.exists()

    def set(self, value: bool) -> None:
        self._path.touch() if value else self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A file that nobody else changes meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _rewrite(file: int, *numbers: int) -> None:
    """In one write, which is done or not done. What is left of longer numbers follows in other lines."""
    os.pwrite(file, b"%s\n" % b" ".join(b"%d" % number for number in numbers), 0)


class World:
    """What entities are and are meant to be, in files: the source of truth."""

    def __init__(self, directory: Path, ledger: Ledger) -> None:
        self._directory = directory / "world"
        self._directory.mkdir(exist_ok=True)
        self._ledger = ledger
        self.refuses = Mark(self._directory / "refuses")  #: is there a kind that cannot be published?
        self.settles = Mark(self._directory / "settles")  #: is nothing to be polled any more?

    def _path(self, ref: EntityRef, what: str) -> Path:
        return self._directory / f"{ref.kind}.{ref.id}.{what}"

    def _number(self, ref: EntityRef, what: str) -> int:
        with contextlib.suppress(FileNotFoundError):
            return int((self._path(ref, what).read_text().split() or [0])[0])
        return 0

    def wanted(self, ref: EntityRef) -> int:
        return self._number(ref, "wanted")

    def want_more(self, ref: EntityRef) -> None:
        """Move the goal."""
        with _locked(self._path(ref, "wanted")) as file:
            _rewrite(file, self.wanted(ref) + 1)

    def reached(self, ref: EntityRef) -> int:
        return self._number(ref, "reached")

    def reach(self, ref: EntityRef, version: int, token: int) -> None:
        """Set the state, unless somebody with a newer token has done so."""
        with _locked(self._path(ref, "reached")) as file:
            newest = int((os.pread(file, 100, 0).split() or [0, 0])[1])
            if token < newest:
                self._ledger.write("fenced", str(ref), token=token, newest=newest)
                raise FencedError(f"{ref} was written under {newest}, newer than {token}")
            _rewrite(file, version, token)
            self._ledger.write("write", str(ref), token=token, version=version)

    def overwrite(self, ref: EntityRef, version: int, token: int) -> None:
        """Set the state, whoever has done so."""
        with _locked(self._path(ref, "reached")) as file:
            _rewrite(file, version)
            self._ledger.write("overwrite", str(ref), token=token, version=version)

    def attempts(self, ref: EntityRef, what: str) -> int:
        """How often something has been tried, this time included."""
        with self._path(ref, what).open("ab") as file:
            file.write(b".")
            file.flush()
            return file.tell()

    def mark(self, ref: EntityRef, *, gone: bool) -> None:
        path = self._path(ref, "gone")
        path.touch() if gone else path.unlink(missing_ok=True)

    def is_gone(self, ref: EntityRef) -> bool:
        return self._path(ref, "gone").exists()

    def ask_to_stall(self, ref: EntityRef) -> None:
        """Let the next of its actions that can stop its process, until somebody lets that go on."""
        self._path(ref, "stalled").unlink(missing_ok=True)
        self._path(ref, "stall").touch()

    def asks_no_more(self, ref: EntityRef) -> bool:
        """Take that back; False: it is too late, an action has read it."""
        try:
            self._path(ref, "stall").unlink()
        except FileNotFoundError:
            return False
        return True

    def stall(self, ref: EntityRef) -> None:
        """Stop this process, if that was asked for."""
        with contextlib.suppress(FileNotFoundError):
            self._path(ref, "stall").unlink()
            self._ledger.write("freeze", pids=[os.getpid()])
            self._path(ref, "stalled").write_text(f"{os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGSTOP)

    def stalled(self, ref: EntityRef) -> int:
        """The id of the process that has stopped itself, or is about to; 0: there is none yet."""
        return self._number(ref, "stalled")


class FencedError(Exception):
    """The world was changed under a newer fencing token."""


class RefusedError(Exception):
    """A message was not published, as planned."""


class PlannedError(Exception):
    """An action's failure, as planned."""


class NotingIndex:
    """Notes in the ledger what the index is asked and what it answers.

    A time is taken *before* the question: a lease lasts at least until that time plus its length.
    """

    def __init__(self, index: Index, ledger: Ledger) -> None:
        self._index = index
        self._ledger = ledger
        self._own = threading.local()  # the tokens of the entities that this thread evaluates
        self.after_enqueue: Callable[[], None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def token(self, ref: EntityRef) -> int:
        """Of the evaluation in this thread."""
        return int(self._own.tokens[str(ref)])

    @property
    def seconds(self) -> float:
        """How long enqueues of this thread have waited for the index."""
        return getattr(self._own, "seconds", 0.0)

    def enqueue(self, *args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            scheduled = self._index.enqueue(*args, **kwargs)
        finally:
            self._own.seconds = self.seconds + time.monotonic() - began
        if self.after_enqueue and any(each.wakeup for each in scheduled):
            self.after_enqueue()
        return scheduled

    def claim(self, kind: str, wakeups: Any, **kwargs: Any) -> Any:
        asked = time.monotonic()
        replies = self._index.claim(kind, wakeups, **kwargs)
        self._note_claims(kind, replies, asked, [int(token) for _, token in wakeups], batch=len(wakeups) > 1)
        return replies

    def take(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        asked = time.monotonic()
        replies = self._index.take(kind, *args, **kwargs)
        self._note_claims(kind, replies, asked, [None] * len(replies), batch=True)
        return replies

    def _note_claims(
        self, kind: str, replies: Any, asked: float, wakeups: list[int | None], *, batch: bool
    ) -> None:
        self._own.tokens = {}
        for reply, wakeup in zip(replies, wakeups, strict=True):
            name = f"{kind}/{reply.id}"
            if isinstance(reply, Claim):
                self._own.tokens[name] = reply.lease
                self._ledger.write(
                    "claim", name,
                    token=int(reply.lease), asked=asked, failures=reply.failures, lateness=reply.lateness,
                    batch=batch, wakeup=wakeup,
                )  # fmt: skip
            else:
                self._ledger.write("refusal", name, reason=reply.reason)

    def renew(self, kind: str, runs: Any, **where: Any) -> Any:
        asked = time.monotonic()
        replies = self._index.renew(kind, runs, **where)
        for run, held in zip(runs, replies, strict=True):
            if held:
                self._ledger.write("renewal", f"{kind}/{run.id}", token=int(run.lease), asked=asked)
        return replies

    def resend(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        wakeups = self._index.resend(kind, *args, **kwargs)
        for wakeup in wakeups:
            self._ledger.write("resend", f"{kind}/{wakeup.id}")
        return wakeups

    def finish(self, kind: str, reports: Any) -> Any:
        for report in reports:
            self._ledger.write(
                "report", f"{kind}/{report.id}",
                token=int(report.lease), sweeper=report.lost_at is not None, verdict=report.verdict,
                delay=report.delay, error=report.error,
            )  # fmt: skip
        replies = self._index.finish(kind, reports)
        for report, reply in zip(reports, replies, strict=True):
            self._ledger.write(
                "reply", f"{kind}/{report.id}",
                token=int(report.lease), sweeper=report.lost_at is not None, result=reply.result,
            )  # fmt: skip
        return replies


class Things:
    """The app, its engine and its entities, all bound to one directory."""

    def __init__(self, directory: Path, index_url: str | None = None) -> None:
        settings = json.loads((directory / "settings.json").read_text())
        if index_url:
            settings["goalstate_index_url"] = index_url
        self.ledger = Ledger(directory / "ledger", sync=True)
        self.world = World(directory, self.ledger)
        self.app = Celery("chaos", set_as_current=False)
        self.app.conf.update(settings, task_routes=(self._route,))
        self.engine = Engine(self.app)
        self.index = index = NotingIndex(self._open_index(), self.ledger)
        indexes.open_index = lambda settings: index  # the engine asks for it when it is first used
        self.open_calls: list[tuple[str, str]] = []  # entity and call of what is being enqueued now
        self.classes = {kind: self._register(kind, plan) for kind, plan in KINDS.items()}

    def _open_index(self) -> Index:
        while True:
            try:
                return indexes.open_index(self.engine.settings)
            except IndexUnavailable:  # a cluster is asked for its nodes
                time.sleep(0.1)  # it may be away for seconds

    def _route(self, name: str, *_args: Any, **_options: Any) -> None:
        """One of Celery's routers."""
        kind = KINDS.get(name.removeprefix("goalstate."))
        if kind and kind.refused and self.world.refuses:
            raise RefusedError(f"nobody may publish {name}")

    def _register(self, kind: str, plan: Plan) -> type[Entity]:
        world, things = self.world, self

        class Thing(Entity):
            @classmethod
            def iter_unconverged(cls) -> Iterable[str]:
                refs = (EntityRef(kind, str(number)) for number in range(plan.entities))
                return (
                    ref.id
                    for ref in refs
                    if world.wanted(ref) != world.reached(ref) and not world.is_gone(ref)
                )

            def get_state(self) -> int:
                if plan.vanishes and world.is_gone(self.ref):
                    things.ledger.write("look", str(self.ref), token=things.index.token(self.ref))
                    raise EntityGone(f"there is no {self.ref}")
                return world.reached(self.ref)

            def get_goal_state(self) -> int:
                return world.wanted(self.ref)

            def get_action_list(self, state: int, goal_state: int) -> list[Action]:
                things.ledger.write("look", str(self.ref), token=things.index.token(self.ref))
                return [Action(step, things._step(step)) for step in plan.steps]

        Thing.kind = kind
        return self.engine.register(Thing, **plan.options)

    def _step(self, step: str) -> Callable[[Context, Entity], Requeue | None]:
        def execute(ctx: Context, entity: Entity) -> Requeue | None:
            name, token = str(entity.ref), ctx.fencing_token
            self.ledger.write("start", name, action=step, token=token)
            outcome = "raised"
            try:
                for part in step.split("+"):
                    result = self._do(part, ctx, entity.ref)
                outcome = "ok"
                return result
            finally:
                self.ledger.write("end", name, action=step, token=token, outcome=outcome)

        return execute

    def _do(self, step: str, ctx: Context, ref: EntityRef) -> Requeue | None:
        verb, _, argument = step.partition(":")
        match verb:
            case "work":  # some seconds, more or less
                time.sleep(float(argument) * random.uniform(0.8, 1.2))  # the work
            case "write":
                self.world.reach(ref, ctx.goal_state, ctx.fencing_token)
            case "overwrite":
                self.world.overwrite(ref, ctx.goal_state, ctx.fencing_token)
            case "stall":
                self.world.stall(ref)
            case "self":  # once for each goal
                if self._attempt(step, ctx, ref) == 1:
                    self._enqueue_itself(argument, ctx, ref)
            case "poll":
                return None if self.world.settles else Requeue(float(argument))
            case "fail":  # the first times, for each goal
                if (attempt := self._attempt(verb, ctx, ref)) <= int(argument):
                    raise PlannedError(f"attempt {attempt}")
            case "again":  # later, once for each goal
                if self._attempt(verb, ctx, ref) == 1:
                    return Requeue(float(argument))
            case "pass-on":
                self.enqueue([EntityRef("steady", ref.id)])
            case "permanent":
                raise PermanentError("beyond repair")
            case "die":
                if self._attempt(verb, ctx, ref) <= int(argument):
                    os.kill(os.getpid(), signal.SIGKILL)
            case "die-by":
                die(argument)
        return None

    def _enqueue_itself(self, how: str, ctx: Context, ref: EntityRef) -> None:
        """By its context it speaks from inside, in whatever thread; by the engine, in its own thread only."""
        by, _, in_thread = how.partition("-")
        enqueue = ctx.enqueue if by == "ctx" else self.engine.enqueue
        inside = {"by": ctx.fencing_token} if by == "ctx" or not in_thread else {}

        def call() -> None:
            with self._noted("enqueue", "enqueued", [ref], delay=0.0, **inside):
                enqueue(ref)

        if in_thread:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(call).result()
        else:
            call()

    def _attempt(self, verb: str, ctx: Context, ref: EntityRef) -> int:
        return self.world.attempts(ref, f"{verb}-{ctx.goal_state}")

    # What producers do

    @contextlib.contextmanager
    def _noted(
        self, event: str, done: str, refs: Iterable[EntityRef], **fields: Any
    ) -> Iterator[dict[str, Any]]:
        """Yields what is to be noted of the answer."""
        call, names = self.ledger.call(), [str(ref) for ref in refs]
        self.open_calls = [(name, call) for name in names]
        answer: dict[str, Any] = {}
        for name in names:
            self.ledger.write(event, name, call=call, **fields)
        before = self.index.seconds
        try:
            yield answer
        except Exception as error:
            for name in names:
                self.ledger.write("gave-up", name, call=call, error=type(error).__name__)
            raise
        in_index = self.index.seconds - before
        for name in names:
            self.ledger.write(done, name, call=call, in_index=in_index, **answer)

    def enqueue(self, refs: list[EntityRef], delay: float = 0.0, **options: Any) -> None:
        replaces = options.get("replace", False)
        with self._noted("enqueue", "enqueued", refs, delay=delay, replaces=replaces) as answer:
            if len(refs) == 1:
                deadline = self.engine.enqueue(refs[0], delay, **options).deadline
                answer["deadline"] = deadline and deadline.timestamp()
            else:
                self.engine.enqueue_many(refs, delay, **options)

    def delete(self, ref: EntityRef) -> None:
        with self._noted("delete", "deleted", [ref]):
            self.engine.delete(ref)

    def delete_kind(self, kind: str, call: str) -> None:
        self.ledger.write("delete-kind", kind=kind, call=call)
        self.engine.delete_kind(kind)
        self.ledger.write("deleted-kind", kind=kind, call=call)

    def resync(self) -> None:
        """After a loss of the index."""
        for kind in KINDS:
            self.ledger.write("resync", kind=kind)
            self.insist(lambda kind=kind: self.engine.resync(kind))
            self.ledger.write("resynced", kind=kind)

    def insist(self, do: Callable[[], object]) -> None:
        """As a good producer does: say it again until it is certain that the index has it."""
        while True:
            try:
                do()
                return
            except IndexUnavailable:
                self.ledger.write("unavailable")
                time.sleep(0.1)  # the index may be away for seconds


def from_environment() -> Things:
    return Things(Path(os.environ[DIRECTORY]), os.environ.get(INDEX))
