"""A process with OpenTelemetry and `contrib.opentelemetry`: the spans of evaluations of every sort.

    python -m tests.integration.spans instrumented|plain BROKER_URL

It patches Celery for good, and so is a process of its own. The spans are printed as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from celery import Celery
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from celery_goalstate import Engine, Entity, Requeue
from celery_goalstate.contrib.opentelemetry import install
from celery_goalstate.exceptions import EntityGone, PermanentError
from tests.integration.conftest import Truth, World, worker_of
from tests.servers import poll

FAILURES, ROUNDS = 2, 4
BATCH = "123"
HOUR = 3600
ENQUEUED = ("done", "retried", "requeued", "parked", "ping", "quarantined", "gone", "batch")

#: How often each entity of the shop is evaluated.
EVALUATIONS = {
    "done": 1,
    "retried": FAILURES + 1,
    "requeued": ROUNDS,
    "parked": 1,
    "ping": ROUNDS,
    "pong": ROUNDS,
    "quarantined": 1,
    "gone": 1,
    "twice": 2,
    **dict.fromkeys(BATCH, 2),
}


def main(lane: str, url: str) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    if lane == "instrumented":
        from opentelemetry.instrumentation.celery import CeleryInstrumentor

        CeleryInstrumentor().instrument()
    tracer = trace.get_tracer("test")

    shop = Shop(url)
    with shop.worker():
        for id in ENQUEUED:
            with tracer.start_as_current_span("request", attributes={"of": id}):
                shop.enqueue(id)
        with tracer.start_as_current_span("request", attributes={"of": "twice"}):
            for times in (1, 2):
                shop.enqueue("twice")
                poll("it is evaluated", lambda n=times: shop.evaluations("twice") >= n, timeout=30)
        poll("all are evaluated", shop.is_done, timeout=60)
        poll("all spans have ended", lambda: shop.have_ended(exporter), timeout=30)
    an_hour_ahead(tracer)
    eagerly(tracer)
    print(json.dumps([as_json(span) for span in exporter.get_finished_spans()]))


class Shop:
    """Orders of every sort, and parcels that share tasks."""

    def __init__(self, url: str) -> None:
        self.app = Celery("shop", broker=url)
        self.app.conf.update(
            broker_connection_retry_on_startup=True,
            worker_hijack_root_logger=False,
            goalstate_failure_retry_delay=0.02,
            goalstate_eta_horizon=0.1,
            goalstate_sweep_interval=0.1,
            goalstate_converge=False,
        )
        self.engine = engine = Engine(self.app)
        install(engine)
        install(engine)  # changes nothing
        seen: dict[str, int] = {}
        self._seen = seen

        class Order(Entity):
            def get_state(self) -> str:
                return "paid"

            def get_goal_state(self) -> str:
                return "shipped"

            def get_action_list(self, state: Any, goal_state: Any) -> Any:
                return ["charge", "ship"]

            def charge(self, ctx: Any) -> None:
                seen[self.id] = seen.get(self.id, 0) + 1

            def ship(self, ctx: Any) -> Any:
                times = seen[self.id]
                match self.id:
                    case "retried" if times <= FAILURES:
                        raise ConnectionError("no route to host")
                    case "requeued" if times < ROUNDS:
                        return Requeue(0.05)
                    case "quarantined":
                        raise PermanentError("card stolen")
                    case "gone":
                        raise EntityGone
                    case "ping":
                        ctx.enqueue(Order("pong"))
                    case "pong" if times < ROUNDS:
                        ctx.enqueue(Order("ping"))
                return None

        @engine.register(batch_size=10)
        class Parcel(Order):
            def ship(self, ctx: Any) -> Any:
                return Requeue(0.05) if seen[self.id] < 2 else None

        self._order, self._parcel = engine.register(Order), Parcel

    def worker(self) -> Any:
        return worker_of(self.app)

    def enqueue(self, id: str) -> None:
        if id == "batch":
            self.engine.enqueue_many(map(self._parcel, BATCH))
        else:
            self.engine.enqueue(self._order(id), 0.5 if id == "parked" else None)

    def evaluations(self, id: str) -> int:
        return self._seen.get(id, 0)

    def is_done(self) -> bool:
        return self._seen == EVALUATIONS

    def have_ended(self, exporter: InMemorySpanExporter) -> bool:
        spans = exporter.get_finished_spans()
        ended = sum("goalstate.outcome" in (span.attributes or {}) for span in spans)
        return ended == sum(EVALUATIONS.values())


def an_hour_ahead(tracer: trace.Tracer) -> None:
    """With a clock that the test moves, a sweeper, and a worker that gets the message."""
    world = a_world(broker="memory://")
    with tracer.start_as_current_span("request", attributes={"of": "ahead"}):
        world.engine.enqueue(world.entity("ahead"), HOUR)
    world.clock.advance(HOUR)
    world.sweeper().sweep()
    world.clock.advance(1)  # a sweep sends what is due within the horizon
    with worker_of(world.app):
        poll("it is evaluated", lambda: world.truth.looks("ahead"), timeout=30)


def eagerly(tracer: trace.Tracer) -> None:
    world = a_world(task_always_eager=True)
    with tracer.start_as_current_span("request", attributes={"of": "eager"}):
        for _ in range(2):
            world.engine.enqueue(world.entity("eager"))


def a_world(broker: str = "memory://", **conf: Any) -> World:
    app = Celery(f"world{len(conf)}", broker=broker, set_as_current=False)
    app.conf.update(
        task_default_queue=app.main,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_transport_options={"polling_interval": 0.01},
        **conf,
    )
    world = World(app, Truth())
    install(world.engine)
    return world


def as_json(span: ReadableSpan) -> dict[str, Any]:
    def name(context: Any) -> str:
        return f"{context.trace_id:032x}/{context.span_id:016x}"

    return {
        "name": span.name,
        "id": name(span.context),
        "parent": name(span.parent) if span.parent else None,
        "links": [name(link.context) for link in span.links],
        "attributes": dict(span.attributes or {}),
        "status": span.status.status_code.name,
        "exceptions": [(event.attributes or {})["exception.type"] for event in span.events],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
