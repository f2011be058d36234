"""The tables of the docs, from what two runs wrote."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tests.chaos.checker import RULES
from tests.chaos.harness import Options
from tests.chaos.table import GUARANTEES, tables


def run(faults: dict[str, int], figures: dict[str, Any], lost: int, **options: Any) -> dict[str, Any]:
    return {
        "options": asdict(Options(**options)),
        "faults": faults,
        "figures": figures,
        "violations": dict.fromkeys(RULES, 0) | {"lost": lost},
    }


def test_each_run_has_a_column_in_each_table() -> None:
    text = tables(
        [
            run({"kill": 1200}, {"evaluations": 3}, lost=0, seed=7, calm=3.0),
            run({"cut": 2}, {"evaluations": 4, "latest": 0.5}, lost=1, fsync="everysec"),
        ]
    )
    assert "| run | redis, calm 3 | redis, everysec |\n| --- | --: | --: |\n" in text
    assert "| seed | 7 | 1 |" in text
    assert "| faults | 1,200 | 2 |\n| evaluations | 3 | 4 |\n| broken guarantees | 0 | 1 |" in text
    assert f"| 3, 4, 8 | lost: {RULES['lost']} | 0 | 1 |" in text
    assert "| cut | 0 | 2 |\n| kill | 1,200 | 0 |" in text
    assert "| evaluations | 3 | 4 |\n| latest | 0 | 0.5 |" in text


def test_each_rule_stands_for_a_guarantee() -> None:
    assert GUARANTEES.keys() == RULES.keys()
