"""celery-once: a lock from apply_async to the end of the task; a duplicate is refused."""

from __future__ import annotations

from celery import Celery
from celery_once import AlreadyQueued, QueueOnce

from benchmarks.peers.job import HOUR, SERVER, ran

app = Celery("peer", broker=SERVER)
app.conf.update(task_ignore_result=True, worker_send_task_events=False)
app.conf.ONCE = {"backend": "celery_once.backends.Redis", "settings": {"url": SERVER}}


@app.task(base=QueueOnce)
def job(id: str) -> None:
    ran()


def enqueue(id: str, delay: float | None) -> None:
    job.apply_async((id,), countdown=delay)


def duplicate() -> bool:
    try:
        enqueue("known", HOUR)
    except AlreadyQueued:
        return True
    return False
