"""Leases: no live one is ended whatever a clock does, a dead one is soon; and each of the rules is needed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest

from tests.models.explorer import Move, explore, walk
from tests.models.leases import (
    LEASE,
    MOST,
    TIME_PASSES,
    Judged,
    Leases,
    State,
    Sweeper,
    Worker,
    within,
)

# -- the rules as they are

WEIGHTS = {TIME_PASSES: 4.0, "dies": 0.3, "cut off": 0.3, "given up": 0.5, "lost": 0.5, "clock": 0.5}


def likely(move: Move) -> float:
    """Time passes often, accidents are rare: or every lease would be one that nobody holds."""
    return next((weight for part, weight in WEIGHTS.items() if part in move.name), 1.0)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"hold": 0}, 5_000),
        ({"steps": 2}, 5_000),
        pytest.param({"steps": 2}, 300_000, marks=pytest.mark.long),
        pytest.param({"workers": 2, "steps": 2}, 300_000, marks=pytest.mark.long),
        pytest.param({"sweepers": 3, "hold": 0}, 300_000, marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.timeout(3_600)
def test_no_fault_shows(options: dict[str, Any], most: int, record_property: Any) -> None:
    explored = explore(Leases(**options), most)
    record_property("summary", f"model of leases {options}: {explored}")
    assert not explored.counterexample, explored


@pytest.mark.parametrize("most", [5_000, pytest.param(200_000, marks=pytest.mark.long)])
@pytest.mark.timeout(3_600)
def test_no_fault_shows_in_long_walks(most: int, record_property: Any) -> None:
    explored = walk(Leases(workers=2, steps=math.inf), seed=7, most=most, likely=likely)
    record_property("summary", f"model of leases, at random, any number of steps: {explored}")
    assert not explored.counterexample, explored


@pytest.mark.parametrize(
    "options",
    [
        {"sweepers": 1, "hold": 0},
        pytest.param({"workers": 2, "sweepers": 1, "hold": 0}, marks=pytest.mark.long),
        pytest.param({"hold": 0}, marks=pytest.mark.long),
        pytest.param({"steps": 1}, marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.timeout(3_600)
def test_no_fault_shows_in_any_state(options: dict[str, Any], record_property: Any) -> None:
    explored = explore(Leases(**options), most=500_000)
    record_property("summary", f"model of leases {options}: {explored}")
    assert not explored.counterexample, explored
    assert explored.exhausted, explored


# -- one of them broken


class NoAllowance(Leases):
    """A score allows for no addition that is under way."""

    def fresh_score(self) -> int:
        return LEASE


class NoCompareAndSet(Leases):
    """A sweeper adds to the tick also if another one has added meanwhile."""

    def added(self, sweeper: Sweeper, passed: int) -> int:
        return min(passed, MOST)


class NoBound(Leases):
    """A sweeper adds all that has passed."""

    furthest_passed = 2 * LEASE

    def added(self, sweeper: Sweeper, passed: int) -> int:
        return passed if sweeper.known else 0


class EndsWhatWasRenewed(Leases):
    """A lease that was judged is ended, whether or not it was renewed since."""

    def may_end(self, state: State, judged: Judged) -> bool:
        return True


class CountsFromTheCall(Leases):
    """What has passed is counted from the last call and not from the reply to it."""

    def asks(self, sweeper: Sweeper) -> Sweeper:
        return sweeper._replace(asking=sweeper.passed or 0, passed=0)

    def answered(self, sweeper: Sweeper) -> Sweeper:
        return sweeper._replace(known=True, asking=None)


class SureFromTheReply(Leases):
    """A worker is sure of its lease from the reply on."""

    def sure(self, worker: Worker) -> int:
        return LEASE


class HoldIsBelieved(Leases):
    """A hold that ends further ahead than it can is waited for."""

    def stale(self, state: State) -> bool:
        return False


class Timed(Leases):
    """Leases end by the index's clock."""

    end_faults = ()  # such a clock postpones everything

    def fresh_score(self) -> int:
        return LEASE

    def added(self, sweeper: Sweeper, passed: int) -> int:
        return 0

    def may_end(self, state: State, judged: Judged) -> bool:
        return self.lost(state, Sweeper())

    def time_passes(self, state: State) -> State:
        return self._runs(super().time_passes(state), 1)

    def clock_steps(self, state: State, by: int) -> State:
        return self._runs(super().clock_steps(state, by), by)

    @staticmethod
    def _runs(state: State, by: int) -> State:
        return state._replace(score=within(state.score - by)) if state.lease else state


