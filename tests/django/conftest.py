"""The shop of `project/`, on SQLite and on PostgreSQL; each test runs it in processes of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.servers import PostgreSQL, Process, Valkey

PROJECT = Path(__file__).parent / "project"

#: Seconds for a process on a loaded machine.
LONG = 300.0


@dataclass
class Shop:
    """The project with its database; `directory` is where logs and files of one test go."""

    database: Mapping[str, Any]
    directory: Path
    env: dict[str, str] = field(default_factory=dict)
    url: str = ""  #: of PostgreSQL

    def another(self) -> Mapping[str, Any]:
        """Settings of a second database, which tests of the project create."""
        test = {"NAME": str(self.directory / "another.sqlite3")} if not self.url else {}
        return {**self.database, "NAME": f"{self.database['NAME']}_2", "TEST": test}

    def process(self, *command: str, log: str, **env: str) -> Process:
        variables = {
            "DATABASE": json.dumps(self.database),
            "DJANGO_SETTINGS_MODULE": "shop.settings",
            "PYTHONPATH": f"{PROJECT}{os.pathsep}{self.directory}",
            **self.env,
            **env,
        }
        return Process(
            [sys.executable, *command], log=self.directory / log, env=variables, cwd=self.directory
        )

    def run(self, *command: str, status: int = 0, **env: str) -> str:
        """What a command prints; its exit status must be the one given."""
        with self.process(*command, log="command.log", **env) as process:
            assert process.wait(LONG) == status, process.output()
            return process.output()

    def manage(self, *args: str, status: int = 0, **env: str) -> str:
        return self.run(str(PROJECT / "manage.py"), *args, status=status, **env)

    def python(self, code: str, **env: str) -> str:
        """What code prints that runs after Django's set-up."""
        return self.run("-c", f"import django; django.setup()\n{code}", **env)

    def worker(self, *options: str, log: str = "worker.log") -> Process:
        return self.process("-m", "celery", "-A", "shop", "worker", "-lINFO", *options, log=log)


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    with PostgreSQL(tmp_path_factory.mktemp("postgresql")) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    """With a database that is empty, and not migrated yet."""
    if request.param == "sqlite":
        yield Shop(
            {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(tmp_path / "shop.sqlite3"),
                "OPTIONS": {"timeout": LONG},
                "TEST": {"NAME": str(tmp_path / "test.sqlite3")},
            },
            tmp_path,
        )
        return
    server: PostgreSQL = request.getfixturevalue("postgresql")
    name = f"shop_{os.getpid()}_{abs(hash(tmp_path))}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    settings = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": name,
        "USER": "test",
        "HOST": "127.0.0.1",
        "PORT": server.port,
    }
    yield Shop(settings, tmp_path, url=server.url.replace("/postgres", f"/{name}"))
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def served(shop: Shop, tmp_path: Path) -> Iterator[Shop]:
    """Migrated, and with a broker for its workers."""
    with Valkey(tmp_path / "valkey") as broker:
        shop.env["BROKER"] = broker.url
        shop.manage("migrate", "-v0")
        yield shop


#: Suites in which the database matters; of the others it is enough that they pass on one.
ON_POSTGRESQL = {"entities", "goals", "races", "saving"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All on both takes long: by default suites run on SQLite, and what has processes on PostgreSQL."""
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params
        if not params or "shop" not in params or not item.path.is_relative_to(PROJECT.parent):
            continue
        on_sqlite, suite = params["shop"] == "sqlite", params.get("suite")
        if on_sqlite if suite is None else not on_sqlite and suite not in ON_POSTGRESQL:
            item.add_marker(pytest.mark.long)
