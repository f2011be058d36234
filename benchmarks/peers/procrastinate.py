"""procrastinate: `queueing_lock` refuses a job while one with that lock waits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from procrastinate import App, PsycopgConnector
from procrastinate.exceptions import AlreadyEnqueued

from benchmarks.peers.job import HOUR, SERVER, ran

app = App(connector=PsycopgConnector(conninfo=SERVER))


@app.task
async def job(id: str) -> None:
    ran()


@asynccontextmanager
async def connect() -> AsyncIterator[None]:
    async with app.open_async():
        if not await app.check_connection_async():  # the database is empty
            await app.schema_manager.apply_schema_async()
        yield


def _in(delay: float | None, **options: object) -> object:
    if delay is not None:
        options["schedule_in"] = {"seconds": delay}
    return job.configure(**options)


async def enqueue(id: str, delay: float | None) -> None:
    await _in(delay).defer_async(id=id)


async def duplicate() -> bool:
    try:
        await _in(HOUR, queueing_lock="known").defer_async(id="known")
    except AlreadyEnqueued:
        return True
    return False


async def enqueue_many(ids: list[str], delay: float | None) -> None:
    await _in(delay).batch_defer_async(*({"id": id} for id in ids))
