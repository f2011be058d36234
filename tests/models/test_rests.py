"""A sweeper that rests: what one kind suffers delays no other for long; and each of the rules is needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest

from tests.models.rests import IN_A_ROW, LONGEST_REST, Rests, Seen, Trouble, simulate


class Bounds(NamedTuple):
    """What is acceptable; a fault is named after the one that is exceeded."""

    waited: float  # seconds between two messages of a healthy kind
    sweep: float = 1.2  # seconds
    blocked: float = 0.2  # the share of the worker's time

    def exceeded(self, seen: Seen) -> set[str]:
        measured = Bounds(seen.waited, max(seen.longest_sweep, seen.longest_gap), seen.blocked)
        return {name for name, most in self._asdict().items() if getattr(measured, name) > most}


REFUSED = Trouble(refused=1), Bounds(waited=1.2)
TEN_REFUSED = Trouble(refused=10), Bounds(waited=1.2)
SILENT = Trouble(silent=1), Bounds(waited=2.2)
TWO_SILENT = Trouble(silent=2), Bounds(waited=3.2)
#: Nothing tells ten kinds that time out from a broker that does: all rest 1 + 2 + 4 + 8 + 16 + 30 + 30 s.
TEN_SILENT = Trouble(silent=10), Bounds(waited=135.0)
FROZEN = Trouble(frozen=(100.0, 220.0)), Bounds(waited=LONGEST_REST + 2, blocked=0.1)

TROUBLES = {
    "one refused": REFUSED,
    "ten refused": TEN_REFUSED,
    "one silent": SILENT,
    "two silent": TWO_SILENT,
    "ten silent": TEN_SILENT,
    "frozen": FROZEN,
}


@pytest.mark.parametrize("name", TROUBLES)
def test_healthy_kinds_and_lost_leases_do_not_wait(name: str, record_property: Any) -> None:
    trouble, bounds = TROUBLES[name]
    seen = simulate(Rests, trouble)
    record_property("summary", f"model of rests, {name}: {seen}")
    assert not bounds.exceeded(seen), seen


# -- one of the rules broken


class FixedOrder(Rests):
    """The kinds always come in the same order."""

    def order(self) -> Iterable[int]:
        return self.kinds


class OneRest(FixedOrder):
    """A refusal rests all kinds, as a time-out does."""

    def refused(self, kind: int, now: float) -> None:
        self.over = True
        self.all.begin(now)


class KindDoesNotRest(Rests):
    """A time-out does not rest its kind."""

    def timed_out(self, kind: int, now: float) -> None:
        super().timed_out(kind, now)
        self.kinds[kind].end()


class SweepGoesOn(Rests):
    """A time-out rests its kind alone, as a refusal does."""

    def timed_out(self, kind: int, now: float) -> None:
        self.refused(kind, now)


class AllRestAtOnce(Rests):
    """The first time-out rests all."""

    def timed_out(self, kind: int, now: float) -> None:
        self.in_a_row = IN_A_ROW
        super().timed_out(kind, now)


class AllNeverRest(Rests):
    """Any number of time-outs in a row rests only their kinds."""

    def timed_out(self, kind: int, now: float) -> None:
        self.in_a_row = 0
        super().timed_out(kind, now)


class SuccessTellsOfItsKind(Rests):
    """A success does not end the rest of all, and forgets no time-outs."""

    def taken(self, kind: int) -> None:
        self.kinds[kind].end()


MUTANTS = [
    (OneRest, REFUSED, "waited"),
    (FixedOrder, TEN_SILENT, "waited"),
    (KindDoesNotRest, SILENT, "blocked"),
    (SweepGoesOn, FROZEN, "sweep"),
    (AllRestAtOnce, SILENT, "waited"),
    (AllNeverRest, FROZEN, "blocked"),
    (SuccessTellsOfItsKind, TWO_SILENT, "waited"),
]


@pytest.mark.parametrize(
    ("mutant", "case", "fault"), MUTANTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_mutant_is_caught(mutant: type[Rests], case: tuple[Trouble, Bounds], fault: str) -> None:
    trouble, bounds = case
    seen = simulate(mutant, trouble)
    assert fault in bounds.exceeded(seen), seen


def test_a_time_out_of_five_seconds_is_too_long() -> None:
    assert "sweep" in SILENT[1].exceeded(simulate(Rests, Trouble(silent=1, timeout=5.0)))
