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
from tests.chaos.app import KINDS, LEASE, MAX_RETRY_DELAY, RETRY_DELAY

ROUNDING = 0.01  # seconds: the index counts whole milliseconds of another clock
STALL = 0.5  # seconds that a busy machine may take between a check and what it allows

#: What may be wrong, and what each means.
RULES = {
    "lost": "an enqueue without a later evaluation",
    "unsettled": "an entity that did not end as it should",
    "overlap": "two live leases of one entity",
    "zombie": "something done or accepted under a lease that another evaluation has taken over",
    "early": "an evaluation before its deadline or its back-off, or without any cause",
    "later": "an evaluation for a later deadline than one that was asked for",
    "posthumous": "an evaluation after a delete, or a failure count that survives it",
    "back-off": "a failure that was not counted",
}


@dataclass(frozen=True)
class Final:
    """How an entity ended."""

    status: str | None
    error: str
    wanted: int
    reached: int
    gone: bool  #: deleted last


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
    held_till: float  #: at least; longer only if a renewal's reply was lost
    looked: bool = False
    reports: list[Report] = field(default_factory=list)
    given_up: float = math.inf  #: by the sweeper, certainly by then
    last_line: float = 0.0

    def ended_by_itself(self, *results: str | None) -> list[Report]:
        return [report for report in self.reports if report.result in results]

    @property
    def lease_end(self) -> float:
        """Until when its lease certainly lives."""
        return min([self.held_till, *(r.at for r in self.ended_by_itself("accepted", None))])


@dataclass
class History:
    """What befell one entity."""

    name: str
    enqueues: list[Call] = field(default_factory=list)
    deletes: list[Call] = field(default_factory=list)
    runs: dict[int, Run] = field(default_factory=dict)  #: by token
    found: list[Violation] = field(default_factory=list)  #: what is seen while reading

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]

    def in_order(self) -> list[Run]:
        return [self.runs[token] for token in sorted(self.runs)]


@dataclass
class Period:
    began: float
    ended: float = math.inf

    def meets(self, start: float, end: float) -> bool:
        return self.began <= end and self.ended >= start


