"""A worker that runs plain tasks, its broker behind a proxy, and the faults that hit them. See `paired`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
from celery import Celery

from tests.chaos.plain import AFTER, BEFORE, DIRECTORY, TASK, Arrival, Notes
from tests.chaos.proxy import Proxy
from tests.servers import RedisServer, Valkey, poll
from tests.supervised import Supervised

T = TypeVar("T")

POOLS = ("prefork", "solo")
IDLE = (
    "idle"  #: beside the points of a task: the worker waits for messages, which come when the fault has begun
)
QUEUE, UNACKED = "celery", "unacked"  # keys of kombu's

#: Seconds. A worker needs up to 5 to see that a child was killed, and holds other messages meanwhile.
VISIBILITY = 8.0
SETTINGS: dict[str, Any] = {
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "broker_transport_options": {
        "visibility_timeout": VISIBILITY,
        "unacked_restore_interval": 2.0,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 2,  # the lock of who takes messages back; with a lost reply it stays
    },
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "task_ignore_result": True,
}

REST = 0.2  # seconds in which no message is taken or acknowledged: the worker waits for the task that is hit
QUIET = 1.0  # seconds without a run, with nothing on the broker: nor has the worker anything in its memory
STUCK = VISIBILITY + 6.0  # seconds without a run: a worker takes less to start, a message less to come again
GIVEN_UP = 90.0  # seconds


# The faults --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Of faults. One begins when its context is entered, and is over when that is left."""

    begin: Callable[[Side, Arrival], AbstractContextManager[None]]
    points: tuple[str, ...] = (BEFORE, AFTER)
    pools: tuple[str, ...] = POOLS
    kills: bool = False  #: the task that is hit does not go on
    seconds: tuple[float, float] = (0.1, 1.2)  #: how long it lasts, at least and at most
    ends: tuple[int, int] = (0, 0)  #: the same in ends of the worker by itself; 0: these do not matter


@dataclass(frozen=True)
class Fault:
    """As it was drawn."""

    kind: str
    tasks: int  #: how many are sent with it
    hit: int  #: which of these is hit, from 0 on; not for an idle worker
    point: str
    pause: float  #: seconds from when a task is at the point until it is hit
    seconds: float  #: until it is over
    ends: int  #: of the worker by itself, after which it is over, too; 0: these do not matter


@contextlib.contextmanager
def _child_killed(side: Side, hit: Arrival) -> Iterator[None]:
    os.kill(hit.pid, signal.SIGKILL)
    yield


@contextlib.contextmanager
def _worker_killed(side: Side, hit: Arrival) -> Iterator[None]:
    side.worker.signal(signal.SIGKILL)  # its child is left to the supervisor
    yield


@contextlib.contextmanager
def _cut(side: Side, hit: Arrival) -> Iterator[None]:
    side.cut()
    yield


@contextlib.contextmanager
def _closed(side: Side, hit: Arrival) -> Iterator[None]:
    side.proxy.is_open = False
    side.cut()
    yield
    side.proxy.is_open = True


@contextlib.contextmanager
def _silent(side: Side, hit: Arrival) -> Iterator[None]:
    with side.proxy.silence():
        yield


@contextlib.contextmanager
def _reply_lost(side: Side, hit: Arrival) -> Iterator[None]:
    side.proxy.lose_replies(1)
    yield
    side.proxy.lose_replies(0)


@contextlib.contextmanager
def _broker_killed(side: Side, hit: Arrival) -> Iterator[None]:
    side.broker.kill()
    yield
    side.broker.start()


@contextlib.contextmanager
def _full(side: Side, hit: Arrival) -> Iterator[None]:
    """As if somebody else's data had filled it: whatever may need memory is refused."""
    side.redis.config_set("maxmemory", 1)
    yield
    side.redis.config_set("maxmemory", 0)


ANYWHERE = (BEFORE, AFTER, IDLE)
LANES: dict[str, dict[str, Kind]] = {
    "kills": {
        "SIGKILL of the pool's child": Kind(_child_killed, pools=("prefork",), kills=True),
        "SIGKILL of the worker": Kind(_worker_killed, kills=True),
    },
    "cuts": {
        "connections are cut": Kind(_cut, ANYWHERE),
        "connections are cut and refused": Kind(_closed, ANYWHERE),
        "nothing gets through": Kind(_silent, ANYWHERE),
        "a reply is lost": Kind(_reply_lost, ANYWHERE),
        "SIGKILL of the broker": Kind(_broker_killed),
    },
    "full": {"the broker is full": Kind(_full, seconds=(5, 5), ends=(1, 2))},
}


