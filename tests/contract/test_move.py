"""Entities move from one index to another: `adopt` and `retire`.

There is only one index here, so they move to another kind of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from celery_goalstate.index.base import (
    Failure,
    Limits,
    Policy,
    Record,
    Refusal,
    Refused,
    Request,
    Status,
    Verdict,
)
from tests.contract.bench import FENCED, KIND, Bench
from tests.contract.conftest import OpenBench

THERE = "host"
FAR = 10 * Limits().eta_horizon


def move(bench: Bench, id: str = "a") -> Record | None:
    """What becomes of an entity on the other side."""
    record = bench.record(id)
    bench.index.adopt(THERE, [record])
    assert bench.index.retire(KIND, [record]) == [True]
    assert bench.describe(id) is None
    [moved] = bench.index.describe(THERE, [id])
    return moved


class TestWhatSurvives:
    @pytest.mark.parametrize("delay", [0, 5_000, FAR])
    def test_a_deadline(self, bench: Bench, delay: int) -> None:
        bench.enqueue(delay=delay)
        assert move(bench) == Record("a", Status.PARKED, deadline=bench.now + delay)

    def test_failures_and_their_back_off(self, bench: Bench) -> None:
        bench.fail(bench.run(), FAR, failures=3, error="boom", task_id="task", retries=2)
        failed = bench.now
        bench.advance(1_000)
        moved = move(bench)
        assert moved == Record(
            "a",
            Status.PARKED,
            deadline=failed + FAR,
            failures=3,
            error="boom",
            failing=failed,
            history=(Failure(failed, "", "", None, "boom", "task"),),
            finished=failed,
        )

    def test_a_back_off_that_is_a_floor(self, bench: Bench) -> None:
        bench.fail(bench.run(), FAR, respect_backoff=True)
        due = bench.now + FAR
        move(bench)
        [scheduled] = bench.index.enqueue(THERE, [Request("a", 0, task_id="t")])
        assert (scheduled.changed, scheduled.deadline) == (False, due)

    def test_a_quarantine(self, bench: Bench) -> None:
        told = {"state": "paid", "goal": "shipped", "step": "charge"}
        bench.quarantine(bench.run(), failures=5, error="x" * 500, task_id="task", took=12, **told)
        since = bench.now
        bench.advance(1_000)
        assert move(bench) == Record(
            "a",
            Status.FAILED,
            task_id="task",
            failures=5,
            error="x" * 500,
            history=(Failure(since, "paid", "charge", 12, "x" * 500, "task"),),
            finished=since,
            since=since,
            **told,
        )
        assert bench.index.enqueue(THERE, [Request("a", 0)], policy=Policy.RESYNC)[0].deadline is None

    @pytest.mark.parametrize("ttl", [None, 5_000])
    @pytest.mark.parametrize("converged", [None, False, True])
    def test_the_last_look(self, bench: Bench, ttl: int | None, converged: bool | None) -> None:
        bench.finish(bench.run(), rounds=2, converged=converged, idle_ttl=ttl)
        ended = bench.now
        bench.advance(1_000)
        moved = move(bench)
        assert moved is not None
        assert (moved.status, moved.converged, moved.finished) == (Status.IDLE, converged, ended)
        assert (moved.rounds, moved.expires) == (2, None if ttl is None else ended + ttl)
        bench.advance(4_000)
        assert bench.index.forget(THERE, ["a"]) == (ttl is not None)

    def test_that_it_was_lost_with_a_batch(self, bench: Bench) -> None:
        replies = bench.index.enqueue(KIND, [Request(id, 0, task_id=f"t-{id}") for id in "ab"])
        pairs = [(reply.wakeup.id, reply.wakeup.token) for reply in replies]
        claim, _ = bench.index.claim(KIND, pairs, nonce="n", task_id="t")
        bench.advance(bench.limits.lease)
        bench.lose(claim)
        moved = move(bench)
        assert moved is not None
        assert moved.alone
        [wakeup] = bench.index.promote(THERE, {"a": "task"})
        assert wakeup.alone


def test_only_what_is_kept_can_be_looked_after(bench: Bench) -> None:
    assert bench.index.as_kept(KIND) is None
    bench.enqueue()
    assert bench.index.as_kept(KIND).describe(KIND, ["a"]) == [bench.record()]


class TestAdopt:
    def test_what_is_due_is_sent_by_the_sweeper(self, bench: Bench) -> None:
        bench.enqueue()
        move(bench)
        [wakeup] = bench.index.promote(THERE, {"a": "task"})
        [claim] = bench.index.claim(THERE, [("a", wakeup.token)], nonce="n", task_id="task")
        assert claim.deadline == bench.now

    def test_a_deadline_of_0_is_one(self, bench: Bench) -> None:
        """That is what a damaged one counts as."""
        bench.index.adopt(KIND, [Record("a", Status.PARKED, deadline=0)])
        assert bench.survey().due == ("a",)
        wakeup = bench.promote()
        assert wakeup is not None
        assert wakeup.delay == 0
        bench.delete()

    def test_what_is_known_stays_as_it_is(self, bench: Bench) -> None:
        bench.enqueue(delay=FAR)
        before = bench.lane.stored()
        bench.index.adopt(KIND, [Record("a", Status.PARKED, deadline=bench.now)])
        bench.index.adopt(KIND, [Record("a", Status.FAILED, error="boom", finished=1, since=1)])
        assert bench.lane.stored() == before

    def test_the_kind_is_noted(self, bench: Bench) -> None:
        bench.index.adopt(THERE, [Record("a", Status.PARKED, deadline=bench.now)])
        assert bench.index.kinds() == [THERE]

    def test_a_message_of_the_old_place_evaluates_nothing(self, bench: Bench) -> None:
        wakeup = bench.enqueue().wakeup
        move(bench)
        assert bench.claim(wakeup) == Refusal("a", Refused.MISSING)
        [reply] = bench.index.claim(THERE, [("a", wakeup.token)], nonce="n", task_id="task")
        assert reply == Refusal("a", Refused.STALE)


class TestRetire:
    def retire(self, bench: Bench, record: Record) -> bool:
        [gone] = bench.index.retire(KIND, [record])
        return gone

    def test_what_is_gone_already(self, bench: Bench) -> None:
        assert self.retire(bench, Record("a", Status.IDLE, finished=bench.now))

    @pytest.mark.parametrize("policy", [Policy.EARLIEST, Policy.REPLACE])
    def test_an_earlier_deadline_is_not_overlooked(self, bench: Bench, policy: Policy) -> None:
        bench.enqueue(delay=FAR)
        record = bench.record()
        bench.enqueue(delay=5_000, policy=policy)
        assert not self.retire(bench, record)
        assert bench.record().deadline == bench.now + 5_000

    @pytest.mark.parametrize("verdict", [Verdict.DONE, Verdict.QUARANTINED])
    def test_a_new_life_is_not_overlooked(self, bench: Bench, verdict: Verdict) -> None:
        bench.finish(bench.run(), verdict, failures=1, error="boom")
        record = bench.record()
        bench.enqueue()
        assert not self.retire(bench, record)
        assert bench.status() is Status.SENT

    def test_one_that_runs_is_left_alone(self, bench: Bench) -> None:
        wakeup = bench.enqueue().wakeup
        record = bench.record()
        claim = bench.start(wakeup)
        assert not self.retire(bench, record)
        assert not self.retire(bench, dataclasses.replace(record, deadline=None))
        assert bench.renew(claim)

    def test_another_look_since(self, bench: Bench) -> None:
        bench.finish(bench.run())
        record = bench.record()
        bench.advance(1)
        bench.finish(bench.run())
        assert not self.retire(bench, record)

    def test_a_message_that_was_sent_meanwhile_is_no_change(self, bench: Bench) -> None:
        bench.enqueue(delay=FAR)
        record = bench.record()
        bench.advance(FAR)
        assert bench.promote()
        assert self.retire(bench, record)
        assert bench.lane.stored() == {}

    def test_a_report_that_comes_too_late(self, bench: Bench) -> None:
        claim = bench.run()
        bench.finish(claim)
        assert self.retire(bench, bench.record())
        assert bench.finish(claim) == FENCED


def test_thousands_over_shards(open_bench: OpenBench) -> None:
    bench: Any = open_bench(shards=3)
    bench.index.enqueue(KIND, [Request(f"id-{n}", FAR + n) for n in range(1_000)])
    records = bench.index.records(KIND, Status.PARKED, 1_000)
    bench.index.adopt(THERE, records)
    assert bench.index.records(THERE, Status.PARKED, 2_000) == records
    assert bench.index.retire(KIND, records) == [True] * 1_000
    assert not any(bench.index.counts(KIND).values())
    assert bench.index.adopt(THERE, []) is None
    assert bench.index.retire(KIND, []) == []
