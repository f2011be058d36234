"""What an index counts: each thing once, and nothing if it is not to."""

from __future__ import annotations

from typing import Any

import pytest

from celery_goalstate.index.base import Limits, Policy, Refusal, Refused, Request, Run, Verdict
from celery_goalstate.index.counters import MOST_ACTIONS, OTHER, ActionTime, Histogram, Metrics
from tests.contract.bench import KIND, Bench
from tests.contract.conftest import OpenBench

LEASE, RESEND_AFTER = Limits().lease, Limits().resend_after
CHARGE = ActionTime("charge", 12, failed=False)


def metrics(bench: Bench, kind: str = KIND) -> Metrics:
    return bench.index.metrics([kind])[kind]


def of_action(bench: Bench, name: str, outcome: str = "ok") -> tuple[dict[str, int], int]:
    found = metrics(bench).actions[name, outcome]
    return dict(found.counts), found.total


class TestEvaluations:
    @pytest.mark.parametrize(
        ("verdict", "report", "outcome"),
        [
            (Verdict.DONE, {"converged": True}, "converged"),
            (Verdict.DONE, {"converged": True, "delay": 5}, "converged"),
            (Verdict.DONE, {"converged": False, "delay": 0}, "requeued"),
            (Verdict.DONE, {"converged": False}, "unconverged"),
            (Verdict.DONE, {}, "unconverged"),
            (Verdict.FAILED, {"delay": 5, "failures": 1, "error": "boom"}, "failed"),
            (Verdict.QUARANTINED, {"failures": 1, "error": "boom"}, "quarantined"),
            (Verdict.UNSTARTED, {}, "returned"),
            (Verdict.GONE, {}, "gone"),
        ],
    )
    def test_by_how_they_ended(
        self, bench: Bench, verdict: Verdict, report: dict[str, Any], outcome: str
    ) -> None:
        bench.finish(bench.run(), verdict, **report)
        assert metrics(bench).evaluations == {outcome: 1}

    def test_one_whose_worker_was_lost(self, bench: Bench) -> None:
        run = bench.run()
        bench.sweep_for(2 * LEASE)
        bench.lose(run)
        bench.finish(run)
        assert metrics(bench).evaluations == {"lost": 1}
        assert metrics(bench).fenced == 1

    def test_as_a_loss_also_if_that_quarantines(self, bench: Bench) -> None:
        run = bench.run()
        bench.sweep_for(2 * LEASE)
        bench.finish(run, Verdict.QUARANTINED, failures=1, error="WorkerLost", lost_at=bench.lease_end())
        assert metrics(bench).evaluations == {"lost": 1}

    def test_one_of_an_entity_that_was_deleted_meanwhile(self, bench: Bench) -> None:
        run = bench.run()
        bench.delete()
        bench.finish(run, converged=True)
        assert metrics(bench).evaluations == {"converged": 1}

    def test_a_report_that_is_repeated_counts_once(self, bench: Bench) -> None:
        run = bench.run()
        for _ in range(3):
            bench.finish(run, converged=True, lateness=7, actions=(CHARGE,))
        assert metrics(bench).evaluations == {"converged": 1}
        assert metrics(bench).lateness == Histogram({"10": 1}, 7)
        assert of_action(bench, "charge") == ({"25": 1}, 12)
        assert metrics(bench).fenced == 0

    def test_the_sweeper_s_late_word_counts_nothing(self, bench: Bench) -> None:
        run = bench.run()
        bench.finish(run, converged=True)
        bench.finish(run, Verdict.FAILED, delay=0, lost_at=1)
        assert metrics(bench).evaluations == {"converged": 1}
        assert metrics(bench).fenced == 0

    def test_who_gives_back_what_is_over_drops_nothing(self, bench: Bench) -> None:
        run = bench.run()
        bench.fail(run)
        bench.unstarted(Run("a", f"{int(run.lease) - 1}"))
        assert metrics(bench).fenced == 0


class TestLateness:
    @pytest.mark.parametrize(
        ("lateness", "bucket"), [(0, "5"), (5, "5"), (6, "10"), (300_000, "300000"), (300_001, "more")]
    )
    def test_in_the_bucket_of_its_upper_bound(self, bench: Bench, lateness: int, bucket: str) -> None:
        bench.finish(bench.run(), lateness=lateness)
        assert metrics(bench).lateness == Histogram({bucket: 1}, lateness)

    def test_of_whatever_outcome(self, bench: Bench) -> None:
        bench.fail(bench.run(), 0, lateness=3)
        bench.finish(bench.evaluate(), lateness=4)
        assert metrics(bench).lateness == Histogram({"5": 2}, 7)

    def test_what_is_not_known_is_in_no_bucket(self, bench: Bench) -> None:
        bench.finish(bench.run())
        assert metrics(bench).lateness == Histogram()
        assert metrics(bench).evaluations.total() == 1


