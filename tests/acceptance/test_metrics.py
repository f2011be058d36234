"""The counters equal a tally of one's own: children and workers are killed, messages are duplicated."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import signals

from celery_goalstate import Status
from celery_goalstate.index.counters import Metrics
from tests.acceptance.tallied import DIRECTORY, FRAGILE, KIND, MODULUS, WAYS, Tallied, Tally
from tests.servers import Process, Valkey, poll

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "broker_connection_retry_on_startup": True,
    "task_ignore_result": True,
    "worker_hijack_root_logger": False,
    "goalstate_failure_retry_delay": 0.2,
    "goalstate_lease": 4.0,
    "goalstate_resend_after": 1.0,
    "goalstate_sweep_interval": 0.1,
}
#: Every so many a message is sent twice; an entity is enqueued twice.
DUPLICATED, ENQUEUED_TWICE = 3, 4
HARD_KILLS = 2


def worker(directory: Path, name: str, concurrency: int, **env: str) -> Process:
    return Process(
        [
            *(sys.executable, "-m", "celery", "--app", "tests.acceptance.tallied_worker", "worker"),
            *("--pool", "prefork", "--concurrency", str(concurrency), "--hostname", f"{name}@tallied"),
            *("--without-mingle", "--without-gossip", "--loglevel", "INFO"),
        ],
        log=directory / f"{name}.log",
        env={DIRECTORY: str(directory), "PYTHONPATH": str(ROOT), **env},
        cwd=ROOT,
    )


@contextlib.contextmanager
def duplicated(things: Tallied) -> Iterator[None]:
    """Send messages that this process publishes a second time."""
    published = 0

    def send_again(sender: str, body: Any, headers: Any, **_: Any) -> None:
        nonlocal published
        published += 1
        if published % DUPLICATED == 0:
            signals.after_task_publish.disconnect(send_again)
            things.app.send_task(sender, args=body[0], kwargs=body[1])
            signals.after_task_publish.connect(send_again)

    signals.after_task_publish.connect(send_again)
    try:
        yield
    finally:
        signals.after_task_publish.disconnect(send_again)


@pytest.mark.parametrize(
    "entities",
    [
        pytest.param(200, marks=pytest.mark.timeout(300)),
        pytest.param(9_000, marks=[pytest.mark.long, pytest.mark.timeout(3_600)]),
    ],
)
def test_counters_equal_a_tally(entities: int, tmp_path: Path) -> None:
    patience = 60 + entities / 4
    with Valkey(tmp_path / "valkey") as server, contextlib.ExitStack() as stack:
        settings = {**SETTINGS, "broker_url": server.url}
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        things = Tallied(tmp_path)
        notes, engine = things.notes, things.engine
        sturdy = stack.enter_context(worker(tmp_path, "sturdy", 3))
        fragile = stack.enter_context(worker(tmp_path, "fragile", 1, **{FRAGILE: "yes"}))

        enqueued: Counter[bool] = Counter()
        with duplicated(things):
            for n in range(entities):
                for _ in range(2 if n % ENQUEUED_TWICE == 0 else 1):
                    enqueued[engine.enqueue(things.Order(str(n))).changed] += 1

        def holds() -> int:
            return sum(note["what"] == "hold" for note in notes.read())

        for kill in range(1, HARD_KILLS + 1):
            poll(
                "an entity holds the fragile worker",
                lambda n=kill: holds() >= n,
                timeout=patience,
                interval=0.2,
            )
            fragile.kill()
            fragile.start()
        notes.open_gate()
        sturdy.signal(signal.SIGTERM)
        sturdy.wait(60)
        sturdy.start()

        def metrics() -> Metrics:
            return engine.parts.index.metrics([KIND])[KIND]

        def drained() -> bool:
            counts = engine.counts(KIND)[KIND]
            pending = counts[Status.SCHEDULED] + counts[Status.RUNNING]
            tally = Tally.of(notes)
            # Each task is one message about one entity, which is refused, if it is not evaluated.
            return not pending and metrics().refusals.total() == tally.tasks - tally.begun

        poll("all is evaluated, and each duplicate is refused", drained, timeout=patience, interval=0.5)
        counted, tally = metrics(), Tally.of(notes)

    quarantined = entities // MODULUS  # of each of the ways, as many
    assert tally.killed >= quarantined + HARD_KILLS, "children and workers were killed"
    assert set(tally.evaluations) >= {"converged", "failed", "requeued", "quarantined", "gone", "lost"}
    assert counted.evaluations == tally.evaluations
    assert counted.fenced == tally.fenced
    assert counted.lateness.counts.total() == tally.begun - tally.evaluations["lost"]
    of_actions = {name: histogram.counts.total() for name, histogram in counted.actions.items()}
    assert of_actions == tally.actions
    assert counted.enqueues.total() == enqueued.total()
    assert counted.enqueues["unchanged"] == enqueued[False]
    assert counted.refusals["stale"] > 0, "messages were duplicated"
    assert len(WAYS) < MODULUS
