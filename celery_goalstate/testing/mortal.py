"""A worker that can be killed as SIGKILL does it: its stack does not unwind.

An exception would run each `finally`, `except` and `__exit__` on its way, and what undoes its work there
would pass a test that a killed worker fails. So it runs in a greenlet, which is switched away from and never
back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from typing import Any

_KILLED = object()
#: Kept for as long as the process lives: when a greenlet is collected, its `finally` blocks run. 24 KiB each.
_killed: list[Any] = []


def need_greenlet() -> None:
    """Raise `ImportError` if it is not installed."""
    try:
        import greenlet  # noqa: F401 - only whether it can be
    except ImportError as error:
        raise ImportError(
            'to kill a worker takes greenlet: pip install "celery-goalstate[testing]"'
        ) from error


def survives(work: Callable[[], object], context: Context) -> bool:
    """Do this work in this context; whether nobody has killed it. Raises what it raises."""
    from greenlet import greenlet

    worker = greenlet(work)
    worker.gr_context = context
    return worker.switch() is not _KILLED


def die() -> None:
    """End the work under way: this never returns."""
    from greenlet import getcurrent

    worker = getcurrent()
    assert worker.parent is not None  # noqa: S101 - it is one of `survives`
    _killed.append(worker)
    worker.parent.switch(_KILLED)
