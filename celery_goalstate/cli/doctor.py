"""`celery goalstate doctor`: what in the configuration is, or will be, in the way."""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator
from typing import NamedTuple

import click
from celery.bin.base import CeleryCommand

from celery_goalstate.cli.arguments import engine_of_command, json_option
from celery_goalstate.cli.commands import goalstate
from celery_goalstate.cli.output import print_json, span
from celery_goalstate.display import printable
from celery_goalstate.engine import Engine
from celery_goalstate.exceptions import IndexUnavailable
from celery_goalstate.index.url import safe_url
from celery_goalstate.rules import Rules
from celery_goalstate.worker.bootsteps import broker_warnings

#: Something fails.
FAILS = 1
#: Seconds that the index's clock and this machine's may differ.
CLOCK_DIFFERENCE = 1.0


class Verdict(enum.StrEnum):
    """What a check has found."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(NamedTuple):
    """What one check has found, and what to do about it."""

    verdict: Verdict
    what: str


@goalstate.command(cls=CeleryCommand)
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check index, broker, kinds and rules, and give advice.

    Changes nothing. Exits with 1 if something fails.
    """
    with engine_of_command(ctx) as engine:
        findings = list(_examine(engine))
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            click.echo(f"{finding.verdict:<4}  {printable(finding.what)}")
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        ctx.exit(FAILS)


def _examine(engine: Engine) -> Iterator[Finding]:
    try:
        yield from _index(engine)
        yield from _workers(engine)
    except IndexUnavailable as error:
        yield Finding(Verdict.FAIL, f"the index on {safe_url(engine.settings.index_url)}: {error}")
    yield from _broker(engine)
    yield from _kinds(engine)


def _index(engine: Engine) -> Iterator[Finding]:
    index, settings = engine.parts.index, engine.settings
    servers, now = index.servers(), time.time()
    where = (
        f"{safe_url(settings.index_url)}, namespace {settings.namespace}, key prefix {settings.key_prefix}"
    )
    yield Finding(Verdict.OK, f"the index answers: {where}, shards {settings.shards}")
    if policy := index.evicts():
        yield Finding(
            Verdict.FAIL,
            f"its maxmemory-policy is {policy}: when its memory is full it silently drops what is scheduled."
            " Set it to noeviction",
        )
    for server in servers:
        if server.saves is False:
            yield Finding(
                Verdict.WARN,
                f"{server.name} has saved no data so far: if it is restarted, what is scheduled is lost until"
                " the next resync. Set appendonly yes",
            )
        off = server.clock / 1000 - now
        if abs(off) > CLOCK_DIFFERENCE:
            yield Finding(
                Verdict.WARN,
                f"the clock of {server.name} is {span(abs(off))} {'ahead of' if off > 0 else 'behind'} this"
                " machine's: deadlines come by the index's. Let both follow NTP",
            )


def _workers(engine: Engine) -> Iterator[Finding]:
    alone = [kind for kind, overview in engine.overview().items() if not overview.sweeper]
    if alone:
        yield Finding(
            Verdict.FAIL,
            f"no worker is there for {', '.join(alone)}: start one (`celery worker`) that loads their"
            " classes",
        )
    elif engine.kinds:
        yield Finding(Verdict.OK, f"a worker is there for {', '.join(engine.kinds)}")
    for kind in engine.orphans():
        yield Finding(
            Verdict.WARN,
            f"the index keeps entities of kind {kind}, and no class of it is registered here: another app's,"
            " or renamed (`goalstate move`) or removed (`goalstate delete --all`)?",
        )


def _broker(engine: Engine) -> Iterator[Finding]:
    warnings = list(broker_warnings(engine.app, engine.settings.eta_horizon))
    for warning in warnings:
        yield Finding(Verdict.WARN, warning)
    if not warnings:
        yield Finding(Verdict.OK, "the broker's settings go with goalstate_eta_horizon")


def _kinds(engine: Engine) -> Iterator[Finding]:
    if not engine.kinds:
        yield Finding(
            Verdict.FAIL,
            "no entity class is registered here: let the app import the modules that register them, as those"
            " of tasks",
        )
    for name in engine.kinds:
        rules = getattr(engine.kind(name).entity_class, "rules", None)
        if not isinstance(rules, Rules):
            continue
        matrix = rules.matrix()
        gaps = [cell for row in matrix.rows for cell in row if cell.actions is None]
        if gaps:
            cells = ", ".join(f"{cell.state} → {cell.goal}" for cell in gaps)
            yield Finding(
                Verdict.WARN,
                f"the rules of {name} say nothing for {cells}: there nothing is done. Write [] if that is"
                f" meant (`goalstate graph {name}`)",
            )
