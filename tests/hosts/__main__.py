"""Try the package in apps that do not have the releases which everybody else's tests run on.

    python -m tests.hosts older     the older Celery releases that are supported; fails if something fails
    python -m tests.hosts newest    pre-releases of what we stand on: says what broke, and never fails

Each has an environment of its own, `.venv-celery-5.5` and so on, which the next run finds again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE
from typing import IO

ROOT = Path(__file__).parents[2]

#: The oldest releases that `pyproject.toml` admits, and the last ones before Celery 5.7.
OLDER = {
    "5.5": ("celery==5.5.0", "kombu==5.5.2", "redis==5.0.1"),
    "5.6": ("celery==5.6.3", "kombu==5.6.2", "redis==6.4.0"),
}

#: Whose next releases may break us.
NEWEST = ("celery", "kombu", "redis", "flower")

#: Where the engine meets Celery, kombu and redis-py: the index on one server, all promises on real workers,
#: kills among them, the command line, and what Celery, signals and brokers see of us. Of `test_messages.py`
#: one test: others have workers stop consuming and start again, and a Celery before 5.7 then forgets the
#: queue when it reconnects.
SHORT = (
    "tests/contract",
    "tests/acceptance/test_conformance.py",
    "tests/acceptance/test_batch.py",
    "tests/acceptance/test_kills.py::test_a_handful_of_kills",
    "tests/acceptance/test_messages.py::test_a_broker_that_restarts_empty_costs_no_evaluation",
    "tests/acceptance/test_poison.py::test_whatever_kills_its_worker_is_quarantined",
    *(
        f"tests/integration/test_{of}.py"
        for of in (
            *("base_class", "batch", "broker_warnings", "cli", "connections", "guest", "kept_connections"),
            *("kinds", "notes", "outcomes", "setup"),
        )
    ),
)
MORE = (
    *(path for path in SHORT if not path.startswith("tests/integration")),
    "tests/unit",
    "tests/integration",
    "tests/example/test_browser.py::test_flower_shows_that_a_drain_failed_and_was_retried",
    "tests/example/test_browser.py::test_flower_finds_every_evaluation_of_a_host",
)
LANES = {"GOALSTATE_TEST_LANES": "valkey", "GOALSTATE_TEST_POOLS": "prefork,solo"}

#: Seconds for the tests on pre-releases, which may hang in ways that nobody has seen.
NEWEST_TIMEOUT = 300


class Environment:
    """A virtual environment in the repository, with the package as it is edited."""

    def __init__(self, name: str, group: str, *pinned: str) -> None:
        """`group` is one of `pyproject.toml`'s, `pinned` are the releases to have."""
        self._path = ROOT / f".venv-{name}"
        self._python = self._path / "bin" / "python"
        self._wanted = ("--editable", str(ROOT), "--group", f"{ROOT / 'pyproject.toml'}:{group}", *pinned)

    def prepare(self) -> None:
        """Install all that is wanted, unless that is done."""
        stamp, project = self._path / "stamp", (ROOT / "pyproject.toml").read_bytes()
        digest = hashlib.sha256(project + repr(self._wanted).encode()).hexdigest()
        if not stamp.exists() or stamp.read_text() != digest:
            subprocess.run([sys.executable, "-m", "venv", "--clear", self._path], check=True)
            self.install("pip>=25.1")
            self.install(*self._wanted)
            stamp.write_text(digest)

    def install(self, *what: str) -> None:
        """By uv when it is there, else by pip."""
        pip = [str(self._python), "-m", "pip", "install"]
        if shutil.which("uv"):
            pip = ["uv", "pip", "install", "--python", str(self._python)]
        subprocess.run([*pip, "--quiet", *what], check=True)

    def releases(self, *names: str) -> str:
        """Those that are installed of these packages."""
        script = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
        shown = subprocess.run(
            [self._python, "-c", script, *names], check=True, stdout=PIPE, text=True
        ).stdout
        return ", ".join(map(" ".join, zip(names, shown.split(), strict=True)))

    def test(self, paths: Sequence[str], output: IO[str] | None = None, timeout: float | None = None) -> bool:
        """Run tests; whether all passed. They wait more than they work, so four run at a time.

        Raises `subprocess.TimeoutExpired` after `timeout` seconds.
        """
        pytest = [self._python, "-m", "pytest", "-q", "-n", "4", "--dist", "loadgroup", "-m", "not long"]
        lanes = {**os.environ, **LANES}
        done = subprocess.run(
            [*pytest, *paths], cwd=ROOT, env=lanes, stdout=output, stderr=output, timeout=timeout, check=False
        )
        return done.returncode == 0


def try_older() -> int:
    """Test with each older release; an exit code."""
    broken = []
    for name, pinned in OLDER.items():
        environment = Environment(f"celery-{name}", "hosts", *pinned)
        environment.prepare()
        print(f"-- {environment.releases('celery', 'kombu', 'redis')}", flush=True)
        if not environment.test(SHORT):
            broken.append(name)
    print(f"broken on Celery {', '.join(broken)}" if broken else f"all is well on Celery {', '.join(OLDER)}")
    return 1 if broken else 0


def try_newest() -> int:
    """Test with pre-releases and say what broke; an exit code that is always 0: they are not out yet."""
    environment, log = Environment("newest", "test"), ROOT / "tests" / "output" / "newest.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        environment.prepare()
        environment.install("--upgrade", "--pre", *NEWEST)
        releases = environment.releases(*NEWEST)
        print(f"-- {releases}", flush=True)
        with log.open("w") as output:
            passed = environment.test(MORE, output, NEWEST_TIMEOUT)
    except subprocess.SubprocessError as error:
        print(f"the newest releases cannot be tried: {error}")
        return 0
    lines = log.read_text().splitlines()
    broken = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    for line in broken or ([] if passed else lines[-20:]):
        print(line)
    print(f"{'all is well' if passed else 'broken'} on {releases}: {lines[-1]} ({log.relative_to(ROOT)})")
    return 0


if __name__ == "__main__":
    sys.exit({"older": try_older, "newest": try_newest}[sys.argv[1]]())
