"""Several entities in one task: each ends as it would have ended in a task of its own."""

from __future__ import annotations

import ast
import contextlib
import contextvars
import dataclasses
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from typing import Any

import pytest
from _pytest.outcomes import Failed
from billiard.exceptions import SoftTimeLimitExceeded
from celery import states

from celery_goalstate import Entity, Requeue
from celery_goalstate.description import Failure
from celery_goalstate.exceptions import IndexUnavailable, PermanentError
from celery_goalstate.index.base import Request, Wakeup
from celery_goalstate.messages.errors import BrokerUnavailable
from celery_goalstate.registry import Kind
from celery_goalstate.settings import KindOptions
from celery_goalstate.worker.batch import SLICE
from tests.integration.conftest import MakeApp, Message, Truth, World
from tests.servers import HOST, free_port, poll

LEASE = 30.0


def says(said: Any) -> Callable[..., Any]:
    """An action that returns this, or raises it."""

    def say(ctx: Any, entity: Any) -> Any:
        if isinstance(said, BaseException):
            raise said
        return said

    return say


def does(action: Callable[..., Any]) -> Callable[..., None]:
    """An action of which nobody wants to know what it returns."""

    def do(ctx: Any, entity: Any) -> None:
        action(ctx, entity)

    return do


@pytest.fixture
def host(world: World) -> type[Entity]:
    """A kind of which eight entities share a task."""
    return world.register("host", batch_size=8)


def enqueue_all(world: World, host: type[Entity], ids: Sequence[Any]) -> Message:
    """Enqueue these entities; their one message."""
    assert world.engine.enqueue_many(host(id) for id in ids) == len(ids)
    [message] = world.messages()
    assert [id for id, _ in message.args[0]] == [str(id) for id in ids]
    return message


def status(world: World, id: str, kind: str = "host") -> str:
    described = world.engine.describe(world.engine.ref(kind, id))
    return str(described.status) if described else "not known"


def take_over(world: World) -> None:
    """What another worker does: its sweeper looks around, and it evaluates what there is."""
    world.lose_workers("worker-2")
    world.run()


# One after the other -----------------------------------------------------------------------------


def script(truth: Truth) -> None:
    """One of each sort."""
    truth.set("reaches", truth.reach)
    truth.set("fails", says(ConnectionError("no route")))
    truth.set("is-beyond-repair", says(PermanentError("no such host")))
    truth.set("wants-another-look", says(Requeue(20)))
    truth.set("changes-nothing", says(None))
    truth.set("is-at-rest", state="new")


SORTS = ["reaches", "fails", "is-beyond-repair", "wants-another-look", "changes-nothing", "is-at-rest"]


def _words(history: tuple[Failure, ...]) -> tuple[Failure, ...]:
    """Without how long it took, and in which task."""
    return tuple(dataclasses.replace(each, seconds=None, task_id=None) for each in history)


def test_each_ends_as_if_alone(world: World, truth: Truth, host: type[Entity]) -> None:
    def ends(kind: str) -> dict[str, Any]:
        """What the index knows of each afterwards, but for names."""
        return {
            each.id: dataclasses.replace(
                each, kind="", cursor="", task_id=None, fencing_token=None, history=_words(each.history)
            )
            for status in ("scheduled", "idle", "failed")
            for each in world.engine.list(kind, status=status)
        }

    script(truth)
    [result] = world.run(enqueue_all(world, host, SORTS))
    assert result.state == states.SUCCESS
    assert result.result == "6 entities: 3 done, 1 failed, 1 quarantined, 1 again"
    world.messages()

    script(truth)
    world.engine.enqueue_many(map(world.entity, SORTS))
    assert len(world.run()) == 6
    assert ends("host") == ends("order")
    assert len(ends("host")) == 6


