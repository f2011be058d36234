"""What becomes of an evaluation: in the index, in the queue, and in what Celery is told."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import signals, states
from celery.app.task import Context as TaskRequest
from celery.exceptions import Ignore, Reject, Retry

from celery_goalstate import ANY, ActionList, Engine, Entity, Requeue, Rules, Stop
from celery_goalstate.exceptions import EntityGone, GoalStateError, PermanentError, RetryAfter
from tests.integration.conftest import NOW, MakeApp, Truth, World, untimed, worker_of
from tests.servers import Valkey, poll


def says(name: str, said: Any) -> Callable[..., Any]:
    """An action that returns this, or raises it."""

    def execute(ctx: Any, entity: Any) -> Any:
        if isinstance(said, BaseException):
            raise said
        return said

    execute.__name__ = name
    return execute


def evaluate(world: World, id: str = "1", **enqueue: Any) -> Any:
    """Enqueue the entity and evaluate its one message."""
    world.engine.enqueue(world.entity(id), **enqueue)
    [result] = world.run()
    return result


def look(world: World, id: str = "1") -> Any:
    described = world.engine.describe(world.entity(id))
    assert described is not None
    return described


# Messages ----------------------------------------------------------------------------------------


def test_a_message_says_which_entity_and_no_more(world: World) -> None:
    world.engine.enqueue(world.entity("42"))
    [message] = world.messages()
    assert message.task == "goalstate.order"
    [[id, token]] = message.args[0]
    assert (id, len(message.args), message.kwargs) == ("42", 1, {})
    assert token.isdecimal()
    assert message.headers["kwargsrepr"] == "{'entity': 'order/42'}"
    assert message.headers["argsrepr"] == f"([['42', '{token}']],)"
    assert message.headers["ignore_result"] is True


def test_a_router_of_the_project_is_told_what_the_message_says(make_world: Callable[..., World]) -> None:
    told = []
    world = make_world(task_routes=[lambda name, args, kwargs, options, task=None: told.append((name, args))])
    assert world.engine.enqueue(world.entity("3")).sent
    [message] = world.messages()
    assert told == [("goalstate.order", tuple(message.args))]


def test_a_near_deadline_is_an_eta_and_a_far_one_no_message(world: World) -> None:
    assert world.engine.enqueue(world.entity("1"), 20).sent
    assert not world.engine.enqueue(world.entity("2"), 31).sent
    assert world.engine.enqueue(world.entity("3"), datetime.fromtimestamp(NOW + 5, UTC)).sent
    assert world.engine.enqueue(world.entity("4"), eta=datetime.fromtimestamp(NOW - 5, UTC)).sent
    assert {message.id for message in world.messages()}
    assert look(world, "4").deadline == datetime.fromtimestamp(NOW, UTC), "the past is now"
    assert look(world, "2").deadline == datetime.fromtimestamp(NOW + 31, UTC)
    assert not look(world, "2").sent


def test_one_schedule_per_entity_and_the_earliest_deadline_wins(world: World, truth: Truth) -> None:
    enqueue, entity = world.engine.enqueue, world.entity("1")
    assert enqueue(entity, 20).changed
    assert not enqueue(entity, 25).changed
    assert enqueue(entity, timedelta(seconds=10)).changed
    assert enqueue(entity).changed
    assert not enqueue(entity).changed
    messages = world.messages()
    assert len(messages) == 3
    results = world.run(*messages)
    assert truth.looks("1") == 1
    assert [result.result for result in results].count(
        "order/1: nothing to do: superseded by another wake-up"
    ) == 2


def test_replace_debounces_up_to_max_wait(world: World) -> None:
    entity, options = world.entity("1"), {"replace": True, "max_wait": timedelta(seconds=60)}
    for waited, deadline in [(0, 40), (30, 60), (10, 60), (10, 60)]:
        world.clock.advance(waited)
        enqueued = world.engine.enqueue(entity, 40, **options)
        assert enqueued.deadline == datetime.fromtimestamp(NOW + deadline, UTC)


# What actions say --------------------------------------------------------------------------------


def test_success_is_one_readable_line(world: World, truth: Truth) -> None:
    truth.set("1", says("drain", None), truth.reach)
    result = evaluate(world)
    assert result.state == states.SUCCESS
    assert untimed(result.result) == "order/1: old → new: drain 0 ms, reach 0 ms; converged"
    assert look(world).converged is True


def test_a_failure_backs_off_as_one_chain_of_retries(world: World, truth: Truth) -> None:
    truth.set("1", says("drain", None), says("power_off", ConnectionError("no route to host")))
    world.engine.enqueue(world.entity("1"))
    [message] = world.messages()
    task_id = message.id
    for failures, delay in enumerate([10, 20, 40, 80], start=1):
        assert (message.id, message.retries) == (task_id, failures - 1)
        [result] = world.run(message)
        assert result.state == states.RETRY
        assert isinstance(result.result, Retry)
        assert isinstance(result.result.exc, ConnectionError)
        assert "no route to host" in result.traceback
        assert (look(world).failures, look(world).error) == (failures, "ConnectionError: no route to host")
        assert look(world).deadline == datetime.fromtimestamp(world.clock() + delay, UTC)
        assert result.result.when == look(world).deadline
        world.clock.advance(delay)
        world.sweeper().sweep()
        [message] = world.messages()
    truth.set("1", truth.reach)
    [result] = world.run(message)
    assert result.state == states.SUCCESS
    assert (look(world).failures, look(world).error, look(world).status) == (0, None, "idle")


def test_a_failure_after_a_success_in_the_same_list_still_counts(world: World, truth: Truth) -> None:
    truth.set("1", says("ok", None), says("fail", ValueError()))
    evaluate(world)
    world.clock.advance(10)
    world.sweeper().sweep()
    world.run()
    assert look(world).failures == 2


@pytest.mark.parametrize("step", ["from_id", "get_state", "get_goal_state", "get_action_list"])
def test_an_error_before_the_first_action_is_a_failure_too(world: World, step: str) -> None:
    def fail(*args: Any) -> Any:
        raise LookupError("no such row")

    setattr(world.entity, step, classmethod(fail) if step == "from_id" else fail)
    world.engine.enqueue(world.engine.ref("order", "1"))
    [result] = world.run()
    assert result.state == states.RETRY
    assert f"{step} failed (LookupError: no such row)" in str(result.result)
    [described] = world.engine.list("order")
    assert (described.failures, described.error) == (1, "LookupError: no such row")


def test_quarantine_is_the_real_error(world: World, truth: Truth) -> None:
    truth.set("1", says("fail", PermanentError("no such host")))
    result = evaluate(world)
    assert result.state == states.FAILURE
    assert isinstance(result.result, PermanentError)
    assert (look(world).status, look(world).error) == ("failed", "PermanentError: no such host")
    assert look(world).quarantined == datetime.fromtimestamp(NOW, UTC)
    assert not world.engine.is_scheduled(world.entity("1"))
    truth.set("1", says("fail", ValueError("once more")))
    evaluate(world)
    assert look(world).failures == 1, "revived with a clean count"


def test_max_failures_is_quarantine_with_the_last_error(world: World, truth: Truth) -> None:
    entity = world.register("host", max_failures=2)
    truth.set("1", says("fail", ConnectionError("down")))
    world.engine.enqueue(entity("1"))
    assert world.run()[0].state == states.RETRY
    world.clock.advance(10)
    [result] = world.run(*_delivered(world))
    assert result.state == states.FAILURE
    assert isinstance(result.result, ConnectionError)
    assert world.engine.counts("host")["host"]["failed"] == 1


def _delivered(world: World) -> list[Any]:
    world.sweeper().sweep()
    return world.messages()


def test_retry_after_is_a_failure_that_does_not_count(world: World, truth: Truth) -> None:
    entity = world.register("host", max_failures=1)
    truth.set("1", says("fail", RetryAfter(7)))
    world.engine.enqueue(entity("1"))
    [result] = world.run()
    assert result.state == states.RETRY
    [described] = world.engine.list("host")
    assert (described.status, described.failures) == ("scheduled", 0)
    assert described.deadline == datetime.fromtimestamp(NOW + 7, UTC)


def test_requeue_goes_on_and_the_earliest_wins(world: World, truth: Truth) -> None:
    truth.set(
        "1", says("first", Requeue(8)), says("second", Requeue(timedelta(seconds=5))), says("third", None)
    )
    result = evaluate(world)
    assert untimed(result.result).startswith(
        "order/1: old: first 0 ms, second 0 ms, third 0 ms; again in 5 s"
    )
    assert look(world).deadline == datetime.fromtimestamp(NOW + 5, UTC)


def test_a_later_failure_discards_a_requeue(world: World, truth: Truth) -> None:
    truth.set("1", says("first", Requeue(1)), says("fail", ValueError()))
    assert evaluate(world).state == states.RETRY
    assert look(world).deadline == datetime.fromtimestamp(NOW + 10, UTC)


@pytest.mark.parametrize(("said", "pending"), [(Stop(), False), (Requeue(5, stop=True), True)], ids=repr)
def test_stop_skips_the_rest_without_a_failure(world: World, truth: Truth, said: Any, pending: bool) -> None:
    truth.set("1", says("first", said), says("never", AssertionError()))
    assert evaluate(world).state == states.SUCCESS
    assert look(world).failures == 0
    assert world.engine.is_scheduled(world.entity("1")) is pending


def test_a_time_budget_is_an_ordinary_failure(world: World, truth: Truth) -> None:
    def hang(ctx: Any, entity: Any) -> None:
        world.clock.advance(5)

    Timed = world.register("timed")  # noqa: N806 - a class
    Timed.get_action_list = lambda *args: ActionList([hang, says("never", None)], timeout=5)
    truth.set("1")
    world.engine.enqueue(Timed("1"))
    [result] = world.run()
    assert result.state == states.RETRY
    assert (
        world.engine.list("timed")[0].error == "ActionTimeout: the timeout of the action list (5 s) is over"
    )


@pytest.mark.parametrize(
    ("error", "delay"),
    [
        (Retry("later", when=4), 4),
        (Retry("later"), 10),
        (Reject("no", requeue=True), 10),
        (Reject("no", requeue=False), 10),
        (Ignore(), 10),
    ],
    ids=repr,
)
def test_celerys_own_exceptions_are_failures(
    world: World, truth: Truth, error: Exception, delay: float
) -> None:
    truth.set("1", says("control", error))
    result = evaluate(world)
    assert result.state == states.RETRY
    assert look(world).deadline == datetime.fromtimestamp(NOW + delay, UTC)
    assert (look(world).error or "").startswith(type(error).__name__)


@pytest.mark.parametrize(
    "error", [Reject("no", requeue=True), Ignore(), Retry("later"), MemoryError("1 TB")], ids=repr
)
def test_what_would_steer_celery_does_not_reach_it_from_quarantine(
    world: World, truth: Truth, error: Exception
) -> None:
    entity = world.register("host", max_failures=1)
    truth.set("1", says("control", error))
    world.engine.enqueue(entity("1"))
    [result] = world.run()
    assert result.state == states.FAILURE
    assert isinstance(result.result, GoalStateError)
    assert type(error).__name__ in str(result.result)


def test_a_cancelled_action_backs_off_at_once(world: World, truth: Truth) -> None:
    """Though it raises no Exception, nobody waits for the lease to run out."""
    truth.set("1", says("wait", asyncio.CancelledError("gone")))
    result = evaluate(world)
    assert result.state == states.RETRY
    assert look(world).deadline == datetime.fromtimestamp(NOW + 10, UTC)
    assert look(world).error == "Interrupted: CancelledError: gone"


def test_system_exit_leaves_the_lease_to_expire(world: World, truth: Truth) -> None:
    truth.set("1", says("leave", SystemExit(1)))
    world.engine.enqueue(world.entity("1"))
    with pytest.raises(SystemExit):
        world.run()
    assert look(world).status == "running"
    world.lose_workers()
    assert (look(world).status, look(world).failures) == ("scheduled", 1)
    assert (look(world).error or "").startswith("WorkerLost")


def test_a_long_error_is_cut(world: World, truth: Truth) -> None:
    truth.set("1", says("fail", ValueError("x\n\x00" * 100_000)))
    assert evaluate(world).state == states.RETRY
    assert len(look(world).error or "") == 500
    assert "\n" not in (look(world).error or "")


def test_ten_looks_at_once_then_the_back_off(world: World, truth: Truth) -> None:
    def step(ctx: Any, entity: Any) -> None:
        truth.states["1"] += 1

    truth.set("1", step, state=0, goal=-1)
    world.engine.enqueue(world.entity("1"))
    for _ in range(10):
        world.run()
    assert truth.looks("1") == 10
    assert look(world).deadline == datetime.fromtimestamp(NOW, UTC)
    world.run()
    assert look(world).deadline == datetime.fromtimestamp(NOW + 10, UTC)
    assert look(world).failures == 0


def test_unchanged_is_idle_and_not_converged(world: World, truth: Truth) -> None:
    truth.set("1", says("nothing", None))
    assert "goal new not reached" in evaluate(world).result
    assert (look(world).status, look(world).converged) == ("idle", False)


def test_without_converge_a_list_without_an_error_is_the_end(world: World, truth: Truth) -> None:
    entity = world.register("host", converge=False)
    truth.set("1", says("nothing", None))
    world.engine.enqueue(entity("1"))
    world.run()
    [described] = world.engine.list("host")
    assert (described.status, described.converged) == ("idle", None)


def test_what_the_context_tells(world: World, truth: Truth) -> None:
    seen: list[Any] = []
    truth.set("1", _named("see", lambda ctx, entity: seen.append((ctx, entity))))
    world.engine.enqueue(world.entity("1"), 3)
    world.clock.advance(5)
    [message] = world.messages()
    world.run(message)
    [(ctx, entity)] = seen
    assert ctx.engine is world.engine
    assert ctx.entity is entity
    assert (ctx.state, ctx.goal_state, ctx.failures, ctx.lateness) == ("old", "new", 0, 2.0)
    assert ctx.deadline == datetime.fromtimestamp(NOW + 3, UTC)
    assert ctx.task.id == message.id
    world.engine.enqueue(world.entity("1"))
    world.run()
    assert seen[1][0].fencing_token > ctx.fencing_token


def _named(name: str, execute: Callable[..., Any]) -> Callable[..., Any]:
    execute.__name__ = name
    return execute


# While it runs -----------------------------------------------------------------------------------


def test_an_enqueue_during_a_run_is_evaluated_after_it(world: World, truth: Truth) -> None:
    truth.set("1", _named("reach", lambda ctx, entity: world.outside(world.entity("1"))))
    evaluate(world)
    assert truth.looks("1") == 1
    truth.set("1", truth.reach)
    world.run()
    assert truth.looks("1") == 2
    assert look(world).converged is True


def test_deleted_during_a_run_nothing_follows(world: World, truth: Truth) -> None:
    for said in (None, Requeue(1), ValueError("x"), PermanentError("x")):
        truth.set("1", _named("delete", lambda ctx, entity: ctx.delete(entity) and None), says("rest", said))
        result = evaluate(world)
        assert result.state in {states.SUCCESS, states.FAILURE}, "no RETRY that never comes"
        assert world.engine.describe(world.entity("1")) is None
        assert world.messages() == []


def test_deleted_and_enqueued_during_a_run(world: World, truth: Truth) -> None:
    def again(ctx: Any, entity: Any) -> None:
        ctx.delete(entity)
        world.outside(world.entity("1"))
        raise ValueError("of the old life")

    truth.set("1", again)
    evaluate(world)
    described = look(world)
    assert (described.status, described.failures, described.error) == ("scheduled", 0, None)
    truth.set("1", truth.reach)
    [message] = world.messages()
    assert message.retries == 0
    world.run(message)
    assert look(world).converged is True


def test_a_message_of_a_deleted_entity_does_nothing(world: World, truth: Truth) -> None:
    world.engine.enqueue(world.entity("1"))
    assert world.engine.delete(world.entity("1"))
    assert not world.engine.delete(world.entity("1"))
    assert [result.result for result in world.run()] == [
        "order/1: nothing to do: the index does not know the entity (deleted?)"
    ]
    assert not truth.log


def test_a_message_that_comes_twice_is_evaluated_once(world: World, truth: Truth) -> None:
    world.engine.enqueue(world.entity("1"))
    [message] = world.messages()
    world.run(message, message)
    assert truth.looks("1") == 1


def test_a_message_before_its_deadline_is_sent_again(world: World, truth: Truth) -> None:
    world.engine.enqueue(world.entity("1"), 5)
    [result] = world.run()
    assert result.result == "order/1: nothing to do yet: sent again"
    assert not truth.log
    [message] = world.messages()
    assert 4 < message.delay <= 5
    world.clock.advance(5)
    world.run(message)
    assert truth.looks("1") == 1


def test_the_outcome_of_a_lost_lease_is_dropped(
    world: World, truth: Truth, caplog: pytest.LogCaptureFixture
) -> None:
    def stall(ctx: Any, entity: Any) -> None:
        world.keeper_sleeps()
        world.lose_workers()  # another worker takes the entity for lost ...
        world.clock.advance(10)
        truth.set("1", truth.reach)
        world.run(*_delivered(world))  # ... and evaluates it
        truth.log.append(("order", "overtaken"))

    truth.set("1", stall, says("never", AssertionError("an action after the lease was lost")))
    with caplog.at_level(logging.WARNING, "celery_goalstate"):
        result = evaluate(world)
    assert truth.log == [("order", "1"), ("order", "1"), ("order", "overtaken")]
    assert result.state == states.SUCCESS
    assert "dropped, since its lease was lost" in result.result
    texts = [
        record.getMessage() for record in caplog.records if record.name == "celery_goalstate.worker.task"
    ]
    assert any(text.startswith("order/1: old: stall") and "dropped" in text for text in texts)
    assert (look(world).status, look(world).converged) == ("scheduled", True), "the later evaluation's"
    world.run()
    assert truth.looks("1") == 3, "once more: what the first one wrote late may have undone it"
    assert (look(world).status, look(world).converged) == ("idle", True)
    assert world.messages() == []


# Enqueued from inside ----------------------------------------------------------------------------


def in_a_helper(world: World) -> None:
    def deeper() -> None:
        world.engine.enqueue(world.entity("1"))

    deeper()


def by_many(world: World) -> None:
    world.engine.enqueue_many([world.entity("1"), world.entity("2")])


def by_reference(world: World) -> None:
    world.engine.enqueue(world.engine.ref("order", "1"))


def by_a_signal_handler(world: World) -> None:
    handled = signals.Signal(name="saved", use_caching=False)
    handler = lambda **_: world.engine.enqueue(world.entity("1"))  # noqa: E731 - as handlers are
    handled.connect(handler, weak=False)
    handled.send(sender=None)


def by_replacing(world: World) -> None:
    world.engine.enqueue(world.entity("1"), replace=True)


INSIDE = [in_a_helper, by_many, by_reference, by_a_signal_handler, by_replacing]


@pytest.mark.parametrize("enqueue", INSIDE)
def test_from_inside_a_failing_evaluation_the_back_off_comes_first(
    world: World, truth: Truth, enqueue: Callable[[World], None]
) -> None:
    truth.set("1", _named("enqueue", lambda ctx, entity: enqueue(world)), says("fail", ValueError("no")))
    result = evaluate(world)
    assert result.state == states.RETRY
    assert look(world).deadline == datetime.fromtimestamp(NOW + 10, UTC)
    assert look(world).failures == 1


@pytest.mark.parametrize("enqueue", INSIDE)
def test_from_inside_a_failing_evaluation_quarantine_stays(
    world: World, truth: Truth, enqueue: Callable[[World], None]
) -> None:
    truth.set("1", _named("enqueue", lambda ctx, entity: enqueue(world)), says("fail", PermanentError("no")))
    assert evaluate(world).state == states.FAILURE
    assert look(world).status == "failed"


@pytest.mark.parametrize("enqueue", INSIDE)
def test_from_inside_a_successful_evaluation_it_counts(
    world: World, truth: Truth, enqueue: Callable[[World], None]
) -> None:
    truth.set("1", _named("enqueue", lambda ctx, entity: enqueue(world)), truth.reach)
    evaluate(world)
    assert look(world).deadline == datetime.fromtimestamp(NOW, UTC)
    assert look(world).failures == 0


def is_forgotten(world: World, id: str = "1") -> bool:
    return world.engine.describe(world.entity(id)) is None


# By its context, in whatever thread ---------------------------------------------------------------


def in_a_thread(call: Callable[[], Any]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_in_a_thread_of_its_own_the_back_off_comes_first(world: World, truth: Truth) -> None:
    def enqueue(ctx: Any, entity: Any) -> None:
        in_a_thread(lambda: ctx.enqueue(entity))

    truth.set("1", enqueue, says("fail", ValueError("no")))
    evaluate(world)
    assert look(world).deadline == datetime.fromtimestamp(NOW + 10, UTC)


def test_what_an_evaluation_enqueues_of_its_own_entity_never_outlives_a_delete(
    world: World, truth: Truth
) -> None:
    left: list[Any] = []

    def deleted_meanwhile(ctx: Any, entity: Any) -> None:
        left.append(ctx)
        in_a_thread(lambda: world.engine.delete(entity))
        ctx.enqueue(entity)
        in_a_thread(lambda: ctx.enqueue_many([entity]))
        world.engine.enqueue(entity)

    truth.set("1", deleted_meanwhile)
    evaluate(world)
    assert is_forgotten(world)
    left[0].enqueue(world.entity("1"))
    in_a_thread(lambda: left[0].enqueue(world.entity("1")))
    assert is_forgotten(world)
    assert world.messages() == []


def test_nor_a_delete_that_came_when_it_had_lost_its_lease(world: World, truth: Truth) -> None:
    def stalled(ctx: Any, entity: Any) -> None:
        world.keeper_sleeps()
        world.lose_workers()
        in_a_thread(lambda: world.engine.delete(entity))
        ctx.enqueue(entity)

    truth.set("1", stalled)
    evaluate(world)
    assert is_forgotten(world)
    assert [message for message in world.messages() if world.run(message)[0].state != states.SUCCESS] == []
    assert truth.looks("1") == 1


def test_an_evaluation_that_has_ended_still_speaks_by_its_context(world: World, truth: Truth) -> None:
    left: list[Any] = []
    keep = _named("keep", lambda ctx, entity: left.append(ctx))
    truth.set("1", keep, says("fail", PermanentError("no")))
    evaluate(world)
    left[0].enqueue(world.entity("1"))
    assert look(world).status == "failed", "it lifts no quarantine"
    world.engine.enqueue(world.entity("1"))
    assert look(world).status == "scheduled"


# Gone --------------------------------------------------------------------------------------------


def gone(*_: Any) -> Any:
    raise EntityGone("no such order")


@pytest.mark.parametrize("where", ["from_id", "get_state", "get_goal_state", "get_action_list", "action"])
def test_an_entity_that_is_gone_is_forgotten(
    world: World, truth: Truth, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    truth.set("1", _named("drop", gone))
    if where != "action":
        monkeypatch.setattr(world.entity, where, gone)
    result = evaluate(world)
    assert result.state == states.SUCCESS
    assert f"gone, as {'drop' if where == 'action' else where} said: forgotten" in result.result
    assert is_forgotten(world)
    assert world.messages() == []


def test_unless_somebody_enqueued_it_meanwhile(world: World, truth: Truth) -> None:
    def made_anew(ctx: Any, entity: Any) -> None:
        ctx.enqueue(entity)  # which does not count
        world.outside(entity, 5)
        truth.set("1", truth.reach)
        raise EntityGone

    truth.set("1", made_anew)
    evaluate(world)
    assert (look(world).status, look(world).failures) == ("scheduled", 0)
    assert look(world).deadline == datetime.fromtimestamp(NOW + 5, UTC)


@pytest.mark.parametrize(
    ("signal", "error", "status"),
    [
        (signals.task_retry, ValueError("no"), "scheduled"),
        (signals.task_failure, PermanentError("no"), "failed"),
    ],
    ids=["retry", "failure"],
)
def test_celerys_handlers_of_a_failure_still_call_for_it(
    world: World, truth: Truth, signal: Any, error: Exception, status: str
) -> None:
    """They run when the index has the outcome, and bring nothing forward; whoever comes later does."""
    truth.set("1", says("fail", error))
    called = []

    def handler(**_: Any) -> None:
        called.append(world.engine.enqueue(world.entity("1")))

    signal.connect(handler, weak=False)
    try:
        evaluate(world)
    finally:
        signal.disconnect(handler)
    assert [enqueued.changed for enqueued in called] == [False]
    assert look(world).status == status
    assert world.engine.enqueue(world.entity("1")).changed


@pytest.mark.parametrize("end", [Requeue(3600), PermanentError("no")], ids=["requeued", "quarantined"])
def test_what_an_action_leaves_behind_calls_from_outside(world: World, truth: Truth, end: Any) -> None:
    """In a copy of its context, as `asyncio.to_thread` and `sync_to_async` make one, that outlives it."""
    left: list[contextvars.Context] = []
    copy = _named("copy", lambda ctx, entity: left.append(contextvars.copy_context()))
    truth.set("1", copy, says("end", end))
    evaluate(world)
    assert left[0].run(world.engine.enqueue, world.entity("1"), 5).changed
    assert look(world).deadline == datetime.fromtimestamp(NOW + 5, UTC)


def test_what_an_evaluation_sets_in_a_context_variable_ends_with_it(world: World, truth: Truth) -> None:
    """Celery's handlers, and the next task of the process, see what there was before."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody's")
    seen: list[str] = []
    variable.set("the worker's")

    def enter(ctx: Any, entity: Any) -> None:
        seen.append(variable.get())
        variable.set("acme's")

    def note(**_: Any) -> None:
        seen.append(variable.get())

    truth.set("1", enter, _named("note", lambda ctx, entity: note()), truth.reach)
    signals.task_postrun.connect(note, weak=False)
    try:
        evaluate(world)
    finally:
        signals.task_postrun.disconnect(note)
    assert seen == ["the worker's", "acme's", "the worker's"]


