"""Finish: what becomes of an entity after its evaluation, and of what was enqueued meanwhile."""

from __future__ import annotations

from collections.abc import Callable
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

    def test_the_sweeper_ends_what_has_run_out(self, bench: Bench) -> None:
        run = bench.run()
        finished = bench.lose(run)
        assert (finished.result, finished.deadline) == (Finish.ACCEPTED, bench.now + 10_000)
        assert bench.record().error == "WorkerLost"

    def test_but_not_what_was_renewed_since_it_judged(self, bench: Bench) -> None:
        run = bench.run()
        judged = bench.lease_end()
        bench.sweep_for(1)
        bench.renew(run)
        before = bench.row()
        assert bench.lose(run, lost_at=judged) == FENCED
        assert bench.row() == before

    def test_the_run_that_was_given_up_is_refused(self, bench: Bench) -> None:
        run = bench.run()
        bench.lose(run)
        before = bench.row()
        assert bench.finish(run, converged=True) == FENCED
        assert not bench.renew(run)
        assert bench.row() == before

    def test_the_sweeper_comes_too_late(self, bench: Bench) -> None:
        run = bench.run()
        judged = bench.lease_end()
        bench.finish(run)
        before = bench.row()
        assert bench.fail(run, lost_at=judged) == FENCED
        assert bench.row() == before


class TestFenced:
    """The refused report of an evaluation that had begun an action: its late write may have undone another's.

    One evaluation more follows, unless one that starts after it is pending already.
    """

    def fenced(self, bench: Bench, delay: int = 10_000) -> Run:
        run = bench.run()
        bench.lose(run, delay)
        return run

    def report(self, bench: Bench, run: Run, **report: Any) -> Finished:
        return bench.finish(run, began=True, fresh_task_id="again", **report)

    def test_schedules_an_idle_entity_at_once(self, bench: Bench) -> None:
        run = self.fenced(bench, 0)
        bench.finish(bench.evaluate(), converged=True)
        finished = self.report(bench, run)
        assert (finished.result, finished.deadline) == (Finish.FENCED, bench.now)
        assert finished.wakeup is not None
        assert finished.wakeup.task_id == "again"
        assert self.report(bench, run) == finished, "repeated, since its reply was lost"
        bench.finish(bench.start(finished.wakeup))

    @pytest.mark.parametrize("verdict", Verdict)
    def test_whatever_it_reports(self, bench: Bench, verdict: Verdict) -> None:
        run = self.fenced(bench, 0)
        bench.finish(bench.evaluate())
        delay = 5_000 if verdict is FAILED else None
        assert self.report(bench, run, verdict=verdict, delay=delay).deadline == bench.now

    @pytest.mark.parametrize(
        ("end", "deadline"),
        [(Bench.finish, 0), (Bench.fail, 10_000), (Bench.quarantine, None), (Bench.unstarted, 0)],
    )
    def test_is_noted_while_another_evaluation_runs(
        self, bench: Bench, end: Callable[..., Finished], deadline: int | None
    ) -> None:
        """That may have read before the late write. As its own word, it comes after a back-off."""
        run = self.fenced(bench, 0)
        other = bench.evaluate()
        assert self.report(bench, run) == Finished(Finish.FENCED, bench.now, None)
        ended = end(bench, other, fresh_task_id="t2")
        assert ended.deadline == (None if deadline is None else bench.now + deadline)

    @pytest.mark.parametrize("delay", [0, 10_000, FAR])
    def test_a_pending_evaluation_counts_as_that_one(self, bench: Bench, delay: int) -> None:
        run = self.fenced(bench, delay)
        before = bench.row()
        assert self.report(bench, run) == Finished(Finish.FENCED, bench.now + delay, None)
        assert bench.row() == before

    @pytest.mark.parametrize("end", ["quarantined", "forgotten", "deleted while it runs"])
    def test_leads_to_nothing(self, bench: Bench, end: str) -> None:
        run = self.fenced(bench, 0)
        other = bench.evaluate()
        if end == "quarantined":
            bench.quarantine(other)
        else:
            bench.delete()
        if end == "forgotten":
            bench.finish(other)
        before = bench.row()
        assert self.report(bench, run) == FENCED
        assert bench.row() == before

    def test_nor_if_it_had_not_begun_or_is_the_sweeper_s(self, bench: Bench) -> None:
        run = self.fenced(bench, 0)
        bench.finish(bench.evaluate())
        assert bench.finish(run) == FENCED
        assert bench.fail(run, began=True, lost_at=1) == FENCED
        assert bench.status() is Status.IDLE

    @pytest.mark.parametrize("lease", ["x", "", "9" * 17])
    def test_nor_of_a_lease_that_never_was(self, bench: Bench, lease: str) -> None:
        bench.finish(bench.run())
        assert self.report(bench, Run("a", lease)) == FENCED

    def test_one_evaluation_of_a_new_life(self, bench: Bench) -> None:
        run = self.fenced(bench)
        bench.delete()
        bench.finish(bench.run())
        assert self.report(bench, run).deadline == bench.now


class TestGone:
    """The entity does not exist any more."""

    def test_it_is_forgotten(self, bench: Bench) -> None:
        run = bench.run(note="n")
        bench.enqueue(inside=Run("a", run.lease))
        assert bench.finish(run, Verdict.GONE) == ACCEPTED
        assert bench.row() is None

    def test_what_was_enqueued_meanwhile_is_a_new_life(self, bench: Bench) -> None:
        bench.fail(bench.run(), failures=3)
        run = bench.evaluate()
        fresh = bench.enqueue(delay=5_000)
        finished = bench.finish(run, Verdict.GONE, failures=4, error="boom", fresh_task_id="t2")
        assert finished.deadline == fresh.deadline
        assert (bench.record().failures, bench.record().error, bench.record().finished) == (0, "", None)

    def test_repeated_it_stays_so(self, bench: Bench) -> None:
        run = bench.run()
        bench.finish(run, Verdict.GONE)
        assert bench.finish(run, Verdict.GONE, began=True) == FENCED
        assert bench.row() is None

    def test_refused_it_is_a_refused_report_like_any_other(self, bench: Bench) -> None:
        run = bench.run()
        bench.lose(run, 0)
        bench.finish(bench.evaluate())
        assert bench.finish(run, Verdict.GONE, began=True).deadline == bench.now


class TestAgain:
    """The same report again, since the reply to the first was lost."""

    @pytest.mark.parametrize("end", ENDS, ids=str)
    @pytest.mark.parametrize("lost", [False, True])
    def test_gets_the_same_reply(self, bench: Bench, end: End, lost: bool) -> None:
        run = bench.run()
        if end.outside is not None:
            bench.enqueue(delay=end.outside)
        bench.advance(bench.limits.lease)
        report = {"delay": end.asked, "failures": 2, "respect_backoff": end.respect}
        report["lost_at"] = bench.lease_end() if lost else None
        first = bench.finish(run, end.verdict, **report)
        before = bench.row()
        assert bench.finish(run, end.verdict, **report) == first
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
