"""pytest-celery's nodes over processes of this machine instead of containers.

A node of pytest-celery talks to its container through a handful of attributes and methods. `BrokerProcess`
and `WorkerProcess` have these, so `CeleryTestBroker`, `CeleryTestWorker` and `celery_setup` work unchanged.
"""

from __future__ import annotations

import signal as signals
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import celery
import psutil

from tests.acceptance.app import DIRECTORY
from tests.servers import Process, RabbitMQ, RedisServer, Valkey, poll

ROOT = Path(__file__).parents[2]


class BrokerProcess:
    """A server of our own as the container of a broker node."""

    def __init__(self, server: Valkey | RedisServer | RabbitMQ) -> None:
        self.server = server
        self.name = self.id = f"{type(server).__name__.lower()}-{server.port}"

    @property
    def status(self) -> str:
        return "running" if self.server.alive else "exited"

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {"url": self.server.url, "host_url": self.server.url}

    def ready(self) -> bool:
        return self.server.alive

    def logs(self) -> str:
        return self.server.log.read_text(errors="replace")

    def kill(self, signal: str | int = "SIGKILL") -> None:
        self.server.kill()

    def restart(self, timeout: float = 10) -> None:
        self.server.kill()
        self.server.start()

    def reload(self) -> None:
        """Nothing is cached that could be out of date."""

    def teardown(self) -> None:
        """The fixture that started the server ends it."""


class WorkerProcess:
    """A Celery worker as a worker node's container, with a supervisor that starts it again when it ends."""

    def __init__(self, directory: Path, *, pool: str, number: int, concurrency: int = 2) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.name = f"{pool}-{number}"
        self.starts = 0
        self._process = Process(
            [
                *(sys.executable, "-m", "celery", "--app", "tests.acceptance.worker", "worker"),
                *("--pool", pool, "--concurrency", str(concurrency), "--hostname", f"{self.name}@{self.id}"),
                # Each would make the start a second longer, and none has anything to say here.
                *("--without-mingle", "--without-gossip", "--loglevel", self.log_level()),
            ],
            log=directory / f"{self.name}.log",
            env={DIRECTORY: str(directory), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            cwd=ROOT,
        )
        self._wanted = True
        self._supervisor = threading.Thread(target=self._supervise, name=f"supervisor of {self.name}")

    def start(self) -> None:
        """Start worker and supervisor; `ready` waits until the worker answers."""
        self._supervisor.start()

    def _supervise(self) -> None:
        while self._wanted:
            self._process.start()
            self.starts += 1
            self._process.wait(timeout=None)
            self._process.signal(signals.SIGKILL, group=True)  # children that outlived it

    @property
    def pid(self) -> int:
        return self._process.pid

    def children(self) -> list[int]:
        """The ids of the pool's processes; empty for the pools that have none."""
        try:
            return [child.pid for child in psutil.Process(self.pid).children()]
        except psutil.NoSuchProcess:
            return []

    def signal(self, signal: int, *, group: bool = False) -> None:
        """Send a signal to the worker's main process, or to the pool's processes too."""
        self._process.signal(signal, group=group)

    def is_ready(self) -> bool:
        return self._process.alive and f"{self.name}@{self.id} ready." in self._process.output()

    # What pytest-celery asks of a container

    @property
    def status(self) -> str:
        return "running" if self._process.alive else "exited"

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {}

    def ready(self) -> bool:
        """Wait until the worker says so."""
        try:
            poll(f"{self.name} is ready", self.is_ready, timeout=60)
        except BaseException:
            sys.stderr.write(self.logs()[-4000:])
            raise
        return True

    def logs(self) -> str:
        return self._process.log.read_text(errors="replace") if self._process.log.exists() else ""

    def kill(self, signal: str | int = "SIGKILL") -> None:
        self.signal(signals.Signals[signal] if isinstance(signal, str) else signal)

    def restart(self, timeout: float = 10) -> None:
        starts = self.starts
        self.kill("SIGTERM")
        poll(f"{self.name} starts again", lambda: self.starts > starts, timeout=timeout + 10)
        self.ready()

    def reload(self) -> None:
        """Nothing is cached that could be out of date."""

    def teardown(self) -> None:
        """Kill it: nothing is to be saved. Again, should the supervisor have been about to start it."""
        self._wanted = False
        while self._supervisor.is_alive():
            self._process.kill()
            self._supervisor.join(timeout=0.1)

    def version(self) -> str:
        return celery.__version__

    def log_level(self) -> str:
        return "INFO"

    def worker_name(self) -> str:
        return self.name

    def worker_queue(self) -> str:
        return "celery"
