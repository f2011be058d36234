"""The commands of `celery goalstate`."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial as call_of
from typing import TypeVar

import click
from celery.bin.base import CeleryCommand, CeleryOption

from celery_goalstate import evaluation
from celery_goalstate import move as moving
from celery_goalstate.cli.arguments import (
    NAMESPACE,
    NOT_FOUND,
    check_kind,
    class_of,
    engine_of_command,
    json_option,
    not_found,
    parse_duration,
    parse_time,
    queue_of,
    ref_of,
    refs_of,
    unknown_kind,
)
from celery_goalstate.cli.bulk import bulk_options, choice_of, do_in_bulk
from celery_goalstate.cli.output import (
    details_of,
    print_details,
    print_json,
    relative,
    until_resumed,
)
from celery_goalstate.display import matrix_text, printable, state_text
from celery_goalstate.engine import Engine
from celery_goalstate.entity import Entity, EntityRef
from celery_goalstate.evaluation import error_text
from celery_goalstate.exceptions import EntityGone, UnknownKind
from celery_goalstate.rules import NO_RULE, Rules

T = TypeVar("T")


@click.group()
@click.option("--namespace", metavar="NAME", help="Which engine, if the app has several.")
@click.pass_context
def goalstate(ctx: click.Context, namespace: str | None) -> None:
    """See and operate entities on the way to their goal states."""
    ctx.meta[NAMESPACE] = namespace


@goalstate.command(cls=CeleryCommand)
@bulk_options
@click.option(
    "--in",
    "delay",
    cls=CeleryOption,
    metavar="DURATION",
    callback=parse_duration,
    help="Not before that: 30s, 5m, 2h, 1d.",
)
@click.option(
    "--at",
    cls=CeleryOption,
    metavar="TIME",
    callback=parse_time,
    help="Not before that: ISO 8601 with a time zone.",
)
@json_option
@click.pass_context
def enqueue(
    ctx: click.Context,
    entities: Sequence[str],
    failed: str | None,
    failing: str | None,
    yes: bool,
    delay: timedelta | None,
    at: datetime | None,
    as_json: bool,
) -> None:
    """Schedule an evaluation: now, or at a deadline. The earliest deadline wins.

    Revives an entity that is quarantined.
    """
    if delay is not None and at is not None:
        raise click.UsageError("give --in or --at, not both")
    if choice := choice_of(entities, failed, failing):
        with engine_of_command(ctx) as engine:
            count = do_in_bulk(
                engine,
                choice,
                "Enqueue",
                lambda refs: engine.enqueue_many(refs, at if delay is None else delay),
                yes=yes,
            )
            _print_count(choice.kind, "enqueued", count, as_json)
            if engine.paused(choice.kind):
                click.echo(until_resumed(choice.kind), err=True)
        return
    refs = refs_of(entities)
    with engine_of_command(ctx) as engine:
        for ref in refs:
            check_kind(engine, ref.kind)
        try:
            done = {ref: engine.enqueue(ref, at if delay is None else delay) for ref in refs}
        except ValueError as error:  # a deadline that is too far away
            raise click.UsageError(str(error)) from error
        paused = [kind for kind in dict.fromkeys(ref.kind for ref in refs) if engine.paused(kind)]
    if as_json:
        print_json([{"entity": f"{ref.kind}/{ref.id}", **asdict(each)} for ref, each in done.items()])
    else:
        for ref, each in done.items():
            if each.deadline is None:
                scheduled = "unchanged"
            elif each.changed and each.deadline <= datetime.now(UTC):
                scheduled = "scheduled now"
            else:
                scheduled = f"scheduled {relative(each.deadline)}"
            click.echo(f"{ref}: {scheduled}{'' if each.changed else ', as it was before'}")
    for kind in paused:
        click.echo(until_resumed(kind), err=True)


@goalstate.command(cls=CeleryCommand)
@click.argument("entity", metavar="KIND ID", nargs=-1, required=True)
@json_option
@click.pass_context
def show(ctx: click.Context, entity: Sequence[str], as_json: bool) -> None:
    """Everything that is known of an entity, and what will happen next."""
    ref, *more = refs_of(entity)
    if more:
        raise click.UsageError("give one entity")
    with engine_of_command(ctx) as engine:
        found = engine.describe(ref)
        paused = engine.paused(ref.kind)
        queue = queue_of(engine, ref.kind)
        if as_json:
            print_json(None if found is None else details_of(found, paused, queue))
        if found is None:
            not_found(ctx, engine, ref.kind, f"{ref} is not known: never enqueued, deleted, or idle for long")
        elif not as_json:
            print_details(found, paused, queue)
            if ref.kind not in engine.kinds:
                click.echo(
                    f"{unknown_kind(engine, ref.kind)}. A worker that does not know it drops its messages."
                )


@goalstate.command(cls=CeleryCommand)
@click.argument("entity", metavar="KIND ID", nargs=-1, required=True)
@json_option
@click.pass_context
def explain(ctx: click.Context, entity: Sequence[str], as_json: bool) -> None:
    """What an evaluation would do now. Runs nothing.

    Calls from_id(), get_state(), get_goal_state() and get_action_list() here, and no hook.
    """
    ref, *more = refs_of(entity)
    if more:
        raise click.UsageError("give one entity")
    with engine_of_command(ctx, asks_index=False) as engine:
        cls = class_of(engine, ref.kind)
        explanation = _own_code(ctx, ref, call_of(evaluation.explain, ref, cls.from_id), as_json)
    if as_json:
        print_json(
            {
                "entity": f"{ref.kind}/{ref.id}",
                "state": state_text(explanation.state),
                "goal": state_text(explanation.goal_state),
                "actions": None
                if explanation.action_list is NO_RULE
                else [action.name for action in explanation.action_list.actions],
            }
        )
    else:
        click.echo(str(explanation))


@goalstate.command(cls=CeleryCommand)
@click.argument("kind_or_entity", metavar="KIND [ID]", nargs=-1, required=True)
@click.option("--mermaid", cls=CeleryOption, is_flag=True, help="As a flowchart, for documentation.")
@json_option
@click.pass_context
def graph(ctx: click.Context, kind_or_entity: Sequence[str], mermaid: bool, as_json: bool) -> None:
    """Which actions lead from which state toward which goal state.

    With an ID, the cell in which that entity is now has a star: its get_state() and get_goal_state() are
    called here.
    """
    ref, kind = None, kind_or_entity[0]
    if len(kind_or_entity) > 1 or "/" in kind:
        ref, *more = refs_of(kind_or_entity)
        kind = ref.kind
        if more:
            raise click.UsageError("give one entity")
    if mermaid and (ref or as_json):
        raise click.UsageError("--mermaid takes a KIND alone")
    with engine_of_command(ctx, asks_index=False) as engine:
        cls = class_of(engine, kind)
        rules = cls.rules
        if not isinstance(rules, Rules):
            raise click.UsageError(
                f"{cls.__qualname__} has no Rules that could be shown: its own code chooses the actions."
                f" What it chooses: `goalstate explain {kind} ID`"
            )
        present = None
        if ref is not None:
            present = _own_code(ctx, ref, call_of(evaluation.read_states, ref, cls.from_id), as_json)
    if mermaid:
        click.echo(rules.to_mermaid())
        return
    matrix = rules.matrix(present)
    if as_json:
        print_json({"kind": kind, **asdict(matrix)})
    else:
        click.echo(matrix_text(matrix))
        if present is not None:
            click.echo(f"\n* {ref} is here: {' → '.join(map(state_text, present))}")
    if cls.get_action_list is not Entity.get_action_list:
        click.echo(f"{cls.__qualname__}.get_action_list() may choose otherwise than its rules.", err=True)


def _own_code(ctx: click.Context, ref: EntityRef, call: Callable[[], T], as_json: bool) -> T:
    """What code of the entity's class returns; if that fails, its traceback, and exit 1."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - code of others
        if as_json:
            print_json({"entity": f"{ref.kind}/{ref.id}", "error": error_text(error)})
        if isinstance(error, EntityGone):
            click.echo(f"{ref} is gone, as its class says: an evaluation would forget it", err=True)
        else:
            lines = "".join(traceback.format_exception(error)).splitlines()
            click.echo("\n".join(map(printable, lines)), err=True)
        ctx.exit(NOT_FOUND)


