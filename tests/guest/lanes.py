"""Where the host's tests run: on several lanes at once, each with servers of its own."""

from __future__ import annotations

import itertools
import json
import os
import queue
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kombu import Connection

from tests.guest.compare import Tally
from tests.servers import HOST, Process, RabbitMQ, RedisServer

ROOT = Path(__file__).parents[2]

TIMEOUT = 300  #: seconds for one test; the longest takes 150 when nothing is wrong
PART = 12  #: tests for one process

#: A line of what `tests.guest.plugin` writes.
Note = dict[str, Any]
#: The engine's settings; None: no engine.
Settings = Mapping[str, Any] | None


@dataclass(frozen=True)
class Suite:
    """Tests of one package that talk to one broker."""

    package: str
    broker: str
    files: tuple[str, ...]  #: what pytest is told to run
    quick: tuple[str, ...]  #: the same for a part that says much in little time

    def __str__(self) -> str:
        return f"{self.package}-{self.broker}"


class Lane:
    """Runs one pytest at a time, on its own servers."""

    def __init__(self, directory: Path, broker: str, python: Path) -> None:
        self._directory = directory
        self._python = python
        self._redis = RedisServer(directory / "redis")
        self._rabbitmq = RabbitMQ(directory / "rabbitmq") if broker == "rabbitmq" else None
        self._pytest: Process | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for server in filter(None, (self._redis, self._rabbitmq)):
                stack.enter_context(server)
            self._servers = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._pytest and self._pytest.alive:
            self._pytest.kill()
        self._servers.close()

    def run(self, suite: Suite, sources: Path, arguments: list[str], settings: Settings) -> list[Note]:
        """What the plugin noted of one pytest."""
        self._empty()
        notes = self._directory / "notes.jsonl"
        notes.unlink(missing_ok=True)
        command = [str(self._python), "-m", "pytest", "-p", "tests.guest.plugin", "-p", "no:cacheprovider"]
        if suite.package == "celery":
            command += ["-p", "celery.contrib.pytest"]
        self._pytest = Process(
            [*command, *arguments],
            log=self._directory / "pytest.log",
            cwd=sources,
            env={
                **self._addresses(),
                "WORKER_LOGLEVEL": "INFO",  # some tests look for what a worker logs
                "PATH": f"{self._python.parent}{os.pathsep}{os.environ['PATH']}",
                **environment(
                    None if settings is None else {"goalstate_index_url": self._redis.url, **settings},
                    consumers=suite.package == "kombu",
                ),
                "GUEST_NOTES": str(notes),
                "GUEST_TIMEOUT": str(TIMEOUT),
            },
        )
        self._pytest.start()
        with suppress(subprocess.TimeoutExpired):  # what it has not noted did not run
            self._pytest.wait(TIMEOUT * (len(arguments) + 1))
        self._pytest.kill()  # and whatever its tests left
        return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []

    def _empty(self) -> None:
        with self._redis.client() as client:
            client.flushall()
        if self._rabbitmq:
            with Connection(self._rabbitmq.url) as connection:
                connection.default_channel.queue_delete("celery")

    def _addresses(self) -> dict[str, str]:
        broker, port = self._rabbitmq or self._redis, str(self._redis.port)
        addresses = {"TEST_BROKER": broker.url, "TEST_BACKEND": self._redis.url}
        addresses |= {"REDIS_HOST": HOST, "REDIS_PORT": port, "REDIS_6379_TCP": port}
        return addresses | {"RABBITMQ_HOST": HOST, "RABBITMQ_5672_TCP": str(broker.port)}


class Runs:
    """Runs of one suite's tests, without an engine and with one in turns."""

    def __init__(
        self,
        suite: Suite,
        sources: Path,
        lanes: list[Lane],
        settings: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._suite = suite
        self._sources = sources
        self._settings = settings
        self._say = say
        self._free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        for lane in lanes:
            self._free.put(lane)
        self.given = Counter[bool]()  # what the hook gave to runs without an engine and to those with one

    def collect(self, files: Iterable[str], left_out: Iterable[str]) -> list[str]:
        """The ids of the tests in these files."""
        arguments = [*files, "--collect-only", *(f"--ignore={path}" for path in left_out)]
        for note in self._run(arguments, None):
            if note.get("collected"):
                return list(note["collected"])
        raise SystemExit(f"{self._suite}: pytest finds no tests in {' '.join(files)} of {self._sources}")

    def count(self, tallies: dict[str, Tally], parts: Iterable[list[str]], times: int) -> None:
        """Run each part so many times without an engine and with one, and count how its tests end."""
        pool, jobs = ThreadPoolExecutor(self._free.qsize()), {}
        for turn, (n, part) in itertools.product(range(times), enumerate(filter(None, parts))):
            for engine in (False, True) if (turn + n) % 2 else (True, False):
                jobs[pool.submit(self._run, part, self._settings if engine else None)] = part, engine
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                (part, engine), notes = jobs[job], job.result()
                self.given[engine] += sum(note.get("given", 0) for note in notes)
                for test, end in ended(part, notes).items():
                    tallies.setdefault(test, Tally()).add(end, engine=engine)
                self._say(f"{self._suite}: {done} of {len(jobs)} runs")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, arguments: list[str], settings: Settings) -> list[Note]:
        lane = self._free.get()
        try:
            return lane.run(self._suite, self._sources, arguments, settings)
        finally:
            self._free.put(lane)


def environment(settings: Settings, *, consumers: bool) -> dict[str, str]:
    """In which every Python process imports the hook, by way of its sitecustomize."""
    return {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "site"), str(ROOT)]),
        "GUEST_ENGINE": json.dumps(settings),
        "GUEST_CONSUMERS": "yes" if consumers else "",
    }


def divided(tests: Iterable[str]) -> Iterator[list[str]]:
    """Parts for a process each: a few tests of one file."""
    for _, group in itertools.groupby(tests, key=lambda test: test.partition("::")[0]):
        of_file = list(group)
        yield from (of_file[start : start + PART] for start in range(0, len(of_file), PART))


#: How a test can end, the worst last: it reports several times, and may pass, but fail when torn down.
ENDS = ("not run", "passed", "skipped", "xfailed", "xpassed", "failed", "error", "timeout")


def ended(tests: Iterable[str], notes: Iterable[Note]) -> dict[str, Note]:
    """How each of these tests ended: the worst that was noted of it."""
    ends = {test: [{"outcome": ENDS[0], "why": "", "seconds": 0.0}] for test in tests}
    for note in notes:
        if "test" in note:
            ends[note["test"]].append(note)
    return {
        test: max(noted, key=lambda note: (ENDS.index(note["outcome"]), note["seconds"]))
        for test, noted in ends.items()
    }
