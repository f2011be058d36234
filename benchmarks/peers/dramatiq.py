"""dramatiq: no dedupe, and no way to enqueue many."""

from __future__ import annotations

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from benchmarks.peers.job import SERVER, ran

dramatiq.set_broker(RedisBroker(url=SERVER))


@dramatiq.actor
def job(id: str) -> None:
    ran()


def enqueue(id: str, delay: float | None) -> None:
    job.send_with_options(args=(id,), delay=None if delay is None else int(1000 * delay))
