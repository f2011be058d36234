"""Leases that are held in this process, and the thread that renews them.

The thread dies with its process, so that no lease outlives the evaluation that it stands for. It is a thread
of `threading`: a greenlet under gevent, nothing at all in a process that never evaluates. It sleeps until a
lease is a third of its length old; most evaluations have ended by then. It rings the alarms of batches, too:
a thread for each takes up to a fifth of what a batch of 64 does.

Where an `enqueue` evaluates by itself (`task_always_eager`) there is no thread: a lease is renewed when it is
asked for.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from celery_goalstate.description import Doing
from celery_goalstate.display import printable
from celery_goalstate.exceptions import IndexUnavailable
from celery_goalstate.index.base import Index, Run
from celery_goalstate.worker.stacks import Stack

logger = logging.getLogger(__name__)

THREAD_NAME = "goalstate-leases"
#: A lease is renewed when it is this part of its length old ...
RENEW_AT = 1 / 3
#: ... and if the index did not answer, again after this part.
TRY_AGAIN_AFTER = 1 / 10


def _clock() -> float:
    """Seconds. Where the system can tell, they pass while the machine is suspended: leases run out then."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


@dataclass(slots=True, eq=False)
class Lease:
    """One lease held in this process. Times are the process's own, in seconds."""

    kind: str
    run: Run
    renew_at: float
    expires: float  #: counted from *before* the index was asked: never later than the index has it
    until: float  #: not renewed after that
    lost: bool = False
    eager: bool = False  #: renewed when it is asked for, not by a thread
    ended: bool = False  #: its evaluation has
    worker: str = ""  #: Celery's name of it
    step: Callable[[], str] = lambda: ""  #: tells which one the evaluation is in
    stack: Stack | None = None  #: of its thread or greenlet

    def observe(self, worker: str, step: Callable[[], str]) -> None:
        """The evaluation begins, here; `step` tells where it is."""
        self.worker, self.step, self.stack = worker, step, Stack.of_caller()

    def doing(self) -> str:
        """What the evaluation is doing now, for the index; empty if it has not begun."""
        if self.stack is None:
            return ""
        return Doing(self.worker, os.getpid(), self.step(), self.stack.calls()).text()


@dataclass(frozen=True, slots=True, eq=False)
class Alarm:
    """What is to be called, and when."""

    at: float
    call: Callable[[], None]


class Keeper(Protocol):
    """Keeps the leases of one engine that are held in this process. Times are its own, in seconds."""

    @property
    def clock(self) -> Callable[[], float]:
        """What tells that time."""

    @property
    def length(self) -> float:
        """Of a lease that is not renewed."""

    def keep(
        self, kind: str, run: Run, *, claimed_at: float, max_run: float
    ) -> AbstractContextManager[Lease]:
        """Renew a lease while the block runs, but not for longer than `max_run` seconds."""

    def held(self, lease: Lease) -> bool:
        """Whether the lease is certainly still ours."""

    def alarm(self, at: float, call: Callable[[], None]) -> AbstractContextManager[None]:
        """Call something, in a thread of its own, if the block still runs at that time."""


class _Renewer:
    """What renews leases, whoever says when."""

    def __init__(self, index: Index, lease: float, clock: Callable[[], float] = _clock) -> None:
        self._index = index
        self.length = lease
        self.clock = clock
        self._unanswered: set[Lease] = set()  # an outage: told once when it begins, once when it ends

    def _lease(self, kind: str, run: Run, claimed_at: float, max_run: float) -> Lease:
        return Lease(
            kind,
            run,
            renew_at=claimed_at + self.length * RENEW_AT,
            expires=claimed_at + self.length,
            until=claimed_at + max_run,
        )

    def held(self, lease: Lease) -> bool:
        """See `Keeper`. By this process's clock alone: the answer comes at once."""
        return not lease.lost and self.clock() < lease.expires

    def _renew(self, leases: list[Lease]) -> None:
        by_kind: defaultdict[str, list[Lease]] = defaultdict(list)
        for lease in leases:
            if self.clock() >= lease.until:
                logger.warning(
                    "%s/%s runs for longer than its max_run: its lease ends",
                    lease.kind,
                    printable(lease.run.id),
                )
                lease.renew_at = float("inf")
            else:
                by_kind[lease.kind].append(lease)
        for kind, due in by_kind.items():
            asked_at = self.clock()
            for lease in due:
                lease.renew_at = asked_at + self.length * TRY_AGAIN_AFTER
            try:
                renewed = self._index.renew(
                    kind, [lease.run for lease in due], where={lease.run: lease.doing() for lease in due}
                )
            except Exception as error:  # noqa: BLE001 - logged; the thread must go on for the others
                self._note_outage(due, error)
                continue
            self._note_answer(due)
            for lease, still_held in zip(due, renewed, strict=True):
                if still_held:
                    lease.renew_at = asked_at + self.length * RENEW_AT
                    lease.expires = asked_at + self.length
                else:
                    lease.lost, lease.renew_at = True, float("inf")

    def _note_outage(self, due: list[Lease], error: Exception) -> None:
        if all(lease.ended for lease in self._unanswered):
            expected = isinstance(error, IndexUnavailable)
            logger.warning(
                "leases could not be renewed, trying again; an evaluation whose lease runs out, after %g s,"
                " starts no further action: %s",
                self.length,
                error,
                exc_info=None if expected else error,
            )
        self._unanswered = {lease for lease in self._unanswered if not lease.ended}.union(due)

    def _note_answer(self, due: list[Lease]) -> None:
        """Of a part of the index it may be the answer: those that got none are waited for."""
        if self._unanswered:
            self._unanswered = {lease for lease in self._unanswered.difference(due) if not lease.ended}
            if not self._unanswered:
                logger.info("leases are renewed again")


