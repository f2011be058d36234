"""The reference index: every transition in plain Python, in one process.

It is the executable specification of `redis.py` and its scripts (one contract suite and one state machine
run against both), and the index behind `memory://` brokers and `task_always_eager`. It looks through all
entries where Redis uses a sorted set: clear before fast.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from celery_goalstate.index.base import (
    RESEND_INTERVALS,
    SHORTEST_DELAY,
    Claim,
    Finish,
    Finished,
    Limits,
    Policy,
    Record,
    Refusal,
    Refused,
    Report,
    Request,
    Run,
    Running,
    Scheduled,
    Status,
    Survey,
    Verdict,
    Wakeup,
)


@dataclass(slots=True)
class _Entry:
    """One entity. `status` and `score` are what the five sorted sets of the Redis index say."""

    status: Status = Status.IDLE
    score: int | None = None  # parked: deadline; sent: when its message is missed; running: lease expiry;
    #                           idle: expiry (None: never); failed: since when
    deadline: int | None = None  # of the pending evaluation
    since: int | None = None  # first enqueue from outside that is still pending
    own: int | None = None  # deadline asked for by the entity's own evaluation under way
    floor: int | None = None  # no enqueue may come before this
    token: str = ""
    task_id: str = ""
    retries: int = 0  # of task_id; above 0 the pending evaluation is a retry and keeps its task id
    resends: int = 0
    resent: int | None = None
    lease: str = ""
    nonce: str = ""  # of the claim that holds the lease
    batch: bool = False  # claimed together with others
    alone: bool = False  # lost with a batch: not to be claimed with others until it was evaluated
    due: int | None = None  # the deadline of the evaluation under way
    deleted: bool = False  # while it was running
    failures: int = 0
    looks: int = 0
    error: str = ""
    converged: bool | None = None
    finished: int | None = None
    last: str = ""  # the last report that was accepted

    def forget_message(self) -> None:
        """There is no wake-up under way any more, or none that counts; a retry keeps its task id."""
        self.token, self.resends, self.resent = "", 0, None
        if not self.retries:
            self.task_id = ""

    def forget_pending(self) -> None:
        self.retries = 0
        self.forget_message()
        self.deadline = self.since = self.floor = None


@dataclass(slots=True)
class _Kind:
    entries: dict[str, _Entry] = field(default_factory=dict)
    paused: bool = False
    reached: int = 0  # when the newest message that has arrived at a worker was sent
    sweeper: str = ""
    swept_until: int = 0

    def with_status(self, status: Status) -> list[tuple[str, _Entry]]:
        """Entries in one status, lowest score first."""
        found = [(id, entry) for id, entry in self.entries.items() if entry.status is status]
        return sorted(found, key=lambda item: (item[1].score is None, item[1].score or 0, item[0]))

    def under_way(self) -> int:
        return sum(entry.status is Status.SENT for entry in self.entries.values())


def _wall_clock() -> int:
    return time.time_ns() // 1_000_000


class MemoryIndex:
    """An `Index` in this process's memory; shared by threads, not by processes."""

    def __init__(self, limits: Limits, clock: Callable[[], int] = _wall_clock) -> None:
        self._limits = limits
        self._clock = clock
        self._kinds: defaultdict[str, _Kind] = defaultdict(_Kind)
        self._noted: set[str] = set()
        self._last_token = 0
        self._lock = threading.RLock()

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
        with self._lock:
            self.note([kind])
            return [
                self._enqueue(self._kinds[kind], request, policy, max_wait, inside) for request in requests
            ]

    def _enqueue(
        self, kind: _Kind, request: Request, policy: Policy, max_wait: int | None, inside: Run | None
    ) -> Scheduled:
        now = self._clock()
        wanted = request.at if request.at is not None else now + (request.delay or 0)
        wanted = max(wanted, now)
        entry = kind.entries.get(request.id)
        speaks_itself = inside is not None and inside.id == request.id
        resync = policy in {Policy.RESYNC, Policy.REVIVE}

        if entry and entry.status is Status.RUNNING:
            if resync and not (entry.deleted and entry.deadline is None):
                return Scheduled(False, _earliest(entry.deadline, entry.own), None)
            before = _earliest(entry.deadline, entry.own)
            if inside and speaks_itself and inside.lease == entry.lease and not entry.deleted:
                entry.own = self._choose(entry.own, wanted, now, entry, policy, max_wait)
            else:
                entry.deadline = self._choose(entry.deadline, wanted, now, entry, policy, max_wait)
                entry.since = entry.since or now
            after = _earliest(entry.deadline, entry.own)
            return Scheduled(after != before, after, None)

        if entry and entry.status in {Status.PARKED, Status.SENT}:
            # An evaluation that was fenced speaks: the look that is pending starts after it in any case.
            if resync or speaks_itself:
                return Scheduled(False, entry.deadline, None)
            deadline = self._choose(entry.deadline, wanted, now, entry, policy, max_wait)
            entry.since = entry.since or now
            if deadline == entry.deadline:
                if entry.token and entry.task_id == request.task_id:
                    # The same request again, since the reply to the first was lost.
                    return Scheduled(True, deadline, self._wakeup(request.id, entry))
                return Scheduled(False, deadline, None)
            near = deadline <= now + self._limits.eta_horizon
            later = entry.status is Status.SENT and deadline > (entry.deadline or 0)
            if later and near and not kind.paused:
                # Its message arrives early and is sent again then: a burst sends one message, not one each.
                entry.deadline, entry.resends, entry.resent = deadline, 0, None
                entry.score = deadline + self._limits.resend_after
                same = entry.task_id == request.task_id
                return Scheduled(True, deadline, self._wakeup(request.id, entry) if same else None)
            entry.retries = 0
            entry.forget_message()
            entry.status = Status.PARKED
            return Scheduled(True, deadline, self._place(kind, request.id, entry, deadline, request.task_id))

        if entry and entry.status is Status.FAILED and (policy is Policy.RESYNC or speaks_itself):
            return Scheduled(False, None, None)
        if entry is None:
            entry = kind.entries[request.id] = _Entry()
        entry.failures, entry.error, entry.looks, entry.task_id = 0, "", 0, ""
        deadline = self._choose(None, wanted, now, entry, policy, max_wait)
        entry.since = now
        return Scheduled(True, deadline, self._place(kind, request.id, entry, deadline, request.task_id))

    @staticmethod
    def _choose(
        current: int | None, wanted: int, now: int, entry: _Entry, policy: Policy, max_wait: int | None
    ) -> int:
        """Which of the deadline in force and the one asked for is to be in force."""
        if policy is Policy.REPLACE and max_wait is not None:
            wanted = min(wanted, max(now, (entry.since or now) + max_wait))
        wanted = max(wanted, entry.floor or 0)
        if policy is Policy.REPLACE:
            if current is not None and current <= now and wanted <= now:
                return current  # overdue already: nothing moves it back in the queue
            return wanted
        return wanted if current is None else min(current, wanted)

    def _place(self, kind: _Kind, id: str, entry: _Entry, deadline: int, task_id: str) -> Wakeup | None:
        """Put a pending evaluation where it belongs: sent, with a new token, or parked.

        Half of the window is kept for the sweeper's promotions, so that those who enqueue now
        never starve those who wait since long.
        """
        now = self._clock()
        entry.deadline = deadline
        near = deadline <= now + self._limits.eta_horizon
        if near and not kind.paused and kind.under_way() < (self._limits.window + 1) // 2:
            return self._send(id, entry, task_id)
        entry.status, entry.score = Status.PARKED, deadline
        return None

    def _send(self, id: str, entry: _Entry, task_id: str) -> Wakeup:
        assert entry.deadline is not None  # noqa: S101 - a pending evaluation has one
        entry.status = Status.SENT
        entry.score = max(entry.deadline, self._clock()) + self._limits.resend_after
        entry.token = self._next_token()
        if not entry.retries:
            entry.task_id = task_id
        return self._wakeup(id, entry)

    def _wakeup(self, id: str, entry: _Entry, shortest: int = 0) -> Wakeup:
        assert entry.deadline is not None  # noqa: S101 - as above
        delay = max(shortest, entry.deadline - self._clock())
        return Wakeup(id, entry.token, delay, entry.task_id, entry.retries, entry.resent, entry.alone)

    def _next_token(self) -> str:
        self._last_token = max(self._last_token + 1, self._clock() * 1000)
        return str(self._last_token)

    def put_back(self, kind: str, wakeups: Sequence[Wakeup]) -> None:
        with self._lock:
            for wakeup in wakeups:
                entry = self._kinds[kind].entries.get(wakeup.id)
                if entry and entry.status is Status.SENT and entry.token == wakeup.token:
                    self._park(entry)

    @staticmethod
    def _park(entry: _Entry) -> None:
        entry.forget_message()
        entry.status, entry.score = Status.PARKED, entry.deadline

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
            known, batch = self._kinds[kind], len(wakeups) > 1
            return [self._claim(known, id, token, nonce, task_id, resent_at, batch) for id, token in wakeups]

    def _claim(
        self, kind: _Kind, id: str, token: str, nonce: str, task_id: str, resent_at: int | None, batch: bool
    ) -> Claim | Refusal:
        now = self._clock()
        entry = kind.entries.get(id)
        if entry is None or entry.deleted:
            return Refusal(id, Refused.MISSING)
        if entry.status is Status.RUNNING and entry.nonce == nonce:
            return self._claimed(id, entry)
        if entry.status is not Status.SENT or entry.token != token or entry.deadline is None:
            return Refusal(id, Refused.STALE)
        # A token tells when it was sent; of a later time only the index's own word counts, not the message's.
        sent_again = min(resent_at or 0, entry.resent or 0)
        kind.reached = max(kind.reached, min(int(token) // 1000, now), sent_again)
        if kind.paused:
            self._park(entry)
            return Refusal(id, Refused.PAUSED)
        if entry.deadline > now + self._limits.eta_horizon:
            # Sent by who had a longer horizon, or before the clock was set back: no worker waits so long.
            self._park(entry)
            return Refusal(id, Refused.EARLY)
        if entry.deadline > now:
            return Refusal(id, Refused.EARLY, self._wakeup(id, entry, SHORTEST_DELAY))
        return self._lease(id, entry, nonce, task_id, batch)

    def _lease(self, id: str, entry: _Entry, nonce: str, task_id: str, batch: bool) -> Claim:
        entry.due = entry.deadline
        entry.forget_pending()
        entry.status = Status.RUNNING
        entry.lease, entry.nonce, entry.task_id = self._next_token(), nonce, task_id
        entry.batch = batch and not entry.alone
        return self._claimed(id, entry)

    def _claimed(self, id: str, entry: _Entry) -> Claim:
        """The reply to a claim. Said again, since the first was lost, the lease lasts from then."""
        assert entry.due is not None  # noqa: S101 - a running evaluation fell due
        now = self._clock()
        entry.score = now + self._limits.lease
        return Claim(id, entry.lease, entry.failures, entry.looks, entry.due, max(0, now - entry.due))

    def take(self, kind: str, limit: int, *, nonce: str, task_id: str) -> list[Claim]:
        with self._lock:
            known, now = self._kinds[kind], self._clock()
            if known.paused:
                return []
            parked = known.with_status(Status.PARKED)
            due = [
                (id, entry) for id, entry in parked if entry.deadline is not None and entry.deadline <= now
            ]
            return [
                self._lease(id, entry, nonce, task_id, batch=True)
                for id, entry in due[:limit]
                if not entry.alone
            ]

    def renew(self, kind: str, runs: Sequence[Run]) -> list[bool]:
        with self._lock:
            return [self._renew(self._kinds[kind], run) for run in runs]

    def _renew(self, kind: _Kind, run: Run) -> bool:
        entry = kind.entries.get(run.id)
        if entry is None or entry.status is not Status.RUNNING or entry.lease != run.lease:
            return False
        entry.score = self._clock() + self._limits.lease
        return True

    def finish(self, kind: str, reports: Sequence[Report]) -> list[Finished]:
        with self._lock:
            return [self._finish(self._kinds[kind], report) for report in reports]

    def _finish(self, kind: _Kind, report: Report) -> Finished:
        now = self._clock()
        entry = kind.entries.get(report.id)
        if entry is None:
            return Finished(Finish.FENCED)
        name = f"{report.lease} lost" if report.expired_only else report.lease
        if entry.status is not Status.RUNNING or entry.lease != report.lease:
            if not entry.last or entry.last != name:
                return Finished(Finish.FENCED)
            wakeup = self._wakeup(report.id, entry) if entry.status is Status.SENT else None
            return Finished(Finish.ACCEPTED, entry.deadline, wakeup)
        if report.expired_only and (entry.score or 0) > now:
            return Finished(Finish.FENCED)

        outside, since, own, deleted = entry.deadline, entry.since, entry.own, entry.deleted
        unstarted = report.verdict is Verdict.UNSTARTED or (report.expired_only and entry.batch)
        due = entry.due
        entry.forget_pending()
        entry.lease, entry.nonce, entry.due, entry.own, entry.deleted = "", "", None, None, False
        entry.batch = False
        entry.task_id, entry.last = report.task_id or entry.task_id, name
        if deleted and outside is None:
            del kind.entries[report.id]
            return Finished(Finish.ACCEPTED)
        if deleted:
            # Of the old life nothing is left but the name.
            entry.failures, entry.looks, entry.error, entry.alone = 0, 0, "", False
            entry.converged = entry.finished = None
            deadline = outside
        elif unstarted:
            entry.alone = entry.alone or report.expired_only
            deadline = _earliest(due, outside)
        else:
            entry.alone = entry.alone and report.expired_only
            entry.failures, entry.looks, entry.error = report.failures, report.looks, report.error
            entry.converged, entry.finished = report.converged, now
            asked = None if report.delay is None else now + report.delay
            if report.verdict is Verdict.DONE:
                deadline = _earliest(asked, own, outside)
            elif report.verdict is Verdict.FAILED:
                deadline = asked if report.respect_backoff else _earliest(asked, outside)
                if report.respect_backoff:
                    entry.floor = asked
                if deadline == asked and report.task_id:
                    entry.retries = report.retries + 1
            else:
                deadline = outside
                if outside is None:
                    entry.status, entry.score = Status.FAILED, now
                    return Finished(Finish.ACCEPTED)
                entry.failures, entry.error = 0, ""
        if deadline is None:
            entry.status = Status.IDLE
            entry.score = None if report.idle_ttl is None else now + report.idle_ttl
            return Finished(Finish.ACCEPTED)
        entry.since = since
        entry.status = Status.PARKED
        if not entry.retries:
            entry.task_id = ""
        wakeup = self._place(kind, report.id, entry, deadline, report.fresh_task_id)
        return Finished(Finish.ACCEPTED, deadline, wakeup)

    # -- what operators do

    def delete(self, kind: str, ids: Sequence[str]) -> list[bool]:
        with self._lock:
            return [self._delete(self._kinds[kind], id) for id in ids]

    @staticmethod
    def _delete(kind: _Kind, id: str) -> bool:
        entry = kind.entries.get(id)
        if entry is None:
            return False
        if entry.status is not Status.RUNNING:
            del kind.entries[id]
            return True
        known = not entry.deleted or entry.deadline is not None
        entry.deleted, entry.deadline, entry.since, entry.own = True, None, None, None
        return known

    def pause(self, kind: str) -> None:
        with self._lock:
            self._kinds[kind].paused = True

    def resume(self, kind: str) -> None:
        with self._lock:
            self._kinds[kind].paused = False

    def paused(self, kind: str) -> bool:
        with self._lock:
            return self._kinds[kind].paused

    def describe(self, kind: str, ids: Sequence[str]) -> list[Record | None]:
        with self._lock:
            entries = self._kinds[kind].entries
            return [self._record(id, entries[id]) if id in entries else None for id in ids]

    @staticmethod
    def _record(id: str, entry: _Entry) -> Record | None:
        if entry.deleted:
            return None if entry.deadline is None else Record(id, Status.PARKED, deadline=entry.deadline)
        running = entry.status is Status.RUNNING
        return Record(
            id,
            entry.status,
            deadline=_earliest(entry.deadline, entry.own),
            token=entry.token,
            task_id=entry.task_id,
            lease=entry.lease,
            lease_expires=entry.score if running else None,
            failures=entry.failures,
            looks=entry.looks,
            error=entry.error,
            converged=entry.converged,
            finished=entry.finished,
            started=int(entry.lease) // 1000 if running else None,
            since=entry.score if entry.status is Status.FAILED else None,
            expires=entry.score if entry.status is Status.IDLE else None,
            floor=entry.floor,
            alone=entry.alone,
        )

    def records(self, kind: str, status: Status, limit: int) -> list[Record]:
        with self._lock:
            found = self._kinds[kind].with_status(status)[:limit]
            records = [self._record(id, entry) for id, entry in found]
            # A deleted run that was enqueued since is no run to be seen.
            return [record for record in records if record is not None and record.status is status]

    def counts(self, kind: str) -> Mapping[Status, int]:
        with self._lock:
            return {status: len(self._kinds[kind].with_status(status)) for status in Status}

    # -- what the sweeper does

    def survey(self, kinds: Iterable[str], *, sweeper: str, hold: int, limit: int) -> list[Survey]:
        with self._lock:
            surveys = [self._survey(name, sweeper, hold, limit) for name in kinds]
            return [survey for survey in surveys if survey is not None]

    def _survey(self, name: str, sweeper: str, hold: int, limit: int) -> Survey | None:
        now = self._clock()
        kind = self._kinds[name]
        if kind.swept_until > now and kind.sweeper != sweeper:
            return None
        kind.sweeper, kind.swept_until = sweeper, now + hold

        def up_to(time: int, status: Status, most: int) -> tuple[str, ...]:
            found = kind.with_status(status)
            return tuple(
                [id for id, entry in found if entry.score is not None and entry.score <= time][:most]
            )

        due: tuple[str, ...] = ()
        suspect: tuple[str, ...] = ()
        if not kind.paused:
            room = max(0, min(limit, self._limits.window - kind.under_way()))
            due = up_to(now + self._limits.eta_horizon, Status.PARKED, room)
            suspect = up_to(min(kind.reached, now), Status.SENT, limit)
            suspect = suspect or up_to(now, Status.SENT, 1)  # for a probe
        lost = up_to(now, Status.RUNNING, limit)
        expired = up_to(now, Status.IDLE, limit)
        return Survey(name, 0, due, suspect, lost, expired)

    def promote(self, kind: str, requests: Mapping[str, str]) -> list[Wakeup]:
        with self._lock:
            found = [self._promote(self._kinds[kind], id, task_id) for id, task_id in requests.items()]
            return [wakeup for wakeup in found if wakeup is not None]

    def _promote(self, kind: _Kind, id: str, task_id: str) -> Wakeup | None:
        entry = kind.entries.get(id)
        if entry and entry.status is Status.SENT and entry.task_id == task_id:
            return self._wakeup(id, entry)  # said again, since the reply to the first was lost
        if entry is None or entry.status is not Status.PARKED or entry.deadline is None or kind.paused:
            return None
        near = entry.deadline <= self._clock() + self._limits.eta_horizon
        if not near or kind.under_way() >= self._limits.window:
            return None
        return self._send(id, entry, task_id)

    def resend(self, kind: str, requests: Mapping[str, str], *, probe: str | None) -> list[Wakeup]:
        with self._lock:
            found = [
                self._resend(self._kinds[kind], id, task_id, sure=id == probe)
                for id, task_id in requests.items()
            ]
            return [wakeup for wakeup in found if wakeup is not None]

    def _resend(self, kind: _Kind, id: str, task_id: str, *, sure: bool) -> Wakeup | None:
        now, patience = self._clock(), self._limits.resend_after
        entry = kind.entries.get(id)
        if entry is None or entry.status is not Status.SENT or entry.deadline is None or kind.paused:
            return None
        if entry.task_id == task_id:
            return self._wakeup(id, entry)  # said again, as above
        if entry.score is None or entry.score > (now if sure else min(kind.reached, now)):
            return None
        entry.resends += 1
        entry.resent = now
        entry.score = now + patience * min(2**entry.resends, RESEND_INTERVALS)
        entry.task_id, entry.retries = task_id, 0
        return self._wakeup(id, entry)

    def running(self, kind: str, ids: Sequence[str]) -> list[Running]:
        with self._lock:
            found = [(id, self._kinds[kind].entries.get(id)) for id in ids]
            return [Running(id, entry.lease, entry.failures) for id, entry in found if entry and entry.lease]

    def forget(self, kind: str, ids: Sequence[str]) -> int:
        with self._lock:
            entries, now = self._kinds[kind].entries, self._clock()
            expired = [
                id
                for id in ids
                if id in entries
                and entries[id].status is Status.IDLE
                and (score := entries[id].score) is not None
                and score <= now
            ]
            for id in expired:
                del entries[id]
            return len(expired)

    def as_kept(self, kind: str) -> MemoryIndex | None:
        with self._lock:
            return self if kind in self._noted else None

    def adopt(self, kind: str, records: Sequence[Record]) -> None:
        with self._lock:
            self.note([kind])
            for record in records:
                self._kinds[kind].entries.setdefault(record.id, self._adopted(record))

    @staticmethod
    def _adopted(record: Record) -> _Entry:
        entry = _Entry(
            status=record.status,
            score=record.since if record.status is Status.FAILED else record.expires,
            task_id=record.task_id,
            failures=record.failures,
            looks=record.looks,
            error=record.error,
            converged=record.converged,
            finished=record.finished,
            alone=record.alone,
        )
        if record.deadline is not None:
            entry.status, entry.score, entry.task_id = Status.PARKED, record.deadline, ""
            entry.deadline, entry.floor = record.deadline, record.floor
        return entry

    def retire(self, kind: str, records: Sequence[Record]) -> list[bool]:
        with self._lock:
            return [self._retire(self._kinds[kind], record) for record in records]

    @staticmethod
    def _retire(kind: _Kind, record: Record) -> bool:
        entry = kind.entries.get(record.id)
        if entry is None:
            return True
        same = (entry.deadline, entry.finished) == (record.deadline, record.finished)
        if entry.status is Status.RUNNING or not same:
            return False
        del kind.entries[record.id]
        return True

    def evicts(self) -> str:
        return ""

    def close(self) -> None:
        """There is nothing to release."""


def _earliest(*deadlines: int | None) -> int | None:
    return min((deadline for deadline in deadlines if deadline is not None), default=None)
