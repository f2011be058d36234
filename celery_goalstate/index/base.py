"""The dedupe index: which entity is to be evaluated, when, and which worker evaluates it now.

What every index guarantees (numbers as in the docs):

1. An entity has at most one pending evaluation, and at most one wake-up token that may claim it.
2. Of all deadlines asked for, the earliest is in force (`Policy.REPLACE` sets exactly the given one).
3. At most one live lease per entity, whatever the index's clock does; the lease's number rises with every
   evaluation (a fencing token).
4. A deadline noted while the entity is evaluated survives that evaluation, however it ends.
6. After `delete`, nothing of the entity's old life can be claimed, and a running evaluation leaves no trace.
   `delete_all` does so for all of a kind at one moment.

An index knows ids, deadlines, tokens and leases. It knows nothing of entities' behaviour, nor of Celery.
Every transition is atomic per entity, takes many entities, and is safe to repeat: a caller whose
connection broke before the reply arrived may make the same call again.

Invariants, which the tests check after every step:

* a record exists exactly if its entity has exactly one `Status`;
* a token exists exactly while the entity is `SENT`: claim, parking and delete remove it, an
  earlier deadline replaces it; an unchanged one does not, nor a later one that is near: its message comes
  early and is sent again;
* a lease exists exactly while the entity is `RUNNING`.

Times are integers: milliseconds of the index's own clock since the epoch. Durations are milliseconds too.
Tokens and leases are strings of decimal digits that rise (compare them as integers).

Leases are counted, not timed. That clock steps: NTP on its host, a fail-over to another machine. So each
shard has a count, in milliseconds, to which its sweepers add what has passed on their own monotonic clocks,
and a lease ends at a count. (Kubernetes' leader election trusts no clock but the observer's own, too; it
watches each lease, this counts for all of them.) What is added is at most `Limits.margin` at once, and only
if nobody else has added meanwhile; a lease lasts for the margin longer, since it may be renewed in the midst
of that.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

from celery_goalstate.exceptions import IndexUnavailable
from celery_goalstate.index.counters import ActionTime, Metrics

T = TypeVar("T")


def random_id() -> str:
    """A random UUID, as Celery's task ids are."""
    return str(uuid.uuid4())


#: Bytes of UTF-8 that a note may have: it is stored once for each entity that waits.
LONGEST_NOTE = 512

#: Bytes of UTF-8 of a state, a goal state and a step. (With a value of more than 64, Redis makes a hash table
#: of a small hash: of twice the size, and for good.)
LONGEST_WORD = 60
#: Bytes of an error in a record; all of it is in the history.
BYTES_OF_ERROR = 60
#: Bytes of an error in a history, but for the newest one.
BYTES_OF_PAST_ERROR = 120


def cut(text: str, most_bytes: int) -> str:
    """The text, cut to so many bytes of UTF-8, and no half character."""
    return text.encode()[:most_bytes].decode(errors="ignore")


class Status(enum.StrEnum):
    """Where an entity stands in the index."""

    PARKED = "parked"  #: an evaluation is pending; only the index knows
    SENT = "sent"  #: an evaluation is pending; a Celery message is under way
    RUNNING = "running"  #: a worker holds the entity's lease
    IDLE = "idle"  #: evaluated; nothing is pending
    FAILED = "failed"  #: quarantined until it is enqueued


def check_notes(requests: Iterable[Request]) -> None:
    """Raise `ValueError` for a note that is too long."""
    for request in requests:
        if request.note and (size := len(request.note.encode())) > LONGEST_NOTE:
            raise ValueError(
                f"the note {request.note[:40]!r}... has {size} bytes; it may have {LONGEST_NOTE} at most"
            )


class Policy(enum.StrEnum):
    """How a deadline asked for meets what the index already knows."""

    EARLIEST = "earliest"  #: the earlier of the two deadlines; revives a quarantined entity
    REPLACE = "replace"  #: exactly the given deadline, also a later one; revives likewise
    RESYNC = "resync"  #: only an entity that is idle or unknown
    REVIVE = "revive"  #: only an entity that is idle, unknown or quarantined