@goalstate.command(cls=CeleryCommand)
@bulk_options
@click.option(
    "--all",
    "all_of_it",
    cls=CeleryOption,
    is_flag=True,
    help="All entities of a kind that is not registered.",
)
@json_option
@click.pass_context
def delete(
    ctx: click.Context,
    entities: Sequence[str],
    failed: str | None,
    failing: str | None,
    yes: bool,
    all_of_it: bool,
    as_json: bool,
) -> None:
    """Forget entities: their schedules, failures, all of it. What they stand for is not touched."""
    if choice := choice_of(entities, failed, failing):
        with engine_of_command(ctx) as engine:
            count = do_in_bulk(engine, choice, "Delete", engine.delete_many, yes=yes)
            _print_count(choice.kind, "deleted", count, as_json)
        return
    if all_of_it:
        _delete_kind(ctx, entities, as_json)
        return
    refs = refs_of(entities)
    with engine_of_command(ctx) as engine:
        done = {ref: engine.delete(ref) for ref in refs}
        if as_json:
            print_json(
                [{"entity": f"{ref.kind}/{ref.id}", "deleted": deleted} for ref, deleted in done.items()]
            )
        else:
            for ref in (ref for ref, deleted in done.items() if deleted):
                click.echo(f"{ref}: deleted")
        if unknown := [ref for ref, deleted in done.items() if not deleted]:
            not_found(ctx, engine, unknown[0].kind, f"not known: {', '.join(map(str, unknown))}")


