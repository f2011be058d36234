"""Reads the ledger of a run and proves the guarantees, or shows where one was broken.

The ledger holds what producers asked and were told, what evaluations did, and what index and workers said to
each other, with times taken before each question. Everything is on one monotonic clock. A call without an end
line may or may not have had its effect; every rule below holds either way.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.acceptance.ledger import Line
from tests.chaos.app import HELD_UP, KINDS, LEASE, MAX_RETRY_DELAY, RETRY_DELAY, Plan

ROUNDING = 0.01  # seconds: the index counts whole milliseconds of another clock
STALL = 0.5  # seconds that a busy machine may take between a check and what it allows
STANDSTILL = (
    2.5 * LEASE + 1
)  # seconds that the index may stand still, and then do what nobody waits for any more
LONGEST_CALL = (
    15.0  # seconds that a call takes at most: two attempts, each with the time-outs of its connection
)
AFTERMATH = 10.0  # seconds in which a fault may still be the cause of something

#: What may be wrong, and what each means.
RULES = {
    "lost": "an enqueue, a retry or a refused report without a later evaluation",
    "unsettled": "an entity that did not end as it should",
    "doubled": "an evaluation by a message that was superseded, or that had led to one already",
    "overlap": "two live leases of one entity",
    "zombie": "an action begun, or an outcome accepted, after the lease had ended",
    "early": "an evaluation before its deadline or its back-off, or without any cause",
    "later": "an evaluation for a later deadline than one that was asked for",
    "posthumous": "an evaluation after a delete, or a failure count that survives it",
    "back-off": "a failure that was not counted, or one too many",
    "far": "a message for a deadline that is days or years away",
    "untold": "an enqueue that told a wrong deadline, or raised something else than IndexUnavailable",
    "held up": "an enqueue that waited for a broker that does not answer",
    "delayed": "an evaluation later after its deadline than was allowed for the run",
}


@dataclass(frozen=True)
class Final:
    """How an entity ended."""

    status: str | None
    error: str
    wanted: int
    reached: int
    gone: bool  #: deleted last
    deadline: float | None = None  #: of what is scheduled, on the ledger's clock
    sent: bool = False  #: is there a message for it?


@dataclass(frozen=True)
class Violation:
    rule: str
    entity: str
    at: float
    text: str


@dataclass
class Findings:
    figures: dict[str, Any] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Violations of each rule."""
        found = Counter(violation.rule for violation in self.violations)
        return {rule: found[rule] for rule in RULES}


@dataclass
class Call:
    """An enqueue or a delete."""

    began: float
    done: float = math.inf  #: infinite: it may or may not have been done
    due: float = -math.inf  #: or later, by the time that the call took
    replaces: bool = False  #: sets a later deadline too
    latest: float = math.inf  #: if it was cut off, it has had its effect by then, or never will
    by: int | None = None  #: the token of the evaluation of this very entity that spoke; None: from outside
    first: float = math.inf  #: when a delete of many had certainly begun

    @property
    def till(self) -> float:
        """It has no effect after that."""
        return min(self.done, self.latest)

    @property
    def begun(self) -> float:
        """A delete takes nothing with it that was enqueued after that."""
        return min(self.first, self.till)

    @property
    def latest_due(self) -> float:
        """Its deadline is this or an earlier one."""
        return self.due + self.done - self.began

    @property
    def certain(self) -> bool:
        return self.done < math.inf


@dataclass
class Report:
    """What a worker said, or was about to say, when its evaluation had ended."""

    at: float
    verdict: str
    delay: float | None  #: seconds
    result: str | None = None  #: None: no answer came
    answered: float = math.inf


@dataclass
class Run:
    """One evaluation."""

    token: int
    pid: int
    asked: float  #: its claim was made then or later, ...
    claimed: float  #: ... and certainly by then
    failures: int
    lateness: float
    batch: bool  #: claimed with others
    wakeup: int | None  #: the token of its message; None: it came without one
    held_till: float  #: at least; longer only if a renewal's reply was lost
    looked: bool = False
    reports: list[Report] = field(default_factory=list)
    given_up: float = math.inf  #: by the sweeper, certainly by then
    last_line: float = 0.0
    began: bool = False  #: an action
    stopped: bool = False  #: its worker was asked to end, which was all that happened to it

    def ended_by_itself(self, *results: str | None) -> list[Report]:
        return [report for report in self.reports if report.result in results]

    @property
    def lease_end(self) -> float:
        """Until when its lease certainly lives."""
        return min([self.held_till, *(r.at for r in self.ended_by_itself("accepted", None))])

    @property
    def ended(self) -> float:
        """When the index certainly had its end."""
        return min([self.given_up, *(r.answered for r in self.ended_by_itself("accepted"))])

    @property
    def succeeded(self) -> bool:
        return any(report.verdict in ("done", "gone") for report in self.ended_by_itself("accepted"))


