"""Batches: claimed together, each with a lease of its own, and lost without blame."""

from __future__ import annotations

from typing import Any

import pytest

from celery_goalstate.index.base import (
    Claim,
    Finish,
    Finished,
    Limits,
    Refusal,
    Run,
    Status,
    Verdict,
    Wakeup,
)
from tests.contract.bench import ACCEPTED, FENCED, KIND, Bench
from tests.contract.conftest import OpenBench

LEASE, MARGIN = Limits().lease, Limits().margin
HORIZON = Limits().eta_horizon
FAR = 10 * HORIZON


def park(bench: Bench, *ids: str, delay: int = FAR) -> None:
    """Entities that wait in the index, without a message."""
    for id in ids:
        assert bench.enqueue(id, delay).wakeup is None


def take(bench: Bench, limit: int = 10, **options: Any) -> list[Claim]:
    return bench.index.take(KIND, limit, **{"nonce": bench._name("nonce"), "task_id": "t", **options})


def taken(bench: Bench, limit: int = 10) -> list[str]:
    return [claim.id for claim in take(bench, limit)]


def claim_all(bench: Bench, *wakeups: Wakeup | None) -> list[Claim | Refusal]:
    pairs = [(wakeup.id, wakeup.token) for wakeup in wakeups if wakeup]
    return bench.index.claim(KIND, pairs, nonce=bench._name("nonce"), task_id="t")


def batch(bench: Bench, ids: str = "ab") -> list[Claim]:
    """Due entities, claimed together from one message."""
    claims = claim_all(bench, *[bench.enqueue(id).wakeup for id in ids])
    return [claim for claim in claims if isinstance(claim, Claim)]


def unstarted(bench: Bench, run: Claim | Run, **report: Any) -> Finished:
    return bench.finish(run, Verdict.UNSTARTED, **report)


def lost(bench: Bench, run: Claim | Run, verdict: Verdict = Verdict.FAILED, **report: Any) -> Finished:
    """What the sweeper reports of an evaluation whose lease ran out."""
    delay = 10_000 if verdict is Verdict.FAILED else None
    report = {"failures": 7, "error": "WorkerLost", "delay": delay, **report}
    return bench.finish(run, verdict, lost_at=bench.lease_end(run.id), **report)


def lose(bench: Bench, *runs: Claim, **report: Any) -> list[Wakeup | None]:
    """The worker of these evaluations falls silent."""
    bench.advance(LEASE)
    return [lost(bench, run, **report).wakeup for run in runs]


