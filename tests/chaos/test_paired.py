"""Two workers under the same faults: what a seed draws, how it is judged, and what a kill does to both."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.chaos.paired import Outcome, Pair, more, outcome, run_pair, table
from tests.chaos.plain import AFTER
from tests.chaos.side import LANES, POOLS, SETTINGS, schedule


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("pool", POOLS)
class TestSchedule:
    def test_a_seed_always_draws_the_same(self, lane: str, pool: str) -> None:
        assert schedule(lane, pool, 7, 20) == schedule(lane, pool, 7, 20)
        assert schedule(lane, pool, 7, 20) != schedule(lane, pool, 8, 20)

    def test_every_fault_of_the_lane_comes_and_no_other(self, lane: str, pool: str) -> None:
        drawn = schedule(lane, pool, 1, 200)
        assert {fault.kind for fault in drawn} == {
            name for name, kind in LANES[lane].items() if pool in kind.pools
        }

    def test_what_is_hit_is_sent_and_others_follow_it(self, lane: str, pool: str) -> None:
        assert all(0 <= fault.hit < fault.tasks / 2 for fault in schedule(lane, pool, 1, 200))


def test_a_fault_is_named_by_one_lane_only() -> None:
    names = [name for kinds in LANES.values() for name in kinds]
    assert len(names) == len(set(names))


class TestJudging:
    def test_lost_is_what_never_ran_and_doubled_what_ran_more_than_once(self) -> None:
        assert outcome([0, 1, 2, 3, 4], [3, 0, 0, 2, 3, 3]) == Outcome(
            5, lost=frozenset({1, 4}), doubled=frozenset({0, 3}), ends=0, stuck=0
        )

    def test_a_run_of_what_was_never_sent_is_an_error_of_the_script(self) -> None:
        with pytest.raises(AssertionError, match=r"never sent: \[9\]"):
            outcome([0], [0, 9])

    @pytest.mark.parametrize(
        ("runs", "expected"),
        [
            ([0, 1, 2, 3, 3], 0),  # as without
            ([0, 1, 2, 2, 3], 0),  # another one is doubled
            ([0, 1, 2, 3], -1),
            ([0, 1, 3, 3], 1),  # one is lost
            ([0, 0, 1, 3, 3], 2),
        ],
    )
    def test_lost_and_doubled_are_summed(self, runs: list[int], expected: int) -> None:
        without = outcome(range(4), [0, 1, 2, 3, 3])
        pair = Pair(1, "solo", without, outcome(range(4), runs))
        assert more([pair]) == expected
        assert more([pair, Pair(2, "solo", without, without)]) == expected

    def test_the_table_has_sums_and_what_differs(self) -> None:
        without = outcome(range(4), [0, 1, 2, 3, 3], ends=1)
        same, other = (
            Pair(1, "solo", without, without),
            Pair(2, "prefork", without, outcome(range(4), [0, 1])),
        )
        text = table([same, other])
        assert "| 2 | prefork | 4 | 4 | 0 | 2 | 1 | 0 | 1 | 0 | 0 | 0 |" in text
        assert "| sum |  | 8 | 8 | 0 | 2 | 2 | 1 | 2 | 1 | 0 | 0 |" in text
        assert "* seed 2, lost only with the engine: 2, 3\n" in text
        assert "* seed 2, doubled only without the engine: 3\n" in text
        assert "seed 1," not in text
        assert text.endswith("With the engine +1 lost or doubled, as is allowed.")

    def test_more_than_one_more_is_refused(self) -> None:
        pair = Pair(1, "solo", outcome(range(4), range(4)), outcome(range(4), [0, 1]))
        assert table([pair]).endswith("With the engine +2 lost or doubled, but at most 1 is allowed.")


def draws_both_points(seed: int) -> bool:
    drawn = schedule("kills", "prefork", seed, 2)
    return [fault.kind for fault in drawn] == ["SIGKILL of the worker"] * 2 and drawn[0].point != drawn[
        1
    ].point


def test_a_kill_does_to_both_what_its_point_says(tmp_path: Path) -> None:
    """Before it notes that it runs, a task comes again and runs once; after that, it runs twice."""
    seed = next(filter(draws_both_points, itertools.count()))
    first, second = schedule("kills", "prefork", seed, 2)
    twice = first.hit if first.point == AFTER else first.tasks + second.hit
    soon = {"broker_transport_options": {**SETTINGS["broker_transport_options"], "visibility_timeout": 3}}
    pair = run_pair(tmp_path, "kills", "prefork", seed, faults=2, broker="redis", settings=soon)
    assert pair.without == Outcome(
        first.tasks + second.tasks, frozenset(), frozenset({twice}), ends=0, stuck=0
    )
    assert pair.engine == pair.without
