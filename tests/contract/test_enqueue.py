"""Enqueue: one schedule per entity, the earliest deadline wins, what is far waits in the index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from celery_goalstate.index.base import (
    Finish,
    Finished,
    Limits,
    Policy,
    Request,
    Run,
    Scheduled,
    Status,
)
from tests.contract.bench import KIND, Bench
from tests.contract.conftest import OpenBench

HORIZON = Limits().eta_horizon


class TestUnknown:
    @pytest.mark.parametrize("policy", Policy)
    def test_is_scheduled_by_every_policy(self, bench: Bench, policy: Policy) -> None:
        reply = bench.enqueue(policy=policy, task_id="t1")
        assert (reply.changed, reply.deadline) == (True, bench.now)
        assert reply.wakeup is not None
        assert (reply.wakeup.id, reply.wakeup.delay, reply.wakeup.task_id) == ("a", 0, "t1")
        assert (reply.wakeup.retries, reply.wakeup.resent_at) == (0, None)
        record = bench.record()
        assert (record.status, record.deadline, record.token) == (
            Status.SENT,
            bench.now,
            reply.wakeup.token,
        )
        assert (record.failures, record.rounds, record.error, record.converged) == (0, 0, "", None)
        assert (record.lease, record.lease_expires, record.finished, record.started) == ("", None, None, None)

    @pytest.mark.parametrize(
        ("delay", "status"),
        [
            (0, Status.SENT),
            (1, Status.SENT),
            (HORIZON, Status.SENT),
            (HORIZON + 1, Status.PARKED),
            (10 * 365 * 86_400_000, Status.PARKED),
        ],
    )
    def test_only_a_near_deadline_costs_a_message(self, bench: Bench, delay: int, status: Status) -> None:
        reply = bench.enqueue(delay=delay)
        assert reply.changed
        assert reply.deadline == bench.now + delay
        assert bench.status() is status
        if status is Status.PARKED:
            assert reply.wakeup is None
        else:
            assert reply.wakeup is not None
            assert reply.wakeup.delay == delay

    def test_a_point_in_time_is_taken_as_it_is_and_one_in_the_past_means_now(self, bench: Bench) -> None:
        assert bench.enqueue("a", at=bench.now + 7_000).deadline == bench.now + 7_000
        assert bench.enqueue("b", at=bench.now - 7_000).deadline == bench.now
        assert bench.enqueue("c", at=0).deadline == bench.now

    @pytest.mark.parametrize(
        "id",
        [
            "0",
            "a b",
            "x:y",
            "{tag}",
            "}:parked",
            "ünï/çødé ☃ 𝄞",
            "a" * 512,
            "-1",
            "1e3",
            "nil",
            "*",
            "%d",
            ":",
        ],
    )
    def test_any_id_will_do(self, bench: Bench, id: str) -> None:
        run = bench.run(id)
        assert run.id == id
        assert bench.record(id).id == id
        bench.finish(run)
        assert [record.id for record in bench.index.records(KIND, Status.IDLE, 10)] == [id]
        assert bench.delete(id)

    def test_kinds_do_not_meet(self, bench: Bench) -> None:
        bench.enqueue("a")
        assert bench.index.describe("host", ["a"]) == [None]
        (other,) = bench.index.enqueue("host", [Request("a", 5_000)])
        assert other.changed
        assert bench.record().deadline == bench.now
        assert bench.index.delete("host", ["a"]) == [True]
        assert bench.status() is Status.SENT


@dataclass(frozen=True)
class Again:
    """An entity scheduled in `first` ms is enqueued again, with `second`, when `passed` ms have passed."""

    name: str
    policy: Policy
    first: int
    second: int
    deadline: int  # in force afterwards, from the first enqueue on
    changed: bool
    passed: int = 0
    max_wait: int | None = None


FAR = 10 * HORIZON
EARLIEST, REPLACE, RESYNC, REVIVE = Policy.EARLIEST, Policy.REPLACE, Policy.RESYNC, Policy.REVIVE
AGAIN = [
    Again("later", EARLIEST, 5_000, 6_000, 5_000, changed=False),
    Again("the same", EARLIEST, 5_000, 5_000, 5_000, changed=False),
    Again("earlier", EARLIEST, 5_000, 4_000, 4_000, changed=True),
    Again("now", EARLIEST, 5_000, 0, 0, changed=True),
    Again("much later", EARLIEST, 5_000, FAR, 5_000, changed=False),
    Again("parked, brought near", EARLIEST, FAR, 5_000, 5_000, changed=True),
    Again("parked, earlier but far", EARLIEST, FAR, FAR - 1, FAR - 1, changed=True),
    Again("parked, later", EARLIEST, FAR, FAR + 1, FAR, changed=False),
    Again("overdue, now", EARLIEST, 5_000, 0, 5_000, changed=False, passed=5_001),
    Again("just due, now", EARLIEST, 5_000, 0, 5_000, changed=False, passed=5_000),
    Again("overdue, later", EARLIEST, 5_000, 9_000, 5_000, changed=False, passed=6_000),
    Again("replaced by later", REPLACE, 5_000, 9_000, 9_000, changed=True),
    Again("replaced by earlier", REPLACE, 5_000, 1_000, 1_000, changed=True),
    Again("replaced by the same", REPLACE, 5_000, 5_000, 5_000, changed=False),
    Again("replaced by far", REPLACE, 5_000, FAR, FAR, changed=True),
    Again("far, replaced by near", REPLACE, FAR, 5_000, 5_000, changed=True),
    Again("overdue, replaced by later", REPLACE, 5_000, 9_000, 15_000, changed=True, passed=6_000),
    Again("overdue, replaced by now", REPLACE, 5_000, 0, 5_000, changed=False, passed=6_000),
    Again("within max_wait", REPLACE, 5_000, 9_000, 13_000, changed=True, passed=4_000, max_wait=20_000),
    Again("beyond max_wait", REPLACE, 5_000, 9_000, 10_000, changed=True, passed=4_000, max_wait=10_000),
    Again("first beyond max_wait", REPLACE, 9_000, 9_000, 4_000, changed=True, max_wait=4_000),
    Again("max_wait over", REPLACE, 9_000, 9_000, 7_000, changed=True, passed=7_000, max_wait=6_000),
    Again("max_wait over, overdue", REPLACE, 5_000, 9_000, 5_000, changed=False, passed=6_000, max_wait=1),
    Again("no wait at all", REPLACE, 5_000, 9_000, 0, changed=True, max_wait=0),
    Again("max_wait, earlier", REPLACE, 9_000, 1_000, 1_000, changed=True, max_wait=20_000),
    Again("resync", RESYNC, 5_000, 1_000, 5_000, changed=False),
    Again("resync of a far one", RESYNC, FAR, 1_000, FAR, changed=False),
    Again("resync of an overdue one", RESYNC, 5_000, 0, 5_000, changed=False, passed=6_000),
    Again("revive", REVIVE, 5_000, 1_000, 5_000, changed=False),
]


class TestScheduled:
    @pytest.mark.parametrize("case", AGAIN, ids=lambda case: case.name)
    def test_two_deadlines_meet(self, bench: Bench, case: Again) -> None:
        start = bench.now
        first = bench.enqueue(delay=case.first, task_id="t1")
        bench.advance(case.passed)
        before = bench.record()
        second = bench.enqueue(delay=case.second, task_id="t2", policy=case.policy, max_wait=case.max_wait)

        assert (second.changed, second.deadline) == (case.changed, start + case.deadline)
        after = bench.record()
        assert after.deadline == start + case.deadline
        if not case.changed:
            assert second.wakeup is None, "a message is under way, or the deadline is far"
            assert after == before
        elif start + case.deadline > bench.now + HORIZON:
            assert second.wakeup is None
            assert (after.status, after.token) == (Status.PARKED, "")
        elif before.deadline is not None and after.deadline > before.deadline and first.wakeup:
            assert second.wakeup is None, "the message under way arrives early, and is sent again then"
            assert (after.status, after.token, after.task_id) == (Status.SENT, before.token, "t1")
        else:
            assert second.wakeup is not None
            assert second.wakeup.task_id == after.task_id == "t2"
            assert second.wakeup.delay == start + case.deadline - bench.now
            assert (after.status, after.token) == (Status.SENT, second.wakeup.token)
            if first.wakeup:
                assert int(second.wakeup.token) > int(first.wakeup.token)

    def test_max_wait_counts_from_the_first_pending_enqueue(self, bench: Bench) -> None:
        start = bench.now
        for step in range(10):
            reply = bench.replace(delay=5_000, max_wait=12_000)
            assert reply.deadline == start + min(1_000 * step + 5_000, 12_000)
            bench.advance(1_000)

    def test_max_wait_counts_anew_after_an_evaluation(self, bench: Bench) -> None:
        bench.finish(bench.run())
        bench.advance(60_000)
        bench.replace(delay=5_000, max_wait=12_000)
        bench.advance(4_000)
        assert bench.replace(delay=5_000, max_wait=12_000).deadline == bench.now + 5_000

    def test_max_wait_bounds_an_unknown_entity_too(self, bench: Bench) -> None:
        assert bench.replace(delay=50_000, max_wait=12_000).deadline == bench.now + 12_000

    def test_a_superseded_wakeup_is_stale(self, bench: Bench) -> None:
        first = bench.enqueue(delay=5_000).wakeup
        second = bench.enqueue(delay=4_000).wakeup
        bench.advance(5_000)
        assert bench.claim(first).reason == "stale"
        assert bench.start(second).lateness == 1_000

    def test_a_burst_is_one_message(self, bench: Bench) -> None:
        first = bench.enqueue(delay=5_000).wakeup
        for _ in range(9):
            bench.advance(100)
            assert bench.replace(delay=5_000).wakeup is None
        bench.advance(4_100)
        refused = bench.claim(first)
        assert (refused.reason, refused.wakeup.delay) == ("early", 900)
        bench.advance(900)
        assert bench.start(refused.wakeup).lateness == 0
        assert bench.claim(first).reason == "stale"

    def test_a_burst_during_a_pause_is_parked(self, bench: Bench) -> None:
        bench.enqueue(delay=5_000)
        bench.pause()
        assert bench.replace(delay=6_000).wakeup is None
        assert bench.status() is Status.PARKED

    def test_a_wakeup_superseded_by_a_far_deadline_is_stale(self, bench: Bench) -> None:
        first = bench.enqueue(delay=5_000).wakeup
        bench.replace(delay=FAR)
        bench.advance(5_000)
        assert bench.claim(first).reason == "stale"
        assert bench.status() is Status.PARKED


class TestWindow:
    def test_producers_may_fill_half_of_it(self, open_bench: OpenBench) -> None:
        bench = open_bench(Limits(window=5))
        replies = [bench.enqueue(id) for id in "abcdef"]
        assert [reply.wakeup is not None for reply in replies] == [True] * 3 + [False] * 3
        assert [bench.status(id) for id in "abcdef"] == [Status.SENT] * 3 + [Status.PARKED] * 3
        assert all(reply.changed for reply in replies)

    def test_the_sweeper_may_fill_it(self, open_bench: OpenBench) -> None:
        bench = open_bench(Limits(window=5))
        for id in "abcdef":
            bench.enqueue(id)
        assert bench.survey().due == ("d", "e")
        assert [bench.promote(id) is not None for id in "def"] == [True, True, False]
        assert bench.survey().due == ()

    def test_an_entry_that_was_sent_may_be_sent_again(self, open_bench: OpenBench) -> None:
        """The entity's own message does not count against it."""
        bench = open_bench(Limits(window=1))
        assert bench.enqueue("a", 5_000).wakeup
        assert bench.enqueue("a", 4_000).wakeup
        assert bench.enqueue("b", 0).wakeup is None

    def test_a_claim_makes_room(self, open_bench: OpenBench) -> None:
        bench = open_bench(Limits(window=1))
        bench.run("a")
        assert bench.enqueue("b").wakeup

    def test_kinds_have_windows_of_their_own(self, open_bench: OpenBench) -> None:
        bench = open_bench(Limits(window=1))
        bench.enqueue("a")
        (other,) = bench.index.enqueue("host", [Request("a", 0)])
        assert other.wakeup


