from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import gevent
import greenlet
import pytest
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded

from celery_goalstate.actions import Action, ActionList, Context, Requeue, Stop
from celery_goalstate.entity import Entity, EntityRef
from celery_goalstate.evaluation import (
    ActionRun,
    Evaluation,
    Outcome,
    error_text,
    evaluate,
    failed,
)
from celery_goalstate.exceptions import (
    ActionTimeout,
    GoalStateError,
    Interrupted,
    LeaseLost,
    PermanentError,
    RetryAfter,
    WorkerLost,
)
from celery_goalstate.hooks import Hooks
from celery_goalstate.rules import ANY, Rules
from celery_goalstate.settings import KindOptions

OPTIONS = KindOptions(failure_retry_delay=10, max_retry_delay=3600, jitter=False)


class State(enum.Enum):
    UP = 1
    DRAINED = 2
    DOWN = 3


class Host(Entity):
    """Its truth lives outside, as a real entity's does."""

    world: World

    def get_state(self) -> Any:
        return self.world.read("get_state", self.world.state)

    def get_goal_state(self) -> Any:
        return self.world.read("get_goal_state", self.world.goal)

    def get_action_list(self, state: Any, goal_state: Any) -> Any:
        return self.world.read("get_action_list", self.world.actions)

    def power_off(self, ctx: Context) -> None:
        self.world.state = State.DOWN


class World:
    """One host, a clock that only actions move, and errors to be raised where it is read."""

    def __init__(self, *actions: Any, state: Any = State.UP, goal: Any = State.DOWN) -> None:
        self.actions: Any = list(actions)
        self.state = state
        self.goal = goal
        self.now = 0.0
        self.held = True
        self.errors: dict[str, list[BaseException | None]] = {}
        self.ran: list[str] = []
        self.hooks = Hooks()
        self.engine = object()

    def read(self, name: str, value: Any) -> Any:
        if errors := self.errors.get(name):
            error = errors.pop(0)
            if error is not None:
                raise error
        return value

    def load(self, id_: str) -> Entity:
        host = self.read("from_id", Host(id_))
        if isinstance(host, Host):
            host.world = self
        return host

    def evaluate(
        self, options: KindOptions = OPTIONS, *, failures: int = 0, rounds: int = 0, **more: Any
    ) -> Outcome:
        evaluation = Evaluation(
            ref=EntityRef("host", "web-1"),
            load=self.load,
            failures=failures,
            rounds=rounds,
            deadline=datetime(2026, 1, 1, tzinfo=UTC),
            lateness=0.25,
            fencing_token=17,
            held=lambda: self.held,
            calling=contextlib.nullcontext,
            engine=self.engine,
            task="the request",
        )
        return evaluate(evaluation, options, self.hooks, clock=lambda: self.now, random=lambda: 0.0, **more)

    def action(
        self,
        name: str,
        *,
        says: Any = None,
        raises: BaseException | None = None,
        leads_to: Any = None,
        takes: float = 0.0,
        timeout: float | None = None,
    ) -> Action:
        def execute(ctx: Context, entity: Entity) -> Any:
            self.ran.append(name)
            self.now += takes
            if leads_to is not None:
                self.state = leads_to
            if raises is not None:
                raise raises
            return says

        action = Action(name, execute, timeout)
        self.actions.append(action)
        return action


@pytest.fixture
def world() -> World:
    return World()


# The way through ---------------------------------------------------------------------------------


def test_actions_run_in_order_until_the_goal_is_reached(world: World) -> None:
    world.action("drain", leads_to=State.DRAINED, takes=0.012)
    world.action("power_off", leads_to=State.DOWN, takes=2.5)
    assert world.evaluate(failures=3, rounds=4) == Outcome(
        delay=None,
        failures=0,
        rounds=0,
        converged=True,
        state=State.UP,
        final_state=State.DOWN,
        goal_state=State.DOWN,
        actions=(ActionRun("drain", 0.012), ActionRun("power_off", 2.5)),
    )
    assert world.ran == ["drain", "power_off"]


