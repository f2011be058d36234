"""Delays: how one is given, and how long the one after a failure is."""

from __future__ import annotations

import math
import random as _random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

#: A bare number from here on is taken for a Unix timestamp that ended up where a delay belongs.
TIMESTAMP_LIKE = 1e9
#: The furthest that anything is put off. What is further away is a mistake in the units (and no `datetime`).
FURTHEST = timedelta(days=36_525)


def delay_seconds(value: float | timedelta, name: str = "delay") -> float:
    """The seconds that `value` (a number or a timedelta) stands for: from 0 to a hundred years.

    Raises `TypeError` or `ValueError`, naming the value as `name`.
    """
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; give a number of seconds or a timedelta")
    elif TIMESTAMP_LIKE <= value < math.inf:
        raise ValueError(f"{name} is {value!r}, which looks like a timestamp; give seconds or a timedelta")
    else:
        seconds = float(value)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{name} is {value!r}; give a finite number of seconds, 0 or more")
    if seconds > FURTHEST.total_seconds():
        raise ValueError(f"{name} is {value!r}; give one within the next hundred years")
    return seconds


@dataclass(frozen=True, slots=True)
class Backoff:
    """Doubling delays between consecutive failures, in seconds: `first`, twice that, ... up to `ceiling`.

    With `jitter`, a delay is drawn from its upper half, so that entities that failed together do not
    come back together.
    """

    first: float = 10.0
    ceiling: float = 3600.0
    jitter: bool = True

    def delay(self, failures: int, random: Callable[[], float] = _random.random) -> float:
        """Seconds to wait after the given number of consecutive failures (1 or more).

        `random` returns numbers from 0 to 1.
        """
        if failures < 1:
            raise ValueError(f"failures is {failures}; there is no back-off before the first failure")
        # 2.0 ** 1024 overflows; any ceiling is reached long before.
        delay = min(self.ceiling, self.first * 2.0 ** min(failures - 1, 1000))
        return delay * (0.5 + 0.5 * random()) if self.jitter else delay
