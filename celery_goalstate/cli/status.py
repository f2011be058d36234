"""`celery goalstate status`: what fails, what is late, what hangs, and whether anybody is there."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict

import click
from celery.bin.base import CeleryCommand

from celery_goalstate.cli.arguments import engine_of_command, json_option
from celery_goalstate.cli.commands import goalstate
from celery_goalstate.cli.output import print_json, print_table, relative, span
from celery_goalstate.description import Status
from celery_goalstate.display import printable
from celery_goalstate.engine import Engine
from celery_goalstate.exceptions import ImproperlyConfigured
from celery_goalstate.index.base import Partial
from celery_goalstate.index.counters import Outcome
from celery_goalstate.overview import Overview

#: Something needs a person.
NEEDS_SOMEBODY = 1
#: Seconds that something may be overdue: a worker is busy, or has just started.
LATE = 60.0


@goalstate.command(cls=CeleryCommand)
@click.option(
    "--wait",
    type=click.FloatRange(0, 600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to count the evaluations of a kind that is late, to tell how long the rest takes. 0: not.",
)
@json_option
@click.pass_context
def status(ctx: click.Context, wait: float, as_json: bool) -> None:
    """What fails, is late or hangs, and whether a worker is there.

    Exits with 1 if something needs a person.
    """
    partial = Partial()
    with engine_of_command(ctx) as engine:
        found = partial.known(engine.overview) or {}
        orphans, unreadable = _orphans(engine, partial)
        rates = _rates(engine, [each for each in found.values() if _is_late(each)], wait, partial)
        needs = [*_needs(engine, found, rates, wait), *_orphaned(orphans), *_incomplete(partial), *unreadable]
        if as_json:
            kinds = {
                kind: asdict(overview) | {"evaluations_per_second": rates.get(kind)}
                for kind, overview in {**found, **orphans}.items()
            }
            print_json({"kinds": kinds, "needs": needs})
        else:
            print_table(
                ["kind", "scheduled", "overdue", "oldest", "running", "longest", "failing", "failed", ""],
                [_row(overview, engine) for overview in {**found, **orphans}.values()],
                numbers=range(1, 8),
            )
            if needs:
                click.echo()
            for need in needs:
                click.echo(f"! {printable(need)}")
        partial.raise_if_away(found)
    if needs:
        ctx.exit(NEEDS_SOMEBODY)


def _row(overview: Overview, engine: Engine) -> list[str]:
    paused = overview.paused
    remarks = [
        "" if overview.kind in engine.kinds else "not registered",
        f"paused {relative(paused.since)} by {paused.by}" if paused else "",
    ]
    return [
        overview.kind,
        str(overview.counts[Status.SCHEDULED]),
        str(overview.overdue),
        _age(overview.oldest_overdue),
        str(overview.counts[Status.RUNNING]),
        _age(overview.longest_running),
        str(overview.failing),
        str(overview.counts[Status.FAILED]),
        ", ".join(filter(None, remarks)),
    ]


def _age(seconds: float | None) -> str:
    return "" if seconds is None else span(seconds)


def _is_late(overview: Overview) -> bool:
    return (overview.oldest_overdue or 0.0) >= LATE and not overview.paused


def _rates(engine: Engine, late: Iterable[Overview], wait: float, partial: Partial) -> dict[str, float]:
    """How many evaluations of these kinds end in a second, by two readings of what is counted."""
    kinds = [overview.kind for overview in late]
    if not (kinds and wait and engine.settings.metrics):
        return {}
    before, began = _ended(engine, kinds, partial), time.monotonic()
    time.sleep(wait)
    after, took = _ended(engine, kinds, partial), time.monotonic() - began
    return {kind: (after[kind] - before[kind]) / took for kind in kinds if kind in before and kind in after}


def _ended(engine: Engine, kinds: Iterable[str], partial: Partial) -> dict[str, int]:
    """How many evaluations ever ended: those that were given back begin anew."""
    found = partial.known(lambda: engine.parts.index.metrics(kinds)) or {}
    return {
        kind: metrics.evaluations.total() - metrics.evaluations[Outcome.RETURNED]
        for kind, metrics in found.items()
    }


def _to_go(overdue: int, rate: float | None, wait: float) -> str:
    if rate is None:
        return ""
    if not rate:
        return f"; none was evaluated within {span(wait)}"
    return f"; {rate:,.{0 if rate >= 10 else 1}f} a second are evaluated, about {span(overdue / rate)} to go"


def _needs(
    engine: Engine, found: Mapping[str, Overview], rates: Mapping[str, float], wait: float
) -> Iterator[str]:
    """What a person should look at, and by which command, the worst first."""
    yield from unswept(found.values())
    for kind, overview in found.items():
        command = f"`celery goalstate list --kind {kind}"
        if failed := overview.counts[Status.FAILED]:
            yield f"{kind}: {failed} quarantined, until somebody enqueues them: {command} --status failed`"
        if overview.failing:
            since = _age(overview.longest_failing)
            yield f"{kind}: {overview.failing} failing, the first for {since}: {command} --failing`"
        if _is_late(overview):
            since, to_go = _age(overview.oldest_overdue), _to_go(overview.overdue, rates.get(kind), wait)
            yield f"{kind}: {overview.overdue} overdue, the first for {since}{to_go}: {command} --overdue`"
        runs, longest_allowed = overview.longest_running or 0.0, engine.kind(kind).options.max_run
        if runs >= longest_allowed / 2:
            entity = shlex.quote(f"{kind}/{overview.longest_running_id}")
            show = f"`celery goalstate show {entity}`"
            yield f"{entity} runs for {span(runs)}, of {span(longest_allowed)}: {show}"


def unswept(found: Iterable[Overview]) -> Iterator[str]:
    """What to say if nobody sweeps some of the kinds; nothing if somebody does."""
    alone = [overview for overview in found if not overview.sweeper]
    if alone:
        kinds = ", ".join(overview.kind for overview in alone)
        ages = [overview.unswept for overview in alone if overview.unswept is not None]
        since = f"since {span(min(ages))}" if ages else "so far"
        yield f"no worker is there {since}, nothing happens ({kinds}): start one, or see why it ended"


def _orphaned(orphans: Mapping[str, Overview]) -> Iterator[str]:
    for kind, overview in orphans.items():
        yield (
            f"{kind}: no entity class of this kind is registered here, and {sum(overview.counts.values())}"
            f" entities are kept. Renamed? `celery goalstate move {kind} NEW_KIND`. Removed?"
            f" `celery goalstate delete {kind} --all`"
        )


def _incomplete(partial: Partial) -> Iterator[str]:
    if partial.away:
        yield f"a part of the index does not answer; not known is what is in {', '.join(partial.away)}"


def _orphans(engine: Engine, partial: Partial) -> tuple[dict[str, Overview], list[str]]:
    """Kinds that have entities and are not registered; and why some of them cannot be read."""
    found: dict[str, Overview] = {}
    unreadable: list[str] = []
    for kind in partial.known(engine.foreign_kinds) or ():
        try:
            found |= partial.known(lambda kind=kind: engine.overview(kind)) or {}  # type: ignore[misc]
        except ImproperlyConfigured as error:  # another release's
            unreadable.append(str(error))
    return {kind: each for kind, each in found.items() if any(each.counts.values())}, unreadable
