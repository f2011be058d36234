"""One evaluation of one entity: read its states, choose its actions, run them, and decide what follows.

    load the entity -> state, goal state -> action list -> each action -> state and goal state once more
          |                                                                             |
          any exception: failed()                                                  _settled()
          back-off, or quarantine                              idle, again at once, or when an action asked

Nothing here knows where the entity is scheduled or on what it runs: an `Evaluation` goes in, an `Outcome`
comes out, and one place elsewhere acts on it. The only clock is the one that is given. The seams are the
hooks: around the evaluation, around each action, and where the states were read.
"""

from __future__ import annotations

import inspect
import logging
import random as _random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from celery_goalstate.actions import (
    Action,
    ActionList,
    Budget,
    Context,
    Requeue,
    Stop,
    action_logger,
    as_action_list,
)
from celery_goalstate.backoff import delay_seconds
from celery_goalstate.display import one_line, state_text, text_of
from celery_goalstate.entity import Entity, EntityRef
from celery_goalstate.exceptions import EntityGone, Interrupted, PermanentError, RetryAfter
from celery_goalstate.hooks import Hooks
from celery_goalstate.rules import NO_RULE
from celery_goalstate.settings import KindOptions

if TYPE_CHECKING:
    from celery_goalstate.engine import Engine

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: After so many evaluations in a row, each at once after the other, that did not reach the goal, the back-off
#: spaces the next ones.
ROUNDS_AT_ONCE = 10

#: Characters of a stored error text.
MAX_ERROR = 500

#: How long an error asks to wait, in seconds; None: it asks for nothing.
RetryDelay = Callable[[Exception], float | None]


class Evaluation(NamedTuple):
    """What is known before an evaluation; hooks get it."""

    ref: EntityRef
    load: Callable[[str], Entity]  #: `from_id` of the entity's class
    failures: int  #: consecutive ones so far
    rounds: int  #: evaluations in a row, each at once after the other, that have not reached the goal
    deadline: datetime  #: UTC
    lateness: float  #: seconds
    fencing_token: int
    held: Callable[[], bool]  #: whether the lease is still held; answers at once
    calling: Callable[[], AbstractContextManager[None]]  #: what is enqueued in it, this evaluation enqueues
    engine: Engine
    task: Any  #: the request of the Celery task
    #: Gets what tells, at any time, which step the evaluation is in: an action's name, `get_state`, ...
    observe: Callable[[Callable[[], str]], None] = lambda _: None


class ActionRun(NamedTuple):
    """An action that was begun, how many seconds it took, and whether it raised."""

    name: str
    seconds: float
    failed: bool = False


class Outcome(NamedTuple):
    """What is known after an evaluation. `str()` is for people, on one line."""

    delay: float | None  #: seconds until the next evaluation; None: none is asked for
    failures: int  #: consecutive ones, this one included
    error: Exception | None = None  #: why it failed, with its traceback
    step: str = ""  #: where it failed: an action's name, `get_state`, ...
    quarantined: bool = False  #: it failed and is not to be tried again
    gone: bool = False  #: the entity does not exist any more; no failure
    rounds: int = 0  #: as before the evaluation; the next one included
    converged: bool | None = None  #: whether the goal is reached; None: not known
    state: Any = None  #: as read first
    final_state: Any = None  #: as read last
    goal_state: Any = None  #: as read last
    actions: tuple[ActionRun, ...] = ()

    def __str__(self) -> str:
        return _summary(self)


def evaluate(
    evaluation: Evaluation,
    options: KindOptions,
    hooks: Hooks,
    *,
    retry_after: RetryDelay = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    random: Callable[[], float] = _random.random,
) -> Outcome:
    """Evaluate an entity: what its code and the hooks raise becomes an outcome, but for what ends a process.

    `retry_after` knows other errors than `RetryAfter` that bring their own delay. `clock` counts seconds,
    `random` returns numbers from 0 to 1.
    """
    progress = _Progress(step="around_evaluation")
    evaluation.observe(lambda: progress.step)
    try:
        work = partial(_read_and_act, evaluation, options, hooks, progress, clock)
        _within(hooks.around_evaluation, (evaluation,), work)
    except BaseException as raised:
        if _ends_more_than_this(raised):
            raise
        if isinstance(raised, EntityGone):
            return Outcome(delay=None, failures=0, step=progress.step, gone=True, **progress.seen())
        return failed(
            raised if isinstance(raised, Exception) else _interrupted(raised),
            evaluation.failures,
            options,
            retry_after=retry_after,
            random=random,
            step=progress.step,
            **progress.seen(),
        )
    return _settled(evaluation, options, progress, random)


class Explanation(NamedTuple):
    """What an evaluation would do now. `str()` is for people, on one line."""

    state: Any
    goal_state: Any
    action_list: ActionList

    def __str__(self) -> str:
        names = ", ".join(action.name for action in self.action_list.actions) or "nothing"
        no_rule = ", for no rule covers these" if self.action_list is NO_RULE else ""
        return f"{state_text(self.state)} → {state_text(self.goal_state)}: would run {names}{no_rule}"


