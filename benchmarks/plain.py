"""The app that everything is compared with: plain Celery, and nothing else."""

from __future__ import annotations

import os
import time

import redis
from celery import Celery

URL = os.environ.get("BENCHMARK_SERVER", "redis://localhost:6379/0")

app = Celery("benchmark", broker=URL)
app.conf.update(
    task_ignore_result=True,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
)
server = redis.Redis.from_url(URL)


def note_lateness(id: str) -> None:
    """Note how late this is. The id says of what it is a sample, and its deadline: near/3/1764000000.25."""
    sample, _, deadline = id.split("/")
    server.rpush(f"lateness:{sample}", time.time() - float(deadline))


@app.task(name="plain", shared=False)
def plain(id: str) -> None:
    """Do nothing."""


@app.task(name="punctual", shared=False)
def punctual(id: str) -> None:
    note_lateness(id)