def test_other_entities_are_enqueued_at_once(world: World, truth: Truth) -> None:
    def enqueue(ctx: Any, entity: Any) -> None:
        assert ctx.enqueue(world.entity("2")).sent

    truth.set("1", enqueue, says("fail", ValueError()))
    evaluate(world)
    assert look(world, "2").deadline == datetime.fromtimestamp(NOW, UTC)


def test_from_inside_means_this_engine_and_this_kind(world: World, make_app: MakeApp, truth: Truth) -> None:
    """An entity of the same kind and id in another engine is another entity."""
    other = World(make_app(), Truth())
    other.engine.enqueue(other.entity("1"), 20)
    host = world.register("host")
    world.engine.enqueue(host("1"), 20)
    world.messages()

    def enqueue(ctx: Any, entity: Any) -> None:
        assert other.engine.enqueue(other.entity("1")).changed
        assert world.engine.enqueue(host("1")).changed

    truth.set("1", enqueue)
    assert evaluate(world).state == states.SUCCESS


def test_respect_backoff_is_a_floor_for_enqueues_from_outside(world: World, truth: Truth) -> None:
    patient = world.register("patient", respect_backoff=True)
    truth.set("1", says("fail", ValueError()))
    for entity in (patient, world.entity):
        world.engine.enqueue(entity("1"))
        world.run()
    assert world.engine.enqueue(patient("1")).deadline == datetime.fromtimestamp(NOW + 10, UTC)
    assert world.engine.enqueue(world.entity("1")).deadline == datetime.fromtimestamp(NOW, UTC)
    assert look(world).failures == 1, "brought forward, not reset"