def test_functions_and_method_names_are_actions(world: World) -> None:
    def drain(ctx: Context, host: Host) -> None:
        world.ran.append(host.id)

    world.actions = [drain, "power_off"]
    outcome = world.evaluate()
    assert [run.name for run in outcome.actions] == ["drain", "power_off"]
    assert outcome.converged
    assert world.ran == ["web-1"]


def test_an_action_gets_what_is_known(world: World) -> None:
    contexts: list[Context] = []
    world.actions = [Action("note", lambda ctx, host: contexts.append(ctx))]
    world.evaluate(failures=2)
    (ctx,) = contexts
    assert ctx.engine is world.engine
    assert (ctx.entity, ctx.state, ctx.goal_state) == (Host("web-1"), State.UP, State.DOWN)
    assert (ctx.failures, ctx.lateness, ctx.fencing_token, ctx.task) == (2, 0.25, 17, "the request")
    assert ctx.deadline == datetime(2026, 1, 1, tzinfo=UTC)
    assert ctx.log.extra == {"kind": "host", "id": "web-1", "action": "note"}
    assert ctx.remaining() is None


def test_the_outcome_is_that_of_an_entity_loaded_afresh() -> None:
    """An entity that keeps what it read when it was loaded would never see its goal reached."""
    truth = {"state": "UP"}

    class Cached(Entity):
        def __init__(self, id: str) -> None:
            super().__init__(id)
            self.state = truth["state"]

        def get_state(self) -> str:
            return self.state

        def get_goal_state(self) -> str:
            return "DOWN"

        def get_action_list(self, state: Any, goal_state: Any) -> Any:
            return [Action("power_off", lambda ctx, entity: truth.update(state="DOWN"))]

    world = World()
    world.load = Cached
    assert world.evaluate().converged


# Convergence -------------------------------------------------------------------------------------


def test_at_its_goal_with_nothing_to_do_it_is_idle() -> None:
    outcome = World(state=State.DOWN).evaluate()
    assert (outcome.delay, outcome.converged, outcome.actions) == (None, True, ())


def test_an_unchanged_state_is_left_to_whoever_knows_more(world: World) -> None:
    world.action("order_part")
    outcome = world.evaluate(rounds=3)
    assert (outcome.delay, outcome.converged, outcome.rounds) == (None, False, 0)


def test_a_changed_state_that_is_not_the_goal_is_evaluated_again_at_once(world: World) -> None:
    world.action("drain", leads_to=State.DRAINED)
    outcome = world.evaluate(failures=5)
    assert (outcome.delay, outcome.converged, outcome.rounds, outcome.failures) == (0.0, False, 1, 0)


