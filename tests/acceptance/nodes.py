"""pytest-celery's nodes over processes of this machine instead of containers.

A node of pytest-celery talks to its container through a handful of attributes and methods. `BrokerProcess`
and `WorkerProcess` have these, so `CeleryTestBroker`, `CeleryTestWorker` and `celery_setup` work unchanged.
"""

from __future__ import annotations

import signal as signals
import sys
import uuid
from pathlib import Path
from typing import Any

import celery

from tests.acceptance.app import DIRECTORY
from tests.servers import RabbitMQ, RedisServer, Valkey, poll
from tests.supervised import Supervised


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


class WorkerProcess(Supervised):
    """A Celery worker as a worker node's container, with a supervisor that starts it again when it ends."""

    def __init__(self, directory: Path, *, pool: str, number: int, concurrency: int = 2) -> None:
        self.id = uuid.uuid4().hex[:12]
        name = f"{pool}-{number}"
        super().__init__(
            name,
            [
                *("-m", "celery", "--app", "tests.acceptance.worker", "worker"),
                *("--pool", pool, "--concurrency", str(concurrency), "--hostname", f"{name}@{self.id}"),
                # Each would make the start a second longer, and none has anything to say here.
                *("--without-mingle", "--without-gossip", "--loglevel", self.log_level()),
            ],
            directory=directory,
            env={DIRECTORY: str(directory)},
            ready=f"{name}@{self.id} ready.",
        )

    # What pytest-celery asks of a container

    @property
    def status(self) -> str:
        return "running" if self.alive else "exited"

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
        """Nothing is to be saved."""
        self.end()

    def version(self) -> str:
        return celery.__version__

    def log_level(self) -> str:
        return "INFO"

    def worker_name(self) -> str:
        return self.name

    def worker_queue(self) -> str:
        return "celery"
