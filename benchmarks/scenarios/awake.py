"""`enqueue` once more, on processors that never sleep: what it costs without the time that waking up takes.

A virtual processor that idles is slow to wake. Who waits for a reply pays for that, and who computes does
not: it is as much for an `enqueue` with a far deadline as for an `apply_async`, which takes three times as
long.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.bench import Bench
from benchmarks.report import ratio
from benchmarks.scenarios import enqueue

#: Runs when nobody else wants to, until who started it is gone.
BUSY = """
import os
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


def run(bench: Bench) -> None:
    if not hasattr(os, "SCHED_IDLE"):
        bench.remark("Not measured: this system has no scheduling class that yields to everybody.")
        return
    with processors_awake():
        enqueue.run(bench)
    measured = bench.measured
    ratios = (
        f"{ours} {ratio(measured[ours], measured[plain]):.2f} × {plain}"
        for ours, plain in (
            ("enqueue, due now", "apply_async"),
            ("enqueue, far", "SET"),
            ("enqueue, far", "apply_async(eta=)"),
            ("enqueue, coalesced", "SET"),
            ("enqueue, coalesced", "apply_async"),
        )
    )
    bench.remark(f"As ratios: {'; '.join(ratios)}.")


@contextmanager
def processors_awake() -> Iterator[None]:
    """As many endless loops of the lowest scheduling class as there are processors."""
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            loop = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(loop.kill)
        yield
