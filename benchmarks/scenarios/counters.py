"""What counting for monitoring costs the index's server: evaluations with counters and without, in turns."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.app import engine
from benchmarks.bench import Bench
from benchmarks.scenarios.store import batched
from celery_goalstate.index.base import Claim, Limits, Report, Request, Verdict, random_id
from celery_goalstate.index.counters import ActionTime
from celery_goalstate.index.redis import RedisIndex

KIND = "order"
HOUR_MS = 3_600_000
ACTIONS = tuple(f"action_{n}" for n in range(6))
TOOK = (0, 1, 3, 12, 40, 130, 700)  # milliseconds


def run(bench: Bench) -> None:
    evaluations = bench.size(2_000, 50)
    bench.flush()
    indexes = {
        "counted": RedisIndex(engine.parts.index._client, Limits(), namespace="counted"),
        "not counted": RedisIndex(engine.parts.index._client, Limits(metrics=False), namespace="bare"),
    }
    chance = random.Random(1)
    for batch, actions in ((1, 0), (1, 1), (1, 2), (50, 1)):
        for turn in range(bench.rounds + 1):
            for name in sorted(indexes, reverse=bool(turn % 2)):
                finish, whole = evaluate(bench, indexes[name], evaluations, batch, actions, chance)
                if turn:  # what happens for the first time costs more
                    bench.note(f"finish, {batch} at once, {actions} actions, {name}", finish)
                    bench.note(f"evaluation, {batch} at once, {actions} actions, {name}", whole)
    bench.remark(f"Microseconds of the server's processor time, by INFO cpu, for each of {evaluations}.")


def evaluate(
    bench: Bench, index: RedisIndex, number: int, batch: int, actions: int, chance: random.Random
) -> tuple[float, float]:
    """What a report costs, and what an enqueue, a claim and a report cost together."""
    ids = [random_id() for _ in range(number)]

    def enqueue(some: Sequence[str]) -> list[Any]:
        requests = [Request(id, 0, task_id=random_id()) for id in some]
        return [scheduled.wakeup for scheduled in index.enqueue(KIND, requests)]

    def claim(some: Sequence[Any]) -> list[Any]:
        pairs = [(wakeup.id, wakeup.token) for wakeup in some]
        return index.claim(KIND, pairs, nonce=random_id(), task_id=random_id())

    def finish(some: Sequence[Report]) -> list[Any]:
        return index.finish(KIND, some)

    wakeups, enqueued = cost(bench, enqueue, ids, batch)
    claims, claimed = cost(bench, claim, wakeups, batch)
    reports = [report(claim, actions, chance) for claim in claims]
    _, finished = cost(bench, finish, reports, batch)
    index.delete(KIND, ids)
    return finished, enqueued + claimed + finished


def cost(
    bench: Bench, call: Callable[[Any], list[Any]], about: Sequence[Any], batch: int
) -> tuple[list[Any], float]:
    """The replies, and microseconds of the server's processor time for each of what they are about."""
    before, replies = processor_time(bench), []
    for some in batched(about, batch):
        replies += call(some)
    return replies, (processor_time(bench) - before) / len(about)


def processor_time(bench: Bench) -> float:
    info: Any = bench.server.info("cpu")
    return 1e6 * float(info["used_cpu_user"] + info["used_cpu_sys"])


def report(claim: Claim, actions: int, chance: random.Random) -> Report:
    return Report(
        claim.id,
        claim.lease,
        Verdict.DONE,
        delay=None,
        state="paid",
        goal="shipped",
        converged=True,
        task_id=random_id(),
        fresh_task_id=random_id(),
        idle_ttl=HOUR_MS,
        began=actions > 0,
        lateness=chance.choice(TOOK),
        actions=tuple(
            ActionTime(name, chance.choice(TOOK), False) for name in chance.sample(ACTIONS, actions)
        ),
    )
