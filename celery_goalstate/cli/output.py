"""What the commands print: for people, and as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click

from celery_goalstate.description import Description, Status
from celery_goalstate.display import printable, table_text

#: Characters of an error in a table; `show` has all of it.
ERROR_WIDTH = 60


def row_of(found: Description) -> list[str]:
    """One line of the list."""
    error = found.error or ""
    return [
        f"{found.kind}/{found.id}",
        found.status,
        when(found),
        {True: "reached", False: "not reached", None: ""}[found.converged],
        str(found.failures or ""),
        error if len(error) <= ERROR_WIDTH else f"{error[: ERROR_WIDTH - 1]}…",
    ]


def when(found: Description) -> str:
    """The point in time that matters in this status."""
    if found.status is Status.SCHEDULED and found.deadline is not None:
        late = lateness(found)
        return f"{_span(late)} overdue" if late >= 1 else relative(found.deadline)
    if found.status is Status.RUNNING and found.started is not None:
        return f"for {_span(_seconds_since(found.started))}"
    since = found.quarantined or found.finished
    return "" if since is None else relative(since)


def print_details(found: Description, paused: bool, queue: str | None) -> None:
    """All that `show` says."""
    late = lateness(found)
    overdue = f", {_span(late)} overdue" if late >= 1 else f", {relative(found.deadline)}"
    reached = {True: ", goal reached", False: ", goal not reached", None: ""}[found.converged]
    lines = {
        "deadline": found.deadline and _absolute(found.deadline) + overdue,
        "running since": found.started and _moment(found.started),
        "quarantined": found.quarantined and _moment(found.quarantined),
        "evaluated": found.finished and f"ended {_moment(found.finished)}{reached}",
        "failures": found.failures and str(found.failures),
        "error": found.error,
        "task id": found.task_id,
        "message": found.sent and f"on its way{f', by queue {queue}' if queue else ''}",
    }
    click.echo(f"{found.kind}/{printable(found.id)}: {found.status}\n")
    for name, value in lines.items():
        if value:
            click.echo(f"  {name:<14} {printable(value)}")
    click.echo(f"\n{printable(what_follows(found, paused))}")


def what_follows(found: Description, paused: bool) -> str:
    """What will happen next, and what could be done about it."""
    if paused and found.deadline is not None:
        then = "Its evaluation under way finishes. " if found.status is Status.RUNNING else ""
        return then + until_resumed(found.kind)
    match found.status:
        case Status.RUNNING:
            again = " It is evaluated once more after that." if found.deadline else ""
            return (
                f"A worker evaluates it now.{again} Should the worker fall silent, its lease ends"
                f" {relative(found.lease_expires)}; then it is evaluated again after the back-off."
            )
        case Status.FAILED:
            return (
                "It is quarantined: nothing happens until it is enqueued:"
                f" `goalstate enqueue {shlex.quote(f'{found.kind}/{found.id}')}`."
            )
        case Status.IDLE if found.converged is False:
            return (
                "Nothing is pending, though its goal is not reached: its actions changed nothing and asked"
                " for no further evaluation. Enqueue it when that should be different."
            )
        case Status.IDLE:
            return "Nothing is pending until it is enqueued."
    retry = f" That is the retry after {_in_a_row(found.failures)}." if found.failures else ""
    if lateness(found) < 1:
        return f"A worker evaluates it at its deadline.{retry}"
    if found.sent:
        return (
            "It waits for a free worker. Is one running (`celery status`), does it consume that queue"
            " (`celery inspect active_queues`), is it busy (`celery inspect active`)? A message that was lost"
            f" is sent again by itself.{retry}"
        )
    return (
        "It is overdue, and no message is under way: is a worker of this app running, whose sweeper sends it?"
        f" If so: does the broker answer, or are very many due before it?{retry}"
    )


def until_resumed(kind: str) -> str:
    """The remark on a kind that is paused."""
    return f"The kind is paused: nothing starts until `goalstate resume {kind}`."


def _in_a_row(failures: int) -> str:
    return "1 failure" if failures == 1 else f"{failures} failures in a row"


def lateness(found: Description) -> float:
    """Seconds since the deadline of a pending evaluation; 0 if it is not over."""
    return 0.0 if found.deadline is None else max(0.0, _seconds_since(found.deadline))


def _seconds_since(when: datetime) -> float:
    return (datetime.now(UTC) - when).total_seconds()


def relative(when: datetime | None) -> str:
    """`in 4 min` or `12 s ago`."""
    if when is None:
        return "never"
    ago = _seconds_since(when)
    if abs(ago) < 1:
        return "now"
    return f"{_span(ago)} ago" if ago > 0 else f"in {_span(-ago)}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    for limit, unit, name in ((7200, 60, "min"), (172_800, 3600, "h"), (63_072_000, 86_400, "d")):
        if seconds < limit:
            return f"{round(seconds / unit, 1):g} {name}"
    return f"{round(seconds / 31_557_600, 1):g} years"


def _absolute(when: datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M:%S UTC")


def _moment(when: datetime) -> str:
    return f"{_absolute(when)}, {relative(when)}"


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns that are as wide as they must be."""
    click.echo(table_text([heading.upper() for heading in headings], rows))


def details_of(found: Description, paused: bool, queue: str | None) -> dict[str, Any]:
    """All that `show --json` says."""
    return {
        **asdict(found),
        "lateness": round(lateness(found), 3),
        "paused": paused,
        "queue": queue,
        "next": what_follows(found, paused),
    }


def print_json(value: Any) -> None:
    """For machines, and for people who read it too: nothing in it can steer a terminal."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=datetime.isoformat)
    click.echo(
        "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)
    )
