"""What is Redis' own: its clock, its scripts, its keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import redis
from kombu.utils.uuid import uuid
from redis.backoff import NoBackoff
from redis.retry import Retry

from celery_goalstate.exceptions import ImproperlyConfigured, IndexUnavailable
from celery_goalstate.index.base import (
    Claim,
    Finish,
    Limits,
    Policy,
    Report,
    Request,
    Run,
    Status,
    Verdict,
    Wakeup,
    Watch,
)
from celery_goalstate.index.redis import RedisIndex
from tests.contract.bench import KIND
from tests.contract.conftest import LANES
from tests.servers import HOST, free_port, poll

pytestmark = pytest.mark.skipif("valkey" not in LANES, reason="not asked for")


@pytest.fixture
def index(valkey: Any) -> Iterator[RedisIndex]:
    """On the server's own clock."""
    yield RedisIndex(valkey, Limits())
    valkey.flushall()


def milliseconds(client: Any) -> int:
    seconds, micros = client.time()
    return seconds * 1_000 + micros // 1_000


def test_its_clock_is_the_index_s(index: RedisIndex, valkey: Any) -> None:
    before = milliseconds(valkey)
    (reply,) = index.enqueue(KIND, [Request("a", 5_000)])
    after = milliseconds(valkey)
    assert before + 5_000 <= reply.deadline <= after + 5_000
    (record,) = index.describe(KIND, ["a"])
    assert record is not None
    assert before * 1_000 <= int(record.token) <= after * 1_000


def test_tokens_rise_over_the_loss_of_all_data(index: RedisIndex, valkey: Any) -> None:
    (first,) = index.enqueue(KIND, [Request("a", 0)])
    valkey.flushall()
    flushed = milliseconds(valkey)
    poll("the next millisecond", lambda: milliseconds(valkey) > flushed, interval=0.001)
    (second,) = index.enqueue(KIND, [Request("a", 0)])
    assert first.wakeup
    assert second.wakeup
    assert int(second.wakeup.token) > int(first.wakeup.token)


def test_no_token_is_given_twice_when_a_script_breaks_off(index: RedisIndex, valkey: Any) -> None:
    ahead = milliseconds(valkey) * 1_000 + 10**9  # of the clock: the next ones are counted, not read off it
    valkey.set("gs:{default:order:0}:token", ahead)
    rows = [{"id": "a", "task_id": "1"}, {"id": "b", "delay": "no time", "task_id": "2"}]
    with pytest.raises(redis.ResponseError):
        index._transition("enqueue", KIND, rows, {"policy": "earliest"})
    (a,) = index.describe(KIND, ["a"])
    (c,) = index.enqueue(KIND, [Request("c", 0)])
    assert a is not None
    assert c.wakeup
    assert ahead < int(a.token) < int(c.wakeup.token)


def test_scripts_are_loaded_when_it_does_not_know_them(index: RedisIndex, valkey: Any) -> None:
    valkey.script_flush()
    index.enqueue(KIND, [Request("a", 0)])
    valkey.script_flush()
    many = [Request(f"id-{n}", 0) for n in range(1_000)]
    assert len(index.enqueue(KIND, many)) == 1_000
    assert index.counts(KIND)[Status.SENT] == 1_001


def test_namespaces_and_prefixes_do_not_meet(index: RedisIndex, valkey: Any) -> None:
    others = [
        RedisIndex(valkey, Limits(), namespace="other"),
        RedisIndex(valkey, Limits(), key_prefix="other"),
    ]
    index.enqueue(KIND, [Request("a", 0)])
    index.pause(KIND, by="ann")
    for other in others:
        assert other.describe(KIND, ["a"]) == [None]
        assert not other.paused(KIND)
        assert other.delete(KIND, ["a"]) == [False]
    assert {key.split(":")[0] for key in valkey.scan_iter()} == {"gs"}


