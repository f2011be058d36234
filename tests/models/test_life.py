"""One entity's life: no fault shows, whatever happens; and each of the rules is needed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.explorer import explore
from tests.models.life import (
    FAILED,
    IDLE,
    RUNNING,
    SCHEDULED,
    Due,
    Known,
    Life,
    Record,
    Verdict,
    earliest,
    idle,
    scheduled,
)

# -- the rules as they are


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"respect_backoff": True}, marks=pytest.mark.long),
        pytest.param({"batch": True}, marks=pytest.mark.long),
        pytest.param({"workers": 3}, marks=pytest.mark.long),
        pytest.param({"workers": 3, "respect_backoff": True}, marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.timeout(3_600)
def test_no_fault_shows_in_any_state(options: dict[str, Any], record_property: Any) -> None:
    explored = explore(Life(**options), most=500_000)
    record_property("summary", f"model of a life {options}: {explored}")
    assert not explored.counterexample, explored
    assert explored.exhausted, explored


@pytest.mark.long
@pytest.mark.timeout(3_600)
def test_no_fault_shows_with_three_workers_and_batches(record_property: Any) -> None:
    explored = explore(Life(3, batch=True), most=400_000)
    record_property("summary", f"model of a life, 3 workers, batches: {explored}")
    assert not explored.counterexample, explored


class OwnFarComesForward(Life):
    """A refused report may bring forward what only the entity's own evaluations asked for, far ahead."""

    def again_scheduled(self, record: Record, wanted: Due) -> Record:
        mine = record.finished and not (record.failing or record.since)
        return record._replace(deadline=wanted) if mine else record


@pytest.mark.long
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("workers", [2, 3])
def test_what_only_its_own_evaluations_asked_for_could_come_forward(workers: int) -> None:
    explored = explore(OwnFarComesForward(workers), most=500_000)
    assert not explored.counterexample, explored
    assert explored.exhausted, explored


# -- one of them broken


class RefusedInVain(Life):
    """A refused report changes nothing."""

    def refused(self, record: Known, lease: int, began: bool) -> Known:
        return record


class RefusedHealsIdleOnly(Life):
    """A refused report leads to an evaluation of an idle entity only."""

    def refused(self, record: Known, lease: int, began: bool) -> Known:
        return self.again(record, Due.NOW) if began and record and record.status is IDLE else record


class RefusedAsFromOutside(Life):
    """A refused report counts as an enqueue from outside, if the entity is known."""

    def refused(self, record: Known, lease: int, began: bool) -> Known:
        return self.enqueue(record, Due.NOW) if began and record else record


class RefusedMakesARecord(Life):
    """A refused report counts as an enqueue from outside, also if the entity is not known."""

    def refused(self, record: Known, lease: int, began: bool) -> Known:
        return record if record and record.status is FAILED else self.enqueue(record, Due.NOW)


class NotedAsFromOutside(Life):
    """A refused report is noted as from outside while another evaluation runs."""

    def refused(self, record: Known, lease: int, began: bool) -> Known:
        running = record is not None and record.status is RUNNING
        return self.enqueue(record, Due.NOW) if began and running else super().refused(record, lease, began)


class RefusedDefeatsBackoff(Life):
    """A refused report brings the pending evaluation forward, out of its back-off, too."""

    def again_scheduled(self, record: Record, wanted: Due) -> Record:
        return record._replace(deadline=earliest(record.deadline, wanted))


def may_come_forward(record: Record) -> bool:
    return not record.failing and record.finished


class RefusedBringsForward(Life):
    """A refused report brings forward a pending evaluation that is far ahead."""

    def again_scheduled(self, record: Record, wanted: Due) -> Record:
        return record._replace(deadline=wanted) if may_come_forward(record) else record


class RefusedBringsForwardAndKeeps(Life):
    """It does, and the deadline far ahead is noted as what the evaluation itself asks for."""

    def again_scheduled(self, record: Record, wanted: Due) -> Record:
        if not may_come_forward(record) or record.deadline is not Due.FAR:
            return record
        return record._replace(deadline=wanted, own=Due.FAR)


