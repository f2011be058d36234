"""Flower's `/metrics`: its own, and after them those of the goal states."""

from __future__ import annotations

from functools import cache
from typing import Any

from flower import urls
from flower.views.monitor import Metrics
from prometheus_client import generate_latest

from celery_goalstate.contrib.flower import content
from celery_goalstate.exceptions import GoalStateError
from celery_goalstate.metrics import registry_of

_registry = cache(registry_of)  # whose collector knows whether it has told that the index is away


def missing() -> list[str]:
    """What this Flower lacks that is needed here."""
    return [] if _place() is not None else ["the handler of /metrics"]


def add(namespace: str | None) -> None:
    """Answer `/metrics` in Flower's place, unless that is done already."""
    place = _place()
    if place is not None and urls.handlers[place][1] is Metrics:
        urls.handlers[place] = (r"/metrics", MetricsPage, {"namespace": namespace})


def _place() -> int | None:
    """Where the handler is, Flower's or ours."""
    for place, handler in enumerate(urls.handlers):
        if isinstance(handler, tuple) and handler[0] == "/metrics" and issubclass(handler[1], Metrics):
            return place
    return None


class MetricsPage(Metrics):  # type: ignore[misc]  # Flower has no types
    """As Flower's, which collects on its event loop: the index is asked in a thread."""

    def initialize(self, namespace: str | None) -> None:
        """Tornado's constructor: of which engine the metrics are."""
        self.namespace = namespace

    async def get(self) -> None:
        """All of Flower's, whatever becomes of ours."""
        await super().get()
        ours = await self.application.blocking_runner.run(
            "goalstate", "metrics", _exposed, self.capp, self.namespace
        )
        self.write(ours)


def _exposed(app: Any, namespace: str | None) -> bytes:
    """The metrics as text; of an app without an engine there are none, and the page says why."""
    try:
        engine = content.open_engine(app, namespace)
    except GoalStateError:
        return b""
    return generate_latest(_registry(engine))
