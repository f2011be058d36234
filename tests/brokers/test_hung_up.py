"""A broker may hang up on a producer that was silent for long: nothing that is sent then fails for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu.utils.uuid import uuid

from celery_goalstate import Engine
from celery_goalstate.index.base import Wakeup
from celery_goalstate.messages import producers
from celery_goalstate.registry import Kind
from celery_goalstate.settings import KindOptions
from tests.servers import RabbitMQ, Valkey, poll

ORDERS = Kind("order", "goalstate.order", None, KindOptions())


def kill_clients(server: Valkey) -> None:
    with server.client() as client:
        client.client_kill_filter(skipme=True)


def let_it_miss_heartbeats(server: RabbitMQ) -> None:
    poll("RabbitMQ hangs up", lambda: "missed heartbeats from client" in server.output(), timeout=30)


@pytest.mark.parametrize(
    ("kind", "hang_up"),
    [
        pytest.param(Valkey, kill_clients, id="valkey"),
        pytest.param(RabbitMQ, let_it_miss_heartbeats, id="rabbitmq"),
    ],
)
def test_who_was_hung_up_on_sends_at_once_all_the_same(
    tmp_path: Path, kind: Any, hang_up: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producers, "FRESH", 0.0)
    with kind(tmp_path / "broker") as server:
        app = Celery(uuid(), broker=f"{server.url}?heartbeat=1", set_as_current=False)
        app.conf.goalstate_index_url = "memory://"
        publisher = Engine(app).parts.publisher

        for _ in range(2):
            publisher.publish_at_once(ORDERS, [Wakeup("1", "1", 0, uuid())])
            hang_up(server)
        publisher._by_messages._hasty.close()