def test_a_failure_is_in_the_log_and_backs_off_alone(
    world: World, truth: Truth, host: type[Entity], caplog: pytest.LogCaptureFixture
) -> None:
    script(truth)
    world.run(enqueue_all(world, host, SORTS))
    errors = {
        record.levelno: record for record in caplog.records if record.exc_info and "host/" in record.message
    }
    assert "host/fails" in errors[logging.WARNING].message
    assert "host/is-beyond-repair" in errors[logging.ERROR].message
    described = world.engine.describe(host("fails"))
    assert described is not None
    assert described.deadline == datetime.fromtimestamp(world.clock() + 10, UTC)
    for delay, failures in [(10, 2), (20, 3)]:
        world.clock.advance(delay)
        take_over(world)
        described = world.engine.describe(host("fails"))
        assert described is not None
        assert described.failures == failures


def test_one_deletes_itself_and_one_its_neighbour(world: World, truth: Truth, host: type[Entity]) -> None:
    """The neighbour had its turn coming: it is evaluated, as one that is running is, and nothing follows."""
    truth.set("1", does(lambda ctx, entity: ctx.delete(entity)))
    truth.set("2", does(lambda ctx, entity: ctx.delete(host("3"))))
    truth.set("3", says(Requeue(1)))
    world.run(enqueue_all(world, host, "1234"))
    assert [status(world, id) for id in "1234"] == ["not known", "idle", "not known", "idle"]
    assert world.messages() == []


def test_one_enqueues_its_neighbours(world: World, truth: Truth, host: type[Entity]) -> None:
    """Each is looked at after that enqueue, be it evaluated already, or not yet."""

    def enqueue(ctx: Any, entity: Any) -> None:
        truth.reach(ctx, entity)
        truth.log.append(("enqueued by", entity.id))
        for id in "13":
            ctx.enqueue(host(id))

    truth.set("2", enqueue)
    world.run(enqueue_all(world, host, "123"))
    world.run()
    since = truth.log[truth.log.index(("enqueued by", "2")) :]
    assert ("host", "1") in since
    assert ("host", "3") in since
    assert [status(world, id) for id in "123"] == ["idle"] * 3


def test_what_is_superseded_is_left_out(world: World, truth: Truth, host: type[Entity]) -> None:
    message = enqueue_all(world, host, "123")
    world.engine.delete(host("2"))
    [result] = world.run(message)
    assert result.result == "3 entities: 2 done, 1 nothing to do"
    [result] = world.run(message)
    assert result.result == "3 entities: 3 nothing to do"
    assert truth.log == [("host", "1"), ("host", "3")]


def test_nothing_of_one_reaches_the_next_through_its_context(
    world: World, truth: Truth, host: type[Entity]
) -> None:
    """A tenant that an action, or a hook, sets is not that of the next entity."""
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")
    seen: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def of_the_entity(evaluation: Any) -> Iterator[None]:
        seen.append((evaluation.ref.id, tenant.get()))
        tenant.set(f"tenant of {evaluation.ref.id}")  # and nobody sets it back
        yield
        seen.append((evaluation.ref.id, tenant.get()))

    def switch(ctx: Any, entity: Entity) -> None:
        tenant.set(f"{tenant.get()}, switched")

    world.engine.around_evaluation(of_the_entity)
    truth.set("2", switch)
    world.run(enqueue_all(world, host, "123"))
    assert seen == [
        *(("1", "none"), ("1", "tenant of 1")),
        *(("2", "none"), ("2", "tenant of 2, switched")),
        *(("3", "none"), ("3", "tenant of 3")),
    ]
    assert tenant.get() == "none"


def test_a_hook_that_raises_fails_one(world: World, truth: Truth, host: type[Entity]) -> None:
    def hook(evaluation: Any) -> Any:
        if evaluation.ref.id == "2":
            raise LookupError("no such tenant")
        return contextlib.nullcontext()

    world.engine.around_evaluation(hook)
    [result] = world.run(enqueue_all(world, host, "123"))
    assert result.result == "3 entities: 2 done, 1 failed"
    described = world.engine.describe(host("2"))
    assert described is not None
    assert (described.error, described.failures) == ("LookupError: no such tenant", 1)


