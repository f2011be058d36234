"""The sweeper, on a clock that the test moves: what messages and workers fail to do is made good."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from kombu import pools

from celery_goalstate import Status
from celery_goalstate.exceptions import IndexUnavailable, PermanentError
from celery_goalstate.index.base import Status as IndexStatus
from celery_goalstate.index.base import Survey
from celery_goalstate.messages.producers import Producers
from celery_goalstate.worker.sweeper import LIMIT, LONGEST_REST, Sweeper
from tests.integration.conftest import NOW, Truth, World
from tests.servers import HOST, free_port


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(NOW + seconds, UTC)


def claim(world: World, kind: str = "order") -> list[Any]:
    """Claim what the messages in the queue say, as a worker that then dies."""
    messages = world.messages()
    return [
        world.index.claim(kind, [tuple(message.args[0][0])], nonce=message.id, task_id=message.id)
        for message in messages
    ]


def look(world: World, id: str = "1") -> Any:
    [described] = world.engine.describe_many([world.entity(id)])
    return described


# Parked ------------------------------------------------------------------------------------------


def test_a_parked_entity_gets_its_message_within_the_horizon(world: World, truth: Truth) -> None:
    world.engine.enqueue(world.entity("1"), 100)
    sweeper = world.sweeper()
    for seconds in (0, 30, 39.9):
        world.clock.now = NOW + seconds
        assert sweeper.sweep() is False
        assert world.messages() == []
    world.clock.now = NOW + 70
    sweeper.sweep()
    [message] = world.messages()
    assert 29 < message.delay <= 30
    sweeper.sweep()
    assert world.messages() == [], "one message is enough"
    world.clock.now = NOW + 100
    world.run(message)
    assert truth.looks("1") == 1


def test_more_than_a_batch_takes_several_sweeps_at_once(world: World) -> None:
    world.engine.enqueue_many((world.entity(id) for id in range(2 * LIMIT + 1)), 100)
    world.clock.advance(100)
    sweeper = world.sweeper()
    assert [sweeper.sweep() for _ in range(3)] == [True, True, False]
    assert len(world.messages()) == 2 * LIMIT + 1


def test_the_window_bounds_the_messages_under_way(make_world: Callable[..., World]) -> None:
    world = make_world(limits={"window": 10})
    world.engine.enqueue_many(world.entity(id) for id in range(50))
    sweeper, sent = world.sweeper(), []
    assert len(world.messages()) == 5, "half of the window is kept for those who wait"
    for _ in range(20):
        sweeper.sweep()
        messages = world.messages()
        assert world.index.counts("order")[IndexStatus.SENT] <= 10
        world.run(*messages)
        sent += messages
    assert len({message.args[0][0][0] for message in sent}) == 50 - 5


def test_nothing_is_sent_while_paused_and_all_of_it_after(world: World, truth: Truth) -> None:
    world.engine.enqueue(world.entity("1"), 40)
    world.engine.enqueue(world.entity("2"))
    world.engine.stop()
    assert world.engine.paused("order")
    [result] = world.run()
    assert result.result == "order/2: nothing to do: the kind is paused"
    world.engine.enqueue(world.entity("3"))
    world.clock.advance(1000)
    sweeper = world.sweeper()
    sweeper.sweep()
    assert world.messages() == []
    assert not truth.log
    world.engine.start()
    sweeper.sweep()
    world.run()
    assert sorted(truth.log) == [("order", "1"), ("order", "2"), ("order", "3")]


# Lost messages -----------------------------------------------------------------------------------


def test_a_lost_message_is_sent_again_once_its_queue_has_been_passed(world: World, truth: Truth) -> None:
    world.engine.enqueue(world.entity("lost"))
    world.messages()
    sweeper = world.sweeper()
    world.clock.advance(59)
    sweeper.sweep()
    assert world.messages() == [], "not suspect yet"
    world.clock.advance(2)
    world.engine.enqueue(world.entity("other"))
    world.run()
    sweeper.sweep()
    [again] = world.messages()
    assert again.args[0][0][0] == "lost"
    assert again.kwargs["resent_at"] == world.clock.milliseconds()
    world.run(again)
    assert truth.looks("lost") == 1


def test_a_long_queue_is_probed_by_one_message(world: World) -> None:
    world.engine.enqueue_many(world.entity(id) for id in range(50))
    world.messages()  # ... which lie behind thousands of other tasks
    sweeper, probes = world.sweeper(), []
    for _ in range(600):
        world.clock.advance(1)
        sweeper.sweep()
        probes += world.messages()
    assert 1 <= len(probes) <= 5
    world.run(*probes[:1])  # it arrives: the others are lost, not late
    for _ in range(130):
        world.clock.advance(1)
        sweeper.sweep()
        world.run()
    assert world.engine.counts("order")["order"] == {"scheduled": 0, "running": 0, "idle": 50, "failed": 0}


def test_a_resent_retry_is_a_new_task(world: World, truth: Truth) -> None:
    truth.set("1", _fail(ValueError()))
    world.engine.enqueue(world.entity("1"))
    [first] = world.messages()
    world.run(first)
    [lost] = world.messages()
    assert (lost.id, lost.retries) == (first.id, 1)
    world.clock.advance(10 + 61)
    world.sweeper().sweep()
    [again] = world.messages()
    assert again.id != lost.id, "the old id may be revoked"
    assert again.args == lost.args, "the same token: whichever comes first counts"
    world.run(again, lost)
    assert truth.looks("1") == 2


def _fail(error: Exception) -> Callable[..., Any]:
    def fail(ctx: Any, entity: Any) -> None:
        raise error

    return fail


# Lost workers ------------------------------------------------------------------------------------


def test_a_worker_that_died_is_a_failure_that_backs_off(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    for failures, delay in enumerate([10, 20, 40], start=1):
        world.engine.enqueue(world.entity("1"))
        claim(world)
        world.sweep_for(32.9)
        assert look(world).status == "running"
        world.sweep_for(0.2)
        died = world.clock() - NOW
        assert (look(world).status, look(world).failures) == ("scheduled", failures)
        assert look(world).deadline == at(died + delay)
        assert look(world).error.startswith("WorkerLost: The worker that evaluated the entity died")
        world.messages()
    assert caplog.text.count("order/1 was being evaluated by a worker that fell silent") == 3


def test_an_entity_that_kills_its_workers_is_quarantined(world: World) -> None:
    host = world.register("host", max_failures=2)
    world.engine.enqueue(host("1"))
    for _ in range(2):
        world.clock.advance(60)
        claim(world, "host")
        world.lose_workers()
    [described] = world.engine.list("host")
    assert (described.status, described.failures) == ("failed", 2)
    assert world.messages() == []


def test_an_enqueue_during_a_run_survives_its_worker(world: World, truth: Truth) -> None:
    world.engine.enqueue(world.entity("1"))
    claim(world)
    world.clock.advance(5)
    world.engine.enqueue(world.entity("1"))
    world.lose_workers()
    world.run()
    assert truth.looks("1") == 1


def test_a_deleted_entity_whose_worker_died_is_gone(world: World) -> None:
    world.engine.enqueue(world.entity("1"))
    claim(world)
    world.engine.delete(world.entity("1"))
    world.lose_workers()
    assert look(world) is None
    assert sum(world.index.counts("order").values()) == 0


# Idle records ------------------------------------------------------------------------------------


def test_idle_records_are_forgotten(world: World) -> None:
    fleeting, lasting = world.register("fleeting", idle_ttl=60), world.register("lasting", idle_ttl=None)
    for entity in (world.entity, fleeting, lasting):
        world.engine.enqueue(entity("1"))
    world.run()
    for seconds, left in [(0, 3), (59, 3), (2, 2), (604_800, 1), (1e9, 1)]:
        world.clock.advance(seconds)
        world.sweeper().sweep()
        counts = world.engine.counts()
        assert sum(counts[kind][Status.IDLE] for kind in ("order", "fleeting", "lasting")) == left


def test_an_idle_record_that_is_enqueued_again_is_kept(world: World) -> None:
    world.engine.enqueue(world.entity("1"))
    world.run()
    world.engine.enqueue(world.entity("1"), 10_000_000)
    world.clock.advance(700_000)
    world.sweeper().sweep()
    assert look(world).status == "scheduled"


# One sweeper per shard ---------------------------------------------------------------------------


def test_one_worker_sweeps_and_another_takes_over(world: World) -> None:
    first, second = world.sweeper("a"), world.sweeper("b")
    world.engine.enqueue(world.entity("1"), 31)
    first.sweep()
    world.clock.advance(2)
    second.sweep()
    assert world.messages() == [], "the first one holds the shard"
    world.clock.advance(5)
    second.sweep()
    assert len(world.messages()) == 1


def test_who_does_not_sweep_surveys_nothing(world: World) -> None:
    """Of thousands of kinds on hundreds of workers a survey of each would be too much."""
    first, second, asked = world.sweeper("a"), world.sweeper("b"), []
    survey = world.index.survey

    def noted(kinds: Any, *, sweeper: str, leave_out: Any, **more: Any) -> Any:
        if sweeper == "b":
            asked.append([kind for kind in kinds if (kind, 0) not in leave_out])
        return survey(kinds, sweeper=sweeper, leave_out=leave_out, **more)

    world.index.survey = noted
    for _ in range(30):
        first.sweep()
        second.sweep()
        world.clock.advance(1)
    assert asked == 30 * [[]]
    for _ in range(6):
        second.sweep()
        world.clock.advance(1)
    assert asked[-1] == ["order"], "the first one sweeps no more"


# A broker that is down ---------------------------------------------------------------------------


class Broken:
    """A publisher's broker that is switched off and on: real publishing, to a port where nobody listens."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.working = world.app.conf.broker_write_url

    def break_(self) -> None:
        self._publish_to(f"redis://{HOST}:{free_port()}/0")

    def mend(self) -> None:
        self._publish_to(self.working)

    def _publish_to(self, url: str | None) -> None:
        self.world.app.conf.broker_write_url = url
        self.world.app.amqp._producer_pool = None
        self.world.app._pool = None
        pools.reset()
        publisher = self.world.engine.parts.publisher._by_messages
        publisher._patient, publisher._hasty = (Producers(self.world.app, 5.0) for _ in range(2))


