"""The engine broken on purpose, one line at a time: a short run must show which guarantee went with it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.processes import ROOT
from tests.chaos.test_chaos import chaos
from tests.mutants.test_mutants import MUTANTS


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
        "return { due, suspect, up_to(",
        "return { due, {}, up_to(",
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
        "lease.py",
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
    ),
    Breakage(
        "a second message evaluates again",
        "index/lua/claim.lua",
        "  if entity.status ~= SENT or fields.token ~= token then",
        "  fields.deadline = fields.deadline or now\n  if false then",
        {"early", "overlap"},
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
    text = file.read_text()
    assert text.count(breakage.old) == 1, "the table is stale: the old text does not occur exactly once"
    file.write_text(text.replace(breakage.old, breakage.new))

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
