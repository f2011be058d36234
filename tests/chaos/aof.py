"""What a server loses that syncs its append-only file once a second, when its machine dies."""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path
from typing import Self

INTERVAL = 0.02  # seconds
POSTPONED = 2.0  # seconds that the server may hold back what it has answered, while it syncs


class AppendOnlyFile:
    """Watches how the file grows, in a thread of its own. A killed process loses nothing of it: this does."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "appendonlydir"
        self._sizes: deque[tuple[float, int]] = deque(maxlen=int(3 / INTERVAL))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="append-only file", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def _path(self) -> Path:
        [path] = self._directory.glob("*.incr.aof")  # it is never rewritten
        return path

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL):
            at = time.monotonic()
            self._sizes.append((at, self._path().stat().st_size))

    def lose(self, seconds: float) -> float:
        """Cut off, while the server is down, what was written in the last seconds.

        Since when what it had answered may be gone, on the monotonic clock.
        """
        sizes = list(self._sizes)
        end = time.monotonic() - seconds
        at, size = next((each for each in reversed(sizes) if each[0] <= end), sizes[0])
        with self._path().open("r+b") as file:
            file.truncate(size)
        self._sizes.clear()
        self._sizes.append((at, size))
        return at - POSTPONED
