"""`task_always_eager`: what is due is evaluated inside `enqueue`, and nothing goes on for ever."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from celery_goalstate import Engine, Requeue, Stop
from celery_goalstate.exceptions import IndexUnavailable, PermanentError
from celery_goalstate.index.memory import MemoryIndex
from celery_goalstate.messages.eager import EAGER_EVALUATIONS
from celery_goalstate.worker.lease import THREAD_NAME
from tests.integration.conftest import MakeApp, Truth, World, worker_of
from tests.servers import poll


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world(task_always_eager=True)


def always_fails(ctx: Any, entity: Any) -> None:
    raise ConnectionError("no route to host")


def test_the_index_is_in_memory_by_default(make_app: MakeApp, truth: Truth) -> None:
    engine = Engine(make_app(broker="amqp://nowhere//", task_always_eager=True))
    entity = engine.register(truth.entity())
    assert engine.settings.index_url == "memory://"
    assert engine.enqueue(entity("1")).changed
    assert isinstance(engine.parts.index, MemoryIndex)
    assert truth.looks("1") == 1


def test_what_is_due_is_evaluated_before_enqueue_returns(world: World, truth: Truth) -> None:
    truth.set("1", truth.reach)
    enqueued = world.engine.enqueue(world.entity("1"))
    assert enqueued.changed
    assert enqueued.sent
    described = world.engine.describe(world.entity("1"))
    assert described is not None
    assert (described.status, described.converged, described.failures) == ("idle", True, 0)
    assert world.messages() == []


def test_many_are_evaluated_too(world: World, truth: Truth) -> None:
    assert world.engine.enqueue_many(world.entity(id) for id in range(30)) == 30
    assert sorted(id for _, id in truth.log) == sorted(map(str, range(30)))


@pytest.mark.parametrize("deadline", [0.05, 20, timedelta(days=3)], ids=str)
def test_a_future_deadline_stays_in_the_index(world: World, truth: Truth, deadline: Any) -> None:
    assert world.engine.enqueue(world.entity("1"), deadline).changed
    assert world.engine.is_scheduled(world.entity("1"))
    assert not truth.log
    world.engine.enqueue(world.entity("1"))
    assert truth.looks("1") == 1
    assert not world.engine.is_scheduled(world.entity("1"))


def test_a_goal_that_takes_several_looks_is_reached(world: World, truth: Truth) -> None:
    def step(ctx: Any, entity: Any) -> None:
        truth.states["1"] += 1

    truth.set("1", step, state=0, goal=4)
    world.engine.enqueue(world.entity("1"))
    assert truth.states["1"] == 4
    assert truth.looks("1") == 4


def test_one_that_always_fails_waits_for_its_back_off(world: World, truth: Truth) -> None:
    truth.set("1", always_fails)
    world.engine.enqueue(world.entity("1"))
    assert truth.looks("1") == 1
    described = world.engine.describe(world.entity("1"))
    assert described is not None
    assert (described.status, described.failures) == ("scheduled", 1)
    assert described.error == "ConnectionError: no route to host"
    assert described.deadline
    assert 5 <= described.deadline.timestamp() - world.clock() <= 10


def test_one_that_asks_for_another_look_at_once_for_ever(
    world: World, truth: Truth, caplog: pytest.LogCaptureFixture
) -> None:
    truth.set("1", lambda ctx, entity: Requeue(0))
    truth.actions["1"] = (_named("again", lambda ctx, entity: Requeue(0)),)
    with caplog.at_level(logging.WARNING, "celery_goalstate"):
        world.engine.enqueue(world.entity("1"))
    assert truth.looks("1") == EAGER_EVALUATIONS
    assert world.engine.is_scheduled(world.entity("1"))
    assert f"after {EAGER_EVALUATIONS} in a row it waits for the next enqueue" in caplog.text


def test_no_thread_is_started(make_app: MakeApp, truth: Truth) -> None:
    engine = Engine(make_app(task_always_eager=True, goalstate_lease=1))
    entity = engine.register(batch_size=8)(truth.entity())
    before = set(threading.enumerate())
    seen: list[threading.Thread] = []

    def note(ctx: Any, entity: Any) -> None:
        seen.extend(set(threading.enumerate()) - before)
        truth.reach(ctx, entity)

    truth.set("1", note)
    engine.enqueue_many([entity("1"), entity("2")])
    assert truth.states["1"] == "new"
    assert seen == []


def slow(world: World, seconds: float) -> Callable[..., None]:
    """An action that takes longer than a lease, as in a debugger."""

    def stand_still(ctx: Any, entity: Any) -> None:
        world.clock.advance(seconds)

    return stand_still


def test_an_evaluation_that_outlasts_its_lease_goes_on(world: World, truth: Truth) -> None:
    truth.set("1", slow(world, 1000), _named("check", lambda ctx, entity: ctx.check()), truth.reach)
    world.engine.enqueue(world.entity("1"))
    described = world.engine.describe(world.entity("1"))
    assert described is not None
    assert (described.converged, described.failures) == (True, 0)


def test_but_not_beyond_its_max_run_nor_beside_another_one(
    make_world: Callable[..., World], truth: Truth, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world(task_always_eager=True, goalstate_max_run=100)

    def taken_over(ctx: Any, entity: Any) -> None:
        world.lose_workers()  # another process takes this one for dead

    for id, stall in [("1", slow(world, 101)), ("2", taken_over)]:
        truth.set(id, stall, truth.reach)
        world.engine.enqueue(world.entity(id))
        assert truth.states[id] == "old", "no action begins without the lease"
    assert "order/1 runs for longer than its max_run" in caplog.text


def test_an_index_that_does_not_answer_for_a_moment(world: World, truth: Truth) -> None:
    renew, asked = world.index.renew, []

    def answers_at_last(*args: Any, **where: Any) -> Any:
        asked.append(args)
        if len(asked) == 1:
            raise IndexUnavailable
        return renew(*args, **where)

    world.index.renew = answers_at_last
    truth.set("1", slow(world, 12), slow(world, 12), truth.reach)
    world.engine.enqueue(world.entity("1"))
    assert truth.states["1"] == "new"
    assert len(asked) == 2, "not more often than the lease needs it"


def _named(name: str, execute: Callable[..., Any]) -> Callable[..., Any]:
    execute.__name__ = name
    return execute


def test_one_that_enqueues_itself(world: World, truth: Truth) -> None:
    def again(ctx: Any, entity: Any) -> None:
        ctx.enqueue(entity)
        ctx.engine.enqueue(world.entity("1"))

    truth.set("1", again)
    world.engine.enqueue(world.entity("1"))
    assert truth.looks("1") == EAGER_EVALUATIONS
    assert world.engine.is_scheduled(world.entity("1"))


def test_two_that_enqueue_each_other(world: World, truth: Truth) -> None:
    def poke(ctx: Any, entity: Any) -> None:
        began = len(truth.log)
        ctx.enqueue(world.entity("B" if entity.id == "A" else "A"))
        assert len(truth.log) == began, "an evaluation inside another one"

    truth.set("A", poke)
    truth.set("B", poke)
    world.engine.enqueue(world.entity("A"))
    assert truth.looks("A") == truth.looks("B") == EAGER_EVALUATIONS
    assert truth.log[:4] == [("order", "A"), ("order", "B")] * 2


def test_a_loop_that_was_cut_goes_on_with_the_next_enqueue(world: World, truth: Truth) -> None:
    truth.set("1", _named("again", lambda ctx, entity: Requeue(0)))
    world.engine.enqueue(world.entity("1"))
    truth.set("1", truth.reach)
    world.engine.enqueue(world.entity("1"), replace=True)
    assert truth.looks("1") == EAGER_EVALUATIONS, "overdue: nothing is moved, as in any mode"
    assert world.sweeper().sweep() is False
    assert truth.states["1"] == "new"


def test_propagation_raises_the_error_of_the_action(make_world: Callable[..., World], truth: Truth) -> None:
    world = make_world(task_always_eager=True, task_eager_propagates=True)
    truth.set("1", always_fails)
    truth.set("2", _named("give_up", _raise(PermanentError("no such host"))))
    with pytest.raises(ConnectionError, match=r"no route to host") as caught:
        world.engine.enqueue(world.entity("1"))
    assert caught.traceback[-1].name == "always_fails"
    with pytest.raises(PermanentError, match=r"no such host"):
        world.engine.enqueue(world.entity("2"))
    [one, two] = world.engine.describe_many([world.entity("1"), world.entity("2")])
    assert one is not None
    assert two is not None
    assert (one.status, one.failures) == ("scheduled", 1)
    assert two.status == "failed"


def _raise(error: BaseException) -> Callable[..., Any]:
    def execute(ctx: Any, entity: Any) -> None:
        raise error

    return execute


def test_propagation_leaves_what_still_waits_in_the_index(
    make_world: Callable[..., World], truth: Truth
) -> None:
    world = make_world(task_always_eager=True, task_eager_propagates=True)
    truth.set("1", always_fails)
    with pytest.raises(ConnectionError):
        world.engine.enqueue_many([world.entity("1"), world.entity("2")])
    assert world.engine.is_scheduled(world.entity("2"))
    assert not truth.looks("2")
    world.engine.enqueue(world.entity("3"))
    assert truth.looks("3") == 1, "the next enqueue works as if nothing had happened"


def test_a_kind_without_a_class_waits(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.engine.declare("shipment")
    world.engine.enqueue(world.engine.ref("shipment", "1"))
    assert world.engine.is_scheduled(world.engine.ref("shipment", "1"))
    assert "no entity class of kind shipment is registered in this process: 1 waits" in caplog.text


def test_a_paused_kind_waits(world: World, truth: Truth) -> None:
    world.engine.pause()
    world.engine.enqueue(world.entity("1"))
    assert not truth.log
    world.engine.resume()
    assert world.engine.is_scheduled(world.entity("1"))


def test_threads_do_not_evaluate_for_each_other(world: World, truth: Truth) -> None:
    """An `enqueue` returns when its own entity has been evaluated, whatever another thread is busy with."""
    seen = []

    def enqueue_elsewhere(ctx: Any, entity: Any) -> Stop:
        def enqueue() -> None:
            world.engine.enqueue(world.entity("2"))
            seen.append(truth.looks("2"))

        thread = threading.Thread(target=enqueue)
        thread.start()
        thread.join()
        return Stop()

    truth.set("1", enqueue_elsewhere)
    world.engine.enqueue(world.entity("1"))
    assert seen == [1]


def test_system_exit_is_not_swallowed(world: World, truth: Truth) -> None:
    truth.set("1", _named("leave", _raise(SystemExit(3))))
    with pytest.raises(SystemExit):
        world.engine.enqueue(world.entity("1"))
    truth.actions["2"] = ()
    world.engine.enqueue(world.entity("2"))
    assert truth.looks("2") == 1


def test_a_lease_is_kept_as_the_app_is_configured_at_that_time(make_app: MakeApp, truth: Truth) -> None:
    app = make_app(task_always_eager=True)
    engine = Engine(app)
    entity = engine.register(truth.entity())
    renewers: list[int] = []

    def count(ctx: Any, entity: Any) -> Stop:
        renewers.append(sum(thread.name == THREAD_NAME for thread in threading.enumerate()) - before)
        return Stop()

    before = sum(thread.name == THREAD_NAME for thread in threading.enumerate())
    truth.set("1", count)
    engine.enqueue(entity("1"))
    app.conf.task_always_eager = False
    engine.enqueue(entity("1"))
    with worker_of(app):
        poll("a worker has evaluated it", lambda: len(renewers) == 2)
    assert renewers == [0, 1]
