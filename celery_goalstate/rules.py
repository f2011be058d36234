"""`Rules`: which actions lead from a state toward a goal state, as a table."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from celery_goalstate.actions import ActionList, ActionsLike, Method, as_action_list
from celery_goalstate.display import state_text
from celery_goalstate.entity import Entity
from celery_goalstate.exceptions import ImproperlyConfigured

V = TypeVar("V")


class _Any(enum.Enum):
    ANY = "ANY"

    def __repr__(self) -> str:
        return self.value

    __str__ = __repr__


#: In a `Rules` table: every state, or every goal state, that the table does not name.
ANY: Final = _Any.ANY

#: What a table has for a cell that is missing: an evaluation that gets it logs a warning.
NO_RULE: Final = ActionList(())


class Inherited(enum.StrEnum):
    """Where the table has what holds for a state and a goal state that it does not name together."""

    NO = ""  #: it does name them, or nothing holds
    FROM_ANY_STATE = "ANY state"  #: of that goal state
    FROM_ANY_GOAL = "ANY goal"  #: for that state
    FROM_ANY = "ANY state, ANY goal"


@dataclass(frozen=True, slots=True)
class Cell:
    """What holds for one state and one goal state, in words for people and programs."""

    state: str
    goal: str
    actions: tuple[str, ...] | None  #: names, in order; empty: a deliberate nothing; None: no rule covers it
    inherited: Inherited
    present: bool  #: is an entity there now?


@dataclass(frozen=True, slots=True)
class Matrix:
    """A whole `Rules` table: `celery_goalstate.display` has it as text and as HTML."""

    states: tuple[str, ...]  #: one a row
    goals: tuple[str, ...]  #: one a column
    rows: tuple[tuple[Cell, ...], ...]


class Rules:
    """A table `goal state -> state -> actions`.

        Rules({
            Goal.DOWN: {State.UP: [drain], State.DRAINED: [power_off], State.DOWN: []},
            Goal.UP: {ANY: [power_on]},
        })

    A cell holds actions as `Entity.get_action_list` may return them. The exact cell comes first, then `ANY`
    state of that goal state, then that state of `ANY` goal state, then `ANY` of both. An empty list is a
    deliberate nothing; a missing cell is a nothing that is logged. A state that has no hash, as a dataclass
    that is not frozen, is compared with each one in the table.

    Raises `TypeError` for a table of another shape or a cell that holds no actions.
    """

    def __init__(self, table: Mapping[Any, Mapping[Any, ActionsLike]]) -> None:
        self._table = {goal: _checked_row(goal, row) for goal, row in _checked_mapping("Rules", table)}

    def actions(self, state: Any, goal_state: Any) -> ActionList:
        """What leads from the state toward the goal state; `NO_RULE` if the table does not say."""
        return self._find(state, goal_state)[0]

    def _find(self, state: Any, goal_state: Any) -> tuple[ActionList, Inherited]:
        for goal in (goal_state, ANY):
            row = _get(self._table, goal)
            if row is not None:
                for key in (state, ANY):
                    action_list = _get(row, key)
                    if action_list is not None:
                        return action_list, _INHERITED[key is not state, goal is not goal_state]
        return NO_RULE, Inherited.NO

    def matrix(self, present: tuple[Any, Any] | None = None) -> Matrix:
        """The table as a matrix that leaves nothing out, so that gaps and what `ANY` covers can be seen.

        It has the states and the goal states that the table names, of an Enum of states all members, and
        `ANY` where the table has it. `present` is the (state, goal state) in which an entity is: its cell is
        marked, and has a row and a column of its own if the table does not name it.
        """
        named = [state for row in self._table.values() for state in row]
        states, goals = _axis(_with_all_members(named)), _axis(self._table)
        row = column = None
        if present is not None:
            row, column = _place(states, present[0]), _place(goals, present[1])

        def cell(r: int, c: int) -> Cell:
            action_list, inherited = self._find(states[r], goals[c])
            actions = None if action_list is NO_RULE else tuple(each.name for each in action_list.actions)
            here = (r, c) == (row, column)
            return Cell(state_text(states[r]), state_text(goals[c]), actions, inherited, here)

        rows = tuple(tuple(cell(r, c) for c in range(len(goals))) for r in range(len(states)))
        return Matrix(tuple(map(state_text, states)), tuple(map(state_text, goals)), rows)

    def missing(self, states: Iterable[Any], goals: Iterable[Any]) -> list[tuple[Any, Any]]:
        """Every (state, goal state) that no rule covers; `states` and `goals` may be Enum classes."""
        return [
            (state, goal)
            for state, goal in itertools.product(states, goals)
            if self.actions(state, goal) is NO_RULE
        ]

    def named(self) -> tuple[list[Any], list[Any]]:
        """The states and the goal states that the table names, each once; `ANY` is none of them."""
        states = dict.fromkeys(state for row in self._table.values() for state in row)
        return [state for state in states if state is not ANY], [
            goal for goal in self._table if goal is not ANY
        ]

    def methods(self) -> Iterator[Method]:
        """The entity's methods that the table names."""
        for _, _, action_list in self.cells():
            for action in action_list.actions:
                if isinstance(action.execute, Method):
                    yield action.execute

    def cells(self) -> Iterator[tuple[Any, Any, ActionList]]:
        """Goal state, state (each may be `ANY`) and actions of each cell, in the table's order."""
        for goal, row in self._table.items():
            for state, action_list in row.items():
                yield goal, state, action_list

    def to_mermaid(self) -> str:
        """The table as a Mermaid flowchart: per goal state, which state leads to which actions."""
        return "\n".join(["flowchart LR", *self._mermaid_lines()])

    def _mermaid_lines(self) -> Iterator[str]:
        for g, (goal, row) in enumerate(self._table.items()):
            yield f'    subgraph goal{g}["goal {_label(goal)}"]'
            for s, (state, action_list) in enumerate(row.items()):
                names = " → ".join(action.name for action in action_list.actions) or "nothing to do"
                cell = f"{g}_{s}"
                yield f'        state{cell}(["{_label(state)}"]) --> actions{cell}["{_escape(names)}"]'
            yield "    end"

    def __repr__(self) -> str:
        return f"Rules({self._table!r})"


