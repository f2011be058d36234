"""Delete means gone: nothing of the old life starts, and a new one begins with a clean slate."""

from __future__ import annotations

from typing import Any

import pytest

from celery_goalstate.index.base import (
    Finish,
    Finished,
    Policy,
    Record,
    Refusal,
    Run,
    Scheduled,
    Status,
    Verdict,
)
from tests.contract.bench import ACCEPTED, KIND, Bench


class TestAtRest:
    @pytest.mark.parametrize("status", ["parked", "sent", "idle", "failed"])
    def test_nothing_is_left(self, bench: Bench, status: str) -> None:
        wakeup = bench.enqueue().wakeup
        if status == "parked":
            bench.put_back(wakeup)
        elif status == "idle":
            bench.finish(bench.start(wakeup))
        elif status == "failed":
            bench.quarantine(bench.start(wakeup))
        assert bench.status() == status
        assert bench.delete()
        assert bench.describe() is None
        assert bench.row() is None
        assert not bench.delete()
        assert not any(bench.index.counts(KIND).values())

    def test_the_unknown_was_not_known(self, bench: Bench) -> None:
        assert not bench.delete()
        bench.enqueue("b")
        assert bench.index.delete(KIND, ["a", "b", "c"]) == [False, True, False]

    def test_the_old_message_cannot_claim_the_new_life(self, bench: Bench) -> None:
        old = bench.enqueue().wakeup
        bench.delete()
        new = bench.enqueue().wakeup
        reply = bench.claim(old)
        assert isinstance(reply, Refusal)
        assert bench.start(new)

    def test_failures_are_forgotten(self, bench: Bench) -> None:
        bench.fail(bench.run(), 0, failures=7)
        bench.delete()
        assert bench.run().failures == 0

    def test_max_wait_counts_anew(self, bench: Bench) -> None:
        bench.enqueue(delay=5_000)
        bench.advance(4_000)
        bench.delete()
        assert bench.replace(delay=9_000, max_wait=10_000).deadline == bench.now + 9_000


