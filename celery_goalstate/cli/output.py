"""What the commands print: for people, and as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Container, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click

from celery_goalstate.description import Description, Doing, Failure, Status
from celery_goalstate.display import one_line, printable, table_text

#: Characters of an error in a table; `show` has all of it.
ERROR_WIDTH = 60


def row_of(found: Description) -> list[str]:
    """One line of the list."""
    return [
        f"{found.kind}/{found.id}",
        found.status,
        when(found),
        {True: "reached", False: "not reached", None: ""}[found.converged],
        str(found.failures or ""),
        one_line(found.error or "", ERROR_WIDTH),
    ]


def failing_row_of(found: Description) -> list[str]:
    """One line of the list of what fails."""
    next_one = "now" if found.deadline is None else relative(found.deadline)
    if lateness(found) >= 1:
        next_one = f"{span(lateness(found))} overdue"
    return [
        f"{found.kind}/{found.id}",
        "" if found.failing is None else f"for {span(_seconds_since(found.failing))}",
        next_one,
        course(found),
        str(found.failures or ""),
        one_line(found.error or "", ERROR_WIDTH),
    ]


def course(found: Description) -> str:
    """`paid → shipped, in charge`: where the last evaluation found it, and where it failed."""
    states = f"{found.state} → {found.goal}" if found.state else ""
    return ", ".join(filter(None, [states, found.step and f"in {found.step}"]))


def when(found: Description) -> str:
    """The point in time that matters in this status."""
    if found.status is Status.SCHEDULED and found.deadline is not None:
        late = lateness(found)
        return f"{span(late)} overdue" if late >= 1 else relative(found.deadline)
    if found.status is Status.RUNNING and found.started is not None:
        return f"for {span(_seconds_since(found.started))}"
    since = found.quarantined or found.finished
    return "" if since is None else relative(since)


def print_details(found: Description, paused: bool, queue: str | None) -> None:
    """All that `show` says."""
    click.echo(f"{found.kind}/{printable(found.id)}: {found.status}\n")
    for name, value in details(found, queue).items():
        for n, line in enumerate([value] if isinstance(value, str) else value):
            click.echo(f"  {'' if n else name:<14} {printable(line)}")
    click.echo(f"\n{printable(what_follows(found, paused))}")


def details(found: Description, queue: str | None) -> dict[str, str | list[str]]:
    """What is known of an entity: names, and lines of text. `queue` is that of its messages, if known."""
    late, doing = lateness(found), found.doing
    overdue = f", {span(late)} overdue" if late >= 1 else f", {relative(found.deadline)}"
    reached = {True: ", goal reached", False: ", goal not reached", None: ""}[found.converged]
    since = f", since {moment(found.failing)}" if found.failing else ""
    lines: dict[str, Any] = {
        "deadline": found.deadline and _absolute(found.deadline) + overdue,
        "running since": found.started and moment(found.started) + ((doing and place(doing)) or ""),
        "doing": doing and f"{doing.step}, {relative(doing.seen)}{doing.calls and f' at {doing.calls}'}",
        "quarantined": found.quarantined and moment(found.quarantined),
        "evaluated": found.finished and f"ended {moment(found.finished)}{reached}",
        "state": course(found),
        "failures": str(found.failures) + since if found.failures or found.failing else None,
        "error": found.error,
        "before that" if found.error else "failed before": _older_failures(found),
        "task id": found.task_id,
        "message": found.sent and f"on its way{f', by queue {queue}' if queue else ''}",
    }
    return {name: value for name, value in lines.items() if value}


def place(doing: Doing) -> str:
    """`, on w1@ops-1, pid 4711`: where an evaluation runs."""
    worker = f", on {doing.worker}" if doing.worker else ""
    return f"{worker}, pid {doing.pid}"


def _older_failures(found: Description) -> list[str]:
    """Lines for those that nothing else tells of."""
    told = bool(found.history) and found.error == found.history[0].error
    return [_failure_line(failure) for failure in found.history[told:]]


def _failure_line(failure: Failure) -> str:
    seconds = None if failure.seconds is None else span(failure.seconds)
    where = ", ".join(filter(None, [failure.state, failure.step and f"in {failure.step}", seconds]))
    return f"{_absolute(failure.at)}  {where}{': ' if where else ''}{one_line(failure.error, ERROR_WIDTH)}"


def what_follows(found: Description, paused: bool) -> str:
    """What will happen next, and what could be done about it."""
    if paused and found.deadline is not None:
        then = "Its evaluation under way finishes. " if found.status is Status.RUNNING else ""
        return then + until_resumed(found.kind)
    match found.status:
        case Status.RUNNING:
            again = " It is evaluated once more after that." if found.deadline else ""
            hangs = f" To end it: `celery control terminate KILL {found.task_id}`." if found.doing else ""
            return (
                f"A worker evaluates it now.{hangs}{again} Should the worker fall silent, its lease ends"
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
    return f"{span(ago)} ago" if ago > 0 else f"in {span(-ago)}"


def span(seconds: float) -> str:
    """`12 ms`, `19 s`, `4 min`, `2.5 h`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms" if seconds else "0 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    for limit, unit, name in ((7200, 60, "min"), (172_800, 3600, "h"), (63_072_000, 86_400, "d")):
        if seconds < limit:
            return f"{round(seconds / unit, 1):g} {name}"
    return f"{round(seconds / 31_557_600, 1):g} years"


def _absolute(when: datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M:%S UTC")


def moment(when: datetime) -> str:
    """A point in time, in UTC and from now."""
    return f"{_absolute(when)}, {relative(when)}"


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Container[int] = ()) -> None:
    """Columns that are as wide as they must be; those of `numbers` end flush."""
    click.echo(table_text([heading.upper() for heading in headings], rows, numbers))


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
