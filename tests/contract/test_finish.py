"""Finish: what becomes of an entity after its evaluation, and of what was enqueued meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from celery_goalstate.index.base import Finish, Finished, Limits, Policy, Run, Status, Verdict
from tests.contract.bench import ACCEPTED, FENCED, Bench

HORIZON = Limits().eta_horizon
FAR = 10 * HORIZON
DONE, FAILED, QUARANTINED = Verdict.DONE, Verdict.FAILED, Verdict.QUARANTINED


@dataclass(frozen=True)
class End:
    """An evaluation ends with a verdict and asks for another evaluation, others have enqueued meanwhile."""

    verdict: Verdict
    asked: int | None
    outside: int | None
    deadline: int | None  #: from now on; None: nothing is pending
    respect: bool = False
    failures: int = 2  #: afterwards; the report says 2

    def __str__(self) -> str:
        floor = ", back-off respected" if self.respect else ""
        return f"{self.verdict}, asks {self.asked}, outside {self.outside}{floor}"


ENDS = [
    End(DONE, None, None, None, failures=0),
    End(DONE, None, 5_000, 5_000, failures=0),
    End(DONE, None, 0, 0, failures=0),
    End(DONE, 0, None, 0, failures=0),
    End(DONE, 3_000, None, 3_000, failures=0),
    End(DONE, 3_000, 5_000, 3_000, failures=0),
    End(DONE, 5_000, 3_000, 3_000, failures=0),
    End(DONE, FAR, None, FAR, failures=0),
    End(DONE, FAR, 3_000, 3_000, failures=0),
    End(DONE, 3_000, FAR, 3_000, failures=0),
    End(FAILED, 10_000, None, 10_000),
    End(FAILED, 0, None, 0),
    End(FAILED, FAR, None, FAR),
    End(FAILED, 10_000, 5_000, 5_000),
    End(FAILED, 10_000, 15_000, 10_000),
    End(FAILED, FAR, 5_000, 5_000),
    End(FAILED, 10_000, FAR, 10_000),
    End(FAILED, 10_000, None, 10_000, respect=True),
    End(FAILED, 10_000, 5_000, 10_000, respect=True),
    End(FAILED, 10_000, 15_000, 10_000, respect=True),
    End(FAILED, FAR, 0, FAR, respect=True),
    End(QUARANTINED, None, None, None),
    End(QUARANTINED, None, 5_000, 5_000, failures=0),
    End(QUARANTINED, None, FAR, FAR, failures=0),
    End(QUARANTINED, None, 0, 0, failures=0, respect=True),
]


class TestFinish:
    @pytest.mark.parametrize("end", ENDS, ids=str)
    def test_what_was_asked_for_and_what_was_enqueued_meet(self, bench: Bench, end: End) -> None:
        run = bench.run()
        if end.outside is not None:
            bench.enqueue(delay=end.outside)
        finished = bench.finish(
            run,
            end.verdict,
            delay=end.asked,
            failures=0 if end.verdict is DONE else 2,
            error="" if end.verdict is DONE else "boom",
            respect_backoff=end.respect,
            fresh_task_id="fresh",
        )
        deadline = None if end.deadline is None else bench.now + end.deadline
        assert (finished.result, finished.deadline) == (Finish.ACCEPTED, deadline)
        record = bench.record()
        assert (record.deadline, record.failures, record.finished) == (deadline, end.failures, bench.now)
        assert record.error == ("boom" if end.failures else "")
        assert (record.lease, record.lease_expires, record.started) == ("", None, None)
        if end.deadline is None:
            assert finished.wakeup is None
            assert record.status is (Status.FAILED if end.verdict is QUARANTINED else Status.IDLE)
            assert record.since == (bench.now if end.verdict is QUARANTINED else None)
        elif end.deadline > HORIZON:
            assert finished.wakeup is None
            assert record.status is Status.PARKED
        else:
            assert finished.wakeup is not None
            assert (finished.wakeup.token, finished.wakeup.delay) == (record.token, end.deadline)
            assert record.status is Status.SENT

    def test_an_enqueue_that_is_overdue_at_the_end_keeps_its_deadline(self, bench: Bench) -> None:
        run = bench.run()
        enqueued = bench.enqueue(delay=1_000)
        bench.advance(5_000)
        finished = bench.finish(run)
        assert finished.deadline == enqueued.deadline
        assert finished.wakeup is not None
        assert finished.wakeup.delay == 0
        assert bench.start(finished.wakeup).lateness == 4_000

    def test_what_was_found_is_kept(self, bench: Bench) -> None:
        bench.finish(bench.run(), converged=True, rounds=0, task_id="t9")
        assert (bench.record().converged, bench.record().task_id) == (True, "t9")
        bench.finish(bench.run(), converged=False, delay=0, rounds=3)
        assert (bench.record().converged, bench.record().rounds) == (False, 3)
        bench.quarantine(bench.evaluate())
        assert (bench.record().converged, bench.record().rounds) == (None, 0)

    def test_a_window_that_is_full_parks_the_next_look(self, open_bench: Any) -> None:
        bench = open_bench(Limits(window=2))
        run = bench.run("a")
        bench.enqueue("b")
        assert bench.finish(run, delay=0) == Finished(Finish.ACCEPTED, bench.now, None)
        assert bench.status() is Status.PARKED
        assert bench.promote()


class TestTaskIds:
    """A retry is the same Celery task once more; any other evaluation is a task of its own."""

    def end(self, bench: Bench, delay: int, verdict: Verdict = FAILED, **report: Any) -> Finished:
        run = bench.run(task_id="t1")
        if "outside" in report:
            bench.enqueue(delay=report.pop("outside"))
        return bench.finish(run, verdict, delay=delay, task_id="t1", retries=4, fresh_task_id="t2", **report)

    @pytest.mark.parametrize(
        ("delay", "report", "task_id", "retries"),
        [
            (5_000, {}, "t1", 5),
            (5_000, {"outside": 6_000}, "t1", 5),
            (5_000, {"outside": 4_000}, "t2", 0),
            (5_000, {"outside": 4_000, "respect_backoff": True}, "t1", 5),
            (5_000, {"verdict": DONE}, "t2", 0),
        ],
    )
    def test_of_the_next_look(
        self, bench: Bench, delay: int, report: dict[str, Any], task_id: str, retries: int
    ) -> None:
        wakeup = self.end(bench, delay, **report).wakeup
        assert wakeup is not None
        assert (wakeup.task_id, wakeup.retries) == (task_id, retries)
        assert bench.record().task_id == task_id

    def test_a_parked_retry_keeps_it(self, bench: Bench) -> None:
        assert self.end(bench, FAR).wakeup is None
        assert bench.record().task_id == "t1"
        bench.advance(FAR - HORIZON)
        wakeup = bench.promote(task_id="t3")
        assert wakeup is not None
        assert (wakeup.task_id, wakeup.retries) == ("t1", 5)

    def test_a_parked_look_that_is_no_retry_gets_one_when_it_is_sent(self, bench: Bench) -> None:
        assert self.end(bench, FAR, DONE).wakeup is None
        bench.advance(FAR - HORIZON)
        wakeup = bench.promote(task_id="t3")
        assert wakeup is not None
        assert (wakeup.task_id, wakeup.retries) == ("t3", 0)

    @pytest.mark.parametrize("delay", [5_000, FAR])
    def test_a_retry_that_is_moved_gets_a_fresh_one(self, bench: Bench, delay: int) -> None:
        """A worker that knows the old one as revoked would drop it for ever."""
        self.end(bench, delay)
        wakeup = bench.enqueue(delay=1_000, task_id="t3").wakeup
        assert wakeup is not None
        assert (wakeup.task_id, wakeup.retries) == ("t3", 0)

    def test_a_retry_that_is_not_moved_keeps_it(self, bench: Bench) -> None:
        self.end(bench, 5_000)
        assert bench.enqueue(delay=6_000, task_id="t3").wakeup is None
        assert bench.record().task_id == "t1"

    def test_a_retry_that_is_claimed_starts_no_chain_by_itself(self, bench: Bench) -> None:
        wakeup = self.end(bench, 0).wakeup
        run = bench.start(wakeup)
        finished = bench.finish(run, delay=0, task_id="t1", retries=5, fresh_task_id="t6")
        assert finished.wakeup is not None
        assert (finished.wakeup.task_id, finished.wakeup.retries) == ("t6", 0)


class TestLease:
    @pytest.mark.parametrize("lease", ["0", "1", "x"])
    def test_a_lease_that_is_not_held_changes_nothing(self, bench: Bench, lease: str) -> None:
        assert bench.finish(Run("a", lease)) == FENCED
        for happens in (bench.enqueue, bench.evaluate, lambda: bench.quarantine(bench.run("b"))):
            happens()
            before = bench.row()
            assert bench.finish(Run("a", lease), delay=0) == FENCED
            assert bench.row() == before

    def test_the_lease_of_a_former_run_changes_nothing(self, bench: Bench) -> None:
        first = bench.run()
        bench.fail(first)
        second = bench.evaluate()
        before = bench.row()
        assert bench.finish(Run("a", second.lease[:-1])) == FENCED
        assert bench.row() == before
        bench.finish(second)
        assert bench.finish(first) == FENCED

    def test_one_that_ran_out_unnoticed_is_accepted(self, bench: Bench) -> None:
        run = bench.run()
        bench.advance(5 * bench.limits.lease)
        assert bench.finish(run) == ACCEPTED

    @pytest.mark.parametrize(
        ("passed", "renewed", "result"),
        [
            (0, False, Finish.FENCED),
            (29_999, False, Finish.FENCED),
            (30_000, False, Finish.ACCEPTED),
            (90_000, False, Finish.ACCEPTED),
            (90_000, True, Finish.FENCED),
        ],
    )
    def test_the_sweeper_ends_only_what_has_run_out(
        self, bench: Bench, passed: int, renewed: bool, result: Finish
    ) -> None:
        run = bench.run()
        bench.advance(passed)
        if renewed:
            bench.renew(run)
        before = bench.row()
        finished = bench.fail(run, 10_000, expired_only=True, error="WorkerLost")
        assert finished.result is result
        if result is Finish.ACCEPTED:
            assert bench.record().error == "WorkerLost"
            assert finished.deadline == bench.now + 10_000
        else:
            assert bench.row() == before

    def test_the_run_that_was_given_up_is_refused(self, bench: Bench) -> None:
        run = bench.run()
        bench.advance(bench.limits.lease)
        bench.fail(run, 10_000, expired_only=True, error="WorkerLost")
        before = bench.row()
        assert bench.finish(run, converged=True) == FENCED
        assert not bench.renew(run)
        assert bench.row() == before

    def test_the_sweeper_comes_too_late(self, bench: Bench) -> None:
        run = bench.run()
        bench.advance(bench.limits.lease)
        bench.finish(run)
        before = bench.row()
        assert bench.fail(run, 10_000, expired_only=True) == FENCED
        assert bench.row() == before


class TestAgain:
    """The same report again, since the reply to the first was lost."""

    @pytest.mark.parametrize("end", ENDS, ids=str)
    @pytest.mark.parametrize("expired_only", [False, True])
    def test_gets_the_same_reply(self, bench: Bench, end: End, expired_only: bool) -> None:
        run = bench.run()
        if end.outside is not None:
            bench.enqueue(delay=end.outside)
        bench.advance(bench.limits.lease)
        report = {"delay": end.asked, "failures": 2, "respect_backoff": end.respect}
        first = bench.finish(run, end.verdict, expired_only=expired_only, **report)
        before = bench.row()
        assert bench.finish(run, end.verdict, expired_only=expired_only, **report) == first
        assert bench.row() == before

    def test_gets_the_wakeup_that_counts_now(self, bench: Bench) -> None:
        run = bench.run()
        bench.finish(run, delay=5_000)
        moved = bench.enqueue(delay=1_000)
        assert bench.finish(run, delay=5_000) == Finished(Finish.ACCEPTED, moved.deadline, moved.wakeup)

    def test_publishes_nothing_once_the_next_look_has_begun(self, bench: Bench) -> None:
        run = bench.run()
        second = bench.start(bench.finish(run, delay=0).wakeup)
        assert bench.finish(run, delay=0) == ACCEPTED
        bench.finish(second)
        assert bench.finish(run, delay=0) == FENCED

    def test_after_a_delete_it_is_fenced(self, bench: Bench) -> None:
        run = bench.run()
        bench.finish(run, delay=0)
        bench.delete()
        assert bench.finish(run, delay=0) == FENCED
        bench.enqueue()
        assert bench.finish(run, delay=0) == FENCED
        assert bench.record().deadline == bench.now


class TestIdle:
    @pytest.mark.parametrize(("ttl", "gone"), [(None, False), (0, True), (10_000, True), (10_001, False)])
    def test_a_record_is_kept_for_its_time(self, bench: Bench, ttl: int | None, gone: bool) -> None:
        bench.finish(bench.run(), idle_ttl=ttl)
        bench.advance(10_000)
        assert bench.survey().expired == (("a",) if gone else ())
        assert bench.index.forget("order", ["a"]) == int(gone)
        assert (bench.describe() is None) == gone

    def test_only_idle_records_are_forgotten(self, bench: Bench) -> None:
        bench.quarantine(bench.run("failed"), idle_ttl=0)
        bench.finish(bench.run("sent"), delay=0, idle_ttl=0)
        bench.finish(bench.run("parked"), delay=FAR, idle_ttl=0)
        bench.run("running")
        bench.finish(bench.run("again"), idle_ttl=0)
        bench.enqueue("again", policy=Policy.RESYNC)
        ids = ["failed", "sent", "parked", "running", "again", "unknown"]
        assert bench.survey().expired == ()
        assert bench.index.forget("order", ids) == 0
        assert [record.id if record else None for record in bench.index.describe("order", ids)] == [
            *ids[:-1],
            None,
        ]
