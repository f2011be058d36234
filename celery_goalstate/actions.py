"""Actions, what one is told, and what it can say."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeAlias, final

from celery_goalstate.backoff import delay_seconds
from celery_goalstate.entity import Entity, EntityRef
from celery_goalstate.exceptions import ActionTimeout, LeaseLost


@final
@dataclass(frozen=True, slots=True, init=False)
class Requeue:
    """Returned by an action: go on with the list, then look again after `after` (seconds or a timedelta).

    Of several the earliest counts, and a failure later in the list discards it. `stop=True` skips the rest
    of the list.
    """

    after: float  #: seconds
    stop: bool

    def __init__(self, after: float | timedelta, stop: bool = False) -> None:
        object.__setattr__(self, "after", delay_seconds(after, "Requeue's delay"))
        object.__setattr__(self, "stop", stop)


@final
@dataclass(frozen=True, slots=True)
class Stop:
    """Returned by an action: skip the rest of the list. That is no failure."""


# Actions -----------------------------------------------------------------------------------------

ActionFunction: TypeAlias = "Callable[[Context, Any], Requeue | Stop | None]"

#: An action; a function, named after itself; or the name of a method of the entity.
ActionLike: TypeAlias = "Action | ActionFunction | str"

#: What `get_action_list` may return.
ActionsLike: TypeAlias = "ActionList | Sequence[ActionLike] | ActionLike | None"


@final
@dataclass(frozen=True, slots=True, init=False)
class Action:
    """One step toward the goal: `execute(ctx, entity)`. It must be idempotent: it can run twice.

    `timeout`, in seconds, is what `ctx.remaining()` and `ctx.check()` go by: a cooperative limit.
    """

    name: str
    execute: ActionFunction
    timeout: float | None

    def __init__(self, name: str, execute: ActionFunction, timeout: float | timedelta | None = None) -> None:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError(f"an action's name is {name!r}; give a printable string")
        if not callable(execute):
            raise TypeError(f"action {name} executes {execute!r}; give a function of (ctx, entity)")
        _refuse_coroutine_function(name, execute)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "execute", execute)
        object.__setattr__(self, "timeout", _checked_timeout(timeout, f"the timeout of action {name}"))


@final
@dataclass(frozen=True, slots=True, init=False)
class ActionList:
    """Actions in the order in which they run, and the cooperative time budget of them all, in seconds.

    Raises `TypeError` or `ValueError` for what cannot be an action.
    """

    actions: tuple[Action, ...]
    timeout: float | None

    def __init__(self, actions: Iterable[ActionLike], timeout: float | timedelta | None = None) -> None:
        object.__setattr__(self, "actions", tuple(_as_action(action) for action in actions))
        object.__setattr__(self, "timeout", _checked_timeout(timeout, "the timeout of an action list"))


def as_action_list(value: ActionsLike, entity: Entity | None = None) -> ActionList:
    """The action list that `value` stands for; with an entity, whose methods the names in it must be.

    Raises `TypeError` for what cannot be one.
    """
    if isinstance(value, ActionList):
        action_list = value
    elif value is None:
        action_list = ActionList(())
    elif isinstance(value, (list, tuple)):
        action_list = ActionList(value)
    elif isinstance(value, (Action, str)) or callable(value):
        action_list = ActionList((value,))
    else:
        raise TypeError(
            f"{value!r} is no action list; give a list of actions, functions and names of methods"
        )
    if entity is not None:
        for action in action_list.actions:
            if isinstance(action.execute, _Method):
                _refuse_coroutine_function(action.name, action.execute.bound_to(entity))
    return action_list


@dataclass(frozen=True, slots=True)
class _Method:
    """Executes a method of the entity that is only known by its name."""

    name: str

    def bound_to(self, entity: Entity) -> Callable[[Context], Requeue | Stop | None]:
        method = getattr(entity, self.name, None)
        if not callable(method):
            raise TypeError(f"{entity!r} has no method {self.name!r} for its action of that name")
        return method  # type: ignore[no-any-return]  # what it returns is checked when it has

    def __call__(self, ctx: Context, entity: Entity) -> Requeue | Stop | None:
        return self.bound_to(entity)(ctx)


def _as_action(value: ActionLike) -> Action:
    if isinstance(value, Action):
        return value
    if isinstance(value, str):
        return Action(value, _Method(value))
    if not callable(value):
        raise TypeError(f"{value!r} is no action; give an Action, a function or the name of a method")
    name = getattr(value, "__name__", "<unnamed>")
    if name.startswith("<"):  # <lambda>
        raise TypeError(f'{value!r} has no name of its own; give it one: Action("...", {name.strip("<>")})')
    return Action(name, value)


def _checked_timeout(timeout: float | timedelta | None, name: str) -> float | None:
    if timeout is None:
        return None
    seconds = delay_seconds(timeout, name)
    if seconds == 0:
        raise ValueError(f"{name} is 0; give more than 0 seconds, or None for no limit")
    return seconds


def _refuse_coroutine_function(name: str, function: Callable[..., Any]) -> None:
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise TypeError(
            f"action {name} is a coroutine function; actions are plain functions, as Celery's tasks"
        )


# What an action gets -----------------------------------------------------------------------------


class Scheduler(Protocol):
    """What an action uses of the engine."""

    @property
    def enqueue(self) -> Callable[..., Any]:
        """Schedules an evaluation."""

    @property
    def delete(self) -> Callable[[Entity | EntityRef], bool]:
        """Forgets an entity."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A time limit: when it ends on the context's clock, and what it limits."""

    ends: float
    of: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What an action is told: `execute(ctx, entity)`."""

    engine: Scheduler
    entity: Entity
    state: Any  #: as read before the first action of the list
    goal_state: Any
    failures: int  #: consecutive ones, before this evaluation
    deadline: datetime  #: when the evaluation fell due; UTC
    lateness: float  #: seconds between that and its start
    fencing_token: int  #: rises with every evaluation of the entity: a store can refuse an older one
    task: Any  #: the request of the Celery task
    log: logging.LoggerAdapter[logging.Logger]  #: its records carry kind, id and action
    _budgets: tuple[Budget, ...]
    _clock: Callable[[], float]
    _held: Callable[[], bool]

    def enqueue(self, entity: Entity | EntityRef, deadline: Any = None, **options: Any) -> Any:
        """`Engine.enqueue`, for any entity; for the one under evaluation a later failure discards it."""
        return self.engine.enqueue(entity, deadline, **options)

    def delete(self, entity: Entity | EntityRef) -> bool:
        """`Engine.delete`, for any entity."""
        return self.engine.delete(entity)

    def remaining(self) -> float | None:
        """Seconds left of the action's or its list's timeout, whichever ends first; None: there is none."""
        if not self._budgets:
            return None
        return max(0.0, min(budget.ends for budget in self._budgets) - self._clock())

    def check(self) -> None:
        """Raise `LeaseLost` if another evaluation may have begun, or `ActionTimeout` if time is up.

        For an action that takes long, between two of its steps. The engine does it before every action.
        """
        if not self._held():
            raise LeaseLost
        now = self._clock()
        for budget in self._budgets:
            if now >= budget.ends:
                raise ActionTimeout(f"the {budget.of} is over")


class _ActionLogger(logging.LoggerAdapter[logging.Logger]):
    """Says of which entity and action a message is: in its text, and in the record's fields.

    Adds its fields to those of the call, instead of replacing them as the adapter of Python 3.11 does.
    """

    def __init__(self, ref: EntityRef, action: str) -> None:
        logger = logging.getLogger("celery_goalstate.action")
        super().__init__(logger, {"kind": ref.kind, "id": ref.id, "action": action})
        self._prefix = f"{ref} {action}: "

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        # A text without arguments is not formatted. `stacklevel`: the record names the caller's line.
        prefix = self._prefix.replace("%", "%%") if args else self._prefix
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        super().log(level, f"{prefix}{msg}", *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        extra = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, {**kwargs, "extra": extra}


def action_logger(ref: EntityRef, action: str) -> logging.LoggerAdapter[logging.Logger]:
    """A logger whose records carry `kind`, `id` and `action`, and begin with them."""
    return _ActionLogger(ref, action)