class TestRunning:
    def test_notes_the_deadline_and_sends_nothing(self, bench: Bench) -> None:
        run = bench.run()
        reply = bench.enqueue(delay=5_000)
        assert reply == Scheduled(True, bench.now + 5_000, None)
        record = bench.record()
        assert (record.status, record.deadline, record.token) == (Status.RUNNING, bench.now + 5_000, "")
        finished = bench.finish(run, fresh_task_id="t2")
        assert finished.deadline == bench.now + 5_000
        assert finished.wakeup is not None
        assert (finished.wakeup.delay, finished.wakeup.task_id) == (5_000, "t2")

    @pytest.mark.parametrize("case", AGAIN, ids=lambda case: case.name)
    def test_two_deadlines_meet_as_if_it_were_not(self, bench: Bench, case: Again) -> None:
        """But for a resync, which has nothing to add to an evaluation under way."""
        run = bench.run()
        start = bench.now
        bench.enqueue(delay=case.first)
        bench.advance(case.passed)
        second = bench.enqueue(delay=case.second, policy=case.policy, max_wait=case.max_wait)
        assert second == Scheduled(case.changed, start + case.deadline, None)
        assert bench.record().deadline == start + case.deadline
        assert bench.finish(run).deadline == start + case.deadline

    @pytest.mark.parametrize("policy", [Policy.RESYNC, Policy.REVIVE])
    def test_is_left_alone_by_a_resync(self, bench: Bench, policy: Policy) -> None:
        run = bench.run()
        assert bench.enqueue(policy=policy) == Scheduled(False, None, None)
        assert bench.finish(run).deadline is None

    def test_max_wait_counts_from_the_enqueue_during_the_run(self, bench: Bench) -> None:
        run = bench.run(delay=20_000)
        start = bench.now
        assert bench.replace(delay=9_000, max_wait=10_000).deadline == start + 9_000
        bench.advance(5_000)
        assert bench.replace(delay=9_000, max_wait=10_000).deadline == start + 10_000
        bench.finish(run)
        bench.advance(1_000)
        assert bench.replace(delay=9_000, max_wait=10_000) == Scheduled(False, start + 10_000, None)


