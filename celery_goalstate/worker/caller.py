"""Who enqueues: somebody from outside, or an evaluation under way in this thread or greenlet.

What an evaluation enqueues of its own entity counts less than what comes from outside: a failure of the
evaluation discards it, and it lifts no quarantine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from celery.signals import task_postrun

from celery_goalstate.index.base import Index, Run


@dataclass(slots=True)
class _Caller:
    """An evaluation that calls."""

    index: Index  #: tells engines apart: each may have a kind of this name
    kind: str
    run: Run
    failed_task: str = ""  #: the Celery task that failed with it: until that ends, its handlers call
    ended: bool = False


_caller: ContextVar[_Caller | None] = ContextVar("goalstate_caller", default=None)


@contextmanager
def calling(index: Index, kind: str, run: Run) -> Iterator[None]:
    """The block is part of this evaluation.

    Work that it leaves behind, in a copy of its context, calls from outside once the block has ended.
    """
    caller = _Caller(index, kind, run)
    token = _caller.set(caller)
    try:
        yield
    finally:
        caller.ended = True
        _caller.reset(token)


def call_until_postrun(index: Index, kind: str, run: Run, task_id: str) -> None:
    """Celery's handlers of this task's failure or retry are still part of the evaluation."""
    _caller.set(_Caller(index, kind, run, failed_task=task_id))


def calling_run(index: Index, kind: str) -> Run | None:
    """The evaluation of this index and kind that calls; None: the call comes from outside."""
    caller = _caller.get()
    if caller is None or caller.ended or caller.index is not index or caller.kind != kind:
        return None
    return caller.run


@task_postrun.connect
def _forget_caller(task_id: str | None = None, **_: Any) -> None:
    caller = _caller.get()
    if caller is not None and caller.failed_task == task_id:
        _caller.set(None)