class TestTake:
    def test_what_is_due_and_parked_is_leased(self, bench: Bench) -> None:
        park(bench, "a")
        due = bench.now + FAR
        bench.advance(FAR + 7)
        [claim] = take(bench, task_id="t7")
        assert claim == Claim("a", claim.lease, failures=0, rounds=0, deadline=due, lateness=7)
        record = bench.record()
        assert (record.status, record.deadline, record.task_id) == (Status.RUNNING, None, "t7")
        assert (record.lease, record.lease_expires) == (claim.lease, bench.now + LEASE + MARGIN)

    def test_nothing_before_its_deadline(self, bench: Bench) -> None:
        park(bench, "a")
        bench.advance(FAR - 1)
        assert taken(bench) == []
        bench.advance(1)
        assert taken(bench) == ["a"]

    def test_nothing_that_has_a_message_or_a_lease(self, bench: Bench) -> None:
        bench.enqueue("sent")
        bench.run("running")
        bench.quarantine(bench.run("failed"))
        bench.finish(bench.run("idle"))
        assert taken(bench) == []
        assert bench.index.take("host", 10, nonce="n", task_id="t") == [], "another kind"

    def test_the_earliest_deadlines_first_and_no_more_than_asked_for(self, bench: Bench) -> None:
        for id, delay in [("c", 3), ("a", 1), ("d", 4), ("b", 2)]:
            park(bench, id, delay=FAR + delay)
        bench.advance(FAR + 4)
        assert taken(bench, 2) == ["a", "b"]
        assert taken(bench, 1) == ["c"]
        assert taken(bench, 5) == ["d"]
        assert taken(bench, 5) == []

    def test_nothing_that_has_a_note_which_is_for_a_message_to_carry(self, bench: Bench) -> None:
        bench.enqueue("a", delay=FAR, note="of a tenant")
        park(bench, "b")
        bench.advance(FAR)
        assert taken(bench) == ["b"]
        assert bench.promote("a").note == "of a tenant"

    def test_nothing_while_paused(self, bench: Bench) -> None:
        park(bench, "a")
        bench.advance(FAR)
        bench.pause()
        assert taken(bench) == []
        assert bench.status() is Status.PARKED
        bench.resume()
        assert taken(bench) == ["a"]

    def test_all_shards(self, open_bench: OpenBench) -> None:
        bench = open_bench(shards=3)
        ids = [f"id-{n}" for n in range(12)]
        park(bench, *ids)
        bench.advance(FAR)
        first = taken(bench, 7)
        assert len(first) == 7
        assert sorted(first + taken(bench, 7)) == sorted(ids)

    def test_a_message_still_under_way_is_stale(self, bench: Bench) -> None:
        wakeup = bench.enqueue().wakeup
        bench.put_back(wakeup)
        [claim] = take(bench)
        assert isinstance(bench.claim(wakeup), Refusal)
        assert bench.finish(claim) == ACCEPTED

    def test_tells_the_past(self, bench: Bench) -> None:
        bench.fail(bench.run(), delay=FAR, failures=4)
        bench.advance(FAR)
        [claim] = take(bench)
        assert (claim.failures, claim.rounds) == (4, 0)

    def test_one_that_is_taken_alone_is_a_batch_too(self, bench: Bench) -> None:
        """Whoever takes it evaluates other entities in the same task."""
        park(bench, "a")
        bench.advance(FAR)
        [claim] = take(bench)
        [wakeup] = lose(bench, claim)
        assert wakeup is not None
        assert wakeup.alone
        assert bench.record().failures == 0

    def test_a_deleted_one_is_gone(self, bench: Bench) -> None:
        park(bench, "a")
        bench.advance(FAR)
        bench.delete()
        assert taken(bench) == []


class TestClaim:
    def test_each_has_a_lease_of_its_own(self, bench: Bench) -> None:
        a, b = batch(bench)
        assert a.lease != b.lease
        assert bench.finish(a) == ACCEPTED
        assert bench.status("b") is Status.RUNNING
        bench.advance(LEASE)
        assert bench.renew(b)
        assert bench.finish(b) == ACCEPTED

    def test_one_refusal_leaves_the_others(self, bench: Bench) -> None:
        wakeups = [bench.enqueue(id).wakeup for id in "abc"]
        bench.delete("b")
        replies = claim_all(bench, *wakeups)
        assert [type(reply) for reply in replies] == [Claim, Refusal, Claim]

    def test_over_several_shards(self, open_bench: OpenBench) -> None:
        bench = open_bench(shards=3)
        ids = [f"id-{n}" for n in range(12)]
        claims = claim_all(bench, *[bench.enqueue(id).wakeup for id in ids])
        assert [claim.id for claim in claims if isinstance(claim, Claim)] == ids
        bench.advance(LEASE)
        for claim in claims:
            assert isinstance(claim, Claim)
            wakeup = lost(bench, claim).wakeup
            assert wakeup is not None
            assert wakeup.alone


