"""Named breakages of one line, of the scripts and of their Python twin: each must turn the suite red.

Every mutant gets a copy of the package and of the tests in a directory of its own, where the suite runs until
the first failure. The state machine comes last: it is needed for what the contract's examples do not show.
A copy without a change must pass, or a red suite would mean nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

CONTRACT = (
    "tests/contract/test_claim.py",
    "tests/contract/test_batch.py",
    "tests/contract/test_enqueue.py",
    "tests/contract/test_finish.py",
    "tests/contract/test_delete.py",
    "tests/contract/test_sweep.py",
    "tests/contract/test_lists.py",
    "tests/contract/test_move.py",
    "tests/contract/test_lost_replies.py",
    "tests/contract/test_redis.py",
    "tests/contract/test_state_machine.py",
)
EVALUATION = ("tests/unit/test_evaluation.py",)


@dataclass(frozen=True)
class Mutant:
    """One line broken: `old`, which occurs once in the file, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    suite: Sequence[str] = CONTRACT

    @property
    def lane(self) -> str:
        """The index that the file belongs to."""
        return "valkey" if self.file.endswith(".lua") else "memory"

    def __str__(self) -> str:
        return f"{self.name} ({self.file})"


MUTANTS = [
    Mutant(
        "claim does not consume the token",
        "index/memory.py",
        "        entry.forget_pending()\n        entry.status = Status.RUNNING",
        "        token = entry.token\n        entry.forget_pending()\n        entry.token = token\n"
        "        entry.status = Status.RUNNING",
    ),
    Mutant(
        "claim does not consume the token",
        "index/lua/common.lua",
        "local due = fields.deadline\n  forget_pending(fields)\n",
        "local due, token = fields.deadline, fields.token\n  forget_pending(fields)\n"
        "  fields.token = token\n",
    ),
    Mutant(
        "a parked entry keeps its token",
        "index/memory.py",
        "entry.forget_message()\n        entry.status, entry.score = Status.PARKED, entry.deadline",
        "entry.status, entry.score = Status.PARKED, entry.deadline",
    ),
    Mutant(
        "a parked entry keeps its token",
        "index/lua/common.lua",
        "forget_message(entity.fields)\n  save(entity, PARKED",
        "save(entity, PARKED",
    ),
    Mutant(
        "a batch takes the first of its tokens from the counter",
        "index/lua/common.lua",
        "digits(last_reserved)",
        "digits(last_token + 1)",
    ),
    Mutant(
        "put-back is unconditional",
        "index/memory.py",
        "if entry and entry.status is Status.SENT and entry.token == wakeup.token:",
        "if entry and entry.status is Status.SENT:",
    ),
    Mutant(
        "put-back is unconditional",
        "index/lua/put_back.lua",
        "if entity.status == SENT and entity.fields.token == token then",
        "if entity.status == SENT then",
    ),
    Mutant(
        "a worker is given up without a second look at its lease",
        "index/memory.py",
        "if report.expired_only and (entry.score or 0) > now:",
        "if False:",
    ),
    Mutant(
        "a worker is given up without a second look at its lease",
        "index/lua/finish.lua",
        "if expired_only and (score_of(entity) or 0) > now then",
        "if false then",
    ),
    Mutant(
        "enqueue clears the deleted mark",
        "index/memory.py",
        "            after = _earliest(entry.deadline, entry.own)",
        "            after, entry.deleted = _earliest(entry.deadline, entry.own), False",
    ),
    Mutant(
        "enqueue clears the deleted mark",
        "index/lua/enqueue.lua",
        "fields[field] = choose(fields[field], wanted, fields)",
        "fields[field], fields.deleted = choose(fields[field], wanted, fields), nil",
    ),
    Mutant(
        "the sweep ignores the pause",
        "index/memory.py",
        "if entry is None or entry.status is not Status.PARKED or entry.deadline is None or kind.paused:",
        "if entry is None or entry.status is not Status.PARKED or entry.deadline is None:",
    ),
    Mutant(
        "the sweep ignores the pause",
        "index/lua/promote.lua",
        "if entity.status ~= PARKED or paused() then",
        "if entity.status ~= PARKED then",
    ),
    Mutant(
        "finish takes the later deadline",
        "index/memory.py",
        "deadline = _earliest(asked, own, outside)",
        "deadline = max(asked or 0, own or 0, outside or 0) or None",
    ),
    Mutant(
        "finish takes the later deadline",
        "index/lua/finish.lua",
        "deadline = earliest(asked, own, outside)",
        "deadline = earliest(asked, own, outside) and math.max(asked or 0, own or 0, outside or 0)",
    ),
    Mutant(
        "a claim whose reply was lost is not recognised",
        "index/memory.py",
        "if entry.status is Status.RUNNING and entry.nonce == nonce:",
        "if False:",
    ),
    Mutant(
        "a claim whose reply was lost is not recognised",
        "index/lua/claim.lua",
        "if entity.status == RUNNING and fields.nonce == nonce then",
        "if false then",
    ),
    Mutant(
        "a report whose reply was lost is not recognised",
        "index/memory.py",
        "if not entry.last or entry.last != name:",
        "if True:",
    ),
    Mutant(
        "a report whose reply was lost is not recognised",
        "index/lua/finish.lua",
        "if not entity.status or fields.last ~= name then",
        "if true then",
    ),
    Mutant(
        "a token is a float",
        "index/memory.py",
        "return str(self._last_token)",
        'return format(self._last_token, ".14g")',
    ),
    Mutant(
        "a token is a float",
        "index/lua/common.lua",
        "  return digits(last_token)",
        "  return tostring(last_token)",
    ),
    Mutant(
        "a first successful action resets the back-off",
        "evaluation.py",
        "_interrupted(raised),\n            evaluation.failures,",
        "_interrupted(raised),\n            evaluation.failures if len(progress.actions) < 2 else 0,",
        EVALUATION,
    ),
    Mutant(
        "a claim resets the back-off",
        "index/memory.py",
        "entry.batch = batch and not entry.alone",
        "entry.batch, entry.failures = batch and not entry.alone, 0",
    ),
    Mutant(
        "a claim resets the back-off",
        "index/lua/common.lua",
        "fields.lease, fields.nonce, fields.due, fields.task_id = next_token()",
        "fields.failures, fields.lease, fields.nonce, fields.due, fields.task_id = nil, next_token()",
    ),
    Mutant(
        "a batch that is lost counts failures",
        "index/memory.py",
        "report.verdict is Verdict.UNSTARTED or (report.expired_only and entry.batch)",
        "report.verdict is Verdict.UNSTARTED",
    ),
    Mutant(
        "a batch that is lost counts failures",
        "index/lua/finish.lua",
        "verdict == 'unstarted' or (expired_only and fields.batch)",
        "verdict == 'unstarted'",
    ),
    Mutant(
        "an entity that was lost with a batch is taken with another",
        "index/memory.py",
        "for id, entry in due[:limit]\n                if not entry.alone",
        "for id, entry in due[:limit]",
    ),
    Mutant(
        "an entity that was lost with a batch is taken with another",
        "index/lua/take.lua",
        "or paused() or fields.alone then",
        "or paused() then",
    ),
    Mutant(
        "an entity that is given back forgets an earlier deadline noted meanwhile",
        "index/memory.py",
        "deadline = _earliest(due, outside)",
        "deadline = due",
    ),
    Mutant(
        "an entity that is given back forgets an earlier deadline noted meanwhile",
        "index/lua/finish.lua",
        "deadline = earliest(due, outside)",
        "deadline = due",
    ),
    Mutant(
        "an entity that is given back forgets since when it was due",
        "index/memory.py",
        "deadline = _earliest(due, outside)",
        "deadline = now if outside is None else outside",
    ),
    Mutant(
        "an entity that is given back forgets since when it was due",
        "index/lua/finish.lua",
        "deadline = earliest(due, outside)",
        "deadline = outside or now",
    ),
    Mutant(
        "a move overlooks an enqueue that came meanwhile",
        "index/memory.py",
        "if entry.status is Status.RUNNING or not same:",
        "if entry.status is Status.RUNNING:",
    ),
    Mutant(
        "a move overlooks an enqueue that came meanwhile",
        "index/lua/retire.lua",
        "if entity.status == RUNNING or not same then",
        "if entity.status == RUNNING then",
    ),
    Mutant(
        "a move puts old news over what is known already",
        "index/memory.py",
        "self._kinds[kind].entries.setdefault(record.id, self._adopted(record))",
        "self._kinds[kind].entries[record.id] = self._adopted(record)",
    ),
    Mutant(
        "a move puts old news over what is known already",
        "index/lua/adopt.lua",
        "if entity.status then",
        "if entity.status == RUNNING then",
    ),
    # And some of the finer points.
    Mutant(
        "a deleted entity is taken by a repeated nonce",
        "index/lua/take.lua",
        "fields.nonce == nonce and not fields.deleted then",
        "fields.nonce == nonce then",
    ),
    Mutant(
        "a deleted entity is claimed by a repeated nonce",
        "index/lua/claim.lua",
        "if not entity.status or fields.deleted then",
        "if not entity.status then",
    ),
    Mutant(
        "max_wait comes before the back-off's floor",
        "index/lua/enqueue.lua",
        "wanted = math.max(wanted, fields.floor or 0)",
        "wanted = math.max(wanted, not max_wait and fields.floor or 0)",
    ),
    Mutant(
        "a failure keeps what its own evaluation enqueued",
        "index/lua/finish.lua",
        "deadline = respect_backoff and asked or earliest(asked, outside)",
        "deadline = respect_backoff and asked or earliest(asked, outside, own)",
    ),
]


