"""A million entities: what they cost the worker, the index and each operation, and how fast they are done."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from itertools import islice

from benchmarks.app import Crowd, Small, engine
from benchmarks.bench import Bench, Worker, await_ready, microseconds, progress, until
from benchmarks.plain import app, plain
from benchmarks.scenarios.evaluate import pending, plain_done, plain_left, publish_plain
from benchmarks.scenarios.store import used_memory
from celery_goalstate import Entity
from celery_goalstate.index import open_index
from celery_goalstate.index.base import Claim, Finish, Index, Report, Request, Verdict

HOUR, DAY = 3600.0, 86_400.0


def run(bench: Bench) -> None:
    few, many = bench.size(1000, 100), bench.size(1_000_000, 2000)
    bench.flush()
    engine.enqueue_many(map(Small, ids(few)), DAY, spread=HOUR)
    bench.remark(f"Few are {few:,}, all (or many) are {many:,}, in one index.")
    fill(bench, many)
    compare_costs(bench)
    evaluate_all(bench, many)
    evaluate_plain(bench, many)
    hold_plain(bench)


def ids(number: int) -> list[str]:
    """Of ten characters."""
    return [f"{n:010}" for n in range(number)]


def fill(bench: Bench, many: int) -> None:
    """Schedule all of them over an hour of deadlines, under the eyes of a worker."""
    before = used_memory(bench)
    everyone = map(Crowd, ids(many))
    took, scheduled = 0.0, 0
    with Worker("benchmarks.app") as worker:
        await_ready(app, [worker])
        for number in (0, many // 10, many):
            began = time.perf_counter()
            scheduled += engine.enqueue_many(islice(everyone, number - scheduled), DAY, spread=HOUR)
            took += time.perf_counter() - began
            settle(bench)
            bench.note("scheduled entities", scheduled)
            bench.note("worker's memory, bytes", worker.memory())
    first, *_, last = bench.measured["worker's memory, bytes"]
    bench.note("worker's bytes per scheduled entity", (last - first) / many)
    bench.note("seconds to schedule all", took)
    bench.note("bytes in the index per entity", (used_memory(bench) - before) / many)


def settle(bench: Bench) -> None:
    """Let the worker sweep a few times: there is nothing to see that one could wait for."""
    time.sleep(bench.size(4, 0))  # as the line above says


def compare_costs(bench: Bench) -> None:
    """What one more entity costs beside few and beside many, in turns."""
    calls = bench.size(200, 10)
    fresh = [str(10**9 + n) for n in range(calls)]
    index = open_index(engine.settings)
    sizes: dict[str, type[Entity]] = {"among few": Small, "among many": Crowd}
    for _ in range(bench.rounds):
        for size, cls in sizes.items():
            new = map(cls, fresh)
            bench.note(
                f"enqueue, {size}", microseconds(lambda new=new: engine.enqueue(next(new), DAY), calls)
            )
            engine.delete_many(map(cls, fresh))
            claim, finish = claim_and_finish(index, cls.kind, fresh)
            bench.note(f"claim, {size}", claim)
            bench.note(f"finish, {size}", finish)
            engine.delete_many(map(cls, fresh))
    index.close()


def claim_and_finish(index: Index, kind: str, fresh: list[str]) -> tuple[float, float]:
    """Microseconds that each takes, one entity a call."""
    requests = [Request(id, delay=0, task_id=id) for id in fresh]
    wakeups = [each.wakeup for each in index.enqueue(kind, requests) if each.wakeup]
    leases: list[str] = []

    def claim() -> None:
        wakeup = wakeups[len(leases)]
        [claimed] = index.claim(
            kind, [(wakeup.id, wakeup.token)], nonce=wakeup.task_id, task_id=wakeup.task_id
        )
        assert isinstance(claimed, Claim), claimed
        leases.append(claimed.lease)

    runs = zip(fresh, leases, strict=False)  # filled by the claims

    def finish() -> None:
        id, lease = next(runs)
        [finished] = index.finish(kind, [Report(id, lease, Verdict.DONE, delay=None, idle_ttl=1000)])
        assert finished.result is Finish.ACCEPTED, finished

    return microseconds(claim, len(fresh)), microseconds(finish, len(fresh))


def evaluate_all(bench: Bench, many: int) -> None:
    """All are made due, then evaluated by two workers."""
    bench.server.delete("celery", "unacked", "unacked_index")
    engine.pause("crowd")
    engine.enqueue_many(map(Crowd, ids(many)))
    with Worker("benchmarks.app") as first, Worker("benchmarks.app") as second:
        await_ready(app, [first, second])
        began = time.perf_counter()
        engine.resume("crowd")
        until("all are evaluated", lambda: pending(Crowd) == 0, every=0.05)
        took = time.perf_counter() - began
    bench.note("seconds to evaluate all, two workers", took)
    bench.note("evaluations a second, two workers", many / took)


def evaluate_plain(bench: Bench, many: int) -> None:
    """As many plain tasks would take so long, going by a part of them."""
    part = bench.size(50_000, 200)
    bench.flush()
    publish_plain(part)
    with Worker("benchmarks.plain"), Worker("benchmarks.plain"):
        took = progress(lambda: plain_done(bench), lambda: plain_left(bench) < part)
    bench.note("tasks a second, two workers", part / took)
    bench.note("seconds for as many tasks, two workers", took / part * many)
    bench.remark(f"As many plain tasks: extrapolated from {part:,}.")


def hold_plain(bench: Bench) -> None:
    """What a plain worker needs to hold delayed tasks."""
    held = bench.size(20_000, 200)
    bench.flush()
    with Worker("benchmarks.plain") as worker:
        await_ready(app, [worker])
        settle(bench)
        before = worker.memory()
        with app.producer_or_acquire() as producer, producer.batch(500):
            for n in range(held):
                eta = datetime.now(UTC) + timedelta(days=1)
                plain.apply_async((f"{n:010}",), eta=eta, producer=producer)
        until("the worker holds all", lambda: bench.server.hlen("unacked") == held)
        settle(bench)
        after = worker.memory()
    bench.note("delayed tasks", 0, held)
    bench.note("plain worker's memory, bytes", before, after)
    bench.note("plain worker's bytes per delayed task", (after - before) / held)
