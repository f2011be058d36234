"""What a worker lets the index count: each evaluation, how late it was, and what its actions took."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from celery_goalstate import Engine, Entity, Requeue, Status
from celery_goalstate.exceptions import EntityGone, IndexUnavailable, PermanentError
from celery_goalstate.index.counters import BOUNDS, Histogram, Metrics, Outcome, Result
from celery_goalstate.metrics import REASONS, Collector, registry_of
from tests.integration.conftest import MakeApp, Truth, World
from tests.servers import Valkey, frozen


def metrics(world: World, kind: str = "order") -> Metrics:
    return world.index.metrics([kind])[kind]


def action(world: World, name: str, seconds: float = 0.0, said: Any = None) -> Callable[..., Any]:
    """An action that takes so long, and returns this, or raises it."""

    def execute(ctx: Any, entity: Entity) -> Any:
        world.clock.advance(seconds)
        if isinstance(said, BaseException):
            raise said
        return world.truth.reach(ctx, entity) if said is None else said

    execute.__name__ = name
    return execute


def test_how_late_it_began_and_what_its_actions_took(world: World) -> None:
    world.truth.set("1", action(world, "charge", 0.2), action(world, "ship", 7))
    world.engine.enqueue(world.entity("1"))
    world.clock.advance(0.04)
    world.run()
    found = metrics(world)
    assert found.evaluations == {"converged": 1}
    assert found.lateness == Histogram(Counter({"50": 1}), 40)
    assert found.actions == {
        ("charge", "ok"): Histogram(Counter({"250": 1}), 200),
        ("ship", "ok"): Histogram(Counter({"10000": 1}), 7_000),
    }


def test_by_outcome(world: World) -> None:
    for id, said in (
        ("fails", ConnectionError("no route")),
        ("is quarantined", PermanentError("never")),
        ("waits", Requeue(5)),
        ("is gone", EntityGone()),
    ):
        world.truth.set(id, action(world, "charge", 0.03, said))
        world.engine.enqueue(world.entity(id))
    world.run()
    found = metrics(world)
    assert found.evaluations == {"failed": 1, "quarantined": 1, "requeued": 1, "gone": 1}
    assert found.actions["charge", "failed"] == Histogram(Counter({"50": 3}), 90)
    assert found.actions["charge", "ok"] == Histogram(Counter({"50": 1}), 30)


def test_one_whose_worker_was_killed(world: World) -> None:
    world.truth.set("1", action(world, "charge"))
    world.engine.enqueue(world.entity("1"))
    [message] = world.messages()
    [pair] = message.args[0]
    world.index.claim("order", [tuple(pair)], nonce="of a worker that is killed", task_id=message.id)
    world.lose_workers()
    world.clock.advance(world.engine.settings.kind.failure_retry_delay)
    world.run()
    assert metrics(world).evaluations == {"lost": 1, "converged": 1}
    assert metrics(world).lateness.counts.total() == 1, "only of what was seen to its end"


def test_in_a_batch_each_for_itself(make_world: Callable[..., World]) -> None:
    world = make_world(goalstate_batch_size=10, goalstate_jitter=False)
    for n in range(4):
        world.truth.set(str(n), action(world, "charge", 0.03))
    world.engine.enqueue_many(world.entity(str(n)) for n in range(4))
    world.run()
    assert metrics(world).evaluations == {"converged": 4}
    assert metrics(world).lateness.counts.total() == 4
    assert metrics(world).actions["charge", "ok"] == Histogram(Counter({"50": 4}), 120)


def test_a_name_of_any_length_is_cut(world: World) -> None:
    world.truth.set("1", action(world, "ä" * 100))
    world.engine.enqueue(world.entity("1"))
    world.run()
    assert set(metrics(world).actions) == {("ä" * 30, "ok")}


# For Prometheus ----------------------------------------------------------------------------------

#: An action's name that has to be quoted.
ODD = 'with "quotes", \\n and ü'
HISTOGRAM = ("bucket", "count", "sum")
#: The table of the contract: name -> type, labels.
CONTRACT = {
    "goalstate_index_up": ("gauge", set()),
    **dict.fromkeys(
        (
            *("goalstate_sweeper_up", "goalstate_paused"),
            *("goalstate_entities_overdue", "goalstate_entities_failing"),
            *("goalstate_oldest_overdue_seconds", "goalstate_longest_running_seconds"),
            "goalstate_longest_failing_seconds",
        ),
        ("gauge", {"kind"}),
    ),
    "goalstate_entities": ("gauge", {"kind", "status"}),
    "goalstate_evaluations": ("counter", {"kind", "outcome"}),
    "goalstate_lateness_seconds": ("histogram", {"kind"}),
    "goalstate_action_duration_seconds": ("histogram", {"kind", "action", "outcome"}),
    "goalstate_enqueues": ("counter", {"kind", "result"}),
    "goalstate_refusals": ("counter", {"kind", "reason"}),
    "goalstate_resends": ("counter", {"kind"}),
    "goalstate_fenced": ("counter", {"kind"}),
}


def scraped(engine: Engine) -> dict[str, Metric]:
    """As Prometheus reads it."""
    text = generate_latest(registry_of(engine)).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(engine: Engine, name: str) -> dict[tuple[str, ...], float]:
    """The values of one metric of kind `order`, by those of its other labels, in order of their names."""
    return {
        tuple(text for label, text in sample.labels.items() if label != "kind"): sample.value
        for family in scraped(engine).values()
        for sample in family.samples
        if sample.name == name and sample.labels.get("kind", "order") == "order"
    }


def evaluated(world: World) -> Engine:
    """An engine of which there is something to tell."""
    world.truth.set("1", action(world, "charge", 0.2))
    world.truth.set("2", action(world, ODD, 400, ConnectionError("order/2 has no route")))
    world.engine.enqueue_many(world.entity(id) for id in ("1", "2"))
    world.clock.advance(0.04)
    world.run()
    return world.engine


def test_names_types_and_labels_are_those_of_the_contract(world: World) -> None:
    found = scraped(evaluated(world))
    assert found.keys() == CONTRACT.keys()
    for name, family in found.items():
        labels = {label for sample in family.samples for label in sample.labels if label != "le"}
        assert (family.type, labels) == CONTRACT[name], name


def test_no_label_says_which_entity_task_worker_or_error(world: World) -> None:
    for family in scraped(evaluated(world)).values():
        for sample in family.samples:
            known = {
                *("order", "charge", ODD, "ok", "failed"),
                *(*Status, *Outcome, *Result, *REASONS),
                *(sample.labels.get("le", ""), "+Inf"),
            }
            assert set(sample.labels.values()) <= known, sample


def test_counters_and_histograms_have_what_was_counted(world: World) -> None:
    engine = evaluated(world)
    assert samples(engine, "goalstate_evaluations_total") == {
        **{(outcome,): 0 for outcome in Outcome},
        ("converged",): 1,
        ("failed",): 1,
    }
    assert samples(engine, "goalstate_lateness_seconds_sum") == {(): 0.28}
    buckets = samples(engine, "goalstate_lateness_seconds_bucket")
    assert (buckets["0.025",], buckets["0.05",], buckets["0.1",], buckets["+Inf",]) == (0, 1, 1, 2)
    assert list(buckets) == [(str(bound / 1000),) for bound in BOUNDS] + [("+Inf",)]
    durations = samples(engine, "goalstate_action_duration_seconds_bucket")
    assert durations["charge", "0.25", "ok"] == 1
    assert durations[ODD, "300.0", "failed"] == 0
    assert durations[ODD, "+Inf", "failed"] == 1
    assert samples(engine, "goalstate_enqueues_total")["new",] == 2


def test_gauges_have_what_there_is(world: World) -> None:
    engine = evaluated(world)
    world.engine.enqueue(world.entity("3"))
    world.engine.pause(world.entity)
    world.clock.advance(7)
    assert samples(engine, "goalstate_entities") == {
        ("scheduled",): 2, ("running",): 0, ("idle",): 1, ("failed",): 0
    }  # fmt: skip
    one = {
        "goalstate_index_up": 1,
        "goalstate_sweeper_up": 0,
        "goalstate_paused": 1,
        "goalstate_entities_overdue": 1,
        "goalstate_entities_failing": 1,
        "goalstate_oldest_overdue_seconds": 7,
        "goalstate_longest_failing_seconds": 7,
        "goalstate_longest_running_seconds": 0,
    }
    assert {name: samples(engine, name)[()] for name in one} == one
    world.sweeper().sweep()
    assert samples(engine, "goalstate_sweeper_up") == {(): 1}


def test_no_age_is_negative_when_the_clock_was_set_back(world: World) -> None:
    engine = evaluated(world)
    world.engine.enqueue(world.entity("3"))
    world.clock.advance(-3_600)
    for family in scraped(engine).values():
        for sample in family.samples:
            assert sample.value >= 0, sample


def test_without_counters_there_is_still_what_there_is(make_world: Callable[..., World]) -> None:
    world = make_world({"metrics": False}, goalstate_metrics=False)
    world.engine.enqueue(world.entity("1"))
    found = scraped(world.engine)
    assert samples(world.engine, "goalstate_entities")["scheduled",] == 1
    assert [name for name, family in found.items() if family.type != "gauge" and family.samples] == []


class TestAwayIndex:
    @pytest.fixture
    def engine(self, make_app: MakeApp, truth: Truth, tmp_path: Path) -> Iterator[tuple[Engine, Valkey]]:
        with Valkey(tmp_path) as server:
            app = make_app(goalstate_index_url=server.url, goalstate_index_timeout=0.3)
            engine = Engine(app)
            engine.register(truth.entity())
            yield engine, server

    def test_is_all_that_is_told(
        self, engine: tuple[Engine, Valkey], caplog: pytest.LogCaptureFixture
    ) -> None:
        shop, server = engine
        registry = registry_of(shop)
        assert registry.get_sample_value("goalstate_index_up") == 1
        with frozen(server.pid):
            for _ in range(2):
                text = generate_latest(registry).decode()
                told = [family.name for family in text_string_to_metric_families(text)]
                assert told == ["goalstate_index_up"]
                assert registry.get_sample_value("goalstate_index_up") == 0
        assert len([line for line in caplog.messages if "no metrics" in line]) == 1, "once"
        assert registry.get_sample_value("goalstate_index_up") == 1, "it has returned"

    def test_nor_is_a_stopped_one_an_exception(self, engine: tuple[Engine, Valkey]) -> None:
        shop, server = engine
        server.stop()
        assert samples(shop, "goalstate_index_up") == {(): 0}

    def test_where_a_part_is_away_the_kinds_of_which_all_is_known_are_there(self, world: World) -> None:
        world.register("host")
        whole = world.engine.overview()

        def overview() -> Any:
            raise IndexUnavailable(known=whole, away=["host (shard 1)"])

        world.engine.overview = overview
        assert samples(world.engine, "goalstate_index_up") == {(): 0}
        kinds = {s.labels["kind"] for f in scraped(world.engine).values() for s in f.samples if s.labels}
        assert kinds == {"order"}

    def test_nor_is_a_mistake_anybody_else_s_trouble(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        def overview() -> Any:
            raise RuntimeError("a mistake")

        world.engine.overview = overview
        assert samples(world.engine, "goalstate_index_up") == {(): 0}
        assert caplog.records[0].exc_info


# As `promtool check metrics` has it, written anew.
TYPES = {"gauge", "counter", "histogram", "summary"}
NO_BASE_UNITS = {
    *("s", "ms", "us", "ns", "sec", "min", "m", "h", "d", "b", "kb", "mb", "gb", "tb", "pb"),
    *("milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "weeks"),
    *("bits", "kilobytes", "megabytes", "gigabytes", "percent", "percentage"),
}


def test_names_are_as_promtool_wants_them(world: World) -> None:
    families = list(Collector(evaluated(world)).collect())
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.documentation
        for name in {sample.name for sample in family.samples}:
            assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name), "no colons, no camelCase"
            words = name.split("_")
            assert (words[-1] == "total") == (family.type == "counter"), name
            assert (words[-1] in HISTOGRAM) == (family.type == "histogram"), name
            assert not TYPES & set(words), name
            assert not NO_BASE_UNITS & set(words), name
        for sample in family.samples:
            assert all(re.fullmatch(r"[a-z][a-z_]*", label) for label in sample.labels)
            assert not {"quantile", "job", "instance"} & sample.labels.keys(), "Prometheus' own"
            assert ("le" in sample.labels) == sample.name.endswith("_bucket")
