"""A simulation: one engine in a world of its own, where time passes only when it is told to.

    test ──► enqueue ──► SimulatedIndex ──► messages, in a list
                              │                 │
              sweeper ◄── clock moves ──► the kind's Celery task, in this thread: claim ─► evaluate ─► finish
                                                                                              │
                                                            points: a fault may strike here ──┘

What is simulated are the parts of the engine (`worker.parts`): index, publisher, leases, clock, random
numbers. What is evaluated is evaluated by the kind's own Celery task, in the calling thread.
"""

from __future__ import annotations

import functools
import gc
import inspect
import itertools
import pkgutil
import sys
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import Context as ContextVariables
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, NoReturn, Self
from unittest import mock

import celery._state

from celery_goalstate.actions import Action, Context
from celery_goalstate.description import Description, Status
from celery_goalstate.display import state_text
from celery_goalstate.engine import Engine
from celery_goalstate.entity import Entity, EntityLike, EntityRef
from celery_goalstate.evaluation import Evaluation
from celery_goalstate.index import limits_of
from celery_goalstate.index.base import Claim, Finish, Finished, Report, Request, Run, Verdict, Wakeup
from celery_goalstate.messages.notes import NO_LINK
from celery_goalstate.registry import Kind, all_engines
from celery_goalstate.settings import Settings
from celery_goalstate.testing import databases, mortal
from celery_goalstate.testing.faults import Fail, Fault, Kill, LoseLease
from celery_goalstate.testing.story import Event, Sort, scrubbed, shortened, told
from celery_goalstate.testing.world import SimulatedIndex, SimulatedKeeper
from celery_goalstate.worker import shutdown
from celery_goalstate.worker.parts import Parts
from celery_goalstate.worker.sweeper import Sweeper

BETWEEN_LOOKS = "between looks"
DAY = timedelta(days=1)
#: Lines of the story in an error.
LINES_TOLD = 24

#: What is watched: a function by its dotted name, or an object and the name of its method.
Watched = str | tuple[Any, str]


class NotIdle(AssertionError):
    """Something goes on and on."""


class Point(NamedTuple):
    """A moment at which a fault can strike."""

    name: str
    nth: int  #: it is passed for the so-many-th time; from 1
    of_call: bool = False  #: of a watched call, not of an action or a commit
    in_transaction: bool = False


@dataclass(slots=True)
class Look:
    """One evaluation, as it is seen in a simulation."""

    entity: str
    at: float  #: seconds since the simulation began
    state: Any = None  #: as read first
    final_state: Any = None  #: as read last
    goal_state: Any = None
    actions: list[str] = field(default_factory=list)  #: those that were begun
    outcome: str = ""  #: for people; empty: it never ended
    error: str = ""
    is_read: bool = False


@dataclass(slots=True, eq=False)
class _Message:
    kind: Kind
    wakeup: Wakeup
    due: int  #: milliseconds
    number: int


@dataclass(slots=True, eq=False)
class _Planned:
    point: str
    fault: Fault
    times: int
    nth: int | None
    has_struck: bool = False

    def strikes(self, point: Point) -> bool:
        return self.times > 0 and self.point == point.name and self.nth in {None, point.nth}


