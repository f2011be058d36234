"""`contrib.opentelemetry`: one trace for each evaluation, with Celery's instrumentation and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integration.test_tracers import is_installed
from tests.servers import Valkey

NEEDED = {"instrumented": "opentelemetry.instrumentation.celery", "plain": "opentelemetry.sdk"}
if not all(map(is_installed, NEEDED.values())):
    assert not os.environ.get("GOALSTATE_REQUIRE_SERVICES"), "OpenTelemetry is not installed"
    pytest.skip("OpenTelemetry is not installed", allow_module_level=True)

from celery_goalstate.contrib.opentelemetry import _enqueued_in  # noqa: E402 - installed, as checked
from tests.integration.spans import BATCH, EVALUATIONS, FAILURES, ROUNDS  # noqa: E402 - as above


class Spans:
    """What a process has traced."""

    def __init__(self, spans: list[dict[str, Any]]) -> None:
        self.all = spans
        self.evaluations: dict[str, list[dict[str, Any]]] = {}
        for span in spans:
            if entity := span["attributes"].get("goalstate.entity"):
                self.evaluations.setdefault(entity.partition("/")[2], []).append(span)

    def request(self, id: str) -> str:
        """The span in which an entity was enqueued."""
        [found] = [span["id"] for span in self.all if span["attributes"].get("of") == id]
        return found

    def children(self, span: dict[str, Any]) -> list[dict[str, Any]]:
        return [each for each in self.all if each["parent"] == span["id"]]


@pytest.fixture(scope="module", params=NEEDED)
def spans(
    request: pytest.FixtureRequest, valkey_server: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Spans]:
    command = [sys.executable, "-m", "tests.integration.spans", request.param, valkey_server.url]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    yield Spans(json.loads(done.stdout.splitlines()[-1]))
    with valkey_server.client() as client:
        client.flushall()


def trace_of(span: str) -> str:
    return span.partition("/")[0]


def test_each_evaluation_has_a_span(spans: Spans) -> None:
    expected = {**EVALUATIONS, "ahead": 1, "eager": 2}
    assert {id: len(found) for id, found in spans.evaluations.items()} == expected
    for id, found in spans.evaluations.items():
        kind = "parcel" if id in BATCH else "order"
        assert {span["attributes"]["goalstate.kind"] for span in found} == {kind}


def test_no_trace_holds_two_evaluations(spans: Spans) -> None:
    """Whoever enqueued what, and how often: requests, retries, entities that enqueue each other, batches."""
    evaluations = [span for found in spans.evaluations.values() for span in found]
    traces = Counter(trace_of(span["id"]) for span in evaluations)
    assert set(traces.values()) == {1}
    requests = {trace_of(span["id"]) for span in spans.all if span["name"] == "request"}
    assert not traces.keys() & requests


@pytest.mark.parametrize(
    "id", ["done", "retried", "requeued", "parked", "ahead", "quarantined", "gone", "twice"]
)
def test_each_is_linked_to_its_request(spans: Spans, id: str) -> None:
    for span in spans.evaluations[id]:
        assert span["links"] == [spans.request(id)]


def test_each_of_a_batch_is_linked_to_its_request(spans: Spans) -> None:
    for id in BATCH:
        first = spans.evaluations[id][0]
        assert spans.request("batch") in first["links"]


def test_what_evaluations_enqueue_is_linked_to_their_actions(spans: Spans) -> None:
    ships = {
        id: [child["id"] for span in spans.evaluations[id] for child in spans.children(span)[1:]]
        for id in ("ping", "pong")
    }
    first, *others = spans.evaluations["ping"]
    assert first["links"] == [spans.request("ping")]
    assert [span["links"] for span in spans.evaluations["pong"]] == [[ship] for ship in ships["ping"]]
    assert [span["links"] for span in others] == [[ship] for ship in ships["pong"][: ROUNDS - 1]]


def test_eager_evaluations_are_linked_to_what_is_under_way(spans: Spans) -> None:
    request = trace_of(spans.request("eager"))
    for span in spans.evaluations["eager"]:
        assert [trace_of(link) for link in span["links"]] == [request]


@pytest.mark.parametrize(
    ("id", "outcomes"),
    [
        ("done", ["done"]),
        ("retried", ["failed"] * FAILURES + ["done"]),
        ("requeued", ["requeued"] * (ROUNDS - 1) + ["done"]),
        ("quarantined", ["quarantined"]),
        ("gone", ["gone"]),
        ("ahead", ["converged"]),
        *((id, ["requeued", "done"]) for id in BATCH),
    ],
)
def test_a_span_says_how_the_evaluation_ended(spans: Spans, id: str, outcomes: list[str]) -> None:
    found = [span["attributes"] for span in spans.evaluations[id]]
    assert [attributes["goalstate.outcome"] for attributes in found] == outcomes
    states = {(attributes["goalstate.state"], attributes["goalstate.goal"]) for attributes in found}
    assert states == {("new", "new") if id == "ahead" else ("paid", "shipped")}


def test_a_failure_is_an_error_with_its_exception(spans: Spans) -> None:
    for id, found in spans.evaluations.items():
        for number, span in enumerate(found):
            fails = (id == "retried" and number < FAILURES) or id == "quarantined"
            assert span["status"] == ("ERROR" if fails else "UNSET"), id
            assert bool(span["exceptions"]) == fails
    assert spans.evaluations["retried"][0]["exceptions"] == ["ConnectionError"]


def test_each_action_is_a_child(spans: Spans) -> None:
    for id, found in spans.evaluations.items():
        for number, span in enumerate(found):
            fails = (id == "retried" and number < FAILURES) or id == "quarantined"
            actions = [("charge", "UNSET"), ("ship", "ERROR" if fails else "UNSET")]
            children = [(child["name"], child["status"]) for child in spans.children(span)]
            assert children == ([] if id in ("ahead", "eager") else actions)


@pytest.mark.parametrize(
    "link", [None, "x", [], {"traceparent": 7}, {"traceparent": "00-zz"}, {"traceparent": None}]
)
def test_a_link_that_names_no_trace_is_none(link: Any) -> None:
    """Whoever can send messages can send any."""
    assert not _enqueued_in(SimpleNamespace(goalstate_link=link)).is_valid