def test_an_entity_may_decide_itself_whether_its_goal_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with numbers that need not be the same, or a goal that says nothing of some fields."""
    monkeypatch.setattr(Host, "is_converged", lambda self, state, goal_state: state >= goal_state)
    world = World(state=2, goal=3)
    world.action("scale", leads_to=5)
    assert world.evaluate().converged
    world.action("scale_down", leads_to=1)
    outcome = world.evaluate()
    assert (outcome.converged, outcome.delay) == (False, 0.0)


def test_after_an_empty_list_nothing_is_read_again() -> None:
    for state, converged in [(State.DOWN, True), (State.UP, False)]:
        world = World(state=state)
        for step in ("from_id", "get_state", "get_goal_state"):
            world.errors[step] = [None, AssertionError("read once more")]
        outcome = world.evaluate()
        assert (outcome.error, outcome.converged, outcome.delay) == (None, converged, None)
        assert (outcome.state, outcome.final_state, outcome.goal_state) == (state, state, State.DOWN)


def test_a_state_that_no_rule_covers_is_logged_with_the_entity(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.actions = Rules({State.UP: {}}).actions(State.UP, State.DOWN)
    outcome = world.evaluate()
    assert (outcome.converged, outcome.delay) == (False, None)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "host/web-1: no rule for state UP and goal state DOWN, so nothing is done;"
        " add a cell to its rules, [] if that is meant"
    )
    world.actions = Rules({ANY: {ANY: []}}).actions(State.UP, State.DOWN)
    world.evaluate()
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("rounds", "delay"), [(0, 0), (8, 0), (9, 0), (10, 10), (11, 20), (12, 40), (50, 3600), (10**6, 3600)]
)
def test_after_ten_looks_in_a_row_the_backoff_spaces_them(world: World, rounds: int, delay: float) -> None:
    world.action("drain", leads_to=State.DRAINED)
    outcome = world.evaluate(rounds=rounds)
    assert (outcome.delay, outcome.rounds, outcome.failures) == (delay, rounds + 1, 0)


def test_the_goal_may_move_while_the_actions_run(world: World) -> None:
    world.action("drain", leads_to=State.DRAINED)
    world.actions.append(Action("change_mind", lambda ctx, host: setattr(world, "goal", State.DRAINED)))
    outcome = world.evaluate()
    assert (outcome.converged, outcome.goal_state) == (True, State.DRAINED)


def test_without_convergence_a_list_without_an_error_is_all(world: World) -> None:
    world.action("drain", leads_to=State.DRAINED)
    world.errors["get_state"] = [None, AssertionError("read once more")]
    outcome = world.evaluate(KindOptions(converge=False))
    assert (outcome.error, outcome.delay, outcome.converged, outcome.rounds) == (None, None, None, 0)


# Hooks -------------------------------------------------------------------------------------------


def around(notes: list[str], name: str, *, raises: Exception | None = None) -> Any:
    """A hook that notes when it is entered and left, and with which error; it may raise one as it is left."""

    @contextlib.contextmanager
    def hook(*args: Any) -> Iterator[None]:
        notes.append(f"{name} begins")
        try:
            yield
        except Exception as error:
            notes.append(f"{name} sees {type(error).__name__}")
            raise
        notes.append(f"{name} ends")
        if raises is not None:
            raise raises

    return hook


def test_hooks_surround_an_evaluation_and_each_action(world: World) -> None:
    world.action("drain")
    world.action("power_off", leads_to=State.DOWN)
    world.hooks.around_evaluation.extend([around(world.ran, "outer"), around(world.ran, "inner")])
    world.hooks.around_action.append(around(world.ran, "span"))
    world.hooks.states_read.append(lambda _, state, goal: world.ran.append(f"{state.name}, {goal.name}"))
    assert world.evaluate().converged
    assert world.ran == [
        "outer begins",
        "inner begins",
        "UP, DOWN",
        *("span begins", "drain", "span ends"),
        *("span begins", "power_off", "span ends"),
        "DOWN, DOWN",
        "inner ends",
        "outer ends",
    ]


def test_hooks_know_of_what_they_surround(world: World) -> None:
    seen: list[Any] = []
    action = world.action("power_off", leads_to=State.DOWN)

    def hook(*args: Any) -> Any:
        seen.append(args)
        return contextlib.nullcontext()

    world.hooks.around_evaluation.append(hook)
    world.hooks.around_action.append(hook)
    world.evaluate(failures=2)
    [(evaluation,), (ctx, of_action)] = seen
    assert (str(evaluation.ref), evaluation.failures, evaluation.lateness) == ("host/web-1", 2, 0.25)
    assert (evaluation.fencing_token, evaluation.task) == (17, "the request")
    assert evaluation.engine is world.engine
    assert (ctx.entity, ctx.state, of_action) == (Host("web-1"), State.UP, action)


def test_the_time_of_an_action_is_that_of_its_hooks_too(world: World) -> None:
    @contextlib.contextmanager
    def commits(*args: Any) -> Iterator[None]:
        world.now += 1
        yield
        world.now += 2

    world.action("power_off", takes=4)
    world.hooks.around_action.append(commits)
    assert world.evaluate().actions == (ActionRun("power_off", 7.0),)


def test_hooks_see_the_error_that_ends_what_they_surround(world: World) -> None:
    world.action("drain", raises=OSError())
    world.hooks.around_evaluation.append(around(world.ran, "evaluation"))
    world.hooks.around_action.append(around(world.ran, "action"))
    world.evaluate()
    assert world.ran == [
        *("evaluation begins", "action begins", "drain"),
        *("action sees OSError", "evaluation sees OSError"),
    ]


@pytest.mark.parametrize(
    ("place", "step"), [("around_evaluation", "around_evaluation"), ("around_action", "power_off")]
)
def test_an_error_of_a_hook_is_a_failure_of_the_evaluation(world: World, place: str, step: str) -> None:
    def never(*args: Any) -> Any:
        raise KeyError("tenant")

    hooks = getattr(world.hooks, place)
    world.action("power_off", leads_to=State.DOWN)
    for hook, began in [(never, False), (around([], "late", raises=KeyError("tenant")), True)]:
        world.ran.clear()
        hooks[:] = [hook]
        outcome = world.evaluate(failures=1)
        assert isinstance(outcome.error, KeyError)
        assert (outcome.step, outcome.failures, outcome.delay) == (step, 2, 20.0)
        assert world.ran == (["power_off"] if began else [])


def test_an_error_while_the_states_are_noted_is_a_failure(world: World) -> None:
    world.action("drain")
    world.hooks.states_read.append(lambda *args: 1 // 0)
    outcome = world.evaluate()
    assert isinstance(outcome.error, ZeroDivisionError)
    assert (outcome.step, world.ran) == ("states_read", [])


def test_a_hook_may_translate_an_error(world: World) -> None:
    @contextlib.contextmanager
    def translate(ctx: Context, action: Action) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RetryAfter(7) from error

    world.action("ask", raises=OSError())
    world.hooks.around_action.append(translate)
    outcome = world.evaluate(failures=3)
    assert (outcome.delay, outcome.failures, outcome.step) == (7.0, 3, "ask")


@pytest.mark.parametrize("place", ["around_evaluation", "around_action"])
def test_a_hook_cannot_make_an_error_disappear(world: World, place: str) -> None:
    """Or an entity would come to rest in the midst of its actions."""
    world.action("drain", raises=OSError())
    world.action("power_off")
    getattr(world.hooks, place).append(lambda *args: contextlib.suppress(OSError))
    outcome = world.evaluate()
    assert isinstance(outcome.error, TypeError)
    assert "suppresses errors; it may raise another one" in str(outcome.error)
    assert world.ran == ["drain"]
    assert outcome.delay == 10.0


# What an action can say --------------------------------------------------------------------------


def test_requeue_goes_on_with_the_list(world: World) -> None:
    world.action("drain", says=Requeue(30))
    world.action("log")
    outcome = world.evaluate(failures=2, rounds=2)
    assert world.ran == ["drain", "log"]
    assert (outcome.delay, outcome.failures, outcome.rounds, outcome.converged) == (30.0, 0, 0, False)


@pytest.mark.parametrize(("first", "second"), [(30, 5), (5, 30), (5, timedelta(minutes=1))])
def test_the_earliest_requeue_wins(world: World, first: Any, second: Any) -> None:
    world.action("a", says=Requeue(first))
    world.action("b", says=Requeue(second))
    assert world.evaluate().delay == 5.0


def test_requeue_comes_before_another_round(world: World) -> None:
    world.action("drain", says=Requeue(30), leads_to=State.DRAINED)
    outcome = world.evaluate(rounds=7)
    assert (outcome.delay, outcome.rounds) == (30.0, 0)


def test_requeue_holds_even_when_the_goal_is_reached(world: World) -> None:
    world.action("power_off", says=Requeue(30), leads_to=State.DOWN)
    outcome = world.evaluate()
    assert (outcome.delay, outcome.converged) == (30.0, True)


def test_requeue_holds_without_convergence(world: World) -> None:
    world.action("drain", says=Requeue(0))
    assert world.evaluate(KindOptions(converge=False)).delay == 0.0


def test_a_later_failure_discards_a_requeue(world: World) -> None:
    world.action("drain", says=Requeue(1))
    world.action("power_off", raises=OSError())
    outcome = world.evaluate()
    assert (outcome.delay, outcome.failures) == (10.0, 1)


def test_requeue_may_skip_the_rest(world: World) -> None:
    world.action("drain", says=Requeue(30, stop=True))
    world.action("power_off")
    assert world.evaluate().delay == 30.0
    assert world.ran == ["drain"]


def test_stop_skips_the_rest_and_is_no_failure(world: World) -> None:
    world.action("ask", says=Stop())
    world.action("power_off")
    outcome = world.evaluate(failures=4)
    assert world.ran == ["ask"]
    assert (outcome.error, outcome.delay, outcome.failures, outcome.converged) == (None, None, 0, False)


def test_stop_keeps_an_earlier_requeue(world: World) -> None:
    world.action("drain", says=Requeue(30))
    world.action("ask", says=Stop())
    assert world.evaluate().delay == 30.0


def test_after_stop_the_state_is_read_once_more(world: World) -> None:
    world.action("drain", says=Stop(), leads_to=State.DRAINED)
    outcome = world.evaluate()
    assert (outcome.delay, outcome.rounds, outcome.final_state) == (0.0, 1, State.DRAINED)


async def coroutine() -> None: ...


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: True, "action odd returned True; an action returns None, Requeue"),
        (lambda: 30, "action odd returned 30"),
        (lambda: Stop, "action odd returned <class"),
        (lambda: (x for x in "ab"), "action odd returned <generator"),
        (coroutine, "action odd returned <coroutine"),
    ],
)
def test_any_other_return_value_is_a_failure(world: World, make: Callable[[], Any], says: str) -> None:
    world.action("odd", says=make())
    world.action("next")
    outcome = world.evaluate()
    assert isinstance(outcome.error, TypeError)
    assert says in str(outcome.error)
    assert outcome.delay == 10.0
    assert world.ran == ["odd"]


# Failures ----------------------------------------------------------------------------------------


def test_a_failure_skips_the_rest_and_backs_off(world: World) -> None:
    error = ConnectionError("no route")
    world.action("drain", leads_to=State.DRAINED)
    world.action("power_off", raises=error, takes=1.5)
    world.action("log")
    outcome = world.evaluate(rounds=3)
    assert outcome == Outcome(
        error=error,
        step="power_off",
        delay=10.0,
        failures=1,
        rounds=0,
        converged=None,
        state=State.UP,
        final_state=State.UP,
        goal_state=State.DOWN,
        actions=(ActionRun("drain", 0.0), ActionRun("power_off", 1.5, failed=True)),
    )
    assert world.ran == ["drain", "power_off"]


def test_a_first_action_that_succeeds_does_not_reset_the_backoff(world: World) -> None:
    world.action("ok")
    world.action("fails", raises=OSError())
    outcomes = [world.evaluate(failures=failures) for failures in range(4)]
    assert [outcome.failures for outcome in outcomes] == [1, 2, 3, 4]
    assert [outcome.delay for outcome in outcomes] == [10, 20, 40, 80]


def test_the_traceback_is_kept(world: World) -> None:
    world.action("drain", raises=ConnectionError("no route"))
    error = world.evaluate().error
    assert error is not None
    assert "execute" in [frame.name for frame in traceback.extract_tb(error.__traceback__)]


@pytest.mark.parametrize("step", ["from_id", "get_state", "get_goal_state", "get_action_list"])
def test_an_error_while_reading_is_a_failure(world: World, step: str) -> None:
    world.action("drain")
    world.errors[step] = [KeyError("web-1")]
    outcome = world.evaluate(failures=1)
    assert isinstance(outcome.error, KeyError)
    assert (outcome.step, outcome.delay, outcome.failures) == (step, 20.0, 2)
    assert world.ran == []


@pytest.mark.parametrize("step", ["from_id", "get_state", "get_goal_state"])
def test_an_error_while_reading_again_is_a_failure_too(world: World, step: str) -> None:
    world.action("power_off", leads_to=State.DOWN)
    world.errors[step] = [None, OSError("gone")]
    outcome = world.evaluate()
    assert isinstance(outcome.error, OSError)
    assert (outcome.step, outcome.delay, outcome.converged) == (step, 10.0, None)
    assert outcome.actions == (ActionRun("power_off", 0.0),)


@pytest.mark.parametrize("actions", [[42], 42, ["no_such_method"], [lambda ctx, host: None]])
def test_a_list_that_is_none_is_a_failure(world: World, actions: Any) -> None:
    world.actions = actions
    outcome = world.evaluate()
    assert isinstance(outcome.error, TypeError)
    assert outcome.step == "get_action_list"


def test_a_state_that_differs_from_itself_is_not_evaluated_for_ever() -> None:
    assert World(state=float("nan")).evaluate().delay is None


def test_states_that_cannot_be_compared_are_a_failure() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ArithmeticError

        __hash__ = None

    outcome = World(state=Odd()).evaluate()
    assert isinstance(outcome.error, ArithmeticError)
    assert outcome.step == "is_converged"


def test_from_id_must_return_an_entity(world: World) -> None:
    world.load = lambda id_: None
    outcome = world.evaluate()
    assert "from_id returned None for host/web-1; it returns an entity" in str(outcome.error)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_what_ends_the_process_is_not_caught(world: World, error: BaseException) -> None:
    world.action("drain", raises=error)
    with pytest.raises(type(error)):
        world.evaluate()


def test_nor_is_what_ends_its_greenlet(world: World) -> None:
    """As `celery control terminate` does under gevent: a retry under that revoked id would be dropped."""
    world.action("drain", raises=greenlet.GreenletExit())
    with pytest.raises(greenlet.GreenletExit):
        world.evaluate()


@pytest.mark.parametrize(
    "raised",
    [asyncio.CancelledError("gone"), gevent.Timeout(5), BaseException("odd")],
    ids=["asyncio", "gevent", "odd"],
)
@pytest.mark.parametrize("step", ["drain", "get_state"])
def test_whatever_else_is_no_exception_is_a_failure(world: World, raised: BaseException, step: str) -> None:
    if step == "drain":
        world.action("drain", raises=raised)
    else:
        world.errors["get_state"] = [raised]
    outcome = world.evaluate()
    assert isinstance(outcome.error, Interrupted)
    assert str(outcome.error) == error_text(raised)
    assert outcome.error.__cause__ is raised
    assert (outcome.step, outcome.delay, outcome.failures) == (step, 10.0, 1)


@pytest.mark.parametrize("error", [Retry("later"), Ignore(), Reject(requeue=True), SoftTimeLimitExceeded()])
def test_what_means_something_to_celery_is_a_failure_here(world: World, error: Exception) -> None:
    world.action("drain", raises=error)
    outcome = world.evaluate()
    assert (outcome.error, outcome.delay, outcome.failures) == (error, 10.0, 1)


def test_retry_after_brings_its_own_delay_and_is_not_counted(world: World) -> None:
    world.action("ask", raises=RetryAfter(7.5))
    outcome = world.evaluate(KindOptions(max_failures=3), failures=2, rounds=4)
    assert (outcome.delay, outcome.failures, outcome.rounds) == (7.5, 2, 0)
    assert not outcome.quarantined
    assert isinstance(outcome.error, RetryAfter)


class AskedToWaitError(Exception):
    when = 12


def test_the_caller_may_know_other_errors_with_a_delay(world: World) -> None:
    world.action("ask", raises=AskedToWaitError())
    outcome = world.evaluate(failures=2, retry_after=lambda error: getattr(error, "when", None))
    assert (outcome.delay, outcome.failures) == (12.0, 2)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 1_764_000_000])
def test_a_delay_that_cannot_be_one_is_an_ordinary_failure(world: World, seconds: float) -> None:
    original = RetryAfter(seconds)
    world.action("ask", raises=original)
    outcome = world.evaluate(failures=1)
    assert (outcome.delay, outcome.failures) == (20.0, 2)
    assert isinstance(outcome.error, ValueError)
    assert "the delay of RetryAfter is" in str(outcome.error)
    assert outcome.error.__cause__ is original


def test_a_permanent_error_quarantines(world: World) -> None:
    world.action("ship", raises=PermanentError("no such address"))
    outcome = world.evaluate(failures=2)
    assert (outcome.quarantined, outcome.delay, outcome.failures) == (True, None, 3)


@pytest.mark.parametrize(("before", "quarantined"), [(0, False), (1, False), (2, True), (7, True)])
def test_max_failures_in_a_row_quarantine(world: World, before: int, quarantined: bool) -> None:
    world.action("drain", raises=OSError())
    outcome = world.evaluate(KindOptions(max_failures=3), failures=before)
    assert outcome.quarantined is quarantined
    assert (outcome.delay is None) is quarantined
    assert outcome.failures == before + 1


def test_a_lost_worker_counts_like_any_failure() -> None:
    outcome = failed(WorkerLost(), 2, OPTIONS)
    assert (outcome.failures, outcome.delay, outcome.rounds) == (3, 40.0, 0)
    assert failed(WorkerLost(), 2, KindOptions(max_failures=3)).quarantined


def test_the_delay_is_jittered() -> None:
    options = KindOptions(failure_retry_delay=10, jitter=True)
    assert failed(OSError(), 1, options, random=lambda: 0.0).delay == 10.0
    assert failed(OSError(), 1, options, random=lambda: 1.0).delay == 20.0


# Lease and budgets -------------------------------------------------------------------------------


def test_no_action_starts_without_the_lease(world: World) -> None:
    world.actions = [Action("stall", lambda ctx, host: setattr(world, "held", False))]
    world.action("power_off")
    outcome = world.evaluate()
    assert isinstance(outcome.error, LeaseLost)
    assert outcome.step == "power_off"
    assert world.ran == []


def test_no_action_starts_when_the_budget_of_the_list_is_used_up(world: World) -> None:
    world.action("slow", takes=5)
    world.action("power_off")
    world.actions = ActionList(world.actions, timeout=5)
    outcome = world.evaluate()
    assert isinstance(outcome.error, ActionTimeout)
    assert str(outcome.error) == "the timeout of the action list (5 s) is over"
    assert (outcome.delay, outcome.step) == (10.0, "power_off")
    assert world.ran == ["slow"]


def test_the_last_action_may_end_late(world: World) -> None:
    world.action("slow", takes=9)
    world.actions = ActionList(world.actions, timeout=5)
    assert world.evaluate().error is None


def test_reading_the_states_does_not_use_the_budget_up(world: World) -> None:
    world.action("power_off")
    world.actions = ActionList(world.actions, timeout=5)
    world.now = 1_000.0
    assert world.evaluate().error is None


def test_an_action_sees_the_tighter_budget(world: World) -> None:
    seen: list[float | None] = []

    def look(ctx: Context, host: Host) -> None:
        seen.append(ctx.remaining())
        world.now += 3
        seen.append(ctx.remaining())

    world.actions = ActionList([Action("a", look, timeout=10), Action("b", look, timeout=2)], timeout=8)
    assert world.evaluate().error is None
    assert seen == [8, 5, 2, 0]


def test_an_action_may_check_its_own_timeout(world: World) -> None:
    def crawl(ctx: Context, host: Host) -> None:
        for _ in range(10):
            ctx.check()
            world.now += 1

    world.actions = [Action("crawl", crawl, timeout=3)]
    outcome = world.evaluate()
    assert str(outcome.error) == "the timeout of action crawl (3 s) is over"
    assert world.now == 3


# For people --------------------------------------------------------------------------------------


def line(*actions: Any, **fields: Any) -> str:
    known: dict[str, Any] = {"state": State.UP, "final_state": State.UP, "goal_state": State.DOWN}
    known |= {"delay": None, "failures": 0, "actions": tuple(ActionRun(*action) for action in actions)}
    return str(Outcome(**{**known, **fields}))


DRAIN = ("drain", 0.012)
FAILED_DRAIN = ("drain", 0.012, True)
NO_ROUTE = ConnectionError("no route")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            line(DRAIN, final_state=State.DRAINED, converged=False, delay=5.0),
            "UP → DRAINED: drain 12 ms; again in 5 s",
        ),
        (
            line(DRAIN, final_state=State.DRAINED, converged=False, delay=0.0),
            "UP → DRAINED: drain 12 ms; again at once",
        ),
        (
            line(DRAIN, ("power_off", 1.5), final_state=State.DOWN, converged=True),
            "UP → DOWN: drain 12 ms, power_off 1.5 s; converged",
        ),
        (line(DRAIN, converged=True, delay=30), "UP: drain 12 ms; converged; again in 30 s"),
        (line(DRAIN, converged=False), "UP: drain 12 ms; goal DOWN not reached"),
        (line(DRAIN), "UP: drain 12 ms"),
        (line(converged=True), "UP: converged"),
        (line(converged=False), "UP: no actions; goal DOWN not reached"),
        (line(), "UP: no actions"),
        (
            line(FAILED_DRAIN, error=NO_ROUTE, step="drain", delay=20.0),
            "UP: drain 12 ms failed (ConnectionError: no route); again in 20 s",
        ),
        (
            line(DRAIN, FAILED_DRAIN, error=NO_ROUTE, step="drain", quarantined=True),
            "UP: drain 12 ms, drain 12 ms failed (ConnectionError: no route); quarantined",
        ),
        (
            line(DRAIN, error=LeaseLost("gone"), step="power_off", delay=10),
            "UP: drain 12 ms; power_off failed (LeaseLost: gone); again in 10 s",
        ),
        (
            line(DRAIN, error=NO_ROUTE, step="get_state", delay=10),
            "UP: drain 12 ms; get_state failed (ConnectionError: no route); again in 10 s",
        ),
        (
            line(state=None, error=NO_ROUTE, step="from_id", delay=10),
            "from_id failed (ConnectionError: no route); again in 10 s",
        ),
        (
            str(Outcome(error=WorkerLost("gone"), delay=20, failures=1)),
            "failed (WorkerLost: gone); again in 20 s",
        ),
        (line(state="up", final_state="up", converged=True), "up: converged"),
        (line(state=(1, 2), final_state=(3,), delay=0), "(1, 2) → (3,): no actions; again at once"),
        (line(state="a\n b", final_state="a\n b"), "a b: no actions"),
        (line(state="s" * 100, final_state="s" * 100), "s" * 59 + "…: no actions"),
    ],
)
def test_an_outcome_as_a_line(told: str, expected: str) -> None:
    assert told == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004, "0 ms"),
        (0.9994, "999 ms"),
        (1, "1 s"),
        (1.234, "1.23 s"),
        (119, "119 s"),
        (120, "2 min"),
        (3600, "60 min"),
        (9000, "2.5 h"),
        (604_800, "7 d"),
    ],
)
def test_spans_are_readable(seconds: float, text: str) -> None:
    assert line(delay=seconds) == f"UP: no actions; again in {text}"


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConnectionError("no route"), "ConnectionError: no route"),
        (ValueError(), "ValueError"),
        (ValueError("two\n  lines\t"), "ValueError: two lines"),
        (ValueError("half \ud83d"), r"ValueError: half \ud83d"),
        (ValueError("\x1b[2J\x9b31m \u202eevil\x00"), r"ValueError: \x1b[2J\x9b31m \u202eevil\x00"),
        (ValueError("\u202e" * 1000), "ValueError: " + (r"\u202e" * 84)[:487] + "…"),
        (UnprintableError(), "UnprintableError: <UnprintableError that cannot be printed>"),
        (ValueError("x" * 1000), "ValueError: " + "x" * 487 + "…"),
    ],
)
def test_error_texts_are_short_and_can_be_stored(error: Exception, text: str) -> None:
    assert error_text(error) == text
    assert len(error_text(error)) <= 500


def test_a_state_that_cannot_be_printed_fails_nothing() -> None:
    assert (
        line(state=UnprintableError(), final_state=1)
        == "<UnprintableError that cannot be printed> → 1: no actions"
    )


def test_errors_say_something_by_themselves() -> None:
    assert error_text(LeaseLost()).startswith("LeaseLost: The evaluation no longer holds")
    assert issubclass(RetryAfter, GoalStateError)