class Watch(NamedTuple):
    """What a sweeper remembers of the index's clock."""

    evenly: int  # for how long it has seen it run so
    stepped: int = 0  # by how much since its last survey


class Watched(Timed):
    """They do once a sweeper has seen the clock run evenly for a lease; far ahead is as good as past."""

    least = LEASE
    first = 0  # what one that starts has seen

    def answered(self, sweeper: Sweeper) -> Sweeper:
        watch = sweeper.memory
        if not isinstance(watch, Watch):
            watch = Watch(self.first)
        elif watch.stepped:
            watch = Watch(0)
        return super().answered(sweeper)._replace(memory=watch)

    def lost(self, state: State, sweeper: Sweeper) -> bool:
        evenly = sweeper.memory.evenly if isinstance(sweeper.memory, Watch) else 0
        return evenly >= self.least and self._past(state)

    def may_end(self, state: State, judged: Judged) -> bool:
        return self._past(state)

    def time_passes(self, state: State) -> State:
        return self._remember(super().time_passes(state), evenly=1)

    def clock_steps(self, state: State, by: int) -> State:
        return self._remember(super().clock_steps(state, by), stepped=by)

    @staticmethod
    def _past(state: State) -> bool:
        return state.score <= 0 or state.score > LEASE

    @staticmethod
    def _remember(state: State, evenly: int = 0, stepped: int = 0) -> State:
        sweepers = tuple(
            each._replace(
                memory=Watch(min(LEASE, each.memory.evenly + evenly), each.memory.stepped + stepped)
            )
            if isinstance(each.memory, Watch)
            else each
            for each in state.sweepers
        )
        return state._replace(sweepers=sweepers)


class WatchedAndCompared(Watched):
    """The same, and the lease must be the one that was judged."""

    def may_end(self, state: State, judged: Judged) -> bool:
        return judged.same


class WatchInherited(WatchedAndCompared):
    """A sweeper that starts goes on where the last one stopped."""

    first = LEASE


class WatchedTooShort(WatchedAndCompared):
    """A little less than a lease must do."""

    least = LEASE - 1


ONE = {"sweepers": 1, "hold": 0}

MUTANTS: list[tuple[type[Leases], dict[str, Any], str]] = [
    (NoAllowance, ONE, "LIVE-LEASE-ENDED"),
    (NoBound, ONE, "LIVE-LEASE-ENDED"),
    (EndsWhatWasRenewed, ONE, "LIVE-LEASE-ENDED"),
    (CountsFromTheCall, ONE, "LIVE-LEASE-ENDED"),
    (SureFromTheReply, ONE, "LIVE-LEASE-ENDED"),
    (NoCompareAndSet, {"hold": 0}, "LIVE-LEASE-ENDED"),
    (HoldIsBelieved, {"steps": 1}, "NOT-RECOVERED"),
    (Timed, ONE | {"steps": 1}, "LIVE-LEASE-ENDED"),
    (Watched, ONE | {"steps": 1}, "LIVE-LEASE-ENDED"),
    (WatchedAndCompared, ONE | {"steps": 2}, "LIVE-LEASE-ENDED"),
    (WatchInherited, ONE | {"steps": 1}, "LIVE-LEASE-ENDED"),
    (WatchedTooShort, ONE | {"steps": 1}, "LIVE-LEASE-ENDED"),
]


@pytest.mark.parametrize(
    ("mutant", "options", "fault"), MUTANTS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_mutant_is_caught(
    mutant: type[Leases], options: dict[str, Any], fault: str, record_property: Any
) -> None:
    explored = explore(mutant(**options), most=50_000)
    record_property("summary", f"mutant: {mutant.__doc__}\n{explored}")
    assert explored.counterexample, explored
    assert explored.counterexample.name == fault, explored


def test_a_mutant_is_caught_at_random() -> None:
    model = EndsWhatWasRenewed(workers=2, steps=math.inf)
    walked = walk(model, seed=7, most=20_000, likely=likely)
    assert walked.counterexample, walked
    assert walked.counterexample.name == "LIVE-LEASE-ENDED", walked
