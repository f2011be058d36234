"""A worker whose broker is a master behind sentinels, which is replaced while messages are on their way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from kombu.utils.uuid import uuid

from celery_goalstate import Engine
from celery_goalstate.exceptions import IndexUnavailable
from tests.servers import frozen, poll
from tests.topologies.conftest import EngineOn
from tests.topologies.sentinels import MASTER, Sentinels

TIMEOUT = 4.0  # seconds: those who are asked one after the other share it
SLACK = 3.0  # on a busy machine


@contextmanager
def frozen_sentinels(sentinels: Sentinels, number: int) -> Iterator[None]:
    """So many of them accept connections, and answer nothing; nobody waits for longer than the time."""
    with ExitStack() as stack:
        for process in sentinels.processes[:number]:
            stack.enter_context(frozen(process.pid))
        began = time.monotonic()
        yield
        assert time.monotonic() - began < TIMEOUT + SLACK


def test_frozen_sentinels_hold_nobody_up_for_longer_than_the_time(
    tmp_path: Path, engine_on: EngineOn
) -> None:
    """Those of the broker and those of the index; one that answers is enough."""
    with Sentinels(tmp_path) as sentinels:
        nodes = ";".join(f"sentinel://127.0.0.1:{port}/0" for port in sentinels.ports)
        broker = {
            "broker_url": nodes,
            "broker_transport_options": {"master_name": MASTER},
            "goalstate_broker_timeout": TIMEOUT,
        }
        engine, entity = engine_on("memory://", **broker)
        with frozen_sentinels(sentinels, 2):
            assert engine.enqueue(entity("1")).sent
        engine, entity = engine_on("memory://", **broker)
        with frozen_sentinels(sentinels, 3):
            assert not engine.enqueue(entity("1")).sent
        engine, entity = engine_on(sentinels.url, goalstate_index_timeout=TIMEOUT)
        with frozen_sentinels(sentinels, 2):
            assert engine.enqueue(entity("1")).changed
        engine, entity = engine_on(sentinels.url, goalstate_index_timeout=TIMEOUT)
        with (
            frozen_sentinels(sentinels, 3),
            pytest.raises(IndexUnavailable, match=r"No master found for 'shop'$"),
        ):
            engine.enqueue(entity("1"))


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
