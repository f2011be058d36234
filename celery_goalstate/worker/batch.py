"""Several entities in one task: claimed together, evaluated one after the other, reported together.

Each keeps its own lease, failure, back-off and outcome. One that is slow holds no other back: after `SLICE`
seconds what has ended is reported, and what still waits for its turn is given back, by an alarm, whatever the
thread that evaluates is doing. So an entity that starts was claimed no longer ago than that.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence

from celery_goalstate.index.base import Claim, Report, Verdict

#: Seconds that the entities of a batch wait for their turn.
SLICE = 1.0

AGAIN, NOTHING_TO_DO = "again", "nothing to do"

#: The ways in which an entity ends, in the order in which `Tally` names them.
ENDINGS = (Verdict.DONE, Verdict.FAILED, Verdict.QUARANTINED, AGAIN, Verdict.UNSTARTED, NOTHING_TO_DO)


class Batch:
    """Claims on their way to reports. `give_back` says how an entity that did not start is reported."""

    def __init__(
        self,
        claims: Sequence[Claim],
        *,
        ends: float,
        clock: Callable[[], float],
        give_back: Callable[[Claim], Report],
    ) -> None:
        self._waiting = deque(claims)
        self._ended: list[Report] = []
        self._ends = ends
        self._clock = clock
        self._give_back = give_back
        self._lock = threading.Lock()

    def next(self) -> Claim | None:
        """The next entity to evaluate; None: there is none, or no time left."""
        with self._lock:
            return self._waiting.popleft() if self._waiting and self._clock() < self._ends else None

    def end(self, report: Report) -> None:
        """An entity was evaluated."""
        with self._lock:
            self._ended.append(report)

    def settle(self) -> list[Report]:
        """What is to be reported: all that has ended, and all that waits, of which none starts any more."""
        with self._lock:
            reports = [*self._ended, *map(self._give_back, self._waiting)]
            self._ended.clear()
            self._waiting.clear()
        return reports


class Tally(Counter[str]):
    """How many entities ended in which way; `str()` is for people."""

    def __str__(self) -> str:
        parts = ", ".join(f"{self[ending]} {ending}" for ending in ENDINGS if self[ending])
        return f"{self.total()} entities: {parts}"


def ending(report: Report) -> str:
    """The way in which this entity ended."""
    again = report.verdict is Verdict.DONE and report.delay is not None
    return AGAIN if again else report.verdict.value
