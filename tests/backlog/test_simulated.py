"""Hours of backlog in seconds: the real index and the real sweeper, on a clock that the test moves.

Only the queue is simulated, and the workers behind it: first in, first out, so many messages a second.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from kombu.utils.uuid import uuid

from celery_goalstate.entity import Entity
from celery_goalstate.index.base import Claim, Limits, Report, Request, Status, Verdict, Wakeup
from celery_goalstate.registry import Kind
from celery_goalstate.settings import KindOptions, Settings
from celery_goalstate.worker.parts import Parts
from celery_goalstate.worker.sweeper import Sweeper
from tests.contract.lanes import Clock, MemoryLane, RedisLane
from tests.servers import Valkey

KIND = "order"
RESEND_AFTER = 60  # seconds, as by default
OTHER = None  # a message of another task in the same queue


class Workplace:
    """An index, its sweeper, one queue, and workers that take `rate` messages a second from it."""

    def __init__(self, lane: MemoryLane | RedisLane, limits: Limits, kind: Kind, *, rate: int) -> None:
        self.index, self.clock, self.limits = lane.index, lane.clock, limits
        self.rate = rate
        self.queue: deque[Wakeup | None] = deque()
        self.others = False  # whether each message of another task is followed by the next one
        self.sent: Counter[str] = Counter()  # messages of each entity
        self.arrived: dict[str, float] = {}  # when each entity was evaluated
        self.order: list[str] = []  # in which entities were evaluated
        self.most_under_way = 0
        publisher: Any = self
        keeper: Any = None
        engine: Any = None
        self.sweeper = Sweeper(
            "sweeper",
            engine=engine,
            parts=Parts(index=self.index, publisher=publisher, keeper=keeper, clock=lambda: self.now),
            settings=Settings(index_url="memory://"),
            kinds=lambda: {KIND: kind},
        )
        self._took = 0

    @property
    def now(self) -> float:
        return self.clock.now / 1000

    def enqueue(self, *ids: str, at: float | None = None) -> None:
        due = None if at is None else round(at * 1000)
        requests = [Request(id, 0 if due is None else None, due, uuid()) for id in ids]
        replies = self.index.enqueue(KIND, requests)
        self.publish_at_once(KIND, [reply.wakeup for reply in replies if reply.wakeup])

    def publish_at_once(self, _kind: Any, wakeups: Sequence[Wakeup]) -> None:
        """What a `Publisher` does."""
        self.queue.extend(wakeups)
        self.sent.update(wakeup.id for wakeup in wakeups)

    def drop(self, *ids: str) -> None:
        """Their messages are lost."""
        self.queue = deque(message for message in self.queue if not message or message.id not in ids)

    def second(self) -> None:
        """Let a second pass."""
        for n in range(self.rate):
            self.clock.advance(1000 * (n + 1) // self.rate - 1000 * n // self.rate)
            if self.queue:
                self._take(self.queue.popleft())
        while self.sweeper.sweep():
            pass
        self.most_under_way = max(self.most_under_way, self.index.counts(KIND)[Status.SENT])

    def _take(self, message: Wakeup | None) -> None:
        if message is OTHER:
            if self.others:
                self.queue.append(OTHER)
            return
        pair = (message.id, message.token)
        [claim] = self.index.claim(
            KIND, [pair], nonce=uuid(), task_id=message.task_id, resent_at=message.resent_at
        )
        if isinstance(claim, Claim):
            self.arrived[claim.id] = self.now
            self.order.append(claim.id)
            self.index.finish(KIND, [Report(claim.id, claim.lease, Verdict.DONE, None, idle_ttl=1000)])

    def drain(self, *ids: str) -> float:
        """Until these entities are evaluated; seconds that it took."""
        began = self.now
        while not all(id in self.arrived for id in ids):
            self.second()
            assert self.now - began < 100 * RESEND_AFTER, "it takes for ever"
        return self.now - began

    @property
    def extra(self) -> int:
        """Messages beyond one for each entity."""
        return self.sent.total() - len(self.sent)


Open = Callable[..., Workplace]


@pytest.fixture(params=["memory", "valkey"])
def workplace(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    def open_one(*, rate: int = 10, **limits: int) -> Workplace:
        chosen, kind = Limits(**limits), Kind(KIND, "goalstate.order", Entity, KindOptions())
        if request.param == "memory":
            return Workplace(MemoryLane(chosen, Clock()), chosen, kind, rate=rate)
        server = Valkey(tmp_path / "valkey")
        server.start()
        request.addfinalizer(server.kill)
        client = server.client()
        request.addfinalizer(client.close)
        return Workplace(RedisLane("valkey", client, chosen, Clock()), chosen, kind, rate=rate)

    return open_one


def ids(count: int, name: str = "e") -> list[str]:
    return [f"{name}{n}" for n in range(count)]


def test_a_backlog_of_ten_periods_costs_few_messages(workplace: Open) -> None:
    place = workplace(rate=1)
    place.enqueue(*ids(600))
    assert place.drain(*ids(600)) == 10 * RESEND_AFTER
    assert place.extra <= 6


def test_a_lost_message_is_found_when_the_backlog_is_gone(workplace: Open) -> None:
    place = workplace(rate=1)
    place.enqueue(*ids(600))
    lost = ["e0", "e300", "e599"]
    place.drop(*lost)
    place.drain(*(set(ids(600)) - set(lost)))
    own_delay = place.now
    place.drain(*lost)
    assert place.now - own_delay <= 2 * RESEND_AFTER
    assert place.extra <= 10


def test_single_losses_of_a_sparse_kind_are_each_found_within_a_period(workplace: Open) -> None:
    """Each probe arrives: however many have been sent, the next one need not wait."""
    place = workplace()
    for n in range(10):
        place.enqueue(f"e{n}")
        place.drop(f"e{n}")
        assert place.drain(f"e{n}") <= RESEND_AFTER + 2, "which a sweep finds, and a worker takes"
        for _ in range(20):
            place.second()
    assert place.extra == 10


def test_what_a_killed_worker_held_is_found_within_a_period_of_each_deadline(workplace: Open) -> None:
    """Messages ahead of their time, all lost at once."""
    place = workplace()
    due = {f"e{n}": place.now + n for n in range(30)}
    for id, at in due.items():
        place.enqueue(id, at=at)
    place.drop(*due)
    place.drain(*due)
    late = {id: place.arrived[id] - at for id, at in due.items()}
    assert max(late.values()) <= RESEND_AFTER + 3
    assert place.extra == len(due)


def test_a_slow_queue_gets_few_probes(workplace: Open) -> None:
    """Five periods of other tasks before it: one probe at a time, at intervals that double."""
    place = workplace(rate=1)
    place.queue.extend([OTHER] * 5 * RESEND_AFTER)
    place.enqueue("e")
    place.drain("e")
    assert 1 <= place.extra <= 4


def test_a_queue_that_is_never_empty_changes_neither(workplace: Open) -> None:
    """A permanent backlog of ten periods, of other tasks and of entities that fall due all the time."""
    place = workplace(rate=4)
    place.others = True
    place.queue.extend([OTHER] * (10 * RESEND_AFTER * place.rate))
    period, due = 40 * RESEND_AFTER, {}
    for second in range(period):
        id = f"e{second}"
        due[id] = place.now
        place.enqueue(id)
        if second == 5 * RESEND_AFTER:
            place.drop(lost := id)
        place.second()
    delays = [place.arrived[id] - due[id] for id in due if id in place.arrived and id != lost]
    assert min(delays[RESEND_AFTER:]) > 9 * RESEND_AFTER, "that is no backlog"
    assert place.extra <= 0.1 * period
    # The message that is sent instead takes its place at the queue's end.
    assert place.arrived[lost] - due[lost] <= 2 * max(delays) + 2 * RESEND_AFTER


def test_what_waited_for_long_is_not_taken_for_lost_as_soon_as_it_is_sent(workplace: Open) -> None:
    """More than the window, parked for many periods; that a message came through says nothing of these."""
    place = workplace(rate=4, window=100)
    place.enqueue(*ids(2000))
    place.drain(*ids(2000))
    assert place.most_under_way <= 100
    assert place.extra <= 0.01 * 2000


def test_a_broker_that_lost_everything_is_made_good_at_once(workplace: Open) -> None:
    place = workplace(rate=200)
    place.enqueue(*ids(400))
    place.queue.clear()
    assert place.drain(*ids(400)) <= RESEND_AFTER + 5
    assert place.extra <= 401


def test_nobody_starves_under_a_lasting_overload(
    workplace: Open, record_property: Callable[[str, object], None]
) -> None:
    """Twice as much falls due as workers can do: each has its turn by its due time, give or take a window."""
    window, rate = 40, 10
    place = workplace(rate=rate, window=window)
    due: dict[str, float] = {}
    for _ in range(200):
        for _ in range(2 * rate):
            id = f"e{len(due)}"
            due[id] = place.now
            place.enqueue(id)
        place.second()
    place.drain(*due)
    ideal = {id: position for position, id in enumerate(sorted(due, key=lambda id: (due[id], int(id[1:]))))}
    behind = max(position - ideal[id] for position, id in enumerate(place.order))
    record_property(
        "summary", f"overload of 2, window {window}: at most {behind} evaluations behind the ideal order"
    )
    assert behind <= window, "in units of evaluations: nobody lets more than a window pass"
    assert place.most_under_way <= window
    assert place.extra <= 0.01 * len(due)
