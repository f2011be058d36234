"""The sweeper's part: what is due is sent, what is lost is found, what is paused stays."""

from __future__ import annotations

import pytest

from celery_goalstate.index.base import Limits, Refusal, Refused, Request, Status, Wakeup, Watch
from tests.contract.bench import KIND, Bench

HORIZON = Limits().eta_horizon
PATIENCE = Limits().resend_after
LEASE, MARGIN = Limits().lease, Limits().margin
FAR = 10 * HORIZON


class TestSurvey:
    def test_nothing_to_do(self, bench: Bench) -> None:
        assert not bench.survey()
        bench.finish(bench.run())
        bench.quarantine(bench.run("b"))
        bench.advance(365 * 86_400_000)
        assert not bench.survey()

    def test_due_are_those_whose_deadline_comes_within_the_horizon(self, bench: Bench) -> None:
        for id, delay in {"c": FAR + 2, "b": FAR + 1, "a": FAR}.items():
            bench.enqueue(id, delay)
        bench.advance(FAR - HORIZON - 1)
        assert bench.survey().due == ()
        bench.advance(2)
        assert bench.survey().due == ("a", "b")
        bench.advance(1)
        assert bench.survey().due == ("a", "b", "c"), "the earliest first"

    def test_suspect_is_the_one_that_is_overdue_for_longest(self, bench: Bench) -> None:
        bench.enqueue("a", 2_000)
        bench.enqueue("b", 1_000)
        bench.advance(PATIENCE + 999)
        assert bench.survey().suspect == ()
        bench.advance(1)
        assert bench.survey().suspect == ("b",)
        bench.advance(1_000)
        assert bench.survey().suspect == ("b",), (
            "nothing shows whether the other is lost, and one is enough to find out"
        )

    def test_suspect_are_those_that_were_overtaken(self, bench: Bench) -> None:
        for id in "ab":
            bench.enqueue(id)
            bench.advance(1_000)
        bench.advance(PATIENCE - 2_000)
        later = bench.enqueue("later").wakeup
        bench.advance(PATIENCE // 2)
        bench.start(later)
        assert bench.survey().suspect == ("a",), "not b, which was sent a second too late for that"
        bench.start(bench.enqueue("still later").wakeup)
        assert bench.survey().suspect == ("a", "b")

    def test_claimed_is_when_the_newest_message_that_has_arrived_was_sent(self, bench: Bench) -> None:
        assert bench.survey().newest_arrival == 0
        first, second = bench.enqueue("a").wakeup, None
        sent = bench.now
        bench.advance(1_000)
        second = bench.enqueue("b").wakeup
        bench.advance(1_000)
        bench.start(second)
        assert bench.survey().newest_arrival == sent + 1_000
        bench.start(first)
        assert bench.survey().newest_arrival == sent + 1_000
        bench.lane.clock.set_back(2_000)
        assert bench.survey().newest_arrival == 0, "of what is yet to come nothing can have arrived"

    def test_lost_are_those_whose_lease_has_run_out(self, bench: Bench) -> None:
        bench.run("a")
        bench.sweep_for(1)
        bench.run("b")
        first, second = bench.lease_end("a"), bench.lease_end("b")
        assert (first, second) == (LEASE + MARGIN, LEASE + MARGIN + 1)
        assert bench.sweep_for(first - 2).lost == ()
        assert bench.sweep_for(1).lost == (("a", first),)
        assert bench.sweep_for(1).lost == (("a", first), ("b", second))

    def test_the_limit_holds_for_each_sort(self, bench: Bench) -> None:
        for n in range(5):
            bench.enqueue(f"parked-{n}", FAR + n)
            bench.enqueue(f"sent-{n}", n)
            bench.run(f"running-{n}")
            bench.finish(bench.run(f"idle-{n}"), idle_ttl=1)
        count = bench.sweep_for(FAR).count
        bench.start(bench.enqueue("later").wakeup)
        survey = bench.survey(limit=3, watch=Watch(count, 0))
        assert survey.due == ("parked-0", "parked-1", "parked-2")
        assert survey.suspect == ("sent-0", "sent-1", "sent-2")
        assert [id for id, _ in survey.lost] == ["running-0", "running-1", "running-2"]
        assert survey.expired == ("idle-0", "idle-1", "idle-2")

    def test_changes_nothing(self, bench: Bench) -> None:
        bench.enqueue(delay=FAR)
        bench.run("b")
        bench.advance(FAR)
        before = bench.lane.stored()
        bench.survey()
        assert bench.lane.stored() == before

    def test_one_sweeper_at_a_time(self, bench: Bench) -> None:
        def seen(sweeper: str) -> bool:
            return bool(bench.index.survey([KIND], sweeper=sweeper, hold=5_000, limit=10))

        bench.enqueue(delay=FAR)
        bench.advance(FAR)
        assert seen("first")
        assert not seen("second")
        bench.advance(4_000)
        assert seen("first"), "which holds it on"
        bench.advance(4_999)
        assert not seen("second")
        bench.advance(1)
        assert seen("second")
        assert not seen("first")

    def test_who_does_not_hold_a_shard_sees_that_it_is_surveyed(self, bench: Bench) -> None:
        def sign() -> str:
            [(shard, sign)] = bench.index.holds([KIND], sweeper="second").items()
            assert shard == (KIND, 0)
            return sign

        assert sign() == ""
        signs = []
        for _ in range(3):
            bench.survey(sweeper="first")
            assert sign() == sign() != ""
            signs.append(sign())
            bench.advance(1)
        assert len(set(signs)) == 3
        assert bench.index.holds([KIND], sweeper="first") == {(KIND, 0): ""}

    def test_a_shard_that_is_left_out_is_not_asked(self, bench: Bench) -> None:
        bench.index.note(["host"])
        surveys = bench.index.survey([KIND, "host"], sweeper="s", hold=1, limit=1, leave_out={(KIND, 0)})
        assert [survey.kind for survey in surveys] == ["host"]

    def test_a_sweeper_may_have_any_name(self, bench: Bench) -> None:
        for name in ("celery@host 1/ünï", "123 456", ""):
            bench.advance(5_000)
            assert bench.survey(sweeper=name).kind == KIND
            assert bench.survey(sweeper=name).kind == KIND
            assert bench.index.survey([KIND], sweeper=name + "x", hold=5_000, limit=1) == []

    def test_many_kinds_at_once(self, bench: Bench) -> None:
        bench.index.enqueue("host", [Request("h", FAR)])
        bench.enqueue("a", FAR)
        bench.advance(FAR)
        order, host = bench.index.survey([KIND, "host"], sweeper="s", hold=5_000, limit=10)
        assert (order.kind, order.shard, order.due) == (KIND, 0, ("a",))
        assert (host.kind, host.shard, host.due) == ("host", 0, ("h",))
        assert bench.index.survey([], sweeper="s", hold=5_000, limit=10) == []

    def test_a_deleted_run_is_no_schedule(self, bench: Bench) -> None:
        bench.run()
        bench.delete()
        bench.enqueue()
        assert not bench.survey()


class TestPromote:
    def test_sends_what_is_near(self, bench: Bench) -> None:
        reply = bench.enqueue(delay=FAR)
        bench.advance(FAR - HORIZON)
        wakeup = bench.promote(task_id="t1")
        assert wakeup is not None
        record = bench.record()
        assert wakeup == Wakeup("a", record.token, HORIZON, "t1")
        assert (record.status, record.deadline, record.task_id) == (Status.SENT, reply.deadline, "t1")
        assert bench.promote() is None, "once"

    def test_not_what_is_far(self, bench: Bench) -> None:
        bench.enqueue(delay=FAR)
        bench.advance(FAR - HORIZON - 1)
        assert bench.promote() is None
        assert bench.status() is Status.PARKED

    @pytest.mark.parametrize("status", ["unknown", "sent", "running", "idle", "failed"])
    def test_only_what_is_parked(self, bench: Bench, status: str) -> None:
        if status != "unknown":
            bench.enqueue()
        if status in {"running", "idle", "failed"}:
            run = bench.evaluate()
            if status == "idle":
                bench.finish(run)
            elif status == "failed":
                bench.quarantine(run)
            else:
                bench.enqueue()
        before = bench.row()
        assert bench.promote() is None
        assert bench.row() == before

    def test_leaves_out_what_is_not_to_be_sent(self, bench: Bench) -> None:
        for id, delay in {"a": FAR, "b": 2 * FAR, "c": FAR}.items():
            bench.enqueue(id, delay)
        bench.advance(FAR)
        asked = {"c": "t1", "x": "t2", "b": "t3", "a": "t4"}
        assert [(w.id, w.task_id) for w in bench.index.promote(KIND, asked)] == [("c", "t1"), ("a", "t4")]


class TestResend:
    """A message is sent again, under the same token, when it is probably lost."""

    def overdue(self, bench: Bench, id: str = "a") -> Wakeup:
        wakeup = bench.enqueue(id, 0, task_id="t1").wakeup
        assert wakeup is not None
        bench.advance(PATIENCE)
        return wakeup

    def test_in_any_case_when_it_is_the_probe(self, bench: Bench) -> None:
        wakeup = self.overdue(bench)
        assert bench.resend(task_id="t2") == Wakeup("a", wakeup.token, 0, "t2", resent_at=bench.now)
        assert (bench.record().status, bench.record().task_id) == (Status.SENT, "t2")

    def test_there_is_one_probe(self, bench: Bench) -> None:
        self.overdue(bench, "a")
        self.overdue(bench, "b")
        replies = bench.index.resend(KIND, {"a": "t2", "b": "t3"}, probe="b")
        assert [(wakeup.id, wakeup.task_id) for wakeup in replies] == [("b", "t3")]

    def test_when_one_that_was_queued_later_has_arrived(self, bench: Bench) -> None:
        self.overdue(bench)
        assert bench.resend(probe=False) is None
        later = bench.enqueue("later").wakeup
        bench.start(later)
        bench.advance(PATIENCE // 4)
        assert bench.resend(probe=False)

    def test_not_when_what_arrived_was_queued_only_a_little_later(self, bench: Bench) -> None:
        bench.enqueue("a")
        bench.advance(PATIENCE - 1)
        bench.start(bench.enqueue("later").wakeup)
        bench.advance(1)
        assert bench.resend(probe=False) is None

    def test_when_its_probe_has_arrived_elsewhere(self, bench: Bench) -> None:
        """The probe is overdue as well: what counts is when it was queued, not when it was due."""
        self.overdue(bench, "a")
        self.overdue(bench, "b")
        bench.advance(PATIENCE)
        probe = bench.resend("b")
        assert probe is not None
        assert bench.resend("a", probe=False) is None
        bench.start(probe)
        bench.advance(PATIENCE)
        assert bench.resend("a", probe=False)

    def test_not_because_a_message_says_that_it_was_queued_later(self, bench: Bench) -> None:
        """Whoever can write to the queue could claim so: the index counts what it sent itself."""
        genuine = bench.enqueue("b").wakeup
        self.overdue(bench, "a")
        for wakeup in (Wakeup("a", "1", 0, ""), Wakeup("x", "1", 0, ""), genuine):
            bench.claim(wakeup, resent_at=bench.now)
        assert bench.resend("a", probe=False) is None

    def test_not_when_a_probe_says_that_it_comes_from_the_future(self, bench: Bench) -> None:
        self.overdue(bench, "a")
        self.overdue(bench, "b")
        probe = bench.resend("b")
        bench.start(probe, resent_at=bench.now + 10 * PATIENCE)
        bench.enqueue("c")
        bench.advance(PATIENCE)
        assert bench.resend("c", probe=False) is None

    def test_otherwise_nothing_changes(self, bench: Bench) -> None:
        self.overdue(bench)
        before = bench.row()
        assert bench.resend(probe=False) is None
        assert bench.row() == before

    def test_what_waited_for_long_is_missed_only_when_its_own_message_is_late(self, bench: Bench) -> None:
        bench.put_back(bench.enqueue("a").wakeup)
        bench.advance(3 * PATIENCE)
        assert bench.promote("a")
        bench.start(bench.enqueue("b").wakeup)
        bench.advance(PATIENCE - 1)
        assert bench.survey().suspect == ()
        assert bench.resend("a") is None
        bench.advance(1)
        assert bench.survey().suspect == ("a",)
        assert bench.resend("a", probe=False) is None, "b was sent no later"

    def test_one_that_arrives_tells_when_it_was_sent_not_since_when_it_was_due(self, bench: Bench) -> None:
        bench.put_back(bench.enqueue("old").wakeup)
        bench.advance(PATIENCE)
        self.overdue(bench, "a")
        bench.start(bench.promote("old"))
        assert bench.survey().suspect == ("a",)
        assert bench.resend("a", probe=False)

    def test_one_that_was_held_for_its_eta_tells_no_more(self, bench: Bench) -> None:
        held = bench.enqueue("held", HORIZON).wakeup
        bench.advance(1)
        bench.enqueue("a")
        bench.advance(HORIZON)
        bench.start(held)
        bench.advance(PATIENCE)
        assert bench.resend("a", probe=False) is None

    def test_after_a_second_loss_it_takes_a_message_that_was_sent_later_still(self, bench: Bench) -> None:
        self.overdue(bench)
        assert bench.resend()
        bench.advance(2 * PATIENCE - 1)
        bench.start(bench.enqueue("b").wakeup)
        bench.advance(1)
        assert bench.resend(probe=False) is None
        bench.start(bench.enqueue("c").wakeup)
        assert bench.resend(probe=False)

    def test_not_before_its_time(self, bench: Bench) -> None:
        bench.enqueue()
        bench.advance(PATIENCE - 1)
        before = bench.row()
        assert bench.resend() is None
        assert bench.row() == before

    def test_at_doubling_intervals(self, bench: Bench) -> None:
        self.overdue(bench)
        intervals = []
        for _ in range(6):
            assert bench.resend()
            sent = bench.now
            while not bench.survey().suspect:
                bench.advance(PATIENCE)
            intervals.append((bench.now - sent) // PATIENCE)
        assert intervals == [2, 4, 8, 8, 8, 8]
        assert max(intervals) == Limits().resend_intervals

    def test_either_of_the_two_messages_may_claim(self, bench: Bench) -> None:
        first = self.overdue(bench)
        second = bench.resend()
        assert bench.start(first).lateness == PATIENCE
        reply = bench.claim(second)
        assert isinstance(reply, Refusal)
        assert reply.reason is Refused.STALE

    def test_a_retry_gets_a_task_id_of_its_own(self, bench: Bench) -> None:
        bench.fail(bench.run(task_id="t1"), 0, task_id="t1", retries=4)
        bench.advance(PATIENCE)
        wakeup = bench.resend(task_id="t2")
        assert wakeup is not None
        assert (wakeup.task_id, wakeup.retries) == ("t2", 0)

    def test_one_that_could_not_be_published_is_parked(self, bench: Bench) -> None:
        first = self.overdue(bench)
        bench.put_back(bench.resend())
        assert bench.status() is Status.PARKED
        assert isinstance(bench.claim(first), Refusal)
        assert bench.start(bench.promote()).lateness == PATIENCE

    def test_the_count_starts_anew_with_a_new_deadline(self, bench: Bench) -> None:
        self.overdue(bench)
        bench.resend()
        bench.replace(delay=1_000)
        bench.advance(1_000 + PATIENCE)
        assert bench.survey().suspect == ("a",)
        wakeup = bench.resend()
        assert wakeup is not None
        bench.advance(2 * PATIENCE)
        assert bench.survey().suspect == ("a",)

    @pytest.mark.parametrize("status", ["unknown", "parked", "running", "idle", "failed"])
    def test_only_what_is_sent(self, bench: Bench, status: str) -> None:
        if status == "parked":
            bench.put_back(bench.enqueue().wakeup)
        elif status != "unknown":
            run = bench.run()
            if status == "idle":
                bench.finish(run)
            elif status == "failed":
                bench.quarantine(run)
        bench.advance(10 * PATIENCE)
        before = bench.row()
        assert bench.resend() is None
        assert bench.row() == before

    def test_an_early_one_is_no_reason(self, bench: Bench) -> None:
        """A worker whose clock is ahead has claimed nothing yet; what it saw was due later than now."""
        bench.enqueue("a")
        bench.advance(PATIENCE - 1)
        ahead = bench.enqueue("b", HORIZON).wakeup
        assert isinstance(bench.claim(ahead), Refusal)
        bench.advance(1)
        assert bench.resend(probe=False) is None


class TestPause:
    def test_is_told(self, bench: Bench) -> None:
        assert not bench.index.paused(KIND)
        bench.pause()
        bench.pause()
        assert bench.index.paused(KIND)
        assert not bench.index.paused("host")
        bench.resume()
        bench.resume()
        assert not bench.index.paused(KIND)

    def test_nothing_is_sent(self, bench: Bench) -> None:
        run = bench.run("running")
        failing = bench.run("failing")
        bench.enqueue("sent")
        bench.pause()
        assert bench.enqueue("a").wakeup is None
        assert bench.enqueue("a").changed is False
        assert bench.finish(run, delay=0).wakeup is None
        assert bench.fail(failing, 0).wakeup is None
        bench.advance(10 * PATIENCE)
        survey = bench.survey()
        assert (survey.due, survey.suspect) == ((), ())
        assert bench.promote("a") is None
        assert bench.resend("sent") is None

    def test_a_message_that_arrives_parks_its_entity(self, bench: Bench) -> None:
        reply = bench.enqueue()
        bench.pause()
        refusal = bench.claim(reply.wakeup)
        assert refusal == Refusal("a", Refused.PAUSED)
        record = bench.record()
        assert (record.status, record.deadline, record.token) == (Status.PARKED, reply.deadline, "")
        bench.resume()
        assert isinstance(bench.claim(reply.wakeup), Refusal)
        assert bench.start(bench.promote())

    def test_running_ones_finish(self, bench: Bench) -> None:
        run = bench.run()
        bench.pause()
        assert bench.renew(run)
        assert bench.finish(run, delay=5_000).deadline == bench.now + 5_000
        bench.resume()
        assert bench.evaluate()

    def test_what_has_ended_is_still_found(self, bench: Bench) -> None:
        bench.finish(bench.run("idle"), idle_ttl=1)
        run = bench.run("lost")
        bench.pause()
        end = bench.lease_end("lost")
        survey = bench.sweep_for(end)
        assert (survey.lost, survey.expired) == ((("lost", end),), ("idle",))
        assert bench.lose(run, 0).wakeup is None
        assert bench.index.forget(KIND, ["idle"]) == 1

    def test_one_kind_only(self, bench: Bench) -> None:
        bench.pause()
        (other,) = bench.index.enqueue("host", [Request("a", 0)])
        assert other.wakeup

    def test_everything_goes_on_after_it(self, bench: Bench) -> None:
        bench.pause()
        for id in "abc":
            bench.enqueue(id)
        bench.resume()
        assert bench.survey().due == ("a", "b", "c")
        for id in "abc":
            assert bench.start(bench.promote(id))
