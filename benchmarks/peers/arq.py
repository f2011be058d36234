"""arq: refuses a job whose id is known; no way to enqueue many."""

from __future__ import annotations

from arq.connections import ArqRedis, RedisSettings
from arq.jobs import Job
from arq.worker import run_worker

from benchmarks.peers.job import HOUR, SERVER, ran

redis = ArqRedis.from_url(SERVER)


async def job(context: object, id: str) -> None:
    ran()


class Settings:
    functions = (job,)
    redis_settings = RedisSettings.from_dsn(SERVER)


async def enqueue(id: str, delay: float | None) -> Job | None:
    return await redis.enqueue_job("job", id, _job_id=id, _defer_by=delay)


async def duplicate() -> bool:
    return await enqueue("known", HOUR) is None


def work() -> None:
    """As its command does, but without two lines of log for each job."""
    run_worker(Settings)
