"""What the original engine promises, and what enqueue, delete and outcomes mean, on every pool."""

from __future__ import annotations

import pytest

from tests.acceptance.conftest import SETTINGS, Scene
from tests.servers import poll

RETRY_DELAY = SETTINGS["goalstate_failure_retry_delay"]


@pytest.fixture(autouse=True)
def guarantees(scene: Scene):
    """Whatever a test is about, its entities' lines in the ledger must show no broken guarantee."""
    yield
    assert scene.violations() == []


def actions(scene: Scene, id: str = "") -> list[str]:
    """The actions that ran, each with its outcome, in their order."""
    ended = scene.lines("end", id=id or scene.id())
    return [f"{line.fields['action']} {line.fields['outcome']}" for line in ended]


def test_each_entity_is_evaluated_once_however_often_it_is_enqueued(scene: Scene) -> None:
    ids = [scene.id(number) for number in range(20)]
    for id in sorted(ids * 3):  # one after the other: a busy machine must not evaluate it in between
        scene.things.enqueue(id, 1.0)
    for id in ids:
        scene.reached(id)
    scene.settle()
    assert [len(scene.looks(id)) for id in ids] == [1] * len(ids)


def test_an_action_that_fails_three_times_is_tried_until_it_succeeds(scene: Scene) -> None:
    scene.world.script(scene.id(), "fail:3", "reach")
    scene.things.enqueue(scene.id())
    scene.reached(looks=4)
    assert actions(scene) == ["0-fail raised"] * 3 + ["0-fail ok", "1-reach ok"]
    ends = [line.at for line in scene.lines("end") if line.fields["outcome"] == "raised"]
    for n, (end, look) in enumerate(zip(ends, scene.looks()[1:], strict=True)):
        assert look - end >= RETRY_DELAY * 2**n - 0.01  # the delay begins when the failure is noted
    assert scene.engine.describe(scene.things.Thing(scene.id())).failures == 0


def test_actions_after_a_failing_one_wait_for_the_next_evaluation(scene: Scene) -> None:
    scene.world.script(scene.id(), "ok", "fail:1", "reach")
    scene.things.enqueue(scene.id())
    scene.reached(looks=2)
    assert actions(scene) == ["0-ok ok", "1-fail raised", "0-ok ok", "1-fail ok", "2-reach ok"]


def test_an_entity_without_actions_is_looked_at_and_left_alone(scene: Scene) -> None:
    scene.world.script(scene.id())
    scene.things.enqueue(scene.id())
    poll("the entity is idle", lambda: scene.looks() and scene.status() == "idle")
    scene.settle(0.5)
    assert len(scene.looks()) == 1
    assert scene.engine.describe(scene.things.Thing(scene.id())).converged is False


def test_a_later_deadline_changes_nothing(scene: Scene) -> None:
    scene.things.enqueue(scene.id(), 0.5)
    assert not scene.things.enqueue(scene.id(), 600).changed
    scene.reached(timeout=10)
    assert not scene.is_scheduled()


@pytest.mark.parametrize("far", [1.5, 3600], ids=["sent", "parked"])
def test_an_earlier_deadline_moves_the_evaluation_forward(scene: Scene, far: float) -> None:
    scene.things.enqueue(scene.id(), far)
    assert scene.things.enqueue(scene.id(), 0.2).changed
    scene.reached()
    scene.settle(far if far < 5 else 0)  # until the superseded message has come, and was dropped
    assert len(scene.looks()) == 1
    assert not scene.is_scheduled()


@pytest.mark.parametrize("delay", [0.4, 1.4])
def test_a_near_deadline_is_sent_at_once_and_comes_in_time(scene: Scene, delay: float) -> None:
    assert scene.things.enqueue(scene.id(), delay).sent
    scene.reached()
    (look,) = scene.looks()
    (enqueue,) = scene.lines("enqueue")
    assert look - enqueue.at < delay + 1  # never early: see `violations`


def test_a_deadline_beyond_the_horizon_comes_in_time(scene: Scene) -> None:
    delay = SETTINGS["goalstate_eta_horizon"] + 1
    scene.things.enqueue(scene.id(), delay)
    assert scene.is_scheduled()
    scene.reached(timeout=delay + 10)
    (look,) = scene.looks()
    (enqueue,) = scene.lines("enqueue")
    assert look - enqueue.at < delay + 2


def test_a_stopped_engine_evaluates_nothing_and_a_started_one_catches_up(scene: Scene) -> None:
    before = scene.things.enqueue(scene.id(1), 0.5)
    assert before.changed
    scene.engine.stop()
    try:
        scene.things.enqueue(scene.id(2))
        scene.settle(1.0)
        assert scene.lines("look") == []
        assert scene.is_scheduled(scene.id(1))
        assert scene.is_scheduled(scene.id(2))
    finally:
        scene.engine.start()
    scene.reached(scene.id(1))
    scene.reached(scene.id(2))


