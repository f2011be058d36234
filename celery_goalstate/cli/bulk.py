"""What is done to all entities of a kind that fail, or are quarantined, instead of those that are named."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial as call_of
from typing import Any, NamedTuple

import click
from celery.bin.base import CeleryOption

from celery_goalstate.cli.arguments import check_kind
from celery_goalstate.description import Description, Listing, Status
from celery_goalstate.engine import Engine
from celery_goalstate.entity import EntityRef
from celery_goalstate.index.base import LONGEST_PAGE, Partial


class Choice(NamedTuple):
    """All of a kind that are in this list."""

    kind: str
    listing: Status | Listing


def bulk_options(command: Any) -> Any:
    """The entities that are named, or all of a kind that fail."""
    decorations: Sequence[Callable[[Any], Any]] = (
        click.option("--yes", cls=CeleryOption, is_flag=True, help="Do not ask whether that is meant."),
        click.option("--failing", cls=CeleryOption, metavar="KIND", help="All of a kind that fail."),
        click.option("--failed", cls=CeleryOption, metavar="KIND", help="All of a kind in quarantine."),
        click.argument("entities", metavar="[KIND ID...]", nargs=-1),
    )
    for decorate in decorations:
        command = decorate(command)
    return command


def choice_of(entities: Sequence[str], failed: str | None, failing: str | None) -> Choice | None:
    """Which entities are meant; None: those that are named."""
    choices = [Choice(failed, Status.FAILED)] if failed is not None else []
    choices += [Choice(failing, Listing.FAILING)] if failing is not None else []
    if len(choices) + bool(entities) != 1:
        raise click.UsageError("give KIND ID..., or --failed KIND, or --failing KIND")
    return choices[0] if choices else None


def do_in_bulk(
    engine: Engine, choice: Choice, verb: str, do: Callable[[list[EntityRef]], object], *, yes: bool
) -> int:
    """Do it to all that there are now, page by page, once that is confirmed; how many these are."""
    kind, listing = choice
    check_kind(engine, kind)
    overview = engine.overview(kind)[kind]
    count = overview.failing if listing is Listing.FAILING else overview.counts[Status.FAILED]
    what = f"{count} {listing} {'entity' if count == 1 else 'entities'} of kind {kind}"
    if count and not yes:
        click.confirm(f"{verb} {what}?", abort=True, err=True)
    partial = Partial()
    # Those that fail again meanwhile come last in the list, behind those that are counted.
    chosen = itertools.islice(every(engine, kind, listing, LONGEST_PAGE, None, partial), count)
    hidden = not sys.stderr.isatty()
    with click.progressbar(length=count, label=what, file=sys.stderr, hidden=hidden) as bar:
        while page := [engine.ref(kind, each.id) for each in itertools.islice(chosen, LONGEST_PAGE)]:
            do(page)
            bar.update(len(page))
    partial.raise_if_away(None)
    return count


def every(
    engine: Engine, kind: str, listing: Status | Listing, size: int, after: str | None, partial: Partial
) -> Iterator[Description]:
    """All entities of a list, read page by page of this size."""
    while found := partial.known(call_of(engine.list, kind, listing, size, after)):
        yield from found
        if len(found) < size:
            return
        after = found[-1].cursor