# States ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Replicas:
    """A state without a hash, as any dataclass that is not frozen."""

    ready: int


@pytest.mark.parametrize(
    "table",
    [{ANY: {ANY: ["scale"]}}, {ANY: {"unknown": [], ANY: ["scale"]}}, {frozenset(): {}, ANY: {ANY: "scale"}}],
    ids=["any", "beside others", "as a goal beside others"],
)
def test_states_without_a_hash(world: World, table: Any) -> None:
    replicas = {"web": 1}

    class Deployment(Entity):
        rules = Rules(table)

        def get_state(self) -> Any:
            return Replicas(replicas[self.id])

        def get_goal_state(self) -> Any:
            return Replicas(3)

        def scale(self, ctx: Any) -> None:
            replicas[self.id] = ctx.goal_state.ready

    world.engine.register(Deployment)
    world.engine.enqueue(Deployment("web"))
    world.run()
    described = world.engine.describe(Deployment("web"))
    assert described is not None
    assert (described.error, described.converged, replicas) == (None, True, {"web": 3})


# Without Celery ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "summary", "error", "retry_in"),
    [
        (Stop(), "order/1: old: act 0 ms; goal new not reached", type(None), None),
        (ValueError("no"), "order/1: old: act 0 ms failed (ValueError: no); again in 10 s", ValueError, 10),
        (
            RetryAfter(3),
            "order/1: old: act 0 ms failed (RetryAfter: again in 3 s); again in 3 s",
            RetryAfter,
            3,
        ),
        (
            PermanentError("no"),
            "order/1: old: act 0 ms failed (PermanentError: no); quarantined",
            PermanentError,
            None,
        ),
    ],
    ids=["done", "failed", "asked to wait", "quarantined"],
)
def test_how_the_work_of_a_message_ended(
    world: World, truth: Truth, action: Any, summary: str, error: type[Any], retry_in: float | None
) -> None:
    truth.set("1", says("act", action))
    world.engine.enqueue(world.entity("1"))
    [message] = world.messages()
    request = TaskRequest()
    ended = world.evaluator("order").run(
        [tuple(pair) for pair in message.args[0]], None, task_id=message.id, retries=0, request=request
    )
    assert untimed(ended.summary) == summary
    assert type(ended.error) is error
    assert ended.retry_at == (None if retry_in is None else datetime.fromtimestamp(NOW + retry_in, UTC))


