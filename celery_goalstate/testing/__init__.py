"""For tests of your own entities: see docs/how-to/testing.md.

* One action alone: `run_action`, `context`.
* An engine in a world of its own, whose clock you move: `simulate`, or the pytest fixture `goalstate`.
* Checks that look where nobody thinks to look: `check_crash_safe` and the others.
"""

from celery_goalstate.testing.exploration import (
    Checked,
    NotConcurrencySafe,
    NotCrashSafe,
    check_concurrent,
    check_crash_safe,
)
from celery_goalstate.testing.faults import fail, kill, lose_lease
from celery_goalstate.testing.simulation import Look, NotIdle, Simulation, simulate
from celery_goalstate.testing.tables import check_converges, check_rules
from celery_goalstate.testing.units import check_idempotent, context, run_action
from celery_goalstate.testing.worlds import NotRepeatable

__all__ = [
    "Checked",
    "Look",
    "NotConcurrencySafe",
    "NotCrashSafe",
    "NotIdle",
    "NotRepeatable",
    "Simulation",
    "check_concurrent",
    "check_converges",
    "check_crash_safe",
    "check_idempotent",
    "check_rules",
    "context",
    "fail",
    "kill",
    "lose_lease",
    "run_action",
    "simulate",
]
