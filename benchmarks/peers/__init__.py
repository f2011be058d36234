"""What else could schedule such jobs: a short program for each, and an environment of its own to run it in.

A program says how a job is enqueued and what a job is; `__main__` measures it, a scenario runs it. It imports
what is installed in its environment only, and is imported nowhere else.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-peers"


@dataclass(frozen=True)
class Peer:
    """One that is measured beside the others."""

    name: str
    program: str  #: the module beside this one
    worker: str  #: the command; with {module} and {server}
    working: str  #: what the worker is, in words
    requirements: tuple[str, ...] = ()  #: none: it runs where `make bench` runs
    jobs: int = 3000  #: that its worker does in one round
    postgres: bool = False  #: whether it keeps its jobs in PostgreSQL

    @property
    def directory(self) -> Path:
        """Its programs: python, and the worker's command."""
        return ENVIRONMENTS / self.program / "bin" if self.requirements else Path(sys.executable).parent

    def install(self) -> None:
        """Set up its environment, unless it is there. Raises `CalledProcessError`."""
        home = self.directory.parent
        stamp, wanted = home / "requirements.txt", "".join(f"{each}\n" for each in self.requirements)
        if not wanted or (stamp.exists() and stamp.read_text() == wanted):
            return
        print(f"    setting up {home.relative_to(ROOT)}", flush=True)
        uv, python = shutil.which("uv"), str(self.directory / "python")
        venv.create(home, clear=True, with_pip=not uv)
        install = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
        subprocess.run([*install, "--quiet", *self.requirements], check=True)
        stamp.write_text(wanted)

    def versions(self) -> list[str]:
        """What is installed of what it requires: name and version."""
        [site] = self.directory.parent.glob("lib/python*/site-packages")
        names = [re.split(r"[^\w-]", each)[0] for each in self.requirements]
        found = {name: next(iter(distributions(name=name, path=[str(site)]))) for name in names}
        return [f"{name} {each.version}" for name, each in found.items()]


_CELERY = "celery -A {module} worker --pool=prefork --concurrency=1 --loglevel=ERROR"
_CELERY += " --without-gossip --without-mingle --without-heartbeat"
_ONE_PROCESS = "prefork, one process"

#: What every other is held against.
BASE = Peer("Celery", "celery", _CELERY, _ONE_PROCESS)

PEERS = (
    BASE,
    Peer("celery-goalstate", "goalstate", _CELERY, _ONE_PROCESS),
    Peer("celery-goalstate, batch_size=64", "goalstate_batch", _CELERY, _ONE_PROCESS, jobs=30_000),
    Peer(
        "celery-singleton",
        "celery_singleton",
        _CELERY,
        _ONE_PROCESS,
        ("celery-singleton>=0.3,<1", "celery[redis]>=5.7,<6"),
    ),
    Peer(
        "celery-once",
        "celery_once",
        _CELERY,
        _ONE_PROCESS,
        ("celery-once>=3,<4", "celery[redis]>=5.7,<6"),
    ),
    Peer("Huey", "huey", "huey_consumer {module}.huey --quiet", "one thread", ("huey>=3,<4", "redis<9")),
    Peer(
        "RQ",
        "rq",
        "rq worker --url {server} --quiet",
        "one process, which forks for each job",
        ("rq>=3,<4",),
        jobs=200,
    ),
    Peer(
        "arq",
        "arq",
        "python -m benchmarks.peers arq work",
        "asyncio, 10 jobs at a time",
        ("arq>=0.28,<1",),
    ),
    Peer(
        "SAQ",
        "saq",
        "saq {module}.settings",
        "asyncio, 10 jobs at a time",
        ("saq[redis]>=0.26,<1", "typing-extensions<5"),
    ),
    Peer("dramatiq", "dramatiq", "dramatiq {module} --processes 1", "8 threads", ("dramatiq[redis]>=2,<3",)),
    Peer(
        "taskiq",
        "taskiq",
        "taskiq worker {module}:broker --workers 1 --log-level ERROR",
        "asyncio, 100 jobs at a time",
        ("taskiq>=0.13,<1", "taskiq-redis>=1,<2"),
    ),
    Peer(
        "procrastinate",
        "procrastinate",
        "procrastinate --log-level error --app {module}.app worker",
        "asyncio, one job at a time; on PostgreSQL without fsync",
        ("procrastinate>=3,<4", "psycopg[binary]>=3,<4"),
        postgres=True,
    ),
    Peer(
        "BullMQ",
        "bullmq",
        "python -m benchmarks.peers bullmq work",
        "asyncio, one job at a time",
        ("bullmq>=3,<4",),
    ),
    Peer(
        "docket",
        "docket",
        "docket worker --url {server} --tasks {module}:tasks --logging-level ERROR",
        "asyncio, 10 jobs at a time",
        ("pydocket>=0.27,<1",),
    ),
    Peer("streaq", "streaq", "streaq run {module}:worker", "asyncio, 16 jobs at a time", ("streaq>=7,<8",)),
)
