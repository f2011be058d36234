"""A Redis Cluster that changes while it is used: slots move, nodes fall silent, die and are replaced."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis import exceptions as errors

from celery_goalstate import index as indexes
from celery_goalstate.exceptions import ImproperlyConfigured, IndexUnavailable
from celery_goalstate.index import open_index
from celery_goalstate.index import redis as redis_index
from celery_goalstate.index.base import Claim, Finish, Report, Request, Run, Verdict
from celery_goalstate.index.connection import Server
from celery_goalstate.index.redis import RedisIndex
from celery_goalstate.settings import Settings
from tests.servers import Cluster, RedisServer, Valkey, poll
from tests.topologies.conftest import EngineOn

KINDS = [f"kind-{number}" for number in range(12)]
TIMEOUT = 1.0  # seconds until a node counts as silent, here


def form(kind: str, shard: int = 0) -> str:
    return f"gs:{{default:{kind}:{shard}}}:form"


@pytest.fixture(params=[Valkey, RedisServer])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """Three masters, and a node that has just joined."""
    with Cluster(
        tmp_path, request.param, spare=1, cluster_require_full_coverage="no", appendonly="yes"
    ) as cluster:
        yield cluster


OpenIndex = Callable[..., RedisIndex]


@pytest.fixture
def open_index_on(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenIndex]:
    """As a fresh process opens it, but for its patience."""
    monkeypatch.setattr(indexes, "CONNECT_TIMEOUT", TIMEOUT)
    opened = []

    def open_it(url: str = "", **settings: Any) -> RedisIndex:
        index = open_index(Settings(index_url=url or cluster.url, index_timeout=TIMEOUT, **settings))
        assert isinstance(index, RedisIndex)
        opened.append(index)
        return index

    yield open_it
    for index in opened:
        index.close()


@contextmanager
def silent(node: Valkey | RedisServer) -> Iterator[None]:
    """It takes what it is sent, and says nothing."""
    with node.client() as client:
        pid = client.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def of(cluster: Cluster, node: Valkey | RedisServer) -> list[str]:
    """The kinds that are on a node."""
    return [kind for kind in KINDS if cluster.owner(form(kind)) is node]


def survey(index: RedisIndex) -> tuple[set[str], set[str], float]:
    """The kinds with something to do, those that are away, and how many seconds it took."""
    began = time.monotonic()
    surveys = index.survey(KINDS, sweeper="s", hold=1000, limit=9)
    took = time.monotonic() - began
    return {s.kind for s in surveys if s}, {s.kind for s in surveys if s.error}, took


def test_a_silent_node_is_in_no_other_s_way(
    cluster: Cluster, open_index_on: OpenIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_index, "REST", rest := 3 * TIMEOUT)
    index = open_index_on()
    index.note(KINDS)
    for kind in KINDS:
        scheduled = index.enqueue(kind, [Request("a", 0)])
        index.put_back(kind, [each.wakeup for each in scheduled if each.wakeup])
    node = cluster.nodes[0]
    there = set(of(cluster, node))
    others = set(KINDS) - there
    assert len(there) > 1
    with silent(node):
        due, away, took = survey(index)
        assert (due, away) == (others, there)
        assert took < 3 * TIMEOUT, "one time-out, however many kinds there are"
        due, away, took = survey(index)
        assert (due, away) == (others, there)
        assert took < TIMEOUT, "it is left out"

        fresh = open_index_on()
        for kind in others:
            assert fresh.enqueue(kind, [Request("b", 0)])[0].changed
            assert fresh.take(kind, 1, nonce="n", task_id="t")
        began = time.monotonic()
        many = [Request(f"{n}", 0) for n in range(3000)]  # a dozen scripts
        with pytest.raises(IndexUnavailable):
            fresh.enqueue(min(there), many)
        assert time.monotonic() - began < 3 * TIMEOUT, "one time-out, however many commands there are"
    poll("it is swept again", lambda: not survey(index)[1], timeout=rest + 10)


def test_silent_nodes_cost_each_of_them_one_time_out(
    cluster: Cluster, open_index_on: OpenIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one more when they are asked who has which slots: a worker's loop waits for all that."""
    monkeypatch.setattr(redis_index, "REST", rest := 10 * TIMEOUT)
    index = open_index_on()
    index.note(KINDS)
    with ExitStack() as stack:
        for node in cluster.nodes:
            stack.enter_context(silent(node))
        began = time.monotonic()
        with pytest.raises(IndexUnavailable):
            survey(index)
        asked = time.monotonic()
        assert asked - began < 10 * TIMEOUT, "three have slots, and four know who has"
        with pytest.raises(IndexUnavailable):
            survey(index)
        assert time.monotonic() - asked < TIMEOUT, "they are left out"
    poll("they are swept again", lambda: _is_swept(index), timeout=rest + 10)


def _is_swept(index: RedisIndex) -> bool:
    try:
        return not survey(index)[1]
    except IndexUnavailable:
        return False


def test_a_silent_node_s_replica_is_swept_as_soon_as_it_takes_over(
    cluster: Cluster, open_index_on: OpenIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_index, "REST", 600)
    for node in cluster.nodes:
        with node.client() as client:
            client.config_set("cluster-node-timeout", 1000)
    master, replica = cluster.nodes[0], cluster.nodes[3]
    cluster.replicate(replica, master)
    index = open_index_on()
    index.note(KINDS)
    there = set(of(cluster, master))
    with silent(master):
        assert survey(index)[1] == there
        poll("it has taken over", lambda: not survey(index)[1], timeout=60)


