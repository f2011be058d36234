"""Brokers of every kind, set up as they need it, with two supervised workers and the acceptance world."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.acceptance.app import Things
from tests.acceptance.conftest import QUORUM, SETTINGS
from tests.acceptance.ledger import violations
from tests.acceptance.nodes import WorkerProcess
from tests.servers import RabbitMQ, RedisServer, Valkey, poll

#: What each kind of broker needs; `impatient` in `Shop` adds a time-out of a second.
BROKERS: dict[str, tuple[type[Valkey | RedisServer | RabbitMQ], dict[str, Any]]] = {
    "valkey": (Valkey, {}),
    "redis": (RedisServer, {}),
    "rabbitmq": (RabbitMQ, {}),
    "quorum": (RabbitMQ, dict(QUORUM)),
    "quorum-direct": (RabbitMQ, {"task_default_queue_type": "quorum"}),
}

#: Redis looks for messages to take back every half second, RabbitMQ four times a second.
TIMEOUT = 1.0
VISIBILITY = {
    "visibility_timeout": TIMEOUT,
    "unacked_restore_interval": 0.5,
    "unacked_restore_throttle": 1,
}
CONSUMER = {"consumer_timeout": int(1000 * TIMEOUT), "channel_tick_interval": 250}


class Shop:
    """A broker, an index, the things, and two workers."""

    def __init__(self, directory: Path, broker: str, pool: str, impatient: bool, settings: Any) -> None:
        kind, needed = BROKERS[broker]
        settings = {**SETTINGS, **needed, **settings}
        self._on_rabbitmq = kind is RabbitMQ
        if self._on_rabbitmq:
            self.broker = RabbitMQ(directory / "broker", **(CONSUMER if impatient else {}))
        else:
            self.broker = kind(directory / "broker")
            if impatient:
                settings["broker_transport_options"] = VISIBILITY
        self._directory, self._pool, self._settings = directory, pool, settings
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.broker)
            index = stack.enter_context(Valkey(self._directory / "index"))
            urls = {"broker_url": self.broker.url, "goalstate_index_url": index.url}
            (self._directory / "settings.json").write_text(json.dumps({**self._settings, **urls}))
            self.things = Things(self._directory)
            stack.callback(self.things.app.close)
            self.workers = [WorkerProcess(self._directory, pool=self._pool, number=n) for n in (1, 2)]
            for worker in self.workers:
                worker.start()
                stack.callback(worker.teardown)
            for worker in self.workers:
                worker.ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def at_rest(self, ids: list[str]) -> bool:
        """Whether all of these are idle and at their goals."""
        described = self.things.engine.describe_many(map(self.things.Thing, ids))
        return all(each and each.status == "idle" and each.converged for each in described)

    def settle(self, ids: list[str]) -> None:
        poll(f"{len(ids)} entities are at their goals", lambda: self.at_rest(ids), timeout=90, interval=0.1)

    def looks(self) -> Counter[str]:
        return Counter(line.entity for line in self.things.ledger.lines("", "look"))

    def lateness(self, prefix: str) -> float:
        """The longest time from an entity's deadline to its look, in seconds."""
        lines = self.things.ledger.lines(prefix, "enqueue", "look")
        due = {line.entity: line.at + line.fields["delay"] for line in lines if line.event == "enqueue"}
        return max(line.at - due[line.entity] for line in lines if line.event == "look")

    def violations(self) -> list[Any]:
        return violations(self.things.ledger.lines(), lease=SETTINGS["goalstate_lease"])

    def log(self) -> str:
        """What the workers said."""
        return "".join(worker.logs() for worker in self.workers)

    def taken_back(self) -> int:
        """How often the broker's patience was at its end."""
        if self._on_rabbitmq:
            return self.broker.output().count("has timed out waiting for delivery acknowledgement")
        return self.log().count("nothing to do: superseded")


@pytest.fixture
def open_shop(tmp_path: Path) -> Iterator[Callable[..., Shop]]:
    with contextlib.ExitStack() as stack:

        def open_one(broker: str, pool: str = "prefork", *, impatient: bool = False, **settings: Any) -> Shop:
            return stack.enter_context(Shop(tmp_path, broker, pool, impatient, settings))

        yield open_one
