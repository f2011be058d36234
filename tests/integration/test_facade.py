"""Many at once, lists and counts, resync, pause: the rest of the engine's public face."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from celery_goalstate import Entity, Rules, Status
from celery_goalstate.exceptions import ImproperlyConfigured, PermanentError, UnknownKind
from celery_goalstate.index.base import Limits
from celery_goalstate.index.memory import MemoryIndex
from celery_goalstate.scheduling import BATCH
from celery_goalstate.settings import KindOptions
from tests.integration.conftest import NOW, MakeApp, Truth, World, engine_of_others, is_empty


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(NOW + seconds, UTC)


def fail_for_good(ctx: Any, entity: Any) -> None:
    raise PermanentError("no such host")


# Many --------------------------------------------------------------------------------------------


def test_enqueue_many_takes_a_generator_of_mixed_kinds_with_duplicates(world: World, truth: Truth) -> None:
    host = world.register("host")
    world.engine.declare("unknown_here")

    def entities() -> Iterator[Any]:
        yield world.entity("1")
        yield host("1")
        yield world.engine.ref("order", "2")
        yield world.entity("1")
        yield world.engine.ref("unknown_here", "1")

    assert world.engine.enqueue_many(entities()) == 4
    assert world.engine.enqueue_many(entities()) == 0
    world.run(*[message for message in world.messages() if "unknown" not in message.task])
    assert sorted(truth.log) == [("host", "1"), ("order", "1"), ("order", "2")]


def test_enqueue_many_in_more_than_one_batch(world: World, truth: Truth) -> None:
    count = BATCH + 5
    assert world.engine.enqueue_many((world.entity(id) for id in range(count)), 60) == count
    assert world.engine.counts()["order"][Status.SCHEDULED] == count
    assert world.engine.delete_many(world.entity(id) for id in range(count + 10)) == count
    assert is_empty(world.index, "order")


def test_enqueue_many_of_nothing(world: World) -> None:
    assert world.engine.enqueue_many([]) == 0
    assert world.engine.delete_many([]) == 0
    assert world.engine.describe_many([]) == []


@pytest.mark.parametrize("deadline", [None, 100, timedelta(seconds=100), at(100)], ids=repr)
@pytest.mark.parametrize("spread", [600, timedelta(minutes=10)], ids=repr)
def test_spread(world: World, deadline: Any, spread: Any) -> None:
    world.engine.enqueue_many((world.entity(id) for id in range(300)), deadline, spread=spread)
    found = world.engine.describe_many(world.entity(id) for id in range(300))
    offsets = [each.deadline.timestamp() - NOW - (100 if deadline else 0) for each in found]
    assert min(offsets) >= 0
    assert max(offsets) <= 600
    assert max(offsets) - min(offsets) > 400, "all over it"
    assert len({round(offset, 2) for offset in offsets}) > 250


def test_enqueue_many_replaces_and_takes_celerys_words(world: World) -> None:
    world.engine.enqueue_many([world.entity("1")], countdown=100)
    assert world.engine.enqueue_many([world.entity("1")], eta=at(200), replace=True, max_wait=150) == 1
    [described] = world.engine.describe_many([world.entity("1")])
    assert described is not None
    assert described.deadline == at(150)


def test_describe_many_keeps_the_order(world: World) -> None:
    host = world.register("host")
    world.engine.enqueue_many([world.entity("2"), host("1"), world.entity("1")], 60)
    asked = [host("1"), world.entity("9"), world.entity("1"), world.entity("2"), host("1"), host("2")]
    found = world.engine.describe_many(entity for entity in asked)
    assert [each and (each.kind, each.id) for each in found] == [
        ("host", "1"),
        None,
        ("order", "1"),
        ("order", "2"),
        ("host", "1"),
        None,
    ]


def test_delete_many_counts_what_was_there(world: World) -> None:
    host = world.register("host")
    world.engine.enqueue_many([world.entity("1"), host("1")], 60)
    asked = [host("1"), world.entity("1"), world.entity("9"), host("1")]
    assert world.engine.delete_many(asked) == 2
    assert world.engine.describe_many(asked) == [None] * 4


# Lists and counts --------------------------------------------------------------------------------


@pytest.fixture
def crowd(world: World, truth: Truth) -> World:
    """One running, one idle, two quarantined, one parked, two sent."""
    truth.set("failed-2", fail_for_good)
    truth.set("failed-1", fail_for_good)
    world.engine.enqueue(world.entity("idle"))
    world.engine.enqueue(world.entity("failed-2"))
    world.run()
    world.clock.advance(5)
    world.engine.enqueue(world.entity("failed-1"))
    world.run()
    world.engine.enqueue(world.entity("running"))
    [message] = world.messages()
    world.index.claim("order", [tuple(message.args[0][0])], nonce="n", task_id=message.id)
    world.engine.enqueue(world.entity("parked"), 100)
    world.engine.enqueue(world.entity("sent-2"), 20)
    world.engine.enqueue(world.entity("sent-1"), 10)
    return world


@pytest.mark.parametrize(
    ("status", "ids"),
    [
        ("scheduled", ["sent-1", "sent-2", "parked"]),
        (Status.RUNNING, ["running"]),
        ("idle", ["idle"]),
        ("failed", ["failed-2", "failed-1"]),
    ],
)
def test_a_list_of_one_status_begins_with_what_is_due_first(
    crowd: World, status: str, ids: list[str]
) -> None:
    assert [each.id for each in crowd.engine.list("order", status)] == ids
    assert [each.id for each in crowd.engine.list(crowd.entity, status=status, limit=1)] == ids[:1]
    assert {each.status for each in crowd.engine.list("order", status)} == {status}


def test_next_is_what_is_not_due_yet(crowd: World) -> None:
    crowd.clock.advance(10)
    parts = dataclasses.replace(crowd.engine.parts, now=lambda: datetime.fromtimestamp(crowd.clock.now, UTC))
    with crowd.engine.opened_with(parts):
        overdue, coming = (crowd.engine.list("order", each) for each in ("overdue", "next"))
        [last] = crowd.engine.list("order", "next", 1, coming[0].cursor)
    assert [each.id for each in overdue] == ["sent-1"]
    assert [each.id for each in coming] == ["sent-2", "parked"]
    assert last == coming[1]


def test_a_list_of_all(crowd: World) -> None:
    everybody = {"sent-1", "sent-2", "parked", "running", "idle", "failed-1", "failed-2"}
    assert {each.id for each in crowd.engine.list("order")} == everybody
    assert len(crowd.engine.list("order", limit=3)) == 3
    with pytest.raises(UnknownKind, match="never_heard_of"):
        crowd.engine.list("never_heard_of")


@pytest.mark.parametrize("status", [None, *Status])
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_pages(crowd: World, status: Status | None, size: int) -> None:
    everything = crowd.engine.list("order", status, limit=1000)
    found, after = [], None
    while page := crowd.engine.list("order", status, size, after):
        assert len(page) <= size
        found += page
        after = page[-1].cursor
    assert found == everything
    assert len(found) == (7 if status is None else crowd.engine.counts()["order"][status])


def test_a_page_goes_on_when_the_last_one_is_gone(crowd: World) -> None:
    [first] = crowd.engine.list("order", "scheduled", limit=1)
    crowd.engine.delete(crowd.entity(first.id))
    assert [each.id for each in crowd.engine.list("order", "scheduled", after=first.cursor)] == [
        *("sent-2", "parked")
    ]


def test_counts(crowd: World) -> None:
    crowd.register("host")
    counts = {Status.SCHEDULED: 3, Status.RUNNING: 1, Status.IDLE: 1, Status.FAILED: 2}
    assert crowd.engine.counts() == {"order": counts, "host": dict.fromkeys(Status, 0)}
    assert crowd.engine.counts("order") == crowd.engine.counts(crowd.entity) == {"order": counts}
    assert crowd.engine.counts("order")["order"]["failed"] == 2


def test_orphans_are_what_no_class_is_registered_for(crowd: World) -> None:
    assert crowd.engine.orphans() == {}
    others = engine_of_others(crowd.engine, "removed", "empty")
    others.enqueue_many([others.ref("removed", "1"), others.ref("removed", "2")], 100)
    others.enqueue(others.ref("empty", "1"))
    others.delete(others.ref("empty", "1"))
    assert crowd.engine.orphans() == {"removed": dict.fromkeys(Status, 0) | {Status.SCHEDULED: 2}}
    crowd.register("removed")
    assert crowd.engine.orphans() == {}


def test_delete_kind_forgets_all_of_one_kind(crowd: World) -> None:
    engine_of_others(crowd.engine, "host").enqueue(crowd.engine.ref("host", "1"))
    assert crowd.engine.delete_kind("order") == 7
    assert crowd.engine.list("order") == []
    assert crowd.engine.counts("order")["order"] == dict.fromkeys(Status, 0) | {Status.RUNNING: 1}
    assert crowd.engine.delete_kind(crowd.entity) == 0
    with pytest.raises(UnknownKind, match="never_heard_of"):
        crowd.engine.delete_kind("never_heard_of")
    assert crowd.engine.is_scheduled(crowd.engine.ref("host", "1"))


def test_delete_kind_ends_what_a_lost_worker_was_about(crowd: World) -> None:
    assert crowd.engine.delete_kind("order") == 7
    crowd.lose_workers()
    assert is_empty(crowd.index, "order")


def test_a_description(crowd: World) -> None:
    [running] = crowd.engine.list("order", "running")
    assert running.started == at(5)
    assert running.lease_expires == at(38)
    assert running.fencing_token
    assert (running.deadline, running.sent, running.failures, running.error) == (None, False, 0, None)
    [idle] = crowd.engine.list("order", "idle")
    assert (idle.converged, idle.finished, idle.quarantined) == (True, at(0), None)
    assert idle.task_id
    [failed, _] = crowd.engine.list("order", "failed")
    assert (failed.quarantined, failed.error) == (at(0), "PermanentError: no such host")
    [sent, *_] = crowd.engine.list("order", "scheduled")
    assert (sent.sent, sent.deadline) == (True, at(15))


def test_is_scheduled(crowd: World) -> None:
    scheduled = {
        id: crowd.engine.is_scheduled(crowd.entity(id))
        for id in ("sent-1", "parked", "running", "idle", "failed-1", "unknown")
    }
    assert [id for id, is_so in scheduled.items() if is_so] == ["sent-1", "parked"]
    crowd.engine.enqueue(crowd.entity("running"), 50)
    assert crowd.engine.is_scheduled(crowd.entity("running"))


# Resync ------------------------------------------------------------------------------------------


def test_resync_enqueues_what_is_unconverged(world: World, truth: Truth) -> None:
    for id in ("1", "2"):
        truth.set(id, truth.reach)
    truth.set("3", state="new")
    assert world.engine.resync("order") == 2
    assert world.engine.resync(world.entity) == 0, "they are scheduled already"
    world.run()
    assert truth.states == {"1": "new", "2": "new", "3": "new"}
    assert world.engine.resync("order") == 0


def test_resync_respects_deadline_back_off_and_quarantine(world: World, truth: Truth) -> None:
    def fail(ctx: Any, entity: Any) -> None:
        raise ConnectionError

    truth.set("later")
    world.engine.enqueue(world.entity("later"), 100)
    truth.set("failing", fail)
    truth.set("quarantined", fail_for_good)
    truth.set("running")
    truth.set("idle")
    world.engine.enqueue_many(world.entity(id) for id in ("failing", "quarantined", "idle"))
    world.run()
    world.messages()
    world.engine.enqueue(world.entity("running"))
    [message] = world.messages()
    world.index.claim("order", [tuple(message.args[0][0])], nonce="n", task_id=message.id)

    before = {each.id: each for each in world.engine.list("order")}
    assert world.engine.resync("order") == 1
    after = {each.id: each for each in world.engine.list("order")}
    changed = {id for id, each in after.items() if each != before.get(id)}
    assert changed == {"idle"}

    assert world.engine.resync("order", revive=True) == 1
    described = world.engine.describe(world.entity("quarantined"))
    assert described is not None
    assert (described.status, described.failures) == ("scheduled", 0)


def test_resync_spreads(world: World, truth: Truth) -> None:
    for id in range(100):
        truth.set(str(id))
    assert world.engine.resync("order", spread=timedelta(hours=1)) == 100
    deadlines = [each.deadline for each in world.engine.list("order")]
    assert max(deadlines) - min(deadlines) > timedelta(minutes=30)


def test_resync_takes_ints_and_many_of_them(world: World) -> None:
    class Row(Entity):
        rules = Rules({})

        @classmethod
        def iter_unconverged(cls) -> Iterator[int]:
            yield from range(2 * BATCH + 1)

    world.engine.register(Row)
    assert world.engine.resync(Row) == 2 * BATCH + 1


def test_ids_that_are_uuids(world: World) -> None:
    """As Django has them, with `values_list("pk")` of a model whose key is one."""
    keys = [uuid.uuid4() for _ in range(4)]

    class Asset(Entity):
        rules = Rules({})

        @classmethod
        def iter_unconverged(cls) -> Iterator[uuid.UUID]:
            return iter(keys)

    class Row(Asset):
        kind = "row"

        def __init__(self, key: uuid.UUID) -> None:
            self.key = key

        def get_id(self) -> Any:
            return self.key

    engine = world.engine
    for kind in (Asset, Row):
        engine.register(kind)
        assert engine.enqueue(kind(keys[0])).changed
        assert not engine.enqueue(engine.ref(kind.kind, str(keys[0]))).changed
        assert engine.enqueue_many(engine.ref(kind.kind, key) for key in keys[:2]) == 1
        assert engine.resync(kind) == 2
        assert {each.id for each in engine.list(kind)} == set(map(str, keys))
        assert engine.is_scheduled(kind(keys[3]))
        assert engine.delete_many(map(kind, keys)) == 4


def test_resync_of_ids_that_cannot_be(world: World) -> None:
    class Row(Entity):
        rules = Rules({})

        @classmethod
        def iter_unconverged(cls) -> Any:
            return ["1", None]

    world.engine.register(Row)
    with pytest.raises(TypeError, match=r"an entity's id is None"):
        world.engine.resync("row")
    assert is_empty(world.index, "row")


# References --------------------------------------------------------------------------------------


def test_a_reference_needs_no_class(world: World, truth: Truth, make_app: MakeApp) -> None:
    """A process that knows no entity class, only a name and where its messages go."""
    enqueue_only = World(make_app(), Truth())
    enqueue_only.engine.declare("host")
    ref = enqueue_only.engine.ref("host", 42)
    assert str(ref) == "host/42"
    assert enqueue_only.engine.enqueue(ref).sent
    [message] = enqueue_only.messages()
    assert message.task == "goalstate.host"
    assert enqueue_only.engine.is_scheduled(ref)
    assert [each.id for each in enqueue_only.engine.list("host")] == ["42"]
    enqueue_only.engine.pause("host")
    assert enqueue_only.engine.paused("host")
    assert enqueue_only.engine.delete(ref)
    with pytest.raises(ImproperlyConfigured, match="host cannot be resynced here"):
        enqueue_only.engine.resync("host")


# Pause -------------------------------------------------------------------------------------------


def test_pause_is_by_kind_and_by_engine(world: World, truth: Truth) -> None:
    host = world.register("host")
    world.engine.pause(host)
    assert (world.engine.paused("host"), world.engine.paused(world.entity)) == (True, False)
    world.engine.enqueue_many([host("1"), world.entity("1")])
    world.run()
    assert truth.log == [("order", "1")]
    world.engine.stop()
    world.engine.enqueue(world.entity("2"))
    assert world.messages() == []
    assert world.engine.is_scheduled(world.entity("2"))
    world.engine.resume("host")
    assert (world.engine.paused("host"), world.engine.paused("order")) == (False, True)
    world.engine.start()
    world.sweeper().sweep()
    world.run()
    assert sorted(truth.log) == [("host", "1"), ("order", "1"), ("order", "2")]


def test_an_evaluation_under_way_finishes_while_paused(world: World, truth: Truth) -> None:
    def pause(ctx: Any, entity: Any) -> None:
        world.engine.pause()
        truth.reach(ctx, entity)

    truth.set("1", pause)
    world.engine.enqueue(world.entity("1"))
    world.run()
    described = world.engine.describe(world.entity("1"))
    assert described is not None
    assert described.converged


# Hooks -------------------------------------------------------------------------------------------


def test_a_hook_sees_each_enqueue_before_the_index_is_asked(world: World) -> None:
    host, seen = world.register("host"), []

    @world.engine.before_enqueue
    def hook(kind: str, ids: Any) -> None:
        seen.append((kind, list(ids), world.index.describe(kind, list(ids))))

    world.engine.enqueue(world.entity("1"))
    world.engine.enqueue_many([world.entity("2"), host("3"), world.entity("4")])
    later = world.engine.prepare(host("5"))
    assert seen == [
        ("order", ["1"], [None]),
        ("order", ["2", "4"], [None, None]),
        ("host", ["3"], [None]),
    ]
    later()
    assert seen[-1] == ("host", ["5"], [None])


def test_what_a_hook_raises_reaches_the_caller_and_nothing_is_written(world: World) -> None:
    @world.engine.before_enqueue
    def refuse(kind: str, ids: Any) -> None:
        raise PermissionError(f"no {kind} today")

    for call in (world.engine.enqueue, lambda entity: world.engine.enqueue_many([entity])):
        with pytest.raises(PermissionError, match="no order today"):
            call(world.entity("1"))
    assert is_empty(world.index, "order")


def test_hooks_surround_each_evaluation_and_each_action(world: World, truth: Truth) -> None:
    entered: list[str] = []

    @world.engine.around_evaluation
    @contextmanager
    def evaluation(evaluation: Any) -> Iterator[None]:
        entered.append(str(evaluation.ref))
        yield

    @world.engine.around_action
    @contextmanager
    def action(ctx: Any, action: Any) -> Iterator[None]:
        entered.append(action.name)
        yield

    truth.set("1", truth.reach)
    world.engine.enqueue(world.entity("1"))
    world.run()
    assert entered == ["order/1", "reach"]


def test_other_parts_for_a_while(world: World) -> None:
    before, settings = world.engine.parts, world.engine.settings
    other = dataclasses.replace(before, index=MemoryIndex(Limits(), clock=world.clock.milliseconds))
    others = dataclasses.replace(settings, kind=KindOptions(max_failures=1))
    with suppress(KeyError), world.engine.opened_with(other, others):
        world.engine.enqueue(world.entity("1"))
        assert world.engine.kind("order").options.max_failures == 1
        raise KeyError
    assert world.engine.parts is before
    assert world.engine.settings is settings
    assert world.engine.kind("order").options.max_failures is None
    assert not world.engine.is_scheduled(world.entity("1"))
