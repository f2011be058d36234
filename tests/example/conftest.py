"""The example's site in this process, on a database in memory; and the whole demo, in its own processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from celery import current_app

from tests.servers import free_port, poll

ROOT = Path(__file__).parents[2]

# Set up while the tests are collected, for they import the site's models. The environment is put back at
# once: Celery apps of other tests would take it for their own.
with pytest.MonkeyPatch.context() as environment:
    environment.setenv("DJANGO_SETTINGS_MODULE", "example_project.settings")
    environment.setenv("DATABASE_PATH", f"{tempfile.gettempdir()}/never-opened.sqlite3")
    environment.setenv("BROKER_URL", "memory://")
    import django

    django.setup()
    from example_project.fleet.entities import HostEntity

from django.core.management import call_command  # noqa: E402 - needs the settings
from django.test import Client  # noqa: E402 - as above
from django.test.utils import (  # noqa: E402 - as above
    setup_databases,
    setup_test_environment,
    teardown_databases,
    teardown_test_environment,
)

from example_project.celery import engine  # noqa: E402 - as above
from example_project.fleet.models import Host  # noqa: E402 - as above


@pytest.fixture(scope="session")
def database() -> Iterator[None]:
    setup_test_environment()
    databases = setup_databases(verbosity=0, interactive=False)
    yield
    teardown_databases(databases, verbosity=0)
    teardown_test_environment()


@pytest.fixture
def fleet(database: None) -> Iterator[None]:
    """The shipped inventory, and an engine that knows none of it."""
    before = current_app._get_current_object()
    engine.app.set_current()  # other tests in this process have apps too
    call_command("load_inventory", ROOT / "example_project" / "inventory.csv", verbosity=0)
    yield
    engine.delete_many(HostEntity(name) for name in Host.objects.values_list("name", flat=True))
    call_command("flush", verbosity=0, interactive=False)
    before.set_current()


@pytest.fixture
def client() -> Client:
    return Client()


class Demo:
    """A running `python -m example_project.demo`, and what it said."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.tmp = directory / "tmp"
        self.tmp.mkdir()
        self._output = directory / "output.txt"
        # Others may run a demo at the same time, on the ports that it likes best.
        ports = ["--site-port", str(free_port()), "--flower-port", str(free_port())]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "example_project.demo", *ports, *options],
                cwd=ROOT,
                env={**_environment(), "TMPDIR": str(self.tmp)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_for_output(self, pattern: str, timeout: float = 60) -> str:
        """The first group of the pattern, once the output has it."""

        def found() -> re.Match[str] | None:
            match = re.search(pattern, self.output, re.MULTILINE)
            if match is None and self.process.poll() is not None:
                pytest.fail(f"the demo ended without {pattern!r}:\n{self.output}")
            return match

        match = poll(f"output {pattern!r}", found, timeout=timeout, interval=0.1)
        assert match is not None
        return match[1] if match.groups() else match[0]

    def status(self, timeout: float = 60) -> int:
        """The exit status, waited for."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the demo still runs after {timeout:g} s:\n{self.output}")


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


class Running(NamedTuple):
    site: str
    flower: str


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The demo after its rack has converged, for tests that look at it in a browser."""
    demo = Demo(tmp_path_factory.mktemp("demo"))
    try:
        site = demo.wait_for_output(r"^site\s+(http://\S+)")
        flower = demo.wait_for_output(r"^flower\s+(http://\S+)")
        demo.wait_for_output("Ctrl-C ends it all")
        yield Running(site, flower)
    finally:
        demo.process.terminate()
        demo.status()
