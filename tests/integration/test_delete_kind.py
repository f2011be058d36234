"""A whole kind is deleted while it works: on a real index, and on a live worker."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from celery_goalstate import Engine, Entity, Requeue
from celery_goalstate.exceptions import IndexUnavailable
from celery_goalstate.index.base import Claim, DeletedAll, Report, Verdict
from tests.integration.conftest import MakeApp, World, is_empty, worker_of
from tests.servers import Valkey, poll

ENTITIES = 60


@pytest.fixture
def engine(make_app: MakeApp, valkey: Valkey) -> Engine:
    return Engine(make_app(goalstate_index_url=valkey.url))


def keys(valkey: Valkey) -> set[str]:
    with valkey.client() as client:
        return {key.rpartition(":")[2] for key in client.scan_iter()}


def test_none_of_those_that_poll_on_a_live_worker_is_left(engine: Engine) -> None:
    """They are sent, claimed and scheduled again hundreds of times a second."""
    looks = 0

    def again(ctx: Any, entity: Any) -> Requeue:
        nonlocal looks
        looks += 1
        return Requeue(0)

    @engine.register(converge=False)
    class Polling(Entity):
        def get_state(self) -> str:
            return "old"

        def get_goal_state(self) -> str:
            return "new"

        def get_action_list(self, state: Any, goal_state: Any) -> Any:
            return [again]

    index = engine.parts.index
    with worker_of(engine.app, pool="threads", concurrency=4):
        for _ in range(5):
            before = looks
            engine.enqueue_many(Polling(n) for n in range(ENTITIES))
            poll("all are at it", lambda before=before: looks > before + 2 * ENTITIES, timeout=60)
            assert engine.delete_kind("polling") == ENTITIES
            poll("those under way have ended", lambda: is_empty(index, "polling"), timeout=30)
            ended = looks
            assert engine.describe_many(Polling(n) for n in range(ENTITIES)) == [None] * ENTITIES
            assert looks == ended, "nothing follows"


def test_thousands_that_run(engine: Engine) -> None:
    engine.declare("order")
    ids = [str(n) for n in range(2_500)]
    engine.enqueue_many(engine.ref("order", id) for id in ids)
    index = engine.parts.index
    pairs = [(record.id, record.token) for record in index.describe("order", ids) if record]
    claims = index.claim("order", pairs, nonce="n", task_id="t")
    assert engine.delete_kind("order") == 2_500
    reports = [
        Report(claim.id, claim.lease, Verdict.FAILED, 0) for claim in claims if isinstance(claim, Claim)
    ]
    assert len(reports) == 2_500
    assert {finished.deadline for finished in index.finish("order", reports)} == {None}
    assert is_empty(index, "order")


def test_what_others_enqueue_meanwhile_lives(engine: Engine) -> None:
    """Whatever of it was there before: the last word is theirs."""
    engine.declare("order")
    ids = [str(n) for n in range(1_000)]
    engine.enqueue_many((engine.ref("order", id) for id in ids), 3600)
    may_end = threading.Event()
    enqueued: list[str] = []

    def producer() -> None:
        for n in range(10**6):
            id = str(n % 1_500)
            engine.enqueue(engine.ref("order", id), 3600)
            enqueued.append(id)
            if may_end.is_set():
                return

    index: Any = engine.parts.index
    meet_all = index._meet_all

    def after_the_moment(*shard: Any) -> Any:
        enqueued.clear()
        return meet_all(*shard)

    index._meet_all = after_the_moment
    thread = threading.Thread(target=producer)
    thread.start()
    try:
        poll("it enqueues", lambda: len(enqueued) > 10)
        engine.delete_kind("order")
    finally:
        may_end.set()
        thread.join()
    # One enqueue may have been before the moment, and be noted here after it.
    lives = engine.describe_many(engine.ref("order", id) for id in enqueued[1:])
    assert len(lives) > 1
    assert all(lives)


def test_nothing_of_it_is_left(engine: Engine, valkey: Valkey) -> None:
    engine.declare("order", queue="elsewhere")
    engine.enqueue(engine.ref("order", "1"), 3600)
    assert engine.delete_kind("order") == 1
    assert keys(valkey) == {"token"}
    assert engine.delete_kind("order") == 0
    assert engine.foreign_kinds() == []
    engine.enqueue(engine.ref("order", "1"), 3600)
    assert engine.parts.index.kinds() == ["order"]


def test_then_it_may_come_back_in_another_number_of_shards(
    engine: Engine, make_app: MakeApp, valkey: Valkey
) -> None:
    engine.declare("order")
    engine.enqueue(engine.ref("order", "1"))
    other = Engine(make_app(goalstate_index_url=valkey.url, goalstate_shards=4))
    other.declare("order")
    assert other.delete_kind("order") == 1
    other.enqueue(other.ref("order", "1"))
    assert other.is_scheduled(other.ref("order", "1"))


def test_a_shard_that_is_away_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.engine.enqueue(world.entity("1"), 3600)
    away = DeletedAll(7, (), {1: IndexUnavailable("it is away"), 3: IndexUnavailable("it, too")})
    monkeypatch.setattr(world.index, "delete_all", lambda kind: away)
    with pytest.raises(
        IndexUnavailable, match=r"7 entities of kind 'order' .*\(1, 3\).* it is away"
    ) as raised:
        world.engine.delete_kind("order")
    assert raised.value.left == (1, 3)
    assert world.index.kinds() == ["order"], "it is kept until all are done"
    assert IndexUnavailable("elsewhere").left == ()
