"""Claim, renew, put back: a wake-up is exchanged for a lease, once, and not before its time."""

from __future__ import annotations

import pytest

from celery_goalstate.index.base import Claim, Limits, Refusal, Refused, Run, Status, Wakeup
from tests.contract.bench import KIND, Bench

LEASE, MARGIN = Limits().lease, Limits().margin
HORIZON = Limits().eta_horizon


def refused(reply: Claim | Refusal) -> Refused:
    assert isinstance(reply, Refusal), reply
    return reply.reason


class TestClaim:
    def test_grants_a_lease(self, bench: Bench) -> None:
        wakeup = bench.enqueue(delay=5_000).wakeup
        due = bench.now + 5_000
        bench.advance(7_000)
        claim = bench.start(wakeup, task_id="t7")
        assert wakeup is not None
        assert int(claim.lease) > int(wakeup.token)
        assert claim == Claim("a", claim.lease, failures=0, rounds=0, deadline=due, lateness=2_000)
        record = bench.record()
        assert (record.status, record.token, record.deadline) == (Status.RUNNING, "", None)
        assert (record.lease, record.lease_expires) == (claim.lease, bench.now + LEASE + MARGIN)
        assert (record.started, record.task_id) == (bench.now, "t7")

    def test_tells_the_past(self, bench: Bench) -> None:
        bench.fail(bench.run(), failures=4)
        claim = bench.evaluate()
        assert (claim.failures, claim.rounds) == (4, 0)
        finished = bench.finish(claim, delay=0, rounds=3)
        claim = bench.start(finished.wakeup)
        assert (claim.failures, claim.rounds) == (0, 3)

    def test_leases_rise(self, bench: Bench) -> None:
        """They are fencing tokens: of two evaluations, the later one has the higher number."""
        leases = []
        for _ in range(20):
            run = bench.run()
            leases.append(int(run.lease))
            bench.finish(run)
        assert leases == sorted(set(leases))

    def test_leases_rise_over_a_delete(self, bench: Bench) -> None:
        first = bench.run()
        bench.finish(first)
        bench.delete()
        assert int(bench.run().lease) > int(first.lease)

    def test_a_duplicate_is_stale(self, bench: Bench) -> None:
        wakeup = bench.enqueue().wakeup
        run = bench.start(wakeup)
        assert refused(bench.claim(wakeup)) is Refused.STALE
        bench.finish(run)
        assert refused(bench.claim(wakeup)) is Refused.STALE
        bench.enqueue()
        assert refused(bench.claim(wakeup)) is Refused.STALE

    def test_a_token_that_was_never_given_is_stale(self, bench: Bench) -> None:
        bench.enqueue()
        for token in ("", "0", "1", "x", "99999999999999999999"):
            assert refused(bench.claim(Wakeup("a", token, 0, ""))) is Refused.STALE

    def test_a_lease_is_no_token(self, bench: Bench) -> None:
        run = bench.run()
        assert refused(bench.claim(Wakeup("a", run.lease, 0, ""))) is Refused.STALE

    def test_a_parked_entity_cannot_be_claimed(self, bench: Bench) -> None:
        bench.enqueue(delay=10 * LEASE)
        bench.advance(10 * LEASE)
        assert refused(bench.claim(Wakeup("a", "", 0, ""))) is Refused.STALE

    def test_the_unknown_is_missing(self, bench: Bench) -> None:
        assert refused(bench.claim(Wakeup("a", "1", 0, ""))) is Refused.MISSING
        wakeup = bench.enqueue().wakeup
        bench.delete()
        assert refused(bench.claim(wakeup)) is Refused.MISSING

    @pytest.mark.parametrize(
        ("rest", "delay"), [(1, Limits().shortest_delay), (49, 50), (50, 50), (51, 51), (5_000, 5_000)]
    )
    def test_an_early_one_is_to_be_sent_again(self, bench: Bench, rest: int, delay: int) -> None:
        wakeup = bench.enqueue(delay=6_000, task_id="t1").wakeup
        assert wakeup is not None
        bench.advance(6_000 - rest)
        before = bench.row()
        reply = bench.claim(wakeup)
        assert reply == Refusal("a", Refused.EARLY, Wakeup("a", wakeup.token, delay, "t1"))
        assert bench.row() == before, "the same token is still expected"
        bench.advance(rest)
        assert bench.start(wakeup).lateness == 0

    def test_one_that_is_due_beyond_the_horizon_is_parked(self, bench: Bench) -> None:
        """Sent by who had a longer horizon, or before the clock was set back: it would be sent for ever."""
        wakeup = bench.enqueue(at=bench.now + 6_000, task_id="t1").wakeup
        bench.lane.clock.set_back(HORIZON)
        assert bench.claim(wakeup) == Refusal("a", Refused.EARLY)
        assert bench.status() is Status.PARKED
        assert refused(bench.claim(wakeup)) is Refused.STALE
        assert bench.promote() is None
        bench.advance(HORIZON + 6_000)
        assert bench.start(bench.promote()).lateness == 0

    def test_reasons_are_looked_for_in_order(self, bench: Bench) -> None:
        """Missing, stale, paused, early."""
        first = bench.enqueue(delay=6_000).wakeup
        second = bench.enqueue(delay=5_000).wakeup
        bench.pause()
        assert refused(bench.claim(first)) is Refused.STALE
        assert refused(bench.claim(second)) is Refused.PAUSED
        bench.delete()
        assert refused(bench.claim(second)) is Refused.MISSING

    def test_the_same_nonce_gets_the_same_lease_again(self, bench: Bench) -> None:
        wakeup = bench.enqueue().wakeup
        first = bench.start(wakeup, nonce="n")
        assert bench.record().nonce == "n"
        assert bench.claim(wakeup, nonce="n") == first
        bench.renew(first)
        bench.enqueue(delay=1_000)
        assert bench.claim(wakeup, nonce="n") == first
        assert refused(bench.claim(wakeup, nonce="m")) is Refused.STALE

    def test_the_lease_lasts_from_when_it_was_claimed_again(self, bench: Bench) -> None:
        """Whoever had to ask again has not begun yet."""
        wakeup = bench.enqueue().wakeup
        bench.start(wakeup, nonce="n")
        bench.sweep_for(LEASE - 1)
        assert bench.start(wakeup, nonce="n").lateness == LEASE - 1
        assert bench.record().lease_expires == bench.now + LEASE + MARGIN
        assert bench.survey().lost == ()

    def test_the_same_nonce_is_of_no_use_after_the_run(self, bench: Bench) -> None:
        wakeup = bench.enqueue().wakeup
        bench.finish(bench.start(wakeup, nonce="n"))
        assert bench.record().nonce == ""
        assert refused(bench.claim(wakeup, nonce="n")) is Refused.STALE

    def test_the_same_nonce_is_of_no_use_after_a_delete(self, bench: Bench) -> None:
        wakeup = bench.enqueue().wakeup
        bench.start(wakeup, nonce="n")
        bench.delete()
        assert refused(bench.claim(wakeup, nonce="n")) is Refused.MISSING
        bench.enqueue()
        assert refused(bench.claim(wakeup, nonce="n")) is Refused.MISSING

    def test_a_batch_shares_nonce_and_task_id(self, bench: Bench) -> None:
        wakeups = [bench.enqueue(id).wakeup for id in "abc"]
        pairs = [(wakeup.id, wakeup.token) for wakeup in wakeups if wakeup]
        pairs.insert(1, ("x", "1"))
        replies = bench.index.claim(KIND, pairs, nonce="n", task_id="t")
        assert [type(reply) for reply in replies] == [Claim, Refusal, Claim, Claim]
        assert [reply.id for reply in replies] == ["a", "x", "b", "c"]
        assert bench.index.claim(KIND, pairs, nonce="n", task_id="t") == replies


