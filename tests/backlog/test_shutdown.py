"""One of two workers ends under load: how late is what it held?"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from tests.backlog.conftest import Workplace
from tests.servers import poll

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
    place = open_workplace(
        goalstate_lease=LEASE,
        goalstate_resend_after=RESEND_AFTER,
        goalstate_sweep_interval=SWEEP,
        goalstate_failure_retry_delay=BACK_OFF,
        goalstate_jitter=False,
        work=0.05,
    )
    number, soft = HOW[how]
    options = ["worker_soft_shutdown_timeout=1.0"] if soft else []
    with place.new_worker(pool, "ends", *options) as ends, place.new_worker(pool, "stays") as stays:
        for worker, name in ((ends, "ends"), (stays, "stays")):
            ready = f"{name}@backlog ready."
            worker.poll_until(
                f"{name} is ready", lambda worker=worker, ready=ready: ready in worker.output(), timeout=60
            )
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

        def settled() -> bool:
            counts = place.things.engine.counts("item")["item"]
            return not counts["scheduled"] and not counts["running"]

        poll("everything is evaluated", settled, timeout=30)
        ends.wait(30)
        assert stays.alive
    looks = place.things.ledger.lines("", "look")
    assert {line.entity for line in looks} == ids
    first: dict[str, float] = {}
    latest = max(line.fields["lateness"] for line in looks)
    for line in looks:  # a second look: the first was cut off
        latest = max(latest, line.at - first.setdefault(line.entity, line.at) - BACK_OFF)
    record_property("summary", f"{how}, {pool}: what it held was at most {1000 * latest:.0f} ms late")
    if how == "kill":
        assert latest > LEASE / 2, "it held nothing"
    assert latest <= max(LEASE, RESEND_AFTER) + SWEEP + BUSY
