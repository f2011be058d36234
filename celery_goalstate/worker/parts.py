"""What an engine is made of, replaceable as a whole: tests put a world of their own in its place."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from random import SystemRandom

from celery_goalstate.index.base import Index
from celery_goalstate.messages import Publisher
from celery_goalstate.worker.lease import Keeper


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of one engine, opened when it is first used."""

    index: Index
    publisher: Publisher
    keeper: Keeper
    #: Opens the index with the time-outs of a sweep, which a worker waits for. None: `index` will do.
    open_hasty_index: Callable[[], Index] | None = None
    clock: Callable[[], float] = time.monotonic  #: seconds, for durations
    sleep: Callable[[float], None] = time.sleep  #: by that clock
    now: Callable[[], datetime] = _now  #: this process's time, where a caller or Celery names a point in time
    #: From 0 to 1. Not the module's own, whose sequence a host may have seeded; nor the same in each child.
    random: Callable[[], float] = SystemRandom().random