def test_celerys_own_retry_counts_from_the_time_of_the_parts(world: World, truth: Truth) -> None:
    parts = dataclasses.replace(world.engine.parts, now=lambda: datetime(2030, 1, 1, tzinfo=UTC))
    truth.set("1", says("ask", Retry(when=datetime(2030, 1, 1, 0, 0, 42, tzinfo=UTC))))
    with world.engine.opened_with(parts):
        evaluate(world)
    assert look(world).deadline == datetime.fromtimestamp(NOW + 42, UTC)


def test_durations_are_by_the_clock_of_the_parts_and_chance_by_their_random(
    make_world: Callable[..., World], truth: Truth
) -> None:
    world = make_world()
    parts = dataclasses.replace(world.engine.parts, random=lambda: 0.5)

    def slow(ctx: Any, entity: Any) -> None:
        world.clock.advance(90)
        raise OSError

    truth.set("1", slow)
    with world.engine.opened_with(parts):
        result = evaluate(world)
    assert "slow 90 s failed (OSError); again in 7.5 s" in str(result.result)


# In a real worker --------------------------------------------------------------------------------


@pytest.fixture
def served(make_app: MakeApp, truth: Truth, valkey: Valkey) -> Iterator[tuple[Engine, type[Entity]]]:
    """An engine on a real server, with a worker in a thread."""
    app = make_app(broker=valkey.url)
    engine = Engine(app)
    entity = engine.register(truth.entity(), failure_retry_delay=0.02, jitter=False)
    with worker_of(app):
        yield engine, entity


