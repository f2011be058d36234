"""What the scenarios share: a server of their own, workers, rounds that take turns, and what was measured."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import redis

from tests.servers import Process

#: What a scenario measures: by name, one value for each round.
Measured = dict[str, list[float]]


class Bench:
    """One run of one scenario on a server that nobody else uses."""

    def __init__(self, server: redis.Redis, *, rounds: int, quick: bool) -> None:
        self.server = server
        self.rounds = rounds
        self.quick = quick
        self.measured: Measured = {}
        self.remarks: list[str] = []

    def flush(self) -> None:
        """Empty the server, and free its memory before anything else is done."""
        self.server.execute_command("FLUSHALL", "SYNC")

    def size(self, full: int, quick: int) -> int:
        """How many there are to be: a smoke run has few."""
        return quick if self.quick else full

    def note(self, name: str, *values: float) -> None:
        """Add what was measured."""
        self.measured.setdefault(name, []).extend(values)
        shown = " ".join(f"{value:,.2f}" for value in values)
        print(f"    {name:52} {shown:>16}", flush=True)

    def remark(self, text: str) -> None:
        """Say what a reader of the figures has to know."""
        self.remarks.append(text)
        print(f"    {text}", flush=True)

    def take_turns(
        self, rounds: int, operations: Mapping[str, Callable[[], float]], before: Callable[[], None]
    ) -> None:
        """Measure each operation once a round. Every measurement begins with an empty server and `before`."""
        for _ in range(rounds):
            for name, measure in operations.items():
                self.flush()
                before()
                self.note(name, measure())


def microseconds(call: Callable[[], object], calls: int, each: int = 1) -> float:
    """What one call takes, or one of the `each` entities that a call handles."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls / each * 1e6


def until(description: str, condition: Callable[[], bool], timeout: float = 600, every: float = 0.01) -> None:
    """Ask again and again until it is so. Raises `TimeoutError`."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s in vain: {description}")
        time.sleep(every)  # polls: the deadline is above


class Worker(Process):
    """A Celery worker, killed at the end: what it leaves behind is flushed with the server."""

    def __init__(self, app: str, *, pool: str = "prefork", concurrency: int = 1) -> None:
        self._log = tempfile.TemporaryDirectory(prefix="benchmark-")
        super().__init__(
            [
                *(sys.executable, "-m", "celery", "-A", app, "worker", "--loglevel=ERROR"),
                *(f"--pool={pool}", f"--concurrency={concurrency}", f"--hostname={id(self)}@%h"),
                *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            ],
            log=Path(self._log.name) / "worker.log",
            cwd=Path(__file__).parents[1],
        )

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        self._log.cleanup()

    def memory(self) -> float:
        """Bytes of resident memory of the worker and of its pool."""
        listed = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,rss="], check=True, capture_output=True, text=True
        ).stdout
        rows = [tuple(map(int, line.split())) for line in listed.splitlines()]
        return 1024 * sum(rss for pid, parent, rss in rows if self.pid in (pid, parent))


def await_ready(app: Any, workers: Iterable[Worker]) -> None:
    """Until all these workers answer, and nobody else."""
    number = len(list(workers))
    until(f"{number} workers answer", lambda: len(app.control.ping(timeout=0.5, limit=number)) == number, 60)


def progress(done: Callable[[], bool], started: Callable[[], bool]) -> float:
    """Seconds from the first sign of work to the end of it."""
    until("work begins", started, every=0.002)
    began = time.perf_counter()
    until("all is done", done)
    return time.perf_counter() - began
