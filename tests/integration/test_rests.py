"""Who publishes, and when, while a broker refuses some kinds or answers nothing: minutes of it, simulated.

Index and sweeper are the real ones. Time passes only where the broker takes it, and between two sweeps.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from kombu.utils.uuid import uuid

from celery_goalstate.entity import Entity
from celery_goalstate.index.base import Limits, Request, Status, Wakeup
from celery_goalstate.index.memory import MemoryIndex
from celery_goalstate.messages.errors import BrokerUnavailable, MessagesRefused
from celery_goalstate.registry import Kind
from celery_goalstate.settings import KindOptions, Settings
from celery_goalstate.worker.parts import Parts
from celery_goalstate.worker.sweeper import LONGEST_REST, Sweeper
from tests.integration.conftest import Clock

KINDS = 30
LEASE = 30
TAKES, REFUSES = 0.002, 0.005  # seconds of a broker that answers


def names(numbers: Sequence[int]) -> set[str]:
    return {f"kind-{n:02}" for n in numbers}


class Broker:
    """One broker, `KINDS` kinds with an entity due each second, and the sweeper that publishes for them."""

    def __init__(self, *, refused: Sequence[int] = (), silent: Sequence[int] = (), seed: int = 0) -> None:
        self.clock = Clock()
        self.index = MemoryIndex(Limits(lease=1000 * LEASE), clock=self.clock.milliseconds)
        self.kinds = {
            name: Kind(name, f"goalstate.{name}", Entity, KindOptions())
            for name in sorted(names(range(KINDS)))
        }
        self.refused, self.silent = names(refused), names(silent)
        self.frozen = False
        self.tried: list[tuple[float, str]] = []
        self.late = dict.fromkeys(self.kinds, 0.0)  # the longest, per kind; of what is not sent yet: so far
        self.longest_sweep, self.blocked = 0.0, 0.0
        settings = Settings(index_url="memory://", lease=LEASE)
        self.timeout = settings.sweep_timeout
        publisher: Any = self
        keeper: Any = None
        engine: Any = None
        self.sweeper = Sweeper(
            "sweeper",
            engine=engine,
            parts=Parts(
                index=self.index,
                publisher=publisher,
                keeper=keeper,
                clock=self.clock,
                random=random.Random(seed).random,
            ),
            settings=settings,
            kinds=lambda: self.kinds,
        )
        self._due: dict[tuple[str, str], float] = {}

    def publish_at_once(self, kind: Kind, wakeups: Sequence[Wakeup]) -> None:
        """What a `Publisher` does."""
        self.tried.append((self.clock(), kind.name))
        if self.frozen or kind.name in self.silent:
            self.clock.advance(self.timeout)
            self.index.put_back(kind.name, wakeups)
            raise BrokerUnavailable("could not publish") from TimeoutError("timed out")
        if kind.name in self.refused:
            self.clock.advance(REFUSES)
            self.index.put_back(kind.name, wakeups)
            raise MessagesRefused("could not publish") from KeyError("queue")
        self.clock.advance(TAKES)
        for wakeup in wakeups:
            self._note_lateness(kind.name, self._due.pop((kind.name, wakeup.id), self.clock()))
        self.index.delete(kind.name, [wakeup.id for wakeup in wakeups])

    def enqueue(self, kind: str, *ids: str) -> list[Wakeup]:
        """Due now."""
        self._due |= {(kind, id): self.clock() for id in ids}
        replies = self.index.enqueue(kind, [Request(id, delay=0, task_id=uuid()) for id in ids])
        return [reply.wakeup for reply in replies if reply.wakeup]

    def run(self, seconds: float, each_second: Callable[[], None] = lambda: None) -> None:
        began = self.clock()
        while self.clock() < began + seconds:
            for kind in self.kinds:
                broken = kind in self.refused | self.silent
                self.index.put_back(kind, self.enqueue(kind, "" if broken else f"{self.clock():.3f}"))
            each_second()
            while self._sweep():
                pass
            self.clock.advance(1.0)
        for (kind, _), due in self._due.items():
            self._note_lateness(kind, due)

    def _sweep(self) -> bool:
        began = self.clock()
        more = self.sweeper.sweep()
        took = self.clock() - began
        self.longest_sweep = max(self.longest_sweep, took)
        self.blocked += took
        return more

    def _note_lateness(self, kind: str, due: float) -> None:
        self.late[kind] = max(self.late[kind], self.clock() - due)

    def attempts(self, kind: str = "") -> list[float]:
        """When this kind, or any, tried to publish."""
        return [at for at, each in self.tried if each == (kind or each)]

    def forget_the_past(self) -> None:
        """Measure from now on."""
        self.late = dict.fromkeys(self.kinds, 0.0)
        self.longest_sweep = self.blocked = 0.0
        self.tried.clear()

    @property
    def latest(self) -> float:
        """The longest that a message of a healthy kind was late, in seconds."""
        return max(late for kind, late in self.late.items() if kind not in self.refused | self.silent)


@pytest.mark.parametrize("kinds", [1, 10])
def test_kinds_that_are_refused_delay_no_other(kinds: int) -> None:
    broker = Broker(refused=range(kinds))
    broker.run(120)
    assert broker.latest < 0.5, "all in the sweep in which they fall due"
    assert broker.longest_sweep < 0.5


def test_a_kind_that_is_refused_rests_for_longer_and_longer() -> None:
    broker = Broker(refused=[7])
    broker.run(150)
    [kind] = broker.refused
    rests = [later - earlier for earlier, later in pairwise(broker.attempts(kind))]
    expected = [1, 2, 4, 8, 16, *[LONGEST_REST] * (len(rests) - 5)]
    assert all(rest <= seen < rest + 1.2 for rest, seen in zip(expected, rests, strict=True)), rests

    broker.refused.clear()
    broker.run(LONGEST_REST + 1)
    assert broker.late[kind] <= 150 + LONGEST_REST + 1
    broker.refused.add(kind)
    broker.forget_the_past()
    broker.run(3)
    assert len(broker.attempts(kind)) == 2, "a success has ended the rest"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [0, KINDS - 1])
def test_one_kind_that_times_out_delays_others_by_one_sweep(kind: int, seed: int) -> None:
    broker = Broker(silent=[kind], seed=seed)
    broker.run(120)
    assert broker.latest < broker.timeout + 1.5
    assert broker.longest_sweep < 2 * broker.timeout
    assert broker.blocked < 0.15 * 120


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("first", [0, KINDS - 10])
def test_ten_kinds_that_time_out_on_a_healthy_broker(first: int, seed: int) -> None:
    """Until each of them is known, and then no more than one."""
    broker = Broker(seed=seed)
    broker.run(10)
    broker.silent = names(range(first, first + 10))
    broker.run(60)
    assert broker.latest < 10 * (broker.timeout + 1.5)
    assert broker.longest_sweep < 2 * broker.timeout
    broker.forget_the_past()
    broker.run(120)
    assert broker.latest < broker.timeout + 1.5
    assert broker.blocked < 0.5 * 120


def test_a_frozen_broker() -> None:
    broker = Broker()
    [wakeup] = broker.enqueue("kind-03", "lost")
    broker.index.claim("kind-03", [(wakeup.id, wakeup.token)], nonce="n", task_id="t")
    began, ended = broker.clock(), list[float]()

    def see_the_end() -> None:
        if not broker.index.counts("kind-03")[Status.RUNNING]:
            ended.append(broker.clock())

    broker.frozen = True
    broker.run(120, see_the_end)
    assert broker.longest_sweep <= 2.0
    pauses = [round(later - earlier) for earlier, later in pairwise(broker.attempts())]
    assert pauses == [2, 2, 2, 3, 5, 9, 17, 31, 31], "three in a row, then after rests of 1, 2, 4, ... s"
    assert ended[0] - began <= 1.1 * LEASE + 1.5, "a lost lease waits for no broker"

    broker.forget_the_past()
    broker.frozen, thawed = False, broker.clock()
    broker.run(LONGEST_REST + 2)
    assert {kind for _, kind in broker.tried} == set(broker.kinds), "whoever tried in vain rests no longer"
    assert broker.attempts()[0] - thawed <= LONGEST_REST
    broker.forget_the_past()
    broker.run(10)
    assert broker.latest < 0.5


# What the log says -------------------------------------------------------------------------------


def test_a_refusal_is_told_once_with_the_kind_and_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "celery_goalstate")
    broker = Broker(refused=[3, 4])
    broker.run(60)
    told = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert sorted(record.message.partition(" cannot")[0] for record in told) == [
        "the messages of kind-03",
        "the messages of kind-04",
    ]
    assert all("configuration" in record.message for record in told)
    assert all("KeyError: 'queue'" in record.message for record in told)
    assert len(caplog.records) == 2
    broker.refused.remove("kind-03")
    broker.run(LONGEST_REST + 1)
    assert [record.message for record in caplog.records[2:]] == [
        "the sweeper works again for the messages of kind-03"
    ]


def test_a_broker_that_is_away_is_told_once_whatever_the_number_of_kinds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "celery_goalstate")
    broker = Broker()
    broker.frozen = True
    broker.run(120)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == "the sweeper waits for the broker: TimeoutError: timed out"
    broker.frozen = False
    broker.run(2 * LONGEST_REST)
    assert [record.message for record in caplog.records[1:]] == ["the sweeper works again for the broker"]


def test_one_kind_that_times_out_again_and_again_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker(silent=[3])
    broker.run(120)
    assert len(caplog.records) == 1


def test_who_has_nothing_more_to_publish_has_no_problem(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "celery_goalstate")
    broker = Broker(refused=[3])
    broker.run(5)
    broker.index.delete("kind-03", [""])
    broker.sweeper.sweep()
    assert not broker.sweeper.problems
    assert caplog.records[-1].message == "the sweeper works again for the messages of kind-03"
