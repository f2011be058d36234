"""Single rules, broken: each must turn the suite red, or the suite does not test the rule.

A mutant puts another function in the place of a named one (`seams`). With nothing broken the suite must pass,
or a red one would mean nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.mutants.mutants import CONTRACT, MUTANTS, Mutant
from tests.mutants.runner import Runner
from tests.mutants.seams import Lua, Python


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as runner:
        yield runner


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("suite", "lane"),
    [
        (CONTRACT, "valkey"),
        *((suite, "memory") for suite in dict.fromkeys(mutant.suite for mutant in MUTANTS)),
    ],
)
def test_without_a_mutant_the_suite_passes(runner: Runner, suite: Sequence[str], lane: str) -> None:
    done = runner.run(suite, lane)
    assert done.code == 0, done.output


@pytest.mark.timeout(400)
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_killed(mutant: Mutant, runner: Runner, record_property: Any) -> None:
    started = time.monotonic()
    done = runner.run(mutant.suite, mutant.lane, str(mutant))
    seconds = time.monotonic() - started
    assert done.code == 1, f"survived, or broken altogether:\n{done.output[-3000:]}"
    assert "user_script" not in done.output, f"a script that does not run at all:\n{done.output[-3000:]}"
    killer = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.output, re.MULTILINE)
    assert killer, done.output[-3000:]
    record_property("summary", f"mutant: {mutant}: killed in {seconds:.1f} s by {killer[1]}")


def test_each_mutant_has_a_name_of_its_own() -> None:
    assert len(set(map(str, MUTANTS))) == len(MUTANTS)


@pytest.mark.parametrize(
    "seam",
    [
        Python("Finishing.no_such_rule", lambda original: original),
        Python("NoSuchTransition.finish", lambda original: original),
        Python(
            "Claiming.claimed", lambda original: original
        ),  # inherited: another class would be broken, too
        Lua("finish", "no_such_rule", "function() end"),
        Lua("finish", "save", "function() end"),  # which is in common.lua
    ],
    ids=str,
)
def test_a_seam_that_is_not_there_is_an_error(seam: Python | Lua) -> None:
    with pytest.raises(LookupError):
        seam.break_it()
