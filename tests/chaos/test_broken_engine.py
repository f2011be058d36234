"""The engine broken on purpose, one rule at a time: a short run must show which guarantee went with it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checker import RULES
from tests.chaos.test_chaos import chaos
from tests.mutants.mutants import MUTANTS
from tests.mutants.seams import Lua
from tests.supervised import ROOT


@dataclass(frozen=True)
class Text:
    """`old`, which occurs once in the file, becomes `new`."""

    file: str
    old: str
    new: str

    def broken(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise LookupError(f"{self.old!r} is not in {self.file} exactly once")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Breakage:
    """What is changed, and what comes of it."""

    name: str
    change: Text | Lua
    rules: set[str]  #: one of them must be broken then
    faults: str = ""  #: under which faults
    minutes: float = 0.2
    load: tuple[str, ...] = ()  #: more arguments

    def __str__(self) -> str:
        return self.name

    def broken(self, project: Path) -> tuple[Path, str]:
        """The file of a project, and its changed text. Raises `LookupError`."""
        file = project / "celery_goalstate" / self.change.file
        return file, self.change.broken(file.read_text())


def known(name: str, *rules: str, **options: Any) -> Breakage:
    """One that the index's own suite knows too."""
    [seam] = [each.seam for each in MUTANTS if each.rule == name and isinstance(each.seam, Lua)]
    return Breakage(name, seam, set(rules), **options)


BREAKAGES = [
    Breakage(
        "a renewal does not extend the lease",
        Lua("renew", "renew", "function(entity, run) return holds_lease(entity, run) end"),
        {"overlap"},
        faults="connections",
        load=("--kinds", "slow,flaky,patient"),  # of all kinds, one run in fifty has no slow entity
    ),
    known("a claim resets the back-off", "back-off"),
    known(
        "finish takes the later deadline",
        "later",
        faults="connections",
        minutes=0.4,
        load=("--kinds", "slow", "--pace", "0.5", "--trouble", "0"),
    ),
    Breakage(
        "a message that was lost is never missed",
        Lua("survey", "suspect", "function() return {} end"),
        {"lost", "unsettled"},
        faults="the broker loses all messages",
    ),
    Breakage(
        "a delete does nothing",
        Lua("common", "delete", "function(entity) return entity.status ~= nil end"),
        {"posthumous"},
        faults="connections",
    ),
    Breakage(
        "a process believes in its lease for ever",
        Text("worker/lease.py", "return not lease.lost and self.clock() < lease.expires", "return True"),
        {"zombie"},
        faults="a pool's child stands still",
        minutes=0.4,
        load=("--kinds", "slow", "--pace", "1.5", "--trouble", "0"),
    ),
    known(
        "a message is believed before its time",
        "early",
        faults="the clock of",
        minutes=0.4,
        load=("--kinds", "steady", "--pace", "0.4", "--trouble", "0"),  # no backlog, in which all is late
    ),
    Breakage(
        "a second message evaluates again",
        Lua(
            "claim",
            "is_expected",
            "function(entity) entity.fields.deadline = entity.fields.deadline or now return true end",
        ),
        {"doubled"},
        faults="connections",
    ),
    known(
        "any message of a sent entity claims it",
        "doubled",
        faults="connections",
        load=("--trouble", "0.3"),
    ),
    Breakage(
        "a second message shares the lease of the first",
        Lua("claim", "is_repeated", "function(entity) return entity.status == RUNNING end"),
        {"overlap"},
        faults="connections",
        load=("--trouble", "0.3"),
    ),
    Breakage(
        "a later deadline does not replace an earlier one",
        Lua(
            "enqueue",
            "choose",
            """function(current, wanted, entity)
              return math.min(current or wanted, math.max(wanted, entity.fields.floor or 0))
            end""",
        ),
        {"early", "untold"},
        faults="connections",
    ),
    known("what is far is sent at once", "far", faults="connections"),
    Breakage(
        "an index that does not answer is passed over",
        Text(
            "index/redis.py",
            "            raise_first(replies)\n        return [\n            Scheduled(",
            '            replies = [{"changed": False}] * len(requests)\n'
            "        return [\n            Scheduled(",
        ),
        {"untold"},
        faults="the index cannot be reached",
    ),
    Breakage(
        "an enqueue fails with the broker",
        Text(
            "messages/publisher.py",
            "                raise error.__cause__ from None  # meant for the action that enqueues\n"
            "            return False\n",
            "                raise error.__cause__ from None  # meant for the action that enqueues\n"
            "            raise\n",
        ),
        {"untold"},
        faults="restart of the broker",
    ),
    Breakage(
        "an enqueue tells another deadline than it sets",
        Text(
            "engine.py",
            "return Enqueued(scheduled.changed, datetime_of(scheduled.deadline), sent)",
            "return Enqueued(scheduled.changed, datetime_of((scheduled.deadline or 0) + 999), sent)",
        ),
        {"untold"},
        faults="connections",
    ),
    known("the latest deadline wins", "later", faults="connections"),
    Breakage(
        "what is parked is never sent",
        Lua("survey", "due", "function() return {} end"),
        {"delayed"},
        faults="connections",
        load=("--latest", "5", "--kinds", "steady", "--trouble", "0"),
    ),
    Breakage(
        "a broker is waited for as long as it takes",
        Text("messages/producers.py", "min(options.get(name) or timeout, timeout)", "None"),
        {"held up"},
        faults="the broker stands still",
        minutes=0.6,
        load=("--kinds", "steady"),
    ),
]


@pytest.mark.parametrize("breakage", BREAKAGES, ids=str)
def test_what_is_to_be_broken_is_there(breakage: Breakage) -> None:
    breakage.broken(ROOT)


def test_each_rule_has_a_breakage() -> None:
    assert {rule for each in BREAKAGES for rule in each.rules} == RULES.keys()


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "breakage",
    [
        pytest.param(each, marks=[pytest.mark.long] if number else [], id=str(each))
        for number, each in enumerate(BREAKAGES)
    ],
)
def test_a_broken_engine_is_found_out(breakage: Breakage, tmp_path: Path) -> None:
    for name in ("celery_goalstate", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "output"))
    file, text = breakage.broken(tmp_path)
    file.write_text(text)

    arguments = (
        "--seed",
        "1",
        "--minutes",
        str(breakage.minutes),
        "--faults",
        breakage.faults,
        "--settle",
        "8",
    )
    result, output = chaos(tmp_path, *arguments, *breakage.load, project=tmp_path)
    assert breakage.rules & {rule for rule, count in result["violations"].items() if count}, output
