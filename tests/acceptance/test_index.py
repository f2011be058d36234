"""The index stands still, or restarts with its data: evaluations wait, and nothing is lost or doubled."""

from __future__ import annotations

import pytest

from celery_goalstate.exceptions import IndexUnavailable
from tests.acceptance.conftest import SETTINGS, Scene
from tests.servers import Valkey, poll


@pytest.fixture(autouse=True)
def guarantees(scene: Scene):
    yield
    assert scene.violations() == []


def test_an_index_that_stands_still_for_longer_than_a_lease(scene: Scene, index_server: Valkey) -> None:
    scene.world.script(scene.id(), "hold:" + scene.name, "reach")
    scene.things.enqueue(scene.id())
    poll("the evaluation has begun", lambda: scene.lines("start"))
    with index_server.client() as client:
        client.client_pause(round(1000 * (SETTINGS["goalstate_lease"] + 1)), all=True)
    # To the ledger it is all the same whether a process or the index stands still: no lease is renewed.
    scene.things.ledger.write("freeze", pids=[line.pid for line in scene.lines("start")])
    scene.world.open(scene.name)
    scene.reached(timeout=30)


def test_an_index_that_restarts(scene: Scene, index_server: Valkey) -> None:
    ids = [scene.id(number) for number in range(10)]
    for number, id in enumerate(ids):
        scene.world.script(id, "work:0.3", "reach")
        scene.things.enqueue(id, number % 3)
    poll("an evaluation has begun", lambda: scene.lines("start"))
    index_server.stop()
    try:
        with pytest.raises(IndexUnavailable):
            scene.things.enqueue(scene.id(99))
    finally:
        index_server.start()
    scene.things.enqueue(scene.id(99))
    for id in [*ids, scene.id(99)]:
        scene.reached(id, timeout=30)
