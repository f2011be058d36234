"""Bytes that the server needs for each entity that waits, and for each of plain Celery's delayed messages."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from benchmarks.app import Order, engine
from benchmarks.bench import Bench
from benchmarks.plain import plain

HOUR = 3600.0


def run(bench: Bench) -> None:
    entities, messages = bench.size(100_000, 1000), bench.size(5000, 100)

    bench.flush()
    engine.enqueue(Order("warm"), HOUR)
    before = used_memory(bench)
    engine.enqueue_many((Order(f"{n:010}") for n in range(entities)), HOUR)
    bench.note("bytes per waiting entity", (used_memory(bench) - before) / entities)

    bench.flush()
    plain.apply_async(("warm",))
    before = used_memory(bench)
    for n in range(messages):
        plain.apply_async((f"{n:010}",), eta=datetime.now(UTC) + timedelta(hours=1))
    bench.note("bytes per delayed task", (used_memory(bench) - before) / messages)


def used_memory(bench: Bench) -> int:
    return int(bench.server.info("memory")["used_memory"])
