"""A connection that breaks after Redis has done its work, before the reply arrives.

The index repeats the call by itself. What it repeats must be as if it had been called once: the same reply,
the same tokens, the same fields stored as in the reference, which was called once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from celery_goalstate.exceptions import IndexUnavailable
from celery_goalstate.index.base import (
    Limits,
    Position,
    Record,
    Refusal,
    Refused,
    Request,
    Run,
    Scheduled,
    Status,
    Verdict,
    Wakeup,
)
from tests.contract.bench import FENCED, KIND, Bench
from tests.contract.conftest import LANES
from tests.contract.lanes import Clock, MemoryLane, RedisLane, check

pytestmark = pytest.mark.skipif("valkey" not in LANES, reason="not asked for")

FAR = 10 * Limits().eta_horizon


class LossyConnection(redis.Connection):
    """Loses the next replies, after Redis has done its work."""

    to_lose = 0
    error: type[Exception] = redis.ConnectionError

    def on_connect_check_health(self, check_health: bool = True) -> None:
        """The handshake goes well: only replies to the index are lost."""
        kept, LossyConnection.to_lose = LossyConnection.to_lose, 0
        super().on_connect_check_health(check_health=check_health)
        LossyConnection.to_lose = kept

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        response = super().read_response(*args, **kwargs)
        if LossyConnection.to_lose:
            LossyConnection.to_lose -= 1
            self.disconnect()
            raise self.error("the reply was lost")
        return response


@pytest.fixture
def lossy(valkey: redis.Redis) -> Iterator[redis.Redis]:
    where = valkey.get_connection_kwargs()
    pool = redis.ConnectionPool(
        connection_class=LossyConnection,
        host=where["host"],
        port=where["port"],
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
    )
    yield redis.Redis(connection_pool=pool)
    pool.disconnect()
    LossyConnection.to_lose, LossyConnection.error = 0, redis.ConnectionError


@pytest.fixture
def bench(valkey: redis.Redis, lossy: redis.Redis) -> Iterator[Bench]:
    lane = RedisLane("lossy", valkey, Limits(), Clock(), index_client=lossy)
    lane.index.note([KIND])  # so that the next message is the one that is meant
    yield Bench(lane, Limits())
    check(lane.stored())
    lane.wipe()


@pytest.fixture
def reference() -> Bench:
    return Bench(MemoryLane(Limits(), Clock()), Limits())


def lose(replies: int = 1) -> None:
    LossyConnection.to_lose = replies


Step = Callable[[Bench], Any]
SAME = object()


@dataclass(frozen=True)
class Call:
    """A call after some preparation, and the reply when the first one was lost."""

    name: str
    prepare: Step
    call: Step
    reply: Any = SAME

    def __str__(self) -> str:
        return self.name


def nothing(bench: Bench) -> None:
    pass


def running(bench: Bench, **options: Any) -> Run:
    claim = bench.run(**options)
    return Run("a", claim.lease)


def field(bench: Bench, name: str) -> str:
    """Read past the index, whose connection is about to break."""
    row = bench.row()
    assert row is not None
    return row.fields[name]


def the_run(bench: Bench) -> Run:
    return Run("a", field(bench, "lease"))


def the_wakeup(bench: Bench) -> Wakeup:
    return Wakeup("a", field(bench, "token"), 0, "t1")


def several(*steps: Step) -> Step:
    def all_of_them(bench: Bench) -> None:
        for step in steps:
            step(bench)

    return all_of_them


def later(ms: int) -> Step:
    return lambda bench: bench.advance(ms)


def enqueue_two(bench: Bench) -> None:
    for id in "ab":
        bench.enqueue(id)


def claim_two(bench: Bench) -> Any:
    stored = bench.lane.stored()
    pairs = [(id, stored[KIND, id].fields["token"]) for id in "ab"]
    return bench.index.claim(KIND, pairs, nonce="n", task_id="t")


def running_two(bench: Bench) -> None:
    enqueue_two(bench)
    claim_two(bench)


def take(bench: Bench) -> Any:
    return bench.index.take(KIND, 10, nonce="n", task_id="t")


UNCHANGED = object()  # as SAME, but for the one thing that a repeated enqueue without a message cannot know

CALLS = [
    Call("enqueue", nothing, lambda b: b.enqueue(delay=5_000)),
    Call("enqueue earlier", lambda b: b.enqueue(delay=9_000), lambda b: b.enqueue(delay=5_000)),
    Call("enqueue later", lambda b: b.enqueue(delay=5_000), lambda b: b.enqueue(delay=9_000)),
    Call("replace", lambda b: b.enqueue(delay=5_000), lambda b: b.replace(delay=9_000), UNCHANGED),
    Call("revive", lambda b: b.quarantine(running(b)), lambda b: b.enqueue()),
    Call("enqueue far", nothing, lambda b: b.enqueue(delay=FAR), UNCHANGED),
    Call("enqueue while paused", Bench.pause, lambda b: b.enqueue(), UNCHANGED),
    Call("enqueue while running", running, lambda b: b.enqueue(delay=5_000), UNCHANGED),
    Call("enqueue inside", running, lambda b: b.enqueue(delay=9, inside=the_run(b)), UNCHANGED),
    Call("put back", lambda b: b.enqueue(), lambda b: b.put_back(the_wakeup(b))),
    Call("claim", lambda b: b.enqueue(), lambda b: b.claim(the_wakeup(b))),
    Call("claim early", lambda b: b.enqueue(delay=5_000), lambda b: b.claim(the_wakeup(b))),
    Call("claim stale", lambda b: b.enqueue(), lambda b: b.claim(Wakeup("a", "1", 0, "t1"))),
    Call("claim missing", nothing, lambda b: b.claim(Wakeup("a", "1", 0, "t1"))),
    Call(
        "claim paused",
        several(Bench.enqueue, Bench.pause),
        lambda b: b.claim(the_wakeup(b)),
        Refusal("a", Refused.STALE),
    ),
    Call("claim a batch", several(enqueue_two), claim_two),
    Call("take", several(lambda b: b.enqueue(delay=FAR), later(FAR)), take),
    Call("take nothing", nothing, take),
    Call("give back", running_two, lambda b: b.finish(the_run(b), Verdict.UNSTARTED, fresh_task_id="t9")),
    Call("lose a batch", several(running_two, later(30_000)), lambda b: b.lose(the_run(b))),
    Call("renew", running, lambda b: b.renew(the_run(b))),
    Call("finish", running, lambda b: b.finish(the_run(b))),
    Call("finish and evaluate again", running, lambda b: b.finish(the_run(b), delay=5_000)),
    Call("finish and evaluate again far", running, lambda b: b.finish(the_run(b), delay=FAR)),
    Call(
        "finish and evaluate again at once", several(running, Bench.enqueue), lambda b: b.finish(the_run(b))
    ),
    Call("fail", running, lambda b: b.fail(the_run(b), 5_000, task_id="t1", retries=3)),
    Call("quarantine", running, lambda b: b.quarantine(the_run(b))),
    Call("give up", several(running, later(30_000)), lambda b: b.lose(the_run(b))),
    Call("give up one that was renewed", running, lambda b: b.lose(the_run(b), lost_at=b.lease_end() - 1)),
    Call("finish a new life", several(running, Bench.delete, Bench.enqueue), lambda b: b.fail(the_run(b))),
    Call("finish a deleted one", several(running, Bench.delete), lambda b: b.finish(the_run(b)), FENCED),
    Call("enqueue with a note", nothing, lambda b: b.enqueue(delay=FAR, note="n"), UNCHANGED),
    Call(
        "fail with a note", lambda b: running(b, note="n"), lambda b: b.fail(the_run(b), 5_000, task_id="t1")
    ),
    Call("finish with a note", lambda b: running(b, note="n"), lambda b: b.finish(the_run(b))),
    Call("pause", nothing, lambda b: b.pause()),
    Call("resume", Bench.pause, lambda b: b.resume()),
    Call("describe", lambda b: b.enqueue(), lambda b: b.describe()),
    Call("list", lambda b: b.enqueue(), lambda b: b.index.records(KIND, Status.SENT, 10)),
    Call("page", lambda b: b.enqueue(), lambda b: b.index.records(KIND, Status.SENT, 10, Position(1, "a"))),
    Call("count", lambda b: b.enqueue(), lambda b: b.index.counts(KIND)),
    Call("survey", several(lambda b: b.enqueue(), later(10**6)), lambda b: b.survey()),
    Call("promote", several(lambda b: b.enqueue(delay=FAR), later(FAR)), lambda b: b.promote()),
    Call("resend", several(lambda b: b.enqueue(), later(60_000)), lambda b: b.resend()),
    Call("resend later", several(lambda b: b.enqueue(), later(60_000)), lambda b: b.resend(probe=False)),
    Call("adopt", nothing, lambda b: b.index.adopt(KIND, [Record("a", Status.PARKED, deadline=b.now)])),
    Call(
        "retire",
        lambda b: b.enqueue(),
        lambda b: b.index.retire(KIND, [Record("a", Status.SENT, deadline=b.now)]),
    ),
    Call("forget the kind", lambda b: b.index.note([KIND]), lambda b: b.index.forget_kind(KIND)),
    Call("forget", lambda b: b.finish(running(b), idle_ttl=0), lambda b: b.index.forget(KIND, ["a"]), 0),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_call_that_is_repeated_counts_once(bench: Bench, reference: Bench, call: Call) -> None:
    call.prepare(bench)
    call.prepare(reference)
    expected = call.call(reference)
    if call.reply is UNCHANGED:
        expected = Scheduled(False, expected.deadline, None)
    elif call.reply is not SAME:
        expected = call.reply
    lose()
    assert call.call(bench) == expected
    assert LossyConnection.to_lose == 0
    assert bench.lane.stored() == reference.lane.stored()


def test_a_deleted_entity_is_gone_though_the_caller_cannot_know(bench: Bench) -> None:
    """A repeat would deny what was done; so the error says that it may have been done."""
    bench.enqueue()
    lose()
    with pytest.raises(IndexUnavailable):
        bench.delete()
    assert bench.describe() is None


@pytest.mark.parametrize("which", ["the first", "met", "the last"])
def test_all_are_deleted_though_a_reply_is_lost(bench: Bench, which: str) -> None:
    """But for the last one: then the shard counts as away, and the next call finds nothing there."""
    for id in ("a", "b"):
        bench.enqueue(id)
    run, calls = bench.index._run_each, []

    def lose_one(name: str, given: list[Any], *args: Any, **options: Any) -> Any:
        if given:
            calls.append(name)
        at = {("delete_all", 1): "the first", ("running", 1): "met", ("delete_all", 2): "the last"}
        if given and at.get((name, calls.count(name))) == which:
            lose()
        return run(name, given, *args, **options)

    bench.index._run_each = lose_one
    done = bench.index.delete_all(KIND)
    assert (done.count, set(done.away)) == ((0, {0}) if which == "the last" else (2, set()))
    assert bench.index.delete_all(KIND).count == 0
    assert bench.lane.stored() == {}


def test_a_take_whose_claims_are_lost(bench: Bench, reference: Bench) -> None:
    """It asks twice: which entities are due, and for these. Here the second reply is lost."""
    for each in (bench, reference):
        each.enqueue(delay=FAR)
        each.advance(FAR)
    run, calls = bench.index._run_each, []

    def lose_the_second(name: str, *args: Any) -> Any:
        calls.append(name)
        if name == "take":
            lose()
        return run(name, *args)

    bench.index._run_each = lose_the_second
    assert take(bench) == take(reference)
    assert calls == ["overdue", "take"]
    assert bench.lane.stored() == reference.lane.stored()


def test_a_take_that_is_repeated_gets_nothing_that_was_deleted_meanwhile(bench: Bench) -> None:
    """After a delete no evaluation starts: as with a claim that is repeated."""
    bench.enqueue(delay=FAR)
    bench.advance(FAR)
    rows, header = [{"id": "a"}], {"nonce": "n", "task_id": "t"}
    [first] = bench.index._transition("take", KIND, rows, header)
    assert bench.index._transition("take", KIND, rows, header) == [first]
    bench.delete()
    assert bench.index._transition("take", KIND, rows, header) == [False]


@pytest.mark.parametrize(
    ("prepare", "call"),
    [
        (nothing, lambda b: b.enqueue()),
        (lambda b: b.enqueue(), lambda b: b.claim(the_wakeup(b))),
        (running, lambda b: b.finish(the_run(b))),
    ],
    ids=["enqueue", "claim", "finish"],
)
def test_a_second_loss_is_an_error(bench: Bench, reference: Bench, prepare: Step, call: Step) -> None:
    """It may or may not have been noted. Here it was, and the caller may repeat it."""
    prepare(bench)
    prepare(reference)
    call(reference)
    lose(2)
    with pytest.raises(IndexUnavailable):
        call(bench)
    assert bench.lane.stored() == reference.lane.stored()


def test_a_timeout_is_told_at_once(bench: Bench) -> None:
    """Whoever waited that long does not want to wait once more."""
    LossyConnection.error = redis.TimeoutError
    lose()
    with pytest.raises(IndexUnavailable):
        bench.enqueue()
    assert bench.status() is Status.SENT


def test_a_thousand_at_once(bench: Bench, reference: Bench) -> None:
    """Several scripts in one pipeline; the connection breaks somewhere in between."""
    ids = [f"id-{n}" for n in range(1_000)]
    requests = [Request(id, n % 5, None, f"t-{id}") for n, id in enumerate(ids)]
    expected = reference.index.enqueue(KIND, requests)
    bench.index.counts(KIND)
    lose()
    assert bench.index.enqueue(KIND, requests) == expected
    assert bench.lane.stored() == reference.lane.stored()
    for each in (bench, reference):
        each.advance(5)
    pairs = [(reply.wakeup.id, reply.wakeup.token) for reply in expected if reply.wakeup]
    lose()
    claims = bench.index.claim(KIND, pairs, nonce="n", task_id="t")
    assert claims == reference.index.claim(KIND, pairs, nonce="n", task_id="t")
    assert bench.lane.stored() == reference.lane.stored()
