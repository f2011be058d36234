"""What happened, told by those to whom it happened: one line per event in a file that no index knows of.

Producers note when they ask, entities when they are looked at, actions when they start and end, the tests
whom they kill. A line is a single write to a file opened for appending, so lines of many processes never
mix, and they survive the writer's death: the kernel has them. `violations` reads the file afterwards and
says which guarantees were broken, from nothing but these lines.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery_goalstate.worker.batch import SLICE

ROUNDING = 0.005  # seconds: the index counts milliseconds of another clock than the ledger
BUSY = 1.0  # seconds that may pass between a claim and the first line of its evaluation, on a busy machine
NOTED = 1.0  # seconds that may pass between the line that says that a process is killed, and its death
UNTOLD = SLICE + BUSY  # seconds that may pass between the end of a run, and the report of its batch


@dataclass(frozen=True)
class Line:
    event: str
    entity: str
    at: float  #: seconds of the machine's monotonic clock, which all its processes share
    pid: int
    fields: dict[str, Any]


class Ledger:
    """The file. Events, and the fields that they need:

    `enqueue` (delay, call) and `enqueued` (call) before and after an enqueue, `delete` and `deleted`
    likewise; `look` when an evaluation reads the state; `start` and `end` (token, action, outcome) of each
    of its actions; `kill` (pids) before a kill, `freeze` (pids) after a SIGSTOP; `marker` when a plain task
    ran.
    """

    def __init__(self, path: Path, *, sync: bool = False) -> None:
        """`sync`: a line that is written is on the disk."""
        self.path = path
        self._sync = sync
        self._calls = itertools.count(1)
        self._lines: list[Line] = []  # what was read so far
        self._read = 0  # its length in bytes

    def write(self, event: str, entity: str = "", *, at: float | None = None, **fields: Any) -> None:
        """Write a line: about now, or about a moment just past on the monotonic clock."""
        line = {
            "event": event,
            "entity": entity,
            "at": time.monotonic() if at is None else at,
            "pid": os.getpid(),
            "fields": fields,
        }
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps(line).encode() + b"\n")
            if self._sync:
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def call(self) -> str:
        """A name for one call, to tell which `enqueued` belongs to which `enqueue`."""
        return f"{os.getpid()}-{next(self._calls)}"

    def lines(self, prefix: str = "", *events: str) -> list[Line]:
        """Those of entities whose id begins with `prefix` and of no entity; of some events or of all."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # it is being written
                    self._lines.append(Line(**json.loads(line)))
                    self._read += len(line)
        return [
            line
            for line in self._lines
            if (not line.entity or line.entity.startswith(prefix)) and (not events or line.event in events)
        ]


@dataclass(frozen=True)
class Run:
    """All actions of one evaluation."""

    token: int
    start: float
    end: float  #: until when it held its lease and was alive; infinite: until now
    killed: bool
    untold: bool = False  #: it ended, but its process was killed, perhaps before the index was told


@dataclass(frozen=True)
class Violation:
    kind: str  #: lost, overlap, fenced, early, unasked, posthumous
    entity: str
    text: str


def violations(lines: Iterable[Line], *, lease: float) -> list[Violation]:
    """Every broken guarantee: call it when nothing is pending or running any more. `lease` in seconds."""
    by_entity: dict[str, list[Line]] = defaultdict(list)
    signals = []
    for line in sorted(lines, key=lambda line: line.at):
        if line.entity:
            by_entity[line.entity].append(line)
        else:
            signals.append(line)
    found = []
    for entity, history in sorted(by_entity.items()):
        runs = _runs(history, signals, lease)
        for kind, text in itertools.chain(
            _lost(history, runs),
            _overlaps(runs),
            _fenced(history),
            _early(history, runs),
            _posthumous(history),
        ):
            found.append(Violation(kind, entity, text))
    return found


def _runs(history: list[Line], signals: list[Line], lease: float) -> list[Run]:
    """In the order of their starts."""
    by_token: dict[int, list[Line]] = defaultdict(list)
    for line in history:
        if line.event in ("start", "end"):
            by_token[line.fields["token"]].append(line)
    runs = []
    for token, lines in by_token.items():
        start, last = lines[0], lines[-1]
        signalled = [s for s in signals if last.pid in s.fields["pids"]]
        kills = [s.at for s in signalled if s.event == "kill" and s.at >= start.at - NOTED]
        killed = max(min(kills, default=math.inf), last.at)
        ended = last.event == "end"
        end = last.at if ended else killed
        # A process that stands still renews nothing, so its lease is over after its length.
        freezes = [s.at for s in signalled if s.event == "freeze" and s.at >= start.at]
        frozen = min(freezes, default=math.inf) + lease
        untold = ended and killed - last.at < UNTOLD
        runs.append(Run(token, start.at, min(end, frozen), not ended and killed < math.inf, untold))
    return sorted(runs, key=lambda run: run.start)


