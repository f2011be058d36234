"""RQ: `unique` refuses a job whose id is known; a pipeline enqueues many."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import redis
from rq import Queue
from rq.exceptions import DuplicateJobError

from benchmarks.peers.job import HOUR, SERVER, ran

connection = redis.Redis.from_url(SERVER)
queue = Queue(connection=connection)


def job(id: str) -> None:
    ran()


def enqueue(id: str, delay: float | None, **options: object) -> None:
    if delay is None:
        queue.enqueue(job, id, **options)
    else:
        queue.enqueue_at(datetime.now(UTC) + timedelta(seconds=delay), job, id, **options)


def duplicate() -> bool:
    try:
        enqueue("known", HOUR, job_id="known", unique=True)
    except DuplicateJobError:
        return True
    return False


def enqueue_many(ids: list[str], delay: float | None) -> None:
    with connection.pipeline() as pipeline:
        for id in ids:
            enqueue(id, delay, pipeline=pipeline)
        pipeline.execute()
