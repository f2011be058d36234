"""What a long evaluation is doing, on each pool: worker, process, step and place in the code."""

from __future__ import annotations

import re
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from celery import Celery

from celery_goalstate import Engine
from celery_goalstate.description import LONGEST_CALLS, Doing
from celery_goalstate.index.base import LONGEST_WORD
from celery_goalstate.worker.stacks import Stack
from tests.servers import Process, Valkey, poll

PROJECT = """
    import os
    import threading
    import time
    from pathlib import Path

    from celery import Celery
    from celery_goalstate import Engine, Entity

    app = Celery("shop", broker=os.environ["BROKER"])
    app.conf.update(goalstate_lease=1.5, goalstate_sweep_interval=0.1)
    engine = Engine(app)
    GATE = Path(__file__).with_name("gate")

    def call_carrier():
        while not GATE.exists():
            time.sleep(0.05)  # what hangs; until the test opens the gate

    @engine.register
    class Order(Entity):
        def get_state(self):
            return "shipped" if GATE.exists() else "paid"

        def get_goal_state(self):
            return "shipped"

        def get_action_list(self, state, goal_state):
            return ["ship"] if state == "paid" else []

        def ship(self, ctx):
            call_carrier()
"""


@pytest.mark.parametrize(
    "pool",
    ["prefork", "gevent", *(pytest.param(pool, marks=pytest.mark.long) for pool in ("threads", "solo"))],
)
def test_on_each_pool(pool: str, tmp_path: Path, valkey: Valkey) -> None:
    (tmp_path / "shop.py").write_text(textwrap.dedent(PROJECT))
    engine = Engine(Celery("shop", broker=valkey.url, set_as_current=False))
    engine.declare("order")
    order = engine.ref("order", "1")
    command = [sys.executable, "-m", "celery", "-A", "shop", "worker", "--pool", pool, "--concurrency", "1"]
    with Process(
        [*command, "--hostname", "w1@x"],
        log=tmp_path / "worker.log",
        env={"BROKER": valkey.url},
        cwd=tmp_path,
    ) as worker:
        engine.enqueue(order)

        def doing() -> Doing | None:
            found = engine.describe(order)
            return found and found.doing

        worker.poll_until("the index knows what it is doing", doing, timeout=60)
        found = doing()
        assert found is not None
        assert (found.worker, found.step) == ("w1@x", "ship")
        assert re.search(r"shop.py:\d+ call_carrier < shop.py:\d+ ship$", found.calls), found
        if pool != "prefork":
            assert found.pid == worker.pid
        assert [each.id for each in engine.list("order", "long")] == ["1"]
        assert engine.overview("order")["order"].longest_running_id == "1"
        (tmp_path / "gate").touch()
        poll("it is converged", lambda: getattr(engine.describe(order), "converged", None), timeout=30)
        assert doing() is None
        assert engine.list("order", "long") == []


def test_another_thread_is_read_while_it_goes_on() -> None:
    told: list[Stack] = []
    gate, there = threading.Event(), threading.Event()

    def waits_for_the_gate() -> None:
        told.append(Stack.of_caller())
        there.set()
        gate.wait()

    thread = threading.Thread(target=waits_for_the_gate)
    thread.start()
    assert there.wait(10)
    try:
        poll("it waits", lambda: "threading.py:" in told[0].calls())
        innermost, user = told[0].calls().split(" < ")[:2]
        assert innermost.startswith("threading.py:"), "the innermost call, whose ever it is"
        assert re.fullmatch(r"test_doing.py:\d+ waits_for_the_gate", user), "then the user's own"
    finally:
        gate.set()
        thread.join()
    assert told[0].calls() == "", "nothing, when it has ended"


def test_what_is_too_long_is_cut() -> None:
    text = Doing("w" * 200, 7, "s" * 200, "ü" * 500).text()
    assert len(text.encode()) < 2 * LONGEST_WORD + LONGEST_CALLS + 30
