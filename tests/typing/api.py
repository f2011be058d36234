"""Typed use of the public API: checked by mypy, never run."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type
from uuid import UUID, uuid4

from celery import Celery, Task
from django.db import models

from celery_goalstate import (
    ANY,
    Action,
    ActionList,
    Context,
    Description,
    Engine,
    Enqueued,
    Entity,
    EntityRef,
    Requeue,
    Rules,
    Status,
    Stop,
    current_engine,
    shared_entity,
    signals,
)
from celery_goalstate.contrib.django import (
    ModelEntity,
    StateChanged,
    enqueue_many_on_commit,
    enqueue_on_commit,
    set_goal,
)
from celery_goalstate.contrib.django.models import GoalStateModel, unconverged_index
from celery_goalstate.contrib.opentelemetry import install
from celery_goalstate.display import matrix_html, matrix_text
from celery_goalstate.evaluation import Outcome
from celery_goalstate.exceptions import IndexUnavailable, PermanentError, RetryAfter
from celery_goalstate.testing import (
    Checked,
    Look,
    check_concurrent,
    check_converges,
    check_crash_safe,
    check_idempotent,
    check_rules,
    context,
    fail,
    kill,
    lose_lease,
    run_action,
    simulate,
)

app = Celery("shop", broker="redis://localhost/0")
engine = Engine(app)
later = Engine(namespace="billing")
later.init_app(app)


class State(enum.StrEnum):
    PAID = "paid"
    SHIPPED = "shipped"


def reserve(ctx: Context, order: Order) -> Requeue | None:
    ctx.log.info("%s after %d failures, %s late", order, ctx.failures, ctx.lateness)
    if ctx.failures > 3:
        raise PermanentError("enough")
    return Requeue(timedelta(minutes=1)) if ctx.remaining() == 0 else None


def ship(ctx: Context, order: Order) -> None:
    ctx.check()
    ctx.enqueue(engine.ref("parcel", order.id), 30)
    raise RetryAfter(60)


def skip(ctx: Context, order: Order) -> Stop:
    return Stop()


@engine.register
class Order(Entity):
    kind = "order"

    def get_state(self) -> State:
        return State.PAID

    def get_goal_state(self) -> State:
        return State.SHIPPED

    def get_action_list(self, state: State, goal_state: State) -> ActionList:
        return ActionList([reserve, "pack", Action("ship", ship, timeout=5.0)], timeout=timedelta(minutes=1))

    def pack(self, ctx: Context) -> None: ...

    @classmethod
    def iter_unconverged(cls) -> Iterator[int]:
        yield from range(10)


@engine.register(queue="parcels", soft_time_limit=30, max_failures=5)
class Parcel(Entity):
    rules = Rules({State.SHIPPED: {State.PAID: [reserve, ship], State.SHIPPED: [], ANY: skip}})


@shared_entity
class Invoice(Entity):
    rules = Rules({})


@shared_entity(resync_every=60)
class Receipt(Entity):
    rules = Rules({})


assert_type(engine.register(Order), type[Order])
order = Order("42")
assert_type(Order.from_id("42"), Order)
assert_type(order.ref, EntityRef)

assert_type(engine.enqueue(order), Enqueued)
assert_type(engine.enqueue(Order(42), timedelta(minutes=5)).deadline, datetime | None)
engine.enqueue(engine.ref("order", 42), 30.0)
engine.enqueue(order, eta=datetime.now(UTC))
engine.enqueue(order, countdown=5)
engine.enqueue(order, 5, replace=True, max_wait=timedelta(minutes=1))
assert_type(
    engine.enqueue_many((Order(number) for number in range(3)), 60, spread=timedelta(minutes=10)), int
)

assert_type(engine.is_scheduled(order), bool)
assert_type(engine.describe(order), Description | None)
assert_type(engine.describe_many([order, engine.ref("parcel", "1")]), list[Description | None])
assert_type(engine.list(Order, status=Status.FAILED, limit=50), list[Description])
assert_type(engine.list("order", status="failed"), list[Description])
assert_type(engine.list("order", after=engine.list("order")[-1].cursor), list[Description])
assert_type(engine.counts(), dict[str, dict[Status, int]])
assert_type(engine.orphans(), dict[str, dict[Status, int]])

assert_type(engine.delete(order), bool)
assert_type(engine.delete_many([order]), int)
assert_type(engine.delete_kind("parcel"), int)
assert_type(engine.resync(Order, spread=60, revive=True), int)
engine.pause("order")
engine.resume(Order)
engine.stop()
engine.start()
assert_type(current_engine(), Engine)
assert_type(Parcel.rules.missing(State, State), list[tuple[Any, Any]])
assert_type(matrix_text(Parcel.rules.matrix((State.PAID, State.SHIPPED))), str)
assert_type(matrix_html(Parcel.rules.matrix()), str)

try:
    engine.enqueue(order)
except IndexUnavailable as error:
    assert_type(str(error), str)

enqueue_on_commit(order, 60, using="default", engine=engine)
install(engine)


@signals.evaluation_finished.connect(sender="order")
def finished(kind: str, id: str, outcome: Outcome, seconds: float, **_: Any) -> None: ...


class Row(GoalStateModel):
    status: models.CharField[str, str] = models.CharField(max_length=10)

    class Meta:
        indexes = (unconverged_index("status", "wanted", name="row_unconverged", key="number"),)


@engine.register(resync_every=600)
class RowEntity(ModelEntity):
    model, state_field, goal_field = Row, "status", "wanted"
    goals = ("shipped",)
    rules = Rules({"shipped": {"paid": ["ship"]}})

    def ship(self, ctx: Context) -> None:
        with self.locked(nowait=True) as row:
            row.status = "packed"
        try:
            self.transition(["paid", "packed"], "shipped", note=self.obj.note)
        except StateChanged as changed:
            ctx.log.info("%g", changed.seconds)
            raise


def in_a_view(row: Row) -> int:
    row.set_goal("shipped", deadline=60)
    enqueue_on_commit(row, robust=False)
    enqueue_many_on_commit([row, row.entity], spread=60)
    return set_goal(Row.objects.filter(status="paid"), "shipped")


engine.register(
    Order,
    failure_retry_delay=timedelta(seconds=5),
    resync_every=None,
    priority=3,
    rate_limit="10/s",
    base=Task,
    throws=(ValueError,),
)
engine.declare("invoice", queue="billing", priority=1)


def asks(ctx: Context, order: Order) -> None:
    """What an action may ask for, with the engine's own signatures."""
    assert_type(ctx.engine, Engine)
    assert_type(ctx.enqueue(order, timedelta(minutes=5), replace=True, max_wait=60), Enqueued)
    assert_type(ctx.enqueue(engine.ref("asset", uuid4()), countdown=5), Enqueued)
    assert_type(ctx.enqueue_many([order, Order(UUID(int=1))], spread=60), int)
    assert_type(ctx.delete(order), bool)
    assert_type(ctx.delete_many([order]), int)
    assert_type(ctx.is_scheduled(order), bool)
    ctx.enqueue(order, debounce=True)  # type: ignore[call-arg]  # must not pass
    ctx.enqueue("order/42")  # type: ignore[arg-type]  # must not pass
    ctx.failures = 0  # type: ignore[misc]  # must not pass


