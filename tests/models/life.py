"""The life of one entity: refused reports, deletes, what an evaluation enqueues of its own entity.

Modelled: an entity that is enqueued from outside (now, or far ahead), deleted, claimed, evaluated, and
reported; workers that stall, write late, die, or lose the reply to a report and repeat it; what an evaluation
enqueues of its own entity, while it runs, stalls, or has ended (a thread it left behind); `EntityGone`; the
sweeper's `WorkerLost`; back-off, with `respect_backoff` as an option; quarantine; batches as an option, by
message or by `take`: a check before each start, entities that are given back, or lost without a failure and
then claimed alone.

Not modelled: messages, tokens and the pause (what is due can be claimed), other entities, time (a deadline is
now, a back-off, or far ahead, and comes at any moment), leases as such (`leases`: here one is lost only when
its holder is dead or stalled), `replace`, `resync`, `max_failures` and idle records that are forgotten.

14,513 states of two workers, with batches 36,097; 269,956 of three workers: all there are. Three workers with
batches are cut at 400,000.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from enum import Enum, IntEnum
from typing import NamedTuple, TypeAlias

from tests.models.explorer import End, EndFault, Move, StepFault, replaced

MOST_FAILURES = 2  # more make no difference


class Due(IntEnum):
    """When: at once, after the back-off, tomorrow."""

    NOW = 0
    BACKOFF = 1
    FAR = 2


class Status(Enum):
    """Of an entity that is known."""

    SCHEDULED = "scheduled"
    RUNNING = "running"
    IDLE = "idle"
    FAILED = "failed"

    def __repr__(self) -> str:
        return self.value


SCHEDULED, RUNNING, IDLE, FAILED = Status


class Verdict(Enum):
    """How an evaluation ended."""

    DONE = "done"
    FAILED = "failed"
    QUARANTINED = "quarantined"
    GONE = "gone"
    UNSTARTED = "unstarted"


class Record(NamedTuple):
    """What the index knows."""

    status: Status
    deadline: Due | None = None
    floor: bool = False  # nothing comes before the back-off
    since: bool = False  # somebody outside waits for the pending evaluation
    failures: int = 0
    failing: bool = False  # the last evaluation failed
    finished: bool = False  # an evaluation of this life has ended
    lease: int = 0
    batch: bool = False  # claimed together with others
    alone: bool = False  # its worker was lost with a batch
    deleted: bool = False  # while running
    noted: Due | None = None  # enqueued from outside while running
    own: Due | None = None  # likewise, from inside
    last: int = 0  # the lease whose report was accepted last; negative: the sweeper's report


Known: TypeAlias = Record | None


class Phase(Enum):
    """Where a worker is with its evaluation."""

    WAITS = "waits for its turn in a batch"
    READS = "reads the states"
    ACTS = "acts"
    ENDED = "has ended, but for a thread that it left behind"

    def __repr__(self) -> str:
        return self.value


class Worker(NamedTuple):
    """One evaluation, in the eyes of the worker that has it."""

    lease: int
    phase: Phase
    stalled: bool = False
    late: bool = False  # it wrote after its lease was lost
    unanswered: tuple[Verdict, Due | None] | None = None  # a report whose reply was lost


class Waiting(IntEnum):
    """Whether somebody outside waits for an evaluation far ahead and asked for no earlier one."""

    NOT = 0
    WAITS = 1
    FRESH = 2  # and the entity had not been known


class Seen(NamedTuple):
    """What an onlooker knows who sees everything: on this the promises are judged."""

    asked: bool = False  # enqueued from outside, and no evaluation has started since
    answering: bool = False  # the evaluation under way is one that was asked for so
    deleted: bool = False  # deleted or gone, and nothing enqueued from outside since
    quarantined: bool = False  # and nothing enqueued from outside since
    backoff: bool = False  # one is to be waited for: nobody outside asked since the failing evaluation began
    failures: int = 0  # of this life
    dirty: bool = False  # a late write, and no evaluation has started since
    owed: bool = False  # a late write was followed by its refused report, and no evaluation has started since
    far: Waiting = Waiting.NOT


class State(NamedTuple):
    """Everything."""

    record: Known
    workers: tuple[Worker | None, ...]
    seen: Seen


def earliest(*deadlines: Due | None) -> Due | None:
    return min((each for each in deadlines if each is not None), default=None)


VERDICTS: tuple[tuple[Verdict, Due | None], ...] = (
    (Verdict.DONE, None),
    (Verdict.DONE, Due.FAR),
    (Verdict.FAILED, Due.BACKOFF),
    (Verdict.QUARANTINED, None),
    (Verdict.GONE, None),
)


# -- what must never happen


def started(before: State, after: State) -> bool:
    """Whether an evaluation was claimed."""
    return bool(
        after.record
        and after.record.status is RUNNING
        and not (before.record and before.record.lease == after.record.lease)
    )


def after_delete(before: State, after: State) -> bool:
    """an evaluation starts after a delete, and nobody outside has asked for it"""
    in_batch = any(
        then and now and then.phase is Phase.WAITS and now.phase is Phase.ACTS
        for then, now in zip(before.workers, after.workers, strict=True)
    )
    return (started(before, after) or in_batch) and before.seen.deleted


def overlap(before: State, after: State) -> bool:
    """an evaluation starts while another one runs that has not stalled"""
    runs = {Phase.READS, Phase.ACTS}
    return started(before, after) and any(
        worker.phase in runs and not worker.stalled and not worker.unanswered
        for worker in before.workers
        if worker
    )


def before_backoff(before: State, after: State) -> bool:
    """an evaluation starts before the back-off has passed, and nobody outside has asked for it"""
    return started(before, after) and before.seen.backoff


def early_fresh(before: State, after: State) -> bool:
    """the first evaluation of a fresh life starts before the deadline that was asked for"""
    return started(before, after) and before.seen.far is Waiting.FRESH


def old_failures(before: State, after: State) -> bool:
    """an evaluation starts with failures of an earlier life"""
    assert before.record or not started(before, after)
    return started(before, after) and (before.record or Record(IDLE)).failures > before.seen.failures


def quarantine_lifted(before: State, after: State) -> bool:
    """an evaluation is pending after a quarantine, and nobody outside has asked for it"""
    return bool(after.seen.quarantined and after.record and after.record.status in {SCHEDULED, RUNNING})


def far_swallowed(before: State, after: State) -> bool:
    """idle, though somebody outside waits for an evaluation far ahead"""
    return bool(after.seen.far and after.record and after.record.status is IDLE)


def not_healed(end: End) -> bool:
    """the report of a late write was refused, and no evaluation starts after it"""
    return bool(end.state.seen.owed and end.state.record and end.state.record.status is not FAILED)


def lost(end: End) -> bool:
    """enqueued from outside, and no evaluation starts after it"""
    return bool(end.state.seen.asked)


def restless(end: End) -> bool:
    """evaluated again and again though nothing goes wrong"""
    return end.counted is None or end.counted > 2


class Life:
    """The rules as they should be; a variant replaces one of the methods of the first part."""

    step_faults: tuple[StepFault, ...] = (
        *(after_delete, overlap, before_backoff, early_fresh, old_failures),
        *(quarantine_lifted, far_swallowed),
    )
    end_faults: tuple[EndFault, ...] = (not_healed, lost, restless)

    def __init__(self, workers: int = 2, *, batch: bool = False, respect_backoff: bool = False) -> None:
        self.workers = workers
        self.batch = batch
        self.respect_backoff = respect_backoff

    # -- the rules of the index

    def enqueue(self, record: Known, wanted: Due) -> Known:
        """From outside."""
        if record is None:
            return Record(SCHEDULED, wanted, since=True)
        if record.status is RUNNING:
            return record._replace(noted=earliest(record.noted, wanted))
        if record.status is SCHEDULED:
            wanted = max(wanted, Due.BACKOFF) if record.floor else wanted
            return record._replace(deadline=earliest(record.deadline, wanted), since=True)
        return scheduled(record, wanted, failures=0, failing=False, since=True)

    def enqueue_inside(self, record: Known, lease: int, wanted: Due) -> Known:
        """From inside the evaluation that has, or had, this lease."""
        if record and record.status is RUNNING and record.lease == lease:
            return record if record.deleted else record._replace(own=earliest(record.own, wanted))
        return self.again(record, wanted)

    def again(self, record: Known, wanted: Due) -> Known:
        """An evaluation that is not in force reports or enqueues: one more, unless one is pending."""
        if record is None:
            return None
        if record.status is RUNNING:
            return record if record.deleted else record._replace(own=earliest(record.own, wanted))
        if record.status is IDLE:
            return scheduled(record, wanted, since=False)
        return self.again_scheduled(record, wanted) if record.status is SCHEDULED else record

    def again_scheduled(self, record: Record, wanted: Due) -> Record:
        """The evaluation that is pending starts after this, near or far."""
        return record

    def delete(self, record: Record) -> Known:
        if record.status is RUNNING:
            return record._replace(deleted=True, noted=None, own=None)
        return None

    def claim(self, record: Record, lease: int) -> Record:
        batch = self.batch and not record.alone
        return record._replace(status=RUNNING, deadline=None, floor=False, lease=lease, batch=batch)

    def may_start(self, record: Known, lease: int) -> bool:
        """The check before an entity of a batch starts."""
        return record is not None and record.lease == lease and not record.deleted

    def refused(self, record: Known, lease: int, began: bool) -> Known:
        """The report of an evaluation that has lost its lease, and had or had not begun an action."""
        return self.again(record, Due.NOW) if began else record

    def finish(self, record: Record, verdict: Verdict, delay: Due | None, *, lost: bool = False) -> Known:
        """The report of the evaluation in force; `lost`: the sweeper's."""
        noted, own = record.noted, record.own
        ended = record._replace(
            lease=0,
            batch=False,
            deleted=False,
            noted=None,
            own=None,
            since=noted is not None,
            last=-record.lease if lost else record.lease,
        )
        if record.deleted or verdict is Verdict.GONE:
            return self.fresh_life(ended, noted, own)
        if verdict is Verdict.UNSTARTED or (lost and record.batch):
            return scheduled(ended, Due.NOW, alone=record.alone or lost)
        ended = ended._replace(finished=True, alone=record.alone and lost)
        if verdict is Verdict.DONE:
            deadline = earliest(delay, noted, own)
            ended = ended._replace(failures=0, failing=False)
            return scheduled(ended, deadline) if deadline is not None else idle(ended)
        ended = ended._replace(failures=min(MOST_FAILURES, record.failures + 1), failing=True)
        if verdict is Verdict.FAILED:
            return self.retry(ended, noted, own)
        if noted is None:
            return ended._replace(status=FAILED, deadline=None)
        return scheduled(ended, noted, failures=0, failing=False)

    def fresh_life(self, ended: Record, noted: Due | None, own: Due | None) -> Known:
        """Only what was enqueued from outside outlives a delete."""
        if noted is None:
            return None
        return scheduled(ended, noted, failures=0, failing=False, finished=False, alone=False)

    def retry(self, ended: Record, noted: Due | None, own: Due | None) -> Record:
        """What the failed evaluation itself enqueued comes no earlier than its back-off."""
        if self.respect_backoff:
            return scheduled(ended, Due.BACKOFF, floor=True)
        return scheduled(ended, earliest(Due.BACKOFF, noted))

    # -- what happens

    def start(self) -> State:
        return State(None, (None,) * self.workers, Seen())

    def moves(self, state: State) -> Iterator[Move]:
        """Calm ones first: the first of them is what happens when nothing else goes wrong."""
        for number, worker in enumerate(state.workers):
            if worker:
                yield from self._reports(state, number, worker)
        yield from self._leases_and_deadlines(state)
        yield from self._claims(state)
        yield from self._outside(state)
        for number, worker in enumerate(state.workers):
            if worker:
                yield from self._mishaps(state, number, worker)

    def _reports(self, state: State, number: int, worker: Worker) -> Iterator[Move]:
        record, who = state.record, f"W{number + 1}"
        in_force = holds(record, worker)
        if worker.phase is Phase.ENDED or (worker.stalled and in_force):
            return  # one that stalls does nothing before its lease is lost
        if worker.unanswered:
            verdict, delay = worker.unanswered
            after, _ = self._report(state, number, worker, verdict, delay)
            yield Move(f"{who} repeats its report: {verdict.value}", after, calm=True)
            return
        if worker.phase is Phase.WAITS and in_force:
            if self.may_start(record, worker.lease):
                started = worker._replace(phase=Phase.ACTS)
                workers = replaced(state.workers, number, started)
                yield Move(f"{who} starts", state._replace(workers=workers), calm=True)
            verdicts: tuple[tuple[Verdict, Due | None], ...] = ((Verdict.UNSTARTED, None),)
        elif in_force:
            verdicts = VERDICTS
        else:
            verdicts = VERDICTS[:1]
        for place, (verdict, delay) in enumerate(verdicts):
            after, accepted = self._report(state, number, worker, verdict, delay)
            name = f"{who} reports {verdict.value}"
            name += ", again far ahead" if delay is Due.FAR else ""
            name += "" if accepted else ": refused"
            yield Move(name, after, calm=not place)
            unanswered = worker._replace(unanswered=(verdict, delay))
            workers = replaced(state.workers, number, unanswered)
            yield Move(f"{name}, and the reply is lost", after._replace(workers=workers))

    def _report(
        self, state: State, number: int, worker: Worker, verdict: Verdict, delay: Due | None
    ) -> tuple[State, bool]:
        record, seen = state.record, state.seen
        acted = worker.phase is Phase.ACTS
        left_behind = worker._replace(phase=Phase.ENDED, stalled=False, late=False, unanswered=None)
        workers = replaced(state.workers, number, left_behind if acted else None)
        if record and holds(record, worker):
            after = self.finish(record, verdict, delay)
            return State(after, workers, _ended(self, record, seen, verdict)), True
        if record and record.last == worker.lease:
            return State(record, workers, seen), True  # the same report again
        after = self.refused(record, worker.lease, acted)
        looked_at = record and record.status is not FAILED and not record.deleted
        owed = seen.owed or bool(worker.late and seen.dirty and looked_at)
        return State(after, workers, seen._replace(owed=owed)), False

    def _leases_and_deadlines(self, state: State) -> Iterator[Move]:
        record, workers, seen = state
        if record is None:
            return
        if record.status is RUNNING:
            holder = next((worker for worker in workers if worker and worker.lease == record.lease), None)
            if holder is None or holder.stalled:
                after = self.finish(record, Verdict.FAILED, Due.BACKOFF, lost=True)
                verdict = Verdict.UNSTARTED if record.batch else Verdict.FAILED
                seen = _ended(self, record, seen, verdict)
                yield Move("its worker is found to be lost", State(after, workers, seen), calm=True)
        elif record.deadline is Due.BACKOFF:
            due = record._replace(deadline=Due.NOW, floor=False)
            seen = seen._replace(backoff=False)
            yield Move("the back-off has passed", State(due, workers, seen), calm=True)
        elif record.deadline is Due.FAR:
            due = record._replace(deadline=Due.NOW, floor=False)
            seen = seen._replace(far=Waiting.NOT)
            yield Move("the deadline far ahead comes", State(due, workers, seen), calm=True)

    def _claims(self, state: State) -> Iterator[Move]:
        record, workers, seen = state
        if record is None or record.deadline is not Due.NOW:
            return
        slots = sorted(range(len(workers)), key=lambda number: workers[number] is not None)
        free = next((number for number in slots if _is_free(workers[number])), None)
        if free is None:
            return
        known = [worker.lease for worker in workers if worker]
        lease = 1 + max([0, abs(record.last), *known])
        claimed = self.claim(record, lease)
        worker = Worker(lease, Phase.WAITS if claimed.batch else Phase.READS)
        seen = seen._replace(asked=False, answering=seen.asked, dirty=False, owed=False)
        after = State(claimed, replaced(workers, free, worker), seen)
        yield Move(f"W{free + 1} claims it", after, calm=True)

    def _outside(self, state: State) -> Iterator[Move]:
        record, workers, seen = state
        for wanted in (Due.NOW, Due.FAR):
            new_life = record is None or record.status in {IDLE, FAILED} or seen.deleted
            far = Waiting.NOT
            if wanted is Due.FAR:
                far = seen.far if record and record.status in {SCHEDULED, RUNNING} else Waiting.WAITS
                far = Waiting.FRESH if record is None else far
            after = seen._replace(
                asked=True,
                deleted=False,
                quarantined=False,
                backoff=seen.backoff and self.respect_backoff,
                failures=0 if new_life else seen.failures,
                far=far,
            )
            name = f"enqueued from outside, {'far ahead' if wanted else 'now'}"
            yield Move(name, State(self.enqueue(record, wanted), workers, after))
        if record:
            yield Move("deleted", State(self.delete(record), workers, Seen(deleted=True)))

    def _mishaps(self, state: State, number: int, worker: Worker) -> Iterator[Move]:
        """What a worker does besides reporting."""
        record, workers, seen = state
        who, in_force = f"W{number + 1}", holds(record, worker)

        def becomes(worker: Worker | None) -> State:
            return state._replace(workers=replaced(workers, number, worker))

        yield Move(f"{who} dies", becomes(None))
        if worker.phase in {Phase.ACTS, Phase.ENDED} and not worker.unanswered:
            for wanted in (Due.NOW, Due.FAR):
                enqueued = self.enqueue_inside(record, worker.lease, wanted)
                name = f"{who} enqueues it from inside, {'far ahead' if wanted else 'now'}"
                yield Move(name, state._replace(record=enqueued))
        if worker.phase is Phase.ENDED or worker.unanswered:
            return
        if worker.phase is Phase.READS and in_force and not worker.stalled:
            yield Move(f"{who} begins an action", becomes(worker._replace(phase=Phase.ACTS)))
        stalled = sum(1 for each in workers if each and each.stalled)
        if not worker.stalled and stalled < 2:
            yield Move(f"{who} stalls", becomes(worker._replace(stalled=True)))
        if worker.stalled and worker.phase is Phase.ACTS and not in_force and not worker.late:
            dirty = seen._replace(dirty=record is not None)
            late = replaced(workers, number, worker._replace(late=True))
            yield Move(f"{who} writes late", State(record, late, dirty))

    # -- exploring it

    def canonical(self, state: State) -> Hashable:
        """Leases are numbered afresh, workers come in any order."""
        record, workers, seen = state
        leases = sorted(worker.lease for worker in workers if worker)
        number = {lease: place for place, lease in enumerate(leases, 1)}
        if record:
            # Only a worker that may report again makes a difference to what was reported last.
            last = number.get(record.last, 0)
            record = record._replace(lease=number.get(record.lease, 0), last=last)
        return record, frozenset((number[each[0]], *each[1:]) for each in workers if each), seen

    def count(self, before: State, move: Move) -> int:
        """Evaluations."""
        return int(started(before, move.after))


