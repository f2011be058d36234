"""Workers end under load, one for good or all of them in turn: how late is what they held?"""

from __future__ import annotations

import contextlib
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.acceptance.ledger import Line
from tests.backlog.conftest import Workplace
from tests.servers import Process, poll

Open = Callable[..., Workplace]

LEASE = RESEND_AFTER = 2.0
SWEEP = 0.1
BACK_OFF = 0.1  # what follows the loss of a worker
BUSY = 2.0  # seconds that a loaded machine, or a pool that ends, may take in addition
PACE, PERIOD, BURST = 0.05, 6.0, 12

HOW = {
    "warm": (signal.SIGTERM, False),
    "soft": (signal.SIGQUIT, True),
    "cold": (signal.SIGQUIT, False),
    "kill": (signal.SIGKILL, False),
}
LATEST = max(LEASE, RESEND_AFTER) + SWEEP + BUSY
SOFT = "worker_soft_shutdown_timeout=1.0"
SETTINGS = {
    "goalstate_lease": LEASE,
    "goalstate_resend_after": RESEND_AFTER,
    "goalstate_sweep_interval": SWEEP,
    "goalstate_failure_retry_delay": BACK_OFF,
    "goalstate_jitter": False,
    "work": 0.05,
}
POOLS = ["prefork", "solo", "threads", "gevent"]
SHORT = {("prefork", "kill")}


@pytest.mark.parametrize(
    ("pool", "how"),
    [
        pytest.param(pool, how, marks=[] if (pool, how) in SHORT else pytest.mark.long)
        for pool in POOLS
        for how in HOW
    ],
)
def test_what_a_worker_held_is_late_by_one_period_at_most(
    open_workplace: Open, pool: str, how: str, record_property: Callable[[str, object], None]
) -> None:
    """The visibility timeout, after which Redis gives back what a killed worker held, is an hour."""
    place = open_workplace(**SETTINGS)
    number, soft = HOW[how]
    options = [SOFT] if soft else []
    with place.new_worker(pool, "ends", *options) as ends, place.new_worker(pool, "stays") as stays:
        for worker in (ends, stays):
            until_ready(worker)
        ids: set[str] = set()
        began, told = time.monotonic(), False
        while (passed := time.monotonic() - began) < PERIOD:
            id = f"e{passed}"
            place.enqueue(id)
            ids.add(id)
            if passed > PERIOD / 3 and not told:
                burst = [f"b{n}" for n in range(BURST)]
                place.enqueue(*burst)  # so that it certainly holds some
                ids.update(burst)
                poll(
                    "the burst has begun",
                    lambda: "b0" in place.looks() or "b1" in place.looks(),
                    interval=0.01,
                )
                ends.signal(number, group=how == "kill")
                told = True
            time.sleep(PACE)  # the load of a producer

        settle(place)
        ends.wait(30)
        assert stays.alive
    looks = place.things.ledger.lines("", "look")
    assert {line.entity for line in looks} == ids
    latest = max(lateness(looks))
    record_property("summary", f"{how}, {pool}: what it held was at most {1000 * latest:.0f} ms late")
    if how == "kill":
        assert latest > LEASE / 2, "it held nothing"
    assert latest <= LATEST


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", ["warm", "soft", "cold"])
@pytest.mark.parametrize("pool", POOLS)
def test_a_rolling_restart_delays_little(
    open_workplace: Open, pool: str, how: str, record_property: Callable[[str, object], None]
) -> None:
    """Three workers, in turn: each ends, starts again, and is ready before the next one is told to end."""
    place = open_workplace(**SETTINGS)
    number, soft = HOW[how]
    names = ("first", "second", "third")
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(place.new_worker(pool, name, *([SOFT] if soft else []))) for name in names
        ]
        for worker in workers:
            until_ready(worker)
        with under_load(place) as ids:
            for worker in workers:
                enqueued = len(ids)
                poll("the load goes on", lambda enqueued=enqueued: len(ids) > enqueued + 1 / PACE, timeout=30)
                worker.signal(number)
                worker.wait(60)
                worker.start()
                until_ready(worker)
        settle(place)
    looks = place.things.ledger.lines("", "look")
    assert {line.entity for line in looks} == set(ids)
    late = lateness(looks)
    median, *_, percentile = statistics.quantiles(late, n=100)[49:]
    record_property(
        "summary",
        f"rolling restart, {how}, {pool}: {len(ids)} entities, late by {1000 * median:.0f} ms (median),"
        f" {1000 * percentile:.0f} ms (99 %), {1000 * max(late):.0f} ms (longest)",
    )
    assert max(late) <= LATEST


def until_ready(worker: Process) -> None:
    """Wait until the worker says so."""
    worker.poll_until("the worker is ready", lambda: "@backlog ready." in worker.output(), timeout=60)


def settle(place: Workplace) -> None:
    def settled() -> bool:
        counts = place.things.engine.counts("item")["item"]
        return not counts["scheduled"] and not counts["running"]

    poll("everything is evaluated", settled, timeout=30)


@contextlib.contextmanager
def under_load(place: Workplace) -> Iterator[list[str]]:
    """A producer at its pace, as long as the block lasts; what it has enqueued."""
    ids: list[str] = []
    over = threading.Event()

    def produce() -> None:
        while not over.wait(PACE):
            place.enqueue(id := f"e{len(ids)}")
            ids.append(id)

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        yield ids
    finally:
        over.set()
        producer.join()


def lateness(looks: list[Line]) -> list[float]:
    """Of each look, in seconds; of a second one, after the first was cut off, since the first."""
    first: dict[str, float] = {}
    return [
        max(line.fields["lateness"], line.at - first.setdefault(line.entity, line.at) - BACK_OFF)
        for line in looks
    ]