class TestInside:
    """The evaluation under way enqueues its own entity."""

    def inside(self, bench: Bench, run: Run, delay: int, policy: Policy = Policy.EARLIEST) -> Scheduled:
        return bench.enqueue(run.id, delay, inside=Run(run.id, run.lease), policy=policy)

    def test_is_noted_and_sends_nothing(self, bench: Bench) -> None:
        run = bench.run()
        assert self.inside(bench, run, 5_000) == Scheduled(True, bench.now + 5_000, None)
        assert bench.record().deadline == bench.now + 5_000
        assert bench.finish(run).deadline == bench.now + 5_000

    def test_the_earliest_wins(self, bench: Bench) -> None:
        run = bench.run()
        self.inside(bench, run, 5_000)
        assert self.inside(bench, run, 6_000) == Scheduled(False, bench.now + 5_000, None)
        assert self.inside(bench, run, 4_000) == Scheduled(True, bench.now + 4_000, None)
        assert self.inside(bench, run, 7_000, Policy.REPLACE) == Scheduled(True, bench.now + 7_000, None)

    @pytest.mark.parametrize(
        ("outside", "inside", "asked", "deadline"),
        [
            (None, 5_000, None, 5_000),
            (4_000, 5_000, None, 4_000),
            (6_000, 5_000, None, 5_000),
            (6_000, 5_000, 3_000, 3_000),
            (None, 5_000, 6_000, 5_000),
        ],
    )
    def test_after_a_success_the_earliest_of_all_wins(
        self, bench: Bench, outside: int | None, inside: int, asked: int | None, deadline: int
    ) -> None:
        run = bench.run()
        self.inside(bench, run, inside)
        if outside is not None:
            bench.enqueue(delay=outside)
        assert bench.finish(run, delay=asked).deadline == bench.now + deadline

    def test_a_failure_discards_it(self, bench: Bench) -> None:
        run = bench.run()
        self.inside(bench, run, 0)
        assert bench.fail(run, 10_000).deadline == bench.now + 10_000

    def test_a_failure_keeps_what_came_from_outside(self, bench: Bench) -> None:
        run = bench.run()
        self.inside(bench, run, 0)
        bench.enqueue(delay=3_000)
        assert bench.fail(run, 10_000).deadline == bench.now + 3_000

    def test_it_never_lifts_a_quarantine(self, bench: Bench) -> None:
        run = bench.run()
        self.inside(bench, run, 0)
        assert bench.quarantine(run).deadline is None
        assert bench.status() is Status.FAILED

    def test_it_does_not_outlive_the_evaluation(self, bench: Bench) -> None:
        run = bench.run()
        self.inside(bench, run, 0)
        bench.fail(run, 10_000)
        assert bench.finish(bench.evaluate()).deadline is None

    def test_another_entity_is_enqueued_as_from_outside(self, bench: Bench) -> None:
        run, other = bench.run("a"), bench.run("b")
        assert bench.enqueue("b", 0, inside=Run("a", run.lease)).changed
        assert bench.enqueue("c", 0, inside=Run("a", run.lease)).wakeup
        assert bench.fail(other, 10_000).deadline == bench.now

    @pytest.mark.parametrize("policy", [Policy.RESYNC, Policy.REVIVE])
    def test_a_resync_from_inside_changes_nothing(self, bench: Bench, policy: Policy) -> None:
        run = bench.run()
        assert self.inside(bench, run, 0, policy) == Scheduled(False, None, None)


