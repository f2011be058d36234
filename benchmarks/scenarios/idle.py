"""What a fleet of workers with nothing to do asks of the server, beyond what Celery itself asks."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from typing import Any

from benchmarks.app import engine
from benchmarks.bench import Bench, Worker, await_ready
from benchmarks.plain import app


def run(bench: Bench) -> None:
    workers, seconds = bench.size(10, 2), bench.size(15, 1)
    commands = {}
    for name, module in (("plain", "benchmarks.plain"), ("engine", "benchmarks.app")):
        bench.flush()
        with ExitStack() as stack:
            fleet = [stack.enter_context(Worker(module, pool="solo")) for _ in range(workers)]
            await_ready(app, fleet)
            time.sleep(bench.size(5, 0))  # what starting causes is over
            before, reads_before = asked(bench)
            time.sleep(seconds)  # the time that is measured
            after, reads = asked(bench)
        commands[name] = after - before
        bench.note(f"commands a second, {name}", sum(commands[name].values()) / seconds)
        bench.note(f"round trips per worker and second, {name}", (reads - reads_before) / seconds / workers)
    [own] = bench.measured["round trips per worker and second, engine"]
    [plain] = bench.measured["round trips per worker and second, plain"]
    # How often Celery itself polls is not the engine's doing, and varies from fleet to fleet.
    polls = (commands["engine"]["brpop"] - commands["plain"]["brpop"]) / seconds / workers
    bench.note("round trips per worker and second, added", own - plain - polls)
    for command, number in sorted(commands["engine"].items()):
        if (more := number - commands["plain"][command]) / seconds >= 0.1:
            bench.note(f"commands a second, added: {command}", more / seconds)
    bench.remark(
        f"{workers} workers, {len(engine.kinds)} kinds; commands include those inside the engine's scripts."
    )


def asked(bench: Bench) -> tuple[Counter[str], int]:
    """Calls of each command so far, and packets read: a pipeline of commands is one round trip."""
    stats: Any = bench.server.info("commandstats")
    calls = Counter({name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()})
    return calls, bench.server.info("stats")["total_reads_processed"]
