"""What was measured, as a page with tables and plots: docs/benchmarks/README.md."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import plots

Measured = dict[str, list[float]]


@dataclass(frozen=True)
class Target:
    """A promise on what something costs: as it is, or against what plain Celery costs."""

    what: str
    scenario: str
    name: str  #: of what was measured
    limit: float
    against: str = ""
    how: Literal["value", "ratio", "difference"] = "value"
    at_least: bool = False
    unit: str = ""

    def measured(self, results: dict[str, Any]) -> float | None:
        """What to hold against the limit; None: it was not measured."""
        scenario = results["scenarios"].get(self.scenario)
        if scenario is None or self.name not in scenario["measured"]:
            return None
        measured: Measured = scenario["measured"]
        ours = measured[self.name]
        if not self.against:
            return statistics.median(ours)
        base = measured.get(self.against)
        if base is None:  # measured before this target was set
            return None
        if self.how == "ratio":
            return ratio(ours, base)
        return statistics.median(ours) - statistics.median(base)

    def missed(self, value: float) -> bool:
        return value < self.limit if self.at_least else value > self.limit

    def shown(self, value: float) -> str:
        """A value or a limit in the target's own terms."""
        if self.how == "ratio":
            return f"{value:.2f} × {self.against}"
        if self.how == "difference":
            return f"{self.against} {'+' if value >= 0 else '−'} {abs(value):.1f} {self.unit}"
        return f"{value:,.{0 if abs(value) >= 100 else 2}f} {self.unit}".rstrip()


def ratio(ours: list[float], base: list[float]) -> float:
    """The median of each round's ratio: a machine that gets slower slows both."""
    return statistics.median(a / b for a, b in zip(ours, base, strict=True))


def target(what: str, scenario: str, name: str, limit: float, against: str = "", **options: Any) -> Target:
    how = options.pop("how", "ratio" if against else "value")
    return Target(what, scenario, name, limit, against, how, **options)


TARGETS = (
    target("enqueue a new entity, due now", "enqueue", "enqueue, due now", 1.0, "apply_async"),
    target("enqueue, far deadline", "enqueue", "enqueue, far", 1.5, "SET"),
    target("enqueue, coalesced", "enqueue", "enqueue, coalesced", 1.4, "SET"),
    target("enqueue_many, far deadlines, per entity", "enqueue", "enqueue_many, far", 20, unit="µs"),
    *(
        target(
            f"evaluate due entities, one message each, {pool}",
            "evaluate",
            f"evaluations a second, {pool}",
            least,
            f"tasks a second, {pool}",
            at_least=True,
        )
        for pool, least in (("prefork", 0.9), ("solo", 0.7))
    ),
    *(
        target(
            f"evaluate due entities, batch_size=64, {pool}",
            "evaluate",
            f"evaluations a second, batch_size=64, {pool}",
            12,
            f"tasks a second, {pool}",
            at_least=True,
        )
        for pool in ("prefork", "solo")
    ),
    *(
        target(
            f"counters of {what}",
            "counters",
            f"{name}, {actions} actions, counted",
            limit,
            f"{name}, {actions} actions, not counted",
        )
        for what, name, actions, limit in (
            ("a report of one action", "finish, 1 at once", 1, 1.3),
            ("a report of two actions", "finish, 1 at once", 2, 1.45),
            ("an evaluation of one action", "evaluation, 1 at once", 1, 1.08),
        )
    ),
    target("store memory per waiting entity", "store", "bytes per waiting entity", 300, unit="bytes"),
    target("store memory per evaluated entity", "store", "bytes per idle entity", 400, unit="bytes"),
    target("store memory per failing entity", "store", "bytes per failing entity", 600, unit="bytes"),
    # A byte for each of a million is a megabyte: memory that varies by that from second to second is flat.
    target(
        "worker memory per waiting entity", "million", "worker's bytes per scheduled entity", 1, unit="bytes"
    ),
    *(
        target(
            f"{name}, {beside}: p99 of its lateness",
            "lateness",
            f"{name}, {beside}: p99 ms",
            5,
            f"eta, {beside}: p99 ms",
            how="difference",
            unit="ms",
        )
        for beside in ("at rest", "beside 1,000 a second")
        for name in ("near", "far")
    ),
    *(
        target(
            f"{operation} among a million",
            "million",
            f"{operation}, among many",
            1.2,
            f"{operation}, among few",
        )
        for operation in ("enqueue", "claim", "finish")
    ),
    target(
        "sweeper, idle: round trips per worker and second",
        "idle",
        "round trips per worker and second, added",
        1,
    ),
)

