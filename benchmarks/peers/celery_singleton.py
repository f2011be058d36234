"""celery-singleton: a lock from apply_async to the end of the task; a duplicate is refused."""

from __future__ import annotations

from celery import Celery
from celery_singleton import Singleton

from benchmarks.peers.job import HOUR, SERVER, ran

app = Celery("peer", broker=SERVER)
app.conf.update(task_ignore_result=True, worker_send_task_events=False, singleton_backend_url=SERVER)


@app.task(base=Singleton)
def job(id: str) -> None:
    ran()


def enqueue(id: str, delay: float | None) -> str:
    """The task's id, or that of the one which waits already."""
    return job.apply_async((id,), countdown=delay).id


known: str | None = None


def duplicate() -> bool:
    global known
    before, known = known, enqueue("known", HOUR)
    return known == before
