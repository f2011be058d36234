"""Notes: what an enqueue notes comes back in the wake-ups that are published later, and is kept no longer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from celery_goalstate.index.base import LONGEST_NOTE, Limits, Policy, Refusal, Request, Run, Status, Verdict
from tests.contract.bench import KIND, Bench

HORIZON, LEASE, RESEND_AFTER = Limits().eta_horizon, Limits().lease, Limits().resend_after
FAR = 10 * HORIZON


def kept(bench: Bench) -> str | None:
    """The note that is stored; None: no key, and nothing of it in the record."""
    row = bench.row()
    return row.fields.get("note") if row else None


class TestComesBack:
    def test_from_the_sweeper(self, bench: Bench) -> None:
        bench.enqueue(delay=FAR, note="n")
        bench.advance(FAR)
        wakeup = bench.promote(task_id="t")
        assert wakeup is not None
        assert wakeup.note == "n"
        again = bench.promote(task_id="t")
        assert again == wakeup, "also when the first reply was lost"

    def test_not_in_the_reply_to_the_enqueue_itself(self, bench: Bench) -> None:
        first = bench.enqueue(task_id="t", note="n")
        again = bench.enqueue(task_id="t", note="n")
        assert first.wakeup is not None
        assert first.wakeup.note == ""
        assert again.wakeup == first.wakeup, "repeated, since the reply was lost"

    def test_after_a_publish_that_failed(self, bench: Bench) -> None:
        bench.put_back(bench.enqueue(note="n").wakeup)
        wakeup = bench.promote()
        assert wakeup is not None
        assert wakeup.note == "n"

    def test_with_a_message_that_came_early(self, bench: Bench) -> None:
        refusal = bench.claim(bench.enqueue(delay=5_000, note="n").wakeup)
        assert isinstance(refusal, Refusal)
        assert refusal.wakeup is not None
        assert refusal.wakeup.note == "n"

    def test_with_a_message_that_is_sent_again(self, bench: Bench) -> None:
        bench.enqueue(note="n")
        bench.advance(RESEND_AFTER)
        wakeup = bench.resend(task_id="t")
        assert wakeup is not None
        assert wakeup.note == "n"
        assert bench.resend(task_id="t") == wakeup, "also when the first reply was lost"

    def test_with_each_retry(self, bench: Bench) -> None:
        run = bench.run(note="n")
        for failures in (1, 2, 3):
            finished = bench.fail(run, failures=failures)
            assert finished.wakeup is not None
            assert finished.wakeup.note == "n"
            assert bench.fail(run, failures=failures) == finished, "also when the first reply was lost"
            bench.advance(10_000)
            run = bench.start(finished.wakeup)

    @pytest.mark.parametrize("verdict", [Verdict.DONE, Verdict.UNSTARTED])
    def test_with_whatever_follows_an_evaluation(self, bench: Bench, verdict: Verdict) -> None:
        run = bench.run(note="n")
        finished = bench.finish(run, verdict, delay=1_000 if verdict is Verdict.DONE else None)
        assert finished.wakeup is not None
        assert finished.wakeup.note == "n"

    def test_after_the_loss_of_a_worker(self, bench: Bench) -> None:
        run = bench.run(note="n")
        bench.advance(LEASE)
        finished = bench.lose(run)
        assert finished.wakeup is not None
        assert finished.wakeup.note == "n"

    @pytest.mark.parametrize("note", ['{"tenant": "é"}', "  ", "\n\x00\u2028", '"]}', "x" * LONGEST_NOTE])
    def test_as_it_was(self, bench: Bench, note: str) -> None:
        bench.enqueue(delay=FAR, note=note)
        assert bench.record().note == note
        bench.advance(FAR)
        wakeup = bench.promote()
        assert wakeup is not None
        assert wakeup.note == note


class TestTheLastThatChangedTheDeadlineWins:
    @pytest.mark.parametrize("delay", [FAR, 5_000])
    def test_earlier(self, bench: Bench, delay: int) -> None:
        bench.enqueue(delay=delay, note="first")
        bench.enqueue(delay=delay - 1, note="second")
        assert kept(bench) == "second"

    @pytest.mark.parametrize("delay", [FAR, 5_000])
    def test_without_a_note(self, bench: Bench, delay: int) -> None:
        bench.enqueue(delay=delay, note="first")
        bench.enqueue(delay=delay - 1)
        assert kept(bench) is None

    @pytest.mark.parametrize("delay", [FAR, 5_000])
    def test_later(self, bench: Bench, delay: int) -> None:
        bench.enqueue(delay=delay, note="first")
        bench.enqueue(delay=delay + 1, note="second", policy=Policy.REPLACE)
        assert kept(bench) == "second"

    @pytest.mark.parametrize("policy", Policy)
    @pytest.mark.parametrize("delay", [FAR, 5_000])
    def test_one_that_changes_nothing_changes_no_note(self, bench: Bench, policy: Policy, delay: int) -> None:
        bench.enqueue(delay=delay, note="first")
        bench.enqueue(delay=delay, note="second", policy=policy)
        bench.enqueue(delay=delay, policy=policy)
        assert kept(bench) == "first"

    def test_of_one_that_is_overdue_nothing_changes(self, bench: Bench) -> None:
        bench.enqueue(note="first")
        bench.advance(1)
        bench.enqueue(note="second", policy=Policy.REPLACE)
        assert kept(bench) == "first"


class TestWhileItRuns:
    @pytest.mark.parametrize("note", ["second", ""])
    @pytest.mark.parametrize("verdict", [Verdict.DONE, Verdict.FAILED, Verdict.QUARANTINED])
    def test_an_enqueue_from_outside_counts(self, bench: Bench, note: str, verdict: Verdict) -> None:
        run = bench.run(note="first")
        bench.enqueue(delay=1_000, note=note)
        delay = 10_000 if verdict is Verdict.FAILED else None
        finished = bench.finish(run, verdict, delay=delay)
        assert finished.wakeup is not None
        assert finished.wakeup.note == note

    def test_but_not_if_something_earlier_is_pending(self, bench: Bench) -> None:
        run = bench.run(note="first")
        bench.enqueue(delay=1_000, note="second")
        bench.enqueue(delay=2_000, note="third")
        bench.enqueue(delay=2_000, note="fourth", inside=Run(run.id, run.lease))
        assert kept(bench) == "second"

    def test_so_does_one_from_inside(self, bench: Bench) -> None:
        run = bench.run(note="first")
        bench.enqueue(delay=1_000, note="second", inside=Run(run.id, run.lease))
        finished = bench.finish(run)
        assert finished.wakeup is not None
        assert finished.wakeup.note == "second"

    def test_a_resync_changes_nothing(self, bench: Bench) -> None:
        bench.run(note="first")
        bench.enqueue(note="second", policy=Policy.RESYNC)
        assert kept(bench) == "first"

    def test_after_a_delete_the_old_note_is_gone(self, bench: Bench) -> None:
        run = bench.run(note="first")
        bench.delete()
        assert kept(bench) is None
        bench.enqueue(delay=1_000, note="second")
        finished = bench.finish(run)
        assert finished.wakeup is not None
        assert finished.wakeup.note == "second"


def idle(bench: Bench) -> None:
    bench.finish(bench.run(note="n"))


def quarantined(bench: Bench) -> None:
    bench.quarantine(bench.run(note="n"))


def deleted(bench: Bench) -> None:
    bench.enqueue(delay=FAR, note="n")
    bench.delete()


def deleted_while_it_ran(bench: Bench) -> None:
    run = bench.run(note="n")
    bench.delete()
    bench.finish(run)


def retired(bench: Bench) -> None:
    bench.enqueue(delay=FAR, note="n")
    assert bench.index.retire(KIND, [bench.record()]) == [True]


@pytest.mark.parametrize("end", [idle, quarantined, deleted, deleted_while_it_ran, retired])
def test_none_is_kept_once_nothing_is_pending(bench: Bench, end: Callable[[Bench], None]) -> None:
    end(bench)
    assert kept(bench) is None
    bench.enqueue(delay=FAR)
    assert kept(bench) is None


def test_a_move_carries_it(bench: Bench) -> None:
    bench.enqueue(delay=FAR, note="n")
    record = bench.record()
    bench.index.retire(KIND, [record])
    bench.index.adopt(KIND, [record])
    assert kept(bench) == "n"
    assert bench.record() == record


def test_one_that_is_too_long_is_refused_before_anything_is_written(bench: Bench) -> None:
    requests = [Request("a", 0), Request("b", 0, note="é" * (LONGEST_NOTE // 2) + "x")]
    with pytest.raises(ValueError, match=r"the note 'é+'\.\.\. has 513 bytes; it may have 512 at most"):
        bench.index.enqueue(KIND, requests)
    assert not any(bench.index.counts(KIND)[status] for status in Status)


def test_each_entity_of_a_batch_has_its_own(bench: Bench) -> None:
    requests = [Request(id, FAR, task_id=id, note=note) for id, note in (("a", "1"), ("b", ""), ("c", "3"))]
    bench.index.enqueue(KIND, requests)
    bench.advance(FAR)
    wakeups = bench.index.promote(KIND, {"c": "c", "a": "a", "b": "b"})
    assert {wakeup.id: wakeup.note for wakeup in wakeups} == {"a": "1", "b": "", "c": "3"}


class TestAnotherNote:
    """Of two enqueues that note different things one is left out: whoever enqueues gets to know."""

    def test_of_what_is_pending(self, bench: Bench) -> None:
        assert bench.enqueue(delay=FAR, note="a").noted is None
        assert bench.enqueue(delay=FAR + 1, note="b").noted == "a"
        assert bench.enqueue(delay=FAR + 1).noted is None, "it notes nothing"
        assert bench.enqueue(delay=FAR - 1, note="a").noted is None, "it notes the same"

    def test_also_if_the_deadline_changes(self, bench: Bench) -> None:
        bench.enqueue(delay=FAR, note="a")
        assert bench.enqueue(delay=FAR - 1, note="b").noted == "a"
        assert bench.enqueue(delay=FAR - 2, note="b").noted is None

    def test_also_of_what_noted_nothing(self, bench: Bench) -> None:
        bench.enqueue(delay=FAR)
        assert bench.enqueue(delay=FAR + 1, note="b").noted == ""

    def test_also_while_it_is_evaluated(self, bench: Bench) -> None:
        bench.run()
        assert bench.enqueue(delay=FAR, note="a").noted is None, "nothing was pending"
        assert bench.enqueue(delay=FAR + 1, note="b").noted == "a"