def test_a_worker_tells_celery_how_it_ended(served: tuple[Engine, type[Entity]], truth: Truth) -> None:
    engine, entity = served
    told: list[tuple[str, Any, Any]] = []

    def on_retry(request: Any, reason: Any, **_: Any) -> None:
        told.append(("retry", request.id, type(reason.exc)))

    def on_failure(task_id: str, exception: Any, **_: Any) -> None:
        told.append(("failure", task_id, type(exception)))

    def on_success(sender: Any, result: Any, **_: Any) -> None:
        told.append(("success", sender.request.id, result))

    failures = [ConnectionError("a"), ConnectionError("b"), PermanentError("c")]

    def fail(ctx: Any, entity: Any) -> None:
        raise failures.pop(0)

    truth.set("1", fail)
    signals.task_retry.connect(on_retry, weak=False)
    signals.task_failure.connect(on_failure, weak=False)
    signals.task_success.connect(on_success, weak=False)
    try:
        engine.enqueue(entity("1"))
        poll("quarantined", lambda: len(told) == 3)
        first = told[0][1]
        assert told == [
            ("retry", first, ConnectionError),
            ("retry", first, ConnectionError),
            ("failure", first, PermanentError),
        ]
        truth.set("1", truth.reach)
        engine.enqueue(entity("1"))
        poll("converged", lambda: len(told) == 4)
        assert told[3][0] == "success"
        assert told[3][1] != first, "a new life, a new task id"
        assert untimed(told[3][2]) == "order/1: old → new: reach 0 ms; converged"
    finally:
        signals.task_retry.disconnect(on_retry)
        signals.task_failure.disconnect(on_failure)
        signals.task_success.disconnect(on_success)


