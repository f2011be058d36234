"""Workers that are asked to end one by one, as in a rolling restart: on every pool, under load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.test_chaos import chaos

#: Seconds: lease and resend_after (1.5 both), a sweep, the time until another worker sweeps (1), and what a
#: busy machine takes. A visibility timeout would be an hour.
LATEST = 5.0


@pytest.mark.long
@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["warm", "soft", "cold"])
@pytest.mark.parametrize("pool", ["prefork", "solo", "threads", "gevent"])
def test_a_rolling_restart_loses_nothing_and_delays_little(
    pool: str, how: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    arguments = (
        *("--seed", "1", "--minutes", "0.25", "--pool", pool, "--faults", f"{how} shutdown"),
        *("--trouble", "0", "--kinds", "steady,patient", "--pace", "0.2"),
    )
    result, output = chaos(tmp_path, *arguments)
    latest = result["figures"]["lateness max"]
    restarts = result["faults"][f"{how} shutdown of a worker"]
    record_property("summary", f"{restarts} times {how} shutdown, {pool}: at most {latest} s late")
    assert not any(result["violations"].values()), output
    assert latest < LATEST, output