class EagerKeeper(_Renewer):
    """Renews a lease, without a thread, when somebody asks whether it is held."""

    @contextmanager
    def keep(self, kind: str, run: Run, *, claimed_at: float, max_run: float) -> Iterator[Lease]:
        """See `Keeper`."""
        lease = self._lease(kind, run, claimed_at, max_run)
        lease.eager = True
        try:
            yield lease
        finally:
            lease.ended = True

    def held(self, lease: Lease) -> bool:
        """See `Keeper`. An evaluation that stood still, in a debugger say, goes on if no other one began."""
        if self.clock() >= lease.renew_at:
            self._renew([lease])
        return super().held(lease)

    @contextmanager
    def alarm(self, at: float, call: Callable[[], None]) -> Iterator[None]:  # noqa: ARG002 - see below
        """Nothing: an `enqueue` that evaluates by itself evaluates no batch."""
        yield


class KeeperAsConfigured:
    """One of the two for each lease: tests switch `task_always_eager` on and off."""

    def __init__(self, index: Index, lease: float, eager: Callable[[], bool]) -> None:
        self._eager = eager
        self._eagerly, self._by_thread = EagerKeeper(index, lease), LeaseKeeper(index, lease)
        self.length, self.clock = lease, self._by_thread.clock

    def _now(self) -> Keeper:
        return self._eagerly if self._eager() else self._by_thread

    def keep(
        self, kind: str, run: Run, *, claimed_at: float, max_run: float
    ) -> AbstractContextManager[Lease]:
        """See `Keeper`."""
        return self._now().keep(kind, run, claimed_at=claimed_at, max_run=max_run)

    def held(self, lease: Lease) -> bool:
        """See `Keeper`."""
        return (self._eagerly if lease.eager else self._by_thread).held(lease)

    def alarm(self, at: float, call: Callable[[], None]) -> AbstractContextManager[None]:
        """See `Keeper`."""
        return self._now().alarm(at, call)


class LeaseKeeper(_Renewer):
    """Renews leases in a thread, each when it is a third of its length old."""

    def __init__(self, index: Index, lease: float, clock: Callable[[], float] = _clock) -> None:
        super().__init__(index, lease, clock)
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._leases: set[Lease] = set()
        self._alarms: set[Alarm] = set()
        self._thread: threading.Thread | None = None
        self._wakes_at = 0.0

    @contextmanager
    def keep(self, kind: str, run: Run, *, claimed_at: float, max_run: float) -> Iterator[Lease]:
        """See `Keeper`."""
        lease = self._lease(kind, run, claimed_at, max_run)
        self._start()
        with self._changed:
            self._leases.add(lease)
            self._wake_by(lease.renew_at)
        try:
            yield lease
        finally:
            lease.ended = True
            with self._changed:
                self._leases.discard(lease)

    @contextmanager
    def alarm(self, at: float, call: Callable[[], None]) -> Iterator[None]:
        """See `Keeper`."""
        alarm = Alarm(at, call)
        self._start()
        with self._changed:
            self._alarms.add(alarm)
            self._wake_by(at)
        try:
            yield
        finally:
            with self._changed:
                self._alarms.discard(alarm)

    def _start(self) -> None:
        if self._pid != os.getpid():  # a fork took the lock and the sets along, but not the thread
            self._start_afresh()
        if self._thread is None:
            with self._changed:
                if self._thread is None:
                    thread = threading.Thread(target=self._watch_for_ever, name=THREAD_NAME, daemon=True)
                    thread.start()
                    self._thread = thread

    def _wake_by(self, at: float) -> None:
        if at < self._wakes_at:
            self._changed.notify()

    def _watch_for_ever(self) -> None:
        while True:
            with self._changed:
                times = [*(lease.renew_at for lease in self._leases), *(alarm.at for alarm in self._alarms)]
                self._wakes_at = min(times, default=float("inf"))
                wait = self._wakes_at - self.clock()
                if wait > 0:
                    self._changed.wait(None if wait == float("inf") else wait)
                now = self.clock()
                due = [lease for lease in self._leases if lease.renew_at <= now]
                ringing = {alarm for alarm in self._alarms if alarm.at <= now}
                self._alarms -= ringing
            try:
                for alarm in ringing:  # no lease is to wait for what it does
                    threading.Thread(target=alarm.call, daemon=True).start()
            except RuntimeError:
                logger.exception("no thread can be started: batches wait for their slow entities")
            self._renew(due)
