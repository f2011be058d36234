"""The index's own clock steps, in either direction: NTP on its host, a fail-over to another machine.

Leases are counted by sweepers, so no clock decides over them. What waits for a delay waits at most that delay
once more, what was due is due, and a point in time comes when the clock says so.
"""

from __future__ import annotations

import pytest

from celery_goalstate.index.base import Finish, Limits, Policy, Refusal, Refused, Run, Status, Watch
from tests.contract.bench import FENCED, KIND, Bench

HOUR = 3_600_000
HORIZON, RESEND_AFTER = Limits().eta_horizon, Limits().resend_after
LEASE, MARGIN = Limits().lease, Limits().margin
FAR = 10 * HORIZON


def set_back(bench: Bench, ms: int = HOUR) -> None:
    bench.lane.clock.set_back(ms)


class TestLeasesAreCounted:
    @pytest.mark.parametrize("step", [-HOUR, HOUR])
    def test_a_step_ends_none(self, bench: Bench, step: int) -> None:
        run = bench.run()
        count = bench.survey().count
        bench.lane.clock.step(step)
        survey = bench.survey(watch=Watch(count, passed=1_000))
        assert (survey.lost, survey.count) == ((), count + 1_000)
        assert bench.renew(run)

    def test_steps_between_two_surveys_end_none(self, bench: Bench) -> None:
        """A lease that is given far ahead of the clock that is in force later is none that has run out."""
        count = bench.survey().count
        bench.lane.clock.step(HOUR)
        bench.run()
        bench.lane.clock.step(-HOUR)
        assert bench.survey(watch=Watch(count, passed=1_000)).lost == ()

    def test_a_first_survey_counts_nothing(self, bench: Bench) -> None:
        before = bench.survey().count
        bench.advance(HOUR)
        assert bench.survey().count == before

    def test_a_sweeper_that_was_away_counts_a_margin_at_most(self, bench: Bench) -> None:
        count = bench.survey().count
        assert bench.survey(watch=Watch(count, passed=HOUR)).count == count + MARGIN

    def test_nothing_is_counted_twice(self, bench: Bench) -> None:
        """Two sweepers, which may be at work at once, know of the same time that it has passed."""
        count = bench.survey(sweeper="one", hold=0).count
        bench.survey(sweeper="two", hold=0, watch=Watch(count, passed=1_000))
        assert bench.survey(sweeper="one", hold=0, watch=Watch(count, passed=1_000)).count == count + 1_000

    def test_a_lease_lasts_for_a_margin_longer(self, bench: Bench) -> None:
        """It may be given in the midst of what is counted at once."""
        bench.run()
        end = bench.lease_end()
        assert end == bench.survey().count + LEASE + MARGIN

    def test_without_the_count_every_lease_lasts_for_its_length_once_more(self, bench: Bench) -> None:
        bench.run("a")
        bench.sweep_for(LEASE)
        bench.lane.lose_the_count()
        assert bench.sweep_for(LEASE + MARGIN - 1).lost == ()
        assert [id for id, _ in bench.sweep_for(1).lost] == ["a"]