def test_a_node_that_is_gone_is_in_no_fresh_process_s_way(cluster: Cluster, open_index_on: OpenIndex) -> None:
    index = open_index_on()
    index.note(KINDS)
    with cluster.client() as client:
        first = client.get_default_node().port  # which the client asks what commands there are
    nodes = {cluster.owner("gs:{default}:kinds"), next(node for node in cluster.nodes if node.port == first)}
    for node in nodes:
        there = of(cluster, node)
        node.kill()
        fresh = open_index_on()
        for kind in set(KINDS) - set(there):
            assert fresh.enqueue(kind, [Request(str(node.port), 0)])[0].changed
        for kind in there:
            with pytest.raises(IndexUnavailable):
                fresh.enqueue(kind, [Request("a", 0)])
        node.start()
        poll("it is back", lambda there=there: _answers(index, there))
    index.note(KINDS)
    assert index.kinds() == sorted(KINDS)


def test_a_kind_is_deleted_in_the_shards_that_answer(cluster: Cluster, engine_on: EngineOn) -> None:
    engine, host = engine_on(cluster.url, goalstate_shards=8, goalstate_index_timeout=TIMEOUT)
    ids = range(200)
    engine.enqueue_many((host(id) for id in ids), 3600)
    index = engine.parts.index
    assert isinstance(index, RedisIndex)
    owners = {shard: cluster.owner(form("host", shard)) for shard in range(8)}
    for victim in set(owners.values()):
        there = tuple(shard for shard, node in owners.items() if node is victim)
        others = [id for id in ids if index._shard(str(id)) not in there]
        engine.enqueue_many((host(id) for id in ids), 3600)
        victim.kill()
        with pytest.raises(IndexUnavailable, match=f"{len(others)} entities of kind 'host' are") as raised:
            engine.delete_kind(host)
        assert raised.value.left == there
        assert engine.describe_many(host(id) for id in others) == [None] * len(others)
        victim.start()
        poll("it is back", lambda: _answers(index, ["host"]))
        assert engine.delete_kind(host) == len(ids) - len(others)
        assert index.kinds() == []


def _answers(index: RedisIndex, kinds: list[str]) -> bool:
    try:
        return all(index.counts(kind) for kind in kinds)
    except IndexUnavailable:
        return False


def test_another_number_of_shards_is_refused_whatever_node_is_gone(
    cluster: Cluster, open_index_on: OpenIndex
) -> None:
    index = open_index_on(shards=4)
    index.note(["order"])
    owners = [cluster.owner(form("order", shard)) for shard in range(4)]
    for node in {owners[0], owners[1]}:
        node.kill()
        for shards in (1, 2, 8):
            # Never taken for a kind that is new.
            with pytest.raises((ImproperlyConfigured, IndexUnavailable)):
                open_index_on(shards=shards).enqueue("order", [Request("a", 0)])
        if set(owners) != {node}:
            fresh = open_index_on(shards=4)
            fresh.survey(["order"], sweeper="s", hold=1, limit=1)
            answering = [id for id in map(str, range(20)) if owners[fresh._shard(id)] is not node]
            assert len(fresh.enqueue("order", [Request(id, 0) for id in answering])) == len(answering)
        node.start()
        poll("it is back", lambda: _answers(index, ["order"]))


def test_a_shard_on_the_move_waits_and_keeps_everything(cluster: Cluster, open_index_on: OpenIndex) -> None:
    """To a node with slots and to one that has just joined; others go on meanwhile."""
    index = open_index_on()
    index.note(KINDS)
    ids = [str(n) for n in range(40)]
    scheduled = index.enqueue("kind-0", [Request(id, 0, task_id=id) for id in ids])
    [token] = [each.wakeup.token for each in scheduled[:1] if each.wakeup]
    [claim] = index.claim("kind-0", [("0", token)], nonce="n", task_id="0")
    assert isinstance(claim, Claim)
    home = cluster.owner(form("kind-0"))
    neighbours = set(of(cluster, home)) - {"kind-0"}
    targets = [next(node for node in cluster.nodes[:3] if node is not home), cluster.nodes[3]]

    def meanwhile(target: Valkey | RedisServer) -> None:
        if target is cluster.nodes[3]:  # where redis-py does not find its way yet
            with pytest.raises(IndexUnavailable):
                index.counts("kind-0")
        else:
            assert sum(index.counts("kind-0").values()) == len(ids)
        with pytest.raises(IndexUnavailable):
            index.enqueue("kind-0", [Request("new", 0)])
        with pytest.raises(IndexUnavailable):
            index.renew("kind-0", [Run("0", claim.lease)])
        assert survey(index)[1] == {"kind-0"}
        for kind in neighbours:
            assert index.enqueue(kind, [Request("a", 0)])

    for target in targets:
        assert cluster.move(form("kind-0"), target, midway=partial(meanwhile, target)) > len(ids)
        assert cluster.owner(form("kind-0")) is target
        assert sum(index.counts("kind-0").values()) == len(ids)
        assert index.renew("kind-0", [Run("0", claim.lease)]) == [True]
        assert all(index.describe("kind-0", ids))
    (finished,) = index.finish("kind-0", [Report("0", claim.lease, Verdict.DONE, None)])
    assert finished.result is Finish.ACCEPTED


def test_a_second_redirect_to_a_node_that_has_just_joined_says_unavailable(
    cluster: Cluster, open_index_on: OpenIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the keys are with the one node; when the client says it again, all are with the other."""
    index = open_index_on()
    index.enqueue("kind-0", [Request("a", 0)])
    too_early = [errors.TryAgainError("TRYAGAIN Multiple keys request during rehashing of slot")]

    def meanwhile() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Server, "exchange", lambda _, commands: too_early * len(commands))
            with pytest.raises(IndexUnavailable):
                index.enqueue("kind-0", [Request("a", 0)])

    cluster.move(form("kind-0"), cluster.nodes[3], midway=meanwhile)
    assert index.enqueue("kind-0", [Request("a", 0)])
