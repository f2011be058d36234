"""How many no-op evaluations a worker with one process does in a second, against no-op tasks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from benchmarks.app import Order, Small, engine
from benchmarks.bench import Bench, Worker, progress
from benchmarks.plain import app, plain
from celery_goalstate import Entity, Status


def run(bench: Bench) -> None:
    tasks = bench.size(3000, 50)
    ids = count()

    def plain_tasks(pool: str) -> Callable[[], float]:
        def measure() -> float:
            publish_plain(tasks)
            with Worker("benchmarks.plain", pool=pool):
                return tasks / progress(lambda: plain_done(bench), lambda: plain_left(bench) < tasks)

        return measure

    def entities(cls: type[Entity], number: int, pool: str) -> Callable[[], float]:
        def measure() -> float:
            engine.enqueue_many(cls(next(ids)) for _ in range(number))
            with Worker("benchmarks.app", pool=pool):
                return number / progress(lambda: pending(cls) == 0, lambda: pending(cls) < number)

        return measure

    for pool in ("prefork",) if bench.quick else ("prefork", "solo"):
        bench.take_turns(
            max(1, bench.rounds // 3),
            {
                f"tasks a second, {pool}": plain_tasks(pool),
                f"evaluations a second, {pool}": entities(Order, tasks, pool),
                f"evaluations a second, batch_size=64, {pool}": entities(Small, 10 * tasks, pool),
            },
            before=lambda: None,
        )


def publish_plain(number: int) -> None:
    """As `apply_async` does it, but with few round trips."""
    with app.producer_or_acquire() as producer, producer.batch(500):
        for _ in range(number):
            plain.apply_async(("42",), producer=producer)


def plain_left(bench: Bench) -> int:
    """Messages that no worker has yet."""
    return int(bench.server.llen("celery"))


def plain_done(bench: Bench) -> bool:
    """Whether no message is left, nor one at a worker that it has not begun."""
    return not plain_left(bench) and not bench.server.hlen("unacked")


def pending(cls: type[Entity]) -> int:
    """Entities that are not evaluated yet."""
    counts = engine.counts(cls)[cls.kind]
    return counts[Status.SCHEDULED] + counts[Status.RUNNING]
