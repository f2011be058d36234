"""`simulate`: time, messages, points, and an engine that is afterwards as it was."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import celery._state
import pytest
import time_machine
from celery import Celery

from celery_goalstate import Engine, Entity, Requeue
from celery_goalstate.exceptions import EntityGone, IndexUnavailable, PermanentError, RetryAfter
from celery_goalstate.testing import NotIdle, Simulation, fail, kill, lose_lease, simulate
from celery_goalstate.worker import shutdown
from tests.testkit.shop import Shop


@pytest.fixture
def simulation(shop: Shop) -> Iterator[Simulation]:
    with simulate(shop.engine) as simulation:
        yield simulation


@pytest.fixture
def order(shop: Shop) -> Entity:
    return shop.world(shop.order(pack=lambda ctx, order: None, ship=shop.ship))()


def test_an_order_is_shipped(shop: Shop, simulation: Simulation, order: Entity) -> None:
    shop.engine.enqueue(order)
    assert shop.state["42"] == "placed"
    simulation.run_until_idle()
    assert shop.state["42"] == "shipped"
    assert simulation.actions(order) == simulation.actions() == ["pack", "ship"]
    [look] = simulation.looks
    assert (look.entity, look.state, look.goal_state, look.outcome) == (
        *("order/42", "placed", "shipped"),
        "converged",
    )


def test_a_failure_backs_off_in_full(shop: Shop, simulation: Simulation, order: Entity) -> None:
    simulation.at("before ship", fail(OSError("no truck")), times=3)
    shop.engine.enqueue(order)
    simulation.run_until_idle()
    assert simulation.actions(order) == ["pack", "ship"] * 4
    assert [look.at for look in simulation.looks] == [0, 10, 30, 70]
    assert simulation.story() == STORY


STORY = """\
      0.0 s  order/42: placed, goal shipped
                 pack
                 ship
                 ✗ before ship it raises OSError('no truck')
               failed (OSError: no truck); failure 1; again in 10 s
     10.0 s  order/42: placed, goal shipped
                 pack
                 ship
                 ✗ before ship it raises OSError('no truck')
               failed (OSError: no truck); failure 2; again in 20 s
     30.0 s  order/42: placed, goal shipped
                 pack
                 ship
                 ✗ before ship it raises OSError('no truck')
               failed (OSError: no truck); failure 3; again in 40 s
     70.0 s  order/42: placed, goal shipped
                 pack
                 ship
               converged"""


def test_time_passes_only_when_it_is_told_to(shop: Shop, simulation: Simulation, order: Entity) -> None:
    began = simulation.now
    shop.engine.enqueue(order, timedelta(days=300))
    simulation.assert_scheduled(order, in_=timedelta(days=300))
    simulation.advance(days=299)
    assert not simulation.looks
    simulation.assert_scheduled(order, in_=86_400)
    simulation.advance(days=1)
    simulation.assert_not_scheduled(order)
    assert simulation.looks[0].at == 300 * 86_400
    assert simulation.now == began + timedelta(days=300)


def test_time_begins_now(simulation: Simulation) -> None:
    assert timedelta() <= datetime.now(UTC) - simulation.now < timedelta(hours=1)


def test_time_begins_when_it_is_told_to(shop: Shop, order: Entity) -> None:
    start = datetime(2030, 1, 1, tzinfo=UTC)
    with simulate(shop.engine, start=start) as simulation:
        assert simulation.now == start
        shop.engine.enqueue(order, start + timedelta(hours=1))
        simulation.assert_scheduled(order, in_=3600)
    with pytest.raises(ValueError, match="which has no time zone"):
        simulate(shop.engine, start=datetime(2030, 1, 1))  # noqa: DTZ001


def test_time_machine_goes_along(shop: Shop) -> None:
    seen = []

    def look(ctx: Any, order: Entity) -> Requeue:
        seen.append((datetime.now(UTC), ctx.deadline))
        return Requeue(timedelta(days=1))

    start = datetime(2030, 1, 1, tzinfo=UTC)
    with time_machine.travel(start, tick=False), simulate(shop.engine) as simulation:
        assert simulation.now == start
        shop.engine.enqueue(shop.world(shop.order(look=look))())
        simulation.advance(days=2)
        assert datetime.now(UTC) == simulation.now == start + timedelta(days=2)
    assert seen == [(start + timedelta(days=n), start + timedelta(days=n)) for n in range(3)]


def test_a_failed_assertion_names_what_is_there(shop: Shop, simulation: Simulation, order: Entity) -> None:
    with pytest.raises(AssertionError, match=r"order/42 is not scheduled \(the index does not know it\)"):
        simulation.assert_scheduled(order)
    shop.engine.enqueue(order, 60)
    with pytest.raises(AssertionError, match="order/42 is scheduled in 60 s, not in 30 s"):
        simulation.assert_scheduled(order, in_=30)
    with pytest.raises(AssertionError, match="order/42 is scheduled, in 60 s"):
        simulation.assert_not_scheduled(order)


def test_it_converges(shop: Shop, simulation: Simulation, order: Entity) -> None:
    simulation.assert_converges(order)
    assert shop.state["42"] == "shipped"


def test_it_does_not_converge(shop: Shop, simulation: Simulation, order: Entity) -> None:
    simulation.at("before ship", fail(PermanentError("no such street")))
    with pytest.raises(AssertionError) as raised:
        simulation.assert_converges(order)
    assert str(raised.value).startswith(
        "order/42 does not converge: it rests at placed, goal shipped (quarantined, PermanentError: no such"
        " street)\n\n      0.0 s  order/42: placed"
    )


def test_what_never_ends_is_ended(shop: Shop, simulation: Simulation) -> None:
    order = shop.world(shop.order(poll=shop.poll))()
    shop.engine.enqueue(order)
    with pytest.raises(NotIdle, match="it is not at rest after 5 evaluations; it goes round and round"):
        simulation.run_until_idle(looks=5)
    with pytest.raises(NotIdle, match="it is not at rest after 0:00:10"):
        simulation.run_until_idle(within=timedelta(seconds=10))
    with pytest.raises(NotIdle, match="after 7 evaluations"):
        simulation.advance(minutes=1, looks=7)


def test_a_round_that_takes_no_time_is_ended(shop: Shop, simulation: Simulation) -> None:
    order = shop.world(shop.order(again=lambda ctx, order: Requeue(0)))()
    shop.engine.enqueue(order)
    with pytest.raises(NotIdle, match="after 1000 evaluations"):
        simulation.advance(seconds=1)


# Messages and the index ----------------------------------------------------------------------------


def test_a_lost_message_is_sent_again(shop: Shop, simulation: Simulation, order: Entity) -> None:
    simulation.lose_messages(1)
    shop.engine.enqueue(order)
    simulation.run_until_idle()
    assert simulation.looks[0].at >= 60
    assert "✉ a message of order/42 is lost" in simulation.story()


def test_messages_under_way_are_lost(shop: Shop, simulation: Simulation, order: Entity) -> None:
    shop.engine.enqueue(order)
    simulation.lose_messages()
    simulation.advance(seconds=30)
    assert not simulation.looks
    simulation.run_until_idle()
    assert simulation.actions() == ["pack", "ship"]


@pytest.mark.parametrize("before", [True, False])
def test_a_doubled_message_changes_nothing(
    shop: Shop, simulation: Simulation, order: Entity, before: bool
) -> None:
    if before:
        simulation.duplicate_messages(1)
    shop.engine.enqueue(order)
    if not before:
        simulation.duplicate_messages()
    simulation.run_until_idle()
    assert simulation.actions() == ["pack", "ship"]


def test_an_index_that_is_away_is_told_to_whoever_enqueues(
    shop: Shop, simulation: Simulation, order: Entity
) -> None:
    simulation.index_away = True
    with pytest.raises(IndexUnavailable):
        shop.engine.enqueue(order)
    simulation.advance(minutes=5)
    simulation.index_away = False
    shop.engine.enqueue(order)
    simulation.run_until_idle()
    assert simulation.actions() == ["pack", "ship"]


def test_an_index_that_goes_away_meanwhile(shop: Shop, simulation: Simulation, order: Entity) -> None:
    """The outcome is lost, so the evaluation counts as that of a lost worker."""

    def cut() -> None:
        simulation.index_away = True

    simulation.at("after ship", cut)
    shop.engine.enqueue(order)
    with pytest.raises(NotIdle, match="while the index is away"):
        simulation.run_until_idle()
    assert "the outcome could not be reported" in simulation.story()
    simulation.index_away = False
    simulation.run_until_idle()
    assert [look.outcome for look in simulation.looks] == ["", "converged"]


def test_a_paused_kind_waits(shop: Shop, simulation: Simulation, order: Entity) -> None:
    shop.engine.pause("order")
    shop.engine.enqueue(order)
    simulation.run_until_idle()
    assert not simulation.looks
    shop.engine.resume("order")
    simulation.run_until_idle()
    assert simulation.actions() == ["pack", "ship"]


def test_what_is_only_declared_cannot_be_evaluated(shop: Shop, simulation: Simulation) -> None:
    shop.engine.declare("invoice", queue="billing")
    shop.engine.enqueue(shop.engine.ref("invoice", 1))
    simulation.assert_scheduled(shop.engine.ref("invoice", 1))
    with pytest.raises(LookupError, match="invoice/1 is enqueued, and kind 'invoice' is only declared"):
        simulation.run_until_idle()


# Points ------------------------------------------------------------------------------------------


def test_a_killed_worker_is_made_up_for(shop: Shop, simulation: Simulation, order: Entity) -> None:
    simulation.at("after pack", kill)
    shop.engine.enqueue(order)
    simulation.run_until_idle()
    assert simulation.actions() == ["pack", "pack", "ship"]
    assert [look.outcome for look in simulation.looks] == ["", "converged"]
    assert shop.engine.describe(order).failures == 0  # type: ignore[union-attr]


def test_a_dead_worker_holds_nothing(shop: Shop, simulation: Simulation, order: Entity) -> None:
    stack: Any = celery._state._task_stack  # type: ignore[attr-defined]
    task = shop.app.tasks["goalstate.order"]
    before = len(stack), len(task.request_stack), set(shutdown.under_way)
    simulation.at("after pack", kill, times=3)
    shop.engine.enqueue(order)
    simulation.run_until_idle()
    assert (len(stack), len(task.request_stack), shutdown.under_way) == before


def test_a_worker_is_killed_while_another_stalls(shop: Shop, simulation: Simulation, order: Entity) -> None:
    simulation.at("before pack", lose_lease)
    simulation.at("before ship", kill)
    shop.engine.enqueue(order)
    simulation.run_until_idle()
    assert shop.state["42"] == "shipped"
    assert [look.outcome for look in simulation.looks][:3] == [
        *("its lease was lost: the outcome is dropped", ""),
        "converged",
    ]


def test_a_stalled_worker_writes_late_and_is_looked_after(
    shop: Shop, simulation: Simulation, order: Entity
) -> None:
    simulation.at("before pack", lose_lease)
    shop.engine.enqueue(order)
    simulation.run_until_idle()
    # The stalled one goes on with the action that it is in, and begins no other.
    assert [look.actions for look in simulation.looks] == [["pack"], ["pack", "ship"], []]
    assert simulation.looks[0].outcome == "its lease was lost: the outcome is dropped"


def test_somebody_else_acts_meanwhile(shop: Shop, simulation: Simulation, order: Entity) -> None:
    """As somebody from outside: a failure of the evaluation does not discard what they enqueue."""

    def hurry() -> None:
        shop.engine.enqueue(order)

    simulation.at("after pack", hurry)
    simulation.at("before ship", fail(OSError("no truck")))
    shop.engine.enqueue(order)
    simulation.run_until_idle()
    assert [look.at for look in simulation.looks] == [0, 0]
    assert "⚡ meanwhile, after pack: hurry" in simulation.story()


def test_between_looks(shop: Shop, simulation: Simulation, order: Entity) -> None:
    def cancel() -> None:
        shop.state["42"] = shop.goal["42"] = "cancelled"

    simulation.at("between looks", cancel)
    simulation.assert_converges(order)
    assert simulation.actions() == []


def test_the_nth_time(shop: Shop, simulation: Simulation, order: Entity) -> None:
    simulation.at("after pack", kill, nth=2)
    simulation.at("after pack", fail(OSError()), nth=1)
    simulation.assert_converges(order)
    assert simulation.actions() == ["pack", "pack", "pack", "ship"]


def test_a_point_that_is_never_passed_is_an_error(shop: Shop, order: Entity) -> None:
    simulation = simulate(shop.engine)
    with simulation:
        simulation.assert_converges(order)
    simulation.at("before shipp", kill)
    with pytest.raises(AssertionError, match=r'nothing was ever at the point "before shipp".*"before ship"'):
        simulation.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("point", "fault", "options", "error", "message"),
    [
        ("ship", kill, {}, ValueError, "point is 'ship'; give"),
        ("before ship", "kill", {}, TypeError, "fault is 'kill'; give kill"),
        ("between looks", kill, {}, ValueError, "nobody works"),
        ("before ship", kill, {"times": 0}, ValueError, "times is 0"),
        ("before ship", kill, {"nth": 0}, ValueError, "nth is 0"),
    ],
)
def test_bad_plans_are_refused(
    simulation: Simulation, point: str, fault: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        simulation.at(point, fault, **options)


class Client:
    def send(self, *args: object, **kwargs: object) -> str:
        return "sent"

    @staticmethod
    def post(what: str) -> str:
        return f"posted {what}"

    @classmethod
    def fetch(cls, what: str) -> str:
        return f"{cls.__name__} fetched {what}"


client = Client()


def test_watched_calls_are_points_and_lines(shop: Shop) -> None:
    said = []

    def pack(ctx: Any, order: Entity) -> None:
        said.extend([client.send(1, to="42"), client.post("it"), client.fetch("it"), Client.post("it")])

    order = shop.world(shop.order(pack=pack, ship=shop.ship))()
    with simulate(shop.engine) as simulation:
        simulation.watch(f"{__name__}.Client.post", (client, "send"), (Client, "fetch"))
        assert client.post("by the test") == "posted by the test"  # no point: no worker does it
        simulation.at("after Client.fetch", fail(OSError("broken pipe")))
        simulation.assert_converges(order)
        story = simulation.story()
    assert said == ["sent", "posted it", "Client fetched it", "posted it"]
    assert "Client.send(1, to='42')" in story
    assert f"{__name__}.Client.post('it')" in story
    assert client.post("it") == "posted it"
    assert isinstance(Client.__dict__["post"], staticmethod)


def test_what_is_no_function_is_not_watched(simulation: Simulation) -> None:
    with pytest.raises(TypeError, match="there is no such function"):
        simulation.watch((client, "sned"))


def test_outcomes_are_told(shop: Shop, simulation: Simulation, order: Entity) -> None:
    simulation.at("before pack", fail(RetryAfter(7)), nth=1)
    simulation.at("before pack", fail(EntityGone()), nth=2)
    shop.engine.enqueue(order)
    simulation.run_until_idle()
    assert [look.outcome for look in simulation.looks] == [
        "failed (RetryAfter: again in 7 s); again in 7 s",
        "gone: it is forgotten",
    ]


# Before and after --------------------------------------------------------------------------------


def test_the_engine_is_as_it_was(shop: Shop, order: Entity) -> None:
    shop.app.conf.goalstate_index_url = "memory://"
    shop.engine.enqueue(order, 60)
    before = shop.engine.parts, shop.engine.settings
    hooks = [list(each) for each in _hooks(shop.engine)]
    shop.app.conf.goalstate_lease = 99
    with suppress(ZeroDivisionError), simulate(shop.engine) as simulation:
        simulation.assert_not_scheduled(order)
        assert shop.engine.settings.lease == 99
        shop.engine.enqueue(order)
        simulation.at("before shipp", kill)
        simulation.run_until_idle()
        raise ZeroDivisionError
    assert (shop.engine.parts, shop.engine.settings) == before
    assert [list(each) for each in _hooks(shop.engine)] == hooks
    assert shop.engine.is_scheduled(order)


def _hooks(engine: Engine) -> list[Any]:
    return [engine.hooks.around_evaluation, engine.hooks.around_action, engine.hooks.states_read]


def test_an_engine_that_has_no_index_at_all_can_be_simulated(shop: Shop, order: Entity) -> None:
    with simulate(shop.engine) as simulation:
        simulation.assert_converges(order)
    assert shop.engine._opened is None
    assert shop.engine._settings is None


def test_two_simulations_see_nothing_of_each_other(shop: Shop, order: Entity) -> None:
    with simulate(shop.engine) as outer:
        shop.engine.enqueue(order, 60)
        with simulate(shop.engine) as inner:
            inner.assert_not_scheduled(order)
            inner.assert_converges(order)
        assert not outer.looks
        outer.assert_scheduled(order, in_=60)


def test_several_engines(shop: Shop, order: Entity) -> None:
    other = Engine(Celery("billing", broker="amqp://nowhere", set_as_current=False))

    @other.register
    class Invoice(Entity):
        def get_state(self) -> str:
            return shop.state["42"]

        def get_goal_state(self) -> str:
            return "shipped"

        def get_action_list(self, state: str, goal_state: str) -> Any:
            return ["send"] if state == goal_state else []

        def send(self, ctx: Any) -> None:
            shop.engine.enqueue(order)

    with simulate(shop.engine) as orders, simulate(other) as invoices:
        orders.assert_converges(order)
        invoices.assert_converges(Invoice(1))
        orders.run_until_idle()
    assert (len(orders.looks), len(invoices.looks)) == (2, 1)


def test_hooks_of_the_app_see_what_they_always_see(shop: Shop, order: Entity) -> None:
    seen = []

    @shop.engine.around_action
    @contextmanager
    def around(ctx: Any, action: Any) -> Iterator[None]:
        seen.append(action.name)
        yield

    with simulate(shop.engine) as simulation:
        simulation.assert_converges(order)
    assert seen == ["pack", "ship"]


def test_a_resync_is_made_by_the_test(shop: Shop) -> None:
    cls = shop.order(ship=shop.ship)
    cls.iter_unconverged = classmethod(lambda cls: iter(["42"]))  # type: ignore[assignment]
    shop.world(cls)()
    with simulate(shop.engine) as simulation:
        simulation.advance(days=1)
        assert not simulation.looks
        assert shop.engine.resync("order") == 1
        simulation.run_until_idle()
        assert simulation.actions() == ["ship"]


def test_a_long_action_keeps_its_lease(shop: Shop) -> None:
    held = []

    def pack(ctx: Any, order: Entity) -> None:
        simulation.advance(minutes=10)
        ctx.check()
        held.append(True)

    with simulate(shop.engine) as simulation:
        simulation.assert_converges(shop.world(shop.order(pack=pack, ship=shop.ship))())
    assert held == [True]
    assert len(simulation.looks) == 1


def test_without_greenlet_only_kills_are_missing(
    shop: Shop, order: Entity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "greenlet", None)
    with simulate(shop.engine) as simulation:
        simulation.assert_converges(order)
        with pytest.raises(ImportError, match=r"pip install \"celery-goalstate\[testing\]\""):
            simulation.at("after pack", kill)


def test_logs_go_on(
    shop: Shop, simulation: Simulation, order: Entity, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        simulation.at("after pack", kill)
        simulation.assert_converges(order)
    assert "order/42 was being evaluated by a worker that fell silent" in caplog.messages
