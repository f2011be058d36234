"""What the index knows for people: what fails and why, what hangs and where, what is late, who paused it."""

from __future__ import annotations

from typing import Any

import pytest

from celery_goalstate.index.base import (
    BYTES_OF_ERROR,
    BYTES_OF_PAST_ERROR,
    Failure,
    Limits,
    Listing,
    Longest,
    Overview,
    Pause,
    Position,
    Record,
    Request,
    Run,
    Status,
    Whereabouts,
)
from tests.contract.bench import KIND, Bench
from tests.contract.conftest import OpenBench

FAR = 10 * Limits().eta_horizon


def listed(bench: Bench, listing: Listing | Status, limit: int = 10, **options: Any) -> list[str]:
    return [record.id for record in bench.index.records(KIND, listing, limit, **options)]


def whole(bench: Bench, id: str = "a") -> Record:
    [record] = bench.index.describe(KIND, [id], history=True)
    assert record is not None
    return record


def overview(bench: Bench) -> Overview:
    return bench.index.overviews([KIND])[KIND]


class TestFailing:
    """An entity whose last evaluation failed, as long as that is tried again."""

    def test_since_the_first_failure_in_a_row(self, bench: Bench) -> None:
        bench.fail(bench.run(), 1_000)
        since = bench.now
        bench.fail(bench.evaluate(), 1_000, failures=2)
        assert (bench.record().failing, bench.record().status) == (since, Status.SENT)
        assert bench.evaluate()
        assert bench.record().failing == since, "also while it is tried again"

    def test_also_if_no_failure_is_counted(self, bench: Bench) -> None:
        bench.fail(bench.run(), failures=0)
        assert bench.record().failing == bench.now

    def test_until_it_succeeds(self, bench: Bench) -> None:
        bench.fail(bench.run(), 0)
        bench.finish(bench.evaluate())
        assert bench.record().failing is None
        assert listed(bench, Listing.FAILING) == []

    def test_not_when_it_is_quarantined(self, bench: Bench) -> None:
        bench.fail(bench.run(), 0)
        bench.quarantine(bench.evaluate(), failures=2)
        assert (bench.record().failing, listed(bench, Listing.FAILING)) == (None, [])
        bench.fail(bench.start(bench.enqueue().wakeup))
        assert bench.record().failing == bench.now, "anew"

    @pytest.mark.parametrize("running", [False, True])
    def test_not_when_it_is_deleted(self, bench: Bench, running: bool) -> None:
        bench.fail(bench.run(), 0)
        run = bench.evaluate() if running else None
        bench.delete()
        assert listed(bench, Listing.FAILING) == []
        assert overview(bench).failing == 0
        if run:
            bench.finish(run)
            assert overview(bench).failing == 0

    def test_lost_ones_too(self, bench: Bench) -> None:
        bench.lose(bench.run())
        assert listed(bench, Listing.FAILING) == ["a"]

    def test_the_longest_first_page_by_page(self, bench: Bench) -> None:
        for id in "cab":
            bench.fail(bench.run(id), FAR)
            bench.advance(1)
        bench.finish(bench.run("d"))
        assert listed(bench, Listing.FAILING) == ["c", "a", "b"]
        [first] = bench.index.records(KIND, Listing.FAILING, 1)
        assert listed(bench, Listing.FAILING, after=Position(first.score, first.id)) == ["a", "b"]