@pytest.fixture
def broker(world: World) -> Broken:
    world.app.conf.broker_write_url = world.app.conf.broker_url
    return Broken(world)


def test_publishing_rests_for_longer_and_longer_while_the_broker_is_away(
    world: World, broker: Broken, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.break_()
    world.engine.enqueue_many((world.entity(id) for id in range(3)), 31)
    other = world.register("other")
    world.engine.enqueue(other("1"), 31)
    world.clock.advance(10)
    sweeper, attempts = world.sweeper(), []
    caplog.clear()
    publish = world.engine.parts.publisher._by_messages.publish_at_once

    def seen(*args: Any) -> None:
        attempts.append(world.clock())
        publish(*args)

    monkeypatch.setattr(world.engine.parts.publisher._by_messages, "publish_at_once", seen)
    for _ in range(120):
        assert sweeper.sweep() is False
        world.clock.advance(1)
    pauses = [later - earlier for earlier, later in pairwise(attempts)]
    assert pauses[:7] == [1, 1, 1, 2, 4, 8, 16], "one attempt a sweep, whatever the number of kinds"
    assert set(pauses[7:]) == {LONGEST_REST}
    assert len(caplog.records) == 1
    assert "the sweeper waits for the broker: ConnectionError: Error 111" in caplog.text

    broker.mend()
    world.clock.advance(LONGEST_REST)
    sweeper.sweep()
    assert len(world.messages()) == 4


def test_lost_evaluations_are_ended_while_publishing_rests(world: World, broker: Broken) -> None:
    world.engine.enqueue_many(world.entity(id) for id in range(20))
    claim(world)
    world.engine.enqueue(world.entity("x"), 60)
    broker.break_()
    world.lose_workers()
    assert world.engine.counts("order")["order"] == {"scheduled": 21, "running": 0, "idle": 0, "failed": 0}
    assert world.index.counts("order")[IndexStatus.PARKED] == 21, "none believed to be under way"
    broker.mend()
    world.clock.advance(60)
    world.sweeper().sweep()
    assert len(world.messages()) == 21


# Resyncs -----------------------------------------------------------------------------------------


def sweep_and_run(world: World, sweeper: Sweeper) -> None:
    sweeper.sweep()
    world.run()


@pytest.mark.parametrize("by_setting", [False, True], ids=["by option", "by setting"])
def test_resync_every(make_world: Callable[..., World], truth: Truth, by_setting: bool) -> None:
    world = make_world(**({"goalstate_resync_every": 600} if by_setting else {}))
    host = world.register("host", queue=world.app.main, **({} if by_setting else {"resync_every": 600}))
    assert "host.resync" in world.engine.kinds
    assert ("order.resync" in world.engine.kinds) is by_setting
    truth.set("1", truth.reach)
    truth.set("2", truth.reach)
    sweeper = world.sweeper()
    sweeper.sweep()
    world.run()
    assert world.engine.is_scheduled(host("1")), "spread over the period"
    for _ in range(62):
        world.clock.advance(10)
        sweep_and_run(world, sweeper)
    assert getattr(world.engine.describe(host("1")), "converged", None)
    assert truth.states == {"1": "new", "2": "new"}

    truth.set("3", truth.reach)
    for _ in range(125):
        world.clock.advance(10)
        sweep_and_run(world, sweeper)
    assert truth.states["3"] == "new"


def test_a_resync_is_one_at_a_time_and_returns_after_a_loss_of_the_index(world: World, truth: Truth) -> None:
    world.register("host", resync_every=600)
    sweepers = [world.sweeper(name) for name in "abc"]
    for sweeper in sweepers:
        sweeper.sweep()
    [message] = world.messages()
    assert message.task == "goalstate.host.resync"
    assert message.headers["kwargsrepr"] == "{'entity': 'host.resync/all'}"
    world.run(message)
    world.index._kinds.clear()
    world.clock.advance(60)
    for sweeper in sweepers:
        sweeper.sweep()
    assert [message.task for message in world.messages()] == ["goalstate.host.resync"]


def test_a_resync_that_fails_is_tried_for_ever(
    make_world: Callable[..., World], truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(goalstate_max_failures=2, goalstate_jitter=False)
    host = world.register("host", resync_every=600, soft_time_limit=1, time_limit=2)
    failing = [ConnectionError("no database"), PermanentError("no table"), ConnectionError("no database")]
    found = host.iter_unconverged

    def iter_unconverged() -> Any:
        if failing:
            raise failing.pop()
        return found()

    monkeypatch.setattr(host, "iter_unconverged", iter_unconverged)
    assert world.app.tasks["goalstate.host.resync"].soft_time_limit is None, "that of an evaluation"
    truth.set("1", truth.reach)
    sweeper = world.sweeper()
    for _ in range(200):
        sweep_and_run(world, sweeper)
        world.clock.advance(10)
    assert not failing
    assert truth.states["1"] == "new"


def test_a_standing_entity_is_scheduled_as_soon_as_the_index_answers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.register("host", resync_every=600)
    sweeper = world.sweeper()

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise IndexUnavailable

    with monkeypatch.context() as away:
        away.setattr(world.index, "enqueue", unavailable)
        sweeper.sweep()
        assert list(sweeper.problems) == ["the resync of host.resync"]
    world.clock.advance(1)
    sweeper.sweep()
    assert len(world.messages()) == 1


def test_the_sweeper_runs_none_of_the_users_code(
    world: World, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.register("host", resync_every=600)

    def forbidden(*args: Any) -> Any:
        raise AssertionError("the sweeper called into an entity")

    for name in ("iter_unconverged", "from_id"):
        monkeypatch.setattr(world.entity, name, forbidden)
    world.engine.enqueue(world.engine.ref("order", "1"))
    claim(world)
    world.clock.advance(31)
    world.sweeper().sweep()


def test_a_quarantined_entity_is_left_alone(
    world: World, truth: Truth, caplog: pytest.LogCaptureFixture
) -> None:
    truth.set("1", _fail(PermanentError()))
    world.engine.enqueue(world.entity("1"))
    world.run()
    caplog.set_level(logging.WARNING, "celery_goalstate")
    for _ in range(10):
        world.clock.advance(1e6)
        world.sweeper().sweep()
    assert look(world).status == "failed"
    assert world.messages() == []


# Trouble in one place ----------------------------------------------------------------------------


class Looks:
    """A router that fails for one kind, as the one that it looks for in vain."""

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error

    def __call__(self, name: str, *_: Any, **__: Any) -> None:
        if self.error and name == "goalstate.order":
            raise self.error


@pytest.mark.parametrize(
    "error",
    [LookupError("no such route"), ConnectionRefusedError("no database"), TimeoutError("slow database")],
    ids=repr,
)
def test_a_router_that_fails_for_one_kind_is_told_once_and_delays_no_other(
    make_world: Callable[..., World], truth: Truth, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    caplog.set_level(logging.INFO, "celery_goalstate")
    router = Looks(error)
    world = make_world(task_routes=[router])
    cart, sweeper = world.register("cart"), world.sweeper()  # which is swept after `order`
    world.engine.enqueue(world.entity("1"), 40)
    caplog.clear()
    for n in range(10):
        world.engine.enqueue(cart(n), 31)
        world.clock.advance(31)
        sweep_and_run(world, sweeper)
        assert truth.looks(str(n), kind="cart") == 1
    [told] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert told.message.startswith("the messages of order cannot be published")
    assert str(error) in told.message
    router.error = None
    world.clock.advance(LONGEST_REST)
    sweep_and_run(world, sweeper)
    assert truth.looks("1") == 1
    assert "the sweeper works again for the messages of order" in caplog.text


def test_a_resync_and_a_lost_worker_wait_for_no_kind_that_is_refused(
    make_world: Callable[..., World], truth: Truth
) -> None:
    world = make_world(task_routes=[Looks(LookupError("no such route"))], goalstate_jitter=False)
    world.register("host", resync_every=600)
    cart = world.register("cart")
    world.engine.enqueue(cart("1"))
    claim(world, "cart")
    world.engine.enqueue(world.entity("1"))
    world.lose_workers()
    assert {message.task for message in world.messages()} == {"goalstate.cart", "goalstate.host.resync"}
    described = world.engine.describe(cart("1"))
    assert described is not None
    assert (described.status, described.failures) == ("scheduled", 1)


def test_what_fails_for_one_kind_spares_the_others_and_is_told_once(
    world: World, truth: Truth, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "celery_goalstate")
    world.register("cart")  # which is swept after `order`
    world.engine.enqueue(world.entity("1"), 40)
    world.engine.enqueue(world.engine.ref("cart", "1"), 40)
    world.clock.advance(40)
    sweeper, promote = world.sweeper(), world.index.promote

    def broken(kind: str, requests: Any) -> Any:
        if kind == "order":
            raise RuntimeError("a mistake")
        return promote(kind, requests)

    with monkeypatch.context() as by_a_mistake:
        by_a_mistake.setattr(world.index, "promote", broken)
        for _ in range(3):
            sweeper.sweep()
    world.run()
    assert truth.looks("1", kind="cart") == 1
    assert truth.looks("1") == 0
    assert caplog.text.count("the sweep of order (shard 0) failed; it is tried again") == 1
    sweeper.sweep()
    assert "the sweeper works again for order (shard 0)" in caplog.text
    world.run()
    assert truth.looks("1") == 1


def test_a_shard_that_does_not_answer_spares_the_others_and_is_told_once(
    world: World, truth: Truth, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "celery_goalstate")
    world.register("cart")
    world.engine.enqueue(world.engine.ref("cart", "1"), 40)
    world.clock.advance(40)
    sweeper, survey = world.sweeper(), world.index.survey

    def half(kinds: Any, **options: Any) -> Any:
        found = survey(kinds, **options)
        return [Survey("order", 0, error=IndexUnavailable(f"call {next(calls)}")), *found[1:]]

    calls = itertools.count()
    with monkeypatch.context() as half_away:
        half_away.setattr(world.index, "survey", half)
        for _ in range(3):
            sweeper.sweep()
    world.run()
    assert truth.looks("1", kind="cart") == 1
    assert caplog.text.count("the sweeper waits for the index of order (shard 0): call 1") == 1
    assert caplog.text.count("waits for the index") == 1
    sweeper.sweep()
    assert "the sweeper works again for order (shard 0)" in caplog.text


@pytest.mark.parametrize(("seconds", "asked"), [(5, 1), (0, 2)])
def test_an_index_that_falls_silent_in_the_midst_of_a_sweep_ends_it(
    world: World, truth: Truth, monkeypatch: pytest.MonkeyPatch, seconds: float, asked: int
) -> None:
    """Each question would cost the time-out; but one that is refused at once is in nobody's way."""
    world.register("cart")
    for kind in ("order", "cart"):
        world.engine.enqueue(world.engine.ref(kind, "1"), 40)
    world.clock.advance(40)
    sweeper, calls = world.sweeper(), []

    def silent(kind: str, requests: Any) -> Any:
        calls.append(kind)
        world.clock.advance(seconds)
        raise IndexUnavailable("silence")

    with monkeypatch.context() as away:
        away.setattr(world.index, "promote", silent)
        sweeper.sweep()
    assert len(calls) == asked
    assert set(sweeper.problems) == {"order (shard 0)", "cart (shard 0)"}
    sweeper.sweep()
    assert not sweeper.problems
    world.run()
    assert truth.looks("1") == truth.looks("1", kind="cart") == 1


def test_nothing_more_is_asked_of_a_node_that_does_not_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question would cost the time-out, in the loop of a worker."""
    world.register("host", resync_every=600)
    sweeper, survey = world.sweeper(), world.index.survey
    asked: list[str] = []

    def half(kinds: Any, **options: Any) -> Any:
        found = survey(kinds, **options)
        gone = {"host", "host.resync"}
        return [
            *(each for each in found if each.kind not in gone),
            *(Survey(kind, 0, error=IndexUnavailable("silence")) for kind in gone),
        ]

    def spy(name: str) -> Any:
        method = getattr(world.index, name)

        def call(kinds: Any, *args: Any, **kwargs: Any) -> Any:
            asked.extend([kinds] if isinstance(kinds, str) else kinds)
            return method(kinds, *args, **kwargs)

        return call

    for name in ("note", "enqueue", "promote", "resend", "finish", "forget"):
        monkeypatch.setattr(world.index, name, spy(name))
    with monkeypatch.context() as away:
        away.setattr(world.index, "survey", half)
        for _ in range(3):
            sweeper.sweep()
            world.clock.advance(100)
    assert set(asked) == {"order"}
    sweeper.sweep()
    assert {"host", "host.resync"} <= set(asked)
