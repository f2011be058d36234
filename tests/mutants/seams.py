"""The named places where a mutant puts another rule: a function in Python, a local function of a script.

Both are found by name, so a mutant outlives any change of the rule's own text. A name that is not there any
more is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import celery_goalstate.index.redis as redis_index


class Seam(Protocol):
    """Where, and what instead."""

    def __str__(self) -> str:
        """Where it is, for people."""

    def break_it(self) -> None:
        """Put the mutant's rule in its place, in this process, for good. Raises `LookupError`."""


@dataclass(frozen=True)
class Python:
    """`Class.method`, or `function`, of a module; `instead` gets the original and returns the new one."""

    where: str
    instead: Callable[[Any], Callable[..., Any]]
    module: str = "index.transitions"

    def __str__(self) -> str:
        return f"{self.module} {self.where}"

    def break_it(self) -> None:
        owner: Any = import_module(f"celery_goalstate.{self.module}")
        *classes, name = self.where.split(".")
        for each in classes:
            owner = getattr(owner, each, None)
        if name not in vars(owner or object):
            raise LookupError(f"{self.module} has no {self.where}")
        setattr(owner, name, self.instead(vars(owner)[name]))


@dataclass(frozen=True)
class Lua:
    """A `local function` of a script; `instead` is a function in Lua, which may call `original`."""

    script: str
    name: str
    instead: str

    def __str__(self) -> str:
        return f"{self.script}.lua {self.name}"

    @property
    def file(self) -> str:
        """Where the script is, in the package."""
        return f"index/lua/{self.script}.lua"

    def broken(self, text: str) -> str:
        """The script's text with the other function. Raises `LookupError`."""
        functions = re.findall(rf"(?ms)^local function {self.name}\(.*?^end$", text)
        if len(functions) != 1:
            raise LookupError(f"{self.file} has {len(functions)} functions {self.name}")
        replaced = f"do\n  local original = {self.name}\n  {self.name} = {self.instead}\nend"
        return text.replace(functions[0], f"{functions[0]}\n{replaced}")

    def break_it(self) -> None:
        read = redis_index._lua
        texts = {self.script: self.broken(read(self.script))}
        redis_index._lua = lambda name: texts.get(name) or read(name)  # type: ignore[assignment]  # a function is replaced
