"""What there is, for people and programs: what fails, is late or hangs, and whether anybody is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial as call_of

from celery_goalstate.description import (
    Description,
    Listing,
    Status,
    datetime_of,
    description_of,
    index_listings,
    position_of,
    public_counts,
)
from celery_goalstate.index.base import Index, Partial, Position
from celery_goalstate.index.base import Overview as IndexOverview


@dataclass(frozen=True, slots=True)
class Paused:
    """Since when a kind is paused (UTC), and by whom."""

    since: datetime
    by: str


@dataclass(frozen=True, slots=True)
class Overview:
    """A kind at a glance. Ages are in seconds, by the index's clock."""

    kind: str
    counts: Mapping[Status, int]
    overdue: int  #: how many of the scheduled ones are due
    oldest_overdue: float | None  #: for how long the one that has been due for longest is
    failing: int  #: how many have failed and are tried again
    longest_failing: float | None  #: for how long the one that fails for longest does
    longest_running: float | None  #: None: no evaluation lasts for longer than a third of a lease
    longest_running_id: str | None  #: whose that is
    paused: Paused | None
    sweeper: bool  #: Does a worker sweep the kind? If not, what is parked or lost waits
    unswept: float | None  #: if not: since the last one did; None: none ever did


def overviews(index: Index, kinds: Iterable[str]) -> dict[str, Overview]:
    """Each kind at a glance. Raises `IndexUnavailable` with what is known, as all here does."""
    partial = Partial()
    found = partial.known(call_of(index.overviews, list(kinds))) or {}
    seen = {kind: _overview(kind, overview) for kind, overview in found.items()}
    partial.raise_if_away(seen)
    return seen


def _overview(kind: str, found: IndexOverview) -> Overview:
    paused = found.paused and Paused(_moment(found.paused.since), found.paused.by)
    return Overview(
        kind,
        public_counts(found.counts),
        overdue=found.overdue,
        oldest_overdue=_seconds(found.oldest),
        failing=found.failing,
        longest_failing=_seconds(found.failing_for),
        longest_running=_seconds(found.longest and found.longest.age),
        longest_running_id=found.longest and found.longest.id,
        paused=paused,
        sweeper=found.unswept is None,
        unswept=None if found.unswept == NEVER else _seconds(found.unswept),
    )


#: In order of bytes, no id that people use comes after it.
LAST_ID = "\U0010ffff"

#: In place of an age: no sweeper has ever come.
NEVER = -1


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _moment(milliseconds: int) -> datetime:
    moment = datetime_of(milliseconds)
    assert moment is not None  # noqa: S101 - for mypy
    return moment


def counts(kinds: Mapping[str, Index | None]) -> dict[str, dict[Status, int]]:
    """How many entities of each kind are in each status. `kinds`: on which index; None: it is nowhere."""
    partial = Partial()
    found = {name: partial.known(call_of(on.counts, name)) if on else {} for name, on in kinds.items()}
    known = {name: public_counts(each) for name, each in found.items() if each is not None}
    partial.raise_if_away(known)
    return known


def page(
    index: Index, kind: str, listings: list[Status | Listing], limit: int, after: str | None, now: datetime
) -> list[Description]:
    """Up to `limit` entities of these lists, one after the other; `after` is the cursor of one in them."""
    position = None
    if after is not None:
        its_listing, its_kind, position = position_of(after)
        if its_kind != kind or its_listing not in listings:
            lists = ", ".join(listings)
            raise ValueError(f"after is {after!r}, which is on no page of {lists} of {kind!r}")
        listings = listings[listings.index(its_listing) :]
    found: list[Description] = []
    partial = Partial()
    for listing in listings:
        if len(found) < limit:
            found += _listed(index, kind, listing, limit - len(found), position, partial, now)
        position = None
    partial.raise_if_away(found)
    return found


def _listed(
    index: Index,
    kind: str,
    listing: Status | Listing,
    limit: int,
    after: Position | None,
    partial: Partial,
    now: datetime,
) -> list[Description]:
    if listing is Listing.NEXT and after is None:
        after = Position(now.timestamp() * 1000, LAST_ID)
    records = [
        record
        for each in index_listings(listing)
        for record in partial.known(call_of(index.records, kind, each, limit, after)) or ()
    ]
    records.sort(key=lambda record: (record.score, record.id.encode()))  # parked and sent
    found = [description_of(kind, record, listing) for record in records[:limit]]
    if listing is Listing.OVERDUE:
        return [each for each in found if each.deadline is not None and each.deadline <= now]
    return found