#: A section for each scenario: its title, and what to know of its figures.
SECTIONS = {
    "enqueue": (
        "Enqueue",
        """Microseconds for a producer, per entity. Far: in an hour. Coalesced: it is scheduled already. SET:
redis-py's own, the least that a client of any queue pays.""",
    ),
    "awake": (
        "Enqueue, on processors that never sleep",
        """The same once more while an endless loop of the lowest scheduling class, which yields to whoever
has work, keeps each processor awake. Waking up takes the same time for whoever waits for a reply, and is a
larger part of what takes less. The targets above are measured without such loops.""",
    ),
    "evaluate": ("Evaluate", "A worker with one process, from its first message to its last. No actions."),
    "counters": (
        "Counters for monitoring",
        """Processor time of the index's server, in microseconds for each entity, with `goalstate_metrics` and
without. An evaluation is an enqueue, a claim and a report.""",
    ),
    "store": ("Memory of the server", "INFO used_memory, before and after. Ids have ten characters."),
    "million": (
        "A million entities",
        """Scheduled over an hour of deadlines; then made due and evaluated with batch_size=64. Costs of
single operations are in microseconds.""",
    ),
    "lateness": (
        "Lateness",
        """Milliseconds from the deadline to the evaluation. Near: within the horizon, so that its message
goes out at once. Far: beyond it, so that the sweeper hands it over. ETA: plain Celery's `apply_async(eta=)`.
All in one worker at one time; the load beside it is no-op evaluations with batch_size=64.""",
    ),
    "idle": (
        "A fleet with nothing to do",
        "INFO commandstats of workers that wait, with the engine and without.",
    ),
    "peers": (
        "Other queues",
        """The same job in each, from an environment and a process of its own, with its usual settings (some
keep results), logs off; all in turns. They do not promise the same, and what a queue has no way to do has no
figure.

Microseconds to enqueue a job for in an hour; a duplicate of one that waits, which the others refuse and
celery-goalstate coalesces; and each of many in one call. Then no-op jobs a second in one worker, from the
first to the last, and bytes of the server's memory for each job that waits. In brackets: as a ratio to plain
Celery, microseconds to those of its `apply_async(countdown=)`.""",
    ),
}


def write(results: dict[str, Any], directory: Path) -> str:
    """Write the page and its plots; the table of targets."""
    drawn = plots.draw(results, directory)
    targets = "\n".join(_targets(results))
    parts = [HEAD]
    if results["quick"]:
        parts.append("**A smoke run: the figures mean nothing.**")
    parts += ["## Targets", targets]
    for name, (title, text) in SECTIONS.items():
        if (scenario := results["scenarios"].get(name)) is None:
            continue
        parts += [f"## {title}", text]
        parts += [f"![{title}]({file})" for file in drawn.get(name, [])]
        table = _peers_table if name == "peers" else _table
        parts += ["\n".join(table(scenario["measured"]))]
        if scenario["remarks"]:
            parts.append("\n".join(f"* {remark}" for remark in scenario["remarks"]))
    parts += ["## Where and when", "\n".join(_machine(results))]
    (directory / "README.md").write_text("\n\n".join(parts) + "\n")
    return targets


HEAD = """# What it costs

Written by `make bench`, which measures everything on this page again. What is compared is measured in rounds
that take turns, on one server, in one run. A ratio is the median of the rounds' ratios: figures move with the
machine, ratios do so less ([where the time goes](../explanation/costs.md)). The server is an embedded Valkey
on the same machine, broker and index in one; there is no result backend, and there are no events."""


def _targets(results: dict[str, Any]) -> list[str]:
    """Missed ones first, then those that are reached."""
    lines: dict[bool, list[str]] = {True: [], False: []}
    for each in TARGETS:
        value = each.measured(results)
        if value is None:
            continue
        missed = each.missed(value)
        sign = "≥" if each.at_least else "≤"
        verdict = "**missed**" if missed else "reached"
        lines[missed].append(
            f"| {each.what} | {sign} {each.shown(each.limit)} | {each.shown(value)} | {verdict} |"
        )
    summary = f"{len(lines[True])} missed, {len(lines[False])} reached."
    return [summary, "", "| what | target | measured | |", "|---|---|---|---|", *lines[True], *lines[False]]


def _table(measured: Measured) -> list[str]:
    rows = ["| what | median | from | to | rounds |", "|---|---:|---:|---:|---:|"]
    for name, values in measured.items():
        if "quantiles" in name:
            continue  # only drawn
        if name.startswith(("scheduled", "delayed", "worker's memory", "plain worker's memory")):
            shown = ", ".join(map(_number, values))  # not rounds: one value for each size
            rows.append(f"| {name} | {shown} | | | |")
        else:
            cells = " | ".join(map(_number, (statistics.median(values), min(values), max(values))))
            rows.append(f"| {name} | {cells} | {len(values)} |")
    return rows


def _peers_table(measured: Measured) -> list[str]:
    """A row for each, a column for each thing measured."""
    columns = plots.PEERS_MEASURED
    rows = [f"| | {' | '.join(columns.values())} |", "|---|" + "---:|" * len(columns)]
    for peer in dict.fromkeys(name.partition(": ")[0] for name in measured):
        cells = [_peers_cell(measured, peer, what) for what in columns]
        rows.append(f"| {peer} | {' | '.join(cells)} |")
    return rows


def _peers_cell(measured: Measured, peer: str, what: str) -> str:
    if (values := measured.get(f"{peer}: {what}")) is None:
        return ""
    base = measured[f"Celery: {what if what in ('jobs', 'bytes') else 'enqueue'}"]
    return f"{_number(statistics.median(values))} ({ratio(values, base):.2f})"


def _number(value: float) -> str:
    return f"{value:,.{0 if abs(value) >= 100 or value == int(value) else 2}f}"


def _machine(results: dict[str, Any]) -> list[str]:
    lines = [f"* {name}: {text}" for name, text in results["machine"].items()]
    for name, scenario in results["scenarios"].items():
        lines.append(f"* {name}: {scenario['date']}, commit {scenario['commit']}, {scenario['seconds']} s")
    return lines
