"""What a worker lets the index count: each evaluation, how late it was, and what its actions took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from celery_goalstate import Entity, Requeue
from celery_goalstate.exceptions import EntityGone, PermanentError
from celery_goalstate.index.counters import Histogram, Metrics
from tests.integration.conftest import World


def metrics(world: World, kind: str = "order") -> Metrics:
    return world.index.metrics([kind])[kind]


def action(world: World, name: str, seconds: float = 0.0, said: Any = None) -> Callable[..., Any]:
    """An action that takes so long, and returns this, or raises it."""

    def execute(ctx: Any, entity: Entity) -> Any:
        world.clock.advance(seconds)
        if isinstance(said, BaseException):
            raise said
        return world.truth.reach(ctx, entity) if said is None else said

    execute.__name__ = name
    return execute


def test_how_late_it_began_and_what_its_actions_took(world: World) -> None:
    world.truth.set("1", action(world, "charge", 0.2), action(world, "ship", 7))
    world.engine.enqueue(world.entity("1"))
    world.clock.advance(0.04)
    world.run()
    found = metrics(world)
    assert found.evaluations == {"converged": 1}
    assert found.lateness == Histogram(Counter({"50": 1}), 40)
    assert found.actions == {
        ("charge", "ok"): Histogram(Counter({"250": 1}), 200),
        ("ship", "ok"): Histogram(Counter({"10000": 1}), 7_000),
    }


def test_by_outcome(world: World) -> None:
    for id, said in (
        ("fails", ConnectionError("no route")),
        ("is quarantined", PermanentError("never")),
        ("waits", Requeue(5)),
        ("is gone", EntityGone()),
    ):
        world.truth.set(id, action(world, "charge", 0.03, said))
        world.engine.enqueue(world.entity(id))
    world.run()
    found = metrics(world)
    assert found.evaluations == {"failed": 1, "quarantined": 1, "requeued": 1, "gone": 1}
    assert found.actions["charge", "failed"] == Histogram(Counter({"50": 3}), 90)
    assert found.actions["charge", "ok"] == Histogram(Counter({"50": 1}), 30)


def test_one_whose_worker_was_killed(world: World) -> None:
    world.truth.set("1", action(world, "charge"))
    world.engine.enqueue(world.entity("1"))
    [message] = world.messages()
    [pair] = message.args[0]
    world.index.claim("order", [tuple(pair)], nonce="of a worker that is killed", task_id=message.id)
    world.lose_workers()
    world.clock.advance(world.engine.settings.kind.failure_retry_delay)
    world.run()
    assert metrics(world).evaluations == {"lost": 1, "converged": 1}
    assert metrics(world).lateness.counts.total() == 1, "only of what was seen to its end"


def test_in_a_batch_each_for_itself(make_world: Callable[..., World]) -> None:
    world = make_world(goalstate_batch_size=10, goalstate_jitter=False)
    for n in range(4):
        world.truth.set(str(n), action(world, "charge", 0.03))
    world.engine.enqueue_many(world.entity(str(n)) for n in range(4))
    world.run()
    assert metrics(world).evaluations == {"converged": 4}
    assert metrics(world).lateness.counts.total() == 4
    assert metrics(world).actions["charge", "ok"] == Histogram(Counter({"50": 4}), 120)


def test_a_name_of_any_length_is_cut(world: World) -> None:
    world.truth.set("1", action(world, "ä" * 100))
    world.engine.enqueue(world.entity("1"))
    world.run()
    assert set(metrics(world).actions) == {("ä" * 30, "ok")}
