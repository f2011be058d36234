"""Checks of an entity's rules as a whole: the table itself, and where it leads from each cell."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any

from celery_goalstate.display import state_text
from celery_goalstate.engine import Engine
from celery_goalstate.entity import Entity
from celery_goalstate.rules import ANY, Rules
from celery_goalstate.testing.simulation import DAY, LINES_TOLD, Simulation
from celery_goalstate.testing.story import shortened
from celery_goalstate.testing.worlds import engine_of, fresh

#: Problems that a report shows.
SHOWN = 12


def check_rules(rules: Rules, states: Iterable[Any], goals: Iterable[Any]) -> None:
    """Every state has a rule for every goal state, and every cell of the table can be reached.

    `states` and `goals` may be Enum classes. Raises `AssertionError` with the cells that are missing, those
    of states and goals that are not among these (a typo), and each `ANY` that is never used.
    """
    __tracebackhide__ = True
    states, goals = list(states), list(goals)
    problems = [
        f"no rule for state {state_text(state)}, goal {state_text(goal)}"
        for state, goal in rules.missing(states, goals)
    ]
    cells = [(goal, state) for goal, state, _ in rules.cells()]
    for goal, state in cells:
        if goal is not ANY and goal not in goals:
            problems.append(
                f"no goal is {state_text(goal)}: its cell of state {state_text(state)} is never used"
            )
        elif state is not ANY and state not in states:
            problems.append(
                f"no state is {state_text(state)}: its cell of goal {state_text(goal)} is never used"
            )
        elif not any(_is_used(cells, (goal, state), cell) for cell in itertools.product(goals, states)):
            problems.append(
                f"goal {state_text(goal)}, state {state_text(state)} is never used: others come first"
            )
    if problems:
        raise AssertionError("\n".join(["the rules have holes:", *_first(problems)]))


def _is_used(cells: list[tuple[Any, Any]], which: tuple[Any, Any], asked: tuple[Any, Any]) -> bool:
    """Whether `Rules` takes this cell for a goal and a state."""
    goal, state = asked
    order = [(goal, state), (goal, ANY), (ANY, state), (ANY, ANY)]
    return next((cell for cell in order if cell in cells), None) == which


def check_converges(
    world: Callable[[Any, Any], Entity | AbstractContextManager[Entity]],
    states: Iterable[Any],
    goals: Iterable[Any],
    *,
    within: timedelta = DAY,
    looks: int = 100,
    engine: Engine | None = None,
) -> None:
    """From every state, every goal state is reached: the entity comes to rest there.

    `world(state, goal_state)` makes a fresh world and returns (or, as a context manager, yields) an entity
    that is there. `within` and `looks` are the bounds of each run. Raises `AssertionError` with the cells
    from which it does not, and the story of the first.
    """
    __tracebackhide__ = True
    problems: list[str] = []
    story: list[str] = []
    goals = list(goals)
    for state, goal in itertools.product(states, goals):
        with fresh(partial(world, state, goal)) as entity:
            simulation = Simulation(engine or engine_of(entity))
            with simulation.in_place():
                _check_world(entity, state, goal)
                simulation.engine.enqueue(entity)
                problem = simulation.come_to_rest(within, looks) or simulation.problem_of(entity)
        if problem:
            problems.append(f"from {state_text(state)} to {state_text(goal)}: {problem}")
            story = story or simulation.lines()
    if problems:
        lines = ["it does not converge", *_first(problems), "", "The first:", *shortened(story, LINES_TOLD)]
        raise AssertionError("\n".join(lines))


def _check_world(entity: Entity, state: Any, goal: Any) -> None:
    there = entity.get_state(), entity.get_goal_state()
    if there != (state, goal):
        raise AssertionError(
            f"the world of state {state_text(state)}, goal {state_text(goal)} has an entity of state"
            f" {state_text(there[0])}, goal {state_text(there[1])}"
        )


def _first(problems: list[str]) -> list[str]:
    shown = [f"    {problem}" for problem in problems[:SHOWN]]
    return shown if len(problems) <= SHOWN else [*shown, f"    ... and {len(problems) - SHOWN} more"]
