"""One server, and workers and producers of every stage and release."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.acceptance.ledger import Violation, violations
from tests.servers import Process, Valkey, poll
from tests.upgrades.app import DIRECTORY, STAGE, Things

ROOT = Path(__file__).parents[2]
LEASE = 2.0

SETTINGS: dict[str, Any] = {
    "kind": "thing",
    "broker_connection_retry_on_startup": True,
    "task_ignore_result": True,
    "worker_hijack_root_logger": False,
    "goalstate_failure_retry_delay": 0.2,
    "goalstate_max_retry_delay": 1.0,
    "goalstate_lease": LEASE,
    "goalstate_resend_after": 1.0,
    "goalstate_sweep_interval": 0.1,
    "goalstate_eta_horizon": 2.0,
}


class Site:
    """A deployment, before and after."""

    def __init__(self, directory: Path, valkey: Valkey) -> None:
        self.directory = directory
        self.valkey = valkey
        self.processes: list[Process] = []
        self._things: dict[str, Things] = {}

    def deploy(self, stage: str, **settings: Any) -> Things:
        """What a stage's processes are configured with; its app, as seen by the test."""
        settings = {**SETTINGS, "broker_url": self.valkey.url, **settings}
        (self.directory / f"{stage}.json").write_text(json.dumps(settings))
        self._things[stage] = Things(self.directory, stage)
        return self._things[stage]

    def worker(self, stage: str, package: Path = ROOT) -> Process:
        """A worker, with the package as it is in a directory. To start takes seconds: wait for its work."""
        name = f"{stage}{len(self.processes)}"
        arguments = ["--pool", "prefork", "--concurrency", "2", "--hostname", f"{name}@upgrades"]
        return self._start(
            name,
            package,
            {DIRECTORY: str(self.directory), STAGE: stage},
            *("celery", "--app", "tests.upgrades.worker", "worker", *arguments),
            *("--without-mingle", "--without-gossip", "--loglevel", "INFO"),
        )

    def producer(self, stage: str, prefix: str, package: Path = ROOT) -> Process:
        name = f"{prefix}{len(self.processes)}"
        return self._start(name, package, {}, "tests.upgrades.app", str(self.directory), stage, prefix)

    def _start(self, name: str, package: Path, env: dict[str, str], *module: str) -> Process:
        process = Process(
            [sys.executable, "-m", *module],
            log=self.directory / f"{name}.log",
            env={**env, "PYTHONPATH": f"{package}{os.pathsep}{ROOT}", "PYTHONUNBUFFERED": "1"},
            cwd=package,
        )
        self.processes.append(process)
        process.start()
        return process

    def kill(self, worker: Process) -> None:
        """Kill a worker, whatever it is about."""
        things = next(iter(self._things.values()))
        children = psutil.Process(worker.pid).children()
        things.ledger.write("kill", pids=[child.pid for child in children])
        worker.kill()

    def settle(self, *things: Things, timeout: float = 60) -> None:
        """Wait until nothing is pending nor running in any of these places."""

        def at_rest() -> bool:
            counts = [each.engine.counts(each.Thing)[each.Thing.kind] for each in things]
            return not any(count["scheduled"] or count["running"] for count in counts)

        poll("everything is at rest", at_rest, timeout=timeout, interval=0.1)

    def violations(self, stage: str) -> list[Violation]:
        """Broken guarantees, and entities that are not at their goal."""
        things = self._things[stage]
        lines = things.ledger.lines()
        astray = [
            Violation("astray", id, "is not at its goal")
            for id in sorted({line.entity for line in lines} - {""})
            if things.world.reached(id) != things.world.wanted(id)
        ]
        return [*violations(lines, lease=LEASE), *astray]

    def packages(self) -> Counter[str]:
        """How many looks there were, by where the worker had the package from."""
        lines = next(iter(self._things.values())).ledger.lines("", "look")
        return Counter(line.fields["package"] for line in lines)

    def close(self) -> None:
        for process in self.processes:
            process.end()
        for things in self._things.values():
            things.app.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Valkey(tmp_path / "valkey") as valkey, contextlib.closing(Site(tmp_path, valkey)) as site:
        yield site