def schedule(lane: str, pool: str, seed: int, faults: int) -> list[Fault]:
    """What a seed draws for this lane and pool."""
    draw = random.Random(f"{lane}-{pool}-{seed}")
    kinds = {name: kind for name, kind in LANES[lane].items() if pool in kind.pools}
    drawn = []
    for _ in range(faults):
        name, kind = draw.choice(list(kinds.items()))
        tasks = draw.randint(20, 40)
        drawn.append(
            Fault(
                name,
                tasks,
                hit=draw.randrange(tasks // 2),
                point=draw.choice(kind.points),
                pause=draw.uniform(0, 0.05),
                seconds=draw.uniform(*kind.seconds),
                ends=draw.randint(*kind.ends),
            )
        )
    return drawn


# A worker ----------------------------------------------------------------------------------------


class Side:
    """One of two workers that are compared."""

    def __init__(
        self, directory: Path, *, engine: bool, pool: str, broker: str, fsync: str, settings: dict[str, Any]
    ) -> None:
        """`broker`: "redis" for an embedded Valkey, or "redis-server". `fsync` is its append-only file's."""
        directory.mkdir()
        self.broker: Valkey | RedisServer
        if broker == "redis":
            self.broker = Valkey(directory / "broker", appendonly=True, appendfsync=fsync)
        else:
            self.broker = RedisServer(directory / "broker", "--appendonly", "yes", "--appendfsync", fsync)
        self._notes_server = Valkey(directory / "notes")
        self.notes = Notes(self._notes_server.url)
        self.proxy = Proxy(self.broker.port)
        shared = {
            "celery": {**SETTINGS, **settings, "broker_url": self.proxy.url},
            "notes": self._notes_server.url,
            "engine": engine,
        }
        (directory / "settings.json").write_text(json.dumps(shared))
        self.worker = Supervised(
            "worker",
            [
                *("-m", "celery", "--app", "tests.chaos.plain", "worker", "--pool", pool),
                *("--concurrency", "1", "--hostname", "worker@paired", "--loglevel", "INFO"),
            ],
            directory=directory,
            env={DIRECTORY: str(directory)},
            ready="worker@paired ready.",
        )
        self.sent: list[int] = []
        self.stuck = 0  #: how often the worker had to be killed, since it ran nothing any more
        self._sender = Celery("sender", broker=self.broker.url, set_as_current=False)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.broker)
            stack.enter_context(self._notes_server)
            stack.enter_context(self.proxy)
            self.redis = stack.enter_context(self.broker.client())
            stack.callback(self._sender.close)
            stack.callback(self.worker.end)
            self.worker.start()
            poll("the worker is ready", self.worker.is_ready, timeout=60)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def suffer(self, fault: Fault) -> None:
        """Send its tasks, and let it come and go."""
        kind = next(kinds[fault.kind] for kinds in LANES.values() if fault.kind in kinds)
        first = len(self.sent)
        if fault.point == IDLE:
            self._wait_until("the worker waits for messages", self._is_idle)
            self._send(1)  # once it has run, kombu expects no other reply for a second
            self._wait_until("it waits for the next one", self._is_idle)
            hit = Arrival(first, self.worker.pid)
        else:
            self.notes.arm(fault.point, first + fault.hit)
            self._send(fault.tasks)
            hit = self._wait_until("a task is where it is to be hit", self.notes.arrival)
            self._wait_until("the worker is at rest", _stays(REST, self._messages))
            time.sleep(fault.pause)  # as drawn
        ends = len(self.worker.own_ends) + fault.ends
        with kind.begin(self, hit):
            if fault.point == IDLE:
                self._send(fault.tasks - 1)
            elif not kind.kills:
                self.notes.let_go(hit.number)
            until = time.monotonic() + fault.seconds
            while time.monotonic() < until and (not fault.ends or len(self.worker.own_ends) < ends):
                time.sleep(0.01)  # it lasts

    def cut(self) -> None:
        """Cut the worker's connections: when this returns, the broker gives no message to them any more."""
        cut = self._connections()
        self.proxy.cut()
        poll("the broker has seen it", lambda: not cut & self._connections())

    def _connections(self) -> set[int]:
        """To the broker, but our own."""
        return {int(each["id"]) for each in self.redis.client_list()} - {self.redis.client_id()}

    def settle(self) -> None:
        """Wait until everything has run that will."""
        # As long as there are messages, it is always something else.
        quiet = _stays(QUIET, lambda: time.monotonic() if any(self._messages()) else self.notes.runs())
        self._wait_until("the broker has no message, and nothing runs", quiet)

    def _send(self, tasks: int) -> None:
        """Straight to the broker, which is there, and has room."""
        with self._sender.connection_for_write() as connection:
            for _ in range(tasks):
                self._sender.send_task(TASK, [len(self.sent)], connection=connection)
                self.sent.append(len(self.sent))

    def _messages(self) -> tuple[int, int]:
        """How many wait, and how many the worker has taken."""
        return self.redis.llen(QUEUE), self.redis.hlen(UNACKED)

    def _is_idle(self) -> bool:
        return not any(self._messages()) and self.redis.info("clients")["blocked_clients"] > 0

    def _wait_until(self, description: str, condition: Callable[[], T | None]) -> T:
        """The first true result. A worker that gets stuck meanwhile is killed, as by a liveness probe."""
        given_up = time.monotonic() + GIVEN_UP
        is_stuck = _stays(STUCK, self.notes.runs)
        while not (result := condition()):
            if time.monotonic() > given_up:
                pytest.fail(f"waited {GIVEN_UP:g} s in vain: {description}")
            if is_stuck():
                self.stuck += 1
                self.worker.signal(signal.SIGKILL)
                is_stuck = _stays(STUCK, self.notes.runs)
            time.sleep(0.01)  # polls: the deadline is above
        return result


def _stays(seconds: float, what: Callable[[], object]) -> Callable[[], bool]:
    """Whether it was always the same in the last seconds, as often as this was asked."""
    last, since = what(), time.monotonic()

    def it_does() -> bool:
        nonlocal last, since
        if (now := what()) != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > seconds

    return it_does
