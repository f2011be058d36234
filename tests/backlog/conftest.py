"""A real broker, a real index, and a real worker that is slow."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection

from tests.backlog.app import DIRECTORY, Things
from tests.servers import Process, RabbitMQ, Valkey, poll

ROOT = Path(__file__).parents[2]
QUEUE = "celery"

SETTINGS: dict[str, Any] = {
    "broker_connection_retry_on_startup": True,
    "task_ignore_result": True,
    "worker_hijack_root_logger": False,
    "worker_prefetch_multiplier": 1,
    "goalstate_sweep_interval": 0.1,
    "work": 0.0,
    "other_work": 0.0,
}


class Workplace:
    """Servers, the app as a producer sees it, and one worker."""

    def __init__(self, directory: Path, broker_url: str, index: Valkey, settings: dict[str, Any]) -> None:
        self.index = index
        settings = {**SETTINGS, **settings, "broker_url": broker_url, "goalstate_index_url": index.url}
        (directory / "settings.json").write_text(json.dumps(settings))
        self.directory, self.broker_url = directory, broker_url
        self.things = Things(directory)
        self.worker = self.new_worker("threads")

    def new_worker(self, pool: str, name: str = "worker", *options: str) -> Process:
        """`options` as settings on the command line."""
        return Process(
            [
                *(sys.executable, "-m", "celery", "--app", "tests.backlog.worker", "worker"),
                *("--pool", pool, "--concurrency", "2", "--hostname", f"{name}@backlog"),
                *("--without-mingle", "--without-gossip", "--loglevel", "INFO", "--", *options),
            ],
            log=self.directory / f"{name}.log",
            env={DIRECTORY: str(self.directory), "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
        )

    def enqueue(self, *ids: str) -> None:
        self.things.engine.enqueue_many(self.things.Item(id) for id in ids)

    def drop(self, count: int) -> set[str]:
        """Take the first messages out of the queue, as if the broker lost them; whose they were."""
        lost = set()
        with Connection(self.broker_url) as connection, connection.SimpleQueue(QUEUE) as queue:
            for _ in range(count):
                message = queue.get(timeout=5)
                lost.add(message.payload[0][0][0][0])
                message.ack()
        return lost

    def looks(self) -> dict[str, float]:
        """When each entity was looked at first."""
        first: dict[str, float] = {}
        for line in self.things.ledger.lines("", "look"):
            first.setdefault(line.entity, line.at)
        return first

    def sent(self) -> Counter[str]:
        """How many messages each entity had."""
        return Counter(line.entity for line in self.things.ledger.lines("", "sent"))

    @staticmethod
    def under_way(client: Any) -> int:
        """How many entities the index believes to have a message."""
        return client.zcard("gs:{default:item:0}:sent")

    def drained(self, ids: set[str], timeout: float) -> float:
        """Wait until all of these have been looked at; when the last one was."""
        poll(
            f"{len(ids)} entities are looked at",
            lambda: ids <= self.looks().keys(),
            timeout=timeout,
            interval=0.2,
        )
        return max(at for id, at in self.looks().items() if id in ids)


@pytest.fixture
def open_workplace(tmp_path: Path) -> Iterator[Callable[..., Workplace]]:
    with contextlib.ExitStack() as stack:

        def open_one(broker: str = "redis", **settings: Any) -> Workplace:
            index = stack.enter_context(Valkey(tmp_path / "index"))
            url = index.url
            if broker == "rabbitmq":
                url = stack.enter_context(RabbitMQ(tmp_path / "broker")).url
            place = Workplace(tmp_path, url, index, settings)
            stack.callback(place.things.app.close)
            stack.callback(place.worker.end)
            return place

        yield open_one
