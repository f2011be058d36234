"""What is given on the command line, and how it is refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta

import click
from celery.bin.base import CeleryOption
from celery.exceptions import QueueNotFound

from celery_goalstate.display import printable
from celery_goalstate.engine import Engine
from celery_goalstate.entity import Entity, EntityRef
from celery_goalstate.exceptions import GoalStateError, IndexUnavailable
from celery_goalstate.index.url import safe_url
from celery_goalstate.registry import engine_of

NOT_FOUND, UNAVAILABLE = 1, 3

#: Under which key a command finds the namespace that was given before it.
NAMESPACE = "celery_goalstate.namespace"

IN_ONE_PROCESS = (
    "the index is memory://, which lives within one process: there is nothing to see from another one."
    " Set goalstate_index_url"
)


_DURATION = re.compile(r"(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)


def parse_duration(ctx: click.Context, param: click.Parameter, value: str | None) -> timedelta | None:
    """`1h30m` as a timedelta; a callback of click's options."""
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


def parse_time(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | None:
    """An ISO 8601 time with a time zone; a callback of click's options."""
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


json_option = click.option("--json", "as_json", cls=CeleryOption, is_flag=True, help="For machines.")


class _Unavailable(click.ClickException):
    exit_code = UNAVAILABLE


@contextmanager
def engine_of_command(ctx: click.Context, *, asks_index: bool = True) -> Iterator[Engine]:
    """The engine that a command is about; its errors become one line and an exit code."""
    app, url = ctx.obj.app, ""
    try:
        app.loader.import_default_modules()  # the entities, as in a worker
        engine = engine_of(app, ctx.meta[NAMESPACE])
        url = engine.settings.index_url
        if asks_index and url == "memory://":
            raise click.UsageError(IN_ONE_PROCESS)
        yield engine
    except IndexUnavailable as error:
        where = "" if "://" in str(error) else f" ({safe_url(url)})"  # `move` names the old index itself
        raise _Unavailable(printable(f"{error}{where}")) from error
    except GoalStateError as error:
        hint = " Or name yours: celery -A PROJECT goalstate ..." if app.main == "default" else ""
        raise click.UsageError(f"{error}.{hint}" if hint else str(error)) from error


def ref_of(kind: str, id: str) -> EntityRef:
    """The entity that is named by its kind and its id."""
    try:
        return EntityRef(kind, id)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def refs_of(words: Sequence[str]) -> list[EntityRef]:
    """The entities of `KIND ID...`, or of `KIND/ID...`, as the lists and the logs write them."""
    if "/" in words[0]:
        return [ref_of(kind, id) for kind, _, id in (word.partition("/") for word in words)]
    if len(words) == 1:
        raise click.UsageError(f"which {words[0]}? Give KIND ID, or KIND/ID")
    return [ref_of(words[0], id) for id in words[1:]]


def check_kind(engine: Engine, kind: str) -> None:
    """Refuse a kind that no worker of the app evaluates: most likely a slip of the pen."""
    if kind not in engine.kinds:
        raise click.UsageError(unknown_kind(engine, kind))


def class_of(engine: Engine, kind: str) -> type[Entity]:
    """The entity class of a kind. Refuses a kind whose class another code base has."""
    check_kind(engine, kind)
    cls = engine.kind(kind).entity_class
    if cls is None:
        raise click.UsageError(f"kind {kind!r} is only declared here: ask the app that registers its class")
    return cls


def unknown_kind(engine: Engine, kind: str) -> str:
    """The error text for a kind that is not registered."""
    close = difflib.get_close_matches(kind, engine.kinds, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"no entity class of kind {kind!r} is registered.{hint} Known: {', '.join(engine.kinds) or 'none'}"


def queue_of(engine: Engine, kind: str) -> str | None:
    """Where the messages of a kind go; None if this app does not know."""
    if kind not in engine.kinds:
        return None
    known = engine.kind(kind)
    try:
        routed = engine.app.amqp.router.route(dict(known.options.routing), known.task)
    except QueueNotFound:
        return None
    return getattr(routed.get("queue"), "name", None)


def not_found(ctx: click.Context, engine: Engine, kind: str, what: str) -> None:
    """Say that there is nothing, and why that may be; exit 1."""
    hint = "" if kind in engine.kinds else f" ({unknown_kind(engine, kind)})"
    click.echo(f"{what}{hint}", err=True)
    ctx.exit(NOT_FOUND)
