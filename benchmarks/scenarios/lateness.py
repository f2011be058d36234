"""How late an evaluation begins: near and far deadlines and plain Celery's ETA side by side in one worker."""

from __future__ import annotations

import random
import statistics
import time
from datetime import UTC, datetime
from itertools import count

from benchmarks.app import Punctual, Small, engine
from benchmarks.bench import Bench, Worker, await_ready
from benchmarks.plain import app, punctual
from benchmarks.scenarios.evaluate import pending

RATE = 1000  #: evaluations a second beside it, where it is not at rest ...
BURST = 20  #: ... in so many bursts


def run(bench: Bench) -> None:
    for load in (0, RATE):
        bench.flush()
        with Worker("benchmarks.app", concurrency=2) as worker:
            await_ready(app, [worker])
            measure(bench, load)


def measure(bench: Bench, load: int) -> None:
    number = bench.size(1000, 20)
    horizon = engine.settings.eta_horizon
    # The first begins when all have been enqueued; near ones have a message at once, far ones do not.
    start = time.time() + (0.5 if bench.quick else 3.0)
    ranges = {
        "near": (start, time.time() + horizon - 0.2),
        "far": (start + horizon, start + 2 * horizon - 3.0 * (not bench.quick)),
    }
    ranges["eta"] = (start, ranges["far"][1])
    choose = random.Random(1)
    samples = [(name, choose.uniform(*ranges[name])) for name in ranges for _ in range(number)]
    choose.shuffle(samples)
    for n, (name, deadline) in enumerate(samples):
        id, when = f"{name}/{n}/{deadline:.6f}", datetime.fromtimestamp(deadline, UTC)
        if name == "eta":
            punctual.apply_async((id,), eta=when)
        else:
            engine.enqueue(Punctual(id), when)

    ran = keep_busy(bench, load, ranges, number)
    beside = f"beside {load:,} a second" if load else "at rest"
    for name in ranges:
        late = sorted(1000 * float(each) for each in bench.server.lrange(f"lateness:{name}", 0, -1))
        quantiles = statistics.quantiles(late, n=1000, method="inclusive")
        bench.note(f"{name}, {beside}: p50 ms", statistics.median(late))
        bench.note(f"{name}, {beside}: p99 ms", quantiles[989])
        bench.note(f"{name}, {beside}: most ms", late[-1])
        bench.measured[f"{name}, {beside}: quantiles"] = quantiles
    if load:
        bench.note(f"evaluations a second, {beside}", ran)
        if ran < 0.95 * load:
            bench.remark(
                f"This machine could not carry {load:,} evaluations a second: there were {ran:,.0f}."
            )


def keep_busy(bench: Bench, load: int, ranges: dict[str, tuple[float, float]], number: int) -> float:
    """Enqueue entities that are due at once until all samples are there; evaluations a second meanwhile."""
    ids, began, bursts = count(), time.monotonic(), 0
    last = max(end for _, end in ranges.values())
    while any(bench.server.llen(f"lateness:{name}") < number for name in ranges):
        if time.time() > last + 60:
            raise TimeoutError("samples are missing a minute after the last deadline")
        if load:
            engine.enqueue_many(Small(next(ids)) for _ in range(load // BURST))
        bursts += 1
        time.sleep(max(0.0, began + bursts / BURST - time.monotonic()))  # the pace of the load
    return (next(ids) - pending(Small)) / (time.monotonic() - began)
