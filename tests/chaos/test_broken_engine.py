"""The engine broken on purpose, one line at a time: a short run must show which guarantee went with it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checker import RULES
from tests.chaos.test_chaos import chaos
from tests.mutants.test_mutants import MUTANTS
from tests.supervised import ROOT


@dataclass(frozen=True)
class Breakage:
    """`old`, which occurs once in the file, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    rules: set[str]  #: one of them must be broken then
    faults: str = ""  #: under which faults
    minutes: float = 0.2
    load: tuple[str, ...] = ()  #: more arguments

    def __str__(self) -> str:
        return self.name


def known(name: str, *rules: str, **options: Any) -> Breakage:
    """One that the index's own suite knows too."""
    [mutant] = [each for each in MUTANTS if each.name == name and each.file.endswith(".lua")]
    return Breakage(name, mutant.file, mutant.old, mutant.new, set(rules), **options)


BREAKAGES = [
    Breakage(
        "a renewal does not extend the lease",
        "index/lua/renew.lua",
        "save(entity, RUNNING, now + LEASE)",
        "save(entity, RUNNING)",
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
        "index/lua/survey.lua",
        "return cjson.encode({ due, suspect, lost, up_to(",
        "return cjson.encode({ due, {}, lost, up_to(",
        {"lost", "unsettled"},
        faults="the broker loses all messages",
    ),
    Breakage(
        "a delete does nothing",
        "index/lua/delete.lua",
        "    remove(entity)\n",
        "",
        {"posthumous"},
        faults="connections",
    ),
    Breakage(
        "a process believes in its lease for ever",
        "worker/lease.py",
        "return not lease.lost and self.clock() < lease.expires",
        "return True",
        {"zombie"},
        faults="a pool's child stands still",
        minutes=0.4,
        load=("--kinds", "slow", "--pace", "1.5", "--trouble", "0"),
    ),
    Breakage(
        "a message is believed before its time",
        "index/lua/claim.lua",
        "if fields.deadline > now then",
        "if false then",
        {"early"},
        faults="the clock of",
        minutes=0.4,
        load=("--kinds", "steady", "--pace", "0.4", "--trouble", "0"),  # no backlog, in which all is late
    ),
    Breakage(
        "a second message evaluates again",
        "index/lua/claim.lua",
        "  if entity.status ~= SENT or fields.token ~= token then",
        "  fields.deadline = fields.deadline or now\n  if false then",
        {"doubled"},
        faults="connections",
    ),
    Breakage(
        "a superseded message evaluates too",
        "index/lua/claim.lua",
        "  if entity.status ~= SENT or fields.token ~= token then",
        "  if entity.status ~= SENT then",
        {"doubled"},
        faults="connections",
        load=("--trouble", "0.3"),
    ),
    Breakage(
        "a second message shares the lease of the first",
        "index/lua/claim.lua",
        "  if entity.status == RUNNING and fields.nonce == nonce then",
        "  if entity.status == RUNNING then",
        {"overlap"},
        faults="connections",
        load=("--trouble", "0.3"),
    ),
    Breakage(
        "a later deadline does not replace an earlier one",
        "index/lua/enqueue.lua",
        "  if policy == 'replace' then\n",
        "  if false then\n",
        {"early", "untold"},
        faults="connections",
    ),
    Breakage(
        "a deadline far away is sent at once",
        "index/lua/common.lua",
        "  if deadline <= now + HORIZON and not paused() then",
        "  if not paused() then",
        {"far"},
        faults="connections",
    ),
    Breakage(
        "an index that does not answer is passed over",
        "index/redis.py",
        "            raise_first(replies)\n        return [\n            Scheduled(",
        "            replies = [(False, False, False)] * len(rows)\n        return [\n            Scheduled(",
        {"untold"},
        faults="the index cannot be reached",
    ),
    Breakage(
        "an enqueue fails with the broker",
        "messages/publisher.py",
        "                    raise  # meant for the action that enqueues\n                return False\n",
        "                    raise  # meant for the action that enqueues\n                raise\n",
        {"untold"},
        faults="restart of the broker",
    ),
    Breakage(
        "an enqueue tells another deadline than it sets",
        "engine.py",
        "return Enqueued(scheduled.changed, datetime_of(scheduled.deadline), sent)",
        "return Enqueued(scheduled.changed, datetime_of((scheduled.deadline or 0) + 999), sent)",
        {"untold"},
        faults="connections",
    ),
    Breakage(
        "a later deadline wins",
        "index/lua/enqueue.lua",
        "return current and math.min(current, wanted) or wanted",
        "return current and math.max(current, wanted) or wanted",
        {"later"},
        faults="connections",
    ),
]


@pytest.mark.parametrize("breakage", BREAKAGES, ids=str)
def test_what_is_to_be_broken_is_there(breakage: Breakage) -> None:
    text = (ROOT / "celery_goalstate" / breakage.file).read_text()
    assert text.count(breakage.old) == 1, "the table is stale"


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
    file = tmp_path / "celery_goalstate" / breakage.file
    file.write_text(file.read_text().replace(breakage.old, breakage.new))

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
