"""A worker whose broker is a master behind sentinels, which is replaced while messages are on their way."""

from __future__ import annotations

from pathlib import Path

from celery import Celery
from celery.contrib.testing.worker import start_worker
from kombu.utils.uuid import uuid

from celery_goalstate import Engine
from tests.servers import poll
from tests.topologies.sentinels import MASTER, Sentinels


def test_messages_are_held_and_acknowledged_on_the_successor(tmp_path: Path, logging_as_it_was: None) -> None:
    with Sentinels(tmp_path) as sentinels:
        nodes = ";".join(f"sentinel://127.0.0.1:{port}/0" for port in sentinels.ports)
        app = Celery(uuid(), broker=nodes, set_as_current=False)
        app.conf.update(
            broker_transport_options={"master_name": MASTER},
            broker_connection_retry_on_startup=True,
            goalstate_index_url="memory://",
            task_acks_late=True,
            worker_cancel_long_running_tasks_on_connection_loss=True,
        )
        Engine(app)
        ran: set[int] = set()

        @app.task(name="run", ignore_result=True, shared=False)
        def run(n: int) -> None:
            ran.add(n)

        def send(numbers: range) -> None:
            for n in numbers:
                app.send_task("run", (n,))

        def all_are_done(numbers: range) -> bool:
            with sentinels.master.client() as client:
                return ran.issuperset(numbers) and not client.exists("unacked", "unacked_index", "celery")

        with start_worker(app, perform_ping_check=False, shutdown_timeout=30):
            send(range(20))
            poll("the first are done", lambda: all_are_done(range(20)))
            sentinels.in_sync()
            sentinels.master.kill()
            sentinels.promoted()
            send(range(20, 40))
            poll("the others are done", lambda: all_are_done(range(40)), timeout=60)
