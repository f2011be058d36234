"""The reference index, in one process's memory: what `transitions` do, under a lock.

One contract suite and one state machine run against it and against `redis.py`. It is also the index behind
`memory://` brokers and `task_always_eager`. It goes through all entities where Redis uses a sorted set: clear
before fast.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from types import MappingProxyType

from celery_goalstate.index import transitions as do
from celery_goalstate.index.base import (
    Claim,
    DeletedAll,
    Finished,
    Limits,
    Listing,
    Overview,
    Pause,
    Policy,
    Position,
    Record,
    Refusal,
    Report,
    Request,
    Run,
    Running,
    Scheduled,
    Server,
    Status,
    Survey,
    Wakeup,
    Watch,
    check_notes,
    records_after,
)
from celery_goalstate.index.counters import Metrics, metrics_of


def _wall_clock() -> int:
    return time.time_ns() // 1_000_000


class MemoryIndex:
    """An `Index` in this process's memory; shared by threads, not by processes."""

    def __init__(self, limits: Limits, clock: Callable[[], int] = _wall_clock) -> None:
        self._limits = limits
        self._clock = clock
        self._kinds: defaultdict[str, do.Shard] = defaultdict(do.Shard)  # each has one shard
        self._noted: set[str] = set()
        self._lock = threading.RLock()

    def _on(self, kind: str) -> tuple[do.Shard, Limits, int]:
        """What every transition of a kind is about."""
        return self._kinds[kind], self._limits, self._clock()

    # -- kinds

    def note(self, kinds: Iterable[str]) -> None:
        with self._lock:
            self._noted.update(kinds)

    def kinds(self) -> list[str]:
        with self._lock:
            return sorted(self._noted)

    # -- scheduling

    def enqueue(
        self,
        kind: str,
        requests: Sequence[Request],
        *,
        policy: Policy = Policy.EARLIEST,
        max_wait: int | None = None,
        inside: Run | None = None,
    ) -> list[Scheduled]:
        check_notes(requests)
        with self._lock:
            self._noted.add(kind)
            call = do.Enqueuing(*self._on(kind), policy, max_wait, inside)
            return [call.enqueue(call.open(request.id), request) for request in requests]

    def put_back(self, kind: str, wakeups: Sequence[Wakeup]) -> None:
        with self._lock:
            call = do.PuttingBack(*self._on(kind))
            for wakeup in wakeups:
                call.put_back(call.open(wakeup.id), wakeup)

    # -- evaluating

    def claim(
        self,
        kind: str,
        wakeups: Sequence[tuple[str, str]],
        *,
        nonce: str,
        task_id: str,
        resent_at: int | None = None,
    ) -> list[Claim | Refusal]:
        with self._lock:
            call = do.Claiming(*self._on(kind), nonce, task_id, resent_at, batch=len(wakeups) > 1)
            return [call.claim(call.open(id), token) for id, token in wakeups]

    def take(self, kind: str, limit: int, *, nonce: str, task_id: str) -> list[Claim]:
        with self._lock:
            call = do.Taking(*self._on(kind), nonce, task_id)
            taken = [call.take(call.open(id)) for id in call.overdue(limit)]
            return [claim for claim in taken if claim is not None]

    def renew(
        self, kind: str, runs: Sequence[Run], *, where: Mapping[Run, str] = MappingProxyType({})
    ) -> list[bool]:
        with self._lock:
            call = do.Renewing(*self._on(kind))
            return [call.renew(call.open(run.id), run, where.get(run, "")) for run in runs]

    def finish(self, kind: str, reports: Sequence[Report]) -> list[Finished]:
        with self._lock:
            call = do.Finishing(*self._on(kind))
            return [call.finish(call.open(report.id), report) for report in reports]

    # -- what operators do

    def delete(self, kind: str, ids: Sequence[str]) -> list[bool]:
        with self._lock:
            call = do.Deleting(*self._on(kind))
            return [call.delete(call.open(id)) for id in ids]

    def delete_all(self, kind: str) -> DeletedAll:
        with self._lock:
            call = do.DeletingAll(*self._on(kind))
            token = call.begin()
            runs = self._meet_all(kind)
            return DeletedAll(call.over(token), tuple(sorted(runs)), {})

    def _meet_all(self, kind: str) -> list[Running]:
        return self.running(kind, list(self._kinds[kind].entities))

    def forget_kind(self, kind: str) -> bool:
        with self._lock:
            forgotten = do.ForgettingKind(*self._on(kind)).forget_kind()
            if forgotten:
                self._noted.discard(kind)
            return forgotten

    def pause(self, kind: str, *, by: str) -> None:
        with self._lock:
            do.Pausing(*self._on(kind), by).pause()

    def resume(self, kind: str) -> None:
        with self._lock:
            self._kinds[kind].paused = None

    def paused(self, kind: str) -> Pause | None:
        with self._lock:
            return self._kinds[kind].paused

    def overviews(self, kinds: Iterable[str]) -> Mapping[str, Overview]:
        with self._lock:
            return {kind: do.Overviewing(*self._on(kind)).overview() for kind in kinds}

    def metrics(self, kinds: Iterable[str]) -> Mapping[str, Metrics]:
        with self._lock:
            return {kind: metrics_of(self._kinds[kind].counters) for kind in kinds}

    def describe(self, kind: str, ids: Sequence[str], *, history: bool = False) -> list[Record | None]:
        with self._lock:
            call = do.Describing(*self._on(kind), history)
            return [call.describe(call.open(id)) for id in ids]

    def records(
        self, kind: str, listing: Status | Listing, limit: int, after: Position | None = None
    ) -> list[Record]:
        with self._lock:
            call = do.Paging(*self._on(kind))
            return records_after(
                after,
                listing,
                limit,
                page=lambda size, after: call.page(listing, size, after),
                describe=lambda ids: self.describe(kind, ids),
            )

    def counts(self, kind: str) -> Mapping[Status, int]:
        with self._lock:
            return {status: len(self._kinds[kind].with_status(status)) for status in Status}

    # -- what the sweeper does

    def holds(self, kinds: Iterable[str], *, sweeper: str) -> Mapping[tuple[str, int], str]:
        with self._lock:
            held = {kind: self._kinds[kind] for kind in kinds}
            return {
                (kind, 0): "" if shard.sweeper in {"", sweeper} else f"{shard.count} {shard.swept_until}"
                for kind, shard in held.items()
            }

    def survey(
        self,
        kinds: Iterable[str],
        *,
        sweeper: str,
        hold: int,
        limit: int,
        watched: Mapping[tuple[str, int], Watch] = MappingProxyType({}),
        leave_out: Container[tuple[str, int]] = (),
    ) -> list[Survey]:
        with self._lock:
            calls = {
                kind: do.Surveying(*self._on(kind), sweeper, hold, limit, watched.get((kind, 0)))
                for kind in kinds
                if (kind, 0) not in leave_out
            }
            found = [call.survey(kind) for kind, call in calls.items()]
            return [survey for survey in found if survey is not None]

    def promote(self, kind: str, requests: Mapping[str, str]) -> list[Wakeup]:
        with self._lock:
            call = do.Promoting(*self._on(kind))
            sent = [call.promote(call.open(id), task_id) for id, task_id in requests.items()]
            return [wakeup for wakeup in sent if wakeup is not None]

    def resend(self, kind: str, requests: Mapping[str, str], *, probe: str | None) -> list[Wakeup]:
        with self._lock:
            call = do.Resending(*self._on(kind), probe)
            sent = [call.resend(call.open(id), task_id) for id, task_id in requests.items()]
            return [wakeup for wakeup in sent if wakeup is not None]

    def running(self, kind: str, ids: Sequence[str]) -> list[Running]:
        with self._lock:
            call = do.ListingRuns(*self._on(kind))
            found = [call.running(call.open(id)) for id in ids]
            return [running for running in found if running is not None]

    def forget(self, kind: str, ids: Sequence[str]) -> int:
        with self._lock:
            call = do.Forgetting(*self._on(kind))
            return sum(call.forget(call.open(id)) for id in ids)

    # -- moving

    def as_kept(self, kind: str) -> MemoryIndex | None:
        with self._lock:
            return self if kind in self._noted else None

    def adopt(self, kind: str, records: Sequence[Record]) -> None:
        with self._lock:
            self._noted.add(kind)
            call = do.Adopting(*self._on(kind))
            for record in records:
                call.adopt(call.open(record.id), record)

    def retire(self, kind: str, records: Sequence[Record]) -> list[bool]:
        with self._lock:
            call = do.Retiring(*self._on(kind))
            return [call.retire(call.open(record.id), record) for record in records]

    def servers(self) -> list[Server]:
        return [Server("this process", self._clock(), saves=False)]

    def evicts(self) -> str:
        return ""

    def close(self) -> None:
        """There is nothing to release."""