@dataclass
class History:
    """What befell one entity."""

    name: str
    enqueues: list[Call] = field(default_factory=list)  #: from outside
    words: list[Call] = field(default_factory=list)  #: enqueues by its own evaluations
    deletes: list[Call] = field(default_factory=list)
    runs: dict[int, Run] = field(default_factory=dict)  #: by token
    sweeps: dict[int, Report] = field(default_factory=dict)  #: of leases that a sweeper found to be over
    overwrites: list[int] = field(default_factory=list)  #: by whom the state was set that refuses nobody
    found: list[Violation] = field(default_factory=list)  #: what is seen while reading

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]

    @property
    def plan(self) -> Plan:
        return KINDS[self.kind]

    @property
    def max_failures(self) -> float:
        return float(self.plan.options.get("max_failures", math.inf))

    def in_order(self) -> list[Run]:
        return [self.runs[token] for token in sorted(self.runs)]

    def refused(self) -> Iterator[tuple[Run, Report]]:
        """The ends of evaluations that had begun to act, and had lost their lease, perhaps."""
        for run in self.runs.values():
            if run.began:
                for report in run.ended_by_itself("fenced", None):
                    yield run, report

    def traceless(self, before: Run | None, run: Run | None) -> list[Report]:
        """The ends of evaluations between these two that were lost right after their claim."""
        first, last = before.token if before else 0, run.token if run else math.inf
        return [
            report for token, report in self.sweeps.items() if first < token < last and token not in self.runs
        ]


@dataclass
class Period:
    began: float
    ended: float = math.inf
    before: int = 0  #: how wrong a clock was that stepped then, in seconds, ...
    after: int = 0  #: ... and has been since

    def meets(self, start: float, end: float) -> bool:
        return self.began <= end and self.ended >= start


def check(lines: Iterable[Line], final: Mapping[str, Final], *, latest: float = math.inf) -> Findings:
    """What the ledger of a run tells, when everything has settled.

    `latest`: seconds after its deadline in which each evaluation must begin.
    """
    ledger = _Reader(latest)
    for line in lines:
        ledger.read(line)
    for history in ledger.histories.values():
        ledger.complete(history)
    findings = Findings(figures=ledger.figures())
    for name, end in final.items():
        history = ledger.histories.get(name, History(name))
        findings.violations += history.found
        findings.violations += ledger.judge(history, end)
    if ledger.losses:
        undone = sum(end.gone and end.status is not None for end in final.values())
        findings.figures["losses of the index"] = len(ledger.losses)
        findings.figures["enqueues lost with the index, never looked after"] = ledger.lost_with_the_index
        findings.figures["deletes undone by a loss of the index"] = undone
    findings.figures["quarantined"] = sum(end.status == "failed" for end in final.values())
    findings.violations.sort(key=lambda violation: violation.at)
    return findings