def _print_count(kind: str, done: str, count: int, as_json: bool) -> None:
    if as_json:
        print_json({"kind": kind, done: count})
    else:
        click.echo(f"{kind}: {count} {done}")


def _delete_kind(ctx: click.Context, words: Sequence[str], as_json: bool) -> None:
    if len(words) > 1:
        raise click.UsageError("--all takes one KIND and no ids")
    kind = ref_of(words[0], "checked").kind
    with engine_of_command(ctx) as engine:
        if kind in engine.kinds:
            raise click.UsageError(f"kind {kind!r} is registered: --all is for kinds that are not any more")
        try:
            count = engine.delete_kind(kind)
        except UnknownKind:  # of a kind that is empty nothing is left, not even the name
            count = 0
        if as_json:
            print_json({"kind": kind, "deleted": count})
        elif count:
            click.echo(f"{kind}: {count} deleted")
        if not count:
            not_found(ctx, engine, kind, f"no entities of kind {kind}")


@goalstate.command(cls=CeleryCommand)
@click.argument("kind")
@click.argument("new_kind", required=False)
@click.option("--from-index", cls=CeleryOption, metavar="URL", help="Where the index was.")
@click.option("--from-namespace", cls=CeleryOption, metavar="NAME", help="In which namespace it was.")
@click.option("--from-prefix", cls=CeleryOption, metavar="NAME", help="With which key prefix.")
@json_option
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
    with engine_of_command(ctx) as engine:
        to = new_kind or kind
        check_kind(engine, to)
        old = engine.settings.elsewhere(
            index_url=from_index, namespace=from_namespace, key_prefix=from_prefix
        )
        moved = moving.move(engine, to, old_kind=ref_of(kind, "checked").kind, old=old)
        paused = engine.paused(to)
    if as_json:
        print_json({"kind": kind, "to": to, **asdict(moved)})
        return
    click.echo(f"{kind} to {to}: {moved.entities} moved")
    if moved.running:
        click.echo(f"{moved.running} still being evaluated there: move again when that has ended", err=True)
    if paused:  # as it is when one goes back to where an earlier move came from
        click.echo(until_resumed(to), err=True)


@goalstate.command(cls=CeleryCommand)
@click.argument("kind", required=False)
@json_option
@click.pass_context
def pause(ctx: click.Context, kind: str | None, as_json: bool) -> None:
    """Let no evaluation start, of one kind or of all.

    Those under way finish. What is enqueued meanwhile is noted. Holds on every worker, until `resume`.
    """
    _switch(ctx, kind, Engine.pause, "paused", as_json)


@goalstate.command(cls=CeleryCommand)
@click.argument("kind", required=False)
@json_option
@click.pass_context
def resume(ctx: click.Context, kind: str | None, as_json: bool) -> None:
    """Undo `pause`. What came due meanwhile is evaluated now."""
    _switch(ctx, kind, Engine.resume, "resumed", as_json)


def _switch(
    ctx: click.Context, kind: str | None, switch: Callable[[Engine, str], None], done: str, as_json: bool
) -> None:
    with engine_of_command(ctx) as engine:
        if kind is not None:
            check_kind(engine, kind)
        kinds = engine.kinds if kind is None else (kind,)
        for name in kinds:
            switch(engine, name)
    if as_json:
        print_json({done: kinds})
    else:
        click.echo(f"{done}: {', '.join(kinds) or 'nothing, for no entity classes are registered'}")


@goalstate.command(cls=CeleryCommand)
@click.argument("kind")
@click.option(
    "--spread",
    cls=CeleryOption,
    metavar="DURATION",
    callback=parse_duration,
    help="Spread the deadlines over that: 30s, 5m, 2h, 1d.",
)
@click.option("--revive", cls=CeleryOption, is_flag=True, help="Those that are quarantined too.")
@json_option
@click.pass_context
def resync(ctx: click.Context, kind: str, spread: timedelta | None, revive: bool, as_json: bool) -> None:
    """Enqueue what the kind's iter_unconverged() finds.

    After a loss of the index, say. What is scheduled already keeps its deadline and its back-off.
    """
    with engine_of_command(ctx) as engine:
        check_kind(engine, kind)
        count = engine.resync(kind, spread=spread, revive=revive)
    _print_count(kind, "enqueued", count, as_json)
