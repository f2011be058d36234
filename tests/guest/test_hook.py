"""Both sides run through the same hook, and only one gets engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guest.lanes import ended, environment

APP = """
from celery import Celery
app = Celery("host", broker="memory://")
print([task for task in app.tasks if task.startswith("goalstate.")], len(app.steps["consumer"]))
"""

CONSUMER = """
from kombu import Connection, Consumer, Queue
with Connection("memory://") as connection:
    Consumer(connection, [Queue("some")]).consume()
from tests.guest import hook
print(hook.given)
"""

TESTS = """
import time
import pytest

@pytest.fixture
def broken():
    yield
    raise OSError("when torn down")

def test_passes(): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("no cloud")
@pytest.mark.timeout(60)
def test_hangs(): time.sleep(60)
def test_breaks(broken): pass
"""


@pytest.mark.parametrize(
    ("program", "engine", "without"),
    [(APP, "['goalstate.enqueue', 'goalstate.guest'] 2", "[] 0"), (CONSUMER, "3", "0")],
    ids=["an app", "a consumer without a worker"],
)
def test_an_engine_is_given_where_the_environment_says_so(program: str, engine: str, without: str) -> None:
    def printed(settings: dict[str, str] | None) -> str:
        command = [sys.executable, "-c", program]
        env = {**os.environ, **environment(settings, consumers=program is CONSUMER)}
        return subprocess.run(command, env=env, text=True, capture_output=True, check=True).stdout.strip()

    assert printed({"goalstate_index_url": "memory://"}) == engine
    assert printed(None) == without


def test_outcomes_are_noted_as_they_come(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    notes = tmp_path / "notes.jsonl"
    env = {
        **os.environ,
        **environment(None, consumers=False),
        "GUEST_NOTES": str(notes),
        "GUEST_TIMEOUT": "0.5",
    }

    command = [sys.executable, "-m", "pytest", "-p", "tests.guest.plugin", "-p", "no:cacheprovider"]
    subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=False)

    noted = [json.loads(line) for line in notes.read_text().splitlines()]
    tests = [f"test_some.py::test_{name}" for name in ("passes", "fails", "skips", "hangs", "breaks")]
    assert noted[0] == {"collected": tests}
    assert [(end["outcome"], end["why"]) for end in ended(tests, noted).values()] == [
        ("passed", ""),
        ("failed", "assert 1 == 2"),
        ("skipped", "no cloud"),
        ("timeout", "Failed: Timeout (>0.5s) from pytest-timeout."),
        ("error", "OSError: when torn down"),
    ]