class _Reader:
    def __init__(self, latest: float) -> None:
        self.latest = latest
        self.histories: dict[str, History] = {}
        self.losses: list[Period] = []  # of the index's data
        self.freezes: dict[int, list[Period]] = defaultdict(list)  # by process
        self.events: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.latenesses: list[float] = []
        self.lost_with_the_index = 0  # enqueues without a later look, which its loss excuses
        self.resyncs: dict[str, list[Call]] = defaultdict(list)  # by kind; each may enqueue any entity of it
        self.kind_deletes: dict[str, list[Call]] = defaultdict(list)  # by kind
        self.steps: list[Period] = []  # of the index's clock
        self.faults: dict[str, tuple[str, Period]] = {}  # name and time, by call
        self.stops: dict[int, float] = {}  # by process: since when it is asked to end
        self.now = 0.0  # when the latest line was written
        self._wall = 0.0  # the wall clock is so much ahead of the ledger's
        self._calls: dict[tuple[str, str], Call] = {}
        self._newest: dict[str, Run] = {}  # per entity
        self._newest_write: dict[str, int] = {}

    # -- reading, in the order in which the lines were written

    def read(self, line: Line) -> None:
        self.events[line.event] += 1
        self.now = line.at
        fields = line.fields
        match line.event:
            case "freeze":
                for pid in fields["pids"]:
                    self.freezes[pid].append(Period(line.at))
            case "thaw":
                for pid in fields["pids"]:
                    self.freezes[pid][-1].ended = line.at
            case "index-loss":
                self.losses.append(Period(line.at))
            case "index-lost":
                self.losses[-1].ended = line.at
            case "index-step":
                self.steps.append(Period(line.at, before=fields["before"], after=fields["after"]))
            case "index-stepped":
                self.steps[-1].ended = line.at
            case "fault":
                self.faults[fields["call"]] = fields["name"], Period(line.at)
            case "over":
                self.faults[fields["call"]][1].ended = line.at
            case "stop":
                self.stops |= dict.fromkeys(fields["pids"], line.at)
            case "delete-kind":
                call = self._calls["", fields["call"]] = Call(line.at, latest=line.at + LONGEST_CALL)
                self.kind_deletes[fields["kind"]].append(call)
            case "deleting-kind":
                self._calls["", fields["call"]].first = line.at
            case "deleted-kind":
                self._calls["", fields["call"]].done = line.at
            case "clock":
                self._wall = fields["wall"] - line.at
            case "resync":
                self.resyncs[fields["kind"]].append(Call(line.at, due=line.at))
            case "resynced":
                self.resyncs[fields["kind"]][-1].latest = line.at
            case _ if line.entity:
                history = self.histories.setdefault(line.entity, History(line.entity))
                self._read_of_entity(history, line, fields)

    def _read_of_entity(self, history: History, line: Line, fields: dict[str, Any]) -> None:
        key = history.name, fields.get("call", "")
        match line.event:
            case "enqueue":
                call = self._calls[key] = Call(
                    line.at,
                    due=line.at + fields["delay"],
                    replaces=fields.get("replaces", False),
                    latest=line.at + LONGEST_CALL,
                    by=fields.get("by"),
                )
                (history.enqueues if call.by is None else history.words).append(call)
            case "delete":
                call = self._calls[key] = Call(line.at, latest=line.at + LONGEST_CALL)
                history.deletes.append(call)
            case "enqueued" | "deleted":
                call = self._calls[key]
                call.done = line.at
                waited = call.done - call.began - fields.get("in_index", math.inf)
                if waited > HELD_UP and not self._stood_still(line.pid, call.began, call.done):
                    text = f"an enqueue waited {waited:.3f} s for the broker"
                    history.found.append(Violation("held up", history.name, line.at, text))
                if "deadline" in fields:
                    self._told(history, call, fields["deadline"])
            case "gave-up":
                call = self._calls[key]
                call.latest = min(call.latest, line.at + STANDSTILL)
                if (error := fields["error"]) != "IndexUnavailable":
                    history.found.append(Violation("untold", history.name, line.at, f"a call raised {error}"))
            case "message":
                if history.plan.far:
                    history.found.append(Violation("far", history.name, line.at, "there is a message for it"))
            case "resend":
                pass
            case "refusal":
                self.refusals[fields["reason"]] += 1
            case "claim":
                self._claim(history, line, fields)
            case _:
                self._read_of_evaluation(history, line, fields)

    def _told(self, history: History, call: Call, deadline: float | None) -> None:
        """The deadline in force is the one asked for or, unless that replaces it, an earlier one."""
        told = math.inf if deadline is None else deadline - self._wall
        wrong = self._wrong_clock(call.began, call.done)
        newest = self._newest.get(history.name)
        # What the entity has enqueued itself stays beside what replaces all that others have.
        alone = not newest or all(word.began < newest.asked for word in history.words)
        soonest = call.due + min(wrong) if call.replaces and alone else -math.inf
        if not soonest - ROUNDING <= told <= call.latest_due + max(wrong) + ROUNDING:
            text = f"an enqueue for {call.due:.3f} was told that the deadline is {told:.3f}"
            history.found.append(Violation("untold", history.name, call.done, text))

    def _claim(self, history: History, line: Line, fields: dict[str, Any]) -> None:
        token, asked = fields["token"], fields["asked"]
        if token in history.runs:  # one that is said again is noted once, with its only answer
            self._found(history, "overlap", line, "was begun twice, under one lease")
            return
        lateness = fields["lateness"] / 1000
        batch = fields.get("batch", False)
        run = Run(
            token, line.pid, asked, line.at, fields["failures"], lateness, batch, fields.get("wakeup"),
            asked + LEASE, last_line=line.at,
        )  # fmt: skip
        if token in history.sweeps:  # the worker stood still before it could note its claim
            run.given_up = history.sweeps[token].answered
        history.runs[token] = run
        if not self._stepped(line.at - lateness, line.at):  # which it would be no measure of
            self.latenesses.append(lateness)
        newest = self._newest.get(history.name)
        if newest is None or newest.token < token:
            self._newest[history.name] = run

    def _read_of_evaluation(self, history: History, line: Line, fields: dict[str, Any]) -> None:
        token = fields["token"]
        run = history.runs.get(token)
        if fields.get("sweeper"):
            if line.event == "report":
                history.sweeps.setdefault(token, Report(line.at, fields["verdict"], None))
            elif fields["result"] == "accepted":
                sweep = history.sweeps[token]
                sweep.result, sweep.answered = "accepted", min(sweep.answered, line.at)
                if run:
                    run.given_up = sweep.answered
        elif run:
            self._read_of_run(history, run, line, fields)

    def _read_of_run(self, history: History, run: Run, line: Line, fields: dict[str, Any]) -> None:
        newest = self._newest[history.name]
        over = min(run.given_up, newest.claimed if newest.token > run.token else math.inf)
        if self._lost_between(run.asked, line.at):
            over = math.inf  # the index did not know of it
        match line.event:
            case "look":
                run.looked = True
            case "renewal":
                run.held_till = max(run.held_till, fields["asked"] + LEASE)
                if over < fields["asked"]:
                    self._found(history, "zombie", line, "renewed its lease after that had ended")
            case "start":
                run.began = True
                # Between its lease's check and the action's first line, a process may have stood still.
                stood_still = self._stood_still(line.pid, run.last_line, line.at)
                over = min(over, run.held_till)  # its own clock tells it that, whoever else knows
                if over + STALL < line.at and not stood_still:
                    late = line.at - over
                    self._found(history, "zombie", line, f"began an action {late:.3f} s after its lease")
            case "write":
                if fields["token"] < self._newest_write.get(history.name, 0):
                    self._found(history, "zombie", line, "wrote after a newer evaluation had written")
                self._newest_write[history.name] = fields["token"]
            case "overwrite":
                history.overwrites.append(fields["token"])
            case "report":
                delay = None if fields["delay"] is None else fields["delay"] / 1000
                run.reports.append(Report(line.at, fields["verdict"], delay))
            case "reply":
                report = run.reports[-1]
                report.result, report.answered = fields["result"], line.at
                if over < report.at and report.result == "accepted":
                    self._found(history, "zombie", line, "had its outcome accepted after its lease had ended")
        if line.pid == run.pid:
            run.last_line = line.at

    @staticmethod
    def _found(history: History, rule: str, line: Line, text: str) -> None:
        history.found.append(
            Violation(rule, history.name, line.at, f"evaluation {line.fields['token']} {text}")
        )

    def _stood_still(self, pid: int, start: float, end: float) -> bool:
        return any(freeze.meets(start, end) for freeze in self.freezes[pid])

    def _stepped(self, start: float, end: float) -> list[Period]:
        """How the index's clock stepped then."""
        return [step for step in self.steps if step.meets(start, end)]

    def _wrong_clock(self, start: float, end: float) -> set[int]:
        """How wrong the index's clock was then, in seconds."""
        before = [step.after for step in self.steps if step.ended < start]
        steps = self._stepped(start, end)
        return {*before[-1:], *(step.before for step in steps), *(step.after for step in steps)} or {0}

    # -- judging

    def complete(self, history: History) -> None:
        """What only the whole ledger tells."""
        history.enqueues += self.resyncs[history.kind]
        history.deletes += self.kind_deletes[history.kind]
        for run in history.runs.values():
            for report in run.ended_by_itself("accepted", None):
                if report.verdict == "gone":  # a delete of all that was before
                    forgotten = Call(run.asked, report.answered, latest=report.at + STANDSTILL)
                    forgotten.first = run.claimed if forgotten.certain else math.inf
                    history.deletes.append(forgotten)
            run.stopped = self._only_stopped(run)
        history.deletes.sort(key=lambda delete: delete.began)

    def _only_stopped(self, run: Run) -> bool:
        """Whether an evaluation was cut off by an announced shutdown, with no other fault near."""
        asked_to_end = self.stops.get(run.pid, math.inf)
        if asked_to_end > min(run.given_up, self.now) or run.ended_by_itself("accepted", None):
            return False
        return not any(
            period.meets(run.asked - AFTERMATH, min(run.given_up, self.now))
            for name, period in self.faults.values()
            if "shutdown" not in name
        )

    def judge(self, history: History, end: Final) -> Iterator[Violation]:
        rules: list[Callable[[], Iterator[tuple[str, float, str]]]] = [
            lambda: self._lost(history),
            lambda: self._unanswered(history, end),
            lambda: self._delayed(history),
            lambda: self._overlaps(history),
            lambda: self._pairs(history),
            lambda: self._unsettled(history, end),
        ]
        for rule in rules:
            for name, at, text in rule():
                yield Violation(name, history.name, at, text)

    def _lost_between(self, start: float, end: float) -> bool:
        """Whether the index lost its data then."""
        return any(loss.meets(start, end) for loss in self.losses)

    def _lost(self, history: History) -> Iterator[tuple[str, float, str]]:
        if history.plan.far:
            return  # what became of these is seen in the end
        last_look = max((run.claimed for run in history.runs.values() if run.looked), default=-math.inf)
        last_delete = max((d.begun for d in history.deletes if d.certain), default=-math.inf)
        last_delete = max([last_delete, *(d.began for d in history.deletes if not d.certain)])
        for enqueue in history.enqueues:
            if not enqueue.certain or max(last_look, last_delete) >= enqueue.began:
                continue
            if self._lost_between(enqueue.began, math.inf):
                self.lost_with_the_index += 1
            else:
                yield "lost", enqueue.began, "nobody looked after this enqueue"

    def _unanswered(self, history: History, end: Final) -> Iterator[tuple[str, float, str]]:
        """What evaluations themselves want to be looked at again: not after a delete, nor in quarantine."""
        if history.plan.far or end.status == "failed":
            return
        last_look = max((run.claimed for run in history.runs.values() if run.looked), default=-math.inf)
        wants = [
            (history.runs[word.by], word.began, "this enqueue of its own")
            for word in history.words
            if word.certain and word.by in history.runs
        ]
        wants += [
            (run, report.at, "this report, which was refused")
            for run, report in history.refused()
            if report.result and report.verdict != "unstarted"
        ]
        wants += [
            (run, report.answered, "this report, which asked for it")
            for run in history.runs.values()
            for report in run.ended_by_itself("accepted")
            if report.delay is not None
        ]
        for run, at, what in wants:
            deleted = any(delete.till >= run.asked for delete in history.deletes)
            if last_look < at and not deleted and not self._lost_between(run.asked, math.inf):
                yield "lost", at, f"nobody looked after {what}, of evaluation {run.token}"

    def _delayed(self, history: History) -> Iterator[tuple[str, float, str]]:
        if math.isinf(self.latest) or history.plan.far or history.plan.refused:
            return
        changes = [*history.deletes, *(each for each in history.enqueues if each.replaces)]
        looks = [run.claimed for run in history.runs.values() if run.looked]
        for enqueue in history.enqueues:
            changed = any(each is not enqueue and each.till >= enqueue.began for each in changes)
            if enqueue.certain and not changed:
                first = min((look for look in looks if look >= enqueue.began), default=math.inf)
                if first - enqueue.latest_due > self.latest:
                    late = first - enqueue.latest_due
                    yield "delayed", enqueue.began, f"nobody looked for {late:.3f} s after its deadline"

    def _overlaps(self, history: History) -> Iterator[tuple[str, float, str]]:
        longest: Run | None = None
        for run in history.in_order():
            if (
                longest
                and run.claimed + ROUNDING < longest.lease_end
                and not self._lost_between(longest.asked, run.claimed)
            ):
                left = longest.lease_end - run.claimed
                yield (
                    "overlap",
                    run.claimed,
                    f"evaluation {run.token} began, {longest.token} had {left:.3f} s left",
                )
            if longest is None or run.lease_end > longest.lease_end:
                longest = run
            if run.given_up + ROUNDING < run.held_till and not self._lost_between(run.asked, run.given_up):
                left = run.held_till - run.given_up
                yield (
                    "overlap",
                    run.given_up,
                    f"evaluation {run.token} was given up, it had {left:.3f} s left",
                )

    def _pairs(self, history: History) -> Iterator[tuple[str, float, str]]:
        """Why each evaluation followed the one before."""
        before: Run | None = None
        for run in history.in_order():
            since = before.asked if before else -math.inf
            if not self._lost_between(since, run.claimed):
                yield from self._doubled(before, run)
                yield from self._untimely(history, before, run)
                yield from self._miscounted(history, before, run)
            before = run

    @staticmethod
    def _doubled(before: Run | None, run: Run) -> Iterator[tuple[str, float, str]]:
        """Tokens and leases rise together: what is pending now was not when the one before began."""
        if before and run.wakeup is not None and run.wakeup < before.token:
            text = f"evaluation {run.token} began by message {run.wakeup}, older than {before.token}"
            yield "doubled", run.claimed, text

    def _untimely(self, history: History, before: Run | None, run: Run) -> Iterator[tuple[str, float, str]]:
        causes = _causes(history, before, run.asked, run.claimed, history.traceless(before, run))
        first = min(causes, default=math.inf)
        start = before.asked if before else min((each.began for each in history.enqueues), default=run.asked)
        steps = self._stepped(start, run.claimed)
        # A step ahead makes what waits come sooner.
        sooner = bool(causes) and any(step.after > step.before for step in steps)
        if run.claimed + ROUNDING < first and not sooner:
            deleted = any(_certainly_between(delete, before, run.asked) for delete in history.deletes)
            rule = "posthumous" if deleted and not causes else "early"
            what = f"{first - run.claimed:.3f} s early" if causes else "without a cause"
            yield rule, run.claimed, f"evaluation {run.token} began {what}"
        if not history.traceless(before, run) and not steps:  # which lateness is no measure of
            bound = min(_bounds(history, before, run.asked, run.claimed), default=math.inf)
            if run.asked - run.lateness > bound + ROUNDING:
                late = run.asked - run.lateness - bound
                yield "later", run.claimed, f"evaluation {run.token} had a deadline {late:.3f} s too late"

    def _miscounted(self, history: History, before: Run | None, run: Run) -> Iterator[tuple[str, float, str]]:
        """How many failures in a row there may have been, and how many there were for certain."""
        least, most = _failures_after(history, before) if before else (0, 0)
        since = before.asked if before else -math.inf
        if any(delete.till >= since and delete.began <= run.claimed for delete in history.deletes):
            least = 0
        deleted = any(_certainly_between(delete, before, run.asked) for delete in history.deletes)
        if deleted:
            most = 0
        most += len(history.traceless(before, run))
        if run.failures < least:
            yield (
                "back-off",
                run.claimed,
                f"evaluation {run.token} followed {least} failures, not {run.failures}",
            )
        if run.failures > most:
            rule = "posthumous" if deleted else "back-off"
            text = f"evaluation {run.token} followed at most {most} failures, not {run.failures}"
            yield rule, run.claimed, text

    def _unsettled(self, history: History, end: Final) -> Iterator[tuple[str, float, str]]:
        at = max((run.claimed for run in history.runs.values()), default=0.0)
        problem = self._problem(history, end)
        if problem:
            yield "unsettled", at, f"{problem}: {end}"

    def _problem(self, history: History, end: Final) -> str:
        deletes, plan = history.deletes, history.plan
        after = [e for e in history.enqueues if all(e.till >= d.began for d in deletes if d.certain)]
        certain = [e for e in after if e.certain and all(e.began >= d.begun for d in deletes)]
        if end.status is None:
            resynced = (
                not end.gone and end.reached != end.wanted
            )  # what its source of truth does not name is not
            if certain and not (self.losses and not resynced):
                return "is unknown, though it was enqueued and not deleted"
            return ""
        if deletes and self._lost_between(deletes[-1].began, deletes[-1].done) and end.gone:
            return ""  # the delete itself was lost, and nobody says it again
        if not after:
            return "is known, though nobody enqueued it since its delete"
        if plan.far:
            return "" if self.losses else self._problem_far_away(history, end)
        if plan.error:
            if end.status != "failed" or not end.error.startswith(plan.error):
                return f"is not quarantined for {plan.error}"
        elif end.status != "idle":
            if end.status != "failed" or math.isinf(history.max_failures):
                return "is not idle"
            if all(run.stopped for run in history.in_order()[-int(history.max_failures) :]):
                return "is quarantined, though its workers had only been asked to end"
        elif plan.vanishes and end.gone:
            return "is known, though it is gone"
        elif end.reached != end.wanted and not self._beyond_repair(history):
            return "is not at its goal"
        return ""

    def _beyond_repair(self, history: History) -> bool:
        """Whether a late write came from a process that could not tell it, or told an index that lost it."""
        if not history.overwrites or history.overwrites[-1] == max(history.overwrites):
            return False
        last = history.runs[history.overwrites[-1]]
        told = any(report.result for report in last.reports)
        return not told or self._lost_between(last.asked, math.inf)

    def _problem_far_away(self, history: History, end: Final) -> str:
        if end.status != "scheduled" or end.deadline is None:
            return "is not scheduled"
        if end.sent:
            return "has a message"
        first = min(_causes(history, None, math.inf, math.inf))
        last = min(_bounds(history, None, math.inf, math.inf), default=math.inf)
        if self.steps:  # of the clock that it is told by; set back, a delay may wait once more
            wrong = {0, *(step.after for step in self.steps)}
            first += min(wrong)
            last += max(wrong) + self.now - min(call.began for call in history.enqueues)
        if not first - ROUNDING <= end.deadline <= last + ROUNDING:
            return f"is scheduled for {end.deadline:.3f}, not between {first:.3f} and {last:.3f}"
        return ""

    # -- figures

    def figures(self) -> dict[str, Any]:
        runs = [run for history in self.histories.values() for run in history.runs.values()]
        late = sorted(self.latenesses)

        def quantile(part: float) -> float:
            return round(late[min(len(late) - 1, int(part * len(late)))], 3) if late else 0.0

        calls = [call for history in self.histories.values() for call in history.enqueues]
        return {
            "entities": len(self.histories),
            "enqueues": sum(call.certain for call in calls),
            "enqueues of unknown effect": sum(not call.certain for call in calls),
            "deletes": self.events["delete"],
            "deletes of kinds": self.events["delete-kind"],
            "index unavailable": self.events["unavailable"],
            "evaluations": len(runs),
            "evaluations in batches": sum(run.batch for run in runs),
            "given back by batches": sum(any(r.verdict == "unstarted" for r in run.reports) for run in runs),
            "interrupted evaluations": sum(not run.reports for run in runs),
            "given up by the sweeper": sum(run.given_up < math.inf for run in runs),
            "outcomes refused": sum(bool(run.ended_by_itself("fenced")) for run in runs),
            "cut off by a shutdown alone": sum(run.stopped for run in runs),
            "enqueues of its own entity": sum(len(each.words) for each in self.histories.values()),
            "entities gone": sum(any(r.verdict == "gone" for r in run.reports) for run in runs),
            "writes refused": self.events["fenced"],
            "late writes that undid newer ones": sum(
                token < max(each.overwrites[:n], default=0)
                for each in self.histories.values()
                for n, token in enumerate(each.overwrites)
            ),
            "renewals": self.events["renewal"],
            "failures": sum(any(r.verdict == "failed" for r in run.reports) for run in runs),
            "messages sent again": self.events["resend"],
            "messages superseded": sum(self.refusals.values()),
            "lateness p50": quantile(0.5),
            "lateness p99": quantile(0.99),
            "lateness max": quantile(1.0),
        }


