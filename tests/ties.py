"""Ties processes to this one: they are killed when it has ended, even if it was killed itself.

A process of its own watches. What Linux can do by itself (`PR_SET_PDEATHSIG`) comes when the *thread* ends
that started the process, and servers are restarted in threads.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading

import psutil


class _Watcher:
    """Reads the ids of processes from a pipe, and kills them when that is closed: when this process ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: int | None = None
        atexit.register(self._end)
        os.register_at_fork(after_in_child=self._leave)

    def tie(self, pid: int) -> None:
        with self._lock:
            if self._pipe is None:
                reading, self._pipe = os.pipe()
                # Out of reach of the signals that end this process and its group.
                command = [sys.executable, __file__]
                self._process = subprocess.Popen(command, stdin=reading, start_new_session=True)
                os.close(reading)
            os.write(self._pipe, b"%d\n" % pid)

    def _end(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            assert self._process
            self._process.wait()

    def _leave(self) -> None:
        """In a fork, which may live for longer."""
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None


_watcher = _Watcher()


def tie(pid: int) -> None:
    """Let the process, with its group if it leads one, be killed once this process has ended."""
    _watcher.tie(pid)


def _watch() -> None:
    tied = []
    for line in sys.stdin:
        with contextlib.suppress(psutil.NoSuchProcess):
            tied.append(psutil.Process(int(line)))
    for process in tied:
        # Its id is its own as long as it runs, and as long as its group has members.
        if process.is_running() or not psutil.pid_exists(process.pid):
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    _watch()