def check_entity_class(cls: type[Entity]) -> None:
    """Raise `ImproperlyConfigured` for a class that has no actions to choose from, or none that could run."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    if cls.rules is not None and not callable(getattr(cls.rules, "actions", None)):
        raise ImproperlyConfigured(
            f"`rules` of {path} is {cls.rules!r:.100}; give Rules({{goal state: {{state: [actions]}}}})"
        )
    if cls.rules is None and cls.get_action_list is Entity.get_action_list:
        raise ImproperlyConfigured(
            f"{path} defines neither `rules` nor get_action_list(): its entities could never be evaluated"
        )
    if isinstance(cls.rules, Rules):
        for method in cls.rules.methods():
            try:
                method.check_in(cls)
            except TypeError as error:
                raise ImproperlyConfigured(f"the rules of {path} name {method.name!r}: {error}") from error


_INHERITED = {
    (False, False): Inherited.NO,
    (True, False): Inherited.FROM_ANY_STATE,
    (False, True): Inherited.FROM_ANY_GOAL,
    (True, True): Inherited.FROM_ANY,
}


def _with_all_members(states: Iterable[Any]) -> Iterator[Any]:
    for state in states:
        if isinstance(state, enum.Enum) and state is not ANY:
            yield from type(state)
        yield state  # of a Flag perhaps one of several members


def _axis(keys: Iterable[Any]) -> list[Any]:
    """Each once, and what stands for all others last."""
    return sorted(dict.fromkeys(keys), key=lambda key: key is ANY)


def _place(axis: list[Any], value: Any) -> int:
    """Where the value is on the axis; before `ANY`, from now on, if it was not."""
    for place, key in enumerate(axis):
        if key is not ANY and key == value:
            return place
    place = len(axis) - (ANY in axis)
    axis.insert(place, value)
    return place


def _get(table: Mapping[Any, V], key: Any) -> V | None:
    try:
        hash(key)
    except TypeError:
        return next((value for each, value in table.items() if each is not ANY and each == key), None)
    return table.get(key)


def _checked_mapping(name: str, value: Any) -> Iterable[tuple[Any, Any]]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {value!r}; a table is {{goal state: {{state: [actions]}}}}")
    return value.items()


def _checked_row(goal: Any, row: Any) -> dict[Any, ActionList]:
    return {
        state: _checked_cell(goal, state, cell) for state, cell in _checked_mapping(f"Rules[{goal}]", row)
    }


def _checked_cell(goal: Any, state: Any, cell: ActionsLike) -> ActionList:
    if cell is None:
        raise TypeError(f"Rules[{goal}][{state}] is None; write [] for a deliberate nothing")
    try:
        return as_action_list(cell)
    except (TypeError, ValueError) as error:
        raise TypeError(f"Rules[{goal}][{state}]: {error}") from error


def _label(value: Any) -> str:
    return _escape(state_text(value))


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
