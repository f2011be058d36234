from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest

from celery_goalstate.backoff import Backoff, delay_seconds


@pytest.mark.parametrize(
    ("failures", "delay"),
    [(1, 10), (2, 20), (3, 40), (9, 2560), (10, 3600), (11, 3600), (5_000, 3600), (10**9, 3600)],
)
def test_delays_double_up_to_the_ceiling(failures: int, delay: float) -> None:
    assert Backoff(first=10, ceiling=3600, jitter=False).delay(failures) == delay


@pytest.mark.parametrize(("drawn", "delay"), [(0.0, 20), (0.5, 30), (1.0, 40)])
def test_jitter_spreads_a_delay_over_its_upper_half(drawn: float, delay: float) -> None:
    assert Backoff(first=10, ceiling=3600, jitter=True).delay(3, random=lambda: drawn) == delay


def test_drawn_delays_stay_within_their_bounds() -> None:
    drawn = {Backoff(first=8, ceiling=100).delay(2) for _ in range(200)}
    assert all(8 <= delay <= 16 for delay in drawn)
    assert len(drawn) > 100


def test_a_ceiling_below_the_first_delay_wins() -> None:
    assert Backoff(first=10, ceiling=5, jitter=False).delay(1) == 5


@pytest.mark.parametrize("failures", [0, -1])
def test_there_is_no_delay_without_a_failure(failures: int) -> None:
    with pytest.raises(ValueError, match=str(failures)):
        Backoff().delay(failures)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0.0),
        (30, 30.0),
        (0.25, 0.25),
        (999_999_999, 999_999_999.0),
        (timedelta(minutes=5), 300.0),
        (timedelta(days=20_000), 1_728_000_000.0),  # says its unit, so it is no timestamp
    ],
)
def test_a_delay_is_a_number_of_seconds_or_a_timedelta(value: Any, seconds: float) -> None:
    assert delay_seconds(value) == seconds


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (-1, ValueError, "0 or more"),
        (-0.001, ValueError, "0 or more"),
        (timedelta(seconds=-1), ValueError, "0 or more"),
        (math.nan, ValueError, "finite"),
        (math.inf, ValueError, "finite"),
        (-math.inf, ValueError, "finite"),
        (1e9, ValueError, "timestamp"),
        (1_764_000_000, ValueError, "timestamp"),
        (10**400, ValueError, "timestamp"),
        (timedelta(days=36_526), ValueError, "hundred years"),
        (timedelta.max, ValueError, "hundred years"),
        (True, TypeError, "timedelta"),
        ("30", TypeError, "timedelta"),
        (None, TypeError, "timedelta"),
    ],
)
def test_other_delays_are_refused(value: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as raised:
        delay_seconds(value, "the pause")
    assert "the pause" in str(raised.value)
    assert repr(value) in str(raised.value)
