"""Carries every message from the producers' queue to the workers', not always faithfully."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import threading
import time
from collections import Counter
from typing import Any, Self

from celery.contrib.migrate import republish
from kombu import Connection, Consumer, Producer, Queue

from tests.acceptance.ledger import Ledger
from tests.chaos.app import WORK


class Post:
    """Runs in a thread of its own. `faults` counts what became of the messages."""

    def __init__(self, broker_url: str, seed: int, post: Queue, work: Queue, ledger: Ledger) -> None:
        self.faults: Counter[str] = Counter()
        self.carried = 0
        self.trouble = 0.0  #: which part of the messages is not carried faithfully
        self._url = broker_url
        self._from, self._to = post, work
        self._ledger = ledger
        self._random = random.Random(f"{seed}-post")
        self._held: list[tuple[float, int, Any]] = []  # until when
        self._order = itertools.count()
        self._running = True
        self._thread = threading.Thread(target=self._run, name="post", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._running = False
        self._thread.join(10)

    def _run(self) -> None:
        while self._running:
            try:
                self._carry()
            except Exception:  # noqa: BLE001 - the broker is away: whatever its client says to that
                self.faults["broker away"] += 1
                time.sleep(0.1)  # until the broker is back

    def _carry(self) -> None:
        with Connection(self._url, connect_timeout=2) as connection:
            connection.ensure_connection(max_retries=1, timeout=2)
            channel = connection.channel()
            self._producer = Producer(connection.channel())
            self._to(channel).declare()
            with Consumer(channel, [self._from], callbacks=[self._take], accept=["json"]):
                while self._running:
                    with contextlib.suppress(TimeoutError):
                        connection.drain_events(timeout=0.05)
                    self._let_go()

    def _take(self, body: Any, message: Any) -> None:
        self.carried += 1
        (pairs,), *_ = body
        for id, _ in pairs:
            self._ledger.write("message", f"{message.headers['task'].removeprefix('goalstate.')}/{id}")
        fault = ""
        if self._random.random() < self.trouble:
            fault = self._random.choice(["dropped", "duplicated", "duplicated later", "delayed", "reordered"])
            self.faults[fault] += 1
        now = time.monotonic()
        match fault:
            case "dropped":
                pass
            case "duplicated":
                self._send(message)
                self._send(message)
            case "duplicated later":
                self._send(message)
                self._hold(message, now + self._random.uniform(0.1, 4))
            case "delayed":
                self._hold(message, now + self._random.uniform(0.5, 4))
            case "reordered":
                self._hold(message, now + self._random.uniform(0.01, 0.3))
            case _:
                self._send(message)
        message.ack()

    def _hold(self, message: Any, until: float) -> None:
        heapq.heappush(self._held, (until, next(self._order), message))

    def _let_go(self) -> None:
        while self._held and self._held[0][0] <= time.monotonic():
            self._send(self._held[0][2])
            heapq.heappop(self._held)

    def _send(self, message: Any) -> None:
        republish(self._producer, message, exchange="", routing_key=WORK)
