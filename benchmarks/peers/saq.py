"""SAQ: refuses a job whose key is known; no way to enqueue many."""

from __future__ import annotations

import time

from saq import Job, Queue

from benchmarks.peers.job import HOUR, SERVER, ran

queue = Queue.from_url(SERVER)


async def job(context: object, *, id: str) -> None:
    ran()


settings = {"queue": queue, "functions": [job]}


async def enqueue(id: str, delay: float | None) -> Job | None:
    when = 0 if delay is None else int(time.time() + delay)
    return await queue.enqueue("job", key=id, id=id, scheduled=when)


async def duplicate() -> bool:
    return await enqueue("known", HOUR) is None
