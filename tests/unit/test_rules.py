from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import Any

import pytest

from celery_goalstate.actions import Action, ActionList, Context
from celery_goalstate.entity import Entity
from celery_goalstate.exceptions import ImproperlyConfigured
from celery_goalstate.rules import ANY, NO_RULE, Inherited, Matrix, Rules, check_entity_class


class State(enum.Enum):
    UP = "up"
    DRAINED = "drained"
    DOWN = "down"


class Goal(enum.Enum):
    UP = "up"
    DOWN = "down"


def drain(ctx: Context, entity: Entity) -> None: ...


def power_off(ctx: Context, entity: Entity) -> None: ...


def power_on(ctx: Context, entity: Entity) -> None: ...


FLEET = Rules(
    {
        Goal.DOWN: {State.UP: [drain], State.DRAINED: [power_off], State.DOWN: []},
        Goal.UP: {State.UP: [], State.DOWN: power_on},
    }
)


def names(action_list: ActionList) -> list[str]:
    return [action.name for action in action_list.actions]


@pytest.mark.parametrize(
    ("state", "goal", "expected"),
    [
        ("s", "g", "exact"),
        ("other", "g", "any state"),
        ("s", "other", "any goal"),
        ("other", "other", "any of both"),
    ],
)
def test_the_more_exact_cell_comes_first(state: str, goal: str, expected: str) -> None:
    rules = Rules(
        {
            ANY: {ANY: Action("any of both", drain), "s": Action("any goal", drain)},
            "g": {ANY: Action("any state", drain), "s": Action("exact", drain)},
        }
    )
    assert names(rules.actions(state, goal)) == [expected]


def test_any_state_of_the_goal_comes_before_the_state_of_any_goal() -> None:
    rules = Rules({"g": {ANY: Action("goal's", drain)}, ANY: {"s": Action("state's", drain)}})
    assert names(rules.actions("s", "g")) == ["goal's"]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ([], []),
        (drain, ["drain"]),
        ("drain", ["drain"]),
        (Action("a", drain), ["a"]),
        ([drain, "b", Action("c", drain)], ["drain", "b", "c"]),
        (ActionList([drain], timeout=5), ["drain"]),
    ],
)
def test_what_a_cell_may_hold(cell: Any, expected: list[str]) -> None:
    assert names(Rules({"g": {"s": cell}}).actions("s", "g")) == expected


def test_the_timeout_of_a_cell_is_kept() -> None:
    assert Rules({"g": {"s": ActionList([drain], timeout=5)}}).actions("s", "g").timeout == 5


def test_an_empty_cell_is_a_deliberate_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert names(FLEET.actions(State.DOWN, Goal.DOWN)) == []
    assert not caplog.records


def test_a_missing_cell_is_a_nothing_that_can_be_told_from_a_deliberate_one() -> None:
    assert FLEET.actions(State.DRAINED, Goal.UP) is NO_RULE
    assert FLEET.actions(State.DOWN, Goal.DOWN) is not NO_RULE
    assert names(NO_RULE) == []


@dataclass
class Replicas:
    """Equal to another, and without a hash."""

    ready: int


@pytest.mark.parametrize("state", [Replicas(1), {"ready": 1}, [1], {1}, (1, [2])], ids=repr)
def test_states_without_a_hash(state: Any) -> None:
    assert names(Rules({ANY: {ANY: [drain]}}).actions(state, state)) == ["drain"]
    assert Rules({"up": {"s": [drain]}}).actions(state, state) is NO_RULE
    assert names(Rules({"up": {ANY: [drain]}}).actions(state, "up")) == ["drain"]
    assert names(Rules({ANY: {"up": [drain]}}).actions("up", state)) == ["drain"]


def test_a_state_without_a_hash_may_be_equal_to_one_in_the_table() -> None:
    rules = Rules({ANY: {frozenset({1}): [drain], ANY: [power_off]}})
    assert names(rules.actions({1}, "x")) == ["drain"]
    assert names(rules.actions({2}, "x")) == ["power_off"]


def test_a_state_that_is_equal_to_everything_is_not_taken_for_any() -> None:
    class Wildcard:
        __hash__ = None

        def __eq__(self, other: object) -> bool:
            return True

    assert names(Rules({ANY: {ANY: [drain], "up": [power_off]}}).actions(Wildcard(), "x")) == ["power_off"]


# Registering -------------------------------------------------------------------------------------


class Host(Entity):
    """A base class that is never registered needs no rules of its own."""

    shelf = "B7"
    undrain = functools.partialmethod(drain)

    def drain(self, ctx: Context) -> None: ...

    def needs_more(self, ctx: Context, more: int) -> None: ...

    async def later(self, ctx: Context) -> None: ...

    @classmethod
    def all_off(cls, ctx: Context) -> None: ...

    @staticmethod
    def off(ctx: Context) -> None: ...

    @property
    def chosen(self) -> Any:
        raise AssertionError("not read before there is an entity")