@dataclass(frozen=True, slots=True)
class Limits:
    """What an index has to know of the settings; milliseconds and counts."""

    eta_horizon: int = 30_000  #: a deadline further away is parked
    lease: int = 30_000  #: how long a lease lives unless it is renewed
    resend_after: int = 60_000  #: how long after its deadline a message may be lost
    window: int = 10_000  #: messages under way per shard
    #: Of a wake-up that arrived early and is sent again: no storm while a clock is off.
    shortest_delay: int = 50
    resend_intervals: int = 8  #: a message is sent again at doubling intervals, up to so many `resend_after`
    history: int = 10  #: failures that are kept of an entity, the newest ones; at least that one
    history_ttl: int = 604_800_000  #: how long they are kept after the newest one
    metrics: bool = True  #: whether anything is counted

    @property
    def margin(self) -> int:
        """The most that a sweeper adds to the count at once, and how much longer a lease is kept (ms)."""
        return max(1, self.lease // 10)


class Request(NamedTuple):
    """One entity to be evaluated: after a delay on the index's clock, or at a point in time."""

    id: str
    delay: int | None = None
    at: int | None = None  #: exactly one of the two is given
    #: Fresh, for the wake-up that this request may lead to; a repeated request has the same.
    task_id: str = ""
    note: str = ""  #: for later wake-ups (see `Wakeup.note`); any text, up to `LONGEST_NOTE`


class Run(NamedTuple):
    """Names one evaluation: an entity and the lease under which it is evaluated."""

    id: str
    lease: str


class Wakeup(NamedTuple):
    """A message to publish, which may claim the entity while the index expects its token."""

    id: str
    token: str
    delay: int  #: until the deadline; 0: now
    task_id: str
    retries: int = 0  #: how many failures this Celery task id has seen; rises along a chain of retries
    resent_at: int | None = None  #: set on a wake-up that is sent once more because it may be lost
    alone: bool = False  #: not to share its message and task with other entities
    #: What the last enqueue that changed the deadline noted, "" if nothing. Empty, too, in the reply to an
    #: enqueue: its caller knows what it noted. Kept until nothing is pending any more; a retry keeps it.
    note: str = ""


class Scheduled(NamedTuple):
    """The reply to a `Request`."""

    changed: bool  #: did it change the schedule?
    deadline: int | None  #: the one in force; None: nothing is pending (resync of a quarantined entity)
    wakeup: Wakeup | None  #: to be published by the caller
    #: To a request with a note: what was pending before had this other note, or ("") none.
    noted: str | None = None


class Claim(NamedTuple):
    """A lease on an entity, and what the evaluation has to know of its past."""

    id: str
    lease: str
    failures: int  #: consecutive failures so far
    rounds: int  #: evaluations in a row, each at once after the other, that have not reached the goal
    deadline: int
    lateness: int  #: how long after the deadline the claim was made; never negative


class Refused(enum.StrEnum):
    """Why a wake-up may not claim its entity; checked in this order."""

    MISSING = "missing"  #: deleted, or never known
    STALE = "stale"  #: superseded, a duplicate, or already claimed
    PAUSED = "paused"  #: the kind is paused; the entity is parked again
    EARLY = "early"  #: a clock is wrong; `Refusal.wakeup` is to be published. None: too early, parked again
    AWAY = "away"  #: the index did not answer for this entity; the wake-up is lost, if it did not claim


class Refusal(NamedTuple):
    """The reply to a wake-up that may not claim."""

    id: str
    reason: Refused
    wakeup: Wakeup | None = None


class Verdict(enum.StrEnum):
    """How an evaluation ended, as far as the index has to know."""

    DONE = "done"  #: no failure: the failure count is reset
    FAILED = "failed"  #: a failure, to be evaluated again after `Report.delay`
    QUARANTINED = "quarantined"  #: a failure that is not to be tried again
    UNSTARTED = "unstarted"  #: given back, never begun or cut off: as if it had not been claimed
    GONE = "gone"  #: the entity does not exist any more: it is forgotten, as by `delete`


class Report(NamedTuple):
    """The end of one evaluation."""

    id: str
    lease: str
    verdict: Verdict
    delay: int | None  #: until the next evaluation; None: none is asked for (never with FAILED)
    failures: int = 0  #: consecutive failures, this one included
    rounds: int = 0
    error: str = ""  #: empty: no error
    state: str = ""  #: in words, of `LONGEST_WORD` at most; as read last
    goal: str = ""  #: likewise
    step: str = ""  #: where it failed, likewise; empty: it did not
    took: int | None = None  #: milliseconds, of that step; None: not known
    converged: bool | None = None  #: None: not known
    task_id: str = ""  #: of this evaluation: a retry keeps it; empty: the retry gets a fresh one
    retries: int = 0  #: of this evaluation; its retry has one more
    fresh_task_id: str = ""  #: for a next evaluation that is no retry
    respect_backoff: bool = False  #: an enqueue from outside cannot come before the back-off
    idle_ttl: int | None = None  #: how long an idle record is kept; None: until it is deleted
    began: bool = False  #: it entered an action, whose late write may undo what another evaluation did
    lateness: int | None = None  #: as in `Claim`; None: not known, or it did not begin
    actions: tuple[ActionTime, ...] = ()  #: those that it executed, in that order
    #: The sweeper's: only if the lease still ends at this count, which has passed (see `Survey.lost`).
    lost_at: int | None = None


class Finish(enum.StrEnum):
    """What became of a `Report`."""

    ACCEPTED = "accepted"
    FENCED = "fenced"  #: the lease is not held (any more): the outcome is dropped


class Finished(NamedTuple):
    """The reply to a `Report`."""

    result: Finish
    deadline: int | None = None  #: the pending evaluation's, if there is one
    wakeup: Wakeup | None = None  #: to be published by the caller, also if the report was `FENCED`


class Failure(NamedTuple):
    """One evaluation that failed."""

    at: int  #: when
    state: str  #: as in `Report`
    step: str
    took: int | None
    error: str  #: whole of the newest one, else cut at `BYTES_OF_PAST_ERROR`
    task_id: str


class Whereabouts(NamedTuple):
    """What an evaluation was doing when its lease was renewed last."""

    seen: int  #: when that was
    where: str  #: as `Index.renew` was told


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that the index knows of one entity. Times as in the module's docstring."""

    id: str
    status: Status
    deadline: int | None = None  #: of the pending evaluation
    token: str = ""  #: expected wake-up
    task_id: str = ""  #: of the wake-up under way, of the run, or of the last run
    lease: str = ""  #: fencing token of the evaluation under way
    nonce: str = ""  #: of the claim that holds the lease
    lease_expires: int | None = None  #: when it may be lost, unless it is renewed: while sweepers count
    failures: int = 0
    rounds: int = 0
    error: str = ""
    failing: int | None = None  #: since when it has an error; None: it has none, or is quarantined
    history: tuple[Failure, ...] = ()  #: newest first; only that one where not all are asked for
    state: str = ""  #: as in `Report`
    goal: str = ""
    step: str = ""
    whereabouts: Whereabouts | None = None  #: of an evaluation whose lease was renewed
    converged: bool | None = None
    finished: int | None = None  #: when the last evaluation ended
    started: int | None = None  #: when the evaluation under way began
    since: int | None = None  #: of a quarantined entity
    expires: int | None = None  #: when an idle record is forgotten; None: never
    floor: int | None = None  #: no enqueue brings the pending evaluation before this
    alone: bool = False  #: its worker was lost with a batch: not to be claimed with others
    note: str = ""  #: as in `Wakeup`
    score: float = field(default=0, compare=False)  #: by which those of a status are ordered; infinity: last


class Listing(enum.StrEnum):
    """What else there are lists of, besides those of each `Status`."""

    FAILING = "failing"  #: what has an error and is not quarantined, by since when
    LONG = "long"  #: evaluations whose lease was renewed, by when they began


class Pause(NamedTuple):
    """Since when a kind is paused, and by whom."""

    since: int
    by: str


class Longest(NamedTuple):
    """The evaluation that has run for longest, among those whose lease was renewed."""

    id: str
    age: int  #: milliseconds


@dataclass(frozen=True, slots=True)
class Overview:
    """What there is to know of a kind, or of a shard, at a glance. Ages are in milliseconds."""

    counts: Mapping[Status, int]
    overdue: int = 0  #: how many are due, with a message under way or without
    oldest: int | None = None  #: how long the longest overdue one is
    failing: int = 0
    failing_for: int | None = None  #: of that which fails for longest
    longest: Longest | None = None
    paused: Pause | None = None
    #: How long ago a sweeper came, if none is at work; -1: never. None: one is at work.
    unswept: int | None = None

    def __add__(self, other: Overview) -> Overview:
        """Of two shards, the worse of each."""
        return Overview(
            {status: count + other.counts[status] for status, count in self.counts.items()},
            self.overdue + other.overdue,
            _worse(self.oldest, other.oldest),
            self.failing + other.failing,
            _worse(self.failing_for, other.failing_for),
            _worse(self.longest, other.longest, key=lambda longest: longest.age),
            self.paused or other.paused,
            _worse(self.unswept, other.unswept),
        )


def _worse(one: T | None, other: T | None, key: Callable[[T], Any] = lambda value: value) -> T | None:
    return max((each for each in (one, other) if each is not None), key=key, default=None)


class Position(NamedTuple):
    """Where an entity stands among those of its status: in order of score, then of the id's bytes."""

    score: float
    id: str


#: Entities that one step through a status takes at most.
LONGEST_PAGE = 1000


def records_after(
    after: Position | None,
    listing: Status | Listing,
    limit: int,
    *,
    page: Callable[[int, Position | None], list[Position]],
    describe: Callable[[list[str]], list[Record | None]],
) -> list[Record]:
    """`Index.records`, from pages of positions.

    Passed over is what has gone elsewhere since its page was read, and a run that was deleted: of these there
    may be more than fit into a page.
    """
    found: list[Record] = []
    size = min(limit, LONGEST_PAGE)
    while len(found) < limit:
        positions = page(size, after)
        for position, record in zip(positions, describe([each.id for each in positions]), strict=True):
            if record is not None and _is_in(record, listing):
                # Where it stood: should it have moved on meanwhile, the next page must not go on from there.
                found.append(replace(record, score=position.score))
        if len(positions) < size:
            break
        after, size = positions[-1], min(2 * size, LONGEST_PAGE)
    return found[:limit]


def _is_in(record: Record, listing: Status | Listing) -> bool:
    if listing is Listing.FAILING:
        return record.failing is not None
    return record.status is (Status.RUNNING if listing is Listing.LONG else listing)


class Server(NamedTuple):
    """What a server that keeps the index says of itself."""

    name: str
    clock: int  #: its time, in milliseconds
    saves: bool | None  #: Does it write its data to a disk? None: it does not tell


class Running(NamedTuple):
    """An evaluation under way, also of an entity that was deleted since."""

    id: str
    lease: str
    failures: int


@dataclass(frozen=True, slots=True)
class Watch:
    """What a sweeper knows of a shard that it has surveyed before."""

    count: int  #: that survey's
    passed: int  #: milliseconds by its own clock since it had the reply
    cursor: str | None = None  #: where the search goes on; "": from the beginning; None: nothing is searched


@dataclass(frozen=True, slots=True)
class DeletedAll:
    """The reply to `delete_all`."""

    count: int  #: how many entities there were to forget
    runs: tuple[Running, ...]  #: evaluations under way, most of them of deleted entities
    away: Mapping[int, IndexUnavailable]  #: the shards that did not answer: something may be left there


@dataclass(frozen=True, slots=True)
class Survey:
    """What one shard of a kind has for its sweeper: ids only, each to be checked again by its transition."""

    kind: str
    shard: int
    due: tuple[str, ...] = ()  #: parked, and within horizon and window
    suspect: tuple[str, ...] = ()  #: sent, and probably lost; where no message tells, the longest overdue
    lost: tuple[tuple[str, int], ...] = ()  #: running past their lease, and the count at which that ended
    expired: tuple[str, ...] = ()  #: idle past their time
    count: int = 0  #: by which leases end
    set_back: bool = False  #: the clock was, so delays of parked entities are put off: search them
    cursor: str | None = None  #: where the search goes on; None: it has ended. Its finds are among the `due`
    newest_arrival: int = 0  #: when the newest message that has arrived at a worker was sent; 0: not known
    error: Exception | None = None  #: why the shard did not answer

    def __bool__(self) -> bool:
        return bool(self.due or self.suspect or self.lost or self.expired)


class Partial:
    """Puts results together of calls to an index of which a part may not answer."""

    def __init__(self) -> None:
        self.away: dict[str, IndexUnavailable] = {}  #: why which shards did not answer

    def known(self, call: Callable[[], T]) -> T | None:
        """What a call returns, or as much of it as is known; None: nothing.

        Raises the `IndexUnavailable` of an index that does not answer as a whole.
        """
        try:
            return call()
        except IndexUnavailable as error:
            if not error.away:
                raise
            self.away |= dict.fromkeys(error.away, error)
            known: T | None = error.known
            return known

    def raise_if_away(self, known: Any) -> None:
        """Raise `IndexUnavailable` with what is known of the result, if something is missing in it."""
        for error in self.away.values():
            why = error.__cause__ or error
            raise IndexUnavailable(
                f"{why}; not known is what is in {', '.join(self.away)}",
                known=known,
                away=self.away,
                away_for=error.away_for,
            ) from why


class Index(Protocol):
    """What every index can do; the module's docstring has the guarantees.

    A call is about one kind and as many entities as you like; replies are in the order of what was given.
    Any method may raise `IndexUnavailable`: then the call may have been made or not, and can be repeated.
    That of `records`, `counts`, `overviews`, `metrics`, `paused` has what is known, if a part has answered.
    Any method raises `ImproperlyConfigured` for a kind that is kept in another layout or number of shards.
    """

    def note(self, kinds: Iterable[str]) -> None:
        """Remember, for `kinds`, that these kinds are kept here, and how. `enqueue` does that by itself."""

    def kinds(self) -> list[str]:
        """All kinds that are kept here, in alphabetical order."""

    def enqueue(
        self,
        kind: str,
        requests: Sequence[Request],
        *,
        policy: Policy = Policy.EARLIEST,
        max_wait: int | None = None,
        inside: Run | None = None,
    ) -> list[Scheduled]:
        """Schedule entities, and reply with the wake-ups that the caller has to publish.

        `max_wait` (ms) is how far a REPLACE may move a deadline, counted from the first pending enqueue.

        `inside` names the evaluation that makes this call. If it enqueues its own entity, that deadline is
        kept apart: a failure of the evaluation drops it (the back-off comes first), it never ends a
        quarantine, and never outlives a delete. If the evaluation has lost its lease, it is a word as its
        report would be (see `finish`).

        A request that changes the deadline also sets the entity's note, or removes it.
        Raises `ValueError` for a note that is longer than `LONGEST_NOTE`.
        """

    def put_back(self, kind: str, wakeups: Sequence[Wakeup]) -> None:
        """Park entities whose wake-ups could not be published. One whose token has changed since stays."""

    def claim(
        self,
        kind: str,
        wakeups: Sequence[tuple[str, str]],
        *,
        nonce: str,
        task_id: str,
        resent_at: int | None = None,
    ) -> list[Claim | Refusal]:
        """Exchange (id, token) pairs for leases.

        A repeated call has the same `nonce`: it gets the same leases, which last from then. `resent_at` is
        the wake-up's own. Where a part of the index does not answer, its entities are refused as `AWAY`;
        `IndexUnavailable` is raised if none does.

        Several pairs are a batch. When a worker is lost with a batch, any of its entities may be to blame:
        each is evaluated again, alone, and none counts a failure. Only a loss alone counts.
        """

    def take(self, kind: str, limit: int, *, nonce: str, task_id: str) -> list[Claim]:
        """Claim, as a batch, up to `limit` entities that are due and parked, without any message.

        Not those with a note, which is for a message to carry, nor those of a part that does not answer.
        """

    def renew(
        self, kind: str, runs: Sequence[Run], *, where: Mapping[Run, str] = MappingProxyType({})
    ) -> list[bool]:
        """Extend leases by their full length; False for each that is not held any more.

        From its first renewal on an evaluation is listed as `LONG`. `where` says what each is doing, for
        people: any text, of some hundred bytes at most.
        """

    def finish(self, kind: str, reports: Sequence[Report]) -> list[Finished]:
        """End evaluations, and reply with the wake-ups that the caller has to publish.

        A report under a lease that is not held any more is `FENCED`: its outcome is dropped. If that
        evaluation had begun an action, one more follows: its late write may have undone what another did. One
        that is pending counts as that one, also after a back-off; an entity that is quarantined, deleted or
        forgotten is not evaluated for it. The same report again, for its reply was lost, gets the same reply.
        """

    def delete(self, kind: str, ids: Sequence[str]) -> list[bool]:
        """Forget entities; False for each that was not known. An evaluation under way leaves no trace."""

    def delete_all(self, kind: str) -> DeletedAll:
        """Forget all entities of a kind, in each shard those that are there at one moment of the call.

        Whatever they do meanwhile, nothing of them is left in the shards that answered; what is enqueued from
        outside after that moment lives. Call it again for those that did not answer.
        """

    def forget_kind(self, kind: str) -> bool:
        """Forget that the kind is kept here, and how, if nothing of it is there: no entity, no pause.

        Whether it is forgotten, with all that was counted. The next `note` or `enqueue` remembers it again.
        """

    def pause(self, kind: str, *, by: str) -> None:
        """Let no evaluation of the kind start; those under way finish. `by` says who does that, for people.

        A kind that is paused already stays paused by who was first.
        """

    def resume(self, kind: str) -> None:
        """Undo `pause`."""

    def paused(self, kind: str) -> Pause | None:
        """Since when the kind is paused, and by whom; None: it is not."""

    def overviews(self, kinds: Iterable[str]) -> Mapping[str, Overview]:
        """What there is to know of each kind at a glance. One round trip per node."""

    def metrics(self, kinds: Iterable[str]) -> Mapping[str, Metrics]:
        """What was counted of each kind since it is kept here, or since its counters were lost.

        Nothing, unless `Limits.metrics`. A report counts once, when it is accepted. One round trip per node.
        """

    def describe(self, kind: str, ids: Sequence[str], *, history: bool = False) -> list[Record | None]:
        """What is known of each entity; None: nothing, or deleted while it is evaluated.

        With the whole history of its failures, or the newest one only.
        """

    def records(
        self, kind: str, listing: Status | Listing, limit: int, after: Position | None = None
    ) -> list[Record]:
        """Up to `limit` entities in this status or list; what is due (expires, has failed) first comes first.

        `after` is where the last one of the page before stood, whether or not it is there any more.
        """

    def counts(self, kind: str) -> Mapping[Status, int]:
        """How many entities are in each status."""

    def holds(self, kinds: Iterable[str], *, sweeper: str) -> Mapping[tuple[str, int], str]:
        """By kind and shard, a text that changes with each survey of another sweeper; empty: there is none.

        A survey takes much longer: who does not hold a shard looks at this. One round trip per node. A shard
        that does not answer is left out.
        """

    def survey(
        self,
        kinds: Iterable[str],
        *,
        sweeper: str,
        hold: int,
        limit: int,
        watched: Mapping[tuple[str, int], Watch] = MappingProxyType({}),
        leave_out: Container[tuple[str, int]] = (),
    ) -> list[Survey]:
        """Become or stay the sweeper of the kinds' shards for `hold` ms, and reply with what there is to do.

        Up to `limit` ids of each sort. A shard that another sweeper holds is left out. One that does not
        answer has an `error`, which is raised only if none answers. One round trip per node.

        `watched`, by kind and shard, is what this sweeper's last surveys left: the time since is counted.
        `leave_out` are shards that are not asked.
        """

    def promote(self, kind: str, requests: Mapping[str, str]) -> list[Wakeup]:
        """Send parked entities whose deadline is near. `requests`: id -> task id; a retry keeps its own."""

    def resend(self, kind: str, requests: Mapping[str, str], *, probe: str | None) -> list[Wakeup]:
        """Send those suspects again whose message is probably lost: same token, given task id.

        It is lost when a message that was sent `resend_after` later has arrived at a worker; each time that
        it is sent again this becomes longer. Where no message tells, the one entity named as `probe` is sent
        as soon as it is overdue: its arrival shows how far its queue is.
        """

    def running(self, kind: str, ids: Sequence[str]) -> list[Running]:
        """The evaluations of these entities that are under way."""

    def forget(self, kind: str, ids: Sequence[str]) -> int:
        """Remove idle records that are past their time; how many."""

    def as_kept(self, kind: str) -> Index | None:
        """The same index, with as many shards as it keeps this kind in; None: it keeps no such kind.

        For maintenance of a kind that is not one's own. The connections are shared.
        """

    def adopt(self, kind: str, records: Sequence[Record]) -> None:
        """Take over entities as another index describes them; none of them may be running.

        What is known here already stays as it is.
        """

    def retire(self, kind: str, records: Sequence[Record]) -> list[bool]:
        """Remove entities that are still as described: same deadline, same last evaluation, not running.

        Whether nothing is left of each. Unlike `delete`, it keeps what was enqueued since.
        """

    def servers(self) -> list[Server]:
        """What is known of the servers that keep it. Raises `IndexUnavailable` if one does not answer."""

    def evicts(self) -> str:
        """The server's policy, if it may drop what the index holds when its memory is full; else empty."""

    def close(self) -> None:
        """Release connections."""
