"""Entities that take their process along, or hang, each in its way: quarantined, and others go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import psutil
import pytest

from tests.acceptance.app import HOARD, MEGABYTE
from tests.acceptance.conftest import SETTINGS, Lane, Scene
from tests.servers import poll

#: Each with the error that it is quarantined for.
WAYS = {
    "kill": "WorkerLost",
    "exit": "WorkerLost",
    "segfault": "WorkerLost",
    "hang": "WorkerLost",
    "hoard": "WorkerLost",
    "full": "MemoryError",
}
#: A pool without processes has no hard time limit, and what dies is the whole worker.
WAYS_OF_SOLO = ["exit", "segfault", "full"]


class OutOfMemoryKiller:
    """As the kernel's: from outside, and whoever holds too much. Cgroups are not for everybody to set up."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="out-of-memory killer")
        self._killed: set[int] = set()  # one that was killed may still be there the next time

    @property
    def kills(self) -> int:
        return len(self._killed)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for worker in self._scene.workers:
                for pid in worker.children():
                    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                        if psutil.Process(pid).memory_info().rss > HOARD * MEGABYTE:
                            os.kill(pid, signal.SIGKILL)
                            self._killed.add(pid)


def test_whatever_kills_its_worker_is_quarantined(scene: Scene, lane: Lane) -> None:
    if lane.pool not in ("prefork", "solo"):
        pytest.skip("a death takes the evaluations beside it along: see test_batch")
    things = scene.things
    ways = list(WAYS) if lane.pool == "prefork" else WAYS_OF_SOLO
    for way in ways:
        scene.world.script(f"{scene.name}.{way}", f"die-by:{way}", "reach")
    poison = [things.Poison(f"{scene.name}.{way}") for way in ways]
    others = [scene.id(number) for number in range(20)]
    starts = sum(worker.starts for worker in scene.workers)
    killer = OutOfMemoryKiller(scene)
    with killer.at_work():
        things.engine.enqueue_many(poison)
        for id in others:
            things.enqueue(id)
        for id in others:
            scene.reached(id, timeout=60)

        def all_quarantined() -> bool:
            return all(known and known.status == "failed" for known in things.engine.describe_many(poison))

        poll("all of them are in quarantine", all_quarantined, timeout=60)

    for way, known in zip(ways, things.engine.describe_many(poison), strict=True):
        assert known is not None
        assert (known.failures, (known.error or "").split(":")[0]) == (2, WAYS[way]), way
        first, second = scene.looks(f"{scene.name}.{way}")
        assert second - first >= SETTINGS["goalstate_failure_retry_delay"], way
    assert killer.kills == (2 if "hoard" in ways else 0)
    if lane.pool == "prefork":
        assert sum(worker.starts for worker in scene.workers) == starts, "the workers themselves went on"


def test_what_gevent_cuts_off_has_failed(scene: Scene, lane: Lane) -> None:
    """`gevent.Timeout` is no `Exception`: an action's own that nobody caught, or Celery's hard time limit."""
    if lane.pool != "gevent":
        pytest.skip("other pools raise no gevent.Timeout")
    things, recovers = scene.things, scene.id()
    scene.world.script(recovers, "timeout:3", "reach")
    # Each with its error, and how many seconds pass until it is cut off.
    poison = {"timeout:99": ("0.1 seconds", 0.1), "die-by:hang": ("2 seconds", 2.0)}
    for number, way in enumerate(poison):
        scene.world.script(f"{scene.name}.poison-{number}", way, "reach")
    hanging = [things.Poison(f"{scene.name}.poison-{number}") for number in range(len(poison))]
    others = [scene.id(number) for number in range(2, 20)]
    starts = [worker.starts for worker in scene.workers]
    things.engine.enqueue_many(hanging)
    for id in (recovers, *others):
        things.enqueue(id)
    for id in others:
        scene.reached(id)
    scene.reached(recovers, looks=4)

    delay = SETTINGS["goalstate_failure_retry_delay"]
    ends = [line.at for line in scene.lines("end", id=recovers) if line.fields["outcome"] == "raised"]
    for n, (end, look) in enumerate(zip(ends, scene.looks(recovers)[1:], strict=True)):
        assert look - end >= delay * 2**n - 0.01
    assert [line.fields["failures"] for line in scene.lines("start", id=recovers)] == [0, 1, 2, 3, 3]

    def all_quarantined() -> bool:
        return all(known and known.status == "failed" for known in things.engine.describe_many(hanging))

    poll("all that hang are in quarantine", all_quarantined, timeout=30)
    for entity, (said, length) in zip(hanging, poison.values(), strict=True):
        known = things.engine.describe(entity)
        assert known is not None
        assert (known.failures, known.error) == (2, f"Interrupted: Timeout: {said}")
        first, second = scene.looks(entity.get_id())
        assert second - first >= length + delay - 0.01
    assert [worker.starts for worker in scene.workers] == starts, "the workers themselves went on"
    # The ledger knows nothing of the others' enqueues.
    assert [each for each in scene.violations() if each.entity in (recovers, *others)] == []
