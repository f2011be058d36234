"""Workers, their pools' processes and producers are killed with SIGKILL at seeded instants.

Entities whose goals keep moving are enqueued all the while. In the end each must have reached its latest
goal, and the ledger must show no lost enqueue and no two evaluations of an entity at the same time. A handful
of kills per lane in `make test`, 60 more in `make test-long`.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance.conftest import SETTINGS, Lane, Scene
from tests.acceptance.ledger import Line
from tests.acceptance.nodes import WorkerProcess
from tests.servers import freeze, poll
from tests.supervised import ROOT

RETRY_DELAY = SETTINGS["goalstate_failure_retry_delay"]
ENTITIES = 40
VICTIMS = {"prefork": ["child", "worker"]}  # the other pools have no children


class Chaos:
    """Entities that are enqueued at random, and what is done to them meanwhile; all of it from one seed."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene = scene
        self.random = random.Random(seed)
        self.ids = [scene.id(number) for number in range(ENTITIES)]
        self.kills: Counter[str] = Counter()
        for id in self.ids:
            scene.world.want(id, 0)
            scene.world.script(id, "ok", f"work:{self.random.uniform(0, 0.2):.3f}", "reach")

    def enqueue_for(self, seconds: float) -> None:
        """Enqueue at random: mostly with a new goal, now and then only for later, or after a delete."""
        things, world = self.scene.things, self.scene.world
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            id = self.random.choice(self.ids)
            if (chance := self.random.random()) < 0.1:
                things.enqueue(id, self.random.uniform(0, 1))
            else:
                if chance < 0.2:
                    things.delete(id)
                things.enqueue(id, want=world.wanted(id) + 1)
            time.sleep(min(left, self.random.uniform(0, 0.03)))  # the pace of the load

    def kill(self, worker: WorkerProcess, victim: str) -> None:
        """Kill a worker with all its processes, or one process of its pool."""
        children = worker.children()
        match victim:
            case "child" if not children:
                return
            case "child":
                pids = [self.random.choice(children)]
            case "worker":
                pids = [worker.pid, *children]
        # Noted first: whatever comes after the line may be an evaluation in the victim's place.
        self.scene.things.ledger.write("kill", pids=pids)
        if victim == "child":
            os.kill(pids[0], signal.SIGKILL)
        else:
            worker.signal(signal.SIGKILL, group=True)
        self.kills[victim] += 1

    def kill_at_random(self, pool: str, kills: int) -> None:
        while self.kills.total() < kills:
            self.enqueue_for(self.random.uniform(0.05, 1.0))
            ready = [worker for worker in self.scene.workers if worker.is_ready()]
            if ready:
                self.kill(
                    self.random.choice(ready),
                    self.random.choice(VICTIMS.get(pool, ["worker"])),
                )

    def calm_down(self) -> None:
        """Wait until every entity is at its latest goal and idle."""
        for id in self.ids:
            if self.scene.lines("enqueue", id=id):
                self.scene.reached(id, timeout=60)

    def summary(self) -> str:
        found = Counter(violation.kind for violation in self.scene.violations())
        lines = self.scene.lines()
        events = Counter(line.event for line in lines)
        return (
            f"{self.kills.total()} kills ({', '.join(f'{n} {victim}' for victim, n in self.kills.items())}; "
            f"{interrupted(lines)} evaluations interrupted), {len(self.ids)} entities, "
            f"{events['enqueue']} enqueues, {events['look']} evaluations: "
            f"{found.pop('lost', 0)} lost, {found.pop('overlap', 0)} overlaps, {found.total()} others"
        )


def interrupted(lines: list[Line]) -> int:
    """How many evaluations were under way in processes when they were killed."""
    under_way: Counter[int] = Counter()
    hits = 0
    for line in lines:
        match line.event:
            case "start":
                under_way[line.pid] += 1
            case "end":
                under_way[line.pid] -= 1
            case "kill":
                hits += sum(under_way.pop(pid, 0) for pid in line.fields["pids"])
    return hits


Record = Callable[[str, object], None]


def chaos(scene: Scene, lane: Lane, kills: int, seed: int, record: Record) -> None:
    chaos = Chaos(scene, seed)
    chaos.kill_at_random(lane.pool, kills)
    chaos.calm_down()
    record("summary", f"{lane}, seed {seed}: {chaos.summary()}")
    assert scene.violations() == []


def test_a_handful_of_kills(scene: Scene, lane: Lane, record_property: Record) -> None:
    chaos(scene, lane, 6, 20_261, record_property)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_kills(scene: Scene, lane: Lane, seed: int, record_property: Record) -> None:
    chaos(scene, lane, 20, seed, record_property)


def test_an_entity_that_kills_its_worker_backs_off(scene: Scene) -> None:
    scene.world.script(scene.id(), "die:2", "reach")
    scene.things.enqueue(scene.id())
    scene.reached(looks=3, timeout=60)
    assert [line.fields["failures"] for line in scene.lines("start")] == [0, 1, 2, 2]
    assert scene.violations() == []


def test_a_process_stalled_beyond_its_lease_starts_no_further_action(scene: Scene) -> None:
    first, second = f"{scene.name}-1", f"{scene.name}-2"
    scene.world.script(scene.id(), f"hold:{first}", f"hold:{second}", "reach")
    scene.things.enqueue(scene.id())
    (stalled,) = poll("the evaluation has begun", lambda: scene.lines("start"))
    freeze(stalled.pid)
    try:
        scene.things.ledger.write("freeze", pids=[stalled.pid])
        poll("another process evaluates", lambda: len(scene.lines("start")) == 2, timeout=20)
        scene.world.open(first)
        poll("the other process goes on", lambda: len(scene.lines("start")) == 3)
    finally:
        os.kill(stalled.pid, signal.SIGCONT)
    poll("the stalled action has ended", lambda: any(end.pid == stalled.pid for end in scene.lines("end")))
    # Were the stalled evaluation's outcome taken for the other's, there would be another look by then.
    until = time.monotonic() + 2 * RETRY_DELAY + 0.5
    poll("a retry's time has passed", lambda: time.monotonic() > until)
    assert scene.status() == "running"
    scene.world.open(second)
    scene.reached(looks=3)  # once more, for the stalled action may have undone what the other evaluation did
    started = [line.fields["action"] for line in scene.lines("start")]
    steps = ["0-hold", "1-hold", "2-reach"]
    assert started == [steps[0], *steps, *steps], "of the stalled one, of the other, of the look that follows"
    assert scene.violations() == []


@pytest.mark.parametrize("number", [0, 3])
def test_a_producer_killed_between_index_and_broker_loses_nothing(
    scene: Scene, directory: Path, number: int
) -> None:
    ids = [scene.id(number) for number in range(5)]
    producer = subprocess.run(
        [sys.executable, "-m", "tests.acceptance.producer", str(directory), str(number), *ids],
        cwd=ROOT,
        check=False,
        timeout=30,
    )
    assert producer.returncode == -signal.SIGKILL
    for id in ids[: number + 1]:
        scene.reached(id, timeout=30)
    assert not any(scene.looks(id) for id in ids[number + 1 :])
    assert scene.violations() == []
