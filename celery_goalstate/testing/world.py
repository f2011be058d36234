"""The parts of an engine in a simulation: an index in memory, and leases by the simulated clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from celery_goalstate.exceptions import IndexUnavailable
from celery_goalstate.index.base import (
    Claim,
    Finished,
    Limits,
    Refusal,
    Report,
    Request,
    Run,
    Scheduled,
    Status,
)
from celery_goalstate.index.memory import MemoryIndex
from celery_goalstate.worker.lease import Lease


class SimulatedIndex(MemoryIndex):
    """The reference index, which the contract suite ties to Redis. It can be away, and tells what it is told.

    `clock` is in milliseconds. `enqueuing` gets each call beforehand, and what it raises reaches the caller;
    `claimed` gets each claim, `finished` each report and its reply.
    """

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], int],
        *,
        is_away: Callable[[], bool],
        enqueuing: Callable[[str, Sequence[Request], Run | None], None],
        claimed: Callable[[Claim], None],
        finished: Callable[[str, Report, Finished], None],
    ) -> None:
        super().__init__(limits, clock)
        self._lock: Any = _Door(self._lock, is_away)
        self._enqueuing, self._claimed, self._finished = enqueuing, claimed, finished

    def enqueue(
        self, kind: str, requests: Sequence[Request], *, inside: Run | None = None, **options: Any
    ) -> list[Scheduled]:
        """See `Index`."""
        self._enqueuing(kind, requests, inside)
        return super().enqueue(kind, requests, inside=inside, **options)

    def claim(self, kind: str, *args: Any, **options: Any) -> list[Claim | Refusal]:
        """See `Index`."""
        claims = super().claim(kind, *args, **options)
        for claim in claims:
            if isinstance(claim, Claim):
                self._claimed(claim)
        return claims

    def finish(self, kind: str, reports: Sequence[Report]) -> list[Finished]:
        """See `Index`."""
        replies = super().finish(kind, reports)
        for report, reply in zip(reports, replies, strict=True):
            self._finished(kind, report, reply)
        return replies

    def pending(self) -> list[tuple[str, str]]:
        """Kind and id of what has an evaluation before it, or under way; nothing of a paused kind waits."""
        return [
            (kind, entity.id)
            for kind, shard in self._kinds.items()
            for entity in shard.entities.values()
            if entity.status is Status.RUNNING
            or (entity.status in {Status.PARKED, Status.SENT} and not shard.paused)
        ]

    def next_change(self, sweep: int) -> int | None:
        """When time alone changes something next, by a sweep; sweeps are so many milliseconds apart."""
        now, times = self._clock(), []
        for shard in self._kinds.values():
            for entity in shard.entities.values():
                if entity.status is Status.RUNNING:
                    times.append(now + self._limits.margin)  # so much a sweep counts at once
                elif entity.status in {Status.PARKED, Status.SENT} and not shard.paused:
                    due = entity.deadline if entity.status is Status.PARKED else entity.suspect_at
                    times.append(due if due is not None and due > now else now + sweep)
        return min(times, default=None)


class _Door:
    """The lock through which each call passes; closed while the index is away."""

    def __init__(self, lock: Any, is_away: Callable[[], bool]) -> None:
        self._lock, self._is_away = lock, is_away

    def __enter__(self) -> None:
        if self._is_away():
            raise IndexUnavailable("the index is away (in the simulation)", away_for=math.inf)
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()


class SimulatedKeeper:
    """Keeps leases without a thread: whoever moves the clock has them renewed. Times are in seconds."""

    def __init__(self, index: SimulatedIndex, lease: float, clock: Callable[[], float]) -> None:
        self._index = index
        self.length, self.clock = lease, clock
        self.leases: list[Lease] = []  #: those of workers that do not stall

    def held(self, lease: Lease) -> bool:
        """See `Keeper`."""
        return not lease.lost and self.clock() < lease.expires

    @contextmanager
    def keep(self, kind: str, run: Run, *, claimed_at: float, max_run: float) -> Iterator[Lease]:
        """See `Keeper`."""
        lease = Lease(
            kind, run, renew_at=math.inf, expires=claimed_at + self.length, until=claimed_at + max_run
        )
        self.leases.append(lease)
        try:
            yield lease
        finally:
            lease.ended = True
            if lease in self.leases:  # not if its worker was stalled and others were killed meanwhile
                self.leases.remove(lease)

    @contextmanager
    def alarm(self, at: float, call: Callable[[], None]) -> Iterator[None]:  # noqa: ARG002 - see below
        """Nothing: a simulation evaluates no batch."""
        yield

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Nobody renews the leases that are held now while the block runs."""
        leases, self.leases = self.leases, []
        try:
            yield
        finally:
            self.leases = leases
            self.renew()

    def renew(self) -> None:
        """Renew the leases that are held."""
        for lease in self.leases:
            if self.clock() < lease.until:
                with suppress(IndexUnavailable):
                    [renewed] = self._index.renew(lease.kind, [lease.run])
                    lease.lost |= not renewed
                    if renewed:
                        lease.expires = self.clock() + self.length