def test_a_class_with_neither_rules_nor_a_list() -> None:
    with pytest.raises(ImproperlyConfigured, match=r"\.Host defines neither `rules` nor get_action_list\(\)"):
        check_entity_class(Host)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("drian", "name 'drian': Host has no method 'drian'"),
        ("shelf", "name 'shelf': Host has no method 'shelf'"),
        ("needs_more", r"name 'needs_more': .* cannot be called with \(ctx\)"),
        ("later", "name 'later': action later is a coroutine function"),
    ],
)
def test_a_table_that_names_what_is_no_method(name: str, says: str) -> None:
    class Server(Host):
        rules = Rules({Goal.UP: {State.UP: [], State.DOWN: [power_off, name]}})

    class Choosy(Server):
        def get_action_list(self, state: Any, goal_state: Any) -> Any:
            return super().get_action_list(state, "UP")

    for cls in (Server, Choosy):
        expected = says.replace("Host has", f".*{cls.__name__} has")
        with pytest.raises(ImproperlyConfigured, match=rf"the rules of .*{cls.__name__} {expected}"):
            check_entity_class(cls)


@pytest.mark.parametrize("name", ["drain", "undrain", "all_off", "off", "chosen"])
def test_a_table_that_names_methods(name: str) -> None:
    class Server(Host):
        rules = Rules({Goal.UP: {State.DOWN: [power_off, name]}})

    check_entity_class(Server)


def test_methods_that_only_an_entity_knows() -> None:
    class Proxy(Entity):
        rules = Rules({ANY: {ANY: "anything"}})

        def __getattr__(self, name: str) -> Any: ...

    check_entity_class(Proxy)


def test_a_list_or_a_table_of_ones_own_is_not_looked_into() -> None:
    class Table:
        def actions(self, state: Any, goal_state: Any) -> list[str]:
            return []

    class Listed(Entity):
        def get_action_list(self, state: Any, goal_state: Any) -> list[str]:
            return []

    check_entity_class(type("Derived", (Listed,), {}))
    check_entity_class(type("Tabled", (Entity,), {"rules": Table()}))


