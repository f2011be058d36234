"""`celery goalstate`: see how entities stand, and operate the engine, from a shell.

Loads what a worker of the app loads, so it knows the same kinds. Exit codes: 0 done, 1 not found, 2 bad
usage, 3 the index does not answer.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from celery.bin.base import CeleryCommand, CeleryOption
from celery.exceptions import QueueNotFound

from celery_goalstate import move as moving
from celery_goalstate.display import printable
from celery_goalstate.engine import Description, Engine, Status, engine_of
from celery_goalstate.entity import EntityRef
from celery_goalstate.exceptions import GoalStateError, ImproperlyConfigured, IndexUnavailable
from celery_goalstate.index.url import safe_url
from celery_goalstate.kind import DEFAULT_NAMESPACE, task_name

NOT_FOUND, UNAVAILABLE = 1, 3

#: In which order `list` shows entities: first what a person may have to do something about.
ORDER = (Status.FAILED, Status.RUNNING, Status.SCHEDULED, Status.IDLE)

#: Characters of an error in a table; `show` has all of it.
ERROR_WIDTH = 60


@click.group()
@click.option("--namespace", metavar="NAME", help="Which engine, if the app has several.")
@click.pass_context
def goalstate(ctx: click.Context, namespace: str | None) -> None:
    """See and operate entities on the way to their goal states."""
    ctx.meta[__name__] = namespace


# What is given on the command line ---------------------------------------------------------------


_DURATION = re.compile(r"(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)


def _parse_duration(ctx: click.Context, param: click.Parameter, value: str | None) -> timedelta | None:
    if value is None:
        return None
    match = _DURATION.fullmatch(value)
    if match is None:
        raise click.BadParameter(f"{value!r} is no duration; give 30s, 5m, 2h, 1d or 1h30m, say", ctx, param)
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    try:
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    except OverflowError:
        raise click.BadParameter(f"{value!r} is too long", ctx, param) from None


def _parse_time(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        when = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is no ISO 8601 time; give 2030-01-31T07:30Z, say", ctx, param
        ) from None
    if when.tzinfo is None:
        raise click.BadParameter(
            f"{value!r} does not name its time zone; append Z for UTC, or +01:00, say", ctx, param
        )
    return when


_entities = click.argument("entities", metavar="KIND ID...", nargs=-1, required=True)
_as_json = click.option("--json", "as_json", cls=CeleryOption, is_flag=True, help="For machines.")


class _Unavailable(click.ClickException):
    exit_code = UNAVAILABLE


@contextmanager
def _engine(ctx: click.Context) -> Iterator[Engine]:
    """The engine that a command is about; its errors become one line and an exit code."""
    app, url = ctx.obj.app, ""
    try:
        app.loader.import_default_modules()  # the entities, as in a worker
        engine = engine_of(app, ctx.meta[__name__])
        url = engine.settings.index_url
        if url == "memory://":
            raise click.UsageError(
                "the index is memory://, which lives within one process: there is nothing to see from"
                " another one. Set goalstate_index_url"
            )
        yield engine
    except IndexUnavailable as error:
        where = "" if "://" in str(error) else f" ({safe_url(url)})"  # `move` names the old index itself
        raise _Unavailable(f"{error}{where}") from error
    except GoalStateError as error:
        hint = " Or name yours: celery -A PROJECT goalstate ..." if app.main == "default" else ""
        raise click.UsageError(f"{error}.{hint}" if hint else str(error)) from error


def _ref(kind: str, id: str) -> EntityRef:
    try:
        return EntityRef(kind, id)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _refs(words: Sequence[str]) -> list[EntityRef]:
    """The entities of `KIND ID...`, or of `KIND/ID...`, as the lists and the logs write them."""
    if "/" in words[0]:
        return [_ref(kind, id) for kind, _, id in (word.partition("/") for word in words)]
    if len(words) == 1:
        raise click.UsageError(f"which {words[0]}? Give KIND ID, or KIND/ID")
    return [_ref(words[0], id) for id in words[1:]]


def _check_kind(engine: Engine, kind: str) -> None:
    """Refuse a kind that no worker of the app evaluates: most likely a slip of the pen."""
    if kind not in engine.kinds:
        raise click.UsageError(_unknown(engine, kind))


def _unknown(engine: Engine, kind: str) -> str:
    close = difflib.get_close_matches(kind, engine.kinds, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"no entity class of kind {kind!r} is registered.{hint} Known: {', '.join(engine.kinds) or 'none'}"


def _queue(engine: Engine, kind: str) -> str | None:
    """Where the messages of a kind go; None if this app cannot tell."""
    if kind not in engine.kinds:
        return None
    name = task_name(kind, engine._namespace or DEFAULT_NAMESPACE)
    try:
        routed = engine.app.amqp.router.route(dict(engine._kind(kind).options.routing), name)
    except QueueNotFound:
        return None
    return getattr(routed.get("queue"), "name", None)


def _not_found(ctx: click.Context, engine: Engine, kind: str, what: str) -> None:
    """Say that there is nothing, and why that may be; exit 1."""
    hint = "" if kind in engine.kinds else f" ({_unknown(engine, kind)})"
    click.echo(f"{what}{hint}", err=True)
    ctx.exit(NOT_FOUND)


# The commands ------------------------------------------------------------------------------------


@goalstate.command(cls=CeleryCommand)
@_entities
@click.option(
    "--in",
    "delay",
    cls=CeleryOption,
    metavar="DURATION",
    callback=_parse_duration,
    help="Not before that: 30s, 5m, 2h, 1d.",
)
@click.option(
    "--at",
    cls=CeleryOption,
    metavar="TIME",
    callback=_parse_time,
    help="Not before that: ISO 8601 with a time zone.",
)
@_as_json
@click.pass_context
def enqueue(
    ctx: click.Context,
    entities: Sequence[str],
    delay: timedelta | None,
    at: datetime | None,
    as_json: bool,
) -> None:
    """Look at entities: now, or at a deadline. The earliest deadline wins.

    Revives an entity that is quarantined.
    """
    if delay is not None and at is not None:
        raise click.UsageError("give --in or --at, not both")
    refs = _refs(entities)
    with _engine(ctx) as engine:
        for ref in refs:
            _check_kind(engine, ref.kind)
        try:
            done = {ref: engine.enqueue(ref, at if delay is None else delay) for ref in refs}
        except ValueError as error:  # a deadline that is too far away
            raise click.UsageError(str(error)) from error
        paused = [kind for kind in dict.fromkeys(ref.kind for ref in refs) if engine.paused(kind)]
    if as_json:
        _print_json([{"entity": f"{ref.kind}/{ref.id}", **asdict(each)} for ref, each in done.items()])
    else:
        for ref, each in done.items():
            when = "unchanged" if each.deadline is None else f"scheduled {_relative(each.deadline)}"
            click.echo(f"{ref}: {when}{'' if each.changed else ', as it was before'}")
    for kind in paused:
        click.echo(_until_resumed(kind), err=True)


@goalstate.command(cls=CeleryCommand)
@click.argument("entity", metavar="KIND ID", nargs=-1, required=True)
@_as_json
@click.pass_context
def show(ctx: click.Context, entity: Sequence[str], as_json: bool) -> None:
    """Everything that is known of an entity, and what will happen next."""
    ref, *more = _refs(entity)
    if more:
        raise click.UsageError("give one entity")
    with _engine(ctx) as engine:
        found = engine.describe(ref)
        paused = engine.paused(ref.kind)
        queue = _queue(engine, ref.kind)
        if as_json:
            _print_json(None if found is None else _details(found, paused, queue))
        if found is None:
            _not_found(
                ctx, engine, ref.kind, f"{ref} is not known: never enqueued, deleted, or idle for long"
            )
        elif not as_json:
            _print_details(found, paused, queue)
            if ref.kind not in engine.kinds:
                click.echo(
                    f"{_unknown(engine, ref.kind)}. A worker that does not know it drops its messages."
                )


@goalstate.command("list", cls=CeleryCommand)
@click.option("--kind", cls=CeleryOption, metavar="KIND", help="Entities of this kind.")
@click.option(
    "--status",
    cls=CeleryOption,
    type=click.Choice([str(status) for status in Status]),
    help="Entities in this status.",
)
@click.option(
    "--limit",
    cls=CeleryOption,
    metavar="N",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="So many entities at most.",
)
@_as_json
@click.pass_context
def list_(ctx: click.Context, kind: str | None, status: str | None, limit: int, as_json: bool) -> None:
    """Entities of a kind or in a status, or how many of each there are.

    Failed ones come first, then running, scheduled, idle.
    """
    with _engine(ctx) as engine:
        if kind is None and status is None:
            _list_counts(ctx, engine, as_json)
            return
        if kind is not None:
            _ref(kind, "checked")
        kinds = engine.kinds if kind is None else (kind,)
        statuses = ORDER if status is None else (status,)
        found = [
            each for wanted in statuses for name in kinds for each in engine.list(name, wanted, limit + 1)
        ]
        shown = found[:limit]
        if as_json:
            _print_json([asdict(each) for each in shown])
        if not found:
            what = " ".join(filter(None, ["no", status, "entities", kind and f"of kind {kind}"]))
            _not_found(ctx, engine, kind or next(iter(engine.kinds), ""), what)
        elif not as_json:
            _print_table(["entity", "status", "when", "goal", "failures", "error"], [_row(d) for d in shown])
            if len(found) > limit:
                click.echo(f"There are more than these {limit}; see --limit.", err=True)


@goalstate.command(cls=CeleryCommand)
@_entities
@click.option(
    "--all",
    "all_of_it",
    cls=CeleryOption,
    is_flag=True,
    help="All entities of a kind that is not registered.",
)
@_as_json
@click.pass_context
def delete(ctx: click.Context, entities: Sequence[str], all_of_it: bool, as_json: bool) -> None:
    """Forget entities: their schedules, failures, all of it. What they stand for is not touched."""
    if all_of_it:
        _delete_kind(ctx, entities, as_json)
        return
    refs = _refs(entities)
    with _engine(ctx) as engine:
        done = {ref: engine.delete(ref) for ref in refs}
        if as_json:
            _print_json(
                [{"entity": f"{ref.kind}/{ref.id}", "deleted": deleted} for ref, deleted in done.items()]
            )
        else:
            for ref in (ref for ref, deleted in done.items() if deleted):
                click.echo(f"{ref}: deleted")
        if unknown := [ref for ref, deleted in done.items() if not deleted]:
            _not_found(ctx, engine, unknown[0].kind, f"not known: {', '.join(map(str, unknown))}")


def _delete_kind(ctx: click.Context, words: Sequence[str], as_json: bool) -> None:
    if len(words) > 1:
        raise click.UsageError("--all takes one KIND and no ids")
    kind = _ref(words[0], "checked").kind
    with _engine(ctx) as engine:
        if kind in engine.kinds:
            raise click.UsageError(f"kind {kind!r} is registered: --all is for kinds that are not any more")
        count = engine.delete_kind(kind)
        if as_json:
            _print_json({"kind": kind, "deleted": count})
        elif count:
            click.echo(f"{kind}: {count} deleted")
        if not count:
            _not_found(ctx, engine, kind, f"no entities of kind {kind}")


@goalstate.command(cls=CeleryCommand)
@click.argument("kind")
@click.argument("new_kind", required=False)
@click.option("--from-index", cls=CeleryOption, metavar="URL", help="Where the index was.")
@click.option("--from-namespace", cls=CeleryOption, metavar="NAME", help="In which namespace it was.")
@click.option("--from-prefix", cls=CeleryOption, metavar="NAME", help="With which key prefix.")
@_as_json
@click.pass_context
def move(
    ctx: click.Context,
    kind: str,
    new_kind: str | None,
    from_index: str | None,
    from_namespace: str | None,
    from_prefix: str | None,
    as_json: bool,
) -> None:
    """Take over the entities of a kind that had another name or place.

    Pauses the old kind. Move again, until nothing is left there.
    """
    with _engine(ctx) as engine:
        to = new_kind or kind
        _check_kind(engine, to)
        old = engine.settings.elsewhere(
            index_url=from_index, namespace=from_namespace, key_prefix=from_prefix
        )
        moved = moving.move(engine, to, old_kind=_ref(kind, "checked").kind, old=old)
        paused = engine.paused(to)
    if as_json:
        _print_json({"kind": kind, "to": to, **asdict(moved)})
        return
    click.echo(f"{kind} to {to}: {moved.entities} moved")
    if moved.running:
        click.echo(f"{moved.running} still being evaluated there: move again when that has ended", err=True)
    if paused:  # as it is when one goes back to where an earlier move came from
        click.echo(_until_resumed(to), err=True)


@goalstate.command(cls=CeleryCommand)
@click.argument("kind", required=False)
@_as_json
@click.pass_context
def pause(ctx: click.Context, kind: str | None, as_json: bool) -> None:
    """Let no evaluation start, of one kind or of all.

    Those under way finish. What is enqueued meanwhile is noted.
    """
    _switch(ctx, kind, Engine.pause, "paused", as_json)


@goalstate.command(cls=CeleryCommand)
@click.argument("kind", required=False)
@_as_json
@click.pass_context
def resume(ctx: click.Context, kind: str | None, as_json: bool) -> None:
    """Undo `pause`. What came due meanwhile is evaluated now."""
    _switch(ctx, kind, Engine.resume, "resumed", as_json)


def _switch(
    ctx: click.Context, kind: str | None, switch: Callable[[Engine, str], None], done: str, as_json: bool
) -> None:
    with _engine(ctx) as engine:
        if kind is not None:
            _check_kind(engine, kind)
        kinds = engine.kinds if kind is None else (kind,)
        for name in kinds:
            switch(engine, name)
    if as_json:
        _print_json({done: kinds})
    else:
        click.echo(f"{done}: {', '.join(kinds) or 'nothing, for no entity classes are registered'}")


@goalstate.command(cls=CeleryCommand)
@click.argument("kind")
@click.option(
    "--spread",
    cls=CeleryOption,
    metavar="DURATION",
    callback=_parse_duration,
    help="Spread the deadlines over that: 30s, 5m, 2h, 1d.",
)
@click.option("--revive", cls=CeleryOption, is_flag=True, help="Those that are quarantined too.")
@_as_json
@click.pass_context
def resync(ctx: click.Context, kind: str, spread: timedelta | None, revive: bool, as_json: bool) -> None:
    """Enqueue what the kind's iter_unconverged() finds.

    After a loss of the index, say. What is scheduled already keeps its deadline and its back-off.
    """
    with _engine(ctx) as engine:
        _check_kind(engine, kind)
        count = engine.resync(kind, spread=spread, revive=revive)
    if as_json:
        _print_json({"kind": kind, "enqueued": count})
    else:
        click.echo(f"{kind}: {count} enqueued")


# For people --------------------------------------------------------------------------------------


def _list_counts(ctx: click.Context, engine: Engine, as_json: bool) -> None:
    registered = engine.counts()
    orphans, unreadable = _orphans(engine)
    counts = {**registered, **orphans}
    remarks = {
        **{kind: "paused" * engine.paused(kind) for kind in registered},
        **dict.fromkeys(orphans, "not registered"),
    }
    if as_json:
        _print_json(
            {
                kind: {**counts[kind], "paused": remarks[kind] == "paused", "registered": kind in registered}
                for kind in counts
            }
            | {kind: {"registered": False, "error": error} for kind, error in unreadable.items()}
        )
    elif counts:
        _print_table(
            ["kind", *Status, ""],
            [[kind, *map(str, counts[kind].values()), remarks[kind]] for kind in counts],
        )
    for error in unreadable.values():
        click.echo(f"not counted: {printable(error)}", err=True)
    if not registered:
        click.echo("no entity classes are registered", err=True)
        ctx.exit(NOT_FOUND)
    for kind in map(printable, orphans):
        click.echo(
            f"No entity class of kind {kind} is registered here. Unless another app has one, nobody evaluates"
            f" these. Renamed? `goalstate move {kind} NEW_KIND`. Removed? `goalstate delete {kind} --all`.",
            err=True,
        )


def _orphans(engine: Engine) -> tuple[dict[str, dict[Status, int]], dict[str, str]]:
    """How many entities kinds have that are not registered, and why some of these kinds cannot be read."""
    counted, unreadable = {}, {}
    for kind in engine._foreign_kinds():
        try:
            counted[kind] = engine._counts_as_kept(kind)
        except (ImproperlyConfigured, IndexUnavailable) as error:  # another release's; on a node that is away
            unreadable[kind] = str(error)
    return {kind: counts for kind, counts in counted.items() if any(counts.values())}, unreadable


def _row(found: Description) -> list[str]:
    error = found.error or ""
    return [
        f"{found.kind}/{found.id}",
        found.status,
        _when(found),
        {True: "reached", False: "not reached", None: ""}[found.converged],
        str(found.failures or ""),
        error if len(error) <= ERROR_WIDTH else f"{error[: ERROR_WIDTH - 1]}…",
    ]


def _when(found: Description) -> str:
    """The point in time that matters in this status."""
    if found.status is Status.SCHEDULED and found.deadline is not None:
        late = _lateness(found)
        return f"{_span(late)} overdue" if late >= 1 else _relative(found.deadline)
    if found.status is Status.RUNNING and found.started is not None:
        return f"for {_span(_seconds_since(found.started))}"
    since = found.quarantined or found.finished
    return "" if since is None else _relative(since)


def _print_details(found: Description, paused: bool, queue: str | None) -> None:
    late = _lateness(found)
    overdue = f", {_span(late)} overdue" if late >= 1 else f", {_relative(found.deadline)}"
    reached = {True: ", goal reached", False: ", goal not reached", None: ""}[found.converged]
    lines = {
        "deadline": found.deadline and _absolute(found.deadline) + overdue,
        "running since": found.started and _moment(found.started),
        "quarantined": found.quarantined and _moment(found.quarantined),
        "last look": found.finished and f"ended {_moment(found.finished)}{reached}",
        "failures": found.failures and str(found.failures),
        "error": found.error,
        "task id": found.task_id,
        "message": found.sent and f"on its way{f', by queue {queue}' if queue else ''}",
    }
    click.echo(f"{found.kind}/{printable(found.id)}: {found.status}\n")
    for name, value in lines.items():
        if value:
            click.echo(f"  {name:<14} {printable(value)}")
    click.echo(f"\n{printable(_next(found, paused))}")


def _next(found: Description, paused: bool) -> str:
    """What will happen next, and what could be done about it."""
    if paused and found.deadline is not None:
        then = "Its evaluation under way finishes. " if found.status is Status.RUNNING else ""
        return then + _until_resumed(found.kind)
    match found.status:
        case Status.RUNNING:
            again = " It is looked at once more after that." if found.deadline else ""
            return (
                f"A worker evaluates it now.{again} Should the worker fall silent, its lease ends"
                f" {_relative(found.lease_expires)}; then it is looked at again after the back-off."
            )
        case Status.FAILED:
            return (
                "It is quarantined: nothing happens until somebody enqueues it:"
                f" `goalstate enqueue {shlex.quote(f'{found.kind}/{found.id}')}`."
            )
        case Status.IDLE if found.converged is False:
            return (
                "Nothing is pending, though its goal is not reached: its actions changed nothing and asked"
                " for no further look. Enqueue it when that should be different."
            )
        case Status.IDLE:
            return "Nothing is pending, until somebody enqueues it."
    retry = f" That is the retry after {_in_a_row(found.failures)}." if found.failures else ""
    if _lateness(found) < 1:
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


def _until_resumed(kind: str) -> str:
    return f"The kind is paused: nothing starts until `goalstate resume {kind}`."


def _in_a_row(failures: int) -> str:
    return "1 failure" if failures == 1 else f"{failures} failures in a row"


def _lateness(found: Description) -> float:
    """Seconds since the deadline of a pending evaluation; 0 if it is not over."""
    return 0.0 if found.deadline is None else max(0.0, _seconds_since(found.deadline))


def _seconds_since(when: datetime) -> float:
    return (datetime.now(UTC) - when).total_seconds()


def _relative(when: datetime | None) -> str:
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
    return f"{_absolute(when)}, {_relative(when)}"


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [[heading.upper() for heading in headings], *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


# For machines ------------------------------------------------------------------------------------


def _details(found: Description, paused: bool, queue: str | None) -> dict[str, Any]:
    return {
        **asdict(found),
        "lateness": round(_lateness(found), 3),
        "paused": paused,
        "queue": queue,
        "next": _next(found, paused),
    }


def _print_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, default=datetime.isoformat)
    # It may be a person who looks at it, too.
    click.echo(
        "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)
    )
