"""Lists, counts, and many entities at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from celery_goalstate.index.base import (
    Claim,
    Finish,
    Limits,
    Policy,
    Position,
    Record,
    Report,
    Request,
    Run,
    Status,
    Verdict,
    Wakeup,
)
from tests.contract.bench import KIND, Bench
from tests.contract.conftest import OpenBench

FAR = 10 * Limits().eta_horizon
IDS = [f"id-{n}" for n in range(1_000)]


class TestLists:
    @pytest.fixture
    def bench(self, bench: Bench) -> Bench:
        """Three entities in each status, the last of them first to want attention."""
        for n in (3, 2, 1):
            bench.enqueue(f"parked-{n}", FAR + n)
            bench.enqueue(f"sent-{n}", n)
        for n in (1, 2, 3):
            bench.run(f"running-{n}")
            bench.quarantine(bench.run(f"failed-{n}"))
            bench.finish(bench.run(f"idle-{n}"), idle_ttl=1_000 if n < 3 else None)
            bench.advance(1)
        return bench

    @pytest.mark.parametrize("status", Status)
    def test_those_that_want_attention_first_come_first(self, bench: Bench, status: Status) -> None:
        names = [f"{status}-{n}" for n in (1, 2, 3)]
        records = bench.index.records(KIND, status, 10)
        assert [record.id for record in records] == names
        assert records == bench.index.describe(KIND, names)
        assert {record.status for record in records} == {status}
        assert [record.id for record in bench.index.records(KIND, status, 2)] == names[:2]
        assert bench.index.records(KIND, status, 0) == []
        assert bench.index.records("host", status, 10) == []

    def test_a_deleted_run_is_not_listed(self, bench: Bench) -> None:
        bench.run("again")
        bench.delete("again")
        bench.enqueue("again")
        for status in Status:
            assert "again" not in [record.id for record in bench.index.records(KIND, status, 10)]

    def test_runs_behind_deleted_ones_are_found(self, bench: Bench) -> None:
        for n in range(60):
            bench.run(f"deleted-{n}")
            bench.delete(f"deleted-{n}")
            bench.enqueue(f"deleted-{n}")
        bench.sweep_for(1)  # one counts, so this lease ends later
        bench.run("last")
        names = ["running-1", "running-2", "running-3", "last"]
        assert [record.id for record in bench.index.records(KIND, Status.RUNNING, 4)] == names
        [third] = bench.index.records(KIND, Status.RUNNING, 3)[2:]
        after = Position(third.score, third.id)
        assert [record.id for record in bench.index.records(KIND, Status.RUNNING, 1, after)] == ["last"]

    def test_kinds_are_those_that_were_enqueued_or_noted(self, bench: Bench) -> None:
        bench.index.describe("unheard", ["a"])
        assert bench.index.kinds() == [KIND]
        bench.index.note(["host", KIND])
        assert bench.index.kinds() == ["host", KIND]

    def test_counts(self, bench: Bench) -> None:
        assert bench.index.counts(KIND) == dict.fromkeys(Status, 3)
        assert bench.index.counts("host") == dict.fromkeys(Status, 0)
        bench.delete("failed-2")
        assert bench.index.counts(KIND) == dict.fromkeys(Status, 3) | {Status.FAILED: 2}


class TestPages:
    """Each entity on one page, however many have the same score, and whatever becomes of the last one."""

    @pytest.fixture(params=[1, 4])
    def bench(self, open_bench: OpenBench, request: pytest.FixtureRequest) -> Bench:
        return open_bench(Limits(window=8_000), shards=request.param)

    def pages(
        self, bench: Bench, status: Status, size: int, between: Callable[[Record], Any] | None = None
    ) -> list[list[str]]:
        found, after = [], None
        while page := bench.index.records(KIND, status, size, after):
            found.append([record.id for record in page])
            after = Position(page[-1].score, page[-1].id)
            if between:
                between(page[-1])
        return found

    def named(self, count: int) -> list[str]:
        """In the order of their bytes; some are no ASCII, and some begin as others do."""
        names = ("a", "a-", "A", "Z", "{b}", "ü", "z", "zz", "\U0001f600", "\uffee")
        ids = {f"{names[n % len(names)]}{n // len(names) or ''}" for n in range(count)}
        return sorted(ids, key=str.encode)

    @pytest.mark.parametrize("size", [1, 7, 100, 101, 1_000])
    def test_of_one_deadline(self, bench: Bench, size: int) -> None:
        ids = self.named(100)
        bench.index.enqueue(KIND, [Request(id, at=bench.now + FAR) for id in reversed(ids)])
        pages = self.pages(bench, Status.PARKED, size)
        assert [id for page in pages for id in page] == ids
        assert {len(page) for page in pages[:-1]} <= {size}

    def test_of_several_deadlines(self, bench: Bench) -> None:
        ids = self.named(60)
        bench.index.enqueue(KIND, [Request(id, FAR + n // 20) for n, id in enumerate(reversed(ids))])
        expected = [*ids[40:], *ids[20:40], *ids[:20]]
        assert [id for page in self.pages(bench, Status.PARKED, 7) for id in page] == expected

    def test_of_those_that_are_idle_for_ever(self, bench: Bench) -> None:
        ids = self.named(20)
        for id in ids:
            bench.finish(bench.run(id))
        assert self.pages(bench, Status.IDLE, 6) == [ids[:6], ids[6:12], ids[12:18], ids[18:]]

    def test_when_the_last_one_goes(self, bench: Bench) -> None:
        ids = self.named(30)
        bench.index.enqueue(KIND, [Request(id, at=bench.now + FAR) for id in ids])
        pages = self.pages(bench, Status.PARKED, 4, between=lambda last: bench.delete(last.id))
        assert [id for page in pages for id in page] == ids

    def test_when_the_last_one_moves_on(self, bench: Bench) -> None:
        """To the end: it is met once more there, and nobody is passed over."""
        ids = self.named(30)
        bench.index.enqueue(KIND, [Request(id, at=bench.now + FAR) for id in ids])
        moved = []

        def later(last: Record) -> None:
            if last.id not in moved:
                bench.replace(last.id, FAR + 1)
                moved.append(last.id)

        found = [id for page in self.pages(bench, Status.PARKED, 4, between=later) for id in page]
        assert found[:30] == ids
        assert sorted(found[30:]) == sorted(moved)

    def test_one_that_moves_on_while_its_page_is_read(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench.index.enqueue(KIND, [Request(id, FAR + n) for n, id in enumerate("abcd")])
        describe = bench.index.describe

        def first(kind: str, ids: list[str]) -> Any:
            monkeypatch.undo()
            bench.replace("b", FAR + 9)
            return describe(kind, ids)

        monkeypatch.setattr(bench.index, "describe", first)
        assert self.pages(bench, Status.PARKED, 2) == [["a", "b"], ["c", "d"], ["b"]]

    def test_as_one_call_has_it(self, bench: Bench) -> None:
        bench.index.enqueue(KIND, [Request(id, FAR) for id in IDS])
        assert [record.id for record in bench.index.records(KIND, Status.PARKED, 5_000)] == sorted(IDS)


class TestBatches:
    """A thousand entities in one call, in the caller's order, over several shards."""

    @pytest.fixture(params=[1, 4])
    def bench(self, open_bench: OpenBench, request: pytest.FixtureRequest) -> Bench:
        return open_bench(Limits(window=8_000), shards=request.param)

    def test_a_whole_life(self, bench: Bench) -> None:
        index, ids = bench.index, IDS
        requests = [Request(id, n % 7, task_id=f"t-{id}") for n, id in enumerate(ids)]
        scheduled = index.enqueue(KIND, requests)
        assert [reply.deadline for reply in scheduled] == [bench.now + n % 7 for n in range(1_000)]
        wakeups = [reply.wakeup for reply in scheduled]
        assert [(wakeup.id, wakeup.task_id) for wakeup in wakeups if wakeup] == [
            (id, f"t-{id}") for id in ids
        ]
        assert index.counts(KIND)[Status.SENT] == 1_000

        bench.advance(7)
        claims = index.claim(KIND, [(w.id, w.token) for w in wakeups if w], nonce="n", task_id="t")
        assert [claim.id for claim in claims if isinstance(claim, Claim)] == ids
        assert [claim.lateness for claim in claims] == [7 - n % 7 for n in range(1_000)]
        runs = [Run(claim.id, claim.lease) for claim in claims]
        assert index.renew(KIND, runs) == [True] * 1_000
        assert len({run.lease for run in runs}) >= 1_000 // 4, "leases are unique within a shard"

        even = runs[::2]
        reports = [Report(run.id, run.lease, Verdict.DONE, None) for run in even]
        assert {finished.result for finished in index.finish(KIND, reports)} == {Finish.ACCEPTED}
        assert index.renew(KIND, runs) == [False, True] * 500
        assert index.counts(KIND) == dict.fromkeys(Status, 0) | {Status.IDLE: 500, Status.RUNNING: 500}
        records = index.describe(KIND, ids)
        assert [(record.id, record.status) for record in records if record] == [
            (id, (Status.IDLE, Status.RUNNING)[n % 2]) for n, id in enumerate(ids)
        ]
        assert index.delete(KIND, [*ids[::2], *ids[::2]]) == [True] * 500 + [False] * 500
        assert index.counts(KIND) == dict.fromkeys(Status, 0) | {Status.RUNNING: 500}

    def test_sweeping(self, bench: Bench) -> None:
        index, ids = bench.index, IDS
        index.enqueue(KIND, [Request(id, FAR + n) for n, id in enumerate(ids)])
        bench.advance(FAR + 1_000)
        surveys = index.survey([KIND], sweeper="s", hold=1_000, limit=1_000)
        due = [id for survey in surveys for id in survey.due]
        assert sorted(due) == sorted(ids)
        assert len({survey.shard for survey in surveys}) == len(surveys)
        wakeups = index.promote(KIND, {id: f"t-{id}" for id in due})
        assert [wakeup.id for wakeup in wakeups] == due
        assert index.promote(KIND, {id: f"again-{id}" for id in due}) == []

        bench.advance(bench.limits.resend_after)
        # Messages that arrive in every shard, and were sent so much later, show that the others are lost.
        self.start_others(bench)
        suspect = [id for s in index.survey([KIND], sweeper="s", hold=1_000, limit=1_000) for id in s.suspect]
        assert sorted(suspect) == sorted(ids)
        again = self.resend_all(bench, suspect)
        assert {(w.id, w.token) for w in again} == {(w.id, w.token) for w in wakeups}
        index.put_back(KIND, again)
        assert index.counts(KIND)[Status.PARKED] == 1_000

    def resend_all(self, bench: Bench, ids: list[str]) -> list[Wakeup]:
        """A message that was queued long after theirs has arrived, in every shard."""
        bench.advance(bench.limits.resend_after)
        self.start_others(bench)
        return bench.index.resend(KIND, dict.fromkeys(ids, "t"), probe=None)

    def start_others(self, bench: Bench) -> None:
        name = bench.now
        others = bench.index.enqueue(KIND, [Request(f"other-{name}-{n}", 0) for n in range(50)])
        pairs = [(reply.wakeup.id, reply.wakeup.token) for reply in others if reply.wakeup]
        bench.index.claim(KIND, pairs, nonce="n", task_id="t")

    def test_the_earliest_come_first_whatever_their_shard(self, bench: Bench) -> None:
        bench.index.enqueue(KIND, [Request(id, FAR - n) for n, id in enumerate(IDS)])
        records = bench.index.records(KIND, Status.PARKED, 100)
        assert [record.id for record in records] == IDS[::-1][:100]

    def test_one_entity_twice_in_a_batch(self, bench: Bench) -> None:
        first, second, third = bench.index.enqueue(
            KIND,
            [
                Request("a", 5_000, None, "t1"),
                Request("a", 6_000, None, "t2"),
                Request("a", 4_000, None, "t3"),
            ],
        )
        assert (first.changed, second.changed, third.changed) == (True, False, True)
        assert third.wakeup is not None
        assert bench.record().token == third.wakeup.token
        assert bench.index.delete(KIND, ["a", "a"]) == [True, False]

    def test_nothing_at_all(self, bench: Bench) -> None:
        index = bench.index
        assert index.enqueue(KIND, []) == []
        assert index.claim(KIND, [], nonce="n", task_id="t") == []
        assert index.renew(KIND, []) == []
        assert index.finish(KIND, []) == []
        assert index.delete(KIND, []) == []
        assert index.describe(KIND, []) == []
        assert index.promote(KIND, {}) == []
        assert index.resend(KIND, {}, probe=None) == []
        assert index.forget(KIND, []) == 0
        assert index.put_back(KIND, []) is None
        assert bench.lane.stored() == {}

    def test_pause_holds_for_every_shard(self, bench: Bench) -> None:
        bench.pause()
        replies = bench.index.enqueue(KIND, [Request(id, 0) for id in IDS])
        assert {reply.wakeup for reply in replies} == {None}
        bench.resume()
        replies = bench.index.enqueue(KIND, [Request(id, 0) for id in IDS], policy=Policy.REPLACE)
        assert not any(reply.changed for reply in replies)
        surveys = bench.index.survey([KIND], sweeper="s", hold=1, limit=1_000)
        assert sum(len(survey.due) for survey in surveys) == 1_000
