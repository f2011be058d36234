"""Which difference counts as one that an engine makes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.guest.compare import Tally, Verdict, fisher, judge, page, summary
from tests.guest.lanes import PART, divided, ended

TEST = "t/integration/test_tasks.py::test_tasks::test_basic"


def tally(without: dict[str, int], engine: dict[str, int], why: str = "") -> Tally:
    return Tally(Counter(without), Counter(engine), why)


@pytest.mark.parametrize(
    ("a", "of_a", "b", "of_b", "p"),
    [
        (0, 16, 6, 16, 0.018),  # 8008 * 2 / C(32, 6)
        (3, 4, 1, 4, 0.486),  # the lady that tastes tea, two-sided
        (0, 20, 4, 20, 0.106),
        (0, 20, 5, 20, 0.047),
        (20, 20, 0, 20, 0.000),
        (1, 10, 11, 14, 0.003),
        (7, 10, 14, 20, 1.000),
        (0, 20, 0, 20, 1.000),
    ],
)
def test_fishers_exact_test(a: int, of_a: int, b: int, of_b: int, p: float) -> None:
    assert fisher(a, of_a, b, of_b) == pytest.approx(p, abs=0.0005)
    assert fisher(b, of_b, a, of_a) == fisher(a, of_a, b, of_b)
    assert fisher(of_a - a, of_a, of_b - b, of_b) == fisher(a, of_a, b, of_b)


@pytest.mark.parametrize(
    ("without", "engine", "steady"),
    [
        ({"passed": 2}, {"passed": 2}, True),
        ({"failed": 2}, {"failed": 2}, True),
        ({"skipped": 1}, {"passed": 1}, False),
        ({"passed": 1, "failed": 1}, {"passed": 1, "failed": 1}, False),  # which may hide a difference
    ],
)
def test_what_ends_alike_in_every_run_is_steady(
    without: dict[str, int], engine: dict[str, int], steady: bool
) -> None:
    assert tally(without, engine).steady is steady


@pytest.mark.parametrize(
    ("without", "engine", "real"),
    [
        ({"passed": 20}, {"passed": 14, "failed": 6}, True),
        ({"passed": 14, "failed": 6}, {"passed": 20}, True),  # for the better is a difference, too
        ({"passed": 20}, {"passed": 15, "failed": 5}, False),
        ({"passed": 12, "failed": 8}, {"passed": 11, "timeout": 9}, True),
        ({"failed": 20}, {"skipped": 20}, True),
        ({"passed": 20}, {"passed": 20}, False),
    ],
)
def test_a_difference_is_real_if_chance_does_not_explain_it(
    without: dict[str, int], engine: dict[str, int], real: bool
) -> None:
    assert Verdict(TEST, tally({"passed": 1}, {"failed": 1}), tally(without, engine), Tally()).real is real


def test_the_runs_that_made_it_a_suspect_do_not_judge_it() -> None:
    differed = tally({"passed": 9}, {"failed": 9})

    assert differed.p < 0.001
    assert not Verdict(TEST, differed, tally({"passed": 20}, {"passed": 20}), Tally()).real


def test_the_page_says_what_differs_before_it_lists_every_test() -> None:
    first = {
        "a.py::alike": tally({"passed": 1}, {"passed": 1}),
        "a.py::fails": tally({"failed": 1}, {"failed": 1}, "x | y"),
        "a.py::chance": tally({"passed": 1}, {"failed": 1}),
        "a.py::real": tally({"passed": 1}, {"failed": 1}),
    }
    repeated = {
        "a.py::alike": tally({"passed": 20}, {"passed": 20}),
        "a.py::chance": tally({"passed": 20}, {"passed": 20}),
        "a.py::real": tally({"passed": 20}, {"failed": 20}),
    }

    verdicts = judge(first, repeated, {})
    lines = page("A title", ["a remark"], verdicts, {"b.py": "needs a cloud"}).splitlines()

    assert [verdict.test for verdict in verdicts if verdict.real] == ["a.py::real"]
    assert summary(verdicts) == "alike in every run: 1 passed, 1 failed; not alike: 2; an engine changes: 1"
    rows = [line for line in lines if line.startswith("| ") and ".py" in line]
    assert rows == [
        "| a.py::real | 1 passed | 1 failed | 20 passed | 20 failed | none | none | 0.000 | **real** |",
        "| a.py::chance | 1 passed | 1 failed | 20 passed | 20 passed | none | none | 1.000 | chance |",
        "| a.py::alike | 1 passed | 1 passed |  |",
        "| a.py::fails | 1 failed | 1 failed | x \\| y |",
        "| a.py::chance | 1 passed | 1 failed |  |",
        "| a.py::real | 1 passed | 1 failed |  |",
        "| b.py | needs a cloud |",
    ]


def test_one_that_ends_otherwise_when_it_is_repeated_is_not_alike() -> None:
    steady = tally({"passed": 4}, {"passed": 4}), tally({"failed": 20}, {"failed": 20})

    assert not Verdict(TEST, *steady, Tally()).alike


def test_a_difference_among_its_neighbours_or_alone_is_enough() -> None:
    first, same = tally({"passed": 1}, {"failed": 1}), tally({"passed": 40}, {"passed": 40})
    differs = tally({"passed": 40}, {"passed": 20, "failed": 20})

    assert Verdict(TEST, first, same, differs).real
    assert Verdict(TEST, first, differs, same).real
    assert not Verdict(TEST, first, same, same).real


def note(test: str, outcome: str, why: str = "", seconds: float = 1.0) -> dict[str, Any]:
    return {"test": test, "outcome": outcome, "why": why, "seconds": seconds}


def test_a_test_ends_as_the_worst_that_it_reports() -> None:
    notes = [
        {"collected": ["a", "b", "c"]},
        note("a", "passed"),
        note("a", "error", "when torn down"),
        note("b", "failed", "a part of it"),
        note("b", "passed", seconds=2.0),
        {"given": 2},
    ]

    ends = ended(["a", "b", "c"], notes)

    assert [(end["outcome"], end["why"]) for end in ends.values()] == [
        ("error", "when torn down"),
        ("failed", "a part of it"),
        ("not run", ""),
    ]


def test_a_process_gets_a_few_tests_of_one_file() -> None:
    tests = [f"a.py::{n}" for n in range(PART + 1)] + ["b.py::0", "b.py::1"]

    assert list(divided(tests)) == [tests[:PART], tests[PART : PART + 1], tests[PART + 1 :]]
