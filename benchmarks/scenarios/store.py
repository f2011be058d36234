"""Bytes that the server needs for each entity that waits, and for each of plain Celery's delayed messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TypeVar

from benchmarks.app import Order, engine
from benchmarks.bench import Bench
from benchmarks.plain import plain
from celery_goalstate.index.base import Claim, Report, Request, Verdict, random_id

T = TypeVar("T")

HOUR = 3600.0
HOUR_MS = 3_600_000


def run(bench: Bench) -> None:
    entities, messages = bench.size(100_000, 1000), bench.size(5000, 100)

    bench.flush()
    engine.enqueue(Order("warm"), HOUR)
    before = used_memory(bench)
    engine.enqueue_many((Order(f"{n:010}") for n in range(entities)), HOUR)
    bench.note("bytes per waiting entity", (used_memory(bench) - before) / entities)

    index = engine.parts.index
    for name, verdict, error in (
        ("idle", Verdict.DONE, ""),
        ("failing", Verdict.FAILED, "ConnectionError: no route to host"),
    ):
        bench.flush()
        engine.enqueue(Order("warm"), HOUR)
        before = used_memory(bench)
        for batch in batched((f"{n:010}" for n in range(entities // 10)), 1000):
            requests = [Request(id, delay=0, task_id=random_id()) for id in batch]
            wakeups = [each.wakeup for each in index.enqueue("order", requests) if each.wakeup]
            pairs = [(wakeup.id, wakeup.token) for wakeup in wakeups]
            claims = index.claim("order", pairs, nonce=random_id(), task_id=random_id())
            held = [claim for claim in claims if isinstance(claim, Claim)]
            delay, failures = (HOUR_MS, 1) if error else (None, 0)
            reports = [
                Report(each.id, each.lease, verdict, delay, failures, error=error, converged=not error,
                       task_id=random_id(), fresh_task_id=random_id(), idle_ttl=HOUR_MS)
                for each in held
            ]  # fmt: skip
            index.finish("order", reports)
        bench.note(f"bytes per {name} entity", (used_memory(bench) - before) / (entities // 10))

    bench.flush()
    plain.apply_async(("warm",))
    before = used_memory(bench)
    for n in range(messages):
        plain.apply_async((f"{n:010}",), eta=datetime.now(UTC) + timedelta(hours=1))
    bench.note("bytes per delayed task", (used_memory(bench) - before) / messages)


def batched(some: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(some)
    while batch := list(islice(iterator, size)):
        yield batch


def used_memory(bench: Bench) -> int:
    return int(bench.server.info("memory")["used_memory"])