def test_missing_names_the_cells_that_no_rule_covers() -> None:
    assert FLEET.missing(State, Goal) == [(State.DRAINED, Goal.UP)]
    assert FLEET.missing([State.UP], [Goal.UP, Goal.DOWN]) == []
    assert Rules({Goal.DOWN: {ANY: []}, ANY: {State.UP: []}}).missing(State, Goal) == [
        (State.DRAINED, Goal.UP),
        (State.DOWN, Goal.UP),
    ]
    assert Rules({ANY: {ANY: []}}).missing(State, Goal) == []


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([], r"Rules is \[\]; a table is \{goal state: \{state: \[actions\]\}\}"),
        ({"g": [drain]}, r"Rules\[g\] is \[.*\]; a table is"),
        ({"g": {"s": None}}, r"Rules\[g\]\[s\] is None; write \[\] for a deliberate nothing"),
        ({"g": {"s": 42}}, r"Rules\[g\]\[s\]: 42 is no action list"),
        ({Goal.UP: {State.UP: [lambda ctx, entity: None]}}, r"Rules\[Goal.UP\]\[State.UP\]: .* has no name"),
        ({"g": {"s": ""}}, r"Rules\[g\]\[s\]: an action's name is ''"),
    ],
)
def test_a_table_of_another_shape_is_refused(table: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        Rules(table)


def test_a_table_that_is_changed_later_changes_nothing() -> None:
    row: dict[str, Any] = {"s": [drain]}
    rules = Rules({"g": row})
    row["s"].append(power_off)
    row.clear()
    assert names(rules.actions("s", "g")) == ["drain"]


def test_rules_give_an_entity_its_actions() -> None:
    class Host(Entity):
        rules = FLEET

    assert Host("1").get_action_list(State.UP, Goal.DOWN) is FLEET.actions(State.UP, Goal.DOWN)


def test_any_and_rules_read_as_they_are_written() -> None:
    assert repr(ANY) == str(ANY) == "ANY"
    assert repr(Rules({ANY: {"s": []}})) == "Rules({ANY: {'s': ActionList(actions=(), timeout=None)}})"


def test_the_table_as_a_flowchart() -> None:
    rules = Rules({Goal.DOWN: {State.UP: [drain, power_off], State.DOWN: []}, 'say "up"': {ANY: "power_on"}})
    assert rules.to_mermaid().splitlines() == [
        "flowchart LR",
        '    subgraph goal0["goal DOWN"]',
        '        state0_0(["UP"]) --> actions0_0["drain → power_off"]',
        '        state0_1(["DOWN"]) --> actions0_1["nothing to do"]',
        "    end",
        '    subgraph goal1["goal say &quot;up&quot;"]',
        '        state1_0(["ANY"]) --> actions1_0["power_on"]',
        "    end",
    ]


# The matrix --------------------------------------------------------------------------------------

EVERY_SORT = Rules(
    {
        Goal.DOWN: {State.UP: [drain, power_off], State.DOWN: [], ANY: [power_off]},
        "moved": {State.UP: "move"},
        ANY: {State.DRAINED: [power_on], ANY: []},
    }
)


def shown(matrix: Matrix) -> dict[tuple[str, str], tuple[list[str] | None, str]]:
    assert len(matrix.rows) == len(matrix.states)
    assert [[cell.goal for cell in row] for row in matrix.rows] == [list(matrix.goals)] * len(matrix.rows)
    assert [row[0].state for row in matrix.rows] == list(matrix.states)
    return {
        (cell.state, cell.goal): (None if cell.actions is None else list(cell.actions), cell.inherited)
        for row in matrix.rows
        for cell in row
    }


def test_the_matrix_says_what_holds_and_from_where() -> None:
    assert shown(EVERY_SORT.matrix()) == {
        ("UP", "DOWN"): (["drain", "power_off"], Inherited.NO),
        ("UP", "moved"): (["move"], Inherited.NO),
        ("UP", "ANY"): ([], Inherited.FROM_ANY_STATE),
        ("DRAINED", "DOWN"): (["power_off"], Inherited.FROM_ANY_STATE),
        ("DRAINED", "moved"): (["power_on"], Inherited.FROM_ANY_GOAL),
        ("DRAINED", "ANY"): (["power_on"], Inherited.NO),
        ("DOWN", "DOWN"): ([], Inherited.NO),
        ("DOWN", "moved"): ([], Inherited.FROM_ANY),
        ("DOWN", "ANY"): ([], Inherited.FROM_ANY_STATE),
        ("ANY", "DOWN"): (["power_off"], Inherited.NO),
        ("ANY", "moved"): ([], Inherited.FROM_ANY_GOAL),
        ("ANY", "ANY"): ([], Inherited.NO),
    }


def test_the_matrix_tells_a_missing_cell_from_a_deliberate_nothing() -> None:
    cells = shown(FLEET.matrix())
    assert cells["DRAINED", "UP"] == (None, Inherited.NO)
    assert cells["DOWN", "DOWN"] == ([], Inherited.NO)


@pytest.mark.parametrize("state", [*State, "other"])
@pytest.mark.parametrize("goal", [*Goal, "moved", "other"])
def test_the_matrix_has_what_an_evaluation_would_find(state: Any, goal: Any) -> None:
    expected = EVERY_SORT.actions(state, goal)
    label = [each.name if isinstance(each, enum.Enum) else each for each in (state, goal)]
    found, _ = shown(EVERY_SORT.matrix((state, goal)))[*label]
    assert found == names(expected)


def test_of_an_enum_of_states_the_matrix_has_all_members() -> None:
    """A state that the table does not even name is a gap. A goal that it leaves out may be no goal."""
    matrix = Rules({Goal.DOWN: {State.DOWN: [], "lost": [drain]}}).matrix()
    assert matrix.states == ("UP", "DRAINED", "DOWN", "lost")
    assert matrix.goals == ("DOWN",)
    assert shown(matrix)["UP", "DOWN"] == (None, Inherited.NO)


def test_a_state_of_several_flags_has_its_row() -> None:
    class Flags(enum.Flag):
        A = 1
        B = 2

    assert Rules({"g": {Flags.A | Flags.B: []}}).matrix().states == ("A", "B", "A|B")


@pytest.mark.parametrize(
    ("present", "states", "goals", "expected"),
    [
        ((State.UP, Goal.DOWN), 4, 3, (["drain", "power_off"], Inherited.NO)),
        (("lost", Goal.DOWN), 5, 3, (["power_off"], Inherited.FROM_ANY_STATE)),
        ((State.DRAINED, "sold"), 4, 4, (["power_on"], Inherited.FROM_ANY_GOAL)),
        ((Replicas(1), Replicas(2)), 5, 4, ([], Inherited.FROM_ANY)),
    ],
)
def test_the_present_cell_is_marked_and_there(
    present: tuple[Any, Any], states: int, goals: int, expected: Any
) -> None:
    matrix = EVERY_SORT.matrix(present)
    assert (len(matrix.states), len(matrix.goals)) == (states, goals)
    assert (matrix.states[-1], matrix.goals[-1]) == ("ANY", "ANY")
    [marked] = [cell for row in matrix.rows for cell in row if cell.present]
    assert [marked.state, marked.goal] == [
        each.name if isinstance(each, enum.Enum) else str(each) for each in present
    ]
    assert shown(matrix)[marked.state, marked.goal] == expected


def test_no_cell_is_marked_of_a_table_alone() -> None:
    assert not [cell for row in EVERY_SORT.matrix().rows for cell in row if cell.present]


def test_an_empty_table_has_a_matrix() -> None:
    assert Rules({}).matrix() == Matrix((), (), ())
    [[cell]] = Rules({}).matrix(("UP", "DOWN")).rows
    assert (cell.actions, cell.present) == (None, True)