class TestUnstarted:
    def test_as_if_it_had_not_been_claimed(self, bench: Bench) -> None:
        bench.finish(bench.run("b"), converged=False)
        bench.fail(bench.run("a"), delay=1_000, failures=3)
        before = bench.record("a")
        bench.advance(1_000)
        due = bench.now
        wakeups = [Wakeup("a", bench.record("a").token, 0, ""), bench.enqueue("b").wakeup]
        a, b = claim_all(bench, *wakeups)
        assert isinstance(a, Claim)
        assert isinstance(b, Claim)
        bench.advance(700)
        given_back = unstarted(bench, a, fresh_task_id="t9")
        after = bench.record("a")
        assert given_back == Finished(Finish.ACCEPTED, due, Wakeup("a", after.token, 0, "t9"))
        assert (after.failures, after.error, after.finished) == (3, "boom", before.finished)
        unstarted(bench, b)
        assert bench.record("b").converged is False
        assert bench.start(given_back.wakeup).lateness == 700

    def test_looks_are_kept(self, bench: Bench) -> None:
        finished = bench.finish(bench.run("a"), delay=0, rounds=5)
        a, _ = claim_all(bench, finished.wakeup, bench.enqueue("b").wakeup)
        assert isinstance(a, Claim)
        unstarted(bench, a)
        assert bench.evaluate("a").rounds == 5

    def test_nobody_is_to_evaluate_it_alone(self, bench: Bench) -> None:
        a, _ = batch(bench)
        wakeup = unstarted(bench, a).wakeup
        assert wakeup is not None
        assert not wakeup.alone

    def test_its_deadline_stays_though_a_later_one_was_noted(self, bench: Bench) -> None:
        a, _ = batch(bench)
        due = bench.now
        bench.advance(500)
        bench.enqueue("a", 5_000)
        assert unstarted(bench, a).deadline == due
        assert bench.record("a").deadline == due

    def test_an_earlier_deadline_that_was_noted_holds(self, bench: Bench) -> None:
        """A clock that was set back: an enqueue for now comes before the deadline that was due."""
        a, _ = batch(bench)
        bench.lane.clock.now -= 300
        bench.advance(0)
        bench.enqueue("a")
        assert unstarted(bench, a).deadline == bench.now

    def test_an_enqueue_meanwhile_is_answered_by_the_same_look(self, bench: Bench) -> None:
        a, _ = batch(bench)
        bench.enqueue("a")
        run = bench.start(unstarted(bench, a).wakeup)
        assert bench.finish(run) == ACCEPTED
        assert bench.status("a") is Status.IDLE

    def test_deleted_meanwhile(self, bench: Bench) -> None:
        a, b = batch(bench)
        bench.delete("a")
        assert unstarted(bench, a) == ACCEPTED
        assert bench.row("a") is None
        bench.delete("b")
        bench.enqueue("b", 5_000)
        assert unstarted(bench, b).deadline == bench.now + 5_000, "only the new life's deadline"

    def test_the_same_report_again_gets_the_same_reply(self, bench: Bench) -> None:
        a, _ = batch(bench)
        assert unstarted(bench, a) == unstarted(bench, a)

    def test_whoever_lost_its_lease_gives_nothing_back(self, bench: Bench) -> None:
        a, _ = batch(bench)
        [wakeup] = lose(bench, a)
        run = bench.start(wakeup)
        assert unstarted(bench, a) == FENCED
        assert bench.renew(run)

    def test_while_paused_it_is_parked(self, bench: Bench) -> None:
        a, _ = batch(bench)
        bench.pause()
        assert unstarted(bench, a).wakeup is None
        assert bench.status("a") is Status.PARKED
        bench.resume()
        assert taken(bench) == ["a"]


class TestLost:
    def test_each_is_looked_at_again_at_once_and_alone(self, bench: Bench) -> None:
        due = bench.now
        runs = batch(bench, "abc")
        wakeups = lose(bench, *runs)
        for wakeup in wakeups:
            assert wakeup is not None
            assert wakeup.alone
            record = bench.record(wakeup.id)
            assert (record.deadline, record.failures, record.error) == (due, 0, "")
            assert bench.start(wakeup).failures == 0

    def test_no_quarantine(self, bench: Bench) -> None:
        """Any of them may be the one that used up the last of its failures."""
        a, b = batch(bench)
        wakeups = lose(bench, a, b, verdict=Verdict.QUARANTINED)
        assert all(wakeups)
        assert bench.status("a") is Status.SENT

    def test_not_one_that_was_renewed(self, bench: Bench) -> None:
        a, _ = batch(bench)
        judged = bench.lease_end("a")
        bench.sweep_for(1)
        bench.renew(a)
        assert bench.lose(a, lost_at=judged) == FENCED

    def test_a_deadline_noted_meanwhile_is_answered_by_the_same_look(self, bench: Bench) -> None:
        a, _ = batch(bench)
        due = bench.now
        bench.enqueue("a", 5_000)
        lose(bench, a)
        assert bench.record("a").deadline == due

    def test_deleted_meanwhile(self, bench: Bench) -> None:
        a, b = batch(bench)
        bench.delete("a")
        bench.delete("b")
        bench.enqueue("b")
        lost_a, lost_b = lose(bench, a, b)
        assert lost_a is None
        assert bench.row("a") is None
        assert lost_b is not None
        assert not lost_b.alone, "a new life"

    def test_others_of_the_batch_that_were_reported_are_not_touched(self, bench: Bench) -> None:
        a, _ = batch(bench)
        judged = bench.lease_end("a")
        bench.finish(a, converged=True)
        assert bench.sweep_for(LEASE + MARGIN).lost == (("b", judged),)
        assert bench.lose(a, lost_at=judged) == FENCED
        assert bench.status("a") is Status.IDLE


