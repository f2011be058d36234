"""docket: refuses a task whose key is known."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from docket import Docket
from docket.execution import Disposition, Execution

from benchmarks.peers.job import HOUR, SERVER, ran

docket = Docket(url=SERVER)


async def job(id: str) -> None:
    ran()


tasks = [job]


def connect() -> Docket:
    return docket


def _when(delay: float | None) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=delay or 0)


async def enqueue(id: str, delay: float | None) -> Execution:
    return await docket.add(job, when=_when(delay), key=id)(id)


async def duplicate() -> bool:
    return (await enqueue("known", HOUR)).disposition is Disposition.ALREADY_SCHEDULED


async def enqueue_many(ids: list[str], delay: float | None) -> None:
    when = _when(delay)
    await docket.add_many(docket.call(job, when=when, key=id)(id) for id in ids)