class RefusedBringsForwardAndKeepsForLong(RefusedBringsForwardAndKeeps):
    """It does, and a failure does not discard what was noted so."""

    def retry(self, ended: Record, noted: Due | None, own: Due | None) -> Record:
        return super().retry(ended, noted, own)._replace(own=own if own is Due.FAR else None)


class RefusedBringsFreshForward(Life):
    """A refused report brings forward the first evaluation of a fresh life."""

    def again_scheduled(self, record: Record, wanted: Due) -> Record:
        return record if record.failing or record.finished else record._replace(deadline=wanted)


class InsideIsOutside(Life):
    """What is enqueued from inside by an evaluation that is not in force is an enqueue from outside."""

    def enqueue_inside(self, record: Known, lease: int, wanted: Due) -> Known:
        if record and record.status is RUNNING and record.lease == lease and not record.deleted:
            return super().enqueue_inside(record, lease, wanted)
        pending = record and record.status in {SCHEDULED, FAILED}
        return record if pending else self.enqueue(record, wanted)


class OnlyTheMarkedIsRefused(InsideIsOutside):
    """Only the evaluation that is marked as deleted cannot enqueue from inside."""

    def enqueue_inside(self, record: Known, lease: int, wanted: Due) -> Known:
        if record and record.status is RUNNING and record.lease == lease:
            return Life.enqueue_inside(self, record, lease, wanted)
        return super().enqueue_inside(record, lease, wanted)


class InsideLiftsQuarantine(Life):
    """An evaluation that is not in force enqueues also an entity in quarantine."""

    def again(self, record: Known, wanted: Due) -> Known:
        if record and record.status is FAILED:
            return scheduled(record, wanted)
        return super().again(record, wanted)


class InsideIsLostInTheNext(Life):
    """What an evaluation that is not in force enqueues is dropped while another one runs."""

    def again(self, record: Known, wanted: Due) -> Known:
        return record if record and record.status is RUNNING else super().again(record, wanted)


class EnqueueClearsTheMark(Life):
    """An enqueue from outside takes a delete back while the entity runs."""

    def enqueue(self, record: Known, wanted: Due) -> Known:
        return super().enqueue(record and record._replace(deleted=False), wanted)


class DeleteRemovesAtOnce(Life):
    """A delete forgets a running entity at once."""

    def delete(self, record: Record) -> Known:
        return None


class DeleteKeepsWhatWasNoted(Life):
    """A delete leaves what was enqueued during the run."""

    def delete(self, record: Record) -> Known:
        return record._replace(deleted=True) if record.status is RUNNING else None


class GoneIsDone(Life):
    """An entity that is gone is one that is done."""

    def finish(self, record: Record, verdict: Verdict, delay: Due | None, *, lost: bool = False) -> Known:
        return super().finish(record, Verdict.DONE if verdict is Verdict.GONE else verdict, delay, lost=lost)


class GoneEnqueuesItself(Life):
    """What the evaluation itself enqueued outlives its delete, or that it is gone."""

    def fresh_life(self, ended: Record, noted: Due | None, own: Due | None) -> Known:
        return super().fresh_life(ended, earliest(noted, own), own)


class GoneForGood(Life):
    """What was enqueued from outside during the run does not outlive a delete either."""

    def fresh_life(self, ended: Record, noted: Due | None, own: Due | None) -> Known:
        return None


class FreshLifeKeepsFailures(Life):
    """A fresh life begins with the failures of the old one."""

    def fresh_life(self, ended: Record, noted: Due | None, own: Due | None) -> Known:
        fresh = super().fresh_life(ended, noted, own)
        return fresh and fresh._replace(failures=ended.failures)


class FailureKeepsOwn(Life):
    """What a failed evaluation itself enqueued comes before its back-off."""

    def retry(self, ended: Record, noted: Due | None, own: Due | None) -> Record:
        return super().retry(ended, earliest(noted, own), own)