def test_an_error_that_cannot_be_pickled(served: tuple[Engine, type[Entity]], truth: Truth) -> None:
    engine, entity = served

    class Unpicklable(Exception):
        def __init__(self, a: int, b: Any) -> None:
            super().__init__("text")
            self.b = b

    errors: list[Exception] = [Unpicklable(1, lambda: None)]

    def fail_once(ctx: Any, entity: Any) -> None:
        if errors:
            raise errors.pop()
        truth.reach(ctx, entity)

    truth.set("1", fail_once)
    engine.enqueue(entity("1"))
    poll("converged", lambda: getattr(engine.describe(entity("1")), "converged", None))


MALFORMED: list[tuple[list[Any], dict[str, Any]]] = [
    ([], {}),
    ([[]], {}),
    (["x"], {}),
    (["\n\x1b[31mforged log line"], {}),
    ([None], {}),
    ([5], {}),
    ([["1", "2"]], {}),
    ([[["1"]]], {}),
    ([[["1", "2", "3"]]], {}),
    ([[["1", "2"], ["3"]]], {}),
    ([[["1", "2"], ["1", "2"]]], {}),
    ([[["1", "2"], ["2", "1"], ["1", "3"]]], {}),
    ([[[1, "2"]]], {}),
    ([[["1", 2]]], {}),
    ([[["", "2"]]], {}),
    ([[["a\nb", "2"]]], {}),
    ([[["\ud800", "2"]]], {}),
    ([[["1", "\ud800"]]], {}),
    ([[["1", ""]]], {}),
    ([[["1", "-2"]]], {}),
    ([[["1", "9" * 5000]]], {}),
    ([[["x" * 100_000, "2"]]], {}),
    ([[["1", "2"]], 5], {}),
    ([[["1", "2"]]], {"resent_at": "now"}),
    ([[["1", "2"]]], {"resent_at": -1}),
    ([[["1", "2"]]], {"resent_at": 10**30}),
    ([[["1", "2"]]], {"resent_at": 1.5}),
    ([{"id": "1"}], {}),
]


