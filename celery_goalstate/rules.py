"""`Rules`: which actions lead from a state toward a goal state, as a table."""

from __future__ import annotations

import enum
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from celery_goalstate.actions import ActionList, ActionsLike, as_action_list

logger = logging.getLogger(__name__)


class _Any(enum.Enum):
    ANY = "ANY"

    def __repr__(self) -> str:
        return self.value

    __str__ = __repr__


#: In a `Rules` table: every state, or every goal state, that the table does not name.
ANY: Final = _Any.ANY


class Rules:
    """A table `goal state -> state -> actions`.

        Rules({
            Goal.DOWN: {State.UP: [drain], State.DRAINED: [power_off], State.DOWN: []},
            Goal.UP: {ANY: [power_on]},
        })

    A cell holds actions as `Entity.get_action_list` may return them. The exact cell comes first, then `ANY`
    state of that goal state, then that state of `ANY` goal state, then `ANY` of both. An empty list is a
    deliberate nothing; a missing cell is a nothing that is logged.

    Raises `TypeError` for a table of another shape or a cell that holds no actions.
    """

    def __init__(self, table: Mapping[Any, Mapping[Any, ActionsLike]]) -> None:
        self._table = {goal: _checked_row(goal, row) for goal, row in _checked_mapping("Rules", table)}

    def actions(self, state: Any, goal_state: Any) -> ActionList:
        """What leads from the state toward the goal state."""
        found = self._find(state, goal_state)
        if found is None:
            logger.warning("no rule for state %s and goal state %s: nothing is done", state, goal_state)
            return ActionList(())
        return found

    def missing(self, states: Iterable[Any], goals: Iterable[Any]) -> list[tuple[Any, Any]]:
        """Every (state, goal state) that no rule covers; `states` and `goals` may be Enum classes."""
        return [
            (state, goal) for state, goal in itertools.product(states, goals) if not self._covers(state, goal)
        ]

    def to_mermaid(self) -> str:
        """The table as a Mermaid flowchart: per goal state, which state leads to which actions."""
        return "\n".join(["flowchart LR", *self._mermaid_lines()])

    def _find(self, state: Any, goal_state: Any) -> ActionList | None:
        for goal in (goal_state, ANY):
            row = self._table.get(goal, {})
            for key in (state, ANY):
                if key in row:
                    return row[key]
        return None

    def _covers(self, state: Any, goal_state: Any) -> bool:
        return self._find(state, goal_state) is not None

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
    return _escape(value.name if isinstance(value, enum.Enum) else str(value))


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