class NotedIsDropped(Life):
    """What was enqueued from outside during a failed run waits for no evaluation of its own."""

    def finish(self, record: Record, verdict: Verdict, delay: Due | None, *, lost: bool = False) -> Known:
        noted = None if verdict is Verdict.QUARANTINED else record.noted
        return super().finish(record._replace(noted=noted), verdict, delay, lost=lost)


class NoCheckBeforeStart(Life):
    """An entity of a batch starts without a check."""

    def may_start(self, record: Known, lease: int) -> bool:
        return True


class GivenBackIsDone(Life):
    """An entity of a batch that is given back is done."""

    def finish(self, record: Record, verdict: Verdict, delay: Due | None, *, lost: bool = False) -> Known:
        if verdict is Verdict.UNSTARTED and not record.deleted:
            return idle(record._replace(lease=0, batch=False, noted=None, own=None, last=record.lease))
        return super().finish(record, verdict, delay, lost=lost)


MUTANTS: list[tuple[type[Life], dict[str, Any], str]] = [
    (RefusedInVain, {}, "NOT-HEALED"),
    (RefusedHealsIdleOnly, {}, "NOT-HEALED"),
    (InsideIsLostInTheNext, {}, "NOT-HEALED"),
    (RefusedAsFromOutside, {}, "EARLY-FRESH"),
    (NotedAsFromOutside, {}, "QUARANTINE-LIFTED"),
    (RefusedMakesARecord, {}, "AFTER-DELETE"),
    (RefusedDefeatsBackoff, {}, "BEFORE-BACKOFF"),
    (RefusedBringsForward, {}, "FAR-SWALLOWED"),
    (RefusedBringsForwardAndKeeps, {}, "FAR-SWALLOWED"),
    (RefusedBringsForwardAndKeepsForLong, {}, "FAR-SWALLOWED"),
    (RefusedBringsFreshForward, {}, "EARLY-FRESH"),
    (InsideIsOutside, {}, "AFTER-DELETE"),
    (OnlyTheMarkedIsRefused, {}, "AFTER-DELETE"),
    (InsideLiftsQuarantine, {}, "QUARANTINE-LIFTED"),
    (EnqueueClearsTheMark, {}, "OLD-FAILURES"),
    (DeleteRemovesAtOnce, {}, "OVERLAP"),
    (DeleteKeepsWhatWasNoted, {}, "AFTER-DELETE"),
    (GoneIsDone, {}, "AFTER-DELETE"),
    (GoneEnqueuesItself, {}, "AFTER-DELETE"),
    (GoneForGood, {}, "LOST"),
    (FreshLifeKeepsFailures, {}, "OLD-FAILURES"),
    (FailureKeepsOwn, {}, "BEFORE-BACKOFF"),
    (NotedIsDropped, {}, "LOST"),
    (NoCheckBeforeStart, {"batch": True}, "AFTER-DELETE"),
    (GivenBackIsDone, {"batch": True}, "LOST"),
]


@pytest.mark.parametrize(
    ("mutant", "options", "fault"), MUTANTS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_mutant_is_caught(
    mutant: type[Life], options: dict[str, Any], fault: str, record_property: Any
) -> None:
    explored = explore(mutant(**options), most=12_000)
    record_property("summary", f"mutant: {mutant.__doc__}\n{explored}")
    assert explored.counterexample, explored
    assert explored.counterexample.name == fault, explored


def test_a_counterexample_is_readable() -> None:
    explored = explore(NoCheckBeforeStart(batch=True), most=100)
    assert str(explored.counterexample).splitlines()[:5] == [
        "AFTER-DELETE: an evaluation starts after a delete, and nobody outside has asked for it",
        "   1. enqueued from outside, now",
        "   2. W1 claims it",
        "   3. deleted",
        "   4. W1 starts",
    ]


def test_a_counterexample_says_what_comes_of_it() -> None:
    explored = explore(RefusedInVain(), most=12_000)
    assert "      then W1 reports done: refused\n" in str(explored.counterexample)
