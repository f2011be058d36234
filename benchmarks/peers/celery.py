"""Plain Celery: no dedupe, and no way to enqueue many."""

from __future__ import annotations

from celery import Celery

from benchmarks.peers.job import SERVER, ran

app = Celery("peer", broker=SERVER)
app.conf.update(task_ignore_result=True, worker_send_task_events=False)


@app.task
def job(id: str) -> None:
    ran()


def enqueue(id: str, delay: float | None) -> None:
    job.apply_async((id,), countdown=delay)
