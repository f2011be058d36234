"""Brokers take messages back from workers that hold them for long: nothing runs twice at once, or never.

Redis gives what is not acknowledged within its `visibility_timeout` to somebody else, RabbitMQ closes the
channel of a worker that does not acknowledge within its `consumer_timeout`: both after a second here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.brokers.conftest import TIMEOUT, Shop

Open = Callable[..., Shop]

PROCESSES = 4  # of both workers
SHORT = {("redis", "prefork", "late"), ("rabbitmq", "prefork", "late")}
LANES = [
    # A gevent worker does not look for what it could take back on Redis, and solo has nothing waiting.
    *((broker, pool) for broker in ("valkey", "redis") for pool in ("prefork", "threads")),
    *(("rabbitmq", pool) for pool in ("prefork", "threads", "gevent", "solo")),
    ("quorum", "prefork"),
    ("quorum-direct", "prefork"),
]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("broker", "pool", "acks"),
    [
        pytest.param(*lane, acks, marks=[] if (*lane, acks) in SHORT else pytest.mark.long)
        for lane in LANES
        for acks in ("early", "late")
    ],
)
def test_what_is_taken_back_runs_once(
    open_shop: Open, broker: str, pool: str, acks: str, record_property: Callable[[str, object], None]
) -> None:
    """Three sorts of messages are held for too long: of the work under way (if acknowledged late), of the
    work waiting behind that, and of the work whose deadline has not come.
    """
    shop = open_shop(
        broker,
        pool,
        impatient=True,
        task_acks_late=acks == "late",
        goalstate_eta_horizon=30.0,  # so that workers hold what is not due
        goalstate_resend_after=60.0,  # it is the broker who takes back, not the sweeper who sends again
    )
    slow, waiting, ahead = (
        [f"{sort}-{n}" for n in range(count)]
        for sort, count in (("slow", PROCESSES), ("waiting", 10), ("ahead", 10))
    )
    for id in slow:
        shop.things.world.script(id, f"work:{3 * TIMEOUT}", "reach")
        shop.things.enqueue(id)
    for id in ahead:
        shop.things.enqueue(id, 2.5 * TIMEOUT)
    for id in waiting:
        shop.things.enqueue(id)
    ids = [*slow, *waiting, *ahead]
    shop.settle(ids)

    assert shop.violations() == []
    assert shop.looks() == dict.fromkeys(ids, 1)
    assert shop.taken_back(), "the broker took nothing back"
    starts = sum(worker.starts for worker in shop.workers)
    record_property(
        "summary",
        f"{broker}, {pool}, acknowledged {acks}: taken back {shop.taken_back()} times, {starts - 2} workers"
        f" started again; {len(ids)} entities, {shop.looks().total()} evaluations",
    )
