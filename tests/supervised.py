"""Processes that are started again when they end, as systemd or Kubernetes would do it."""

from __future__ import annotations

import signal as signals
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.servers import Process

ROOT = Path(__file__).parents[1]


class End(NamedTuple):
    """Of a process."""

    code: int
    output: str  #: all that it wrote


class Supervised:
    """A Python program and its supervisor."""

    def __init__(
        self, name: str, command: Sequence[str], *, directory: Path, env: Mapping[str, str], ready: str = ""
    ) -> None:
        """`ready`: what its output says once it works."""
        self.name = name
        self.starts = 0
        self.own_ends: list[End] = []  #: those for which nobody had sent it a signal
        self._ready = ready
        self._process = Process(
            [sys.executable, *command],
            log=directory / f"{name}.log",
            # The package under test is the one beside the tests, installed or not.
            env={"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **env},
            cwd=ROOT,
        )
        self._wanted = True
        self._signalled = False  # since its latest start
        self._supervisor = threading.Thread(target=self._supervise, name=f"supervisor of {name}")

    def start(self) -> None:
        """Start process and supervisor."""
        self._supervisor.start()

    def _supervise(self) -> None:
        while self._wanted:
            self._signalled = False
            self._process.start()
            self.starts += 1
            code = self._process.wait(timeout=None)
            if not self._signalled:
                self.own_ends.append(End(code, self._process.output()))
            self._process.signal(signals.SIGKILL, group=True)  # children that outlived it

    @property
    def alive(self) -> bool:
        return self._process.alive

    def is_ready(self) -> bool:
        return self.starts > 0 and self.alive and self._ready in self._process.output()

    @property
    def pid(self) -> int:
        return self._process.pid

    def children(self) -> list[int]:
        """The ids of the processes of its pool; empty for the pools that have none."""
        try:
            return [child.pid for child in psutil.Process(self.pid).children()]
        except psutil.NoSuchProcess:
            return []

    def signal(self, signal: int, *, group: bool = False) -> None:
        """Send a signal to the main process, or to the pool's processes too."""
        self._signalled = True
        self._process.signal(signal, group=group)

    def logs(self) -> str:
        """What all its starts have written."""
        return self._process.log.read_text(errors="replace") if self._process.log.exists() else ""

    def stop(self, timeout: float) -> None:
        """TERM, and KILL if that takes too long."""
        self._wanted = False
        if self.starts:
            self.signal(signals.SIGTERM)
            self._supervisor.join(timeout)
        self.end()

    def end(self) -> None:
        """KILL for good: nothing is to be saved. Again, should the supervisor have been about to start it."""
        self._wanted = False
        while self._supervisor.is_alive():
            if self.alive:
                self._signalled = True
                self._process.kill()
            self._supervisor.join(timeout=0.1)