def test_malformed_messages_are_rejected_and_the_worker_lives(
    served: tuple[Engine, type[Entity]], truth: Truth, caplog: pytest.LogCaptureFixture
) -> None:
    engine, entity = served
    ends: list[str] = []

    def on_end(state: str, **_: Any) -> None:
        ends.append(state)

    signals.task_postrun.connect(on_end, weak=False)
    try:
        with caplog.at_level(logging.ERROR, "celery_goalstate"):
            for args, kwargs in MALFORMED:
                engine.app.send_task("goalstate.order", args=args, kwargs=kwargs)
            poll("all arrived", lambda: len(ends) == len(MALFORMED))
    finally:
        signals.task_postrun.disconnect(on_end)
    assert set(ends) == {states.REJECTED}
    errors = [record for record in caplog.records if record.name.startswith("celery_goalstate")]
    assert len(errors) == len(MALFORMED)
    for record in errors:
        assert record.getMessage().startswith("goalstate.order rejected a malformed message: ")
        assert record.getMessage().endswith("send goalstate.enqueue(kind, id, deadline=None)")
        assert len(record.getMessage()) < 500
        assert record.getMessage().isprintable()
    assert engine.counts("order")["order"]["idle"] == 0
    assert not truth.log

    engine.enqueue(entity("1"))
    poll("the worker still evaluates", lambda: truth.looks("1") == 1)


