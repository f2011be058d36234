"""Who publishes after a refusal or a time-out: a sweeper that rests, simulated second by second.

Modelled: one sweeper, kinds of which each has something to publish every second, a broker that takes a
message, refuses it, or says nothing until the time-out; what is not publishing (lost leases, resyncs) comes
first in each sweep. All is decided by the rule, nothing by chance.

Not modelled: shards, batches, several sweepers, producers that publish by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

INTERVAL = 1.0  # between sweeps, in seconds as all times here
SHORTEST_REST, LONGEST_REST = 1.0, 30.0
IN_A_ROW = 3  # time-outs after which all publishing rests

TAKES, REFUSES = 0.002, 0.005  # how long the broker needs for it


class Result(Enum):
    """Of one publishing."""

    TAKEN = "taken"
    REFUSED = "refused"
    TIMED_OUT = "timed out"


@dataclass
class Rest:
    """Nothing is tried until it has passed; each one is twice as long as the last."""

    length: float = 0.0
    till: float = -math.inf

    def begin(self, now: float) -> None:
        self.length = min(LONGEST_REST, self.length * 2 or SHORTEST_REST)
        self.till = now + self.length

    def end(self) -> None:
        self.length, self.till = 0.0, -math.inf


class Rests:
    """The rule as it should be; a variant replaces one of its methods."""

    def __init__(self, kinds: Sequence[int]) -> None:
        self.kinds = {kind: Rest() for kind in kinds}
        self.tried = dict.fromkeys(kinds, -math.inf)
        self.all = Rest()
        self.in_a_row = 0
        self.over = False  # the publishing of this sweep

    def order(self) -> Iterable[int]:
        """The kind whose turn is longest ago comes first."""
        return sorted(self.tried, key=lambda kind: self.tried[kind])

    def begin(self) -> None:
        """A sweep begins."""
        self.over = False

    def may_try(self, kind: int, now: float) -> bool:
        return not self.over and now >= max(self.all.till, self.kinds[kind].till)

    def tell(self, kind: int, result: Result, now: float) -> None:
        """What came of it."""
        if result is Result.TAKEN:
            self.taken(kind)
        elif result is Result.REFUSED:
            self.refused(kind, now)
        else:
            self.timed_out(kind, now)

    def taken(self, kind: int) -> None:
        self.kinds[kind].end()
        self.all.end()
        self.in_a_row = 0

    def refused(self, kind: int, now: float) -> None:
        """It tells of the kind."""
        self.kinds[kind].begin(now)

    def timed_out(self, kind: int, now: float) -> None:
        """It tells of the broker, or of the kind: both are spared."""
        self.kinds[kind].begin(now)
        self.over = True
        self.in_a_row += 1
        if self.in_a_row >= IN_A_ROW:
            self.all.begin(now)


@dataclass(frozen=True)
class Trouble:
    """What is wrong: kinds that are refused, kinds that time out, a broker that is frozen for a while."""

    refused: int = 0
    silent: int = 0
    frozen: tuple[float, float] = (math.inf, math.inf)
    kinds: int = 30
    timeout: float = 1.0

    def publish(self, kind: int, now: float) -> tuple[Result, float]:
        """What comes of it, and how long that takes."""
        if kind < self.silent:
            return Result.TIMED_OUT, self.timeout
        if self.frozen[0] <= now < self.frozen[1]:
            thaws = self.frozen[1] - now
            return (Result.TIMED_OUT, self.timeout) if thaws > self.timeout else (Result.TAKEN, thaws)
        if kind < self.silent + self.refused:
            return Result.REFUSED, REFUSES
        return Result.TAKEN, TAKES

    @property
    def healthy(self) -> range:
        return range(self.silent + self.refused, self.kinds)


@dataclass
class Seen:
    """How it went, in seconds but for `blocked`; `waited`: of healthy kinds, while no broker is frozen."""

    waited: float = 0.0  # the longest time between two messages of a kind
    longest_sweep: float = 0.0
    longest_gap: float = 0.0  # between two times at which lost leases were ended
    blocked: float = 0.0  # the share of the time that went into sweeps
    last: dict[int, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"healthy kinds waited for at most {self.waited:.1f} s, "
            f"longest sweep {self.longest_sweep:.1f} s, "
            f"lost leases ended every {self.longest_gap:.1f} s, blocked {self.blocked:.0%}"
        )


def simulate(rule: type[Rests], trouble: Trouble, *, seconds: float = 600.0) -> Seen:
    """Sweep for so long."""
    rests, seen = rule(range(trouble.kinds)), Seen(last=dict.fromkeys(range(trouble.kinds), 0.0))
    now = ended_leases = 0.0
    while now < seconds:
        began = now
        seen.longest_gap = max(seen.longest_gap, now - ended_leases)
        ended_leases = now
        rests.begin()
        for kind in rests.order():
            if not rests.may_try(kind, now):
                continue
            rests.tried[kind] = now
            result, lasts = trouble.publish(kind, now)
            now += lasts
            rests.tell(kind, result, now)
            if result is Result.TAKEN:
                _served(seen, trouble, kind, now)
        seen.longest_sweep = max(seen.longest_sweep, now - began)
        seen.blocked += (now - began) / seconds
        now = max(now, began + INTERVAL)
    for kind in trouble.healthy:
        _served(seen, trouble, kind, now)
    return seen


def _served(seen: Seen, trouble: Trouble, kind: int, now: float) -> None:
    if kind in trouble.healthy:
        begins, thaws = trouble.frozen
        since = max(seen.last[kind], thaws) if seen.last[kind] < thaws <= now else seen.last[kind]
        if not begins <= now < thaws:
            seen.waited = max(seen.waited, now - since)
    seen.last[kind] = now
