"""The workers and producers of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.chaos.app import DIRECTORY, INDEX, WORK
from tests.chaos.clock import Clock
from tests.supervised import Supervised


class Victim(Supervised):
    """A process, and its wall clock if that can be made to step."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        directory: Path,
        index_url: str,
        clocks: Path | None = None,
        ready: str = "",
    ) -> None:
        """`clocks`: the library that lets its wall clock step."""
        self.clock = Clock(clocks, directory / f"{name}.clock") if clocks else None
        env = {DIRECTORY: str(directory), INDEX: index_url, **(self.clock.env if self.clock else {})}
        super().__init__(name, command, directory=directory, env=env, ready=ready)


def worker(number: int, *, pool: str, soft: bool, **place: Any) -> Victim:
    """`soft`: QUIT leaves its tasks some time to end."""
    name = f"worker-{number}"
    return Victim(
        name,
        [
            *("-m", "celery", "--app", "tests.chaos.worker", "worker", "--queues", WORK),
            *("--pool", pool, "--concurrency", "2", "--hostname", f"{name}@chaos"),
            *("--without-mingle", "--without-gossip", "--loglevel", "INFO"),
            *(("--", ".soft_shutdown_timeout=1.0") if soft else ()),
        ],
        ready=f"{name}@chaos ready.",
        **place,
    )


def producer(number: int, of: int, seed: int, pace: float, kinds: str, **place: Any) -> Victim:
    return Victim(
        f"producer-{number}",
        ["-m", "tests.chaos.producer", str(seed), str(number), str(of), str(pace), kinds],
        **place,
    )
