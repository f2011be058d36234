"""A process with a tracer for real: what it sees of entities that are enqueued, retried, parked and resent.

    python -m tests.integration.traced opentelemetry|sentry BROKER_URL

It patches Celery for good, and so is a process of its own. What it saw is printed as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from celery import Celery

from celery_goalstate import Engine, Entity
from celery_goalstate.messages.notes import LINK
from tests.servers import poll

FAILURES = 3


class Tracer(NamedTuple):
    span: Callable[[str], AbstractContextManager[Any]]
    trace_id: Callable[[], str]  #: of where the caller is
    header: str  #: that names the trace


def opentelemetry() -> Tracer:
    from opentelemetry import trace
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    from opentelemetry.sdk.trace import TracerProvider

    trace.set_tracer_provider(TracerProvider())
    CeleryInstrumentor().instrument()
    tracer = trace.get_tracer("test")

    def trace_id() -> str:
        return f"{trace.get_current_span().get_span_context().trace_id:032x}"

    return Tracer(tracer.start_as_current_span, trace_id, "traceparent")


def sentry() -> Tracer:
    import sentry_sdk
    from sentry_sdk.integrations.celery import CeleryIntegration

    sentry_sdk.init(
        "http://key@127.0.0.1:1/1",
        transport=lambda envelope: None,
        traces_sample_rate=1.0,
        default_integrations=False,
        integrations=[CeleryIntegration()],
    )

    def trace_id() -> str:
        span = sentry_sdk.get_current_span()
        return span.trace_id if span is not None else "none"

    def span(name: str) -> AbstractContextManager[Any]:
        return sentry_sdk.start_transaction(name=name)

    return Tracer(span, trace_id, "sentry-trace")


def main(name: str, url: str) -> None:
    tracer = {"opentelemetry": opentelemetry, "sentry": sentry}[name]()
    from celery.contrib.testing.worker import start_worker  # a worker's modules come after the tracer

    app = Celery("traced", broker=url)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        worker_hijack_root_logger=False,
        goalstate_failure_retry_delay=0.02,
        goalstate_eta_horizon=0.1,
        goalstate_sweep_interval=0.1,
    )
    engine = Engine(app)
    seen: dict[str, list[Any]] = {}

    @engine.register
    class Order(Entity):
        def get_state(self) -> int:
            return len(seen.get(self.id, ()))

        def get_goal_state(self) -> int:
            return FAILURES + 1

        def get_action_list(self, state: int, goal_state: int) -> Any:
            return ["see"]

        def see(self, ctx: Any) -> None:
            request = ctx.task
            headers = {name: getattr(request, name, None) for name in (tracer.header, LINK)}
            if self.id == "near" and self.id not in seen:
                ctx.enqueue(Order("child"))
            evaluations = seen.setdefault(self.id, [])
            evaluations.append(
                {"trace": tracer.trace_id(), "link": headers[LINK], "own": headers[tracer.header]}
            )
            if len(evaluations) <= FAILURES:
                raise ConnectionError

    requests = {}
    for id, delay in (("near", 0), ("parked", 0.5)):
        with tracer.span("request"):
            requests[id] = tracer.trace_id()
            engine.enqueue(Order(id), delay)
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=10):
        poll(
            "all are evaluated",
            lambda: all(len(seen.get(id, ())) > FAILURES for id in ("near", "parked", "child")),
            timeout=30,
        )
    print(json.dumps({"requests": requests, "seen": seen}))


if __name__ == "__main__":
    main(*sys.argv[1:])
