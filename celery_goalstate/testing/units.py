"""One action alone."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, cast

from celery.app.task import Context as TaskRequest

from celery_goalstate.actions import (
    Action,
    ActionLike,
    Budget,
    Context,
    Requeue,
    Stop,
    action_logger,
    as_action_list,
)
from celery_goalstate.deadlines import Deadline, one_deadline
from celery_goalstate.description import Enqueued
from celery_goalstate.engine import Engine
from celery_goalstate.entity import Entity, EntityLike, EntityRef
from celery_goalstate.evaluation import execute
from celery_goalstate.testing.worlds import (
    NOT_REPEATABLE,
    NotRepeatable,
    Snapshot,
    World,
    differences,
    fresh,
    taken,
)


@dataclass(frozen=True, slots=True)
class Notebook:
    """What stands in for an engine: it notes what an action asks for."""

    enqueued: list[tuple[EntityRef, Deadline]] = field(default_factory=list)  #: with the deadlines asked for
    deleted: list[EntityRef] = field(default_factory=list)

    def enqueue(
        self,
        entity: EntityLike,
        deadline: Deadline = None,
        *,
        eta: datetime | None = None,
        countdown: float | None = None,
        **options: Any,  # noqa: ARG002 - as `Engine.enqueue` has them
    ) -> Enqueued:
        """As `Engine.enqueue`."""
        self.enqueued.append((_ref(entity), one_deadline(deadline, eta, countdown)))
        return Enqueued(changed=True, deadline=None, sent=True)

    def enqueue_many(self, entities: Iterable[EntityLike], *args: Any, **options: Any) -> int:
        """As `Engine.enqueue_many`."""
        options.pop("spread", None)
        return sum(self.enqueue(entity, *args, **options).changed for entity in entities)

    def delete(self, entity: EntityLike) -> bool:
        """As `Engine.delete`."""
        return self.delete_many([entity]) == 1

    def delete_many(self, entities: Iterable[EntityLike]) -> int:
        """As `Engine.delete_many`."""
        refs = [_ref(entity) for entity in entities]
        self.deleted.extend(refs)
        return len(refs)

    def is_scheduled(self, entity: EntityLike) -> bool:
        """Whether it was enqueued here, and not deleted."""
        ref = _ref(entity)
        return ref not in self.deleted and any(ref == enqueued for enqueued, _ in self.enqueued)


def _ref(entity: EntityLike) -> EntityRef:
    return entity.ref if isinstance(entity, Entity) else entity


_READ: Final = object()


def context(
    entity: Entity,
    *,
    state: Any = _READ,
    goal_state: Any = _READ,
    failures: int = 0,
    deadline: datetime | None = None,
    lateness: float = 0.0,
    fencing_token: int = 1,
    remaining: float | None = None,
    lease_held: bool = True,
    task: Any = None,
    engine: Engine | None = None,
) -> Context:
    """What an action gets. A state that is not given is read from the entity; all else is harmless.

    Without an engine, `ctx.engine` notes what it is asked for, in its lists `enqueued` and `deleted`.
    `remaining` are the seconds left, which do not pass; 0: `ctx.check()` raises `ActionTimeout`.
    `lease_held=False`: it raises `LeaseLost`.
    """
    budgets = () if remaining is None else (Budget(remaining, f"timeout of {remaining:g} s"),)
    return Context(
        engine=cast("Engine", Notebook()) if engine is None else engine,
        entity=entity,
        state=entity.get_state() if state is _READ else state,
        goal_state=entity.get_goal_state() if goal_state is _READ else goal_state,
        failures=failures,
        deadline=datetime.now(UTC) if deadline is None else deadline,
        lateness=lateness,
        fencing_token=fencing_token,
        task=TaskRequest(id="test") if task is None else task,
        log=action_logger(entity.ref, "test"),
        budgets=budgets,
        clock=lambda: 0.0,
        held=lambda: lease_held,
        calling=nullcontext,
    )


def run_action(action: ActionLike, entity: Entity, **given: Any) -> Requeue | Stop | None:
    """Execute one action (a function, an `Action`, a method's name) as the engine would, and only it.

    What it gets is `context(entity, **given)`. Raises what it raises, and `TypeError` for what no action may
    return.
    """
    one = _one(action, entity)
    if one.timeout is not None:
        given.setdefault("remaining", one.timeout)
    return execute(one, context(entity, **given))


def _one(action: ActionLike, entity: Entity) -> Action:
    [one] = as_action_list([action], entity).actions
    return one


def check_idempotent(action: ActionLike, world: World, *, snapshot: Snapshot) -> None:
    """Execute the action twice, with one context: the world must end up as when it is executed once.

    `world()` makes a fresh world and returns (or, as a context manager, yields) the entity; in a Django test
    it is undone. `snapshot(entity)` is what must be the same: take in what others have seen. Raises
    `NotRepeatable` if it differs from run to run without that.
    """
    __tracebackhide__ = True
    once = _executed(action, world, snapshot, times=1)
    again = _executed(action, world, snapshot, times=1)
    if once != again:
        raise NotRepeatable("\n".join([NOT_REPEATABLE, *differences(once, again)]))
    twice = _executed(action, world, snapshot, times=2)
    if once != twice:
        name = action if isinstance(action, str) else getattr(action, "name", getattr(action, "__name__", ""))
        lines = [f"{name} is not idempotent. Executed twice, it ends differently:"]
        raise AssertionError("\n".join([*lines, *differences(once, twice)]))


def _executed(action: ActionLike, world: World, snapshot: Snapshot, *, times: int) -> Any:
    with fresh(world) as entity:
        one, ctx = _one(action, entity), context(entity)
        for n in range(times):
            try:
                execute(one, ctx)
            except Exception as error:
                if n == 0:
                    raise
                raise AssertionError(
                    f"{one.name} is not idempotent. The second time it raises {error!r}"
                ) from error
        return taken(snapshot, entity)
