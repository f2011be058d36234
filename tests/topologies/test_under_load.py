"""Slots move, masters die and are replaced, while producers enqueue and workers evaluate."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers import Cluster, RedisServer, Valkey, poll
from tests.topologies.load import KINDS, SHARDS, Load, summary, under_load

Record = Callable[[str, object], None]
SYNCED = {"appendonly": "yes", "appendfsync": "always"}


def forms() -> list[str]:
    """A key of each shard."""
    return [f"gs:{{default:{kind}:{shard}}}:form" for kind in KINDS for shard in range(SHARDS)]


def nothing_broken(load: Load, what: str, record: Record) -> None:
    findings = load.end()
    record("summary", summary(what, findings))
    print(summary(what, findings), dict(findings.figures))
    assert findings.violations == []


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", [Valkey, RedisServer])
def test_slots_move(kind: type[Valkey | RedisServer], tmp_path: Path, record_property: Record) -> None:
    moves = 30
    with Cluster(tmp_path / "cluster", kind, spare=1) as cluster, under_load(tmp_path, cluster.url) as load:
        for _ in range(moves):
            form = load.random.choice(forms())
            targets = [node for node in cluster.nodes if node is not cluster.owner(form)]
            # A slot that stays half moved for a while, now and then for longer than a lease: it is no wait.
            pause = load.random.choice([0.0, 0.1, 0.5, 2.5])
            cluster.move(
                form, load.random.choice(targets), midway=lambda pause=pause: time.sleep(pause)
            )  # the fault
            load.go_on(5)
        nothing_broken(load, f"{moves} slots moved between 4 nodes of {kind.__name__}", record_property)


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", [Valkey, RedisServer])
def test_masters_die_and_come_back(
    kind: type[Valkey | RedisServer], tmp_path: Path, record_property: Record
) -> None:
    """Without replicas: their entities wait, and a synced append-only file loses nothing."""
    deaths = 6
    waits = {"cluster_node_timeout": 1000, "cluster_require_full_coverage": "no"}
    with (
        Cluster(tmp_path / "cluster", kind, **SYNCED, **waits) as cluster,
        under_load(tmp_path, cluster.url) as load,
    ):
        for _ in range(deaths):
            node = load.random.choice(cluster.nodes)
            node.kill()
            # How long it is dead, while the others go on; nothing is waited for. Not for longer: a producer
            # that has something for its entities insists, so in the end all wait.
            time.sleep(load.random.uniform(0.2, 4))  # the fault
            node.start()
            load.go_on(20)
        nothing_broken(load, f"{deaths} masters of {kind.__name__} killed and restarted", record_property)


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", [Valkey, RedisServer])
def test_replicas_take_over(
    kind: type[Valkey | RedisServer], tmp_path: Path, record_property: Record
) -> None:
    """What a dead master had not passed on is lost, and healed by a resync."""
    deaths = 4
    waits = {"cluster_node_timeout": 1000, "cluster_require_full_coverage": "no"}
    with Cluster(tmp_path / "cluster", kind, spare=1, **waits) as cluster:
        replica, master = cluster.nodes[3], cluster.nodes[0]
        cluster.replicate(replica, master)
        with under_load(tmp_path, cluster.url) as load:
            for _ in range(deaths):
                with load.losing_data(seconds=1):
                    master.kill()
                    with replica.client() as client:
                        poll("promoted", lambda client=client: client.role()[0] == "master", timeout=30)
                load.go_on(20)
                master.start()
                with master.client() as client:
                    poll(
                        "the old master follows",
                        lambda client=client: client.info("replication").get("master_link_status") == "up",
                        timeout=30,
                    )
                master, replica = replica, master
            nothing_broken(load, f"{deaths} masters of {kind.__name__} replaced", record_property)
