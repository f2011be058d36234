"""A Redis user with the least rights, and a server that evicts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from celery_goalstate.exceptions import ImproperlyConfigured
from celery_goalstate.index.base import Claim, Limits, Report, Request, Run, Status, Verdict
from celery_goalstate.index.redis import RedisIndex
from celery_goalstate.sweeper import Sweeper
from tests.servers import HOST, RedisServer, Valkey

PAGE = Path(__file__).parents[2] / "docs/how-to/deployment.md"
KIND = "order"


def documented() -> list[str]:
    """The line of the docs."""
    found = re.search(r"^ACL SETUSER .*$", PAGE.read_text(), re.MULTILINE)
    assert found
    return found[0].split()


@pytest.fixture(params=[Valkey, RedisServer])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Valkey | RedisServer]:
    with request.param(tmp_path / "server") as server:
        yield server


@pytest.fixture
def admin(server: Valkey | RedisServer) -> Iterator[redis.Redis]:
    with server.client() as client:
        client.execute_command(*documented())
        yield client


@pytest.fixture
def index(server: Valkey | RedisServer, admin: redis.Redis) -> Iterator[RedisIndex]:
    """With the documented rights. The life cycle below says which of them it needs."""
    client = redis.Redis(
        host=HOST, port=server.port, username="goalstate", password="secret", decode_responses=True
    )
    index = RedisIndex(client, Limits(eta_horizon=10**6, lease=1, resend_after=1))
    yield index
    index.close()


def refused(admin: redis.Redis) -> set[str]:
    """What the index's user was refused; redis-py tells its own name where it may, and goes on where not."""
    return {entry["object"] for entry in admin.acl_log()} - {"client|setinfo"}


def live(index: RedisIndex) -> None:
    """Every transition and every list, once."""
    ids = ["a", "b", "c", "d"]
    index.note([KIND])
    replies = index.enqueue(KIND, [Request(id, 0, task_id=id) for id in ids])
    wakeups = {wakeup.id: wakeup for reply in replies if (wakeup := reply.wakeup)}
    assert wakeups.keys() == set(ids)
    claimed = index.claim(KIND, [("a", wakeups["a"].token)], nonce="n", task_id="a")[0]
    assert isinstance(claimed, Claim)
    index.renew(KIND, [Run("a", claimed.lease)])
    index.running(KIND, ["a"])
    index.finish(KIND, [Report("a", claimed.lease, Verdict.DONE, None, idle_ttl=0)])
    index.put_back(KIND, [wakeups["b"]])
    index.promote(KIND, {"b": "again"})
    index.resend(KIND, {"c": "again"}, probe="c")
    index.put_back(KIND, [wakeups["d"]])
    index.take(KIND, 1, nonce="n2", task_id="t")
    index.pause(KIND)
    assert index.paused(KIND)
    index.resume(KIND)
    index.survey([KIND], sweeper="s", hold=1, limit=9)
    index.describe(KIND, ids)
    index.records(KIND, Status.SENT, 9)
    index.counts(KIND)
    assert index.kinds() == [KIND]
    index.forget(KIND, ids)
    index.delete(KIND, ids)
    index.evicts()


def test_the_documented_rights_are_enough(index: RedisIndex, admin: redis.Redis) -> None:
    live(index)
    assert refused(admin) == set()


def test_each_of_them_is_needed_and_its_absence_is_clear(index: RedisIndex, admin: redis.Redis) -> None:
    rights = [word[1:] for word in documented() if word.startswith("+")]
    for right in rights:
        admin.execute_command("ACL SETUSER", "goalstate", f"-{right}")
        admin.execute_command("ACL LOG", "RESET")
        admin.flushall()
        admin.script_flush()
        if right == "info":  # what cannot be known is no reason to complain
            live(index)
        else:
            with pytest.raises(ImproperlyConfigured, match="lacks a right"):
                live(index)
        assert refused(admin) == {right}
        admin.execute_command("ACL SETUSER", "goalstate", f"+{right}")


@pytest.mark.parametrize("policy", ["noeviction", "volatile-lru", "allkeys-lru", "allkeys-random"])
def test_a_policy_that_drops_what_is_scheduled_is_told(
    index: RedisIndex, admin: redis.Redis, caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    admin.config_set("maxmemory-policy", policy)
    unused: Any = None
    sweeper = Sweeper("s", index=index, publisher=unused, settings=unused, kinds=dict)
    with caplog.at_level(logging.WARNING, "celery_goalstate"):
        sweeper.check_server()
        told = f"maxmemory-policy {policy}: " in caplog.text
        assert told == policy.startswith("allkeys")
        caplog.clear()
        admin.execute_command("ACL SETUSER", "goalstate", "-info")
        sweeper.check_server()
        assert caplog.text == ""