def test_every_key_of_a_shard_is_in_one_slot(index: RedisIndex, valkey: Any) -> None:
    for id in ("a", "{b}", "}c{", "{}"):
        index.enqueue(KIND, [Request(id, 0)])
        index.delete(KIND, [id])
        index.enqueue(KIND, [Request(id, 10**9)])
    keys = set(valkey.scan_iter()) - {"gs:{default}:kinds"}
    slots = {redis.cluster.key_slot(key.encode()) for key in keys}
    assert slots == {redis.cluster.key_slot(b"gs:{default:order:0}:token")}


def test_a_name_whose_record_was_evicted_is_in_no_sweep_s_way(index: RedisIndex, valkey: Any) -> None:
    now = milliseconds(valkey)
    for key, name in {"parked": "parked-1", "sent": "sent-1", "suspect": "sent-1", "idle": "idle-1"}.items():
        valkey.zadd(f"gs:{{default:{KIND}:0}}:{key}", {name: now - 1_000})
    (survey,) = index.survey([KIND], sweeper="s", hold=1_000, limit=100)
    assert (survey.due, survey.suspect, survey.expired) == (("parked-1",), ("sent-1",), ("idle-1",))
    assert index.promote(KIND, {"parked-1": "task"}) == []
    assert index.resend(KIND, {"sent-1": "task"}, probe="sent-1") == []
    assert index.forget(KIND, ["idle-1"]) == 0
    (survey,) = index.survey([KIND], sweeper="s", hold=1_000, limit=100)
    assert not survey
    assert not any(index.counts(KIND).values())


def test_nor_are_names_of_evaluations(valkey: Any) -> None:
    """As many as a survey finds would hide those that are there, and lost, for ever."""
    index = RedisIndex(valkey, Limits(lease=1))
    (scheduled,) = index.enqueue(KIND, [Request("lost", 0)])
    index.claim(KIND, [("lost", scheduled.wakeup.token)], nonce="n", task_id="t")
    names = {f"name-{n}": 0 for n in range(3)}
    valkey.zadd(f"gs:{{default:{KIND}:0}}:running", names)
    (survey,) = index.survey([KIND], sweeper="s", hold=1_000, limit=3)
    assert {id for id, _ in survey.lost} == names.keys()
    assert index.running(KIND, list(names)) == []
    for _ in range(2):
        watched = {(KIND, 0): Watch(survey.count, passed=1)}
        (survey,) = index.survey([KIND], sweeper="s", hold=1_000, limit=3, watched=watched)
    assert [id for id, _ in survey.lost] == ["lost"]
    valkey.flushall()


def damage(valkey: Any, id: str, value: str) -> Iterator[str]:
    """Put a value in the place of each number that is stored of an entity, one after the other."""
    key = f"gs:{{default:{KIND}:0}}:e:{id}"
    for field, number in valkey.hgetall(key).items():
        if number.isdigit() and field not in {"converged", "last"}:  # which are never counted with
            valkey.hset(key, field, value)
            yield field
            valkey.hset(key, field, number)