class TestInsideFenced:
    """An evaluation that has lost its lease enqueues its own entity: a word as its refused report."""

    def fenced(self, bench: Bench, **report: object) -> Run:
        run = bench.run()
        bench.lose(run, **report)
        return Run(run.id, run.lease)

    def test_changes_nothing_when_an_evaluation_is_pending(self, bench: Bench) -> None:
        run = self.fenced(bench)
        before = bench.row()
        assert bench.enqueue(inside=run) == Scheduled(False, bench.now + 10_000, None)
        assert bench.enqueue(inside=run, policy=Policy.REPLACE) == Scheduled(False, bench.now + 10_000, None)
        assert bench.row() == before

    @pytest.mark.parametrize(
        ("end", "deadline"), [(Bench.finish, 2_000), (Bench.fail, 10_000), (Bench.quarantine, None)]
    )
    def test_is_noted_as_that_run_s_own_when_another_runs(
        self, bench: Bench, end: Callable[..., Finished], deadline: int | None
    ) -> None:
        run = self.fenced(bench, delay=0)
        other = bench.evaluate()
        assert bench.enqueue(delay=2_000, inside=run) == Scheduled(True, bench.now + 2_000, None)
        assert end(bench, other).deadline == (None if deadline is None else bench.now + deadline)

    def test_a_resync_has_nothing_to_add_when_another_runs(self, bench: Bench) -> None:
        run = self.fenced(bench, delay=0)
        bench.evaluate()
        assert bench.enqueue(inside=run, policy=Policy.RESYNC) == Scheduled(False, None, None)

    def test_never_lifts_a_quarantine(self, bench: Bench) -> None:
        run = bench.run()
        bench.quarantine(run)
        assert bench.enqueue(inside=Run(run.id, run.lease)) == Scheduled(False, None, None)
        assert bench.enqueue(inside=Run(run.id, run.lease), policy=Policy.REPLACE) == Scheduled(
            False, None, None
        )
        assert bench.status() is Status.FAILED

    def test_schedules_an_idle_entity(self, bench: Bench) -> None:
        run = bench.run()
        bench.finish(run)
        assert bench.enqueue(inside=Run(run.id, run.lease)).wakeup

    @pytest.mark.parametrize("policy", Policy)
    def test_never_outlives_a_delete(self, bench: Bench, policy: Policy) -> None:
        run = bench.run()
        bench.delete()
        inside = Run(run.id, run.lease)
        assert bench.enqueue(inside=inside, policy=policy) == Scheduled(False, None, None)
        assert bench.finish(run) == Finished(Finish.ACCEPTED)
        assert bench.enqueue(inside=inside, policy=policy) == Scheduled(False, None, None)
        assert bench.row() is None

    def test_adds_nothing_to_a_new_life_that_is_scheduled(self, bench: Bench) -> None:
        run = self.fenced(bench)
        bench.delete()
        fresh = bench.enqueue(delay=5_000)
        assert bench.enqueue(inside=run) == Scheduled(False, fresh.deadline, None)

    def test_repeated_it_gets_its_message_again(self, bench: Bench) -> None:
        run = bench.run()
        bench.finish(run)
        first = bench.enqueue(inside=Run(run.id, run.lease), task_id="t9")
        assert bench.enqueue(inside=Run(run.id, run.lease), task_id="t9") == first


