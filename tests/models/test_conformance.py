"""The model of a life and the index's reference do the same, move by move."""

from __future__ import annotations

import random
from typing import Any

import pytest

from celery_goalstate.index.base import Claim, Limits, Record, Run, Verdict
from celery_goalstate.index.base import Status as Stored
from tests.contract.bench import Bench
from tests.contract.lanes import Clock, MemoryLane
from tests.models.explorer import Move
from tests.models.life import IDLE, RUNNING, SCHEDULED, Due, Life, Phase, State
from tests.models.test_life import MUTANTS

DELAYS = {Due.NOW: 0, Due.BACKOFF: 10_000, Due.FAR: 86_400_000}
VERDICTS = {
    "done": Verdict.DONE,
    "failed": Verdict.FAILED,
    "quarantined": Verdict.QUARANTINED,
    "gone": Verdict.GONE,
}


class Replay:
    """An index to which happens what happens in the model."""

    def __init__(self) -> None:
        limits = Limits()
        self.bench = Bench(MemoryLane(limits, Clock()), limits)
        self.runs: dict[int, Claim] = {}  # by the model's lease

    def make(self, before: State, move: Move) -> None:
        """The same move."""
        match move.name.split(maxsplit=1):
            case ["enqueued", how]:
                self.bench.enqueue(delay=self._delay(how))
            case ["deleted"]:
                self.bench.delete()
            case ["its", _]:
                assert before.record
                self._lost(self.runs[before.record.lease])
            case ["the", _]:
                self.bench.advance(max(0, (self.bench.record().deadline or 0) - self.bench.now))
            case [_, "claims it"]:
                self.runs[move.after.record.lease] = self.bench.evaluate()
            case [who, how]:
                worker = before.workers[int(who[1:]) - 1]
                assert worker
                self._work(self.runs[worker.lease], worker.phase is Phase.ACTS, how)

    def _work(self, run: Claim, acts: bool, how: str) -> None:
        match how.replace(":", "").split():
            case ["reports" | "repeats", *words]:
                (verdict,) = VERDICTS.keys() & {word.rstrip(",") for word in words}
                retried = Due.BACKOFF if verdict == "failed" else None
                again = Due.FAR if "far" in words else retried
                self.bench.finish(
                    run,
                    VERDICTS[verdict],
                    delay=None if again is None else DELAYS[again],
                    failures=0 if verdict == "done" else run.failures + 1,
                    began=acts,
                )
            case ["enqueues", *_]:
                self.bench.enqueue(delay=self._delay(how), inside=Run(run.id, run.lease))

    def _lost(self, run: Claim) -> None:
        self.bench.lose(run, DELAYS[Due.BACKOFF], failures=run.failures + 1)

    @staticmethod
    def _delay(how: str) -> int:
        return DELAYS[Due.FAR if how.endswith("far ahead") else Due.NOW]

    def check(self, state: State) -> None:
        """What is described is what the model says."""
        expected, found = state.record, self.bench.describe()
        if expected is None or (expected.deleted and expected.noted is None):
            assert found is None
            return
        assert found is not None
        if expected.deleted:
            assert self._due(found) is expected.noted
            return
        if expected.status is SCHEDULED:
            assert found.status in {Stored.PARKED, Stored.SENT}
            assert self._due(found) is expected.deadline
        elif expected.status is RUNNING:
            assert found.status is Stored.RUNNING
            noted = [each for each in (expected.noted, expected.own) if each is not None]
            assert self._due(found) == min(noted, default=None)
        else:
            assert found.status is (Stored.IDLE if expected.status is IDLE else Stored.FAILED)
        assert min(found.failures, 2) == expected.failures

    def _due(self, found: Record) -> Due | None:
        if found.deadline is None:
            return None
        waits = found.deadline - self.bench.now
        return next(due for due, delay in DELAYS.items() if waits <= delay)


WEIGHTS = {
    "deleted": 0.3,
    "enqueued": 0.5,
    "dies": 0.2,
    "stalls": 3.0,
    "begins": 4.0,
    "its worker": 4.0,
    "refused": 3.0,
    "repeats": 1.0,
    "reports": 0.3,
}


def likely(move: Move) -> float:
    """Otherwise hardly an evaluation would lose its lease: there are many ways to end."""
    return next((weight for part, weight in WEIGHTS.items() if part in move.name), 1.0)


def replay(model: Life, walks: int) -> int:
    """Make moves at random, in the model and on an index, and compare after each; how many were made."""
    dice, made = random.Random(7), 0
    for _ in range(walks):
        state, index = model.start(), Replay()
        names: list[str] = []
        for _ in range(60):
            moves = list(model.moves(state))
            (move,) = dice.choices(moves, [likely(each) for each in moves])
            names.append(move.name)
            made += 1
            try:
                index.make(state, move)
                index.check(move.after)
            except AssertionError as difference:
                difference.add_note("\n".join(["after these moves:", *names]))
                raise
            state = move.after
    return made


@pytest.mark.parametrize("walks", [100, pytest.param(3_000, marks=pytest.mark.long)])
@pytest.mark.timeout(1_200)
def test_the_index_does_as_the_model(walks: int, record_property: Any) -> None:
    made = replay(Life(workers=3), walks)
    record_property("summary", f"model of a life, replayed on the index: {walks} walks, {made} moves")


@pytest.mark.parametrize("mutant", [mutant for mutant, options, _ in MUTANTS if not options])
def test_the_index_does_otherwise_than_a_mutant(mutant: type[Life]) -> None:
    with pytest.raises(AssertionError):
        replay(mutant(workers=3), walks=100)
