"""Rules as a whole: `check_rules` and `check_converges`."""

from __future__ import annotations

import enum
from typing import Any

import pytest

from celery_goalstate import ANY, Entity, Rules
from celery_goalstate.testing import check_converges, check_rules
from tests.testkit.shop import Shop


class State(enum.Enum):
    UP = 1
    DRAINED = 2
    DOWN = 3


GOALS = [State.UP, State.DOWN]


def noop(ctx: Any, entity: Entity) -> None:
    """Does nothing."""


def test_a_table_without_holes() -> None:
    check_rules(
        Rules({State.UP: {ANY: [noop], State.UP: []}, State.DOWN: {State.DOWN: []}, ANY: {ANY: [noop]}}),
        State,
        GOALS,
    )


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({State.UP: {ANY: []}}, "no rule for state UP, goal DOWN"),
        ({ANY: {ANY: []}, "UP": {State.UP: []}}, "no goal is UP: its cell of state UP is never used"),
        ({ANY: {ANY: []}, State.UP: {"DOWN": []}}, "no state is DOWN: its cell of goal UP is never used"),
        (
            {ANY: {ANY: []}, State.UP: {State.UP: [], State.DRAINED: [], State.DOWN: [], ANY: []}},
            "goal UP, state ANY is never used: others come first",
        ),
        ({goal: {ANY: []} for goal in [*GOALS, ANY]}, "goal ANY, state ANY is never used"),
    ],
)
def test_holes_are_named(table: Any, problem: str) -> None:
    with pytest.raises(AssertionError) as raised:
        check_rules(Rules(table), State, GOALS)
    assert problem in str(raised.value)


def test_every_cell_leads_to_its_goal(shop: Shop) -> None:
    cls, world = machine(shop, broken=False)
    assert cls.kind == "machine"
    check_converges(world, State, GOALS, engine=shop.engine)


def test_the_cells_that_lead_nowhere_are_named(shop: Shop) -> None:
    _, world = machine(shop, broken=True)
    with pytest.raises(AssertionError) as raised:
        check_converges(world, State, GOALS, engine=shop.engine)
    report = str(raised.value)
    assert "from DRAINED to DOWN: it is not at rest after 1 day; it goes round and round" in report
    assert "from UP to DOWN: " in report
    assert "to UP" not in report.split("The first:", maxsplit=1)[0]
    assert len(report.splitlines()) < 40


def test_a_world_that_is_another_is_refused(shop: Shop) -> None:
    _, world = machine(shop, broken=False)
    with pytest.raises(AssertionError, match="the world of state UP, goal UP has an entity of state DOWN"):
        check_converges(lambda state, goal: world(State.DOWN, goal), State, GOALS, engine=shop.engine)


def machine(shop: Shop, *, broken: bool) -> Any:
    now: dict[str, State] = {}

    def to(name: str, state: State) -> Any:
        def action(ctx: Any, entity: Entity) -> None:
            now["state"] = state

        action.__name__ = name
        return action

    drain, off, on = to("drain", State.DRAINED), to("off", State.DOWN), to("on", State.UP)

    class Machine(Entity):
        rules = Rules(
            {
                State.UP: {State.UP: [], ANY: [on]},
                State.DOWN: {
                    State.UP: [drain],
                    State.DRAINED: [on] if broken else [off],
                    State.DOWN: [],
                },
            }
        )

        def get_state(self) -> State:
            return now["state"]

        def get_goal_state(self) -> State:
            return now["goal"]

    shop.engine.register(Machine)

    def world(state: State, goal: State) -> Entity:
        now.update(state=state, goal=goal)
        return Machine(1)

    return Machine, world
