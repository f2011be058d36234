"""A worker that is told to end gives back what it evaluates: no failure is counted, and others go on.

Celery lets evaluations finish when a worker ends (a warm shutdown), or cuts them off (a cold one, also after
the wait of a soft one). It ends a pool's processes and greenlets. Under solo, the signal's handler raises an
error amid the evaluation. Threads it cannot cut off.

* What was cut off is found in the index when the pool has stopped: runs whose claim names this worker. While
  one of its processes lives, or the evaluation goes on in a thread, it may still act, and keeps its lease.
* An evaluation that goes on in a thread begins no further action, and gives itself back.

A worker that is killed gives nothing back, and a failure is counted: the entity may be what kills it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from billiard.process import active_children
from celery.worker import state
from kombu.utils.uuid import uuid

from celery_goalstate.index.base import Index, Report, Run, Status, Verdict, Wakeup, random_id
from celery_goalstate.registry import Kind
from celery_goalstate.worker.parts import Parts

logger = logging.getLogger(__name__)

#: The environment's variable with the name of the worker, for the processes of its pool, forked or spawned.
VARIABLE = "GOALSTATE_WORKER"

#: Claims of this process whose evaluations have not ended.
under_way: set[str] = set()


def name_worker() -> None:
    """Give the worker of which this is the main process a name that no other has, nor it when it restarts."""
    os.environ[VARIABLE] = uuid()[:8]


@contextmanager
def claiming() -> Iterator[str]:
    """The nonce of a claim whose evaluations end with the block; it names the worker."""
    nonce = f"{os.environ.get(VARIABLE, '')}:{random_id()}"
    under_way.add(nonce)
    try:
        yield nonce
    finally:
        under_way.discard(nonce)


def is_ending() -> bool:
    """Whether this is the main process of a worker that cuts its evaluations off."""
    return bool(state.should_terminate)


def given_back(run: Run) -> Report:
    """The report of an evaluation that is to begin anew, as if it had not been claimed."""
    return Report(run.id, run.lease, Verdict.UNSTARTED, delay=None, fresh_task_id=random_id())


def give_back(parts: Parts, kinds: Iterable[Kind], *, wait: float) -> None:
    """Give back what this worker has cut off, once its pool has stopped.

    Evaluations in threads, which the pool may have left running, have `wait` seconds to come to an end.
    """
    if under_way:
        logger.info("waiting for evaluations in threads to end their actions, for %g s at most", wait)
    until = time.monotonic() + wait
    while under_way and time.monotonic() < until:
        time.sleep(0.05)  # asks again: a condition would be one more lock for each evaluation
    if alive := [process.name for process in active_children() if "PoolWorker" in process.name]:
        logger.warning(
            "%s did not end: what was evaluated there counts a failure when its lease has run out",
            ", ".join(alive),
        )
        return
    for kind in kinds:
        if kind.task in state.total_count:  # it was evaluated by this worker
            _give_back(parts, kind)


def _give_back(parts: Parts, kind: Kind) -> None:
    mine = f"{os.environ[VARIABLE]}:"
    running = parts.index.counts(kind.name)[Status.RUNNING]
    cut_off = [
        Run(record.id, record.lease)
        for record in parts.index.records(kind.name, Status.RUNNING, running)
        if record.nonce.startswith(mine) and record.nonce not in under_way
    ]
    if not cut_off:
        return
    finished = parts.index.finish(kind.name, [given_back(run) for run in cut_off])
    logger.info("%d of kind %s were cut off and are given back: they begin anew", len(cut_off), kind.name)
    leave_to_others(parts.index, kind.name, [each.wakeup for each in finished if each.wakeup])


def leave_to_others(index: Index, kind: str, wakeups: Sequence[Wakeup]) -> None:
    """Let another worker's sweeper publish what this one, which is ending, has no use for.

    From here a message might be lost: Redis gives it to whoever has asked for the next one, and this worker's
    consumer, which may have, reads none any more.
    """
    index.put_back(kind, wakeups)
