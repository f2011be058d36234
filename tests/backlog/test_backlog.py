"""A queue that takes ten times `resend_after` to drain: with a real worker, on real brokers."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.backlog.conftest import QUEUE, Workplace
from tests.servers import poll

Open = Callable[..., Workplace]
Record = Callable[[str, object], None]

RESEND_AFTER = 1.0
WORK, THREADS, ITEMS = 0.1, 2, 220  # at least eleven periods
LOST = 3


def lane(broker: str, shared: bool, *marks: pytest.MarkDecorator) -> object:
    return pytest.param(broker, shared, id=f"{broker}{' shared' if shared else ''}", marks=marks)


@pytest.mark.parametrize(
    ("broker", "shared"),
    [
        lane("redis", False),
        lane("redis", True),
        lane("rabbitmq", True),
        lane("rabbitmq", False, pytest.mark.long),
    ],
)
def test_a_backlog_adds_few_messages_and_hides_no_lost_one(
    open_workplace: Open, broker: str, shared: bool, record_property: Record
) -> None:
    """`shared`: other tasks of the app keep the queue from ever being empty."""
    place = open_workplace(broker, goalstate_resend_after=RESEND_AFTER, work=WORK, other_work=0.02)
    ids = {f"e{n}" for n in range(ITEMS)}
    place.enqueue(*sorted(ids))
    lost = place.drop(LOST)  # the first ones: the whole backlog lies between them and what tells of them
    if shared:
        for _ in range(10):
            place.things.other.apply_async()
    place.worker.start()
    timeout = 30 * RESEND_AFTER
    own_delay = place.drained(ids - lost, timeout)
    recovered = place.drained(lost, timeout)
    (place.directory / "stop").touch()

    began = min(at for id, at in place.looks().items() if id not in lost)
    sent = place.sent()
    extra = sent.total() - ITEMS
    periods = (own_delay - began) / RESEND_AFTER
    late = recovered - own_delay
    record_property(
        "summary",
        f"backlog of {periods:.1f} periods on {broker}{' shared' * shared}: {extra} of {ITEMS} "
        f"messages more, {LOST} lost ones recovered {late:.2f} s after the queue's own delay",
    )
    assert periods >= 10
    assert all(sent[id] >= 1 for id in ids), "each message is noted"
    assert all(sent[id] >= 2 for id in lost)
    assert extra <= 0.1 * ITEMS
    assert late <= 2 * RESEND_AFTER


@pytest.mark.parametrize(
    "count",
    [20_000, pytest.param(1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(600)])],
    ids=["20k", "1M"],
)
def test_very_many_due_at_once_stay_within_the_window(
    open_workplace: Open, count: int, record_property: Record
) -> None:
    """In order, too: what is due first has its turn first, give or take what is under way."""
    window = count // 100
    place = open_workplace(goalstate_resend_after=RESEND_AFTER, goalstate_window=window)
    began = time.monotonic()
    for start in range(0, count, 10_000):
        place.enqueue(*(f"e{n:07}" for n in range(start, min(start + 10_000, count))))
    enqueued = time.monotonic()
    place.worker.start()
    enough = max(4_000, count // 50)  # for the window to have been filled again and again
    most_sent = most_queued = 0
    with place.index.client() as client:

        def done() -> bool:
            nonlocal most_sent, most_queued
            most_sent = max(most_sent, place.under_way(client))
            most_queued = max(most_queued, client.llen(QUEUE))
            return len(place.looks()) >= enough

        poll(f"{enough} entities are looked at", done, timeout=400, interval=0.1)
    seconds = time.monotonic() - enqueued
    place.worker.end()
    order = sorted(place.looks(), key=place.looks().__getitem__)
    displaced = max(abs(int(id[1:]) - position) for position, id in enumerate(order))
    sent = place.sent()
    record_property(
        "summary",
        f"{count} due at once, enqueued in {enqueued - began:.0f} s, {len(order)} evaluated in {seconds:.0f}"
        f" s: at most {most_sent} under way and {most_queued} messages queued (window {window}), "
        f"{sent.total() - len(sent)} messages more; at most {displaced} places off the order of due times",
    )
    assert seconds > 3 * RESEND_AFTER, "nothing waited for long"
    assert window / 2 <= most_sent <= window
    assert most_queued <= window * 1.1
    assert sent.total() - len(sent) <= 0.1 * len(sent)
    assert displaced <= window
