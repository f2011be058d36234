"""What monitoring asks for, as Prometheus metrics: what there is, and what was counted.

    REGISTRY.register(Collector(engine))

Everything is read from the index at each scrape, in two round trips, and is the same whichever process is
scraped: let one do it. Needs the extra `celery-goalstate[prometheus]`.

Never a label: the id of an entity or a task, a worker, an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector as PrometheusCollector
from prometheus_client.registry import CollectorRegistry

from celery_goalstate.exceptions import IndexUnavailable
from celery_goalstate.index.base import Partial, Refused
from celery_goalstate.index.counters import BOUNDS, Histogram, Metrics, Outcome, Result
from celery_goalstate.overview import Overview

if TYPE_CHECKING:
    from celery_goalstate.engine import Engine

logger = logging.getLogger(__name__)

REASONS = [reason for reason in Refused if reason is not Refused.AWAY]  # which the index cannot count


class Collector(PrometheusCollector):
    """The metrics of one engine. While the index is away it has `goalstate_index_up 0`, and no others.

    Where a part of the index is away, `goalstate_index_up` is 0, too; kinds of which all is known are there.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._up = True

    def describe(self) -> Iterable[Metric]:
        """All metrics, without samples: to register the collector asks no index."""
        return [_up(), *_State(), *_Counted()]

    def collect(self) -> Iterator[Metric]:
        """Read the index. Raises nothing, or it would hide what others collect in this process."""
        try:
            partial, overviews, counted = self._read()
        except Exception as error:  # noqa: BLE001 - see above
            self._log(error)
            yield _up(0)
            return
        self._log(next(iter(partial.away.values()), None))
        incomplete = {shard.partition(" ")[0] for shard in partial.away}
        yield _up(int(not partial.away))
        state = _State()
        for kind, overview in overviews.items():
            if kind not in incomplete:
                state.add(kind, overview)
        yield from state
        counters = _Counted()
        for kind, metrics in counted.items():
            if kind not in incomplete:
                counters.add(kind, metrics)
        yield from counters

    def _read(self) -> tuple[Partial, Mapping[str, Overview], Mapping[str, Metrics]]:
        """What is known of each kind; `IndexUnavailable` if nothing is."""
        engine, partial = self._engine, Partial()
        overviews = partial.known(engine.overview) or {}
        counted: Mapping[str, Metrics] = {}
        if engine.settings.metrics:
            counted = partial.known(lambda: engine.parts.index.metrics(overviews)) or {}
        return partial, overviews, counted

    def _log(self, error: Exception | None) -> None:
        """Once for each time that it is away; a mistake with its traceback."""
        if error is not None and self._up:
            traceback = None if isinstance(error, IndexUnavailable) else error
            logger.warning("there are no metrics while the index is away: %s", error, exc_info=traceback)
        self._up = error is None


def registry_of(engine: Engine) -> CollectorRegistry:
    """A registry with the metrics of this engine, and nothing of the process."""
    registry = CollectorRegistry()
    registry.register(Collector(engine))
    return registry


def _up(value: int | None = None) -> Metric:
    return GaugeMetricFamily("goalstate_index_up", "Whether all of the index answers", value)


class _Families:
    """Metrics, as attributes."""

    def __iter__(self) -> Iterator[Metric]:
        return iter(vars(self).values())


class _State(_Families):
    """What there is."""

    def __init__(self) -> None:
        self.sweeper_up = _gauge("sweeper_up", "Whether a worker sweeps the kind")
        self.paused = _gauge("paused", "Whether the kind is paused")
        self.entities = _gauge("entities", "Entities by status", "status")
        self.overdue = _gauge("entities_overdue", "Entities whose deadline has passed")
        self.failing = _gauge("entities_failing", "Entities that failed and are tried again")
        self.oldest_overdue = _gauge(
            "oldest_overdue_seconds", "How long the longest overdue entity has been due"
        )
        self.longest_running = _gauge("longest_running_seconds", "Age of the evaluation that began first")
        self.longest_failing = _gauge(
            "longest_failing_seconds", "How long the entity fails that does so longest"
        )

    def add(self, kind: str, overview: Overview) -> None:
        self.sweeper_up.add_metric([kind], int(overview.sweeper))
        self.paused.add_metric([kind], int(overview.paused is not None))
        for status, count in overview.counts.items():
            self.entities.add_metric([kind, status], count)
        self.overdue.add_metric([kind], overview.overdue)
        self.failing.add_metric([kind], overview.failing)
        self.oldest_overdue.add_metric([kind], _age(overview.oldest_overdue))
        self.longest_running.add_metric([kind], _age(overview.longest_running))
        self.longest_failing.add_metric([kind], _age(overview.longest_failing))


class _Counted(_Families):
    """What was counted, from 0 on: a counter that appears with its first event hides that from `rate`."""

    def __init__(self) -> None:
        self.evaluations = _counter("evaluations", "Evaluations by how they ended", "outcome")
        self.lateness = _histogram("lateness_seconds", "How long after their deadlines evaluations began")
        self.actions = _histogram(
            "action_duration_seconds", "How long actions took, of accepted evaluations", "action", "outcome"
        )
        self.enqueues = _counter("enqueues", "Enqueues by what they came to", "result")
        self.refusals = _counter("refusals", "Messages that led to no evaluation, by reason", "reason")
        self.resends = _counter("resends", "Messages that were sent once more, for they may be lost")
        self.fenced = _counter("fenced", "Outcomes that were dropped, since the lease was lost")

    def add(self, kind: str, metrics: Metrics) -> None:
        for outcome in Outcome:
            self.evaluations.add_metric([kind, outcome], metrics.evaluations[outcome])
        _add(self.lateness, [kind], metrics.lateness)
        for (name, how), histogram in metrics.actions.items():
            _add(self.actions, [kind, name, how], histogram)
        for result in Result:
            self.enqueues.add_metric([kind, result], metrics.enqueues[result])
        for reason in REASONS:
            self.refusals.add_metric([kind, reason], metrics.refusals[reason])
        self.resends.add_metric([kind], metrics.resends)
        self.fenced.add_metric([kind], metrics.fenced)


def _gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"goalstate_{name}", documentation, labels=["kind", *labels])


def _counter(name: str, documentation: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"goalstate_{name}", documentation, labels=["kind", *labels])


def _histogram(name: str, documentation: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"goalstate_{name}", documentation, labels=["kind", *labels])


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    """Prometheus' buckets contain the shorter ones, and are in seconds."""
    counted, buckets = 0, []
    for bound in BOUNDS:
        counted += histogram.counts[str(bound)]
        buckets.append((str(bound / 1000), counted))
    buckets.append(("+Inf", histogram.counts.total()))
    family.add_metric(labels, buckets, histogram.total / 1000)


def _age(seconds: float | None) -> float:
    return max(0.0, seconds or 0.0)
