"""The worlds of a check: made afresh for each run, and compared when it has ended."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeAlias

from celery_goalstate.engine import Engine
from celery_goalstate.entity import Entity
from celery_goalstate.registry import all_engines
from celery_goalstate.testing import databases

#: Makes a fresh world, and returns its entity; or a context manager that yields it.
World: TypeAlias = "Callable[[], Entity | AbstractContextManager[Entity]]"
#: What of a world must be the same.
Snapshot: TypeAlias = "Callable[[Any], Any]"

#: Parts of a snapshot that a report shows, and characters of each.
PARTS_SHOWN = 6
LONGEST_VALUE = 160


NOT_REPEATABLE = (
    "two runs without a fault differ, so no other can be compared with them: is a random number in it, or the"
    " time, or something that the world does not make afresh?"
)


class NotRepeatable(AssertionError):
    """Two runs without a fault differ, so no others can be compared with them."""


@contextmanager
def fresh(world: World) -> Iterator[Entity]:
    """A world of its own, whose databases are as before when the block has ended. Logs are off."""
    disabled = logging.root.manager.disable
    with ExitStack() as stack:
        stack.callback(logging.disable, disabled)
        logging.disable(logging.CRITICAL)  # hundreds of simulated deaths are no news
        stack.enter_context(databases.rolled_back())
        made = world()
        entity = stack.enter_context(made) if isinstance(made, AbstractContextManager) else made
        if not isinstance(entity, Entity):
            raise TypeError(f"the world has {entity!r}; return its entity, or yield it as a context manager")
        yield entity


def engine_of(entity: Entity) -> Engine:
    """The engine that the entity's class is registered with. Raises `LookupError`, unless it is one."""
    found = [engine for engine in list(all_engines) if engine.is_registered(type(entity))]
    if len(found) != 1:
        raise LookupError(f"{len(found)} engines know {entity!r}; say which one you mean: engine=...")
    return found[0]


def taken(snapshot: Snapshot, entity: Entity) -> Any:
    """A snapshot, which no later run changes."""
    return copy.deepcopy(snapshot(entity))


def differences(expected: Any, got: Any) -> list[str]:
    """Where two snapshots differ, for people: a line or two for each part."""
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        missing = object()
        keys = [
            key
            for key in dict.fromkeys([*expected, *got])
            if expected.get(key, missing) != got.get(key, missing)
        ]
        lines = []
        for key in keys[:PARTS_SHOWN]:
            name = str(key)
            lines += _difference(f"    {name}: ", expected.get(key, missing), got.get(key, missing), missing)
        if len(keys) > PARTS_SHOWN:
            lines.append(f"    ... and {len(keys) - PARTS_SHOWN} more")
        return lines
    return _difference("    ", expected, got)


def _difference(head: str, expected: Any, got: Any, missing: object = None) -> list[str]:
    one, other = ("nothing" if value is missing else repr(value) for value in (expected, got))
    start = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    start = max(0, start - LONGEST_VALUE // 2) if max(len(one), len(other)) > LONGEST_VALUE else 0
    return [
        f"{head}expected {_cut(one, start)}",
        f"{' ' * len(head)}got      {_cut(other, start)}",
    ]


def excerpt(value: Any) -> str:
    """A snapshot, for people, on one line."""
    return _cut(repr(value), 0)


def _cut(text: str, start: int) -> str:
    end = start + LONGEST_VALUE
    return f"{'…' if start else ''}{text[start:end]}{'…' if len(text) > end else ''}"
