"""Entities that share a task: one that is slow, or kills its process, is no harm to the others."""

from __future__ import annotations

from tests.acceptance.conftest import Lane, Scene
from tests.servers import poll


def at_rest(scene: Scene, ids: list[str]) -> bool:
    """Whether all of these are idle, at their goal, without a failure."""
    described = scene.engine.describe_many(map(scene.things.Small, ids))
    return all(
        each is not None and (each.status, each.converged, each.failures) == ("idle", True, 0)
        for each in described
    )


# Pools whose evaluations die together, however alone each is with its message.
SHARED_PROCESS = {"threads", "gevent"}


def one_that_kills_its_neighbours_too(scene: Scene, poison: str, ids: list[str]) -> None:
    """Some that run beside it whenever it dies may end in quarantine with it; once resumed, they are well."""

    def settled() -> bool:
        described = scene.engine.describe_many(map(scene.things.Small, [poison, *ids]))
        return all(
            each is not None and (each.status == "failed" or (each.status, each.converged) == ("idle", True))
            for each in described
        )

    poll("all are at rest", settled, timeout=60)
    quarantined = {record.id: record for record in scene.engine.list("small", status="failed")}
    assert all((each.error or "").startswith("WorkerLost") for each in quarantined.values())
    assert quarantined.pop(poison).failures == 2
    for id in quarantined:
        scene.things.enqueue_all([id])
    poll("all others are at rest", lambda: at_rest(scene, ids), timeout=30)
    assert {(v.kind, v.entity) for v in scene.violations()} <= {("lost", poison)}


def test_one_that_kills_its_process_is_found(scene: Scene, lane: Lane) -> None:
    """Nobody can tell at first which of a batch it was; so each is looked at alone, and it is the one."""
    ids = [scene.id(number) for number in range(16)]
    poison = ids.pop(7)
    scene.world.script(poison, "die:99")
    scene.things.enqueue_all([*ids[:7], poison, *ids[7:]])
    if lane.pool in SHARED_PROCESS:
        one_that_kills_its_neighbours_too(scene, poison, ids)
        return
    poll("all others are at rest", lambda: at_rest(scene, ids), timeout=30)
    poll("it is in quarantine", lambda: scene.engine.list("small", status="failed"), timeout=30)
    [quarantined] = scene.engine.list("small", status="failed")
    assert (quarantined.id, quarantined.failures) == (poison, 2)
    assert (quarantined.error or "").startswith("WorkerLost")
    assert len(scene.looks(poison)) == 3, "with the batch, then alone, twice"
    assert all(1 <= len(scene.looks(id)) <= 2 for id in ids)
    assert {line.fields["failures"] for line in scene.lines("start") if line.entity != poison} == {0}
    [violation] = scene.violations()
    assert (violation.kind, violation.entity) == ("lost", poison), "its last death has no sequel: quarantine"


def test_a_slow_one_holds_nobody_back(scene: Scene) -> None:
    ids = [scene.id(number) for number in range(16)]
    slow = ids.pop(4)
    scene.world.script(slow, f"hold:{scene.name}", "reach")
    try:
        scene.things.enqueue_all([*ids[:4], slow, *ids[4:]])
        poll("all others are at rest", lambda: at_rest(scene, ids), timeout=20)
        [described] = scene.engine.describe_many([scene.things.Small(slow)])
        assert described is not None
        assert described.status == "running"
    finally:
        scene.world.open(scene.name)
    poll("it is at rest too", lambda: at_rest(scene, [slow]))
    assert [len(scene.looks(id)) for id in [*ids, slow]] == [1] * 16
    assert scene.violations() == []