class TestAtRest:
    @pytest.mark.parametrize("policy", Policy)
    def test_an_idle_entity_is_scheduled_by_every_policy(self, bench: Bench, policy: Policy) -> None:
        bench.finish(bench.run(), converged=True, idle_ttl=1_000)
        bench.advance(500)
        reply = bench.enqueue(policy=policy)
        assert reply.changed
        assert reply.wakeup
        bench.advance(1_000)
        assert bench.survey().expired == ()
        assert bench.record().converged is True, "what the last evaluation found is still known"

    @pytest.mark.parametrize(
        ("policy", "revived"),
        [(Policy.EARLIEST, True), (Policy.REPLACE, True), (Policy.REVIVE, True), (Policy.RESYNC, False)],
    )
    def test_a_quarantined_one_is_revived_by_all_but_a_resync(
        self, bench: Bench, policy: Policy, revived: bool
    ) -> None:
        bench.quarantine(bench.run(), failures=3, error="no such order")
        record = bench.record()
        assert (record.status, record.failures, record.error) == (Status.FAILED, 3, "no such order")
        assert record.since == record.finished == bench.now
        reply = bench.enqueue(delay=1_000, policy=policy)
        if revived:
            assert (reply.changed, reply.deadline) == (True, bench.now + 1_000)
            assert reply.wakeup
            assert (bench.record().failures, bench.record().error, bench.record().since) == (0, "", None)
            bench.advance(1_000)
            assert bench.start(reply.wakeup).failures == 0
        else:
            assert reply == Scheduled(False, None, None)
            assert bench.record() == record


