"""All of a kind is deleted at one moment, whatever it does meanwhile; of an empty kind nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from celery_goalstate.exceptions import ImproperlyConfigured
from celery_goalstate.index.base import (
    Limits,
    Record,
    Refusal,
    Refused,
    Report,
    Request,
    Status,
    Verdict,
)
from celery_goalstate.index.redis import RedisIndex
from tests.contract.bench import ACCEPTED, KIND, Bench
from tests.contract.conftest import LANES, OpenBench

FAR = 10 * Limits().eta_horizon


class Away(Exception):
    """The process that deletes is killed."""


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Bench, Callable[[], Any]], int]:
    """Deletes all, while somebody does something after the moment, and before any entity is met."""

    def delete_all(bench: Bench, does: Callable[[], Any]) -> int:
        with monkeypatch.context() as patch:
            meet_all = bench.index._meet_all

            def first(*shard: Any) -> Any:
                patch.undo()
                does()
                return meet_all(*shard)

            patch.setattr(bench.index, "_meet_all", first)
            return bench.index.delete_all(KIND).count

    return delete_all


Meanwhile = Callable[[Bench, Callable[[], Any]], int]


@pytest.mark.parametrize("shards", [1, 4])
def test_thousands_in_every_status(open_bench: OpenBench, shards: int) -> None:
    bench = open_bench(Limits(window=8_000), shards=shards)
    index, ids = bench.index, [f"id-{n}" for n in range(2_500)]
    wakeups = [each.wakeup for each in index.enqueue(KIND, [Request(id, 0) for id in ids])]
    claims = index.claim(KIND, [(w.id, w.token) for w in wakeups if w], nonce="n", task_id="t")
    bench.quarantine(bench.run("failed"))
    bench.finish(bench.run("idle"))
    bench.enqueue("sent")
    bench.enqueue("parked", FAR, note="n")
    assert index.counts(KIND)[Status.RUNNING] == 2_500
    done = index.delete_all(KIND)
    assert (done.count, done.away) == (2_504, {})
    assert [run.id for run in done.runs] == sorted(ids)
    assert index.delete_all(KIND).count == 0
    assert index.counts(KIND) == dict.fromkeys(Status, 0) | {Status.RUNNING: 2_500}
    reports = [Report(run.id, run.lease, Verdict.DONE, 0) for run in claims]
    assert set(index.finish(KIND, reports)) == {ACCEPTED}
    assert not any(index.counts(KIND).values())


def test_one_that_runs_and_was_deleted_before_counts_once(bench: Bench) -> None:
    bench.run("a")
    bench.run("b")
    bench.delete("a")
    bench.run("c")
    bench.delete("c")
    bench.enqueue("c", 1_000)
    assert bench.index.delete_all(KIND).count == 2
    assert bench.index.describe(KIND, ["a", "b", "c"]) == [None] * 3


def test_what_waits_cannot_start_after_the_moment(bench: Bench, meanwhile: Meanwhile) -> None:
    sent, put_back = bench.enqueue("sent").wakeup, bench.enqueue("put back").wakeup
    bench.enqueue("parked", FAR, note="n")
    bench.advance(FAR)
    bench.enqueue("taken", FAR)

    def everything() -> None:
        bench.advance(FAR)
        reply = bench.claim(sent)
        assert isinstance(reply, Refusal)
        assert reply.reason is Refused.MISSING
        bench.put_back(put_back)
        assert bench.promote("parked") is None
        assert bench.index.take(KIND, 9, nonce="n", task_id="t") == []
        assert bench.resend("put back") is None
        assert bench.index.records(KIND, Status.PARKED, 9) == []
        assert bench.describe("parked") is None

    assert meanwhile(bench, everything) == 4
    assert bench.lane.stored() == {}


@pytest.mark.parametrize("verdict", [Verdict.DONE, Verdict.FAILED, Verdict.UNSTARTED])
def test_one_that_polls_ends(bench: Bench, meanwhile: Meanwhile, verdict: Verdict) -> None:
    run = bench.run(note="n")
    bench.enqueue(delay=5_000)

    def it_ends() -> None:
        assert bench.renew(run)
        assert bench.finish(run, verdict, delay=0) == ACCEPTED

    assert meanwhile(bench, it_ends) == 1
    assert bench.row() is None


def test_idle_and_quarantined_ones_do_not_come_back(bench: Bench, meanwhile: Meanwhile) -> None:
    bench.finish(bench.run("idle"), idle_ttl=5)
    bench.quarantine(bench.run("failed"))

    def the_sweeper_comes() -> None:
        bench.advance(10)
        bench.index.forget(KIND, bench.survey().expired)
        bench.index.retire(KIND, [Record("failed", Status.FAILED)])

    assert meanwhile(bench, the_sweeper_comes) == 2
    assert bench.lane.stored() == {}


@pytest.mark.parametrize("before", ["unknown", "parked", "sent", "running", "idle", "failed"])
def test_what_is_enqueued_after_the_moment_lives(bench: Bench, meanwhile: Meanwhile, before: str) -> None:
    if before in {"parked", "sent"}:
        bench.enqueue(delay=FAR if before == "parked" else 0, note="old")
    elif before != "unknown":
        run = bench.run(note="old")
        if before == "idle":
            bench.finish(run)
        elif before == "failed":
            bench.quarantine(run, failures=5)
    deadline = bench.now + 20_000

    def outside() -> None:
        assert bench.enqueue(at=deadline, note="new").deadline == deadline

    assert meanwhile(bench, outside) == (before != "unknown")
    assert bench.record().deadline == deadline
    if before == "running":
        bench.fail(run, failures=3)
    assert (bench.record().failures, bench.record().error, bench.record().note) == (0, "", "new")
    assert bench.evaluate().failures == 0


def test_and_goes_on_living(bench: Bench, meanwhile: Meanwhile) -> None:
    """It has been through everything by the time that it is met."""
    bench.enqueue("polls")

    def a_new_life() -> None:
        bench.fail(bench.run("fails"), failures=3)
        bench.finish(bench.run("polls"), delay=5_000)
        bench.finish(bench.run("rests"))
        bench.quarantine(bench.run("gives up"))
        bench.run("runs")

    assert meanwhile(bench, a_new_life) == 1
    assert [bench.status(id) for id in ("fails", "polls", "rests", "gives up", "runs")] == [
        *(Status.SENT, Status.SENT, Status.IDLE, Status.FAILED, Status.RUNNING)
    ]
    assert bench.record("fails").failures == 3


def test_one_that_is_deleted_and_enqueued_meanwhile_lives(bench: Bench, meanwhile: Meanwhile) -> None:
    run = bench.run()

    def anew() -> None:
        other = bench.run("b")
        for id in ("a", "b"):
            bench.delete(id)
            bench.enqueue(id, 5_000)
        bench.finish(other)

    meanwhile(bench, anew)
    assert bench.finish(run).deadline == bench.now + 5_000
    assert (bench.status("a"), bench.status("b")) == (Status.SENT, Status.SENT)


def test_one_that_broke_off(bench: Bench, meanwhile: Meanwhile) -> None:
    """What was deleted stays so, what came since lives, and the next call deletes all of it."""
    for id in ("a", "b", "c"):
        bench.enqueue(id)

    def is_killed() -> None:
        raise Away

    with pytest.raises(Away):
        meanwhile(bench, is_killed)
    assert bench.describe("a") is None
    bench.enqueue("b")
    bench.enqueue("d")
    assert [bench.status(id) for id in "abcd"] == [None, Status.SENT, None, Status.SENT]
    assert bench.index.delete_all(KIND).count == 2
    assert bench.lane.stored() == {}


def test_two_at_once(bench: Bench, meanwhile: Meanwhile) -> None:
    bench.enqueue("a")

    def another() -> None:
        bench.enqueue("b")
        meanwhile(bench, lambda: bench.enqueue("c"))

    meanwhile(bench, another)
    assert [bench.status(id) for id in "abc"] == [None, None, Status.SENT]
    bench.enqueue("d")
    assert "born" not in bench.lane.stored()[KIND, "d"].fields, "both are over"


# -- the kind itself


def names(bench: Bench) -> list[str]:
    return bench.index.kinds()


def test_an_empty_kind_is_forgotten(bench: Bench) -> None:
    bench.enqueue()
    assert not bench.index.forget_kind(KIND)
    bench.delete()
    assert bench.index.forget_kind(KIND)
    assert names(bench) == []
    assert bench.index.as_kept(KIND) is None


def test_one_that_runs_still_keeps_its_kind(bench: Bench) -> None:
    run = bench.run()
    bench.index.delete_all(KIND)
    assert not bench.index.forget_kind(KIND)
    assert names(bench) == [KIND]
    bench.finish(run)
    assert bench.index.forget_kind(KIND)


def test_so_does_a_pause(bench: Bench) -> None:
    bench.enqueue()
    bench.pause()
    bench.delete()
    assert not bench.index.forget_kind(KIND)
    assert bench.index.paused(KIND)
    bench.resume()
    assert bench.index.forget_kind(KIND)


def test_a_later_enqueue_remembers_it(bench: Bench) -> None:
    bench.enqueue()
    bench.delete()
    bench.index.forget_kind(KIND)
    assert bench.enqueue().changed
    assert names(bench) == [KIND]
    assert bench.index.as_kept(KIND) is not None


def test_so_does_a_move_to_it(bench: Bench) -> None:
    bench.enqueue()
    bench.delete()
    bench.index.forget_kind(KIND)
    bench.index.adopt(KIND, [Record("a", Status.PARKED, deadline=bench.now)])
    assert names(bench) == [KIND]


def test_tokens_rise_over_it_though_the_clock_is_set_back(bench: Bench) -> None:
    first = bench.run()
    bench.finish(first)
    bench.delete()
    bench.index.forget_kind(KIND)
    bench.lane.clock.set_back(1_800_000)
    assert int(bench.run().lease) > int(first.lease)


redis_only = pytest.mark.skipif("valkey" not in LANES, reason="not asked for")


@pytest.fixture
def open_index(valkey: Any) -> Any:
    yield lambda shards=1: RedisIndex(valkey, Limits(), shards=shards)
    valkey.flushall()


OpenIndex = Callable[..., RedisIndex]


@redis_only
@pytest.mark.parametrize("shards", [1, 4])
def test_nothing_is_left_but_a_token_for_an_hour(open_index: OpenIndex, valkey: Any, shards: int) -> None:
    index = open_index(shards)
    for id in map(str, range(20)):
        index.enqueue(KIND, [Request(id, 0, note="n")])
    index.survey([KIND], sweeper="s", hold=1, limit=1)
    index.delete_all(KIND)
    index.forget_kind(KIND)
    left = list(valkey.scan_iter())
    assert {key.split(":")[-1] for key in left} == {"token"}
    assert all(0 < valkey.ttl(key) <= 3600 for key in left)
    index.enqueue(KIND, [Request(id, 0) for id in map(str, range(20))])
    assert {valkey.ttl(key) for key in valkey.scan_iter()} == {-1}, "then it is kept again"


@redis_only
def test_a_forgotten_kind_may_have_another_number_of_shards(open_index: OpenIndex, valkey: Any) -> None:
    """And whoever still believes in the former one is told so, and writes nothing."""
    old, new = open_index(1), open_index(4)
    old.enqueue(KIND, [Request("a", 0)])
    with pytest.raises(ImproperlyConfigured, match="in 1 shards"):
        new.enqueue(KIND, [Request("a", 0)])
    old.delete_all(KIND)
    old.forget_kind(KIND)
    new.enqueue(KIND, [Request("a", 0)])
    before = {key: valkey.dump(key) for key in valkey.scan_iter()}
    for call in (
        lambda: old.enqueue(KIND, [Request("b", 0)]),
        lambda: old.enqueue(KIND, [Request("b", 0), Request("c", 0)]),
    ):
        with pytest.raises(ImproperlyConfigured, match="kind 'order' in 4 shards, and goalstate_shards is 1"):
            call()
    assert {key: valkey.dump(key) for key in valkey.scan_iter()} == before


@redis_only
def test_an_enqueue_that_comes_in_between_keeps_the_kind(
    open_index: OpenIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process that has known the kind all along: before the shards are forgotten, and after."""
    other, index = open_index(4), open_index(4)
    ids = {index._shard(str(n)): str(n) for n in range(20)}
    for name, shard in [("counts", 0), ("_run_each", 3), ("_commands", 0), ("_commands", 2)]:
        other.enqueue(KIND, [Request("a", 0)])
        index.delete_all(KIND)
        with monkeypatch.context() as patch:
            original = getattr(index, name)

            def first(*args: Any, original: Any = original, id: str = ids[shard]) -> Any:
                reply = original(*args)
                if args[0] == KIND or args[0] == "forget_kind" or args[0][0][0] == "SREM":
                    patch.undo()
                    other.enqueue(KIND, [Request(id, 0)])
                return reply

            patch.setattr(index, name, first)
            assert not index.forget_kind(KIND), name
        fresh = open_index(4)
        assert fresh.kinds() == [KIND], name
        assert sum(fresh.counts(KIND).values()) == 1, name
        with pytest.raises(ImproperlyConfigured, match="in 4 shards"):
            open_index(1).counts(KIND)
