"""celery-goalstate, with up to 64 evaluations for each message."""

from __future__ import annotations

from benchmarks.peers import goalstate
from benchmarks.peers.goalstate import app, engine
from benchmarks.peers.job import HOUR
from celery_goalstate import Enqueued

__all__ = ["app"]  # for the worker


@engine.register(batch_size=64)
class Small(goalstate.Job):
    """The same, as one of many that share a task."""


def enqueue(id: str, delay: float | None) -> Enqueued:
    return engine.enqueue(Small(id), delay)


def duplicate() -> bool:
    return not enqueue("known", HOUR).changed


def enqueue_many(ids: list[str], delay: float | None) -> None:
    engine.enqueue_many(map(Small, ids), delay)
