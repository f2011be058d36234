"""Explores a model: every state within a bound, nearest first, or one long walk at random.

A model says where it starts, which moves there are, and which faults must never show. A fault is a predicate
named after what goes wrong. There are two kinds: faults of a step, judged by the states before and after it,
and faults of an end, judged by what comes of a state when nothing else goes wrong: from there on only the
first calm move is made, until there is none.

Breadth first, a fault is found on one of the shortest ways to it. States that behave alike are explored once:
`Model.canonical` names them alike.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

State = Any  # immutable and hashable; each model has a type of its own


class Move(NamedTuple):
    """Something that can happen, and the state after it. `calm`: also if nothing else goes wrong."""

    name: str
    after: State
    calm: bool = False


class End(NamedTuple):
    """What comes of a state when nothing else goes wrong; `counted` is None if that never ends."""

    state: State
    counted: int | None


StepFault = Callable[[State, State], bool]
EndFault = Callable[[End], bool]


class Model(Protocol):
    """What can be explored."""

    @property
    def step_faults(self) -> Sequence[StepFault]:
        """What must not be between the states before and after a move."""

    @property
    def end_faults(self) -> Sequence[EndFault]:
        """What must not be in the end."""

    def start(self) -> State:
        """Where it begins."""

    def moves(self, state: State) -> Iterable[Move]:
        """All that can happen next."""

    def canonical(self, state: State) -> Hashable:
        """The same for states that behave alike."""

    def count(self, before: State, move: Move) -> int:
        """What a calm move adds to `End.counted`."""


@dataclass(frozen=True)
class Counterexample:
    """A fault, and the moves that lead to it. `str()` is for people."""

    fault: StepFault | EndFault
    moves: tuple[str, ...]
    calm: tuple[str, ...]  # for a fault of an end: how it comes to it
    state: State

    @property
    def name(self) -> str:
        """As in AFTER-DELETE."""
        return fault_name(self.fault)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.fault.__doc__}"]
        lines += [f"  {number:2}. {move}" for number, move in enumerate(self.moves, 1)]
        lines += [f"      then {move}" for move in self.calm]
        return "\n".join([*lines, f"  which leads to {self.state}"])


@dataclass(frozen=True)
class Explored:
    """What was found. `exhausted`: there are no other states. `str()` is for people."""

    states: int
    moves: int
    exhausted: bool
    counterexample: Counterexample | None = None

    def __str__(self) -> str:
        size = f"{self.states:,} states, {self.moves:,} moves, {'all there are' if self.exhausted else 'cut'}"
        return f"{size}\n{self.counterexample}" if self.counterexample else size


def explore(model: Model, most: int) -> Explored:
    """Explore breadth first, until the first fault or until `most` states are known."""
    start, ends = model.start(), Ends(model)
    name_before = model.canonical(start)
    known: dict[Hashable, tuple[Hashable, str] | None] = {name_before: None}
    waiting = deque([(name_before, start)])
    moves = 0
    while waiting and len(known) < most:
        name_before, before = waiting.popleft()
        for move in model.moves(before):
            moves += 1
            fault: StepFault | EndFault | None = _fault_of_step(model, before, move.after)
            name = model.canonical(move.after)
            if name not in known:
                known[name] = name_before, move.name
                waiting.append((name, move.after))
                fault = fault or ends.fault(name, move.after)
            if fault:
                way = (*_way(known, name_before), move.name)
                return Explored(len(known), moves, False, ends.counterexample(fault, way, move.after))
    return Explored(len(known), moves, exhausted=not waiting)


def _way(known: Mapping[Hashable, tuple[Hashable, str] | None], name: Hashable) -> tuple[str, ...]:
    moves: list[str] = []
    while came := known[name]:
        name, move = came
        moves.append(move)
    return tuple(reversed(moves))


def walk(
    model: Model, *, seed: int, most: int, likely: Callable[[Move], float], length: int = 400
) -> Explored:
    """Make `most` moves at random, which `likely` weighs, beginning afresh after every `length`.

    For spaces without an end. A counterexample is the last walk.
    """
    dice, ends = random.Random(seed), Ends(model)
    known: set[Hashable] = set()
    way: list[str] = []
    state = model.start()
    for number in range(1, most + 1):
        if len(way) == length:
            way, state = [], model.start()
        before, moves = state, list(model.moves(state))
        (move,) = dice.choices(moves, [likely(move) for move in moves])
        way.append(move.name)
        state = move.after
        fault: StepFault | EndFault | None = _fault_of_step(model, before, state)
        if not fault and (name := model.canonical(state)) not in known:
            known.add(name)
            fault = ends.fault(name, state)
        if fault:
            return Explored(len(known), number, False, ends.counterexample(fault, tuple(way), state))
    return Explored(len(known), most, exhausted=False)


class Ends:
    """What comes of states when nothing else goes wrong, each found out once."""

    MOST_MOVES = 200  # more are taken for no end

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known: dict[Hashable, End] = {}

    def fault(self, name: Hashable, state: State) -> EndFault | None:
        """Which one shows in the end of the state that has this name."""
        if not self._model.end_faults:
            return None
        end = self._end(name, state)
        return next((fault for fault in self._model.end_faults if fault(end)), None)

    def _end(self, name: Hashable, state: State) -> End:
        model, known = self._model, self._known
        way: list[tuple[Hashable, int]] = []
        while name not in known:
            move = self._calm_move(state)
            if move is None or len(way) == self.MOST_MOVES:
                known[name] = End(state, None if move else 0)
                break
            way.append((name, model.count(state, move)))
            state = move.after
            name = model.canonical(state)
        end = known[name]
        for name, counted in reversed(way):
            end = End(end.state, None if end.counted is None else end.counted + counted)
            known[name] = end
        return end

    def counterexample(
        self, fault: StepFault | EndFault, way: tuple[str, ...], state: State
    ) -> Counterexample:
        """With the way to the end, if the fault shows only there."""
        calm: list[str] = []
        if fault in self._model.end_faults:
            while (move := self._calm_move(state)) and len(calm) < self.MOST_MOVES // 10:
                calm.append(move.name)
                state = move.after
        return Counterexample(fault, way, tuple(calm), state)

    def _calm_move(self, state: State) -> Move | None:
        return next((move for move in self._model.moves(state) if move.calm), None)


def _fault_of_step(model: Model, before: State, after: State) -> StepFault | None:
    return next((fault for fault in model.step_faults if fault(before, after)), None)


def fault_name(fault: StepFault | EndFault) -> str:
    """`after_delete` is AFTER-DELETE."""
    return fault.__name__.upper().replace("_", "-")


def replaced(slots: tuple[Any, ...], number: int, value: Any) -> tuple[Any, ...]:
    """The slots with another value in one of them."""
    return (*slots[:number], value, *slots[number + 1 :])
