"""A night, on real workers: whatever is wrong is named by `status`, and mended with few commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import Celery

from celery_goalstate import Engine
from tests.servers import Process, Valkey, frozen, poll

#: Seconds after which a person must be told.
SOON = 15.0

PROJECT = """
    import os
    import time
    from pathlib import Path

    from celery import Celery
    from celery_goalstate import Engine, Entity
    from celery_goalstate.exceptions import PermanentError

    app = Celery("shop", broker=os.environ["BROKER"])
    app.conf.update(goalstate_lease=3.0, goalstate_index_timeout=2.0, goalstate_failure_retry_delay=600)
    engine = Engine(app)
    HERE = Path(__file__).parent

    def call_carrier(id):
        if not (HERE / "mended").exists():
            if id == "hangs":
                while not (HERE / "mended").exists():
                    time.sleep(0.05)  # what hangs; until the test mends it
            if id == "fails":
                raise ConnectionError("the carrier does not answer")
            if id == "wrong":
                raise PermanentError("there is no such address")
        (HERE / f"shipped-{id}").touch()

    @engine.register(max_run=40)
    class Order(Entity):
        def get_state(self):
            return "shipped" if (HERE / f"shipped-{self.id}").exists() else "paid"

        def get_goal_state(self):
            return "shipped"

        def get_action_list(self, state, goal_state):
            return [] if state == "shipped" else ["ship"]

        def ship(self, ctx):
            call_carrier(self.id)

    @engine.register(queue="nobody-consumes-it")
    class Parcel(Order):
        pass

    @engine.register
    class Invoice(Order):
        pass
"""

Status = Callable[[], tuple[int, str]]


@pytest.fixture
def shop(tmp_path: Path, valkey: Valkey) -> Path:
    (tmp_path / "shop.py").write_text(textwrap.dedent(PROJECT))
    return tmp_path


def run(shop: Path, broker: str, *words: str) -> tuple[int, str]:
    """A command of the shell: its exit code, and all that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "shop", *words],
        cwd=shop,
        env={**os.environ, "BROKER": broker},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def engine(valkey: Valkey) -> Engine:
    engine = Engine(Celery("shop", broker=valkey.url, set_as_current=False))
    for kind in ("order", "invoice"):
        engine.declare(kind)
    engine.declare("parcel", queue="nobody-consumes-it")
    return engine


@pytest.fixture
def worker(shop: Path, valkey: Valkey) -> Iterator[Process]:
    with Process(
        [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "shop",
            "worker",
            "--concurrency",
            "2",
            "--hostname",
            "w1@x",
            "--loglevel",
            "INFO",
        ],
        log=shop / "worker.log",
        env={"BROKER": valkey.url},
        cwd=shop,
    ) as worker:
        worker.poll_until("it is ready", lambda: " ready." in worker.output(), timeout=60)
        yield worker


def test_a_night(shop: Path, valkey: Valkey, engine: Engine, worker: Process) -> None:
    def status() -> tuple[int, str]:
        return run(shop, valkey.url, "goalstate", "status")

    def says(pattern: str) -> bool:
        return re.search(pattern, status()[1], re.MULTILINE) is not None

    def soon(pattern: str, within: float = SOON) -> None:
        poll(f"it says {pattern!r}", lambda: says(pattern), timeout=within)

    poll("all is well", lambda: status()[0] == 0, timeout=SOON)

    for id in ("fails", "wrong", "hangs"):
        engine.enqueue(engine.ref("order", id))
    engine.enqueue_many(engine.ref("parcel", n) for n in range(5_000))
    engine.pause("invoice", by="ann@ops-1")
    engine.enqueue(engine.ref("invoice", "1"))
    soon(r"^! order: 1 failing, the first for .*: `celery goalstate list --kind order --failing`$")
    soon(r"^! order: 1 quarantined, .*: `celery goalstate list --kind order --status failed`$")
    soon(r"^! order/hangs runs for .*, of 40 s: `celery goalstate show order/hangs`$", 40)
    soon(r"^parcel +5000 +5000 +\S+ s +0 ")
    soon(r"^invoice .* paused .* ago by ann@ops-1$")
    code, shown = run(shop, valkey.url, "goalstate", "show", "order/hangs")
    assert code == 0
    [line] = re.findall(
        r"doing +ship, .* at shop.py:(\d+) call_carrier < shop.py:\d+ ship$", shown, re.MULTILINE
    )
    assert "time.sleep" in (shop / "shop.py").read_text().splitlines()[int(line) - 1]
    assert re.search(r"running since .*, on w1@x, pid \d+$", shown, re.MULTILINE)

    # Mended, with three commands after `status`.
    (shop / "mended").touch()
    for command in (["--failing", "order"], ["--failed", "order"]):
        code, done = run(shop, valkey.url, "goalstate", "enqueue", *command, "--yes")
        assert (code, done) == (0, "order: 1 enqueued\n")
    assert run(shop, valkey.url, "goalstate", "resume", "invoice")[0] == 0
    poll("all are converged", lambda: engine.counts("order")["order"]["idle"] == 3, timeout=30)
    assert {each.converged for each in engine.list("order")} == {True}

    pid = valkey.client().info("server")["process_id"]
    with frozen(pid):
        code, said = status()
    assert (code, "the index did not answer" in said) == (3, True)

    worker.kill()
    soon(r"^! no worker is there since .*, nothing happens \(order, parcel, invoice\)")
    valkey.stop()
    try:
        assert status()[0] == 3
    finally:
        valkey.start()
