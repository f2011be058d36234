"""BullMQ: a deduplication id refuses a job while one with that id waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bullmq import Job, Queue, Worker

from benchmarks.peers.job import HOUR, SERVER, ran

queue: Queue
known: Job | None = None


@asynccontextmanager
async def connect() -> AsyncIterator[None]:
    global queue
    queue = Queue("peer", {"connection": SERVER})
    yield
    await queue.close()


def _options(delay: float | None, **more: object) -> dict[str, object]:
    return more if delay is None else {"delay": int(1000 * delay), **more}


async def enqueue(id: str, delay: float | None) -> None:
    await queue.add("job", {"id": id}, _options(delay))


async def duplicate() -> bool:
    global known
    before, known = (
        known,
        await queue.add("job", {"id": "known"}, _options(HOUR, deduplication={"id": "known"})),
    )
    return before is not None and before.id == known.id


async def enqueue_many(ids: list[str], delay: float | None) -> None:
    await queue.addBulk([{"name": "job", "data": {"id": id}, "opts": _options(delay)} for id in ids])


async def process(job: object, token: str) -> None:
    ran()


async def _work() -> None:
    Worker("peer", process, {"connection": SERVER})
    await asyncio.Event().wait()


def work() -> None:
    asyncio.run(_work())