def copy_of_the_project(directory: Path) -> Path:
    """What the suite needs; the package is not installed there, but found first."""
    kept_out = shutil.ignore_patterns("__pycache__", "acceptance", "example", "mutants", "output")
    for name in ("celery_goalstate", "tests"):
        shutil.copytree(ROOT / name, directory / name, ignore=kept_out)
    shutil.copy(ROOT / "pyproject.toml", directory)
    return directory


#: Only what the suite needs: half of the time would go into loading other plugins.
PYTEST = ("-m", "pytest", "-p", "pytest_timeout", "-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider")


def run(directory: Path, suite: Sequence[str], lane: str) -> subprocess.CompletedProcess[str]:
    """Run the suite until the first failure."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "GOALSTATE_"))
    }
    return subprocess.run(
        [sys.executable, *PYTEST, "-x", "-q", "--tb=short", *suite],
        cwd=directory,
        env={
            **environment,
            "GOALSTATE_TEST_LANES": lane,
            "GOALSTATE_TEST_PROFILE": "mutants",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("suite", "lane"), [(CONTRACT, "memory"), (CONTRACT, "valkey"), (EVALUATION, "memory")]
)
def test_without_a_change_the_suite_passes(tmp_path: Path, suite: Sequence[str], lane: str) -> None:
    done = run(copy_of_the_project(tmp_path), suite, lane)
    assert done.returncode == 0, done.stdout


@pytest.mark.timeout(400)
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_killed(mutant: Mutant, tmp_path: Path, record_property: Any) -> None:
    file = copy_of_the_project(tmp_path) / "celery_goalstate" / mutant.file
    text = file.read_text()
    assert text.count(mutant.old) == 1, "the table is stale: the old text does not occur exactly once"
    file.write_text(text.replace(mutant.old, mutant.new))

    started = time.monotonic()
    done = run(tmp_path, mutant.suite, mutant.lane)
    seconds = time.monotonic() - started
    assert done.returncode == 1, (
        f"survived, or broken altogether:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    )
    assert "user_script" not in done.stdout, f"a script that does not run at all:\n{done.stdout[-3000:]}"
    killer = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    assert killer, done.stdout[-3000:]
    record_property("summary", f"mutant: {mutant}: killed in {seconds:.1f} s by {killer[1]}")
