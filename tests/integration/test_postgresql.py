"""`enqueue_on_commit` over PostgreSQL, with a real worker: what is evaluated is what was committed."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.servers import PostgreSQL, Process, Valkey, poll

#: A Django project in one file. Its entity writes down which state each of its evaluations saw.
PROJECT = """
    import os
    import django
    from django.conf import settings
    from celery import Celery
    from celery_goalstate import Engine, Entity

    settings.configure(
        DATABASES={"default": {
            "ENGINE": "django.db.backends.postgresql", "NAME": "postgres", "USER": "test",
            "HOST": "127.0.0.1", "PORT": os.environ["POSTGRES_PORT"],
        }},
        CELERY_BROKER_URL=os.environ["BROKER"],
        CELERY_GOALSTATE_SWEEP_INTERVAL=0.1,
        CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP=True,
    )
    django.setup()
    from django.db import connection, transaction

    app = Celery("shop")
    app.config_from_object("django.conf:settings", namespace="CELERY")
    engine = Engine(app)

    def one(statement, *parameters):
        with connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchone()[0] if cursor.description else None

    def seen(ctx, order):
        one("INSERT INTO looks (id, state) VALUES (%s, %s)", order.id, ctx.state)

    @engine.register
    class Order(Entity):
        def get_state(self):
            return one("SELECT state FROM orders WHERE id = %s", self.id)
        def get_goal_state(self):
            return "paid"
        def get_action_list(self, state, goal_state):
            return [seen]
"""

#: A "view": it changes the row, enqueues, dawdles until the test lets it go on, and commits or rolls back.
VIEW = """
    import sys
    from shop import Order, engine, one, transaction
    from celery_goalstate.contrib.django import enqueue_on_commit

    order, end = sys.argv[1:]
    try:
        with transaction.atomic():
            one("UPDATE orders SET state = 'paid' WHERE id = %s", order)
            enqueue_on_commit(Order(order))
            print("enqueued", engine.is_scheduled(Order(order)), flush=True)
            one("SELECT pg_advisory_lock(7)")
            if end == "rollback":
                raise RuntimeError("changed my mind")
    except RuntimeError:
        print("rolled back", flush=True)
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    with PostgreSQL(tmp_path_factory.mktemp("postgresql")) as server:
        with psycopg.connect(server.url) as connection:
            connection.execute("CREATE TABLE orders (id text PRIMARY KEY, state text)")
            connection.execute("CREATE TABLE looks (id text, state text)")
            connection.execute("INSERT INTO orders VALUES ('1', 'new'), ('2', 'new')")
        yield server


@pytest.fixture(scope="module")
def project(
    database: PostgreSQL, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, str]]]:
    """The project's directory and environment, while a worker of it runs."""
    directory = tmp_path_factory.mktemp("shop")
    (directory / "shop.py").write_text(textwrap.dedent(PROJECT))
    (directory / "view.py").write_text(textwrap.dedent(VIEW))
    with Valkey(directory / "valkey") as broker:
        env = {"BROKER": broker.url, "POSTGRES_PORT": str(database.port)}
        command = [
            *(sys.executable, "-m", "celery", "-A", "shop", "worker"),
            "--pool=prefork",
            "-c1",
            "-lINFO",
        ]
        with Process(command, log=directory / "worker.log", env=env, cwd=directory) as worker:
            worker.poll_until("the worker is ready", lambda: "ready." in worker.output(), timeout=30)
            yield directory, env


@pytest.mark.parametrize(("order", "end"), [("1", "commit"), ("2", "rollback")])
def test_a_worker_sees_what_was_committed_or_nothing(
    database: PostgreSQL, project: tuple[Path, dict[str, str]], order: str, end: str
) -> None:
    directory, env = project
    with psycopg.connect(database.url, autocommit=True) as connection:

        def looks() -> list[tuple[str, ...]]:
            return connection.execute("SELECT state FROM looks WHERE id = %s", (order,)).fetchall()

        connection.execute("SELECT pg_advisory_lock(7)")  # the view's transaction stays open
        view = Process(
            [sys.executable, "view.py", order, end], log=directory / "view.log", env=env, cwd=directory
        )
        with view:
            view.poll_until("the view has enqueued", lambda: "enqueued" in view.output(), timeout=20)
            assert view.output() == "enqueued False\n", "nothing is scheduled before the commit"
            assert looks() == []
            connection.execute("SELECT pg_advisory_unlock(7)")
            assert view.wait(20) == 0
        if end == "commit":
            poll("the worker has looked", looks, timeout=20)
            assert looks() == [("paid",)]
        else:
            assert view.output().endswith("rolled back\n")
            described = Process(
                [*(sys.executable, "-m", "celery", "-A", "shop"), "goalstate", "show", "order", order],
                log=directory / "show.log",
                env=env,
                cwd=directory,
            )
            with described:
                assert described.wait(20) == 1, "never enqueued"
            assert looks() == []