def test_what_a_later_release_adds_to_a_message_is_ignored(world: World, truth: Truth) -> None:
    world.engine.enqueue(world.entity("1"))
    [message] = world.messages()
    message.kwargs["surprise"] = {"any": ["thing"]}
    world.run(message)
    assert truth.looks("1") == 1


# In the log --------------------------------------------------------------------------------------


def test_the_log_names_the_entity_and_shows_the_error(
    world: World, truth: Truth, caplog: pytest.LogCaptureFixture
) -> None:
    """Celery's own lines name a task id, and show no traceback of a retry."""

    def ship(ctx: Any, entity: Any) -> None:
        ctx.log.info("%d %% done", 50)
        raise KeyError("address")

    caplog.set_level(logging.INFO, "celery_goalstate")
    truth.set("50%d", ship)
    evaluate(world, "50%d")
    action, failure = [record for record in caplog.records if record.name.startswith("celery_goalstate")]
    assert action.getMessage() == "order/50%d ship: 50 % done"
    assert action.filename == "test_outcomes.py"
    assert (action.kind, action.id, action.action) == ("order", "50%d", "ship")
    assert untimed(failure.getMessage()).startswith(
        "order/50%d: old: ship 0 ms failed (KeyError: 'address'); again in"
    )
    assert failure.levelno == logging.WARNING
    assert 'raise KeyError("address")' in caplog.text


def test_a_success_is_one_line_at_info_which_is_celerys_own(
    served: tuple[Engine, type[Entity]], truth: Truth, caplog: pytest.LogCaptureFixture
) -> None:
    engine, entity = served
    caplog.set_level(logging.INFO)
    truth.set("7", truth.reach)
    engine.enqueue(entity("7"))
    poll("converged", lambda: "converged" in caplog.text)
    [line] = [record for record in caplog.records if "order/7" in record.getMessage()]
    assert line.name == "celery.app.trace"
    assert untimed(line.getMessage()).endswith("'order/7: old → new: reach 0 ms; converged'")


def test_a_percent_sign_in_a_log_text_without_arguments(
    world: World, truth: Truth, caplog: pytest.LogCaptureFixture
) -> None:
    """Logging formats a text only if there are arguments."""

    def ship(ctx: Any, entity: Any) -> None:
        ctx.log.warning("100% done")

    truth.set("5%", ship)
    evaluate(world, "5%")
    assert "order/5% ship: 100% done" in caplog.text
