"""streaq: ignores a task whose id is known."""

from __future__ import annotations

from typing import Any

from streaq import Worker

from benchmarks.peers.job import HOUR, SERVER, ran

worker = Worker(redis_url=SERVER)


@worker.task
async def job(id: str) -> None:
    ran()


def connect() -> Worker:
    return worker


def _task(id: str, delay: float | None) -> Any:
    task = job.enqueue(id)
    task.id = id
    return task if delay is None else task.start(delay=int(delay))


async def enqueue(id: str, delay: float | None) -> None:
    await _task(id, delay)


async def duplicate() -> bool:
    await enqueue("known", HOUR)
    return True  # it does not tell


async def enqueue_many(ids: list[str], delay: float | None) -> None:
    await worker.enqueue_many([_task(id, delay) for id in ids])