def read_states(ref: EntityRef, load: Callable[[str], Entity]) -> tuple[Any, Any]:
    """The entity's state and goal state now. Raises what its code raises."""
    entity = _loaded(ref, load)
    return entity.get_state(), entity.get_goal_state()


def explain(ref: EntityRef, load: Callable[[str], Entity]) -> Explanation:
    """Read the entity's states and choose its actions, and run none of them. Raises what its code raises."""
    entity = _loaded(ref, load)
    state, goal_state = entity.get_state(), entity.get_goal_state()
    action_list = as_action_list(entity.get_action_list(state, goal_state), entity)
    return Explanation(state, goal_state, action_list)


def _loaded(ref: EntityRef, load: Callable[[str], Entity]) -> Entity:
    entity = load(ref.id)
    if not isinstance(entity, Entity):
        raise TypeError(f"from_id returned {entity!r} for {ref}; it returns an entity")
    return entity


def _within(
    hooks: Sequence[Callable[..., AbstractContextManager[object]]],
    args: tuple[Any, ...],
    call: Callable[[], T],
) -> T:
    """What `call` returns, inside the context managers of the hooks."""
    if not hooks:
        return call()
    outermost, *others = hooks
    with outermost(*args):
        return _within(others, args, call)
    raise TypeError(f"the hook {outermost!r} suppresses errors; it may raise another one in their place")


def _ends_more_than_this(raised: BaseException) -> bool:
    """Whether it ends the process, or its greenlet: so Celery ends a task under gevent, for good."""
    of_greenlets = getattr(sys.modules.get("greenlet"), "GreenletExit", ())
    return isinstance(raised, (KeyboardInterrupt, SystemExit, GeneratorExit, of_greenlets))


def _interrupted(raised: BaseException) -> Exception:
    error = Interrupted(error_text(raised))
    error.__cause__ = raised
    return error


def failed(
    error: Exception,
    failures: int,
    options: KindOptions,
    *,
    retry_after: RetryDelay = lambda _: None,
    random: Callable[[], float] = _random.random,
    **seen: Any,
) -> Outcome:
    """The outcome of a failure after `failures` others in a row: when to try again, or quarantine.

    `seen` are fields of the outcome that are known besides.
    """
    try:
        delay = _own_delay(error, retry_after)
    except (TypeError, ValueError) as invalid:
        invalid.__cause__ = error
        error, delay = invalid, None

    if delay is not None:  # not counted: the other side named the time
        return Outcome(error=error, delay=delay, failures=failures, **seen)

    failures += 1
    exhausted = options.max_failures is not None and failures >= options.max_failures
    if exhausted or isinstance(error, PermanentError):
        return Outcome(error=error, delay=None, failures=failures, quarantined=True, **seen)
    return Outcome(error=error, delay=options.backoff.delay(failures, random), failures=failures, **seen)


def _own_delay(error: Exception, retry_after: RetryDelay) -> float | None:
    seconds = error.seconds if isinstance(error, RetryAfter) else retry_after(error)
    return None if seconds is None else delay_seconds(seconds, f"the delay of {type(error).__name__}")


def _settled(
    evaluation: Evaluation, options: KindOptions, progress: _Progress, random: Callable[[], float]
) -> Outcome:
    """The outcome of an evaluation without an error."""
    delay, rounds = progress.requeue, 0
    if delay is None and progress.changed and not progress.converged:
        rounds = evaluation.rounds + 1
        too_many = rounds - ROUNDS_AT_ONCE
        delay = options.backoff.delay(too_many, random) if too_many > 0 else 0.0
    return Outcome(delay=delay, failures=0, rounds=rounds, converged=progress.converged, **progress.seen())


@dataclass(slots=True)
class _Progress:
    """What was seen and done so far: what is known when an exception ends the rest."""

    step: str
    state: Any = None
    final_state: Any = None
    goal_state: Any = None
    actions: list[ActionRun] = field(default_factory=list)
    requeue: float | None = None  #: the earliest that an action asked for
    converged: bool | None = None
    changed: bool = False  #: is the state another than before the actions?

    def seen(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "final_state": self.final_state,
            "goal_state": self.goal_state,
            "actions": tuple(self.actions),
        }


def _read_and_act(
    evaluation: Evaluation,
    options: KindOptions,
    hooks: Hooks,
    progress: _Progress,
    clock: Callable[[], float],
) -> None:
    entity = _read(evaluation, hooks, progress)
    progress.state = progress.final_state
    progress.step = "get_action_list"
    action_list = as_action_list(entity.get_action_list(progress.state, progress.goal_state), entity)
    if action_list is NO_RULE:
        logger.warning(
            "%s: no rule for state %s and goal state %s, so nothing is done;"
            " add a cell to its rules, [] if that is meant",
            evaluation.ref,
            state_text(progress.state),
            state_text(progress.goal_state),
        )
    _act(evaluation, entity, action_list, hooks, progress, clock)
    if options.converge:
        acted = bool(action_list.actions)
        if acted:
            # Loaded afresh: an entity may keep what it read, and the truth is elsewhere.
            entity = _read(evaluation, hooks, progress)
        progress.step = "is_converged"
        progress.converged = bool(entity.is_converged(progress.final_state, progress.goal_state))
        progress.changed = acted and bool(progress.final_state != progress.state)
    progress.step = "around_evaluation"  # what is left to do


