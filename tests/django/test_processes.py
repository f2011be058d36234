"""The project in the processes that a site has: web processes, and workers."""

from __future__ import annotations

import re

import psycopg
import pytest

from tests.django.conftest import Shop
from tests.servers import poll


def test_a_web_process_knows_the_kinds_and_their_queues(served: Shop) -> None:
    printed = served.python(
        """
import sys
from celery_goalstate.contrib.django import enqueue_on_commit
from django.db import transaction
from orders.models import Parcel
from shop.celery import app, engine
assert engine._opened is None, "nothing has opened the index"
print(*sorted(engine.kinds))
with transaction.atomic():
    enqueue_on_commit(Parcel.objects.create(state="hub", goal="depot"))
with app.connection() as connection:
    message = connection.SimpleQueue("parcels").get(timeout=10)
    print(message.headers["task"])
    message.requeue()
"""
    )
    assert printed.split() == [
        *("order", "order.resync", "parcel", "parcel.resync", "seat", "seat.resync"),
        "goalstate.parcel",
    ]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_brings_rows_to_their_goals(served: Shop, pool: str) -> None:
    command = """
from orders.models import Order, Seat
from celery_goalstate.contrib.django import set_goal
seat = Seat.objects.create(train="IC 7", number=1)
set_goal(seat, "sold")
Order.objects.bulk_create([Order() for _ in range(20)])
Order.objects.all().set_goal("cancelled")
"""
    count = """
from orders.models import Order, Seat
print(Order.objects.filter(status="cancelled").count() + Seat.objects.filter(state="sold").count())
"""
    with served.worker("-Q", "celery,parcels", f"--pool={pool}", "-c2") as worker:
        worker.poll_until("the worker is ready", lambda: "ready." in worker.output(), timeout=120)
        assert served.python(command) == ""
        poll("all rows are at their goals", lambda: served.python(count) == "21\n", timeout=120)


# PostgreSQL --------------------------------------------------------------------------------------


on_postgresql = pytest.mark.parametrize("shop", ["postgresql"], indirect=True)


@on_postgresql
def test_a_resync_reads_the_partial_index_alone(served: Shop, record_property: object) -> None:
    with psycopg.connect(served.url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO orders_order (status, wanted, note, packed, changed) SELECT"
            " CASE WHEN number %% 1000 = 0 THEN 'paid' ELSE 'shipped' END, 'shipped', '', 0, now()"
            " FROM generate_series(1, 300000) AS number".replace("%%", "%")
        )
        connection.execute("VACUUM ANALYZE orders_order")
    printed = served.python(
        """
from django.db import connection
from django.test.utils import CaptureQueriesContext
from orders.entities import OrderEntity
with CaptureQueriesContext(connection) as queries:
    print(len(list(OrderEntity.iter_unconverged())))
with connection.cursor() as cursor:
    for query in queries.captured_queries:
        cursor.execute("EXPLAIN (ANALYZE) " + query["sql"])
        print(*(line for line, in cursor.fetchall()), sep="\\n")
"""
    )
    assert printed.startswith("300\n")
    assert re.search(r"Index Only Scan using order_unconverged on orders_order", printed), printed
    assert "Heap Fetches: 0" in printed
    time = re.search(r"Execution Time: (.*) ms", printed)
    assert time
    record_property("summary", f"rows off their goals, 300 of 300,000: read in {time[1]} ms")  # type: ignore[operator]


@on_postgresql
@pytest.mark.timeout(600)
def test_connections_that_are_killed_cost_one_evaluation_each(served: Shop, record_property: object) -> None:
    parcels = 3000
    killed = 0
    with (
        psycopg.connect(served.url, autocommit=True) as connection,
        served.worker("-Q", "celery,parcels", "--pool=prefork", "-c2") as worker,
    ):
        worker.poll_until("the worker is ready", lambda: "ready." in worker.output(), timeout=120)
        served.python(
            f"""
from orders.models import Parcel
from shop.celery import engine
parcels = Parcel.objects.bulk_create([Parcel(state="hub", goal="depot") for _ in range({parcels})])
engine.resync("parcel")
"""
        )

        def done_or_killed() -> bool:
            nonlocal killed
            [left] = connection.execute("SELECT count(*) FROM orders_parcel WHERE state = 'hub'").fetchone()
            if left:
                [count] = connection.execute(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                ).fetchone()
                killed += count
            return left == 0

        poll("all parcels are at their goals", done_or_killed, timeout=300, interval=1.5)
        failed = len(re.findall(r"parcel/\S+: .*failed \(", worker.output()))
    assert killed, "it was over too soon"
    assert failed <= killed
    record_property("summary", f"{parcels} parcels: {killed} connections killed, {failed} evaluations failed")  # type: ignore[operator]
