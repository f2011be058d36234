"""taskiq: no dedupe, and no way to enqueue many."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from taskiq_redis import ListRedisScheduleSource, RedisStreamBroker

from benchmarks.peers.job import SERVER, ran

broker = RedisStreamBroker(SERVER)
source = ListRedisScheduleSource(SERVER)


@broker.task
async def job(id: str) -> None:
    ran()


@asynccontextmanager
async def connect() -> AsyncIterator[None]:
    await broker.startup()
    await source.startup()
    yield
    await source.shutdown()
    await broker.shutdown()


async def enqueue(id: str, delay: float | None) -> None:
    if delay is None:
        await job.kiq(id)
    else:
        await job.schedule_by_time(source, datetime.now(UTC) + timedelta(seconds=delay), id)
