"""One evaluation of one entity: read its states, choose its actions, run them, and say what follows.

    load the entity -> state, goal state -> action list -> each action -> state and goal state once more
          |                                                                             |
          any exception: failed()                                                  _settled()
          back-off, or quarantine                               idle, look at once, or when an action said

Nothing here knows where the entity is scheduled or on what it runs: an `Evaluation` goes in, an `Outcome`
comes out, and one place elsewhere acts on it. The only clock is the one that is given.
"""

from __future__ import annotations

import enum
import inspect
import random as _random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from celery_goalstate.actions import (
    Action,
    ActionList,
    Budget,
    Context,
    Requeue,
    Scheduler,
    Stop,
    action_logger,
    as_action_list,
)
from celery_goalstate.backoff import delay_seconds
from celery_goalstate.display import printable
from celery_goalstate.entity import Entity, EntityRef
from celery_goalstate.exceptions import Interrupted, PermanentError, RetryAfter
from celery_goalstate.settings import KindOptions

#: After so many looks at once in a row that did not reach the goal, the back-off spaces the next ones.
LOOKS_AT_ONCE = 10

#: Characters of a stored error text.
MAX_ERROR = 500

#: How long an error asks to be left alone, in seconds; None: it says nothing about that.
RetryDelay = Callable[[Exception], float | None]


class Evaluation(NamedTuple):
    """What is known before an evaluation."""

    ref: EntityRef
    load: Callable[[str], Entity]  #: `from_id` of the entity's class
    failures: int  #: consecutive ones so far
    looks: int  #: looks at once in a row so far
    deadline: datetime  #: UTC
    lateness: float  #: seconds
    fencing_token: int
    held: Callable[[], bool]  #: whether the lease is still held; answers at once
    engine: Scheduler
    task: Any  #: the request of the Celery task


class ActionRun(NamedTuple):
    """An action that was begun, how many seconds it took, and whether it raised."""

    name: str
    seconds: float
    failed: bool = False


class Outcome(NamedTuple):
    """What is known after an evaluation. `str()` is a line for people, e.g. in Flower."""

    delay: float | None  #: seconds until the next look; None: none is asked for
    failures: int  #: consecutive ones, this one included
    error: Exception | None = None  #: why it failed, with its traceback
    step: str = ""  #: where it failed: an action's name, `get_state`, ...
    quarantined: bool = False  #: it failed and is not to be tried again
    looks: int = 0  #: looks at once in a row, the next one included
    converged: bool | None = None  #: whether the goal is reached; None: not looked at
    state: Any = None  #: as read first
    final_state: Any = None  #: as read last
    goal_state: Any = None  #: as read last
    actions: tuple[ActionRun, ...] = ()

    def __str__(self) -> str:
        return _line(self)


def evaluate(
    evaluation: Evaluation,
    options: KindOptions,
    *,
    retry_after: RetryDelay = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    random: Callable[[], float] = _random.random,
) -> Outcome:
    """Evaluate an entity: whatever its code raises becomes an outcome, but for what ends a process.

    `retry_after` knows other errors than `RetryAfter` that bring their own delay. `clock` counts seconds,
    `random` returns numbers from 0 to 1.
    """
    progress = _Progress()
    try:
        _look_and_act(evaluation, options, progress, clock)
    except BaseException as raised:
        if _ends_more_than_this(raised):
            raise
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
    """The outcome of a failure after `failures` others in a row: when to look again, or quarantine.

    `seen` are fields of the outcome that are known besides.
    """
    try:
        delay = _own_delay(error, retry_after)
    except (TypeError, ValueError) as invalid:
        invalid.__cause__ = error
        error, delay = invalid, None

    if delay is not None:  # not counted: the other side said when to return
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
    delay, looks = progress.requeue, 0
    if delay is None and progress.changed and not progress.converged:
        looks = evaluation.looks + 1
        too_many = looks - LOOKS_AT_ONCE
        delay = options.backoff.delay(too_many, random) if too_many > 0 else 0.0
    return Outcome(delay=delay, failures=0, looks=looks, converged=progress.converged, **progress.seen())


@dataclass(slots=True)
class _Progress:
    """What was seen and done so far: what there is to tell when an exception ends the rest."""

    step: str = ""
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


