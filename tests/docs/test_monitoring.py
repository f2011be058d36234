"""The dashboard and the alerts: well-formed, and of metrics, labels and kinds of values that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from celery import Celery
from prometheus_client.core import Metric

from celery_goalstate import Engine
from celery_goalstate.metrics import Collector
from celery_goalstate.settings import KindOptions
from tests.docs.pages import ROOT
from tests.docs.test_docs import table

ALERTS = yaml.safe_load((ROOT / "docs/alerts.yml").read_text())
BOARD = json.loads((ROOT / "docs/grafana.json").read_text())
RULES = {rule["alert"]: rule for group in ALERTS["groups"] for rule in group["rules"]}
EXPRESSIONS = {
    **{name: rule["expr"] for name, rule in RULES.items()},
    **{
        f"{panel['title']}, {target['refId']}": target["expr"]
        for panel in BOARD["panels"]
        for target in panel["targets"]
    },
    "the dashboard's kinds": BOARD["templating"]["list"][1]["definition"],
}
OF_A_TYPE = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}


def families() -> Iterator[Metric]:
    return iter(Collector(Engine(Celery("monitored", set_as_current=False))).describe())


def names() -> dict[str, Metric]:
    """What an expression may name: a metric with the suffixes of its type."""
    return {f"{family.name}{suffix}": family for family in families() for suffix in OF_A_TYPE[family.type]}


def labels_of(family: Metric) -> set[str]:
    return {*family._labelnames, *(["le"] if family.type == "histogram" else [])}  # type: ignore[attr-defined]


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_metric_and_label_exists(where: str) -> None:
    known, expression = names(), EXPRESSIONS[where]
    used = re.findall(r"\b(goalstate_\w+)(?:\{([^}]*)\})?", expression)
    assert used, "an expression about nothing of ours"
    for name, selector in used:
        assert name in known, name
        matched = re.findall(r'(\w+)=~?"[^"]*"', selector)
        assert set(matched) <= labels_of(known[name]), selector
        assert ",".join(re.findall(r'\w+=~?"[^"]*"', selector)) == selector, "a selector that is none"
    grouped = re.findall(r"\b(?:by|without) ?\(([^)]*)\)", expression)
    there = set.union(*(labels_of(known[name]) for name, _ in used))
    assert {label.strip() for labels in grouped for label in labels.split(",")} <= there


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_expressions_are_balanced_and_of_known_functions(where: str) -> None:
    expression = EXPRESSIONS[where]
    for opening, closing in ("()", "[]", "{}"):
        assert expression.count(opening) == expression.count(closing)
    called = set(re.findall(r"\b(\w+) ?\(", expression)) - {"by", "without", "and", "or"}
    assert called <= {"min", "max", "sum", "rate", "absent", "histogram_quantile", "label_values"}


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_only_counters_have_a_rate(where: str) -> None:
    known, expression = names(), EXPRESSIONS[where]
    rated = set(re.findall(r"rate\((\w+)", expression))
    for name in re.findall(r"\bgoalstate_\w+", expression):
        assert (known[name].type != "gauge") == (name in rated), name


class TestAlerts:
    def test_of_all_that_needs_a_person(self) -> None:
        assert list(RULES) == [
            *("GoalStateIndexDown", "GoalStateNobodySweeps", "GoalStateOverdue"),
            *("GoalStateFailing", "GoalStateQuarantined", "GoalStateRunsLong"),
        ]

    def test_are_as_prometheus_wants_them(self) -> None:
        assert ALERTS.keys() == {"groups"}
        for group in ALERTS["groups"]:
            assert group.keys() == {"name", "rules"}
        for name, rule in RULES.items():
            assert rule.keys() >= {"alert", "expr", "labels", "annotations"}, name
            assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}, name
            assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s")), name
            assert rule["labels"]["severity"] in {"critical", "warning"}, name
            assert rule["annotations"].keys() == {"summary", "description"}, name
            texts = [*rule["labels"].values(), *rule["annotations"].values()]
            assert all(isinstance(text, str) and text for text in texts), name

    def test_templates_name_labels_that_the_alert_has(self) -> None:
        known = names()
        for rule in RULES.values():
            [first] = re.findall(r"^goalstate_\w+", rule["expr"])
            templates = re.findall(r"{{(.*?)}}", " ".join(rule["annotations"].values()))
            for template in templates:
                assert re.fullmatch(r" \$(value( \| humanizeDuration)?|labels\.\w+) ", template)
            used = {label for each in templates for label in re.findall(r"\$labels\.(\w+)", each)}
            assert used <= labels_of(known[first])

    def test_half_of_max_run_is_that_of_the_default(self) -> None:
        [limit] = re.findall(r"> (\d+)$", RULES["GoalStateRunsLong"]["expr"])
        assert int(limit) == KindOptions().max_run / 2


class TestDashboard:
    def test_is_as_grafana_wants_it(self) -> None:
        assert BOARD.keys() >= {"title", "uid", "schemaVersion", "panels", "templating", "time"}
        assert "id" not in BOARD, "Grafana gives it"
        assert "__inputs" not in BOARD, "the data source is a variable"
        ids = [panel["id"] for panel in BOARD["panels"]]
        assert len(set(ids)) == len(ids)
        for panel in BOARD["panels"]:
            assert panel["type"] in {"stat", "timeseries"}
            assert panel["title"]
            refs = [target["refId"] for target in panel["targets"]]
            assert len(set(refs)) == len(refs)
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)

    def test_panels_do_not_overlap(self) -> None:
        taken: dict[tuple[int, int], str] = {}
        for panel in BOARD["panels"]:
            at = panel["gridPos"]
            assert at["x"] + at["w"] <= 24
            for x in range(at["x"], at["x"] + at["w"]):
                for y in range(at["y"], at["y"] + at["h"]):
                    assert taken.setdefault((x, y), panel["title"]) == panel["title"]

    def test_its_variables_are_defined(self) -> None:
        used = {name for text in [*EXPRESSIONS.values(), json.dumps(BOARD)] for name in variables(text)}
        assert used - {"__rate_interval", "__all"} == {v["name"] for v in BOARD["templating"]["list"]}

    def test_shows_all_that_there_is(self) -> None:
        text = " ".join(target["expr"] for panel in BOARD["panels"] for target in panel["targets"])
        assert {family.name for family in families() if family.name not in text} == set()


def variables(text: str) -> list[str]:
    return re.findall(r"\$\{?(\w+)", text)


def test_the_page_has_all_metrics_and_labels() -> None:
    shown: dict[str, list[str]] = table("docs/how-to/monitoring.md", "The metrics")
    ours: dict[str, Any] = {
        f"{family.name}_total" if family.type == "counter" else family.name: labels_of(family)
        - {"le", "kind"}
        for family in families()
    }
    assert shown.keys() == ours.keys()
    for name, (labels, *_) in shown.items():
        assert ours[name] <= set(re.findall(r"`(\w+)`", labels)), name