class TestFloor:
    """`respect_backoff`: an enqueue cannot come before the back-off."""

    def backing_off(self, bench: Bench, delay: int = 20_000) -> int:
        bench.fail(bench.run(), delay, respect_backoff=True)
        return bench.now + delay

    @pytest.mark.parametrize("delay", [20_000, 200_000])
    @pytest.mark.parametrize(
        "asked",
        [{"delay": 0}, {"delay": 0, "policy": Policy.REPLACE}, {"policy": Policy.REPLACE, "max_wait": 5}],
    )
    def test_an_enqueue_before_it_changes_nothing(
        self, bench: Bench, delay: int, asked: dict[str, object]
    ) -> None:
        retry = self.backing_off(bench, delay)
        before = bench.record()
        assert bench.enqueue(**asked) == Scheduled(False, retry, None)
        assert bench.record() == before

    def test_replace_may_go_beyond_it_and_back_to_it(self, bench: Bench) -> None:
        retry = self.backing_off(bench)
        assert bench.replace(delay=25_000).deadline == bench.now + 25_000
        assert bench.replace(delay=1_000).deadline == retry

    def test_it_ends_with_the_next_evaluation(self, bench: Bench) -> None:
        self.backing_off(bench)
        run = bench.evaluate()
        assert bench.enqueue(delay=1_000).deadline == bench.now + 1_000
        assert bench.finish(run).deadline == bench.now + 1_000
        assert bench.enqueue(delay=0).deadline == bench.now

    def test_it_ends_with_a_delete(self, bench: Bench) -> None:
        self.backing_off(bench)
        bench.delete()
        assert bench.enqueue().deadline == bench.now

    def test_without_it_an_enqueue_brings_the_next_look_forward_and_keeps_the_count(
        self, bench: Bench
    ) -> None:
        bench.fail(bench.run(), 20_000, failures=3)
        reply = bench.enqueue(delay=1_000, task_id="t2")
        assert reply.deadline == bench.now + 1_000
        assert (bench.record().failures, bench.record().error) == (3, "boom")
        bench.advance(1_000)
        assert bench.start(reply.wakeup).failures == 3
