"""Producers and workers, as processes under supervision, over an index that a test then hurts.

They are those of the chaos harness, and so are the ledger and its checker.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celery_goalstate import index as indexes
from tests.chaos import processes
from tests.chaos.app import SETTINGS, WORK, Things
from tests.chaos.checker import Findings, check
from tests.chaos.harness import final_state, settle
from tests.servers import Valkey, poll

#: The harness' kinds whose entities kill no process.
KINDS = ["steady", "slow", "flaky", "patient", "chain", "crowd"]
SHARDS = 2


class Load:
    """What runs, and what it wrote down."""

    def __init__(self, things: Things, workers: list[processes.Victim]) -> None:
        self.things = things
        self.workers = workers
        self.producers: list[processes.Victim] = []
        self.random = random.Random(20_261)
        self._over = False

    def evaluations(self) -> int:
        return len(self.things.ledger.lines("", "claim"))

    def go_on(self, evaluations: int, timeout: float = 60) -> None:
        """Wait for so many more evaluations."""
        before = self.evaluations()
        poll(f"{evaluations} more", lambda: self.evaluations() >= before + evaluations, timeout=timeout)

    @contextlib.contextmanager
    def losing_data(self, seconds: float) -> Iterator[None]:
        """The index loses what it took meanwhile and in the seconds before; in the end it is told again."""
        self.things.ledger.write("index-loss", at=time.monotonic() - seconds)
        yield
        self.things.ledger.write("index-lost")
        self.things.resync()

    def end(self) -> Findings:
        """Let everything come to rest; what the checker finds."""
        for producer in self.producers:
            producer.stop(timeout=30)
        left = settle(self.things, 90)
        assert not left, f"{left} entities are still scheduled or running"
        return check(self.things.ledger.lines(), final_state(self.things))


@contextlib.contextmanager
def under_load(directory: Path, index_url: str) -> Iterator[Load]:
    """Two producers and two workers at work. The broker is another server than the index."""
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(Valkey(directory / "broker"))
        settings = {
            **SETTINGS,
            "broker_url": broker.url,
            "task_default_queue": WORK,
            "goalstate_index_url": index_url,
            "goalstate_shards": SHARDS,
        }
        (directory / "settings.json").write_text(json.dumps(settings))
        stack.enter_context(_as_it_was(indexes, "open_index"))
        things = Things(directory)
        things.ledger.write("clock", wall=time.time())
        stack.callback(things.app.close)
        place = {"directory": directory, "index_url": index_url}
        load = Load(
            things, [processes.worker(number, pool="prefork", soft=False, **place) for number in (1, 2)]
        )
        load.producers = [
            processes.producer(number, 2, 20_261, 0.15, ",".join(KINDS), **place) for number in (0, 1)
        ]
        for process in (*load.workers, *load.producers):
            process.start()
            stack.callback(process.end)
        poll("workers are ready", lambda: all(worker.is_ready() for worker in load.workers), timeout=60)
        load.go_on(20)
        yield load


@contextlib.contextmanager
def _as_it_was(module: Any, name: str) -> Iterator[None]:
    """`Things` puts its own in its place."""
    before = getattr(module, name)
    try:
        yield
    finally:
        setattr(module, name, before)


def summary(what: str, findings: Findings) -> str:
    figures = findings.figures
    broken = {rule: count for rule, count in findings.counts.items() if count}
    return (
        f"{what}: {figures['enqueues']} enqueues, {figures['evaluations']} evaluations of"
        f" {figures['entities']} entities, {figures['index unavailable']} times unavailable: "
        f"{broken or 'nothing broken'}"
    )