def _read(evaluation: Evaluation, hooks: Hooks, progress: _Progress) -> Entity:
    """Load the entity and read its two states."""
    progress.step = "from_id"
    entity = _loaded(evaluation.ref, evaluation.load)
    progress.step = "get_state"
    progress.final_state = entity.get_state()
    progress.step = "get_goal_state"
    progress.goal_state = entity.get_goal_state()
    progress.step = "states_read"
    for hook in hooks.states_read:
        hook(evaluation, progress.final_state, progress.goal_state)
    return entity


def _act(
    evaluation: Evaluation,
    entity: Entity,
    action_list: ActionList,
    hooks: Hooks,
    progress: _Progress,
    clock: Callable[[], float],
) -> None:
    """Run the actions in order, until one asks to skip the rest."""
    began = clock()

    def budgets(action: Action) -> Iterator[Budget]:
        if action_list.timeout is not None:
            yield Budget(
                began + action_list.timeout, f"timeout of the action list ({action_list.timeout:g} s)"
            )
        if action.timeout is not None:
            yield Budget(clock() + action.timeout, f"timeout of action {action.name} ({action.timeout:g} s)")

    for action in action_list.actions:
        progress.step = action.name
        ctx = Context(
            engine=evaluation.engine,
            entity=entity,
            state=progress.state,
            goal_state=progress.goal_state,
            failures=evaluation.failures,
            deadline=evaluation.deadline,
            lateness=evaluation.lateness,
            fencing_token=evaluation.fencing_token,
            task=evaluation.task,
            log=action_logger(evaluation.ref, action.name),
            budgets=tuple(budgets(action)),
            clock=clock,
            held=evaluation.held,
            calling=evaluation.calling,
        )
        ctx.check()
        started, raised = clock(), True
        try:
            returned = _within(hooks.around_action, (ctx, action), partial(execute, action, ctx))
            raised = False
        finally:
            progress.actions.append(ActionRun(action.name, clock() - started, raised))
        if isinstance(returned, Requeue):
            earlier = progress.requeue
            progress.requeue = returned.after if earlier is None else min(returned.after, earlier)
        if isinstance(returned, Stop) or (isinstance(returned, Requeue) and returned.stop):
            return


def execute(action: Action, ctx: Context) -> Requeue | Stop | None:
    """What the action returns. Raises what it raises, and `TypeError` for what it may not return."""
    returned = action.execute(ctx, ctx.entity)
    if returned is None or isinstance(returned, (Requeue, Stop)):
        return returned
    if inspect.iscoroutine(returned):
        returned.close()  # or Python warns that it was never awaited
    raise TypeError(
        f"action {action.name} returned {returned!r}; an action returns None, Requeue(seconds) or Stop()"
    )


# For people --------------------------------------------------------------------------------------


def error_text(error: BaseException, limit: int = MAX_ERROR) -> str:
    """`ConnectionError: no route to host`, on one line, in at most `limit` characters."""
    return one_line(f"{type(error).__name__}: {text_of(error)}".removesuffix(": "), limit)


def _summary(outcome: Outcome) -> str:
    parts = []
    runs = outcome.actions
    if runs:
        parts.append(", ".join(f"{run.name} {_span(run.seconds)}" for run in runs))
    elif outcome.error is None and not outcome.converged and not outcome.gone:
        parts.append("no actions")

    if outcome.error is not None:
        failure = f"failed ({error_text(outcome.error, 200)})"
        if runs and runs[-1].failed:
            parts[-1] += f" {failure}"
        else:
            parts.append(f"{outcome.step} {failure}".lstrip())
    if outcome.gone:
        parts.append(f"gone, as {outcome.step} said: forgotten")
    if outcome.quarantined:
        parts.append("quarantined")
    if outcome.converged:
        parts.append("converged")
    if outcome.delay is not None:
        parts.append(f"again in {_span(outcome.delay)}" if outcome.delay else "again at once")
    elif outcome.converged is False:
        parts.append(f"goal {state_text(outcome.goal_state)} not reached")

    # One state if nothing changed, none if none was read.
    states = dict.fromkeys(map(state_text, (outcome.state, outcome.final_state)))
    text = "; ".join(parts)
    return text if outcome.state is None else f"{' → '.join(states)}: {text}"


def _span(seconds: float) -> str:
    for limit, unit, name in ((0.9995, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{round(seconds / unit)} ms" if name == "ms" else f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86_400:.3g} d"
