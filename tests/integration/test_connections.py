"""Connections to the index: as many as there are threads that talk to it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from celery_goalstate import Engine
from celery_goalstate.exceptions import IndexUnavailable
from celery_goalstate.index import open_index
from celery_goalstate.settings import Settings
from tests.integration.conftest import Truth
from tests.servers import Cluster, Valkey

THREADS = 150


@pytest.fixture(params=[Valkey, Cluster])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with request.param(tmp_path) as server:
        yield server.url


@pytest.fixture
def describe_at_once(make_app: Callable[..., Any], truth: Truth) -> Callable[[str], Any]:
    def describe_at_once(url: str) -> Any:
        engine = Engine(make_app(goalstate_index_url=url))
        entity = engine.register(truth.entity())
        primaries = engine._parts.index._client  # type: ignore[attr-defined]
        options = {"target_nodes": "primaries"} if "cluster" in url else {}
        primaries.execute_command("CLIENT", "PAUSE", 500, "ALL", **options)
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(engine.describe, map(entity, range(THREADS))))

    return describe_at_once


def test_many_threads_at_once(url: str, describe_at_once: Callable[[str], Any]) -> None:
    assert describe_at_once(url) == [None] * THREADS


def test_a_bound_of_ones_own(valkey: Valkey, describe_at_once: Callable[[str], Any]) -> None:
    with pytest.raises(IndexUnavailable, match="Too many connections"):
        describe_at_once(f"{valkey.url}?max_connections=20")


@pytest.mark.parametrize("url", ["redis://nobody?{}", "sentinel://nobody?master_name=m&{}"])
def test_what_the_url_says_goes_before(url: str) -> None:
    index = open_index(Settings(index_url=url.format("max_connections=7&socket_timeout=2")))
    pool = index._client.connection_pool  # type: ignore[attr-defined]
    assert pool.max_connections == 7
    assert pool.connection_kwargs["socket_timeout"] == 2