class TestHistory:
    """The last failures of an entity, newest first."""

    def test_what_a_failure_was(self, bench: Bench) -> None:
        bench.fail(
            bench.run(), 0, error="boom", state="paid", goal="shipped", step="charge", took=12, task_id="t-1"
        )
        record = bench.record()
        assert record.history == (Failure(bench.now, "paid", "charge", 12, "boom", "t-1"),)
        assert (record.state, record.goal, record.step) == ("paid", "shipped", "charge")

    def test_the_newest_one_only_unless_all_are_asked_for(self, bench: Bench) -> None:
        bench.fail(bench.run(), 0, error="first")
        bench.fail(bench.evaluate(), 0, error="second")
        assert [each.error for each in bench.record().history] == ["second"]
        assert [each.error for each in whole(bench).history] == ["second", "first"]

    @pytest.mark.parametrize(("kept", "expected"), [(3, 3), (1, 1), (0, 1)])
    def test_so_many_are_kept(self, open_bench: OpenBench, kept: int, expected: int) -> None:
        bench = open_bench(Limits(history=kept))
        bench.fail(bench.run(), 0, error="0")
        for n in range(1, 5):
            bench.fail(bench.evaluate(), 0, error=str(n))
        assert [each.error for each in whole(bench).history] == ["4", "3", "2"][:expected]

    def test_only_the_newest_error_is_whole(self, bench: Bench) -> None:
        bench.fail(bench.run(), 0, error="x" * 500)
        assert bench.record().error == "x" * 500
        row = bench.row()
        assert row is not None
        assert row.fields["error"] == "x" * BYTES_OF_ERROR, "a longer value would double the record for good"
        bench.fail(bench.evaluate(), 0, error="ü" * 500)
        assert [each.error for each in whole(bench).history] == ["ü" * 500, "x" * BYTES_OF_PAST_ERROR]

    def test_no_half_character(self, bench: Bench) -> None:
        bench.fail(bench.run(), 0, error="x" + "ü" * 200)
        row = bench.row()
        assert row is not None
        assert row.fields["error"] == "x" + "ü" * 29
        bench.fail(bench.evaluate(), 0)
        assert whole(bench).history[1].error == "x" + "ü" * 59

    def test_it_outlives_success(self, bench: Bench) -> None:
        bench.fail(bench.run(), 0)
        bench.finish(bench.evaluate(), state="shipped", goal="shipped")
        record = bench.record()
        assert (record.error, record.step, record.state) == ("", "", "shipped")
        assert [each.error for each in record.history] == ["boom"]

    @pytest.mark.parametrize("running", [False, True])
    def test_it_is_gone_with_a_delete(self, bench: Bench, running: bool) -> None:
        bench.fail(bench.run(), 0)
        if running:
            run = bench.evaluate()
            bench.delete()
            bench.enqueue()
            bench.finish(run)
        else:
            bench.delete()
            bench.enqueue()
        assert whole(bench).history == ()
        bench.fail(bench.evaluate(), 0, error="of the new life")
        assert [each.error for each in whole(bench).history] == ["of the new life"]

    def test_it_is_gone_with_delete_all(self, bench: Bench) -> None:
        bench.fail(bench.run(), 0)
        bench.index.delete_all(KIND)
        bench.fail(bench.run(), 0, error="of the new life")
        assert [each.error for each in whole(bench).history] == ["of the new life"]

    def test_a_repeated_report_counts_once(self, bench: Bench) -> None:
        run = bench.run()
        bench.fail(run, 0)
        bench.fail(run, 0)
        assert len(whole(bench).history) == 1

    def test_what_the_sweeper_reports_says_nothing_of_states(self, bench: Bench) -> None:
        bench.fail(bench.run(), 0, state="paid", goal="shipped", step="charge")
        bench.lose(bench.evaluate(), failures=2)
        record = bench.record()
        assert (record.state, record.goal, record.step) == ("paid", "shipped", "")


class TestWhereabouts:
    """What a long run was doing when its lease was renewed last."""

    def test_from_the_first_renewal_on(self, bench: Bench) -> None:
        run = bench.run()
        assert (bench.record().whereabouts, listed(bench, Listing.LONG)) == (None, [])
        bench.advance(10_000)
        bench.renew(run, "in ship")
        assert bench.record().whereabouts == Whereabouts(bench.now, "in ship")
        assert listed(bench, Listing.LONG) == ["a"]

    def test_none_of_the_next_run(self, bench: Bench) -> None:
        run = bench.run()
        bench.renew(run, "in ship")
        bench.fail(run, 0)
        assert listed(bench, Listing.LONG) == []
        again = bench.evaluate()
        assert bench.record().whereabouts is None
        bench.renew(again)
        assert bench.record().whereabouts is None, "not that of the run before"

    def test_none_of_a_run_that_was_deleted(self, bench: Bench) -> None:
        run = bench.run()
        bench.renew(run, "in ship")
        bench.delete()
        bench.renew(run, "in ship")
        assert listed(bench, Listing.LONG) == []
        assert overview(bench).longest is None

    def test_those_that_began_first_come_first(self, bench: Bench) -> None:
        runs = {}
        for id in "cab":
            runs[id] = bench.run(id)
            bench.advance(1_000)
        for id in "abc":
            bench.renew(runs[id])
        assert listed(bench, Listing.LONG) == ["c", "a", "b"]


