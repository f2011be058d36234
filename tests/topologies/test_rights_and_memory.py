"""A Redis user with the least rights, and a server that evicts."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.bin.base import CLIContext
from celery.contrib.testing.worker import start_worker
from click.testing import CliRunner

from celery_goalstate import Action, Engine, Entity, cli
from celery_goalstate.exceptions import ImproperlyConfigured, IndexUnavailable
from celery_goalstate.index import open_index
from celery_goalstate.index.base import (
    Claim,
    Failure,
    Limits,
    Position,
    Record,
    Report,
    Request,
    Run,
    Status,
    Verdict,
    Wakeup,
)
from celery_goalstate.index.counters import ActionTime
from celery_goalstate.index.redis import RedisIndex
from celery_goalstate.settings import Settings
from celery_goalstate.worker.parts import Parts
from celery_goalstate.worker.sweeper import Sweeper
from tests.servers import HOST, Cluster, RedisServer, Valkey, poll
from tests.topologies.conftest import EngineOn

PAGE = Path(__file__).parents[2] / "docs/how-to/deployment.md"
KIND = "order"


INDEX, CLUSTER, BROKER = (
    line.split() for line in re.findall(r"^ACL SETUSER .*$", PAGE.read_text(), re.MULTILINE)
)


@pytest.fixture(params=[Valkey, RedisServer])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Valkey | RedisServer]:
    with request.param(tmp_path / "server") as server:
        yield server


@pytest.fixture
def admin(server: Valkey | RedisServer) -> Iterator[redis.Redis]:
    with server.client() as client:
        client.execute_command(*INDEX)
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


def start(index: RedisIndex, wakeup: Wakeup | None) -> Claim:
    assert wakeup
    [claimed] = index.claim(KIND, [("a", wakeup.token)], nonce=wakeup.token, task_id="a")
    assert isinstance(claimed, Claim)
    return claimed


def live(index: RedisIndex) -> None:
    """Every transition and every list, once."""
    ids = ["a", "b", "c", "d"]
    index.note([KIND])
    replies = index.enqueue(KIND, [Request(id, 0, task_id=id) for id in ids])
    wakeups = {wakeup.id: wakeup for reply in replies if (wakeup := reply.wakeup)}
    assert wakeups.keys() == set(ids)
    claimed = start(index, wakeups["a"])
    run = Run("a", claimed.lease)
    index.renew(KIND, [run], where={run: "in ship"})
    index.running(KIND, ["a"])
    for _ in range(2):
        failed = Report("a", claimed.lease, Verdict.FAILED, 0, failures=1, error="x" * 500)
        [finished] = index.finish(KIND, [failed])
        claimed = start(index, finished.wakeup)
    charge = ActionTime("charge", 12, failed=False)
    index.finish(KIND, [Report("a", claimed.lease, Verdict.DONE, None, idle_ttl=0, actions=(charge,))])
    index.put_back(KIND, [wakeups["b"]])
    index.promote(KIND, {"b": "again"})
    index.resend(KIND, {"c": "again"}, probe="c")
    index.put_back(KIND, [wakeups["d"]])
    index.take(KIND, 1, nonce="n2", task_id="t")
    index.pause(KIND, by="ann")
    assert index.paused(KIND)
    index.resume(KIND)
    index.survey([KIND], sweeper="s", hold=1, limit=9)
    index.holds([KIND], sweeper="other")
    index.describe(KIND, ids, history=True)
    index.overviews([KIND])
    index.metrics([KIND])
    index.servers()
    index.records(KIND, Status.SENT, 9, Position(1, "a"))
    index.counts(KIND)
    assert index.kinds() == [KIND]
    index.forget(KIND, ids)
    kept = index.as_kept(KIND)
    assert kept
    history = (Failure(1, "", "", None, "boom", "t"),)
    kept.adopt(KIND, [Record("e", Status.PARKED, deadline=1, error="boom", failing=1, history=history)])
    kept.retire(KIND, [Record("e", Status.PARKED, deadline=1)])
    index.delete(KIND, ids)
    index.delete_all(KIND)
    index.note(["host"])
    assert index.forget_kind("host")
    index.evicts()


def test_the_documented_rights_are_enough(index: RedisIndex, admin: redis.Redis) -> None:
    live(index)
    assert refused(admin) == set()


def test_each_of_them_is_needed_and_its_absence_is_clear(index: RedisIndex, admin: redis.Redis) -> None:
    rights = [word[1:] for word in INDEX if word.startswith("+")]
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


@pytest.mark.parametrize("kind", [Valkey, RedisServer])
def test_a_cluster_needs_two_more(kind: type[Valkey | RedisServer], tmp_path: Path) -> None:
    with Cluster(tmp_path, kind) as cluster, contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(node.client()) for node in cluster.nodes]
        url = cluster.url.replace("//", "//goalstate:secret@", 1)

        def open_one() -> RedisIndex:
            index = open_index(Settings(index_url=url, eta_horizon=10**3, resend_after=0.001, lease=0.001))
            assert isinstance(index, RedisIndex)
            stack.callback(index.close)
            return index

        for node in nodes:
            node.execute_command(*INDEX)
            node.execute_command(*CLUSTER)
        live(open_one())
        assert [refused(node) for node in nodes] == [set()] * 3
        for right in (word[1:] for word in CLUSTER if word.startswith("+")):
            for node in nodes:
                node.execute_command("ACL SETUSER", "goalstate", f"-{right}")
            with pytest.raises((ImproperlyConfigured, IndexUnavailable)):  # as redis-py tells them apart
                open_one()
            assert set.union(*map(refused, nodes)) == {right}
            for node in nodes:
                node.execute_command("ACL SETUSER", "goalstate", f"+{right}")
                node.execute_command("ACL LOG", "RESET")


def test_the_command_line_needs_no_more(
    server: Valkey | RedisServer, admin: redis.Redis, engine_on: EngineOn
) -> None:
    engine, _ = engine_on(f"redis://goalstate:secret@{HOST}:{server.port}/0")
    context = CLIContext(app=engine.app, no_color=True, workdir=None)
    for line in (
        "enqueue host/1 --in 1h",
        "show host/1",
        "list",
        "list --kind host",
        "list --failing",
        "doctor",
        "status",
        "pause host",
        "resume host",
        "resync host",
        "delete host/1",
    ):
        result = CliRunner().invoke(cli.goalstate, line.split(), obj=context)
        answers = {
            "list --failing",
            "doctor",
            "status",
        }  # by exit code 1, that there is none, or something to do
        assert result.exit_code in ({0, 1} if line in answers else {0}), f"{line}: {result.output}"
    assert refused(admin) == set()


@pytest.mark.usefixtures("logging_as_it_was")
def test_a_broker_needs_these(server: Valkey | RedisServer, admin: redis.Redis) -> None:
    admin.execute_command(*BROKER)
    app = Celery("topologies", broker=f"redis://broker:secret@{HOST}:{server.port}/0", set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        goalstate_index_url=f"redis://goalstate:secret@{HOST}:{server.port}/0",
    )
    engine, seen = Engine(app), set()

    @engine.register(priority=3)
    class Order(Entity):
        def get_state(self) -> bool:
            return self.id in seen

        def get_goal_state(self) -> bool:
            return True

        def get_action_list(self, state: bool, goal_state: bool) -> list[Any]:
            return [Action("see", lambda ctx, entity: seen.add(entity.id))]

    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=10):
        engine.enqueue_many((Order(n) for n in range(10)), 0.1)
        poll("evaluated", lambda: len(seen) == 10)
        assert app.control.inspect(timeout=5, limit=1).ping()
        app.control.revoke("task")
    app.control.purge()
    app.close()
    assert refused(admin) == set()


@pytest.mark.parametrize("policy", ["noeviction", "volatile-lru", "allkeys-lru", "allkeys-random"])
def test_a_policy_that_drops_what_is_scheduled_is_told(
    index: RedisIndex, admin: redis.Redis, caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    admin.config_set("maxmemory-policy", policy)
    unused: Any = None
    parts = Parts(index=index, publisher=unused, keeper=unused)
    sweeper = Sweeper("s", engine=unused, parts=parts, settings=Settings(index_url="redis://"), kinds=dict)
    with caplog.at_level(logging.WARNING, "celery_goalstate"):
        sweeper.check_server()
        told = f"maxmemory-policy {policy}: " in caplog.text
        assert told == policy.startswith("allkeys")
        caplog.clear()
        admin.execute_command("ACL SETUSER", "goalstate", "-info")
        sweeper.check_server()
        assert caplog.text == ""