@pytest.mark.parametrize("value", ["", "-1", "nan", "0x10", "9" * 400], ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize("status", ["parked", "backing off", "sent", "running", "idle", "failed"])
def test_a_damaged_number_is_named_and_in_nobody_s_way(valkey: Any, status: str, value: str) -> None:
    index = RedisIndex(valkey, Limits(eta_horizon=10, resend_after=1))
    damaged, *well = ids = ["damaged", "well-1", "well-2"]

    def claim(wakeups: Sequence[Wakeup]) -> list[Claim]:
        claims = [index.claim(KIND, [(w.id, w.token)], nonce=uuid(), task_id="t") for w in wakeups]
        return [claim for [claim] in claims if isinstance(claim, Claim)]

    def create() -> None:
        delay = 10**7 if status == "parked" else 0
        scheduled = index.enqueue(KIND, [Request(id, delay, task_id="t") for id in ids])
        if status in {"parked", "sent"}:
            return
        verdict = {"failed": Verdict.QUARANTINED, "backing off": Verdict.FAILED}.get(status, Verdict.DONE)
        for held in claim([each.wakeup for each in scheduled if each.wakeup]):
            if status == "running":
                index.enqueue(KIND, [Request(held.id, 10**6)])
                index.enqueue(KIND, [Request(held.id, 10**6)], inside=Run(held.id, held.lease))
            else:
                again = 50 if verdict is Verdict.FAILED else None
                report = {"failures": 1, "rounds": 1, "task_id": "t", "respect_backoff": True}
                index.finish(KIND, [Report(held.id, held.lease, verdict, again, **report)])

    def wakeups() -> list[Wakeup]:
        promoted = index.promote(KIND, {damaged: uuid()})
        return [*promoted, *index.resend(KIND, {damaged: uuid()}, probe=damaged)]

    create()
    assert valkey.hlen(f"gs:{{default:{KIND}:0}}:e:{damaged}") > 1
    for field in damage(valkey, damaged, value):
        assert {record.id: record.error for record in index.describe(KIND, ids) if record} == {
            damaged: f"damaged in the index: {field}",
            **dict.fromkeys(well, ""),
        }
        assert len([record for each in Status for record in index.records(KIND, each, 10)]) == 3
        index.survey([KIND], sweeper="s", hold=1_000, limit=100)

    for field in damage(valkey, damaged, value):
        index.enqueue(KIND, [Request(id, 0) for id in ids], policy=Policy.REPLACE)
        runs = index.running(KIND, ids)
        ended = index.finish(KIND, [Report(run.id, run.lease, Verdict.DONE, None) for run in runs])
        assert {each.result for each in ended} <= {Finish.ACCEPTED}
        index.enqueue(KIND, [Request(id, 0) for id in ids], policy=Policy.REPLACE)
        evaluated = poll(f"{field}: an evaluation", lambda: claim(wakeups()))
        index.finish(KIND, [Report(run.id, run.lease, Verdict.DONE, None) for run in evaluated])
        [record] = index.describe(KIND, [damaged])
        assert record
        assert (record.status, record.error) == (Status.IDLE, ""), "it is as new"
        valkey.flushall()
        create()
    valkey.flushall()


@pytest.mark.parametrize("name", ["token", "claimed", "sweeper"])
def test_nor_is_a_damaged_number_of_a_whole_shard(index: RedisIndex, valkey: Any, name: str) -> None:
    index.enqueue(KIND, [Request("a", 0)])
    valkey.set(f"gs:{{default:{KIND}:0}}:{name}", "x")
    (survey,) = index.survey([KIND], sweeper="s", hold=1_000, limit=100)
    assert survey.kind == KIND
    (reply,) = index.enqueue(KIND, [Request("b", 0)])
    assert reply.wakeup
    index.resend(KIND, {"a": "t"}, probe=None)
    (claim,) = index.claim(KIND, [("b", reply.wakeup.token)], nonce="n", task_id="t")
    assert isinstance(claim, Claim)


@pytest.mark.parametrize("score", ["-inf", "-1", "0.5", "1e300", "inf"])
@pytest.mark.parametrize("status", ["parked", "suspect", "running", "idle", "failed"])
def test_a_damaged_score_is_mended_and_in_nobody_s_way(valkey: Any, status: str, score: str) -> None:
    """Many of them neither fill every survey, nor are they ever forgotten."""
    index, many = RedisIndex(valkey, Limits(lease=50, resend_after=1, eta_horizon=0)), 5
    ids = [f"damaged-{n}" for n in range(many)]
    requests = [Request(id, 300 if status == "parked" else 0) for id in [*ids, "well"]]
    wakeups = [each.wakeup for each in index.enqueue(KIND, requests)]
    if status not in {"parked", "suspect"}:
        pairs = [(wakeup.id, wakeup.token) for wakeup in wakeups if wakeup]
        verdict = Verdict.QUARANTINED if status == "failed" else Verdict.DONE
        for claim in index.claim(KIND, pairs, nonce="n", task_id="t"):
            assert isinstance(claim, Claim)
            if status != "running":
                index.finish(KIND, [Report(claim.id, claim.lease, verdict, None, idle_ttl=10**6)])
    valkey.zadd(f"gs:{{default:{KIND}:0}}:{status}", dict.fromkeys(ids, score))
    listed = Status.SENT if status == "suspect" else Status(status)
    assert {each.id for each in index.records(KIND, listed, 10)} == {*ids, "well"}
    assert {each.id for each in index.describe(KIND, [*ids, "well"]) if each} == {*ids, "well"}

    found = set()
    watched: dict[tuple[str, int], Watch] = {}

    def all_are_found() -> bool:
        (survey,) = index.survey([KIND], sweeper="s", hold=1_000, limit=many, watched=watched)
        watched[KIND, 0] = Watch(survey.count, passed=10)
        promoted = index.promote(KIND, {id: uuid() for id in survey.due})
        sent = index.resend(
            KIND, {id: uuid() for id in survey.suspect}, probe=next(iter(survey.suspect), None)
        )
        ends = dict(survey.lost)
        lost = [
            run.id
            for run in index.running(KIND, list(ends))
            for ended in index.finish(
                KIND, [Report(run.id, run.lease, Verdict.DONE, None, idle_ttl=10**6, lost_at=ends[run.id])]
            )
            if ended.result is Finish.ACCEPTED
        ]
        index.forget(KIND, survey.expired)
        found.update(lost, (wakeup.id for wakeup in [*promoted, *sent]))
        return found == {*ids, "well"}

    if status in {"idle", "failed"}:
        index.survey([KIND], sweeper="s", hold=1_000, limit=many)
        for (reply,) in (index.enqueue(KIND, [Request(id, 0)]) for id in [*ids, "well"]):
            assert reply.wakeup
    else:
        poll("all are found", all_are_found)
    valkey.flushall()


@pytest.mark.parametrize("status", ["parked", "sent", "running", "idle", "failed", "unknown"])
def test_a_record_that_is_no_hash_is_rebuilt_and_in_nobody_s_way(valkey: Any, status: str) -> None:
    index = RedisIndex(valkey, Limits(lease=100, resend_after=1))
    ids = ["damaged", "well"]
    deadline = milliseconds(valkey) + 10**7
    [damaged, _] = index.enqueue(
        KIND, [Request(id, at=deadline if status == "parked" else None, delay=0) for id in ids]
    )
    if status not in {"parked", "sent"}:
        assert damaged.wakeup
        verdict = Verdict.QUARANTINED if status == "failed" else Verdict.DONE
        pair = (damaged.wakeup.id, damaged.wakeup.token)
        [claim] = index.claim(KIND, [pair], nonce="n", task_id="t")
        assert isinstance(claim, Claim)
        if status != "running":
            index.finish(KIND, [Report(claim.id, claim.lease, verdict, None)])
        if status == "unknown":
            index.delete(KIND, ["damaged"])
    began = milliseconds(valkey)
    valkey.set(f"gs:{{default:{KIND}:0}}:e:damaged", "a string")

    [record, well] = index.describe(KIND, ids)
    assert well
    assert well.error == ""
    if status == "unknown":
        assert record is None
        assert index.enqueue(KIND, [Request("damaged", 0)])[0].wakeup
        valkey.flushall()
        return
    assert record
    assert record.error == "damaged in the index: the whole record"
    if status in {"idle", "failed"}:
        assert record.status == status
        assert index.enqueue(KIND, [Request("damaged", 0)])[0].wakeup
    else:
        assert record.status == Status.PARKED
        assert record.deadline
        if status == "parked":
            assert record.deadline == deadline
            again = index.enqueue(KIND, [Request("damaged", 0)])[0].wakeup
        else:
            [again] = index.promote(KIND, {"damaged": "t"})
        assert again
        pair = (again.id, again.token)
        poll(
            "an evaluation",
            lambda: isinstance(index.claim(KIND, [pair], nonce="again", task_id="t")[0], Claim),
        )
        if status == "running":
            assert milliseconds(valkey) >= record.deadline >= began + 100, "after the lease that a worker had"
    assert sum(index.counts(KIND).values()) == 2
    valkey.flushall()


def test_an_entity_stays_in_its_shard_over_releases(valkey: Any) -> None:
    """Else an upgrade would lose all that is scheduled."""
    index = RedisIndex(valkey, Limits(), shards=8)
    index.enqueue(KIND, [Request(id, 10**9) for id in ("a", "42", "web-017", "ünï")])
    where = {key.split(":e:")[1]: int(key.split("}")[0][-1]) for key in valkey.scan_iter("*:e:*")}
    valkey.flushall()
    assert where == {"a": 3, "42": 0, "web-017": 1, "ünï": 2}


def test_another_number_of_shards_is_refused_by_every_call(index: RedisIndex, valkey: Any) -> None:
    """Its entities would not be found, and each could have a second record."""
    index.enqueue(KIND, [Request("a", 0)])
    other = RedisIndex(valkey, Limits(), shards=4)
    for call in (
        lambda: other.note([KIND]),
        lambda: other.enqueue(KIND, [Request("a", 0)]),
        lambda: other.claim(KIND, [("a", "1")], nonce="n", task_id="t"),
        lambda: other.take(KIND, 1, nonce="n", task_id="t"),
        lambda: other.describe(KIND, ["a"]),
        lambda: other.counts(KIND),
        lambda: other.pause(KIND, by="ann"),
    ):
        with pytest.raises(ImproperlyConfigured, match="kind 'order' in 1 shards, and goalstate_shards is 4"):
            call()
    other.enqueue("host", [Request("a", 0)])
    with pytest.raises(ImproperlyConfigured, match="kind 'host' in 4 shards, and goalstate_shards is 1"):
        index.counts("host")


def test_a_kind_with_another_number_of_shards_can_be_seen_as_it_is_kept(
    index: RedisIndex, valkey: Any
) -> None:
    index.enqueue(KIND, [Request(id, 0) for id in ("a", "b", "c")])
    other = RedisIndex(valkey, Limits(), shards=4)
    kept = other.as_kept(KIND)
    assert kept is not None
    assert kept.counts(KIND)[Status.SENT] == 3
    other.enqueue("host", [Request("a", 0)])
    with pytest.raises(ImproperlyConfigured, match="kind 'host' in 4 shards"):
        kept.counts("host")
    valkey.set("gs:{default:order:0}:form", '{"layout": 3, "shards": 1}')
    with pytest.raises(ImproperlyConfigured, match="layout 3"):
        other.as_kept(KIND)


def test_a_layout_of_a_later_release_is_refused(index: RedisIndex, valkey: Any) -> None:
    valkey.set("gs:{default:order:0}:form", '{"layout": 3, "shards": 1, "surprise": true}')
    with pytest.raises(ImproperlyConfigured, match=r"kind 'order' in layout 3, .* knows layout 2"):
        index.enqueue(KIND, [Request("a", 0)])
    valkey.set("gs:{default:order:0}:form", '{"layout": 2, "shards": 1, "surprise": true}')
    assert index.enqueue(KIND, [Request("a", 0)])


def test_fields_of_a_later_release_are_kept(index: RedisIndex, valkey: Any) -> None:
    """Old and new workers share records while a release is rolled out."""
    [scheduled] = index.enqueue(KIND, [Request("a", 0, task_id="first")])
    record = "gs:{default:order:0}:e:a"
    valkey.hset(record, "surprise", "1e+16")
    assert scheduled.wakeup
    [claim] = index.claim(KIND, [("a", scheduled.wakeup.token)], nonce="n", task_id="first")
    assert isinstance(claim, Claim)
    assert index.renew(KIND, [Run("a", claim.lease)]) == [True]
    index.enqueue(KIND, [Request("a", 5_000)])
    index.finish(KIND, [Report("a", claim.lease, Verdict.DONE, None)])
    index.enqueue(KIND, [Request("a", 10**9)], policy=Policy.REPLACE)
    assert index.promote(KIND, {"a": "second"}) == []
    assert valkey.hget(record, "surprise") == "1e+16"
    index.delete(KIND, ["a"])
    assert not valkey.exists(record)


def test_its_absence_is_an_error() -> None:
    with redis.Redis(
        host=HOST, port=free_port(), retry=Retry(NoBackoff(), 0), decode_responses=True
    ) as client:
        index = RedisIndex(client, Limits())
        for call in (
            lambda: index.enqueue(KIND, [Request("a", 0)]),
            lambda: index.delete(KIND, ["a"]),
            lambda: index.describe(KIND, ["a"]),
            lambda: index.counts(KIND),
            lambda: index.pause(KIND, by="ann"),
            lambda: index.survey([KIND], sweeper="s", hold=1, limit=1),
        ):
            with pytest.raises(IndexUnavailable):
                call()


def test_a_mistake_is_no_absence(index: RedisIndex, valkey: Any) -> None:
    """A key of ours that holds something else: waiting does not help."""
    valkey.set("gs:{default:order:0}:parked", "another's")
    with pytest.raises(redis.ResponseError):
        index.enqueue(KIND, [Request("a", 10**9)])


def test_an_enqueue_that_fails_in_one_shard_leaves_no_wake_up_to_nobody(valkey: Any) -> None:
    """They would be missed only after `resend_after`, and the same enqueue again would not send them."""
    index = RedisIndex(valkey, Limits(), shards=2)
    index.note([KIND])
    valkey.set(f"gs:{{default:{KIND}:1}}:sent", "another's")
    with pytest.raises(redis.ResponseError):
        index.enqueue(KIND, [Request(f"{n}", 0) for n in range(10)])
    valkey.delete(f"gs:{{default:{KIND}:1}}:sent")
    counts = index.counts(KIND)
    assert 0 < counts[Status.PARKED] < 10
    assert counts[Status.SENT] == 0
    valkey.flushall()


def test_a_mistake_in_one_kind_is_in_no_other_kind_s_way(index: RedisIndex, valkey: Any) -> None:
    index.note([KIND, "cart"])
    valkey.set("gs:{default:order:0}:sent", "another's")
    first, second = index.survey([KIND, "cart"], sweeper="s", hold=1_000, limit=9)
    assert isinstance(first.error, redis.ResponseError)
    assert (second.kind, second.error) == ("cart", None)
    with pytest.raises(redis.ResponseError):
        index.survey([KIND], sweeper="s", hold=1_000, limit=9)


@pytest.mark.parametrize("status", ["parked", "sent", "running"])
def test_enqueue_finds_an_entity_again_whose_sorted_set_was_evicted(
    index: RedisIndex, valkey: Any, status: str
) -> None:
    (scheduled,) = index.enqueue(KIND, [Request("a", 10**9 if status == "parked" else 0, task_id="task")])
    if status == "running":
        index.claim(KIND, [("a", scheduled.wakeup.token)], nonce="n", task_id="task")
    valkey.delete(f"gs:{{default:{KIND}:0}}:{status}")
    (record,) = index.describe(KIND, ["a"])
    assert record is not None
    assert record.status == status
    index.enqueue(KIND, [Request("a", 10**9)], policy=Policy.RESYNC)
    assert index.counts(KIND)[Status(status)] == 1
    assert record.lease_expires is None or record.lease_expires <= milliseconds(valkey)
    index.survey([KIND], sweeper="s", hold=1_000, limit=9)
    (record,) = index.describe(KIND, ["a"])
    assert record is not None
    assert record.lease_expires is None or record.lease_expires > milliseconds(valkey)


@pytest.fixture
def full(valkey: Any) -> Iterator[Callable[[], None]]:
    """Fills the server, in effect."""
    yield lambda: valkey.config_set("maxmemory", 1)
    valkey.config_set("maxmemory", 0)


def test_a_full_redis_refuses_enqueues_and_nothing_else(index: RedisIndex, full: Callable[[], None]) -> None:
    requests = [Request(id, 0, task_id=f"task-{id}") for id in ("run", "end", "sent", "parked")]
    replies = index.enqueue(KIND, requests)
    tokens = {reply.wakeup.id: reply.wakeup for reply in replies}
    (claim,) = index.claim(KIND, [("end", tokens["end"].token)], nonce="n", task_id="task-end")
    full()
    with pytest.raises(IndexUnavailable) as refused:
        index.enqueue(KIND, [Request("new", 0)])
    assert "full" in str(refused.value)
    assert "maxmemory" in str(refused.value)
    assert "script" not in str(refused.value)
    (survey,) = index.survey([KIND], sweeper="s", hold=1_000, limit=9)
    assert survey.due == survey.lost == ()
    report = Report("end", claim.lease, Verdict.FAILED, 10**9, failures=1, error="e" * 500)
    assert index.renew(KIND, [Run("end", claim.lease)]) == [True]
    assert [ended.result for ended in index.finish(KIND, [report])] == [Finish.ACCEPTED]
    (claim,) = index.claim(KIND, [("run", tokens["run"].token)], nonce="n", task_id="task-run")
    index.finish(KIND, [Report("run", claim.lease, Verdict.DONE, None, idle_ttl=0)])
    assert index.forget(KIND, ["run"]) == 1
    index.put_back(KIND, [tokens["parked"]])
    assert [wakeup.id for wakeup in index.promote(KIND, {"parked": "task"})] == ["parked"]
    index.put_back(KIND, index.promote(KIND, {"parked": "task"}))
    assert [taken.id for taken in index.take(KIND, 9, nonce="n2", task_id="t")] == ["parked"]
    assert index.resend(KIND, {"sent": "task"}, probe="sent") == []
    assert index.retire(KIND, index.describe(KIND, ["sent"])) == [True]
    assert index.delete(KIND, ["parked", "end", "new"]) == [True, True, False]
    assert index.delete_all(KIND).count == 0
    assert index.forget_kind("host")


@pytest.mark.parametrize("spoil", ["evicted", "damaged"])
def test_a_note_that_was_evicted_or_is_no_text_is_in_nobody_s_way(
    index: RedisIndex, valkey: Any, spoil: str
) -> None:
    index.enqueue(KIND, [Request(id, 10_000 * 60, task_id=id, note=id) for id in ("a", "b")])
    key = f"gs:{{default:{KIND}:0}}:n:a"
    valkey.delete(key)
    if spoil == "damaged":
        valkey.rpush(key, "a list")
    assert [record.note for record in index.describe(KIND, ["a", "b"]) if record] == ["", "b"]
    replies = index.enqueue(KIND, [Request(id, 0) for id in ("a", "b")], policy=Policy.REPLACE)
    assert all(reply.changed for reply in replies)
    assert not list(valkey.scan_iter("*:n:*"))


def test_a_note_outlives_a_record_that_is_rebuilt(index: RedisIndex, valkey: Any) -> None:
    index.enqueue(KIND, [Request("a", 10**7, note="n")])
    valkey.set(f"gs:{{default:{KIND}:0}}:e:a", "a string")
    [record] = index.describe(KIND, ["a"])
    assert record
    assert (record.status, record.note) == (Status.PARKED, "n")


def test_only_a_note_costs_a_key(index: RedisIndex, valkey: Any) -> None:
    index.enqueue(KIND, [Request("a", 10**7)])
    assert not list(valkey.scan_iter("*:n:*"))
    assert not valkey.hexists(f"gs:{{default:{KIND}:0}}:e:a", "noted")


@pytest.mark.parametrize("damage", ["of one counter", "of all"])
def test_counters_that_are_damaged_are_in_nobody_s_way(
    index: RedisIndex, valkey: redis.Redis, damage: str
) -> None:
    """They begin anew, as after a restart."""
    key = index._key(KIND, 0, "metrics")
    index.enqueue(KIND, [Request("a", 0, task_id="a")])
    valkey.delete(key)
    if damage == "of all":
        valkey.set(key, "damaged")
    else:
        valkey.hset(key, "enqueues:new", "many")
        assert index.metrics([KIND])[KIND].enqueues == {}
    index.enqueue(KIND, [Request("b", 0, task_id="b")])
    assert index.metrics([KIND])[KIND].enqueues == {"new": 1}
