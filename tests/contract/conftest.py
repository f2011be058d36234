"""One lane per index. Every test leaves its index in a state that holds all invariants."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_goalstate.index.base import Limits
from tests.contract.bench import Bench
from tests.contract.lanes import Clock, Lane, MemoryLane, RedisLane, check
from tests.servers import Cluster, RedisServer, Valkey

LANES = os.environ.get("GOALSTATE_TEST_LANES", "memory,valkey,redis-server,cluster").split(",")

OpenBench = Callable[..., Bench]


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with Valkey(tmp_path_factory.mktemp("valkey")) as server, server.client() as client:
        yield client


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with RedisServer(tmp_path_factory.mktemp("redis-server")) as server, server.client() as client:
        yield client


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as servers, servers.client() as client:
        yield client


@pytest.fixture(params=LANES)
def lane_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def open_bench(lane_name: str, request: pytest.FixtureRequest) -> Iterator[OpenBench]:
    """Opens an index with the given limits and shards (which the memory index has no use for)."""
    lanes: list[Lane] = []

    def open_one(limits: Limits = Limits(), shards: int = 1) -> Bench:  # noqa: B008 - frozen
        assert not lanes, "one index per test: they would share a server"
        if lane_name == "memory":
            lane: Lane = MemoryLane(limits, Clock(), shards)
        else:
            client = request.getfixturevalue(lane_name.replace("-", "_"))
            lane = RedisLane(lane_name, client, limits, Clock(), shards)
        lanes.append(lane)
        return Bench(lane, limits)

    yield open_one
    for lane in lanes:
        try:
            check(lane.stored())
        finally:
            lane.wipe()


@pytest.fixture
def bench(open_bench: OpenBench) -> Bench:
    """An index with the default limits and one shard."""
    return open_bench()
