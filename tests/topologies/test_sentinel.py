"""Sentinels replace a master that died; what it had acknowledged and not passed on is healed by a resync."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from celery_goalstate.exceptions import IndexUnavailable
from celery_goalstate.index.base import Claim, Finish, Report, Request, Run, Verdict
from tests.servers import RedisServer, freeze
from tests.topologies.conftest import EngineOn
from tests.topologies.load import summary, under_load
from tests.topologies.sentinels import Sentinels

Record = Callable[[str, object], None]


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentinels]:
    with Sentinels(tmp_path) as sentinels:
        yield sentinels


def test_a_dead_master_is_replaced_and_a_resync_heals_what_was_lost(
    sentinels: Sentinels, engine_on: EngineOn
) -> None:
    engine, entity = engine_on(sentinels.url)
    index = engine.parts.index
    engine.enqueue(entity("kept"), 600)
    [scheduled] = index.enqueue("host", [Request("running", 0)])
    assert scheduled.wakeup
    wakeup = (scheduled.wakeup.id, scheduled.wakeup.token)
    with sentinels.master.client() as client:
        assert client.wait(1, 5000) == 1
    # From here on the replica hears nothing, and there is nothing on its way.
    freeze(sentinels.replica.pid)
    with sentinels.master.client() as client:
        client.client_kill_filter(_type="replica")
    assert engine.enqueue(entity("lost"), 600).changed, "acknowledged by the master alone"
    [first] = index.claim("host", [wakeup], nonce="first", task_id="first")
    sentinels.master.kill()
    with pytest.raises(IndexUnavailable):
        engine.enqueue(entity("new"), 600)
    os.kill(sentinels.replica.pid, signal.SIGCONT)
    sentinels.promoted()
    assert engine.enqueue(entity("new"), 600).changed
    assert engine.is_scheduled(entity("kept"))
    assert not engine.is_scheduled(entity("lost"))
    # The start of an evaluation is lost as well: another one begins, and the older one is fenced.
    [second] = index.claim("host", [wakeup], nonce="second", task_id="second")
    assert isinstance(first, Claim)
    assert isinstance(second, Claim)
    assert int(second.lease) > int(first.lease), "for a store that compares fencing tokens"
    assert index.renew("host", [Run("running", first.lease)]) == [False]
    [ended] = index.finish("host", [Report("running", first.lease, Verdict.DONE, None)])
    assert ended.result is Finish.FENCED
    entity.unconverged.append("lost")
    assert engine.resync("host") == 1
    assert engine.is_scheduled(entity("lost"))


def test_a_master_without_its_replica_may_refuse_to_write(tmp_path: Path, engine_on: EngineOn) -> None:
    with RedisServer(tmp_path / "alone") as server, server.client() as client:
        engine, entity = engine_on(server.url)
        engine.enqueue(entity("1"), 600)
        client.config_set("min-replicas-to-write", 1)
        for call in (
            lambda: engine.enqueue(entity("2"), 600),
            lambda: engine.delete(entity("1")),
            lambda: engine._open_sweeper("test").sweep(),
        ):
            with pytest.raises(IndexUnavailable, match="NOREPLICAS"):
                call()
        assert engine.is_scheduled(entity("1"))
        client.config_set("min-replicas-to-write", 0)
        assert engine.enqueue(entity("2"), 600).changed


@pytest.mark.long
@pytest.mark.timeout(400)
def test_masters_are_replaced_under_load(
    sentinels: Sentinels, tmp_path: Path, record_property: Record
) -> None:
    deaths = 4
    with under_load(tmp_path, sentinels.url) as load:
        for _ in range(deaths):
            with load.losing_data(seconds=1):
                sentinels.master.kill()
                sentinels.promoted()
            load.go_on(20)
            sentinels.replica.start()
            sentinels.in_sync()
        findings = load.end()
    record_property("summary", summary(f"{deaths} masters replaced by sentinels", findings))
    assert findings.violations == []
