"""Leases that are counted and not timed: sweepers, workers, and a clock of the index that steps.

Modelled: one entity; workers that claim, renew, finish, die, or are cut off and come back, and are sure of
their lease by their own clock from before they asked; sweepers that survey and then end what they judged to
be lost, at any moment later; surveys that arrive late, or whose reply is lost, or that were given up and
arrive all the same; sweepers that die and others that start; the hold of one sweeper over the others, which
is a time of the index's clock; and that clock, which steps in either direction at any moment, so also several
times between two surveys.

A tick is the unit of time. `score` counts from the present tick, and `till` from the index's present time, so
that states which differ only in when they are look the same. With `hold=0` every sweeper may survey at any
moment, which is all that a clock could bring about: then its steps need no modelling.

Not modelled: several entities, shards, tokens (`life` has what a report leads to), servers that lose a
renewal.

Without a hold, so with whatever a clock does: 57,732 states of one worker and two sweepers, 29,720 of two
workers and one sweeper, all there are; three sweepers are cut at 300,000. With a hold and one step of the
clock: 293,995, all there are; with two steps, or two workers besides, cut at 300,000. Any number of steps: at
random.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

from tests.models.explorer import End, EndFault, Move, StepFault, replaced

LEASE = 2
MOST = 1  # that one survey adds to the tick
HOLD = 1
STEP = 6  # of the index's clock: further than all that is counted here
FURTHEST = 2 * STEP  # times further away make no difference
RECOVERY = LEASE + 3

TIME_PASSES = "time passes"


class Worker(NamedTuple):
    """One that claimed the entity."""

    lease: int
    sure: int = 0  # for how long it is sure of its lease
    asked: int | None = None  # how long ago it asked for the lease; None: there is a reply
    cut_off: bool = False


class Judged(NamedTuple):
    """A lease that was found to be lost, and is to be ended. `same`: it was not renewed since."""

    lease: int
    same: bool = True


class Sweeper(NamedTuple):
    """One of several."""

    known: bool = False  # the tick is still what its last survey left
    passed: int | None = None  # since the reply to its last survey; None: there was none
    asking: int | None = None  # what had passed when it asked; None: it does not ask
    given_up: int | None = None  # likewise, of a survey that it gave up and that may still arrive
    judged: Judged | None = None
    holds: bool = False
    memory: Hashable = None  # of variants


class State(NamedTuple):
    """Everything. `lease` is 0 while the entity is pending."""

    lease: int
    score: int
    workers: tuple[Worker | None, ...]
    sweepers: tuple[Sweeper, ...]
    till: int
    steps: float


def alike(slots: Iterable[object]) -> Any:
    """The same in any order."""
    values = tuple(slots)
    return frozenset(values if len(values) <= 2 else Counter(values).items())


def within(time: int) -> int:
    return max(-FURTHEST, min(FURTHEST, time))


# -- what must never happen


def live_lease_ended(before: State, after: State) -> bool:
    """a lease was ended whose holder is sure of it"""
    return (
        before.lease > 0
        and not after.lease
        and any(worker and worker.lease == before.lease and worker.sure for worker in after.workers)
    )


def overlap(before: State, after: State) -> bool:
    """two workers are sure of their leases"""
    return sum(1 for worker in after.workers if worker and worker.sure) > 1


def not_recovered(end: End) -> bool:
    """a lease that nobody holds was not ended within a lease and three ticks"""
    return end.counted is None or end.counted > RECOVERY


class Leases:
    """The rules as they should be; a variant replaces one of the methods of the first part."""

    step_faults: tuple[StepFault, ...] = (live_lease_ended, overlap)
    end_faults: tuple[EndFault, ...] = (not_recovered,)
    furthest_passed = MOST  # more that has passed makes no difference

    def __init__(self, workers: int = 1, sweepers: int = 2, *, hold: int = HOLD, steps: float = 0) -> None:
        self.workers = workers
        self.sweepers = sweepers
        self.hold = hold
        self.steps = steps

    # -- the rules

    def fresh_score(self) -> int:
        """A lease is lost at this tick: whoever adds next adds what may have passed before this moment."""
        return LEASE + MOST

    def added(self, sweeper: Sweeper, passed: int) -> int:
        """What a survey adds to the tick."""
        return min(passed, MOST) if sweeper.known else 0

    def asks(self, sweeper: Sweeper) -> Sweeper:
        """What has passed until before the call, from the reply to the last one."""
        return sweeper._replace(asking=sweeper.passed or 0)

    def answered(self, sweeper: Sweeper) -> Sweeper:
        """It knows the tick, and time counts from now."""
        return sweeper._replace(known=True, passed=0, asking=None)

    def lost(self, state: State, sweeper: Sweeper) -> bool:
        """Whether a survey finds the lease to be lost."""
        return state.score <= 0

    def may_end(self, state: State, judged: Judged) -> bool:
        """A lease is ended only if its score is still the one that was judged."""
        return judged.same

    def sure(self, worker: Worker) -> int:
        """For how long a worker is sure of its lease: it counts from before it asked."""
        assert worker.asked is not None
        return max(worker.sure, LEASE - worker.asked)

    def stale(self, state: State) -> bool:
        """Whether a hold is further ahead than it can be."""
        return state.till > 2 * self.hold

    def time_passes(self, state: State) -> State:
        workers = tuple(each and self._older_worker(each) for each in state.workers)
        sweepers = tuple(
            each if each.passed is None else each._replace(passed=min(self.furthest_passed, each.passed + 1))
            for each in state.sweepers
        )
        return state._replace(workers=workers, sweepers=sweepers, till=within(state.till - 1))

    def clock_steps(self, state: State, by: int) -> State:
        return state._replace(till=within(state.till - by), steps=state.steps - 1)

    # -- what happens

    def start(self) -> State:
        return State(0, 0, (None,) * self.workers, (Sweeper(),) * self.sweepers, -FURTHEST, self.steps)

    def moves(self, state: State) -> Iterator[Move]:
        """The first calm one is what happens when nothing else goes wrong."""
        orphan = bool(state.lease) and not any(
            each and each.lease == state.lease and not each.cut_off for each in state.workers
        )
        for number in range(self.workers):
            yield from self._worker(state, number)
        for number in sorted(range(self.sweepers), key=lambda number: state.sweepers[number].asking is None):
            yield from self._sweeper(state, number, orphan)  # what is under way arrives first
        yield Move(TIME_PASSES, self.time_passes(state), calm=orphan)
        if state.steps:
            for by in (STEP, -STEP):
                yield Move(f"the clock steps {'forward' if by > 0 else 'back'}", self.clock_steps(state, by))

    def _worker(self, state: State, number: int) -> Iterator[Move]:
        worker, who = state.workers[number], f"W{number + 1}"

        def becomes(worker: Worker | None, state: State = state) -> State:
            return state._replace(workers=replaced(state.workers, number, worker))

        if worker is None:
            if not state.lease and None not in state.workers[:number]:
                lease = 1 + max([0, *(each.lease for each in state.workers if each)])
                yield Move(f"{who} claims it", becomes(Worker(lease, asked=0), self._renewed(state, lease)))
            return
        yield Move(f"{who} dies", becomes(None))
        if worker.cut_off:
            yield Move(f"{who} is back", becomes(worker._replace(cut_off=False)))
            return
        yield Move(f"{who} is cut off", becomes(worker._replace(cut_off=True)))
        if worker.lease != state.lease:
            yield Move(f"{who} finds its lease lost", becomes(None))
            return
        yield Move(f"{who} finishes", becomes(None, state._replace(lease=0, score=0)), calm=True)
        if worker.asked is not None:
            sure = worker._replace(sure=self.sure(worker), asked=None)
            yield Move(f"{who} has its lease", becomes(sure))
        else:
            renewed = self._renewed(state, worker.lease)
            yield Move(f"{who} renews", becomes(worker._replace(asked=0), renewed))

    def _renewed(self, state: State, lease: int) -> State:
        sweepers = tuple(
            each._replace(judged=each.judged and each.judged._replace(same=False)) for each in state.sweepers
        )
        return state._replace(lease=lease, score=self.fresh_score(), sweepers=sweepers)

    @staticmethod
    def _older_worker(worker: Worker) -> Worker:
        asked = None if worker.asked is None else min(LEASE, worker.asked + 1)
        return worker._replace(sure=max(0, worker.sure - 1), asked=asked)

    def _sweeper(self, state: State, number: int, orphan: bool) -> Iterator[Move]:
        sweeper, who = state.sweepers[number], f"S{number + 1}"

        def becomes(sweeper: Sweeper, state: State = state) -> State:
            return state._replace(sweepers=replaced(state.sweepers, number, sweeper))

        if sweeper != Sweeper():
            yield Move(f"{who} dies, and another one starts", becomes(Sweeper()))
        if sweeper.given_up is not None:
            late = self._surveyed(state, number, sweeper.given_up)
            forgets = late.sweepers[number]._replace(given_up=None)
            yield Move(f"{who}'s survey that was given up arrives", becomes(forgets, late))
        if sweeper.judged:
            ended = becomes(sweeper._replace(judged=None))
            if sweeper.judged.lease == state.lease and self.may_end(state, sweeper.judged):
                yield Move(f"{who} ends the lease", ended._replace(lease=0, score=0), calm=orphan)
            else:
                yield Move(f"{who} would end the lease: refused", ended, calm=orphan)
        elif sweeper.asking is None:
            # One that holds the others off sweeps in time, so that nobody takes over from it.
            others = any(each.holds for each in replaced(state.sweepers, number, Sweeper()))
            due = (sweeper.passed is None or sweeper.passed > 0) and not others
            calm = orphan and due and self._may_survey(state, sweeper)
            yield Move(f"{who} asks for a survey", becomes(self.asks(sweeper)), calm=calm)
        elif not self._may_survey(state, sweeper):
            yield Move(
                f"{who} does not sweep: another one does", becomes(sweeper._replace(asking=None)), orphan
            )
        else:
            done = self._surveyed(state, number, sweeper.asking)
            mine = self.answered(done.sweepers[number])
            if done.lease and self.lost(done, mine):
                mine = mine._replace(judged=Judged(done.lease))
            yield Move(f"{who} has its survey", becomes(mine, done), calm=orphan)
            unheard = done.sweepers[number]._replace(asking=None)
            yield Move(f"{who}'s survey is made, and the reply is lost", becomes(unheard, done))
            given_up = sweeper.asking if sweeper.known else None
            yield Move(
                f"{who} gives its survey up", becomes(sweeper._replace(asking=None, given_up=given_up))
            )

    def _may_survey(self, state: State, sweeper: Sweeper) -> bool:
        return sweeper.holds or state.till <= 0 or self.stale(state)

    def _surveyed(self, state: State, number: int, passed: int) -> State:
        """A survey, in the index."""
        added = self.added(state.sweepers[number], passed)
        sweepers = tuple(
            each._replace(
                holds=place == number and self.hold > 0,
                known=each.known and not added,
                given_up=None if added else each.given_up,  # the tick is not what it was when it asked
            )
            for place, each in enumerate(state.sweepers)
        )
        score = max(0, state.score - added) if added else state.score
        return state._replace(score=score, sweepers=sweepers, till=self.hold)

    # -- exploring it

    def canonical(self, state: State) -> Hashable:
        """Workers and sweepers come in any order, and all leases are alike that are not in force."""

        def named(lease: int) -> int:
            return int(lease == state.lease and lease > 0)

        workers = (each and each._replace(lease=named(each.lease)) for each in state.workers)
        sweepers = (
            each._replace(judged=each.judged and each.judged._replace(lease=named(each.judged.lease)))
            for each in state.sweepers
        )
        return state._replace(lease=named(state.lease), workers=alike(workers), sweepers=alike(sweepers))

    def count(self, before: State, move: Move) -> int:
        """Ticks."""
        return int(move.name == TIME_PASSES)
