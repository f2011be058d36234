"""What is due now is not kept waiting by messages that are not due, whoever holds those."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from kombu.utils.uuid import uuid

from celery_goalstate.messages.envelope import SKEW
from celery_goalstate.registry import task_name
from tests.brokers.conftest import Shop

Open = Callable[..., Shop]

FETCHED = 16  # by both workers: four for each of four processes
AHEAD = 60  # more than that
DELAY = 6.0
PUNCTUAL = 3.0  # seconds, on a busy machine
WARNING = "Set task_default_exchange_type"


@pytest.mark.parametrize(
    ("broker", "horizon"),
    [
        pytest.param(broker, horizon, marks=[] if broker == "quorum" else pytest.mark.long)
        for broker, horizon in [
            *(("valkey", 30.0), ("redis", 30.0), ("rabbitmq", 30.0), ("quorum", 30.0)),
            ("quorum-direct", 0.0),  # nothing is published ahead
            ("quorum-direct", 30.0),  # what the worker warns of
        ]
    ],
)
def test_what_is_due_does_not_wait_behind_what_is_not(
    open_shop: Open, broker: str, horizon: float, record_property: Callable[[str, object], None]
) -> None:
    shop = open_shop(broker, goalstate_eta_horizon=horizon, goalstate_resend_after=60.0)
    ahead, now = [f"ahead-{n}" for n in range(AHEAD)], [f"now-{n}" for n in range(5)]
    for id in ahead:
        shop.things.enqueue(id, DELAY)
    for id in now:
        shop.things.enqueue(id)
    shop.settle([*ahead, *now])

    assert shop.violations() == []
    assert shop.looks() == dict.fromkeys([*ahead, *now], 1)
    waited, late = shop.lateness("now-"), shop.lateness("ahead-")
    record_property(
        "summary",
        f"{broker}, horizon {horizon:g} s: what was due now waited {waited:.2f} s, what was ahead was"
        f" {late:.2f} s late",
    )
    warned = broker == "quorum-direct" and horizon > 0
    assert (WARNING in shop.log()) == warned
    if not warned:
        assert waited < PUNCTUAL
    assert late < PUNCTUAL


def test_a_clock_that_was_fast_keeps_others_waiting_for_seconds(open_shop: Open) -> None:
    """More messages than the workers may hold, all due in an hour by the clock of who wrote them."""
    shop = open_shop("quorum-direct", goalstate_eta_horizon=1.0, goalstate_resend_after=60.0)
    app, name, in_an_hour = shop.things.app, task_name(shop.things.Thing.kind, "default"), timedelta(hours=1)
    with app.producer_or_acquire() as producer:
        for n in range(AHEAD):
            message = app.amqp.create_task_message(
                uuid(), name, args=([[f"old-{n}", "1"]],), eta=datetime.now(UTC) + in_an_hour
            )
            app.amqp.send_task_message(producer, name, message)
    for id in (now := [f"now-{n}" for n in range(5)]):
        shop.things.enqueue(id)
    shop.settle(now)

    assert shop.looks() == dict.fromkeys(now, 1)
    rounds = AHEAD / FETCHED
    assert shop.lateness("now-") < rounds * SKEW.total_seconds() + PUNCTUAL
    assert shop.log().count("do all clocks agree?") == 2, "once for each worker"
