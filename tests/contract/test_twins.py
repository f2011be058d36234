"""Each transition is written twice, in Python and in Lua: with the same functions, in the same order."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from celery_goalstate.index import redis, transitions

LUA = Path(redis.__file__).with_name("lua")
#: Written in one only: keys, digits and replies of Redis, and what is damaged or evicted there.
NOT_IN_PYTHON = {
    *("paused", "digits", "number", "swept", "rebuild", "read", "not_later", "each", "note_of", "strike_out"),
    *("score_of", "suspect_from", "scheduled", "restore", "accepted", "score", "with_hidden"),
    *("is_kept", "not_kept", "passed", "keep_in", "later", "cut", "add", "write_counts", "bound_of"),
}
NOT_IN_LUA = {"resync", "by_suspicion", "missed", "too_far", "survey", "positions"}


def script_of(transition: type) -> str:
    """What its docstring names."""
    found = re.search(r"(\w+)\.lua`\.$", inspect.getdoc(transition) or "")
    return found[1] if found else ""


TWINS = {
    script_of(each): each
    for each in vars(transitions).values()
    if inspect.isclass(each) and issubclass(each, transitions.Transition) and script_of(each)
}


def methods(transition: type) -> list[str]:
    return [name for name, value in vars(transition).items() if inspect.isfunction(value) and name[0] != "_"]


def functions(script: str) -> list[str]:
    return re.findall(r"^local function (\w+)", (LUA / f"{script}.lua").read_text(), re.MULTILINE)


def test_each_script_has_a_twin() -> None:
    scripts = {file.stem for file in LUA.glob("*.lua")}
    assert scripts - TWINS.keys() == {"clock", "common", "full", "overdue"}


@pytest.mark.parametrize(("script", "transition"), TWINS.items(), ids=str)
def test_both_have_the_same_functions_in_the_same_order(script: str, transition: Any) -> None:
    in_python = [name for name in methods(transition) if name not in NOT_IN_LUA]
    in_lua = [name for name in functions(script) if name not in NOT_IN_PYTHON]
    if script == "take":  # in Python it finds what is overdue, too, and so nothing that it has taken already
        in_python.remove("overdue")
        in_lua.remove("is_repeated")
    assert in_python == in_lua


def test_so_have_what_they_share() -> None:
    in_python = [*methods(transitions.Transition), *methods(transitions.Leasing)]
    in_lua = [
        name for name in functions("common") if name not in {*NOT_IN_PYTHON, "earliest", "latest_suspicion"}
    ]
    assert in_python == in_lua