# Nobody is held back -----------------------------------------------------------------------------


def test_what_has_waited_long_enough_is_given_back(world: World, truth: Truth, host: type[Entity]) -> None:
    def slow(ctx: Any, entity: Any) -> None:
        world.clock.advance(1.5)
        truth.reach(ctx, entity)

    truth.set("2", slow)
    [result] = world.run(enqueue_all(world, host, "12345"))
    assert result.result == "5 entities: 2 done, 3 unstarted"
    assert [id for _, id in truth.log] == ["1", "2"]
    [given_back] = world.messages()
    assert [id for id, _ in given_back.args[0]] == ["3", "4", "5"]
    world.run(given_back)
    assert [id for _, id in truth.log] == ["1", "2", "3", "4", "5"]
    assert world.engine.counts("host")["host"]["idle"] == 5


def test_an_alarm_gives_them_back_while_the_slow_one_still_runs(
    world: World, truth: Truth, host: type[Entity]
) -> None:
    seen = {}

    def slow(ctx: Any, entity: Any) -> None:
        world.keeper_wakes_in(SLICE)
        poll("the others wait for another worker", lambda: world.engine.is_scheduled(host("3")))
        seen["1"] = status(world, "1")
        world.run()
        seen["3"] = status(world, "3")
        truth.reach(ctx, entity)

    truth.set("2", slow)
    world.run(enqueue_all(world, host, "123"))
    assert seen == {"1": "idle", "3": "idle"}, "what had ended was reported as well"
    assert [truth.looks(id, "host") for id in "123"] == [1, 1, 1]
    assert status(world, "2") == "idle"


def test_a_third_of_a_short_lease(make_world: Callable[..., World], truth: Truth) -> None:
    world = make_world(goalstate_lease=1.5)
    host = world.register("host", batch_size=8)
    truth.set("1", does(lambda ctx, entity: world.clock.advance(0.5)))
    [result] = world.run(enqueue_all(world, host, "12"))
    assert result.result == "2 entities: 1 done, 1 unstarted"


def test_a_line_is_the_same_whoever_reports_first(world: World, truth: Truth, host: type[Entity]) -> None:
    def slow(ctx: Any, entity: Any) -> None:
        world.keeper_wakes_in(SLICE)
        poll("the other waits for another worker", lambda: world.engine.is_scheduled(host("2")))

    truth.set("1", does(slow))
    [result] = world.run(enqueue_all(world, host, "12"))
    assert result.result == "2 entities: 1 done, 1 unstarted"


