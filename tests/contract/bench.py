"""The words in which the contract is written: one entity at a time, sensible defaults, no ceremony."""

from __future__ import annotations

import itertools
from typing import Any

from celery_goalstate.index.base import (
    Claim,
    Finish,
    Finished,
    Limits,
    Policy,
    Record,
    Refusal,
    Report,
    Request,
    Run,
    Scheduled,
    Status,
    Survey,
    Verdict,
    Wakeup,
    Watch,
)
from tests.contract.lanes import Lane, Row, check

KIND = "order"


class Bench:
    """An index, its clock, and short names for what happens to the entity `a` of the kind `order`."""

    def __init__(self, lane: Lane, limits: Limits) -> None:
        self.lane = lane
        self.limits = limits
        self._names = itertools.count(1)

    @property
    def index(self) -> Any:
        return self.lane.index

    @property
    def now(self) -> int:
        return self.lane.clock.now

    def advance(self, ms: int) -> int:
        """Let time pass, and check whether all is well."""
        check(self.lane.stored())
        return self.lane.clock.advance(ms)

    def _name(self, of: str) -> str:
        return f"{of}-{next(self._names)}"

    # -- what happens

    def enqueue(
        self,
        id: str = "a",
        delay: int | None = 0,
        *,
        at: int | None = None,
        task_id: str | None = None,
        note: str = "",
        **options: Any,
    ) -> Scheduled:
        """Enqueue one entity after `delay` ms, or at a time; every wake-up has a task id of its own."""
        request = Request(id, None if at is not None else delay, at, task_id or self._name("task"), note)
        (reply,) = self.index.enqueue(KIND, [request], **options)
        return reply

    def replace(self, id: str = "a", delay: int = 0, *, max_wait: int | None = None) -> Scheduled:
        return self.enqueue(id, delay, policy=Policy.REPLACE, max_wait=max_wait)

    def claim(
        self,
        wakeup: Wakeup | None,
        *,
        nonce: str | None = None,
        task_id: str | None = None,
        resent_at: int | None = None,
    ) -> Claim | Refusal:
        """A worker receives a wake-up."""
        assert wakeup is not None, "no wake-up was given"
        (reply,) = self.index.claim(
            KIND,
            [(wakeup.id, wakeup.token)],
            nonce=nonce or self._name("nonce"),
            task_id=wakeup.task_id if task_id is None else task_id,
            resent_at=wakeup.resent_at if resent_at is None else resent_at,
        )
        return reply

    def start(self, wakeup: Wakeup | None, **options: Any) -> Claim:
        """A worker receives a wake-up and may evaluate."""
        reply = self.claim(wakeup, **options)
        assert isinstance(reply, Claim), reply
        return reply

    def run(self, id: str = "a", *, task_id: str | None = None, delay: int = 0, note: str = "") -> Claim:
        """Enqueue an entity, wait, and start its evaluation."""
        scheduled = self.enqueue(id, delay, task_id=task_id, note=note)
        self.advance(delay)
        wakeup = scheduled.wakeup or self.promote(id)
        return self.start(wakeup)

    def evaluate(self, id: str = "a") -> Claim:
        """The evaluation that is pending starts, as soon as it is due."""
        record = self.record(id)
        assert record.deadline is not None
        self.advance(max(0, record.deadline - self.now))
        wakeup = self.promote(id) or Wakeup(id, self.record(id).token, 0, record.task_id)
        return self.start(wakeup)

    def finish(self, run: Claim | Run, verdict: Verdict = Verdict.DONE, **report: Any) -> Finished:
        report = {"delay": None, **report}
        (reply,) = self.index.finish(KIND, [Report(run.id, run.lease, verdict, **report)])
        return reply

    def fail(self, run: Claim | Run, delay: int | None = 10_000, **report: Any) -> Finished:
        """An evaluation fails and is to be tried again."""
        report = {"failures": 1, "error": "boom", **report}
        return self.finish(run, Verdict.FAILED, delay=delay, **report)

    def quarantine(self, run: Claim | Run, **report: Any) -> Finished:
        """An evaluation fails for good."""
        report = {"failures": 1, "error": "boom", **report}
        return self.finish(run, Verdict.QUARANTINED, **report)

    def unstarted(self, run: Claim | Run, **report: Any) -> Finished:
        """An evaluation is given back."""
        return self.finish(run, Verdict.UNSTARTED, **report)

    def lose(self, run: Claim | Run, delay: int | None = 10_000, **report: Any) -> Finished:
        """The sweeper ends an evaluation whose lease has run out."""
        lost_at = report.pop("lost_at", None) or self.lease_end(run.id)
        return self.fail(run, delay, lost_at=lost_at, **{"error": "WorkerLost", **report})

    def renew(self, run: Claim | Run, where: str = "") -> bool:
        named = Run(run.id, run.lease)
        (reply,) = self.index.renew(KIND, [named], where={named: where} if where else {})
        return reply

    def delete(self, id: str = "a") -> bool:
        (reply,) = self.index.delete(KIND, [id])
        return reply

    def put_back(self, wakeup: Wakeup | None) -> None:
        assert wakeup is not None, "no wake-up was given"
        self.index.put_back(KIND, [wakeup])

    def pause(self) -> None:
        self.index.pause(KIND, by="ann@ops-1")

    def resume(self) -> None:
        self.index.resume(KIND)

    # -- what the sweeper does

    def survey(
        self, *, sweeper: str = "s1", hold: int = 5_000, limit: int = 100, watch: Watch | None = None
    ) -> Survey:
        """What the one shard of the kind has for a sweeper."""
        watched = {} if watch is None else {(KIND, 0): watch}
        (survey,) = self.index.survey([KIND], sweeper=sweeper, hold=hold, limit=limit, watched=watched)
        return survey

    def sweep_for(self, ms: int, *, sweeper: str = "s1") -> Survey:
        """Let time pass while a sweeper counts it; its last survey."""
        survey = self.survey(sweeper=sweeper)
        while ms > 0:
            step = min(ms, self.limits.margin)
            self.advance(step)
            survey = self.survey(sweeper=sweeper, watch=Watch(survey.count, step))
            ms -= step
        return survey

    def promote(self, id: str = "a", *, task_id: str | None = None) -> Wakeup | None:
        replies = self.index.promote(KIND, {id: task_id or self._name("task")})
        return replies[0] if replies else None

    def resend(self, id: str = "a", *, task_id: str | None = None, probe: bool = True) -> Wakeup | None:
        """The sweeper searches a lost message; as a probe it is sent again in any case."""
        replies = self.index.resend(KIND, {id: task_id or self._name("task")}, probe=id if probe else None)
        return replies[0] if replies else None

    # -- what there is

    def describe(self, id: str = "a") -> Record | None:
        (record,) = self.index.describe(KIND, [id])
        return record

    def record(self, id: str = "a") -> Record:
        record = self.describe(id)
        assert record is not None, f"{id} is not known"
        return record

    def status(self, id: str = "a") -> Status | None:
        record = self.describe(id)
        return record.status if record else None

    def lease_end(self, id: str = "a") -> int:
        """The count at which its lease ends."""
        row = self.row(id)
        assert row is not None
        assert row.status is Status.RUNNING
        assert row.score is not None
        return row.score

    def row(self, id: str = "a") -> Row | None:
        """What is stored of an entity; None: nothing."""
        return self.lane.stored().get((KIND, id))


ACCEPTED = Finished(Finish.ACCEPTED)
FENCED = Finished(Finish.FENCED)