def world() -> Order:
    return Order("42")


@contextmanager
def closed_afterwards() -> Iterator[Order]:
    yield Order("42")


def seen(order: Order) -> dict[str, State]:
    return {"state": order.get_state()}


def cancel(order: Order) -> None:
    engine.enqueue(order)


def test_of_an_order() -> None:
    assert_type(run_action("pack", order, failures=3), Requeue | Stop | None)
    assert_type(context(order, remaining=5, lease_held=False), Context)
    check_idempotent(ship, world, snapshot=seen)
    assert_type(
        check_crash_safe(
            world, snapshot=seen, effects=["carrier.book", (order, "pack")], faults=["kill"], depth=2
        ),
        Checked,
    )
    assert_type(check_concurrent(closed_afterwards, cancel, any_end=True).exhausted, bool)
    check_rules(Parcel.rules, State, [State.SHIPPED])
    check_converges(lambda state, goal: Order(state), State, State, within=timedelta(days=2))
    with simulate(engine, start=datetime.now(UTC)) as simulation:
        simulation.watch("carrier.book")
        simulation.at("before pack", fail(OSError("no box")), times=2)
        simulation.at("after pack", kill, nth=2)
        simulation.at("after ship", lose_lease)
        simulation.at("between looks", lambda: cancel(order))
        simulation.advance(minutes=5)
        simulation.run_until_idle(timedelta(days=1))
        simulation.assert_converges(order)
        simulation.assert_scheduled(order, in_=timedelta(seconds=5))
        assert_type(simulation.looks, list[Look])
        assert_type(simulation.actions(order), list[str])
        assert_type(simulation.story(), str)
        simulation.at("after pack", "kill")  # type: ignore[arg-type]  # must not pass
    check_crash_safe(world, faults="kill", dept=2)  # type: ignore[call-arg]  # must not pass


# What must not pass the type checker; an ignore that is not needed is an error.
engine.enqueue("order/42")  # type: ignore[arg-type]  # must not pass
engine.enqueue(order, "in five minutes")  # type: ignore[arg-type]  # must not pass
engine.register(int)  # type: ignore[type-var]  # must not pass
Requeue("soon")  # type: ignore[arg-type]  # must not pass
Action("ship", ship, timeout="5 s")  # type: ignore[arg-type]  # must not pass
engine.register(max_failure=5)(Order)  # type: ignore[call-overload]  # must not pass
engine.register(Order, max_failures="5")  # type: ignore[call-overload]  # must not pass
engine.register(Order, autoretry_for=(OSError,))  # type: ignore[call-overload]  # must not pass
engine.declare("invoice", max_failures=5)  # type: ignore[call-arg]  # must not pass
shared_entity(Order, batch_sise=64)  # type: ignore[call-overload]  # must not pass


@engine.register(quee="parcels")  # type: ignore[call-overload]  # must not pass
class Misspelt(Entity):
    rules = Rules({})
