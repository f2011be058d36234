"""`celery goalstate list`: entities of a kind, in a status, or with some trouble; and how many there are."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial as call_of

import click
from celery.bin.base import CeleryCommand, CeleryOption

from celery_goalstate.cli.arguments import NOT_FOUND, engine_of_command, json_option, not_found, ref_of
from celery_goalstate.cli.bulk import every
from celery_goalstate.cli.commands import goalstate
from celery_goalstate.cli.output import failing_row_of, print_json, print_table, row_of
from celery_goalstate.description import Description, Listing, Status, position_of
from celery_goalstate.display import printable
from celery_goalstate.engine import Engine
from celery_goalstate.exceptions import ImproperlyConfigured, IndexUnavailable
from celery_goalstate.index.base import LONGEST_PAGE, Partial

#: In which order entities are shown: first what a person may have to do something about.
ORDER = (Status.FAILED, Status.RUNNING, Status.SCHEDULED, Status.IDLE)
#: What is listed by each flag. Of what runs that first which lasts long, in order of when it began.
FLAGS: dict[str, tuple[Status | Listing, ...]] = {
    "failing": (Listing.FAILING,),
    "overdue": (Listing.OVERDUE,),
    "running": (Listing.LONG, Status.RUNNING),
}
#: Where an error is searched.
WITH_ERRORS = (Status.FAILED, Listing.FAILING)


@goalstate.command("list", cls=CeleryCommand)
@click.option("--kind", cls=CeleryOption, metavar="KIND", help="Entities of this kind.")
@click.option(
    "--status",
    cls=CeleryOption,
    type=click.Choice([str(status) for status in Status]),
    help="Entities in this status.",
)
@click.option("--failing", "flag", flag_value="failing", cls=CeleryOption, help="Failed, and tried again.")
@click.option("--overdue", "flag", flag_value="overdue", cls=CeleryOption, help="Due, and not evaluated yet.")
@click.option("--running", "flag", flag_value="running", cls=CeleryOption, help="Being evaluated now.")
@click.option(
    "--error", cls=CeleryOption, metavar="TEXT", help="Failing or failed ones with this text in their error."
)
@click.option(
    "--limit",
    cls=CeleryOption,
    metavar="N",
    type=click.IntRange(1, LONGEST_PAGE),
    default=50,
    show_default=True,
    help="So many entities at most.",
)
@click.option("--after", cls=CeleryOption, metavar="CURSOR", help="The next page, as the last one named it.")
@json_option
@click.pass_context
def list_(
    ctx: click.Context,
    kind: str | None,
    status: str | None,
    flag: str | None,
    error: str | None,
    limit: int,
    after: str | None,
    as_json: bool,
) -> None:
    """Entities of a kind or with a trouble, or how many there are.

    Failed ones come first, then running, scheduled, idle. Those of --failing, --overdue, --running and
    --error come the longest first.
    """
    wanted = _wanted(status, flag, error)
    if after is not None and kind is None and wanted is None:
        raise click.UsageError("--after goes with --kind, --status or another choice")
    with engine_of_command(ctx) as engine:
        if kind is None and wanted is None:
            _list_counts(ctx, engine, as_json)
            return
        if kind is not None:
            ref_of(kind, "checked")
        kinds = engine.kinds if kind is None else (kind,)
        lists = [(name, listing) for listing in wanted or ORDER for name in kinds]
        partial = Partial()
        found = _page(engine, lists, limit, after, error, partial)
        if as_json:
            print_json([asdict(each) for each in found])
        if not found and not partial.away:
            words = ["no", after and "further", flag or status, "entities", kind and f"of kind {kind}"]
            what = " ".join(filter(None, [*words, error and f"with {error!r} in their error"]))
            not_found(ctx, engine, kind or next(iter(engine.kinds), ""), what)
        elif not as_json and wanted == FLAGS["failing"]:
            headings = ["entity", "failing", "tried again", "state", "failures", "error"]
            print_table(headings, [failing_row_of(each) for each in found])
        elif not as_json:
            headings = ["entity", "status", "when", "goal", "failures", "error"]
            print_table(headings, [row_of(each) for each in found])
        if found and _page(engine, lists, 1, found[-1].cursor, error, Partial()):
            cursor = printable(shlex.quote(found[-1].cursor))
            click.echo(f"There are more than these {len(found)}: --after {cursor}", err=True)
        partial.raise_if_away(found)


def _wanted(status: str | None, flag: str | None, error: str | None) -> tuple[Status | Listing, ...] | None:
    """Which lists are asked for; None: none is named."""
    if status is not None and flag is not None:
        raise click.UsageError(f"give --status {status} or --{flag}, not both")
    if flag is not None:
        return FLAGS[flag]
    if status is not None:
        return (Status(status),)
    return WITH_ERRORS if error is not None else None


def _page(
    engine: Engine,
    lists: Sequence[tuple[str, Status | Listing]],
    limit: int,
    after: str | None,
    error: str | None,
    partial: Partial,
) -> list[Description]:
    """One page over the lists of kinds, one after the other; `partial` is told what is away."""
    twice = {(kind, Status.RUNNING) for kind, listing in lists if listing is Listing.LONG}
    if after is not None:
        try:
            listing, kind, _ = position_of(after)
        except ValueError as invalid:
            raise click.UsageError(str(invalid)) from invalid
        if (kind, listing) not in lists:
            raise click.UsageError(f"--after {after!r} is on no page of this list")
        lists = lists[lists.index((kind, listing)) :]
    found: list[Description] = []
    for kind, listing in lists:
        for each in every(engine, kind, listing, limit, after, partial):
            if len(found) == limit:
                return found
            if each.doing and (kind, listing) in twice:
                continue
            if error is None or error.lower() in (each.error or "").lower():
                found.append(each)
        after = None
    return found


def _list_counts(ctx: click.Context, engine: Engine, as_json: bool) -> None:
    partial = Partial()
    registered = partial.known(engine.counts) or {}
    paused = {kind for kind in registered if partial.known(call_of(engine.paused, kind))}
    orphans, unreadable = _orphans(engine, partial)
    counts = {**registered, **orphans}
    incomplete = {shard.partition(" ")[0] for shard in partial.away}
    remarks = {"not registered": orphans, "paused": paused, "incomplete": incomplete}
    if as_json:
        print_json(
            {
                kind: {
                    **counts[kind],
                    "paused": kind in paused,
                    "registered": kind in registered,
                    "complete": kind not in incomplete,
                }
                for kind in counts
            }
            | {kind: {"registered": False, "error": error} for kind, error in unreadable.items()}
        )
    elif counts:
        print_table(
            ["kind", *Status, ""],
            [
                [
                    kind,
                    *map(str, counts[kind].values()),
                    ", ".join(remark for remark, kinds in remarks.items() if kind in kinds),
                ]
                for kind in counts
            ],
        )
    for error in unreadable.values():
        click.echo(f"not counted: {printable(error)}", err=True)
    if not engine.kinds:
        click.echo("no entity classes are registered", err=True)
        ctx.exit(NOT_FOUND)
    for kind in map(printable, orphans):
        click.echo(
            f"No entity class of kind {kind} is registered here. Unless another app has one, no worker"
            f" evaluates these. Renamed? `goalstate move {kind} NEW_KIND`."
            f" Removed? `goalstate delete {kind} --all`.",
            err=True,
        )
    partial.raise_if_away(counts)


def _orphans(engine: Engine, partial: Partial) -> tuple[dict[str, dict[Status, int]], dict[str, str]]:
    """How many entities kinds have that are not registered, and why some of these kinds cannot be read."""
    counted: dict[str, dict[Status, int]] = {}
    unreadable: dict[str, str] = {}
    try:
        foreign = engine.foreign_kinds()
    except IndexUnavailable as error:
        partial.away["the kinds that are not registered"] = error
        return {}, {}
    for kind in foreign:
        try:
            found = partial.known(call_of(engine.counts, kind))
        except ImproperlyConfigured as error:  # another release's
            unreadable[kind] = str(error)
        else:
            counted |= found or {}
    return {kind: counts for kind, counts in counted.items() if any(counts.values())}, unreadable