class TestActions:
    def test_by_name_and_outcome(self, bench: Bench) -> None:
        failed = ActionTime("ship", 600, failed=True)
        bench.fail(bench.run(), actions=(CHARGE, CHARGE, failed))
        assert of_action(bench, "charge") == ({"25": 2}, 24)
        assert of_action(bench, "ship", "failed") == ({"1000": 1}, 600)
        assert set(metrics(bench).actions) == {("charge", "ok"), ("ship", "failed")}

    @pytest.mark.parametrize("name", ["a:b", "ü", "named", "<b>", "x" * 60, "other"])
    def test_whatever_their_name(self, bench: Bench, name: str) -> None:
        bench.finish(bench.run(), actions=(ActionTime(name, 12, failed=False),))
        assert of_action(bench, name) == ({"25": 1}, 12)

    def test_so_many_by_name_and_the_others_together(self, bench: Bench) -> None:
        names = [f"action-{n}" for n in range(MOST_ACTIONS + 3)]
        for name in names:
            bench.finish(bench.run(), actions=(ActionTime(name, 7, failed=False),))
        assert {name for name, _ in metrics(bench).actions} == {*names[:MOST_ACTIONS], OTHER}
        assert of_action(bench, OTHER) == ({"10": 3}, 21)
        bench.finish(bench.run(), actions=(ActionTime(names[0], 1, failed=True),))
        assert of_action(bench, names[0], "failed") == ({"5": 1}, 1), "one that is known keeps its name"

    def test_also_within_one_call(self, bench: Bench) -> None:
        actions = tuple(ActionTime(f"action-{n}", 7, failed=False) for n in range(MOST_ACTIONS + 3))
        bench.finish(bench.run(), actions=actions)
        assert of_action(bench, OTHER) == ({"10": 3}, 21)
        assert of_action(bench, f"action-{MOST_ACTIONS - 1}") == ({"10": 1}, 7)


class TestEnqueues:
    def test_by_what_they_came_to(self, bench: Bench) -> None:
        bench.enqueue(delay=1_000)
        bench.enqueue(delay=2_000)
        bench.enqueue(delay=500)
        bench.replace(delay=700)
        assert metrics(bench).enqueues == {"new": 1, "unchanged": 1, "earlier": 2}

    def test_while_it_is_evaluated(self, bench: Bench) -> None:
        bench.run()
        bench.enqueue()
        bench.enqueue(delay=1_000)
        assert metrics(bench).enqueues == {"new": 1, "noted": 1, "unchanged": 1}

    def test_from_inside(self, bench: Bench) -> None:
        run = bench.run()
        bench.enqueue(inside=Run("a", run.lease))
        assert metrics(bench).enqueues == {"new": 1, "noted": 1}

    def test_of_what_is_idle_or_quarantined(self, bench: Bench) -> None:
        bench.finish(bench.run())
        bench.quarantine(bench.run())
        bench.enqueue(policy=Policy.RESYNC)
        bench.enqueue()
        assert metrics(bench).enqueues == {"new": 3, "unchanged": 1}

    def test_a_message_that_is_published_once_more_changes_nothing(self, bench: Bench) -> None:
        for _ in range(2):
            assert bench.enqueue(task_id="same").changed
        assert metrics(bench).enqueues == {"new": 1, "unchanged": 1}


def test_refusals_by_reason(bench: Bench) -> None:
    first = bench.enqueue(delay=1_000).wakeup
    assert first is not None
    for reason, wakeup in (
        (Refused.MISSING, first._replace(id="b")),
        (Refused.STALE, first._replace(token="1")),
        (Refused.EARLY, first),
    ):
        reply = bench.claim(wakeup)
        assert isinstance(reply, Refusal)
        assert reply.reason is reason
    bench.pause()
    bench.claim(first)
    assert metrics(bench).refusals == {"missing": 1, "stale": 1, "early": 1, "paused": 1}


def test_messages_that_are_sent_again(bench: Bench) -> None:
    bench.enqueue()
    assert bench.resend() is None
    bench.advance(RESEND_AFTER)
    for _ in range(2):
        assert bench.resend(task_id="again"), "the second time it is the same request"
    assert metrics(bench).resends == 1


def test_a_stalled_worker_s_outcome_is_fenced(bench: Bench) -> None:
    run = bench.run()
    bench.sweep_for(2 * LEASE)
    bench.lose(run, 0)
    second = bench.evaluate()
    bench.finish(run, converged=True, lateness=5, actions=(CHARGE,))
    assert (metrics(bench).fenced, metrics(bench).evaluations) == (1, {"lost": 1})
    assert not metrics(bench).actions
    bench.finish(second, converged=True)
    assert metrics(bench).evaluations == {"lost": 1, "converged": 1}


def test_of_several_entities_kinds_and_shards(open_bench: OpenBench) -> None:
    bench = open_bench(Limits(), shards=3)
    bench.index.enqueue(KIND, [Request(str(n), 0, task_id=str(n)) for n in range(20)])
    bench.index.enqueue("host", [Request("a", 0)])
    found = bench.index.metrics([KIND, "host"])
    assert (found[KIND].enqueues, found["host"].enqueues) == ({"new": 20}, {"new": 1})
    assert metrics(bench, "never") == Metrics()


def test_gone_with_the_kind(bench: Bench) -> None:
    bench.finish(bench.run(), idle_ttl=0)
    assert not bench.index.forget_kind(KIND)
    assert metrics(bench).evaluations.total() == 1
    bench.delete()
    assert bench.index.forget_kind(KIND)
    assert metrics(bench) == Metrics()


def test_nothing_is_counted_if_that_is_off(open_bench: OpenBench) -> None:
    bench = open_bench(Limits(metrics=False))
    bench.claim(bench.enqueue().wakeup._replace(token="1"))
    bench.finish(bench.run("b"), lateness=1, actions=(CHARGE,))
    assert metrics(bench) == Metrics()