def _lost(history: list[Line], runs: list[Run]) -> Iterable[tuple[str, str]]:
    """Each enqueue that returned leads to a look that begins after it, unless a delete comes between."""
    returned = {line.fields["call"] for line in history if line.event == "enqueued"}
    for position, line in enumerate(history):
        if line.event == "enqueue" and line.fields["call"] in returned:
            after = (later.event for later in history[position:])
            if next((event for event in after if event in ("look", "delete")), None) is None:
                yield "lost", f"nobody looked after the enqueue at {line.at:.3f}"
    last_look = max((line.at for line in history if line.event == "look"), default=-math.inf)
    last_delete = max((line.at for line in history if line.event == "delete"), default=-math.inf)
    for run in runs:
        if run.killed and max(last_look, last_delete) < run.end:
            yield "lost", f"run {run.token} was killed at {run.end:.3f} and nobody looked again"
        elif math.isinf(run.end):
            yield "lost", f"run {run.token} never ended, though nobody killed it"


def _overlaps(runs: list[Run]) -> Iterable[tuple[str, str]]:
    """No run begins while an earlier one holds its lease."""
    for earlier, later in itertools.combinations(runs, 2):
        if later.start < earlier.end:
            yield (
                "overlap",
                f"run {later.token} began {earlier.end - later.start:.3f} s before {earlier.token} ended",
            )


def _fenced(history: list[Line]) -> Iterable[tuple[str, str]]:
    """No action starts once a later evaluation has started one."""
    highest = 0
    for line in history:
        if line.event == "start":
            token = line.fields["token"]
            if token < highest:
                yield "fenced", f"run {token} started {line.fields['action']!r} after run {highest} had begun"
            highest = max(highest, token)


def _early(history: list[Line], runs: list[Run]) -> Iterable[tuple[str, str]]:
    """No look without a cause, and none before its deadline.

    An enqueue that took effect between a claim and the first line of its evaluation is the cause of the next
    look; so those count that had not returned at the look before the last. An evaluation that failed, asked
    for another look or was killed is a cause too, of a look at any time: other tests watch the back-off. So
    is one that ended well, but of whose end the index may not know, and an action that ended when another
    evaluation had begun, which it may have undone.
    """
    untold = {run.token for run in runs if run.untold}
    due: dict[str, float] = {}  # per call of enqueue
    returned: dict[str, int] = {}  # how many looks there had been when the call returned
    looks = newest = 0
    again = False
    for line in history:
        match line.event:
            case "enqueue":
                due[line.fields["call"]] = line.at + line.fields["delay"]
            case "enqueued":
                returned[line.fields["call"]] = looks
            case "start":
                newest = max(newest, line.fields["token"])
            case "end" if line.fields["outcome"] != "ok" or line.fields["token"] in untold:
                again = True
            case "end" if line.fields["token"] < newest:
                again = True
            case "look":
                killed = any(run.killed and run.end <= line.at for run in runs)
                causes = [due[call] for call in due if returned.get(call, looks) >= looks - 1]
                first = min(causes, default=math.inf)
                if not (again or killed) and line.at < first - ROUNDING:
                    if causes:
                        yield "early", f"a look at {line.at:.3f}, {first - line.at:.3f} s before its deadline"
                    else:
                        yield "unasked", f"a look at {line.at:.3f} that nobody had asked for"
                looks += 1
                again = False


def _posthumous(history: list[Line]) -> Iterable[tuple[str, str]]:
    """No look after a delete, unless an enqueue came since the delete began."""
    deleted, gone = math.inf, False
    for line in history:
        if line.event == "delete":
            gone, deleted = True, math.inf
        elif line.event == "deleted":
            deleted = line.at
        elif line.event == "enqueue":
            gone = False
        elif line.event == "look" and gone and line.at > deleted + BUSY:
            yield "posthumous", f"a look {line.at - deleted:.3f} s after the delete"
