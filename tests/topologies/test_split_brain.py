"""A master that is cut off from sentinels and replica, and lives on with those who are beside it.

It goes on giving out leases and acknowledging enqueues while another takes over, and loses all that when it
comes back as a replica. `docs/explanation/guarantees.md` says what that breaks, and what mends it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_goalstate import Engine, Entity
from celery_goalstate.exceptions import IndexUnavailable
from celery_goalstate.index.base import Claim, Finish, Index, Report, Request, Run, Verdict
from tests.servers import RedisServer, poll
from tests.topologies.conftest import EngineOn
from tests.topologies.sentinels import Sentinels

LAG = 3  # seconds; a server counts whole ones, and hears of its replica once a second


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentinels]:
    with Sentinels(tmp_path, proxied=True) as sentinels:
        yield sentinels


def replicated(master: RedisServer) -> None:
    with master.client() as client:
        assert client.wait(1, 5000) == 1


def follows(server: RedisServer) -> None:
    """Wait until a server is the replica of another, and has what that has."""
    with server.client() as client:
        poll(
            "the old master follows the new one",
            lambda: (
                (known := client.info("replication"))["role"] == "slave"
                and known["master_link_status"] == "up"
            ),
            timeout=60,
        )


def is_taken(engine: Engine, entity: Entity) -> bool:
    try:
        return engine.enqueue(entity, 600).changed
    except IndexUnavailable:
        return False


def claim(index: Index, wakeup: tuple[str, str], name: str) -> Run:
    [claimed] = index.claim("host", [wakeup], nonce=name, task_id=name)
    assert isinstance(claimed, Claim), claimed
    return Run(claimed.id, claimed.lease)


def test_what_the_old_master_took_meanwhile_is_lost_and_healed(
    sentinels: Sentinels, engine_on: EngineOn
) -> None:
    assert sentinels.link
    old = sentinels.master
    here, entity = engine_on(sentinels.url)
    there, entity_there = engine_on(old.url)  # a producer and a worker that are cut off with it
    for engine in (here, there):
        engine.app.conf.update(goalstate_lease=1.0, goalstate_index_timeout=1.0)
    index, index_there = here.parts.index, there.parts.index
    for id in ("kept", "deleted"):
        here.enqueue(entity(id), 600)
    scheduled = index.enqueue("host", [Request(id, 0) for id in ("started", "ended", "failed")])
    started, ended, failed = [(each.wakeup.id, each.wakeup.token) for each in scheduled if each.wakeup]
    run_that_ends = claim(index, ended, "before")
    replicated(old)

    with sentinels.link.silence():
        assert there.enqueue(entity_there("lost"), 600).changed
        assert there.delete(entity_there("deleted"))
        first = claim(index_there, started, "first")
        run_that_fails = claim(index_there, failed, "third")
        for report in (
            Report(run_that_ends.id, run_that_ends.lease, Verdict.DONE, None),
            Report(run_that_fails.id, run_that_fails.lease, Verdict.FAILED, 600_000, failures=1),
        ):
            [told] = index_there.finish("host", [report])
            assert told.result is Finish.ACCEPTED

        sentinels.promoted()
        assert sentinels.master is not old
        with pytest.raises(IndexUnavailable, match="Timeout"):
            here.is_scheduled(entity("kept"))  # by its connection to the old one; then it asks the sentinels
        assert here.is_scheduled(entity("kept"))
        assert not here.is_scheduled(entity("lost")), "guarantee 4"
        assert here.is_scheduled(entity("deleted")), "guarantee 6"
        second = claim(index, started, "second")
        assert index_there.renew("host", [first]) == index.renew("host", [second]) == [True], "guarantee 3"
        assert int(second.lease) > int(first.lease), "for a store that compares fencing tokens"
        again = here.describe(entity("failed"))
        assert again is not None
        assert (again.failures, again.sent) == (0, True), "it is looked at again, a step of back-off short"
        assert there.enqueue(entity_there("lost too"), 600).changed, "it knows of nothing"

    follows(old)
    with pytest.raises(IndexUnavailable, match="ReadOnlyError"):
        there.enqueue(entity_there("refused"), 600)
    assert not there.is_scheduled(entity_there("lost")), "it has what the new master has"
    assert index.renew("host", [first]) == [False]
    [told] = index.finish("host", [Report(first.id, first.lease, Verdict.DONE, None)])
    assert told.result is Finish.FENCED

    entity.unconverged += ["lost", "lost too", "kept"]
    assert here.resync("host") == 2
    assert here.is_scheduled(entity("lost"))
    assert here.is_scheduled(entity("lost too"))
    sweeper = here._open_sweeper("test")

    def is_ended() -> bool:
        sweeper.sweep()
        known = here.describe(entity("ended"))
        return known is not None and known.failures == 1 and (known.error or "").startswith("WorkerLost")

    poll("the end that was lost counts as a failure, once the lease is over", is_ended, timeout=20)


def test_a_master_that_misses_its_replica_soon_takes_nothing(
    sentinels: Sentinels, engine_on: EngineOn
) -> None:
    """What is acknowledged and lost is bounded; but the next master misses its replica, too."""
    assert sentinels.link
    old, new = sentinels.master, sentinels.replica
    here, entity = engine_on(sentinels.url)
    there, entity_there = engine_on(old.url)
    [scheduled] = there.parts.index.enqueue("host", [Request("started", 0)])
    assert scheduled.wakeup
    first = claim(there.parts.index, (scheduled.wakeup.id, scheduled.wakeup.token), "first")
    replicated(old)
    for server in (old, new):
        with server.client() as client:
            client.config_set("min-replicas-max-lag", LAG)
            client.config_set("min-replicas-to-write", 1)
    with old.client() as client:  # a machine under load may have been late just now
        poll("the replica is near", lambda: client.info("replication")["min_slaves_good_slaves"] == 1)
    acknowledged = []

    def enqueue() -> str:
        id = f"number {len(acknowledged)}"
        try:
            assert there.enqueue(entity_there(id), 600).changed
        except IndexUnavailable as error:
            return str(error)
        acknowledged.append((id, time.monotonic()))
        return ""

    with sentinels.link.silence():
        began = time.monotonic()
        assert "NOREPLICAS" in poll("it refuses to write", enqueue, timeout=30)
        assert acknowledged, "before it could know"
        assert acknowledged[-1][1] - began < LAG + 2, "the server looks once a second"
        with pytest.raises(IndexUnavailable, match="NOREPLICAS"):
            there.parts.index.renew("host", [first])
        sentinels.promoted()
        assert "NOREPLICAS" in enqueue()
        with pytest.raises(IndexUnavailable, match="NOREPLICAS"):
            here.enqueue(entity("new"), 600)

    follows(old)
    assert poll("the next master has its replica", lambda: is_taken(here, entity("new")), timeout=30)
    ids = [id for id, _ in acknowledged]
    assert here.describe_many(map(entity, ids)) == [None] * len(ids)
    entity.unconverged += ids
    assert here.resync("host") == len(ids)