class Simulation:
    """See `simulate`."""

    def __init__(
        self, engine: Engine, *, start: datetime | None = None, settings: Settings | None = None
    ) -> None:
        self.engine = engine
        self._settings = settings or settings_of(engine)
        self.looks: list[Look] = []  #: all evaluations so far
        self.index_away = False  #: set it, and the index answers nobody
        self._start = self._clock = round((start or datetime.now(UTC)).timestamp() * 1000)
        self._messages: list[_Message] = []
        self._numbers = itertools.count(1)
        self._to_lose = self._to_double = 0
        self._events: list[Event] = []
        self._tokens: dict[str, int] = {}  # fencing tokens, by the order in which they were given
        self._planned: list[_Planned] = []
        self._seen: Counter[str] = Counter()
        self.points: list[Point] = []  #: all that were passed, in order
        self._commits = databases.Commits(self._reach, self._note_commit)
        self._look: Look | None = None  # the one under way
        self._level = 0  # how many workers are stalled
        self._is_mortal = False  # is the delivery under way one that can be killed?
        self._most_looks = sys.maxsize
        self._mistake: Exception | None = None  # of the test, for which no evaluation is to blame
        self._outside: ContextVariables = copy_context()
        self._stack = ExitStack()

    def __repr__(self) -> str:
        return f"<Simulation of {self.engine} at {self.now:%Y-%m-%d %H:%M:%S}>"

    # -- setting up

    def __enter__(self) -> Self:
        self._stack.enter_context(self.in_place())
        return self

    def __exit__(self, exc_type: object, *exc_info: object) -> None:
        self._stack.close()
        if exc_type is None:
            self.check_reached()

    def check_reached(self) -> None:
        """Raise `AssertionError` if something was to happen at a point that was never passed."""
        if missed := self.missed():
            points = ", ".join(dict.fromkeys(f'"{point.name}"' for point in self.points))
            raise AssertionError(
                f'nothing was ever at the point "{missed[0]}", so what was to happen there did not. Points'
                f" that were passed: {points or 'none'}"
            )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the block runs, the engine is simulated."""
        settings = self._settings
        self._index = SimulatedIndex(
            limits_of(settings),
            lambda: self._clock,
            is_away=lambda: self.index_away,
            enqueuing=self._check_committed,
            claimed=self._note_claim,
            finished=self._note_outcome,
        )
        self._keeper = SimulatedKeeper(self._index, settings.lease, self._seconds)
        self._parts = Parts(
            index=self._index,
            publisher=_Publisher(self._publish),
            keeper=self._keeper,
            clock=self._seconds,
            sleep=lambda seconds: self._pass_to(self._clock + _milliseconds(seconds)),
            now=lambda: self.now,
            random=lambda: 1.0,  # no jitter: each back-off in full
        )
        self._sweep_every = _milliseconds(settings.sweep_every)
        self._sweeper = Sweeper(
            "simulation", engine=self.engine, parts=self._parts, settings=settings, kinds=self._swept
        )
        hooks = self.engine.hooks
        mine: list[tuple[list[Any], Any]] = [
            (hooks.around_evaluation, self._around_evaluation),
            (hooks.states_read, self._note_states),
            (hooks.around_action, self._around_action),
        ]
        with ExitStack() as stack:
            stack.enter_context(self.engine.opened_with(self._parts, settings))
            for those, hook in mine:
                those.append(hook)
                stack.callback(those.remove, hook)
            stack.enter_context(databases.observed(self._commits))
            self._patches = stack
            self._outside = copy_context()
            self._travel()
            self._sweeper.sweep()  # it counts the time from its last sweep on
            yield

    def missed(self) -> list[str]:
        """The points at which something was to happen, and where nothing ever was."""
        return [planned.point for planned in self._planned if not planned.has_struck]

    def _swept(self) -> Mapping[str, Kind]:
        """All but those that are always scheduled: a test resyncs when it wants to."""
        kinds = [self.engine.kind(name) for name in self.engine.kinds]
        return {kind.name: kind for kind in kinds if kind.entity_class is not None and not kind.standing}

    # -- time

    @property
    def now(self) -> datetime:
        """The simulation's time, in UTC."""
        return datetime.fromtimestamp(self._clock / 1000, UTC)

    def advance(
        self,
        seconds: float = 0,
        *,
        minutes: float = 0,
        hours: float = 0,
        days: float = 0,
        looks: int = 1000,
    ) -> None:
        """Let time pass; what falls due meanwhile is evaluated at its time.

        Raises `NotIdle` after so many evaluations.
        """
        passes = timedelta(seconds=seconds, minutes=minutes, hours=hours, days=days)
        until = self._clock + _milliseconds(passes.total_seconds())
        with self._bounded(looks):
            while self._step(until):
                if len(self.looks) >= self._most_looks:
                    raise NotIdle(self._told(self._unrest(f"after {looks} evaluations")))
        self._pass_to(until)

    def run_until_idle(self, within: timedelta = DAY, looks: int = 1000) -> None:
        """Let time pass until nothing is scheduled any more, of kinds that are not paused.

        Raises `NotIdle` if that takes longer, or more evaluations.
        """
        __tracebackhide__ = True
        if problem := self.come_to_rest(within, looks):
            raise NotIdle(self._told(problem))

    def come_to_rest(self, within: timedelta, looks: int) -> str:
        """As `run_until_idle`; why it is not idle then. Empty: it is."""
        until = self._clock + _milliseconds(within.total_seconds())
        with self._bounded(looks):
            while self._goes_on():
                if len(self.looks) >= self._most_looks:
                    return self._unrest(f"after {looks} evaluations")
                if not self._step(until):
                    after = f"after {within}".removesuffix(", 0:00:00")
                    return self._unrest("while the index is away" if self.index_away else after)
        return ""

    @contextmanager
    def _bounded(self, looks: int) -> Iterator[None]:
        before, self._most_looks = self._most_looks, len(self.looks) + looks
        try:
            yield
        finally:
            self._most_looks = before

    def _goes_on(self) -> bool:
        return bool(self._index.pending()) or self._next_message(self._clock) is not None

    def _seconds(self) -> float:
        return self._clock / 1000

    def _next_message(self, until: float) -> _Message | None:
        due = [message for message in self._messages if message.due <= until]
        return min(due, key=lambda message: (message.due, message.number), default=None)

    def _step(self, until: int) -> bool:
        """Do what is next, or let time pass until something is; False: nothing is until then."""
        message = self._next_message(self._clock)
        if message is not None:
            self._messages.remove(message)
            self._deliver(message)
            return True
        times = [message.due for message in self._messages]
        if not self.index_away:
            changes = self._index.next_change(self._sweep_every)
            times += [] if changes is None else [changes]
        at = min(times, default=None)
        if at is None or at > until:
            return False
        self._pass_to(at)
        return True

    def _pass_to(self, clock: int) -> None:
        """Set the clock, renew the leases of whoever works on, and sweep."""
        if clock > self._clock:
            self._clock = clock
            self._travel()
            self._keeper.renew()
        if not self.index_away:
            while self._sweeper.sweep():
                pass

    def _travel(self) -> None:
        """Take time-machine along, where a test uses it: code under test asks for the time, too."""
        machine = sys.modules.get("time_machine")
        travellers = getattr(machine, "traveller_stack", None) or getattr(machine, "coordinates_stack", None)
        if travellers:
            travellers[-1].move_to(self.now)

    # -- messages

    def lose_messages(self, n: int | None = None) -> None:
        """Lose the messages that are under way; with a number, so many of the next ones."""
        if n is None:
            self._messages.clear()
        else:
            self._to_lose += n

    def duplicate_messages(self, n: int | None = None) -> None:
        """Double the messages that are under way; with a number, so many of the next ones."""
        if n is None:
            for message in list(self._messages):
                self._send(message.kind, message.wakeup, message.due)
        else:
            self._to_double += n

    def _publish(self, kind: Kind, wakeup: Wakeup) -> None:
        due = self._clock + wakeup.delay
        if self._to_lose:
            self._to_lose -= 1
            self._note(Sort.OUTCOME, f"✉ a message of {kind.name}/{wakeup.id} is lost")
            return
        self._send(kind, wakeup, due)
        if self._to_double:
            self._to_double -= 1
            self._note(Sort.OUTCOME, f"✉ a message of {kind.name}/{wakeup.id} is doubled")
            self._send(kind, wakeup, due)

    def _check_committed(self, kind: str, requests: Sequence[Request], inside: Run | None) -> None:
        """What is due now must be committed; what an evaluation enqueues of its own entity waits for that."""
        if not databases.in_transaction() or self._settings.enqueue_in_transaction == "allow":
            return
        for request in requests:
            due = request.delay == 0 or (request.at is not None and request.at <= self._clock)
            if due and (inside is None or inside.id != request.id):
                self._fail_test(
                    AssertionError(
                        f"{kind}/{request.id} is enqueued inside a transaction: a worker may look before that"
                        " is committed, find nothing to do, and nobody looks again. Use enqueue_on_commit; if"
                        ' it is meant, set goalstate_enqueue_in_transaction to "allow"'
                    )
                )

    def _fail_test(self, error: Exception) -> NoReturn:
        """Raise an error that no evaluation keeps to itself: the test gets it, too."""
        self._mistake = error
        raise error

    def _send(self, kind: Kind, wakeup: Wakeup, due: int) -> None:
        self._messages.append(_Message(kind, wakeup, due, next(self._numbers)))

    def _deliver(self, message: _Message) -> None:
        """What a worker does with a message: the kind's own task, in a context of its own."""
        kind, wakeup = message.kind, message.wakeup
        task = self.engine.app.tasks.get(kind.task)
        if task is None:
            raise LookupError(
                f"{kind.name}/{wakeup.id} is enqueued, and kind {kind.name!r} is only declared here: no class"
                " is registered that could be evaluated. Test that it is enqueued with assert_scheduled()"
            )
        if self._level == 0:
            self._reach(BETWEEN_LOOKS)
        work = functools.partial(
            task.apply,
            ([[wakeup.id, wakeup.token]],),
            {} if wakeup.resent_at is None else {"resent_at": wakeup.resent_at},
            task_id=wakeup.task_id,
            retries=wakeup.retries,
            throw=False,
        )
        before, count = self._look, len(self.looks)
        mortal_before = self._is_mortal
        self._is_mortal = any(planned.times and planned.fault == Kill() for planned in self._planned)
        context = self._outside.copy()
        try:
            if self._is_mortal:
                self._deliver_to_mortal(work, context, task)
            else:
                context.run(work)
        finally:
            self._look, self._is_mortal = before, mortal_before
            self._commits.forget()
        if self._mistake is not None and self._level == 0:
            raise self._mistake
        if self.index_away and len(self.looks) > count and not self.looks[count].outcome:
            self._note(Sort.OUTCOME, "the index is away: the outcome could not be reported")

    def _deliver_to_mortal(self, work: Callable[[], object], context: ContextVariables, task: Any) -> None:
        """Clean up, if it is killed, what a dead process does not hold any more."""
        celery_state: Any = celery._state  # whose stubs lack it
        stacks = [(stack, len(stack)) for stack in (celery_state._task_stack, task.request_stack)]
        leases, claims, level = list(self._keeper.leases), set(shutdown.under_way), self._level
        wrappers = databases.wrappers()
        if not mortal.survives(work, context):
            for stack, length in stacks:
                while len(stack) > length:
                    stack.pop()
            shutdown.under_way.intersection_update(claims)
            self._keeper.leases, self._level = leases, level
            databases.break_off(wrappers)

    # -- points

    def at(self, point: str, fault: Fault, *, times: int = 1, nth: int | None = None) -> None:
        """Let something happen at a point: `kill`, `lose_lease`, `fail(error)`, or any function.

        Points are "before ship" and "after ship" of an action, the same of a watched call, "before commit"
        and "after commit" of Django's transactions, and "between looks". A function is what somebody else
        does at that moment. It happens the first so many `times` that the point is passed, or only the `nth`
        time. Never to get there is an error. To kill takes greenlet (the extra `testing`).
        """
        if point != BETWEEN_LOOKS and not point.startswith(("before ", "after ")):
            raise ValueError(
                f'point is {point!r}; give "before NAME", "after NAME" (of an action, of a watched call, or'
                f' "commit"), or "{BETWEEN_LOOKS}"'
            )
        if not isinstance(fault, (Kill, LoseLease, Fail)) and not callable(fault):
            raise TypeError(f"fault is {fault!r}; give kill, lose_lease, fail(error) or a function")
        if point == BETWEEN_LOOKS and isinstance(fault, (Kill, LoseLease, Fail)):
            raise ValueError(
                f'nobody works "{BETWEEN_LOOKS}" to whom it could happen; give a point in a look'
            )
        if times < 1 or (nth is not None and nth < 1):
            raise ValueError(f"times is {times!r} and nth is {nth!r}; give 1 or more")
        if isinstance(fault, Kill):
            mortal.need_greenlet()
        self._planned.append(_Planned(point, fault, times, nth))

    def watch(self, *calls: Watched) -> None:
        """Make each call of these functions a point, and a line of the story, until the simulation ends.

        A function is named where it is looked up: `"shop.payments.charge"`, or `(client, "charge")`.
        """
        for call in calls:
            owner, name, label = located(call)
            original = inspect.getattr_static(owner, name, None)
            if isinstance(original, (staticmethod, classmethod)):
                replacement: Any = type(original)(self._watched(label, original.__func__))
            else:
                replacement = self._watched(label, getattr(owner, name))
            self._patches.enter_context(mock.patch.object(owner, name, replacement))

    def _watched(self, label: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._look is None:
                return original(*args, **kwargs)
            self._reach(f"before {label}", of_call=True)
            shown = [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())]
            self._note(Sort.STEP, f"{label}({', '.join(shown)})")
            returned = original(*args, **kwargs)
            self._reach(f"after {label}", of_call=True)
            return returned

        return watched

    def _reach(self, name: str, *, of_call: bool = False) -> None:
        """Pass a point: what was planned for it happens."""
        if self._look is None and name != BETWEEN_LOOKS:
            return
        self._commits.catch_up()
        self._seen[name] += 1
        point = Point(name, self._seen[name], of_call, databases.in_transaction())
        self.points.append(point)
        for planned in list(self._planned):
            if planned.strikes(point):
                planned.times -= 1
                planned.has_struck = True
                self._strike(planned.fault, point)

    def _strike(self, fault: Fault, point: Point) -> None:
        match fault:
            case Kill():
                if not self._is_mortal:
                    self._fail_test(
                        RuntimeError("plan to kill a worker before it begins: this one began already")
                    )
                self._note(Sort.STEP, f"☠ worker killed {point.name}")
                mortal.die()
            case LoseLease():
                if point.in_transaction:
                    self._fail_test(
                        RuntimeError(
                            f"the worker cannot stall {point.name}, in a transaction: others would see what"
                            " is not committed, on the test's one connection. Give a point outside of it"
                        )
                    )
                self._stall(point)
            case Fail(error):
                self._note(Sort.STEP, f"✗ {point.name} it raises {error!r}")
                raise error
            case _:
                self._note(Sort.STEP, f"⚡ meanwhile, {point.name}: {getattr(fault, '__name__', fault)}")
                self._as_others(fault)

    def _stall(self, point: Point) -> None:
        self._note(Sort.STEP, f"⏸ worker stalls {point.name}; its lease runs out, and another takes over:")

        def rest() -> None:
            until = self._clock + _milliseconds(DAY.total_seconds())
            while self._goes_on() and len(self.looks) < self._most_looks and self._step(until):
                pass  # a run that never rests fails where it was asked for, not in this evaluation

        self._level += 1
        try:
            with self._keeper.stalled():
                self._as_others(rest)
        finally:
            self._level -= 1
        self._note(Sort.STEP, "▶ the stalled worker goes on")

    def _as_others(self, call: Callable[[], object]) -> None:
        """Call it as somebody outside of the evaluation under way."""
        look, self._look = self._look, None
        try:
            self._outside.copy().run(call)
        finally:
            self._look = look

    # -- what the engine tells

    def _is_in_place(self) -> bool:
        """Not while another simulation of the engine is."""
        return self.engine.parts is self._parts

    @contextmanager
    def _around_evaluation(self, evaluation: Evaluation) -> Iterator[None]:
        if self._is_in_place():
            self._look = Look(str(evaluation.ref), self._passed())
            self.looks.append(self._look)
        yield

    def _note_states(self, _: Evaluation, state: Any, goal_state: Any) -> None:
        look = self._look
        if look is None or not self._is_in_place():
            return
        if not look.is_read:
            look.is_read, look.state = True, state
            self._note(Sort.LOOK, f"{look.entity}: {state_text(state)}, goal {state_text(goal_state)}")
        look.final_state, look.goal_state = state, goal_state

    @contextmanager
    def _around_action(self, _: Context, action: Action) -> Iterator[None]:
        look = self._look
        if look is None or not self._is_in_place():
            yield
            return
        look.actions.append(action.name)
        self._note(Sort.STEP, action.name)
        self._reach(f"before {action.name}")
        yield
        self._reach(f"after {action.name}")

    def _note_claim(self, claim: Claim) -> None:
        self._tokens[claim.lease] = len(self._tokens) + 1

    def _note_commit(self) -> None:
        if self._look is not None:
            self._note(Sort.STEP, "commit")

    def _note_outcome(self, kind: str, report: Report, reply: Finished) -> None:
        if report.lost_at is not None:
            if reply.result is Finish.ACCEPTED:
                text = f"{kind}/{report.id}: worker lost, its lease is over; {_next(report)}"
                self._note(Sort.OUTCOME, text)
            return
        look = self._look
        if look is None:
            return
        if not look.is_read:
            self._note(Sort.LOOK, f"{look.entity}: its states could not be read")
        look.error = report.error
        look.outcome = _ending(look, report, reply)
        self._note(Sort.OUTCOME, look.outcome)

    def _passed(self) -> float:
        return (self._clock - self._start) / 1000

    def _note(self, sort: Sort, text: str) -> None:
        self._events.append(Event(self._passed(), sort, scrubbed(text, self._tokens), self._level))

    # -- what happened

    def story(self) -> str:
        """What happened so far, for people: one line each."""
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The lines of the story."""
        return told(self._events)

    def actions(self, entity: EntityLike | None = None) -> list[str]:
        """The actions that were begun, in order: all of them, or those of one entity."""
        name = None if entity is None else str(_ref(entity))
        return [action for look in self.looks if name in {None, look.entity} for action in look.actions]

    def assert_converges(self, entity: Entity, within: timedelta = DAY, looks: int = 100) -> None:
        """Enqueue the entity, unless it is scheduled already: it must come to rest at its goal."""
        __tracebackhide__ = True
        if not self.engine.is_scheduled(entity):
            self.engine.enqueue(entity)
        if problem := self.come_to_rest(within, looks) or self.problem_of(entity):
            raise AssertionError(self._told(f"{entity.ref} does not converge: {problem}"))

    def problem_of(self, entity: Entity) -> str:
        """Why an entity that is at rest is not at its goal; empty: it is."""
        fresh = type(entity).from_id(entity.get_id())
        state, goal_state = fresh.get_state(), fresh.get_goal_state()
        if not self.engine.kind(entity.kind).options.converge or fresh.is_converged(state, goal_state):
            return ""
        found = self.engine.describe(entity)
        return f"it rests at {state_text(state)}, goal {state_text(goal_state)} ({_why(found)})"

    def assert_scheduled(self, entity: EntityLike, in_: float | timedelta | None = None) -> None:
        """An evaluation of the entity is pending; and falls due in so many seconds, if that is given."""
        __tracebackhide__ = True
        found = self.engine.describe(entity)
        if found is None or found.deadline is None:
            raise AssertionError(f"{_ref(entity)} is not scheduled ({_why(found)})")
        if in_ is not None:
            seconds = in_.total_seconds() if isinstance(in_, timedelta) else in_
            left = (found.deadline - self.now).total_seconds()
            if abs(left - seconds) >= 0.002:  # the index rounds up to milliseconds
                raise AssertionError(f"{_ref(entity)} is scheduled in {left:g} s, not in {seconds:g} s")

    def assert_not_scheduled(self, entity: EntityLike) -> None:
        """No evaluation of the entity is pending."""
        __tracebackhide__ = True
        found = self.engine.describe(entity)
        if found is not None and found.deadline is not None:
            left = (found.deadline - self.now).total_seconds()
            raise AssertionError(f"{_ref(entity)} is scheduled, in {left:g} s")

    def _told(self, problem: str) -> str:
        return "\n".join([problem, "", *shortened(self.lines(), LINES_TOLD)])

    def _unrest(self, when: str) -> str:
        """How it is not at rest: the round in which evaluations go, or the last of them."""
        text = f"it is not at rest {when}"
        signs = [
            (look.entity, state_text(look.state), tuple(look.actions), look.error) for look in self.looks
        ]
        for length in range(1, min(20, len(signs) // 3) + 1):
            if signs[-length:] == signs[-2 * length : -length] == signs[-3 * length : -2 * length]:
                steps = "".join(f"{_step_of(look)} → " for look in self.looks[-length:])
                first = state_text(self.looks[-length].state)
                return f"{text}; it goes round and round ({len(self.looks)} looks): {steps}{first} …"
        last = " → ".join(state_text(look.state) for look in self.looks[-8:])
        return f"{text}; the last states: {last}" if last else text


class _Publisher:
    """Sends no message."""

    def __init__(self, publish: Callable[[Kind, Wakeup], None]) -> None:
        self._publish = publish

    def dispatch(
        self,
        kind: Kind,
        wakeups: Sequence[Wakeup],
        *,
        enqueued: bool = False,  # noqa: ARG002 - the signature of Publisher
        link: Mapping[str, Any] = NO_LINK,  # noqa: ARG002
    ) -> bool:
        """See `Publisher`."""
        self.publish_at_once(kind, wakeups)
        return True

    def publish_at_once(self, kind: Kind, wakeups: Sequence[Wakeup]) -> None:
        """See `Publisher`."""
        for wakeup in wakeups:
            self._publish(kind, wakeup)


def simulate(engine: Engine | None = None, start: datetime | None = None) -> Simulation:
    """A context manager: the engine in a world of its own, with a fresh index and settings and its own clock.

    No message leaves, no thread runs, and there is no jitter. Time begins at `start` (aware), by default at
    the real now, and passes only in `advance`, `run_until_idle` and `assert_converges`. The engine is by
    default the only one of this process. Raises `LookupError` if there is none, or several.
    """
    if start is not None and start.utcoffset() is None:
        raise ValueError(f"start is {start!r}, which has no time zone; give an aware datetime")
    return Simulation(engine or _only_engine(), start=start)


def settings_of(engine: Engine) -> Settings:
    """The settings of a simulation: as they are now, wherever the index is. Raises `ImproperlyConfigured`."""
    return engine.read_settings(ChainMap({"goalstate_index_url": "memory://"}, engine.app.conf))


def _only_engine() -> Engine:
    if len(all_engines) > 1:
        gc.collect()  # those of earlier tests
    engines = list(all_engines)
    if len(engines) == 1:
        return engines[0]
    if not engines:
        raise LookupError("there is no engine yet: import the module that creates it, or give the engine")
    named = ", ".join(sorted(map(repr, engines)))
    raise LookupError(
        f"there are {len(engines)} engines: {named}. Say which one: simulate(engine), engine=..., or a"
        " fixture goalstate_engine that returns it"
    )


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _ref(entity: EntityLike) -> EntityRef:
    return entity.ref if isinstance(entity, Entity) else entity


def located(call: Watched) -> tuple[Any, str, str]:
    """The owner of what is to be watched, its name there, and its name for people."""
    if isinstance(call, str):
        path, _, name = call.rpartition(".")
        owner, label = pkgutil.resolve_name(path), call
    else:
        owner, name = call
        label = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    if not callable(getattr(owner, name, None)):
        raise TypeError(f"{call!r} cannot be watched: there is no such function")
    return owner, name, label


def _step_of(look: Look) -> str:
    return f"{state_text(look.state)} –[{', '.join(look.actions) or 'no action'}]"


def _next(report: Report) -> str:
    """When a failed evaluation is tried again."""
    failure = f"failure {report.failures}; " if report.failures else ""
    if report.verdict is Verdict.QUARANTINED:
        return f"{failure}quarantined"
    return f"{failure}again in {(report.delay or 0) / 1000:g} s"


def _ending(look: Look, report: Report, reply: Finished) -> str:
    if reply.result is Finish.FENCED:
        return "its lease was lost: the outcome is dropped"
    if report.verdict is Verdict.GONE:
        return "gone: it is forgotten"
    if report.error:
        if report.verdict is Verdict.FAILED and reply.deadline is None:
            return f"failed ({report.error}); dropped, since it was deleted"
        return f"failed ({report.error}); {_next(report)}"
    again = ""
    if report.delay is not None:
        again = f"; again in {report.delay / 1000:g} s" if report.delay else "; again at once"
    if report.converged:
        return f"converged{again}"
    where = f"now {state_text(look.final_state)}"
    return where + (again or ("" if report.converged is None else "; its goal is not reached, and it rests"))


def _why(found: Description | None) -> str:
    if found is None:
        return "the index does not know it"
    failed = f", {found.error}" if found.error else ""
    return f"{'quarantined' if found.status is Status.FAILED else found.status}{failed}"