def test_an_enqueue_during_the_evaluation_leads_to_one_that_starts_after_it(scene: Scene) -> None:
    scene.world.script(scene.id(), "hold:" + scene.name, "reach")
    scene.things.enqueue(scene.id())
    poll("the evaluation has begun", lambda: scene.lines("start"))
    assert scene.status() == "running"
    scene.things.enqueue(scene.id())
    scene.things.enqueue(scene.id())
    assert scene.is_scheduled()
    scene.world.open(scene.name)
    scene.reached(looks=2)
    scene.settle()
    assert len(scene.looks()) == 2
    assert scene.looks()[1] > scene.lines("enqueued")[-1].at


def test_an_evaluation_longer_than_its_lease_keeps_it(scene: Scene) -> None:
    scene.world.script(scene.id(), f"work:{1.5 * SETTINGS['goalstate_lease']}", "reach")
    scene.things.enqueue(scene.id())
    scene.reached()
    assert actions(scene) == ["0-work ok", "1-reach ok"]


def test_a_deleted_entity_is_not_evaluated(scene: Scene) -> None:
    scene.things.enqueue(scene.id(), 0.3)
    assert scene.things.delete(scene.id())
    assert not scene.things.delete(scene.id())
    scene.settle(0.8)
    assert scene.looks() == []
    assert scene.status() is None


def test_delete_and_enqueue_during_a_run_start_a_fresh_life_that_does_not_overlap(scene: Scene) -> None:
    scene.world.script(scene.id(), "hold:" + scene.name, "fail:1", "reach")
    scene.things.enqueue(scene.id())
    poll("the evaluation has begun", lambda: scene.lines("start"))
    assert scene.things.delete(scene.id())
    assert scene.status() is None
    scene.things.enqueue(scene.id())
    scene.world.open(scene.name)
    scene.reached(looks=2)
    assert actions(scene) == ["0-hold ok", "1-fail raised", "0-hold ok", "1-fail ok", "2-reach ok"]


def test_a_delete_during_a_run_is_followed_by_nothing(scene: Scene) -> None:
    scene.world.script(scene.id(), "hold:" + scene.name, "fail:9")
    scene.things.enqueue(scene.id())
    poll("the evaluation has begun", lambda: scene.lines("start"))
    assert scene.things.delete(scene.id())
    scene.world.open(scene.name)
    poll("the evaluation has ended", lambda: len(scene.lines("end")) == 2)
    scene.settle(RETRY_DELAY + 0.5)
    assert len(scene.looks()) == 1
    assert scene.status() is None


def test_a_permanent_error_quarantines_until_somebody_enqueues(scene: Scene) -> None:
    scene.world.script(scene.id(), "permanent", "reach")
    scene.things.enqueue(scene.id())
    poll("the entity is quarantined", lambda: scene.status() == "failed")
    scene.settle(RETRY_DELAY + 0.5)
    assert len(scene.looks()) == 1
    scene.things.enqueue(scene.id())
    scene.reached(looks=2)


def test_an_action_that_asks_for_another_look_gets_it(scene: Scene) -> None:
    scene.world.script(scene.id(), "again:0.5", "reach")
    scene.things.enqueue(scene.id())
    scene.reached(looks=2)
    first, second = scene.looks()
    assert second - first >= 0.5


def test_a_goal_that_moves_during_the_evaluation_is_looked_at_again_without_an_enqueue(scene: Scene) -> None:
    scene.world.script(scene.id(), "hold:" + scene.name, "reach")
    scene.things.enqueue(scene.id())
    poll("the evaluation has begun", lambda: scene.lines("start"))
    scene.things.ledger.write("enqueue", scene.id(), delay=0, call="none: the engine sees it by itself")
    scene.world.want(scene.id(), 2)
    scene.world.open(scene.name)
    scene.reached(looks=2)


def test_a_warm_shutdown_lets_evaluations_finish(scene: Scene) -> None:
    ids = [scene.id(number) for number in range(4)]
    for id in ids:
        scene.world.script(id, "work:0.5", "reach")
        scene.things.enqueue(id)
    poll("an evaluation has begun", lambda: scene.lines("start"))
    starts = [worker.starts for worker in scene.workers]
    for node in scene.setup.worker_cluster:
        node.kill("SIGTERM")
    # Seldom prefork takes half a minute: Celery forgets a job whose child has not said yet that it took it,
    # and that child waits 30 s for its result to be read before it ends.
    poll(
        "both have ended",
        lambda: all(w.starts > n for w, n in zip(scene.workers, starts, strict=True)),
        timeout=60,
    )
    for id in ids:
        scene.reached(id)
        assert len(scene.looks(id)) == 1