def check(lines: Iterable[Line], final: Mapping[str, Final]) -> Findings:
    """What the ledger of a run tells, when everything has settled."""
    ledger = _Reader()
    for line in lines:
        ledger.read(line)
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
    def __init__(self) -> None:
        self.histories: dict[str, History] = {}
        self.losses: list[Period] = []  # of the index's data
        self.freezes: dict[int, list[Period]] = defaultdict(list)  # by process
        self.events: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.latenesses: list[float] = []
        self.lost_with_the_index = 0  # enqueues without a later look, which its loss excuses
        self._calls: dict[tuple[str, str], Call] = {}
        self._newest: dict[str, Run] = {}  # per entity
        self._newest_write: dict[str, int] = {}

    # -- reading, in the order in which the lines were written

    def read(self, line: Line) -> None:
        self.events[line.event] += 1
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
            case "resync":
                for history in self.histories.values():
                    if history.kind == fields["kind"]:
                        history.enqueues.append(Call(line.at, due=line.at))
            case _ if line.entity:
                history = self.histories.setdefault(line.entity, History(line.entity))
                self._read_of_entity(history, line, fields)

    def _read_of_entity(self, history: History, line: Line, fields: dict[str, Any]) -> None:
        key = history.name, fields.get("call", "")
        match line.event:
            case "enqueue":
                self._calls[key] = Call(
                    line.at, due=line.at + fields["delay"], replaces=fields.get("replaces", False)
                )
                history.enqueues.append(self._calls[key])
            case "delete":
                self._calls[key] = Call(line.at)
                history.deletes.append(self._calls[key])
            case "enqueued" | "deleted":
                self._calls[key].done = line.at
            case "resend":
                pass
            case "refusal":
                self.refusals[fields["reason"]] += 1
            case "claim":
                self._claim(history, line, fields)
            case _ if run := history.runs.get(fields["token"]):
                self._read_of_run(history, run, line, fields)

    def _claim(self, history: History, line: Line, fields: dict[str, Any]) -> None:
        token, asked = fields["token"], fields["asked"]
        if known := history.runs.get(token):  # the same claim, said again
            known.held_till = max(known.held_till, asked + LEASE)
            return
        lateness = fields["lateness"] / 1000
        batch = fields.get("batch", False)
        run = Run(
            token, line.pid, asked, line.at, fields["failures"], lateness, batch, asked + LEASE,
            last_line=line.at,
        )  # fmt: skip
        history.runs[token] = run
        self.latenesses.append(lateness)
        newest = self._newest.get(history.name)
        if newest is None or newest.token < token:
            self._newest[history.name] = run

    def _read_of_run(self, history: History, run: Run, line: Line, fields: dict[str, Any]) -> None:
        newest = self._newest[history.name]
        taken_over = newest.token > run.token and newest.claimed < line.at
        if self._lost_between(run.asked, line.at):  # then the index did not know of it
            taken_over = False
        match line.event:
            case "look":
                run.looked = True
            case "renewal":
                run.held_till = max(run.held_till, fields["asked"] + LEASE)
                if taken_over and newest.claimed < fields["asked"]:
                    self._found(history, "zombie", line, f"renewed although {newest.token} has begun")
            case "start":
                # Between its lease's check and the action's first line, a process may have stood still.
                stood_still = any(p.meets(run.last_line, line.at) for p in self.freezes[line.pid])
                over = min(run.given_up, newest.claimed if taken_over else math.inf)
                if over + STALL < line.at and not stood_still:
                    late = line.at - over
                    self._found(history, "zombie", line, f"began an action {late:.3f} s after its lease")
            case "write":
                if fields["token"] < self._newest_write.get(history.name, 0):
                    self._found(history, "zombie", line, "wrote after a newer evaluation had written")
                self._newest_write[history.name] = fields["token"]
            case "report" if not fields["sweeper"]:
                delay = None if fields["delay"] is None else fields["delay"] / 1000
                run.reports.append(Report(line.at, fields["verdict"], delay))
            case "reply" if fields["sweeper"]:
                if fields["result"] == "accepted":
                    run.given_up = line.at
            case "reply":
                report = run.reports[-1]
                report.result, report.answered = fields["result"], line.at
                if taken_over and newest.claimed < report.at and report.result == "accepted":
                    self._found(
                        history, "zombie", line, f"its outcome was accepted after {newest.token} had begun"
                    )
        if line.pid == run.pid:
            run.last_line = line.at

    @staticmethod
    def _found(history: History, rule: str, line: Line, text: str) -> None:
        history.found.append(
            Violation(rule, history.name, line.at, f"evaluation {line.fields['token']} {text}")
        )

    # -- judging

    def judge(self, history: History, end: Final) -> Iterator[Violation]:
        rules: list[Callable[[], Iterator[tuple[str, float, str]]]] = [
            lambda: self._lost(history),
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
        last_look = max((run.claimed for run in history.runs.values() if run.looked), default=-math.inf)
        last_delete = max((d.done for d in history.deletes if d.certain), default=-math.inf)
        last_delete = max([last_delete, *(d.began for d in history.deletes if not d.certain)])
        for enqueue in history.enqueues:
            if not enqueue.certain or max(last_look, last_delete) >= enqueue.began:
                continue
            if self._lost_between(enqueue.began, math.inf):
                self.lost_with_the_index += 1
            else:
                yield "lost", enqueue.began, "nobody looked after this enqueue"

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

    def _pairs(self, history: History) -> Iterator[tuple[str, float, str]]:
        """Why each evaluation followed the one before."""
        before: Run | None = None
        for run in history.in_order():
            since = before.asked if before else -math.inf
            if not self._lost_between(since, run.claimed):
                yield from self._early(history, before, run)
                yield from self._later(history, before, run)
                yield from self._posthumous(history, before, run)
                if before:
                    yield from self._uncounted(history, before, run)
            before = run

    def _early(self, history: History, before: Run | None, run: Run) -> Iterator[tuple[str, float, str]]:
        since = before.asked if before else -math.inf
        causes = [e.due for e in history.enqueues if e.done >= since and e.began <= run.claimed]
        if before:
            causes += _follow_ups(before)
        first = min(causes, default=math.inf)
        if run.claimed + ROUNDING < first:
            what = f"{first - run.claimed:.3f} s early" if causes else "without a cause"
            yield "early", run.claimed, f"evaluation {run.token} began {what}"

    def _later(self, history: History, before: Run | None, run: Run) -> Iterator[tuple[str, float, str]]:
        """The earliest deadline wins, unless a delete or a replacing enqueue came between."""
        since, earliest = (before.claimed, before.asked) if before else (-math.inf, -math.inf)
        changes = [*history.deletes, *(e for e in history.enqueues if e.replaces)]
        if any(change.done >= earliest and change.began <= run.claimed for change in changes):
            return
        if _one_left_no_trace(before, run):
            return
        asked = [e.latest_due for e in history.enqueues if e.began >= since and e.done <= run.asked]
        if before:
            reports = before.ended_by_itself("accepted")
            asked += [report.answered + report.delay for report in reports if report.delay is not None]
        if run.asked - run.lateness > min(asked, default=math.inf) + ROUNDING:
            late = run.asked - run.lateness - min(asked)
            yield "later", run.claimed, f"evaluation {run.token} had a deadline {late:.3f} s too late"

    def _posthumous(self, history: History, before: Run | None, run: Run) -> Iterator[tuple[str, float, str]]:
        deletes = [delete for delete in history.deletes if delete.done <= run.asked]
        if not deletes:
            return
        last = deletes[-1]
        asked_again = any(e.done >= last.began and e.began <= run.claimed for e in history.enqueues)
        if not asked_again:
            yield "posthumous", run.claimed, f"{run.claimed - last.done:.3f} s after the delete"
        # A crash right after a claim leaves no trace but its failure count; that takes a lease's time.
        clean = (before is None or before.claimed < last.began) and run.claimed < last.done + LEASE
        if clean and run.failures:
            yield "posthumous", run.claimed, f"{run.failures} failures survived the delete"

    def _uncounted(self, history: History, before: Run, run: Run) -> Iterator[tuple[str, float, str]]:
        if any(d.done >= before.asked and d.began <= run.claimed for d in history.deletes):
            return
        if before.batch and not before.ended_by_itself("accepted"):
            return  # perhaps lost with others: nobody knows whose failure it was
        failed = all(report.verdict == "failed" for report in before.ended_by_itself("accepted", None))
        if failed and not _quarantined(history, before) and run.failures <= before.failures:
            text = f"{before.token} failed after {before.failures} failures, {run.token} had {run.failures}"
            yield "back-off", run.claimed, text

    def _unsettled(self, history: History, end: Final) -> Iterator[tuple[str, float, str]]:
        at = max((run.claimed for run in history.runs.values()), default=0.0)
        problem = self._problem(history, end)
        if problem:
            yield "unsettled", at, f"{problem}: {end}"

    def _problem(self, history: History, end: Final) -> str:
        deletes = history.deletes
        last_delete = deletes[-1] if deletes else None
        after = [e for e in history.enqueues if not last_delete or e.done >= last_delete.began]
        certain = [e for e in after if e.certain and (not last_delete or e.began >= last_delete.done)]
        if end.status is None:
            if certain and not (self.losses and end.reached == end.wanted):
                return "is unknown, though it was enqueued and not deleted"
            return ""
        if last_delete and self._lost_between(last_delete.began, last_delete.done) and end.gone:
            return ""  # the delete itself was lost, and nobody says it again
        if not after:
            return "is known, though nobody enqueued it since its delete"
        error = KINDS[history.kind].error
        if error:
            if end.status != "failed" or not end.error.startswith(error):
                return f"is not quarantined for {error}"
        elif end.status != "idle":
            return "is not idle"
        elif end.reached != end.wanted:
            return "is not at its goal"
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
            "index unavailable": self.events["unavailable"],
            "evaluations": len(runs),
            "evaluations in batches": sum(run.batch for run in runs),
            "given back by batches": sum(any(r.verdict == "unstarted" for r in run.reports) for run in runs),
            "interrupted evaluations": sum(not run.reports for run in runs),
            "given up by the sweeper": sum(run.given_up < math.inf for run in runs),
            "outcomes refused": sum(bool(run.ended_by_itself("fenced")) for run in runs),
            "writes refused": self.events["fenced"],
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
    limit = KINDS[history.kind].options.get("max_failures", math.inf)
    return run.failures + 1 >= limit or any(r.verdict == "quarantined" for r in run.reports)


def _one_left_no_trace(before: Run | None, run: Run) -> bool:
    """Whether between the two there was an evaluation that was lost right after its claim."""
    if before is None or any(r.verdict != "failed" for r in before.ended_by_itself("accepted")):
        return run.failures > 0
    return run.failures > before.failures + 1


def _follow_ups(run: Run) -> list[float]:
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
        causes.append(run.held_till + (0.0 if run.batch else backoff))
    return causes
