"""Actions: what one is, what it gets, and what it can return."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import InitVar, dataclass, field
from datetime import datetime, timedelta
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, final

from celery_goalstate.backoff import delay_seconds
from celery_goalstate.entity import Entity, EntityLike, EntityRef
from celery_goalstate.exceptions import ActionTimeout, LeaseLost

if TYPE_CHECKING:
    from celery_goalstate.deadlines import Deadline
    from celery_goalstate.description import Enqueued
    from celery_goalstate.engine import Engine


@final
@dataclass(frozen=True, slots=True, init=False)
class Requeue:
    """Returned by an action: go on with the list, then evaluate again after `after` (seconds or a timedelta).

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

    Raises `TypeError` or `ValueError` for what cannot be one.
    """

    name: str
    execute: ActionFunction
    timeout: float | None

    def __init__(self, name: str, execute: ActionFunction, timeout: float | timedelta | None = None) -> None:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError(f"an action's name is {name!r}; give a printable string")
        if not callable(execute):
            raise TypeError(f"action {name} executes {execute!r}; give a function of (ctx, entity)")
        if not isinstance(execute, Method):
            _check_function(name, execute, ("ctx", "entity"))
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
            if isinstance(action.execute, Method):
                _check_function(action.name, action.execute.bound_to(entity), ("ctx",))
    return action_list


@final
@dataclass(frozen=True, slots=True)
class Method:
    """Executes a method of the entity that is only known by its name."""

    name: str

    def check_in(self, cls: type[Entity]) -> None:
        """Raise `TypeError` if the class lacks the method, or has one that cannot be called with (ctx)."""
        found = inspect.getattr_static(cls, self.name, None)
        if isinstance(found, FunctionType):
            _check_function(self.name, MethodType(found, cls), ("ctx",))
        elif isinstance(found, (classmethod, staticmethod)):
            _check_function(self.name, getattr(cls, self.name), ("ctx",))
        elif not callable(found) and not hasattr(found, "__get__") and not hasattr(cls, "__getattr__"):
            raise TypeError(f"{cls.__qualname__} has no method {self.name!r}")

    def bound_to(self, entity: Entity) -> Callable[[Context], Requeue | Stop | None]:
        """The entity's own method. Raises `TypeError` if there is none."""
        method = getattr(entity, self.name, None)
        if not callable(method):
            raise TypeError(f"{entity!r} has no method {self.name!r} for its action of that name")
        return method  # type: ignore[no-any-return]  # what it returns is checked when it has

    def __call__(self, ctx: Context, entity: Entity) -> Requeue | Stop | None:
        """As an action's function."""
        return self.bound_to(entity)(ctx)


def _as_action(value: ActionLike) -> Action:
    if isinstance(value, Action):
        return value
    if isinstance(value, str):
        return Action(value, Method(value))
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


def _check_function(name: str, function: Callable[..., Any], args: tuple[str, ...]) -> None:
    """Raise `TypeError` for a function that cannot be called with so many arguments, or not as an action."""
    if not _takes(function, len(args)):
        raise TypeError(
            f"action {name} executes {getattr(function, '__qualname__', function)!r}, which cannot be called"
            f" with ({', '.join(args)}); define it so"
        )
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise TypeError(
            f"action {name} is a coroutine function; actions are plain functions, as Celery's tasks"
        )