def test_a_process_that_stood_still_starts_none(
    world: World,
    truth: Truth,
    host: type[Entity],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("celery_goalstate.worker.task.SLICE", LEASE)  # the keeper is to sleep on meanwhile

    def stalled(ctx: Any, entity: Any) -> None:
        world.keeper_sleeps()
        world.lose_workers("worker-2")

    truth.set("2", stalled)
    world.run(enqueue_all(world, host, "123"))
    assert [id for _, id in truth.log] == ["1", "2"]
    for id in "123":
        assert f"host/{id}: dropped, since its lease was lost" in caplog.text
    again = world.messages()
    assert [len(message.args[0]) for message in again] == [1, 1, 1], "alone: one of them may be to blame"
    truth.set("2", truth.reach)
    world.run(*again)
    for id in "123":
        described = world.engine.describe(host(id))
        assert described is not None
        assert (described.status, described.failures) == ("idle", 0)


def test_a_soft_time_limit_is_the_failure_of_one(world: World, truth: Truth, host: type[Entity]) -> None:
    truth.set("2", says(SoftTimeLimitExceeded()))
    [result] = world.run(enqueue_all(world, host, "123"))
    assert result.result == "3 entities: 2 done, 1 failed"
    assert truth.looks("3", "host") == 1


def test_the_end_of_the_worker_in_the_midst(world: World, truth: Truth, host: type[Entity]) -> None:
    """What had ended is reported, the rest is given back, and only one is left to the sweeper."""
    truth.set("2", says(SystemExit(1)))
    message = enqueue_all(world, host, "1234")
    with pytest.raises(SystemExit):
        world.run(message)
    assert [status(world, id) for id in "1234"] == ["idle", "running", "scheduled", "scheduled"]
    world.run()
    truth.set("2", truth.reach)
    take_over(world)
    described = world.engine.describe(host("2"))
    assert described is not None
    assert (described.status, described.failures, described.converged) == ("idle", 0, True)


def test_outcomes_are_told_again_while_the_lease_of_the_slow_one_lasts(
    world: World, truth: Truth, host: type[Entity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_goalstate.worker.task.TRY_AGAIN_AFTER", 0)
    monkeypatch.setattr(world.keeper, "alarm", lambda at, call: nullcontext())  # all are told at the end
    finish, asked = world.index.finish, []

    def does_not_answer_twice(kind: str, reports: Any) -> Any:
        asked.append(len(reports))
        if len(asked) <= 2:
            raise IndexUnavailable
        return finish(kind, reports)

    def slow(ctx: Any, entity: Any) -> None:
        for _ in range(2):
            world.clock.advance(LEASE / 3 * 2)
            world.keeper._renew([lease for lease in world.keeper._leases if not lease.lost])
        truth.reach(ctx, entity)

    world.index.finish = does_not_answer_twice
    truth.set("1", slow)
    world.run(enqueue_all(world, host, "12"))
    assert status(world, "1") == "idle"
    assert asked == [2, 2, 2]


def test_outcomes_that_cannot_be_told_are_given_up_with_their_leases(
    world: World,
    truth: Truth,
    host: type[Entity],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("celery_goalstate.worker.task.TRY_AGAIN_AFTER", 0.001)
    monkeypatch.setattr("celery_goalstate.worker.task.CLAIM_PATIENCE", 0.0)  # this clock stands still
    finish, asked = world.index.finish, []

    def never(kind: str, reports: Any) -> Any:
        asked.append([report.id for report in reports])
        raise IndexUnavailable

    def slow(ctx: Any, entity: Any) -> None:
        world.keeper_wakes_in(SLICE)
        poll("the alarm tells of the others", lambda: ["1", "3"] in asked)
        world.keeper_sleeps()
        world.clock.advance(LEASE + 1)
        truth.reach(ctx, entity)

    world.index.finish = never
    truth.set("2", slow)
    [result] = world.run(enqueue_all(world, host, "123"))
    assert isinstance(result.result, IndexUnavailable)
    assert ["2"] in asked
    lost = "outcomes of kind host are lost, its entities are evaluated again"
    assert lost in caplog.text  # it is waited for
    world.index.finish = finish
    truth.set("2", truth.reach)
    take_over(world)
    assert [status(world, id) for id in "123"] == ["idle"] * 3


def test_a_soft_time_limit_while_the_alarm_still_tells_loses_no_outcome(
    world: World, truth: Truth, host: type[Entity]
) -> None:
    finish, asked, slow_is_over = world.index.finish, [], threading.Event()

    def slow_for_the_alarm(kind: str, reports: Any) -> Any:
        asked.append([report.id for report in reports])
        if reports[0].id == "1":
            slow_is_over.wait()
            with suppress(Failed):  # without the outcome: the limit strikes while the thread waits for us
                poll("the slow one's outcome", lambda: ["2"] in asked, timeout=2)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        return finish(kind, reports)

    def slow(ctx: Any, entity: Any) -> None:
        world.keeper_wakes_in(SLICE)
        poll("the alarm tells of the first", lambda: ["1"] in asked)
        truth.reach(ctx, entity)
        slow_is_over.set()

    def limit(*_: Any) -> None:
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGUSR1, limit)
    try:
        world.index.finish = slow_for_the_alarm
        truth.set("2", slow)
        world.run(enqueue_all(world, host, "12"))
        poll("both are told", lambda: {status(world, id) for id in "12"} == {"idle"})
    finally:
        signal.signal(signal.SIGUSR1, before)


# More of them, under load ------------------------------------------------------------------------


@pytest.fixture
def busy(make_world: Callable[..., World]) -> World:
    """So small a window that nearly all that is due has no message."""
    return make_world({"window": 2}, goalstate_jitter=False)


@pytest.fixture
def handle(busy: World) -> Callable[[], str]:
    """Handle the message that is there as a worker does; `apply`, which `World.run` uses, is eager."""

    def handle() -> str:
        [message] = busy.messages()
        task = busy.app.tasks[message.task]
        task.push_request(id=message.id, retries=message.retries, is_eager=False)
        try:
            return str(busy.evaluator("host").handle(task, message.args, message.kwargs))
        finally:
            task.pop_request()

    return handle


def test_a_task_takes_what_is_due_and_parked(busy: World, truth: Truth, handle: Callable[[], str]) -> None:
    host = busy.register("host", batch_size=8)
    busy.engine.enqueue_many(host(id) for id in range(20))
    truth.set("5", says(ConnectionError("no route")))
    assert handle() == "host/0: new: converged; taken as well, 19 entities: 18 done, 1 failed"
    assert [truth.looks(str(id), "host") for id in range(20)] == [1] * 20
    assert ids(busy.messages()) == [["5"]], "its back-off"


def test_only_for_a_while(busy: World, truth: Truth, handle: Callable[[], str]) -> None:
    host = busy.register("host", batch_size=8)
    for id in range(100):
        truth.set(str(id), does(lambda ctx, entity: busy.clock.advance(0.2)))
    busy.engine.enqueue_many(host(id) for id in range(100))
    line = handle()
    assert len(truth.log) == 1 + 5, "a second of 0.2 each"
    assert line.endswith("taken as well, 8 entities: 5 done, 3 unstarted")


def test_a_kind_without_batches_takes_none(busy: World, handle: Callable[[], str], truth: Truth) -> None:
    host = busy.register("host")
    busy.engine.enqueue_many(host(id) for id in range(5))
    assert "taken" not in handle()
    assert len(truth.log) == 1


def test_an_index_that_does_not_answer_is_no_harm_to_what_was_done(
    busy: World, handle: Callable[[], str]
) -> None:
    host = busy.register("host", batch_size=8)

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise IndexUnavailable

    busy.index.take = unavailable
    busy.engine.enqueue(host("1"))
    assert "taken" not in handle()
    assert status(busy, "1") == "idle"


def test_eager_mode_takes_none(busy: World, truth: Truth) -> None:
    host = busy.register("host", batch_size=8)
    busy.engine.enqueue_many(host(id) for id in range(5))
    busy.run()
    assert len(truth.log) == 1


# Messages ----------------------------------------------------------------------------------------


def dispatch(world: World, wakeups: Sequence[Wakeup], batch_size: int) -> list[Message]:
    options = dataclasses.replace(KindOptions(), batch_size=batch_size)
    assert world.engine.parts.publisher.dispatch(Kind("host", "goalstate.host", None, options), wakeups)
    return world.messages()


def ids(messages: Sequence[Message]) -> list[list[str]]:
    return [[id for id, _ in message.args[0]] for message in messages]


def wakeups(count: int, prefix: str = "") -> list[Wakeup]:
    return [Wakeup(f"{prefix}{n}", str(n), 0, f"task-{n}") for n in range(count)]


def test_batch_size_is_the_most(world: World) -> None:
    messages = dispatch(world, wakeups(10), 4)
    assert ids(messages) == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"]]
    assert [message.id for message in messages] == ["task-0", "task-4", "task-8"]
    assert len(dispatch(world, wakeups(10), 1)) == 10


def test_who_has_a_past_or_a_future_of_its_own_travels_alone(world: World) -> None:
    of_their_own = [
        Wakeup("later", "1", 5_000, "t1"),
        Wakeup("retry", "2", 0, "t2", retries=1),
        Wakeup("again", "3", 0, "t3", resent_at=1),
        Wakeup("suspect", "4", 0, "t4", alone=True),
    ]
    one, *more = wakeups(3)
    messages = dispatch(world, [one, *of_their_own, *more], 10)
    assert sorted(ids(messages)) == [["0", "1", "2"], ["again"], ["later"], ["retry"], ["suspect"]]
    by_id = {message.args[0][0][0]: message for message in messages}
    assert (by_id["retry"].id, by_id["retry"].retries) == ("t2", 1)
    assert by_id["again"].kwargs == {"resent_at": 1}
    assert by_id["later"].delay > 4


def test_one_entity_one_message_without_load(world: World, host: type[Entity]) -> None:
    for id in "123":
        world.engine.enqueue(host(id))
    assert ids(world.messages()) == [["1"], ["2"], ["3"]]


@pytest.mark.parametrize("id", ["order", "é\u2028'\"", "\\" * 509, "\U000e0001" * 100], ids=ascii)
@pytest.mark.parametrize("count", [1, 2, 64, 500])
def test_what_people_see_is_short_and_a_literal(world: World, id: str, count: int) -> None:
    [message] = dispatch(world, wakeups(count, prefix=id), 500)
    shown = message.headers["kwargsrepr"]
    assert len(shown) < 1024
    assert len(message.headers["argsrepr"]) < 1024
    text = ast.literal_eval(shown)["entity" if count == 1 else "entities"]
    assert text.startswith(f"host/{id}"[:60])
    assert text.endswith("…" if count == 1 else f"{count} in all") or text == ", ".join(
        f"host/{id}{n}" for n in range(count)
    )


def test_a_message_stays_small_however_large_the_batch(world: World) -> None:
    messages = dispatch(world, wakeups(1_200), 10_000)
    assert [len(message.args[0]) for message in messages] == [500, 500, 200]


def test_without_a_broker_all_are_parked(make_app: MakeApp, truth: Truth) -> None:
    nobody = f"redis://{HOST}:{free_port()}/0"
    world = World(make_app(broker=nobody, goalstate_index_url="memory://"), truth)
    host = world.register("host", batch_size=8)
    scheduled = world.index.enqueue("host", [Request(str(id), delay=0, task_id=f"t{id}") for id in range(20)])
    published = [each.wakeup for each in scheduled if each.wakeup]
    kind = world.engine.kind("host")
    with pytest.raises(BrokerUnavailable, match="could not publish 20 of kind host"):
        world.engine.parts.publisher.publish_at_once(kind, published)
    for id in range(20):
        described = world.engine.describe(host(id))
        assert described is not None
        assert not described.sent


@pytest.mark.parametrize(
    "args",
    [
        [[]],
        [[["1", "2"], ["3"]]],
        [[["1", "2"], ["3", "4", "5"]]],
        [[["1", "2"], ["", "4"]]],
        [[["1", "2"], ["3", 4]]],
        [[["1", "2"], ["3", "x"]]],
        [[["1", "2"], None]],
        [[["1", "2"], "34"]],
        [[["1", "2"]], [["3", "4"]]],
    ],
    ids=str,
)
def test_a_malformed_message_is_rejected_as_a_whole(
    world: World, truth: Truth, host: type[Entity], args: Any, caplog: pytest.LogCaptureFixture
) -> None:
    [result] = [world.app.tasks["goalstate.host"].apply(args, {}, throw=False)]
    assert result.state == states.REJECTED
    assert "goalstate.host rejected a malformed message: " in caplog.text
    assert not truth.log