class TestPause:
    def test_who_and_since_when(self, bench: Bench) -> None:
        assert bench.index.paused(KIND) is None
        bench.index.pause(KIND, by="ann@ops-1")
        since = bench.now
        bench.advance(1_000)
        bench.index.pause(KIND, by="bob@ops-2")
        assert bench.index.paused(KIND) == Pause(since, "ann@ops-1"), "who was first"
        bench.resume()
        assert bench.index.paused(KIND) is None


class TestOverview:
    def test_of_nothing(self, bench: Bench) -> None:
        assert overview(bench) == Overview(dict.fromkeys(Status, 0), unswept=-1)

    def test_what_is_late_with_a_message_under_way_or_without(self, bench: Bench) -> None:
        bench.enqueue("sent")
        bench.put_back(bench.enqueue("parked").wakeup)
        bench.enqueue("later", 20_000)
        bench.enqueue("far", FAR)
        bench.advance(5_000)
        bench.resend("sent")
        found = overview(bench)
        assert (found.overdue, found.oldest) == (2, 5_000), "sent again or not"
        assert found.counts[Status.SENT] == 2

    def test_what_fails(self, bench: Bench) -> None:
        bench.fail(bench.run("a"), FAR)
        bench.advance(3_000)
        bench.fail(bench.run("b"), FAR)
        bench.quarantine(bench.run("c"))
        found = overview(bench)
        assert (found.failing, found.failing_for, found.counts[Status.FAILED]) == (2, 3_000, 1)

    def test_what_hangs(self, bench: Bench) -> None:
        runs = [bench.run("b")]
        bench.advance(9_000)
        runs.append(bench.run("a"))
        bench.advance(10_000)
        assert overview(bench).longest is None, "no lease is old yet"
        for run in runs:
            bench.renew(run)
        found = overview(bench)
        assert (found.longest, found.counts[Status.RUNNING]) == (Longest("b", 19_000), 2)

    def test_who_paused_it(self, bench: Bench) -> None:
        bench.pause()
        assert overview(bench).paused == Pause(bench.now, "ann@ops-1")

    def test_whether_anybody_sweeps(self, bench: Bench) -> None:
        bench.survey(hold=5_000)
        assert overview(bench).unswept is None
        bench.advance(5_000)
        assert overview(bench).unswept == 5_000, "since the last survey"

    def test_the_worse_of_each_shard(self) -> None:
        counts = dict.fromkeys(Status, 1)
        one = Overview(counts, 1, 5, 1, 9, Longest("a", 3), Pause(1, "ann"), None)
        other = Overview(counts, 2, 7, 0, None, Longest("b", 4), None, -1)
        both = Overview(dict.fromkeys(Status, 2), 3, 7, 1, 9, Longest("b", 4), Pause(1, "ann"), -1)
        assert one + other == other + one == both

    def test_of_several_kinds_and_shards(self, open_bench: OpenBench) -> None:
        bench = open_bench(Limits(), shards=3)
        bench.index.enqueue(KIND, [Request(str(n), 0, task_id=str(n)) for n in range(20)])
        bench.index.enqueue("host", [Request("a", FAR)])
        bench.advance(1)
        found = bench.index.overviews([KIND, "host"])
        assert (found[KIND].overdue, found["host"].overdue) == (20, 0)
        assert sum(found["host"].counts.values()) == 1


def test_a_run_s_name_is_not_enough(bench: Bench) -> None:
    """A lease that is not held any more renews nothing, and says nothing."""
    run = bench.run()
    bench.fail(run, 0)
    assert not bench.renew(Run("a", run.lease), "in ship")
    assert listed(bench, Listing.LONG) == []
