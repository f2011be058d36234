"""The supervisor starts again what ends, and tells of what ended by itself."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.servers import poll
from tests.supervised import Supervised

UNTIL_SIGNALLED = "import signal; print('here', flush=True); signal.pause()"


@contextlib.contextmanager
def supervised(directory: Path, program: str, ready: str = "") -> Iterator[Supervised]:
    process = Supervised("program", ["-c", program], directory=directory, env={}, ready=ready)
    process.start()
    try:
        yield process
    finally:
        process.end()


def test_a_process_that_ends_by_itself_is_told_of_and_started_again(tmp_path: Path) -> None:
    with supervised(tmp_path, "import sys; sys.exit('no')") as process:
        poll("it has been started again", lambda: process.starts > 2, timeout=60)
        assert len(process.own_ends) >= 2
    assert set(process.own_ends) == {(1, "no\n")}


def test_one_that_is_asked_to_end_is_started_again_without_a_word(tmp_path: Path) -> None:
    with supervised(tmp_path, UNTIL_SIGNALLED, "here") as process:
        poll("it is ready", process.is_ready, timeout=60)
        process.signal(signal.SIGTERM)
        poll("it has been started again", lambda: process.starts == 2 and process.is_ready(), timeout=60)
    assert not process.alive
    assert not process.own_ends