def _backoff(failures: int) -> float:
    return min(MAX_RETRY_DELAY, RETRY_DELAY * 2.0 ** (failures - 1))


def _quarantined(history: History, run: Run) -> bool:
    """Whether its failure, if it was one, was one too many."""
    said = any(report.verdict == "quarantined" for report in run.reports)
    return said or run.failures + 1 >= history.max_failures


def _failures_after(history: History, run: Run) -> tuple[int, int]:
    """How many failures in a row the index has at least, and at most, after an evaluation."""
    if run.succeeded:
        return 0, 0
    if run.stopped:  # it counts no failure
        return 0, run.failures
    accepted = run.ended_by_itself("accepted")
    if any(report.verdict == "unstarted" for report in accepted):
        return 0, run.failures
    # Of a batch that was lost nobody knows whose failure it was.
    failed = all(report.verdict == "failed" for report in run.ended_by_itself("accepted", None))
    known = failed and not (run.batch and not accepted) and not _quarantined(history, run)
    return run.failures + 1 if known else 0, run.failures + 1


def _certainly_between(change: Call, before: Run | None, asked: float) -> bool:
    """Whether a call had its effect after the claim of one evaluation and before that of the next."""
    return (before is None or before.claimed <= change.began) and change.done <= asked


def _causes(
    history: History, before: Run | None, asked: float, claimed: float, traceless: Iterable[Report] = ()
) -> list[float]:
    """When, at the earliest, an evaluation may follow: a time for each reason that there can be."""
    since = before.asked if before else -math.inf
    deletes = [each for each in history.deletes if each.done <= asked]
    replaced = [each for each in history.enqueues if each.replaces and each.done <= asked]
    # Whatever was asked for before a delete, or before a deadline that replaces all others, counts no more.
    afresh = max((each.began for each in [*deletes, *replaced]), default=-math.inf)
    causes = [
        each.due for each in history.enqueues if each.till >= max(since, afresh) and each.began <= claimed
    ]
    if before:
        over = [each for each in deletes if _certainly_between(each, before, asked)]
        over += [each for each in replaced if each.began >= before.ended]
        causes += [] if over else _follow_ups(history, before)
        causes += _words(history, before, asked, claimed)
    return causes + [report.at for report in traceless]