class TestRunning:
    def test_it_finishes_and_nothing_follows(self, bench: Bench) -> None:
        run = bench.run()
        bench.enqueue()
        assert bench.delete()
        assert bench.describe() is None
        assert bench.renew(run)
        assert bench.finish(run, delay=0) == ACCEPTED
        assert bench.row() is None

    @pytest.mark.parametrize("verdict", Verdict)
    @pytest.mark.parametrize("lost", [False, True])
    def test_however_it_ends(self, bench: Bench, verdict: Verdict, lost: bool) -> None:
        run = bench.run()
        bench.enqueue(inside=Run("a", run.lease))
        bench.delete()
        bench.advance(bench.limits.lease)
        delay = None if verdict is Verdict.QUARANTINED else 0
        lost_at = bench.lease_end() if lost else None
        assert bench.finish(run, verdict, delay=delay, failures=3, lost_at=lost_at) == ACCEPTED
        assert bench.row() is None

    def test_told_once(self, bench: Bench) -> None:
        bench.run()
        assert [bench.delete(), bench.delete()] == [True, False]
        bench.enqueue(delay=1_000)
        assert [bench.delete(), bench.delete()] == [True, False]

    def test_a_new_life_waits_for_the_old_run(self, bench: Bench) -> None:
        run = bench.run()
        bench.delete()
        assert bench.enqueue(delay=1_000) == Scheduled(True, bench.now + 1_000, None)
        assert bench.describe() == Record("a", Status.PARKED, deadline=bench.now + 1_000)
        bench.advance(1_000)
        assert bench.survey().due == ()
        assert bench.promote() is None
        finished = bench.finish(run)
        assert (finished.result, finished.deadline) == (Finish.ACCEPTED, bench.now)
        claim = bench.start(finished.wakeup)
        assert (claim.failures, claim.rounds) == (0, 0)

    @pytest.mark.parametrize("verdict", Verdict)
    @pytest.mark.parametrize("lost", [False, True])
    def test_the_new_life_knows_nothing_of_the_old(self, bench: Bench, verdict: Verdict, lost: bool) -> None:
        bench.fail(bench.run(), failures=5, converged=False)
        run = bench.evaluate()
        bench.delete()
        fresh = bench.enqueue(delay=40_000)
        bench.advance(bench.limits.lease)
        report: dict[str, Any] = {
            "failures": 6,
            "rounds": 2,
            "error": "boom",
            "converged": False,
            "task_id": "t1",
            "retries": 5,
            "fresh_task_id": "t2",
            "respect_backoff": True,
        }
        delay = None if verdict is Verdict.QUARANTINED else 1_000
        lost_at = bench.lease_end() if lost else None
        finished = bench.finish(run, verdict, delay=delay, lost_at=lost_at, **report)
        assert finished.deadline == fresh.deadline
        assert finished.wakeup is not None
        assert (finished.wakeup.task_id, finished.wakeup.retries) == ("t2", 0)
        assert bench.record() == Record(
            "a", Status.SENT, deadline=fresh.deadline, token=finished.wakeup.token, task_id="t2"
        )
        assert bench.replace(delay=0).deadline == bench.now, "nor of its back-off"

    def test_the_mark_survives_an_enqueue(self, bench: Bench) -> None:
        """Else the outcome of the old run would be the new life's."""
        run = bench.run()
        bench.delete()
        bench.enqueue(delay=1_000)
        assert bench.renew(run)
        bench.enqueue(delay=500)
        bench.quarantine(run)
        assert bench.record().status is Status.SENT
        assert (bench.record().failures, bench.record().error) == (0, "")

    def test_an_enqueue_from_inside_is_no_new_life(self, bench: Bench) -> None:
        run = bench.run()
        bench.delete()
        assert bench.enqueue(delay=1_000, inside=Run("a", run.lease)) == Scheduled(False, None, None)
        assert bench.describe() is None
        assert bench.finish(run) == ACCEPTED
        assert bench.row() is None

    def test_one_noted_before_is_dropped(self, bench: Bench) -> None:
        run = bench.run()
        bench.enqueue(delay=1_000)
        bench.enqueue(delay=1_000, inside=Run("a", run.lease))
        bench.delete()
        bench.enqueue(delay=9_000)
        assert bench.finish(run, delay=0).deadline == bench.now + 9_000

    @pytest.mark.parametrize("policy", [Policy.RESYNC, Policy.REVIVE])
    def test_a_resync_finds_it_unknown_and_then_scheduled(self, bench: Bench, policy: Policy) -> None:
        run = bench.run()
        bench.delete()
        assert bench.enqueue(delay=5_000, policy=policy) == Scheduled(True, bench.now + 5_000, None)
        assert bench.enqueue(delay=1_000, policy=policy) == Scheduled(False, bench.now + 5_000, None)
        assert bench.finish(run).deadline == bench.now + 5_000

    def test_max_wait_counts_anew(self, bench: Bench) -> None:
        run = bench.run()
        bench.enqueue(delay=5_000)
        bench.advance(4_000)
        bench.delete()
        start = bench.now
        assert bench.replace(delay=9_000, max_wait=10_000).deadline == start + 9_000
        bench.advance(5_000)
        bench.finish(run)
        assert bench.replace(delay=9_000, max_wait=10_000).deadline == start + 10_000

    def test_the_sweeper_finds_a_deleted_run_that_was_lost(self, bench: Bench) -> None:
        run = bench.run()
        bench.delete()
        end = bench.lease_end()
        assert bench.sweep_for(end).lost == (("a", end),)
        assert bench.lose(run) == ACCEPTED
        assert bench.row() is None

    def test_the_end_repeated(self, bench: Bench) -> None:
        run = bench.run()
        bench.delete()
        fresh = bench.enqueue(delay=1_000)
        first = bench.fail(run)
        assert first == Finished(Finish.ACCEPTED, fresh.deadline, first.wakeup)
        assert bench.fail(run) == first