class TestSetBack:
    def test_what_is_due_is_due(self, bench: Bench) -> None:
        wakeup = bench.enqueue().wakeup
        set_back(bench)
        assert bench.start(wakeup).lateness == 0

    def test_what_was_overdue_is_due(self, bench: Bench) -> None:
        wakeup = bench.enqueue().wakeup
        bench.advance(60_000)
        set_back(bench)
        assert bench.start(wakeup)

    def test_a_delay_is_waited_for_once_more(self, bench: Bench) -> None:
        wakeup = bench.enqueue(delay=10_000).wakeup
        bench.advance(9_000)
        set_back(bench)
        refusal = bench.claim(wakeup)
        assert isinstance(refusal, Refusal)
        assert (refusal.reason, refusal.wakeup and refusal.wakeup.delay) == (Refused.EARLY, 10_000)
        bench.advance(10_000)
        assert bench.start(refusal.wakeup).lateness == 0

    def test_but_only_once_however_often_somebody_looks(self, bench: Bench) -> None:
        """Set afresh at each arrival, it would never come."""
        wakeup = bench.enqueue(delay=10_000).wakeup
        set_back(bench)
        due = bench.now + 10_000
        for look in (lambda: bench.claim(wakeup), bench.describe, lambda: bench.enqueue(delay=HOUR)):
            bench.advance(1_000)
            look()
        assert bench.record().deadline == due + 1_000, "the first who looked"

    def test_a_back_off_is_waited_for_once_more(self, bench: Bench) -> None:
        wakeup = bench.fail(bench.run(), 10_000).wakeup
        set_back(bench)
        bench.claim(wakeup)
        bench.advance(10_000)
        assert bench.start(wakeup)

    def test_so_is_a_floor(self, bench: Bench) -> None:
        bench.fail(bench.run(), 10_000, respect_backoff=True)
        set_back(bench)
        assert bench.enqueue(delay=0).deadline == bench.now + 10_000
        bench.advance(10_000)
        assert bench.evaluate().lateness == 0

    @pytest.mark.parametrize("inside", [False, True])
    def test_so_is_a_delay_that_was_asked_for_during_the_run(self, bench: Bench, inside: bool) -> None:
        run = bench.run()
        bench.enqueue(delay=10_000, inside=Run("a", run.lease) if inside else None)
        set_back(bench)
        assert bench.finish(run).deadline == bench.now + 10_000

    def test_a_point_in_time_comes_when_the_clock_says_so(self, bench: Bench) -> None:
        due = bench.now + 10_000
        wakeup = bench.enqueue(at=due).wakeup
        set_back(bench)
        assert bench.claim(wakeup) == Refusal("a", Refused.EARLY)
        assert bench.record().deadline == due
        bench.advance(HOUR + 10_000)
        assert bench.start(bench.promote()).lateness == 0

    def test_a_point_in_time_beside_a_delay_of_its_own(self, bench: Bench) -> None:
        run = bench.run()
        due = bench.now + HOUR
        bench.enqueue(at=due)
        bench.enqueue(delay=2 * HOUR, inside=Run("a", run.lease))
        set_back(bench)
        assert bench.finish(run).deadline == due

    def test_what_is_given_back_is_due(self, bench: Bench) -> None:
        run = bench.run()
        set_back(bench)
        assert bench.unstarted(run).deadline == bench.now

    def test_a_debounce_is_bounded(self, bench: Bench) -> None:
        bench.replace(delay=5_000, max_wait=6_000)
        set_back(bench)
        bench.replace(delay=5_000, max_wait=6_000)
        bench.advance(5_000)
        assert bench.replace(delay=5_000, max_wait=6_000).deadline == bench.now + 1_000

    def test_parked_entities_are_found_though_their_delays_are_put_off(self, bench: Bench) -> None:
        """By a search through all of them: their scores say nothing."""
        ids = [f"{n:03}" for n in range(250)]
        for id in ids:
            bench.enqueue(id, FAR)
        bench.enqueue("eta", at=bench.now + FAR)
        bench.survey()
        set_back(bench)
        found: set[str] = set()
        survey = bench.survey(watch=Watch(bench.survey().count, 0, cursor=""))
        while True:
            found |= {*survey.due}
            for id in survey.due:
                bench.promote(id)
            if survey.cursor is None:
                break
            survey = bench.survey(watch=Watch(survey.count, 0, cursor=survey.cursor))
        assert found == {*ids, "eta"}
        assert {bench.record(id).deadline for id in ids} == {bench.now + FAR}
        assert bench.record("eta").deadline == bench.now + HOUR + FAR

    def test_nothing_is_searched_while_the_clock_goes_on(self, bench: Bench) -> None:
        bench.enqueue(delay=FAR)
        bench.survey()
        bench.lane.clock.set_back(900)
        survey = bench.survey(watch=Watch(bench.survey().count, 0, cursor=""))
        assert (survey.due, survey.cursor) == ((), None)

    def test_arrivals_of_the_future_tell_nothing(self, bench: Bench) -> None:
        """Or every message would be missed for as long as the clock was set back."""
        bench.start(bench.enqueue("before").wakeup)
        set_back(bench)
        bench.enqueue("a")
        bench.advance(RESEND_AFTER + 1)
        assert bench.resend("a", probe=False) is None
        bench.start(bench.enqueue("later").wakeup)
        assert bench.resend("a", probe=False) is None, "its token is one of the future, too"

    def test_a_message_is_missed_in_time(self, bench: Bench) -> None:
        bench.enqueue()
        set_back(bench)
        assert bench.survey().suspect == ("a",), "to be set afresh"
        assert bench.resend() is None, "not at once: all that were sent before the step would be"
        assert bench.survey().suspect == ()
        bench.advance(RESEND_AFTER)
        assert bench.survey().suspect == ("a",)
        assert bench.resend()

    def test_a_hold_of_the_future_holds_nobody(self, bench: Bench) -> None:
        bench.survey(sweeper="dead")
        set_back(bench)
        assert bench.index.survey([KIND], sweeper="next", hold=5_000, limit=1)

    def test_tokens_rise(self, bench: Bench) -> None:
        first = bench.run()
        bench.finish(first)
        set_back(bench)
        assert int(bench.run().lease) > int(first.lease)

    def test_a_lost_worker_is_found_in_time(self, bench: Bench) -> None:
        run = bench.run()
        count = bench.survey().count
        set_back(bench)
        passed = 0
        while not (survey := bench.survey(watch=Watch(count, 1_000))).lost:
            count, passed = survey.count, passed + 1_000
            bench.advance(1_000)
        assert LEASE <= passed <= LEASE + MARGIN + 1_000
        assert bench.lose(run).result is Finish.ACCEPTED


class TestSetForward:
    def test_delays_come_sooner(self, bench: Bench) -> None:
        wakeup = bench.enqueue(delay=10_000).wakeup
        bench.lane.clock.step(HOUR)
        assert bench.start(wakeup)

    def test_no_live_evaluation_ends(self, bench: Bench) -> None:
        run = bench.run()
        judged = bench.lease_end() - 1
        bench.lane.clock.step(HOUR)
        assert bench.lose(run, lost_at=judged) == FENCED

    @pytest.mark.parametrize("policy", [Policy.EARLIEST, Policy.REPLACE])
    def test_and_back_again(self, bench: Bench, policy: Policy) -> None:
        bench.lane.clock.step(HOUR)
        bench.enqueue(delay=10_000)
        bench.lane.clock.step(-HOUR)
        reply = bench.enqueue(delay=5_000, policy=policy)
        assert reply.deadline == bench.now + 5_000
        assert bench.status() is Status.SENT