def _look_and_act(
    evaluation: Evaluation, options: KindOptions, progress: _Progress, clock: Callable[[], float]
) -> None:
    entity = _look(evaluation, progress)
    progress.state = progress.final_state
    progress.step = "get_action_list"
    action_list = as_action_list(entity.get_action_list(progress.state, progress.goal_state), entity)
    _act(evaluation, entity, action_list, progress, clock)
    if options.converge:
        # Loaded afresh: an entity may keep what it read, and the truth is elsewhere.
        _look(evaluation, progress)
        progress.converged = bool(progress.final_state == progress.goal_state)
        progress.changed = bool(progress.final_state != progress.state)


def _look(evaluation: Evaluation, progress: _Progress) -> Entity:
    """Load the entity and read its two states."""
    progress.step = "from_id"
    entity = evaluation.load(evaluation.ref.id)
    if not isinstance(entity, Entity):
        raise TypeError(f"from_id returned {entity!r} for {evaluation.ref}; it returns an entity")
    progress.step = "get_state"
    progress.final_state = entity.get_state()
    progress.step = "get_goal_state"
    progress.goal_state = entity.get_goal_state()
    return entity


def _act(
    evaluation: Evaluation,
    entity: Entity,
    action_list: ActionList,
    progress: _Progress,
    clock: Callable[[], float],
) -> None:
    """Run the actions in order, until one says that the rest is to be skipped."""
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
            _budgets=tuple(budgets(action)),
            _clock=clock,
            _held=evaluation.held,
        )
        ctx.check()
        said = _execute(action, ctx, progress, clock)
        if isinstance(said, Requeue):
            progress.requeue = said.after if progress.requeue is None else min(said.after, progress.requeue)
        if isinstance(said, Stop) or (isinstance(said, Requeue) and said.stop):
            return


def _execute(
    action: Action, ctx: Context, progress: _Progress, clock: Callable[[], float]
) -> Requeue | Stop | None:
    started, succeeded = clock(), False
    try:
        said = action.execute(ctx, ctx.entity)
        _check_said(action, said)
        succeeded = True
        return said
    finally:
        progress.actions.append(ActionRun(action.name, clock() - started, failed=not succeeded))


def _check_said(action: Action, said: object) -> None:
    if said is None or isinstance(said, (Requeue, Stop)):
        return
    if inspect.iscoroutine(said):
        said.close()  # or Python warns that nobody awaited it
    raise TypeError(
        f"action {action.name} returned {said!r}; an action returns None, Requeue(seconds) or Stop()"
    )


# For people --------------------------------------------------------------------------------------


def error_text(error: BaseException, limit: int = MAX_ERROR) -> str:
    """`ConnectionError: no route to host`, on one line, in at most `limit` characters."""
    return _text(f"{type(error).__name__}: {_str(error)}".removesuffix(": "), limit)


def _line(outcome: Outcome) -> str:
    said = []
    runs = outcome.actions
    if runs:
        said.append(", ".join(f"{run.name} {_span(run.seconds)}" for run in runs))
    elif outcome.error is None and not outcome.converged:
        said.append("no actions")

    if outcome.error is not None:
        failure = f"failed ({error_text(outcome.error, 200)})"
        if runs and runs[-1].failed:
            said[-1] += f" {failure}"
        else:
            said.append(f"{outcome.step} {failure}".lstrip())
    if outcome.quarantined:
        said.append("quarantined")
    if outcome.converged:
        said.append("converged")
    if outcome.delay is not None:
        said.append(f"look again in {_span(outcome.delay)}" if outcome.delay else "look again at once")
    elif outcome.converged is False:
        said.append(f"goal {_state_text(outcome.goal_state)} not reached")

    # One state if nothing changed, none if none was read.
    states = dict.fromkeys(map(_state_text, (outcome.state, outcome.final_state)))
    line = "; ".join(said)
    return line if outcome.state is None else f"{' → '.join(states)}: {line}"


def _state_text(state: Any) -> str:
    return _text(state.name if isinstance(state, enum.Enum) else _str(state), 60)


def _span(seconds: float) -> str:
    for limit, unit, name in ((0.9995, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{round(seconds / unit)} ms" if name == "ms" else f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86_400:.3g} d"


def _str(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a text for people must not fail the evaluation that it tells of
        return f"<{type(value).__name__} that cannot be printed>"


def _text(text: str, limit: int) -> str:
    """On one line, printable, and cut to `limit` characters."""
    line = printable(" ".join(text.split())[: limit + 1])
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
