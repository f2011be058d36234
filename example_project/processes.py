"""Child processes that end with the program that started them, however it ends.

Each child leads a process group of its own, so that Ctrl-C in the terminal reaches only the program, which
then ends its children in order. Should the program be killed outright, its *guard* does it instead: a process
that was forked at the start and waits for the one end of a pipe that only the program holds.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

END_WITHIN = 10.0
POLL = 0.05


class ChildDied(Exception):
    """A child ended that should be running."""


class Interrupted(SystemExit):
    """A signal asked the program to end; the exit status is the shell's for that signal."""


class Processes:
    """Start children, notice the death of one, end them all: a context manager for a program without threads.

    `directory` is a temporary one for whatever the children keep, their logs among it. It goes with them.
    Raises Interrupted in the `with` block when a signal asks the program to end.
    """

    def __enter__(self):
        self._signal = None
        # Set where an exception would lose a child that is just being started or ended.
        self._deaf = True
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup wants it ignored
            numbers.append(signal.SIGHUP)
        self._handlers = {number: signal.signal(number, self._interrupt) for number in numbers}
        self.directory = Path(tempfile.mkdtemp(prefix="goalstate-demo-"))
        self._children = {}
        self._guard, self._to_guard = _fork_guard(self.directory)
        self._deaf = False
        return self

    def __exit__(self, *exc_info):
        self._deaf = True
        for child in reversed(self._children.values()):
            _end(child)
        _remove(self.directory)
        os.kill(self._guard, signal.SIGKILL)
        os.waitpid(self._guard, 0)
        os.close(self._to_guard)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _interrupt(self, number, _frame):
        self._signal = number
        if not self._deaf:
            raise Interrupted(128 + number)

    def start(self, name, *command, env):
        """Start a child; what it says goes to its log."""
        self._deaf = True
        with self.log(name).open("wb") as log:
            child = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children[name] = child
        os.write(self._to_guard, b"%d\n" % child.pid)
        self._deaf = False
        if self._signal is not None:
            raise Interrupted(128 + self._signal)

    def log(self, name):
        """The path of a child's log."""
        return self.directory / f"{name}.log"

    def check(self):
        """Raise ChildDied, with the end of its log, if a child is no longer there."""
        for name, child in self._children.items():
            if child.poll() is not None:
                tail = self.log(name).read_text(errors="replace").splitlines()[-20:]
                raise ChildDied("\n  ".join([f"{name} ended with status {child.returncode}:", *tail]))


def _end(child):
    """End a child and its group: as Ctrl-C would, then for certain."""
    if child.poll() is None:
        # The leader only: Celery's worker ends its pool by itself, and needs it for a warm shutdown.
        child.send_signal(signal.SIGINT)
        try:
            child.wait(END_WITHIN)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    _kill_group(child.pid)


def _kill_group(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _fork_guard(directory):
    """Fork the guard; return its pid and the end of the pipe to write the children's pids to."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(reader)
        return pid, writer
    try:
        os.setsid()
        os.close(writer)
        with os.fdopen(reader) as pids:
            groups = [int(line) for line in pids]  # ends when the program does
        deadline = time.monotonic() + END_WITHIN
        for group in reversed(groups):
            _interrupt_leader(group)
            while _alive(group) and time.monotonic() < deadline:
                time.sleep(POLL)  # and look again
            _kill_group(group)
        _remove(directory)
    finally:
        os._exit(0)  # never back into the program that it is a copy of


def _remove(directory):
    """Remove the directory, though one that was killed just now may write into it for a moment yet."""
    deadline = time.monotonic() + END_WITHIN
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(POLL)  # and look again


def _interrupt_leader(pid):
    try:
        os.kill(pid, signal.SIGINT)
    except ProcessLookupError:
        return


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
