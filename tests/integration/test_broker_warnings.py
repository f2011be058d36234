"""What a worker says of settings of the broker that do not go well with messages published ahead."""

from __future__ import annotations

import re
from typing import Any

import pytest
from kombu import Exchange, Queue

from celery_goalstate import Engine
from celery_goalstate.worker.bootsteps import broker_warnings
from tests.integration.conftest import MakeApp, worker_of
from tests.versions import needs_celery_5_6

AMQP = "amqp://nobody-connects//"
QUORUM = {"broker_url": AMQP, "task_default_queue_type": "quorum"}
TOPIC = {"task_default_exchange_type": "topic"}
HELD = r"visibility_timeout is 5 s, .* up to 30 s"


def of_queue(name: str, kind: str, exchange: str) -> Queue:
    return Queue(name, Exchange(name, exchange), name, queue_arguments={"x-queue-type": kind})


@pytest.mark.parametrize(
    ("settings", "eta_horizon", "warnings"),
    [
        ({"broker_url": AMQP}, 30.0, []),
        ({"broker_url": "redis://nobody-connects"}, 30.0, []),
        (QUORUM, 30.0, [r"that of \S+: there they fill the workers"]),
        (QUORUM, 0.0, []),
        ({**QUORUM, **TOPIC}, 30.0, []),
        ({**QUORUM, "broker_url": "redis://nobody-connects"}, 30.0, []),
        # Celery asks whether *any* queue is a quorum queue, and then does without a prefetch that grows.
        (
            {
                "broker_url": AMQP,
                "task_queues": [
                    of_queue("a", "quorum", "topic"),
                    of_queue("b", "classic", "direct"),
                    of_queue("c", "quorum", "direct"),
                ],
            },
            30.0,
            [r"that of b, c: "],
        ),
        ({"broker_transport_options": {"visibility_timeout": 5}}, 30.0, [HELD]),
        ({"broker_transport_options": {"visibility_timeout": 30}}, 30.0, [r"visibility_timeout is 30 s"]),
        ({"broker_transport_options": {"visibility_timeout": 31}}, 30.0, []),
        ({"broker_transport_options": {"visibility_timeout": 5}}, 0.0, []),
        # An hour, unless it is set.
        ({"broker_url": "redis://nobody-connects"}, 3600.0, [r"visibility_timeout is 3600 s"]),
        ({"broker_url": AMQP}, 3600.0, []),
    ],
)
def test_what_is_said(
    make_app: MakeApp, settings: dict[str, Any], eta_horizon: float, warnings: list[str]
) -> None:
    said = list(broker_warnings(make_app(**settings), eta_horizon))
    assert len(said) == len(warnings)
    for text, pattern in zip(said, warnings, strict=True):
        assert re.search(pattern, text)


def test_queues_that_a_worker_does_not_consume_are_no_matter(make_app: MakeApp) -> None:
    queues = [of_queue("a", "quorum", "topic"), of_queue("b", "quorum", "direct")]
    app = make_app(broker_url=AMQP, task_queues=queues)
    app.amqp.queues.select("a")
    assert list(broker_warnings(app, 30.0)) == []


@pytest.mark.parametrize(("exchange", "count"), [(None, 1), pytest.param("topic", 0, marks=needs_celery_5_6)])
def test_a_queue_that_is_only_named(make_app: MakeApp, exchange: str | None, count: int) -> None:
    """As by register(queue="orders") and --queues orders."""
    missing = {
        "task_create_missing_queue_type": "quorum",
        "task_create_missing_queue_exchange_type": exchange,
    }
    app = make_app(**QUORUM, **TOPIC, **missing)
    app.amqp.queues.select("orders")
    assert len(list(broker_warnings(app, 30.0))) == count


def test_a_worker_says_so_when_it_starts(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(broker_transport_options={"visibility_timeout": 5})
    Engine(app)
    with worker_of(app):
        pass
    [record] = [record for record in caplog.records if "visibility_timeout" in record.message]
    assert record.levelname == "WARNING"
    assert re.search(HELD, record.message)
