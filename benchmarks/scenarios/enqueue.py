"""What it costs a producer to say "look at this entity then", in microseconds."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import count

from benchmarks.app import Order, engine
from benchmarks.bench import Bench, microseconds
from benchmarks.plain import plain, server

HOUR = 3600.0


def run(bench: Bench) -> None:
    calls, many, ids = bench.size(300, 20), bench.size(1000, 50), count()
    known = Order("known")

    def each(call: Callable[[], object]) -> Callable[[], float]:
        return lambda: microseconds(call, calls)

    def in_an_hour() -> datetime:
        return datetime.now(UTC) + timedelta(hours=1)

    def enqueue_many(deadline: float | None) -> Callable[[], float]:
        return lambda: microseconds(
            lambda: engine.enqueue_many((Order(next(ids)) for _ in range(many)), deadline), 1, each=many
        )

    bench.take_turns(
        bench.rounds,
        {
            "SET": each(lambda: server.set("key", "value")),
            "apply_async": each(lambda: plain.apply_async(("42",))),
            "apply_async(eta=)": each(lambda: plain.apply_async(("42",), eta=in_an_hour())),
            "enqueue, due now": each(lambda: engine.enqueue(Order(next(ids)))),
            "enqueue, far": each(lambda: engine.enqueue(Order(next(ids)), HOUR)),
            "enqueue, coalesced": each(lambda: engine.enqueue(known, 2 * HOUR)),
            "enqueue_many, far": enqueue_many(HOUR),
            "enqueue_many, due now": enqueue_many(None),
        },
        before=lambda: _warm_up(known),
    )


def _warm_up(known: Order) -> None:
    """Connections are open, scripts are known, and so is one entity."""
    server.ping()
    plain.apply_async(("42",))
    engine.enqueue(Order("warm"))
    engine.enqueue(known, HOUR)