def scheduled(record: Record, deadline: Due | None, **fields: object) -> Record:
    return record._replace(status=SCHEDULED, deadline=deadline, **fields)


def idle(record: Record) -> Record:
    return record._replace(status=IDLE, deadline=None)


def holds(record: Known, worker: Worker) -> bool:
    """Whether it is this worker's evaluation that is in force."""
    return record is not None and record.status is RUNNING and record.lease == worker.lease


def _is_free(worker: Worker | None) -> bool:
    """A thread that an evaluation left behind keeps nobody from work."""
    return worker is None or worker.phase is Phase.ENDED


def _ended(model: Life, record: Record, seen: Seen, verdict: Verdict) -> Seen:
    """What the onlooker makes of a report that is accepted."""
    if record.deleted or verdict is Verdict.GONE:
        far = Waiting.FRESH if record.noted is Due.FAR else Waiting.NOT
        return Seen(asked=seen.asked, deleted=not seen.asked, far=far)
    if verdict is Verdict.UNSTARTED:
        return seen._replace(asked=seen.asked or seen.answering, answering=False)
    seen = seen._replace(answering=False)
    failures = min(MOST_FAILURES, seen.failures + 1)
    if verdict is Verdict.DONE:
        return seen._replace(backoff=False, failures=0)
    if verdict is Verdict.FAILED:
        return seen._replace(backoff=model.respect_backoff or not seen.asked, failures=failures)
    if seen.asked:
        return seen._replace(backoff=False, failures=0)
    return seen._replace(quarantined=True, backoff=False, failures=failures, dirty=False, owed=False)