def _words(history: History, before: Run, asked: float, claimed: float) -> list[float]:
    """What evaluations themselves said since: it never outlives a delete, nor comes before a back-off."""
    said = [(history.runs.get(word.by or 0), word) for word in history.words]
    said += [
        (run, Call(report.at, report.answered, due=report.at, latest=report.at + STANDSTILL))
        for run, report in history.refused()
    ]
    backoff = min(_follow_ups(history, before), default=math.inf) if _certainly_failed(before) else -math.inf
    causes = []
    for speaker, word in said:
        deletes = [each for each in history.deletes if _certainly_between(each, speaker, asked)]
        # In a new life the late word of an old one counts as well: the entity is the same.
        afresh = [e for e in history.enqueues if e.till >= max(d.began for d in deletes)] if deletes else []
        silenced = deletes and not any(each.began <= claimed for each in afresh)
        if before.asked <= word.till and word.began <= claimed and not silenced:
            causes.append(max(word.due, backoff))
    return causes


def _certainly_failed(run: Run) -> bool:
    """Whether the index has a failure as the end of an evaluation."""
    ends = run.ended_by_itself("accepted", None)
    if ends:
        return all(report.result and report.verdict in ("failed", "quarantined") for report in ends)
    return run.given_up < math.inf


def _bounds(history: History, before: Run | None, asked: float, claimed: float) -> list[float]:
    """Deadlines that were asked for in time: the earliest wins."""
    since, earliest = (before.claimed, before.asked) if before else (-math.inf, -math.inf)
    replaced = [each for each in history.enqueues if each.replaces]
    changes = [
        each for each in [*history.deletes, *replaced] if each.till >= earliest and each.began <= claimed
    ]
    settled = max([since, *(change.till for change in changes)])
    bounds = [
        each.latest_due
        for each in history.enqueues
        if each.began >= settled and each.certain and each.done <= asked
    ]
    if not changes and before:
        reports = before.ended_by_itself("accepted")
        bounds += [report.answered + report.delay for report in reports if report.delay is not None]
    bounds += [
        each.latest_due
        for each in replaced
        if each.certain
        and since <= each.began
        and each.done <= asked
        and all(other is each or other.till <= each.began for other in changes)
    ]
    return bounds


def _follow_ups(history: History, run: Run) -> list[float]:
    """When, at the earliest, something of its own makes an evaluation be followed by another."""
    backoff = _backoff(run.failures + 1)
    causes = []
    for report in run.ended_by_itself("accepted", None):
        if report.verdict == "failed":
            causes.append(report.at + backoff)
        elif report.verdict == "unstarted":  # given back
            causes.append(report.at)
        elif report.delay is not None:
            causes.append(report.at + report.delay)
    if not run.ended_by_itself("accepted"):  # given up by the sweeper
        if run.batch:
            causes.append(run.held_till)
        elif run.failures + 1 < history.max_failures:
            causes.append(run.held_till + backoff)
    return causes
