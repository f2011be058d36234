"""Huey: no dedupe, and no way to enqueue many."""

from __future__ import annotations

from huey import RedisHuey

from benchmarks.peers.job import SERVER, ran

huey = RedisHuey(url=SERVER)


@huey.task()
def job(id: str) -> None:
    ran()


def enqueue(id: str, delay: float | None) -> None:
    if delay is None:
        job(id)
    else:
        job.schedule((id,), delay=delay)
