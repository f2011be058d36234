"""Moves a kind from where it was kept (another name, namespace, prefix, server, number of shards) to here.

Producers that still write to the old place are no hindrance: each call moves what is there. Nothing is lost,
wherever it is interrupted, since it goes in this order:

1. adopt: what is not known here gets its past (failures, quarantine, last evaluation) and its deadline;
2. enqueue, for what is known here already: of two deadlines the earliest wins;
3. retire: the old place forgets what has not changed since it was read; what has is moved by the next call;
4. enqueue again: between 1 and 3 an entity may have been enqueued at the old place and evaluated here.

The old kind is paused first, and stays so: an entity is never evaluated in both places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from celery_goalstate.display import LONGEST_NAME, this_user
from celery_goalstate.engine import Engine
from celery_goalstate.exceptions import ImproperlyConfigured, IndexUnavailable, UnknownKind
from celery_goalstate.index import open_index
from celery_goalstate.index.base import Index, Record, Request, Status, random_id
from celery_goalstate.index.url import safe_url
from celery_goalstate.messages import open_publisher
from celery_goalstate.registry import Kind
from celery_goalstate.resync import RESYNC_ID, resync_kind
from celery_goalstate.scheduling import BATCH
from celery_goalstate.settings import Settings
from celery_goalstate.worker.sweeper import Sweeper


@dataclass(frozen=True, slots=True)
class Moved:
    """What `move` did."""

    entities: int  #: how many were moved
    running: int  #: how many stay, since they are being evaluated there; to be moved later


def move(engine: Engine, kind: str, *, old_kind: str, old: Settings) -> Moved:
    """Move the entities of `old_kind`, kept as the settings `old` say, to the registered `kind`.

    Raises `ImproperlyConfigured` if that is the same place, or one that is still in use, and `UnknownKind`
    for a kind that is not there.
    """
    _check(engine, kind, old_kind, old)
    registered = engine.kind(kind)
    with ExitStack() as opened_here:
        try:
            opened = opened_here.enter_context(closing(open_index(old)))
            source = opened.as_kept(old_kind)
        except IndexUnavailable as error:
            raise IndexUnavailable(f"the old index on {safe_url(old.index_url)}: {error}") from error
        if source is None:
            known = ", ".join(opened.kinds()) or "none"
            raise UnknownKind(f"the old index keeps no kind {old_kind!r}; known there: {known}")
        _pause(engine, kind, source, old_kind, old)
        _end_what_is_lost(engine, source, old, dataclasses.replace(registered, name=old_kind))
        source.delete(resync_kind(old_kind), [RESYNC_ID])  # the workers schedule the new kind's
        moved = sum(_move(engine, kind, source, old_kind, status) for status in _MOVABLE)
        return Moved(moved, source.counts(old_kind)[Status.RUNNING])


_MOVABLE = (Status.PARKED, Status.SENT, Status.FAILED, Status.IDLE)


def _keys(settings: Settings, kind: str = "") -> tuple[str, str, str]:
    return settings.key_prefix, settings.namespace, kind


def _check(engine: Engine, kind: str, old_kind: str, old: Settings) -> None:
    if old.index_url != engine.settings.index_url:
        return
    if _keys(old, old_kind) == _keys(engine.settings, kind):
        raise ImproperlyConfigured(
            f"kind {kind!r} is kept there already: say under which name, or where else, it was kept."
            " (Another goalstate_shards needs another goalstate_key_prefix, too.)"
        )
    if _keys(old) == _keys(engine.settings) and old_kind in engine.kinds:
        raise ImproperlyConfigured(
            f"kind {old_kind!r} is still registered with this engine: take it out of the code first"
        )


def _pause(engine: Engine, kind: str, source: Index, old_kind: str, old: Settings) -> None:
    """Pause the old kind. That also shows whether two URLs lead to the same index."""
    index, alike = engine.parts.index, _keys(old, old_kind) == _keys(engine.settings, kind)
    if alike and index.paused(kind):
        raise ImproperlyConfigured(
            f"kind {kind!r} is paused here, so it is unknown whether the old index is another one:"
            f" `goalstate resume {kind}` first"
        )
    source.pause(old_kind, by=f"{this_user()}, moving it"[:LONGEST_NAME])
    if alike and index.paused(kind):
        source.resume(old_kind)
        raise ImproperlyConfigured(f"the old index is the present one, where {kind!r} is kept already")


def _end_what_is_lost(engine: Engine, source: Index, settings: Settings, kind: Kind) -> None:
    """Sweep there once more, since no worker does: runs whose worker was killed end."""
    publisher = open_publisher(engine.app, source, engine.settings)
    parts = dataclasses.replace(engine.parts, index=source, publisher=publisher)
    kinds = {kind.name: kind}
    Sweeper("move", engine=engine, parts=parts, settings=settings, kinds=lambda: kinds).sweep_out()


def _move(engine: Engine, kind: str, source: Index, old_kind: str, status: Status) -> int:
    moved = 0
    while records := source.records(old_kind, status, BATCH):
        engine.parts.index.adopt(kind, records)
        _enqueue(engine, kind, records)
        retired = source.retire(old_kind, records)
        _enqueue(engine, kind, [record for record, gone in zip(records, retired, strict=True) if gone])
        moved += sum(retired)
        if not any(retired):
            break
    return moved


def _enqueue(engine: Engine, kind: str, records: Sequence[Record]) -> None:
    requests = [
        Request(record.id, at=record.deadline, task_id=random_id(), note=record.note)
        for record in records
        if record.deadline is not None
    ]
    scheduled = engine.parts.index.enqueue(kind, requests)
    engine.parts.publisher.dispatch(engine.kind(kind), [each.wakeup for each in scheduled if each.wakeup])