class TestRenew:
    def test_extends_by_the_full_length(self, bench: Bench) -> None:
        run = bench.run()
        bench.sweep_for(LEASE - 1)
        assert bench.renew(run)
        assert bench.record().lease_expires == bench.now + LEASE + MARGIN
        assert bench.sweep_for(LEASE + MARGIN - 1).lost == ()
        assert bench.sweep_for(1).lost == (("a", bench.lease_end()),)

    def test_a_lease_that_ran_out_unnoticed_is_still_held(self, bench: Bench) -> None:
        run = bench.run()
        assert bench.sweep_for(3 * LEASE).lost
        assert bench.renew(run)
        assert bench.survey().lost == ()

    def test_keeps_what_was_noted(self, bench: Bench) -> None:
        run = bench.run()
        bench.enqueue(delay=1_000)
        assert bench.renew(run)
        assert bench.finish(run).deadline == bench.now + 1_000

    def test_no_longer_after_the_end(self, bench: Bench) -> None:
        run = bench.run()
        bench.finish(run)
        assert not bench.renew(run)
        again = bench.run()
        assert not bench.renew(run)
        assert bench.renew(again)

    @pytest.mark.parametrize("lease", ["", "0", "1"])
    def test_a_lease_that_was_never_given(self, bench: Bench, lease: str) -> None:
        for happens in (lambda: None, bench.enqueue, bench.evaluate):
            happens()
            assert not bench.renew(Run("a", lease))

    def test_while_deleted_the_run_still_holds_its_lease(self, bench: Bench) -> None:
        run = bench.run()
        bench.delete()
        assert bench.renew(run)

    def test_tells_each_apart(self, bench: Bench) -> None:
        a, b = bench.run("a"), bench.run("b")
        bench.finish(a)
        runs = [Run("a", a.lease), Run("x", "1"), Run("b", b.lease)]
        assert bench.index.renew(KIND, runs) == [False, False, True]


