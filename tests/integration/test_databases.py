"""What an entity leaves behind in Django's database connections does not reach the next one of its batch."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.servers import PostgreSQL, Process, Valkey, poll

#: A Django project in one file, without an app of ours. Entities named after one sort of trouble are a
#: batch. Each writes its row; number 0 then has the trouble, and fails.
PROJECT = """
    import json
    import os

    DATABASES = {"default": json.loads(os.environ["DATABASE"])}
    SECRET_KEY, USE_TZ = "x", True

    from celery import Celery, Task
    from celery_goalstate import Engine, Entity
    from contextlib import suppress
    from django.db import DatabaseError, connection, transaction

    app = Celery("shop", broker=os.environ["BROKER"])
    app.conf.update(broker_connection_retry_on_startup=True, goalstate_sweep_interval=0.1)
    engine = Engine(app)
    seen = []  # the driver's connections, each once

    def number_of_the_connection():
        connection.ensure_connection()
        if connection.connection not in seen:
            seen.append(connection.connection)
        return seen.index(connection.connection)

    def execute(statement, *parameters):
        with connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchone() if cursor.description else None

    class Trouble:
        def autocommit(self):
            transaction.set_autocommit(False)

        def block(self):
            self.block = transaction.atomic()
            self.block.__enter__()

        def begin(self):
            execute("BEGIN")
            execute("INSERT INTO page VALUES ('leaf', 'never-0', 0)")

        def closed(self):
            connection.connection.close()

        def noticed(self):
            connection.connection.close()
            execute("SELECT 1")

        def error(self):
            with suppress(DatabaseError):
                execute("nonsense")

        def none(self):
            pass

    class Page(Entity):
        def get_state(self):
            found = execute("SELECT 1 FROM page WHERE kind = %s AND id = %s", self.kind, self.id)
            return "there" if found else "missing"

        def get_goal_state(self):
            return "there"

        def get_action_list(self, state, goal_state):
            return [] if state == "there" else ["write"]

        def write(self, ctx):
            execute("INSERT INTO page VALUES (%s, %s, %s)", self.kind, self.id, number_of_the_connection())
            trouble, number = self.id.split("-")
            if number == "0":
                self.trouble = Trouble()
                getattr(self.trouble, trouble)()
                raise RuntimeError("it leaves the connection as it is")

    @engine.register(batch_size=16, failure_retry_delay=600)
    class Leaf(Page):
        pass

    class InATransaction(Task):
        def __call__(self, *args, **kwargs):
            with transaction.atomic():
                return super().__call__(*args, **kwargs)

    @engine.register(batch_size=16, failure_retry_delay=600, base=InATransaction)
    class Bound(Page):
        pass

    def enqueue(kind, trouble):
        engine.enqueue_many(engine.ref(kind, f"{trouble}-{number}") for number in range(6))

    def told(kind, trouble):
        found = engine.describe_many(engine.ref(kind, f"{trouble}-{number}") for number in range(6))
        return [[each.failures, bool(each.finished), bool(each.converged)] for each in found]
"""

Rows = Callable[[], list[tuple[str, str, int]]]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Any], Rows]]:
    """Django's setting, and what reads the rows."""
    directory = tmp_path_factory.mktemp(request.param)
    table, query = "CREATE TABLE page (kind TEXT, id TEXT, connection INT)", "SELECT * FROM page"
    if request.param == "sqlite":
        name = str(directory / "db.sqlite3")
        with sqlite3.connect(name) as connection:
            connection.execute(table)
            yield (
                {"ENGINE": "django.db.backends.sqlite3", "NAME": name},
                lambda: connection.execute(query).fetchall(),
            )
        return
    with PostgreSQL(directory) as server, psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(table)
        yield (
            {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": "postgres",
                "USER": "test",
                "HOST": "127.0.0.1",
                "PORT": server.port,
            },
            lambda: connection.execute(query).fetchall(),
        )


class Shop:
    """The project, while a worker of it runs."""

    def __init__(self, directory: Path, env: dict[str, str], rows: Rows) -> None:
        self.directory, self.env, self.rows = directory, env, rows

    def written(self, kind: str, trouble: str) -> list[int]:
        """Which connection wrote each row of a batch that is in the database, in their order."""
        return [number for each, id, number in sorted(self.rows()) if (each, id[:-2]) == (kind, trouble)]

    def ask(self, call: str) -> Any:
        """What a call of the project's module returns, made in a process of its own."""
        command = [sys.executable, "-c", f"import json, shop; print(json.dumps(shop.{call}))"]
        with Process(command, log=self.directory / "call.log", env=self.env, cwd=self.directory) as process:
            assert process.wait(30) == 0, process.output()
            return json.loads(process.output().splitlines()[-1])

    def evaluated(self, kind: str, trouble: str) -> list[list[Any]]:
        """Failures and whether it has converged, of each entity of a batch that was evaluated."""
        self.ask(f"enqueue({kind!r}, {trouble!r})")
        told: list[list[Any]] = []

        def done() -> bool:
            told[:] = self.ask(f"told({kind!r}, {trouble!r})")
            return all(finished for _, finished, _ in told)

        poll(f"the batch {trouble} is evaluated", done, timeout=30, interval=0.2)
        return [[failures, converged] for failures, _, converged in told]


@pytest.fixture(scope="module")
def shop(database: tuple[dict[str, Any], Rows], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    setting, rows = database
    directory = tmp_path_factory.mktemp("shop")
    (directory / "shop.py").write_text(textwrap.dedent(PROJECT))
    with Valkey(directory / "valkey") as broker:
        env = {"BROKER": broker.url, "DATABASE": json.dumps(setting), "DJANGO_SETTINGS_MODULE": "shop"}
        command = [sys.executable, "-m", "celery", "-A", "shop", "worker", "--pool=solo", "-lINFO"]
        with Process(command, log=directory / "worker.log", env=env, cwd=directory) as worker:
            worker.poll_until("the worker is ready", lambda: "ready." in worker.output(), timeout=40)
            yield Shop(directory, env, rows)


FAILED_BY_ITSELF = [[1, False], *[[0, True]] * 5]


@pytest.mark.parametrize("trouble", ["autocommit", "block", "begin", "closed", "noticed", "error"])
def test_a_connection_that_cannot_be_used_is_closed(shop: Shop, trouble: str) -> None:
    assert shop.evaluated("leaf", trouble) == FAILED_BY_ITSELF
    first, *others = shop.written("leaf", trouble)
    assert others == [others[0]] * 5
    assert first != others[0]
    assert not shop.written("leaf", "never")


@pytest.mark.parametrize("kind", ["leaf", "bound"])
def test_a_healthy_one_is_kept(shop: Shop, kind: str) -> None:
    """Also in a transaction that surrounds the task, which is not the entity's."""
    assert shop.evaluated(kind, "none") == FAILED_BY_ITSELF
    first, *others = shop.written(kind, "none")
    assert others == [first] * 5


def test_django_that_is_imported_and_not_set_up() -> None:
    """By a library, say: then there are no connections, and nothing to ask its settings for."""
    code = """
        import django.db
        from celery_goalstate.worker.databases import usable_afterwards
        with usable_afterwards():
            print("evaluated")
    """
    env = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "evaluated\n", done.stderr