class TestAlone:
    @pytest.fixture
    def suspect(self, bench: Bench) -> Wakeup:
        """An entity that was lost with a batch."""
        a, _ = batch(bench)
        [wakeup] = lose(bench, a)
        assert wakeup is not None
        return wakeup

    def alone(self, bench: Bench) -> bool:
        row = bench.row("a")
        assert row is not None
        return "alone" in row.fields

    def test_take_leaves_it(self, bench: Bench, suspect: Wakeup) -> None:
        bench.put_back(suspect)
        assert taken(bench) == []
        wakeup = bench.promote("a")
        assert wakeup is not None
        assert wakeup.alone

    def test_others_are_taken_past_it(self, bench: Bench, suspect: Wakeup) -> None:
        bench.put_back(suspect)
        park(bench, "x")
        bench.advance(FAR)
        assert taken(bench) == ["x"]

    def test_a_second_loss_counts(self, bench: Bench, suspect: Wakeup) -> None:
        [wakeup] = lose(bench, bench.start(suspect), failures=1)
        assert wakeup is not None
        assert (wakeup.delay, wakeup.alone) == (10_000, True)
        assert (bench.record("a").failures, bench.record("a").error) == (1, "WorkerLost")

    def test_a_second_loss_may_quarantine(self, bench: Bench, suspect: Wakeup) -> None:
        lose(bench, bench.start(suspect), verdict=Verdict.QUARANTINED)
        assert bench.status("a") is Status.FAILED

    def test_a_message_that_carries_others_too_does_not_clear_it(self, bench: Bench, suspect: Wakeup) -> None:
        """Forged, or of another release: its loss counts all the same."""
        a, _ = claim_all(bench, suspect, bench.enqueue("x").wakeup)
        assert isinstance(a, Claim)
        lose(bench, a, failures=1)
        assert bench.record("a").failures == 1

    @pytest.mark.parametrize("verdict", [Verdict.DONE, Verdict.FAILED])
    def test_ends_with_an_evaluation_that_its_worker_survives(
        self, bench: Bench, suspect: Wakeup, verdict: Verdict
    ) -> None:
        finished = bench.finish(bench.start(suspect), verdict, delay=1_000)
        assert finished.wakeup is not None
        assert not finished.wakeup.alone

    def test_a_quarantine_that_its_worker_survives_ends_it_too(self, bench: Bench, suspect: Wakeup) -> None:
        bench.quarantine(bench.start(suspect))
        assert not self.alone(bench)

    def test_stays_over_quarantine_and_revival(self, bench: Bench, suspect: Wakeup) -> None:
        lose(bench, bench.start(suspect), verdict=Verdict.QUARANTINED)
        revived = bench.enqueue("a").wakeup
        assert revived is not None
        assert revived.alone

    def test_stays_when_it_is_enqueued_moved_or_sent_again(self, bench: Bench, suspect: Wakeup) -> None:
        lose(bench, bench.start(suspect))
        moved = bench.enqueue("a").wakeup
        assert moved is not None
        assert moved.alone
        bench.advance(Limits().resend_after)
        again = bench.resend("a")
        assert again is not None
        assert again.alone

    def test_stays_when_it_is_given_back(self, bench: Bench, suspect: Wakeup) -> None:
        wakeup = unstarted(bench, bench.start(suspect)).wakeup
        assert wakeup is not None
        assert wakeup.alone

    def test_ends_with_a_delete(self, bench: Bench, suspect: Wakeup) -> None:
        bench.delete("a")
        wakeup = bench.enqueue("a").wakeup
        assert wakeup is not None
        assert not wakeup.alone
