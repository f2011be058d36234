"""Processes that are started again when they end, as systemd or Kubernetes would do it."""

from __future__ import annotations

import signal as signals
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.app import DIRECTORY, INDEX, WORK
from tests.chaos.clock import Clock
from tests.servers import Process

ROOT = Path(__file__).parents[2]


class Supervised:
    """One process and its supervisor."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        directory: Path,
        index_url: str,
        clocks: Path | None = None,
        ready: str = "",
    ) -> None:
        """`clocks`: the library that lets its wall clock step."""
        self.name = name
        self.clock = Clock(clocks, directory / f"{name}.clock") if clocks else None
        self.starts = 0
        self._ready = ready  # what its output says once it works
        self._process = Process(
            [sys.executable, *command],
            log=directory / f"{name}.log",
            # The package under test is the one beside the tests, installed or not.
            env={
                DIRECTORY: str(directory),
                INDEX: index_url,
                "PYTHONPATH": str(ROOT),
                **(self.clock.env if self.clock else {}),
            },
            cwd=ROOT,
        )
        self._wanted = True
        self._supervisor = threading.Thread(target=self._supervise, name=f"supervisor of {name}")

    def start(self) -> None:
        self._supervisor.start()

    def _supervise(self) -> None:
        while self._wanted:
            self._process.start()
            self.starts += 1
            self._process.wait(timeout=None)
            self._process.signal(signals.SIGKILL, group=True)  # children that outlived it

    def is_ready(self) -> bool:
        return self.starts > 0 and self._process.alive and self._ready in self._process.output()

    def children(self) -> list[int]:
        """The ids of the processes of its pool."""
        try:
            return [child.pid for child in psutil.Process(self._process.pid).children()]
        except psutil.NoSuchProcess:
            return []

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, signal: int, *, group: bool = False) -> None:
        self._process.signal(signal, group=group)

    def stop(self, timeout: float) -> None:
        """TERM, and KILL if that takes too long."""
        self._wanted = False
        if self.starts:
            self.signal(signals.SIGTERM)
            self._supervisor.join(timeout)
        self.kill()

    def kill(self) -> None:
        """For good."""
        self._wanted = False
        while self._supervisor.is_alive():
            if self._process.alive:
                self._process.kill()
            self._supervisor.join(timeout=0.1)


def worker(number: int, *, pool: str, soft: bool, **place: Any) -> Supervised:
    """`soft`: QUIT leaves its tasks some time to end."""
    name = f"worker-{number}"
    return Supervised(
        name,
        [
            *("-m", "celery", "--app", "tests.chaos.worker", "worker", "--queues", WORK),
            *("--pool", pool, "--concurrency", "2", "--hostname", f"{name}@chaos"),
            *("--without-mingle", "--without-gossip", "--loglevel", "INFO"),
            *(("--", ".soft_shutdown_timeout=1.0") if soft else ()),
        ],
        ready=f"{name}@chaos ready.",
        **place,
    )


def producer(number: int, of: int, seed: int, pace: float, kinds: str, **place: Any) -> Supervised:
    return Supervised(
        f"producer-{number}",
        ["-m", "tests.chaos.producer", str(seed), str(number), str(of), str(pace), kinds],
        **place,
    )