#: Code, how many defaults it has, whether it is that of a bound method, and how many arguments it takes. Many
#: an action is built anew for each evaluation, and reading a signature takes longer than all the rest.
_known_to_take: set[tuple[object, int, bool, int]] = set()


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether the function can be called with so many arguments, all by position."""
    code = getattr(function, "__code__", None)  # a bound method has that of its function
    defaults = getattr(function, "__defaults__", None)
    known = (code, len(defaults or ()), isinstance(function, MethodType), count)
    if known in _known_to_take:
        return True
    try:
        # Not the signature of what a decorator wraps: that may give it more arguments.
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return True  # some builtins have none
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    if code is not None:
        _known_to_take.add(known)
    return True


# What an action gets -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Budget:
    """A time limit: when it ends on the context's clock, and what it limits."""

    ends: float
    of: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What is known when an action begins."""

    engine: Engine
    entity: Entity
    state: Any  #: as read before the first action of the list
    goal_state: Any
    failures: int  #: consecutive ones, before this evaluation
    deadline: datetime  #: when the evaluation fell due; UTC
    lateness: float  #: seconds between that and its start
    fencing_token: int  #: rises with every evaluation of the entity: a store can refuse an older one
    task: Any  #: the request of the Celery task
    log: logging.LoggerAdapter[logging.Logger]  #: its records carry kind, id and action
    budgets: InitVar[tuple[Budget, ...]]
    clock: InitVar[Callable[[], float]]  #: seconds; that of the budgets
    held: InitVar[Callable[[], bool]]  #: whether the lease is still held; answers at once
    calling: InitVar[Callable[[], AbstractContextManager[None]]]  #: what is enqueued in it, the run enqueues
    _budgets: tuple[Budget, ...] = field(init=False, repr=False)
    _clock: Callable[[], float] = field(init=False, repr=False)
    _held: Callable[[], bool] = field(init=False, repr=False)
    _calling: Callable[[], AbstractContextManager[None]] = field(init=False, repr=False)

    def __post_init__(
        self,
        budgets: tuple[Budget, ...],
        clock: Callable[[], float],
        held: Callable[[], bool],
        calling: Callable[[], AbstractContextManager[None]],
    ) -> None:
        object.__setattr__(self, "_budgets", budgets)
        object.__setattr__(self, "_clock", clock)
        object.__setattr__(self, "_held", held)
        object.__setattr__(self, "_calling", calling)


@final
class Context(_Known):
    """What an action gets: `execute(ctx, entity)`. Nothing can be set on it."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(
            f"ctx.{name} cannot be set; what the actions of one evaluation share lives on the entity:"
            f" entity.{name} = ..."
        )

    def enqueue(
        self,
        entity: EntityLike,
        deadline: Deadline = None,
        *,
        eta: datetime | None = None,
        countdown: float | None = None,
        replace: bool = False,
        max_wait: float | timedelta | None = None,
    ) -> Enqueued:
        """`Engine.enqueue`, for any entity; for the one under evaluation a later failure discards it.

        In whatever thread, and also when the evaluation has ended, it is this evaluation that enqueues: so
        that of its own entity never outlives a delete, nor ends a quarantine.
        """
        with self._calling():
            return self.engine.enqueue(
                entity, deadline, eta=eta, countdown=countdown, replace=replace, max_wait=max_wait
            )

    def enqueue_many(
        self,
        entities: Iterable[EntityLike],
        deadline: Deadline = None,
        *,
        eta: datetime | None = None,
        countdown: float | None = None,
        spread: float | timedelta | None = None,
        replace: bool = False,
        max_wait: float | timedelta | None = None,
    ) -> int:
        """`Engine.enqueue_many`, for any entities; see `enqueue`."""
        with self._calling():
            return self.engine.enqueue_many(
                entities,
                deadline,
                eta=eta,
                countdown=countdown,
                spread=spread,
                replace=replace,
                max_wait=max_wait,
            )

    def delete(self, entity: EntityLike) -> bool:
        """`Engine.delete`, for any entity."""
        return self.engine.delete(entity)

    def delete_many(self, entities: Iterable[EntityLike]) -> int:
        """`Engine.delete_many`, for any entities."""
        return self.engine.delete_many(entities)

    def is_scheduled(self, entity: EntityLike) -> bool:
        """`Engine.is_scheduled`, for any entity; the evaluation under way is not pending any more."""
        return self.engine.is_scheduled(entity)

    def remaining(self) -> float | None:
        """Seconds left of the action's or its list's timeout, whichever ends first; None: there is none."""
        if not self._budgets:
            return None
        return max(0.0, min(budget.ends for budget in self._budgets) - self._clock())

    def check(self) -> None:
        """Raise `LeaseLost` if another evaluation may have begun, or `ActionTimeout` if time is up.

        Also `LeaseLost` if the worker ends: the evaluation begins anew elsewhere.

        For an action that takes long, between two of its steps. The engine does it before every action.
        """
        if not self._held():
            raise LeaseLost
        now = self._clock()
        for budget in self._budgets:
            if now >= budget.ends:
                raise ActionTimeout(f"the {budget.of} is over")


class _ActionLogger(logging.LoggerAdapter[logging.Logger]):
    """Names the entity and the action of a message: in its text, and in the record's fields.

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