class TestPutBack:
    def test_parks_what_could_not_be_published(self, bench: Bench) -> None:
        reply = bench.enqueue(delay=1_000)
        bench.put_back(reply.wakeup)
        record = bench.record()
        assert (record.status, record.deadline, record.token) == (Status.PARKED, reply.deadline, "")
        assert bench.survey().due == ("a",)
        bench.advance(1_000)
        assert refused(bench.claim(reply.wakeup)) is Refused.STALE
        wakeup = bench.promote()
        assert bench.start(wakeup)

    def test_repeated_it_changes_nothing(self, bench: Bench) -> None:
        wakeup = bench.enqueue().wakeup
        bench.put_back(wakeup)
        before = bench.row()
        bench.put_back(wakeup)
        assert bench.row() == before

    def test_not_when_another_wakeup_is_expected(self, bench: Bench) -> None:
        first = bench.enqueue(delay=5_000).wakeup
        bench.enqueue(delay=1_000)
        before = bench.row()
        bench.put_back(first)
        assert bench.row() == before

    def test_not_when_it_was_sent_again_after_another_put_back(self, bench: Bench) -> None:
        first = bench.enqueue().wakeup
        bench.put_back(first)
        bench.promote()
        before = bench.row()
        bench.put_back(first)
        assert bench.row() == before

    def test_not_when_the_message_has_arrived_after_all(self, bench: Bench) -> None:
        wakeup = bench.enqueue().wakeup
        bench.start(wakeup)
        before = bench.row()
        bench.put_back(wakeup)
        assert bench.row() == before

    @pytest.mark.parametrize("end", ["idle", "failed", "deleted"])
    def test_not_when_all_is_over(self, bench: Bench, end: str) -> None:
        wakeup = bench.enqueue().wakeup
        run = bench.start(wakeup)
        if end == "failed":
            bench.quarantine(run)
        else:
            bench.finish(run)
        if end == "deleted":
            bench.delete()
        before = bench.row()
        bench.put_back(wakeup)
        assert bench.row() == before

    def test_a_retry_keeps_its_task_id(self, bench: Bench) -> None:
        finished = bench.fail(bench.run(task_id="t1"), 5_000, task_id="t1", retries=2, fresh_task_id="t2")
        assert finished.wakeup is not None
        assert (finished.wakeup.task_id, finished.wakeup.retries) == ("t1", 3)
        bench.put_back(finished.wakeup)
        wakeup = bench.promote(task_id="t3")
        assert wakeup is not None
        assert (wakeup.task_id, wakeup.retries) == ("t1", 3)

    def test_any_other_gets_a_fresh_one(self, bench: Bench) -> None:
        bench.put_back(bench.enqueue(task_id="t1").wakeup)
        wakeup = bench.promote(task_id="t3")
        assert wakeup is not None
        assert (wakeup.task_id, wakeup.retries) == ("t3", 0)
