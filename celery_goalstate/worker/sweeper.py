"""The sweeper: makes good what messages and workers fail to do. One worker at a time sweeps a shard.

* parked entities whose deadline is near get their message;
* overdue messages that are probably lost are sent again;
* evaluations whose worker fell silent are ended as a failure, `WorkerLost`;
* idle records past their time are forgotten;
* entities that are always scheduled (resyncs) are scheduled, whatever became of the index.

It does little at a time, and runs none of the user's code but receivers of signals. First it does for all
kinds what takes no broker; then it publishes, as `_Rests` allows. What could not be published is parked
again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from celery_goalstate.deadlines import milliseconds
from celery_goalstate.display import printable
from celery_goalstate.evaluation import failed
from celery_goalstate.exceptions import IndexUnavailable, WorkerLost
from celery_goalstate.index.base import (
    Finish,
    Index,
    Policy,
    Request,
    Run,
    Status,
    Survey,
    Wakeup,
    Watch,
    random_id,
)
from celery_goalstate.messages.errors import BrokerUnavailable, MessagesRefused, NotPublished
from celery_goalstate.registry import Kind
from celery_goalstate.settings import Settings
from celery_goalstate.worker.parts import Parts
from celery_goalstate.worker.task import report, send_if_quarantined, send_lease_lost

if TYPE_CHECKING:
    from celery_goalstate.engine import Engine

logger = logging.getLogger(__name__)

#: Entities of each sort that one sweep handles per shard: some 50 ms of publishing.
LIMIT = 100
#: A shard is another sweeper's after so many intervals without a sweep, and at least so many seconds.
HOLD_INTERVALS, HOLD_SECONDS = 5, 1.0
#: A rest from publishing after an error is twice as long as the one before. Seconds.
FIRST_REST, LONGEST_REST = 1.0, 30.0
#: After so many time-outs in a row the broker itself is taken to be away.
TIME_OUTS = 3
#: The next probe is sent after this part of `resend_after`, then at doubling intervals up to so many of it.
FIRST_PROBE, LAST_PROBE = 0.5, 8.0


class Sweeper:
    """Sweeps the kinds of one engine."""

    def __init__(
        self,
        name: str,
        *,
        engine: Engine,
        parts: Parts,
        settings: Settings,
        kinds: Callable[[], Mapping[str, Kind]],
    ) -> None:
        self._name = name
        self._engine = engine
        self._index = parts.index
        self._publisher = parts.publisher
        self._settings = settings
        self._kinds = kinds
        self._clock = parts.clock
        self._random = parts.random
        self._probes: dict[tuple[str, int], _Probes] = {}
        self._watched: dict[tuple[str, int], _Watched] = {}
        self._holds = _Holds(name, parts.index, settings.shards, parts.clock)
        self._rests = _Rests(parts.clock, parts.random)
        self._standing_at: dict[str, float] = {}  # per kind
        self._noted_at = 0.0
        self.problems: Mapping[str, Exception] = {}  #: where and why the last sweep failed
        self._reported: dict[str, str] = {}  # those that are in the log

    def prepare(self) -> None:
        """Tell the index of the kinds. Raises `ImproperlyConfigured` if it keeps one otherwise."""
        kinds = self._kinds()
        if not kinds:
            logger.warning(
                "this worker knows no kind, so it evaluates nothing and sweeps nothing: let it import the"
                " modules that register entity classes, as those of tasks: Celery(include=[...]), say, or,"
                " with Django, 'celery_goalstate.contrib.django' in INSTALLED_APPS"
            )
        self._index.note(kinds)

    def sweep(self) -> bool:
        """Sweep once; whether there is more to do at once. Raises `IndexUnavailable` if no shard answers.

        What fails for a kind or a shard delays no other: it is logged, and is in `problems` until
        it works again.
        """
        problems = _Problems(self._clock, self._settings.sweep_timeout)
        works, more = self._end_all(problems)
        # A node that is away would let each of these wait.
        self._schedule_standing([work for work in works if not work.is_away], problems)
        more |= self._publish(works, problems)
        self._report(problems.found)
        return more

    def sweep_out(self, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """End what is lost of kinds that no worker sweeps, until nothing runs there but what is alive.

        A lease is only as old as sweepers have counted, so this may take as long as one, and a fifth.
        Nothing is published. Raises what `sweep` would log.
        """
        ends = self._clock() + 1.2 * self._settings.lease
        while True:
            problems, more = _Problems(self._clock, self._settings.sweep_timeout), True
            while more:
                works, more = self._end_all(problems)
                if problems.found:
                    raise next(iter(problems.found.values()))
                for work in works:
                    self._index.put_back(work.kind.name, work.wakeups)
            running = sum(self._index.counts(kind)[Status.RUNNING] for kind in self._kinds())
            if not running or self._clock() >= ends:
                return
            sleep(self._settings.sweep_every)

    def check_server(self) -> None:
        """Warn of a server that may lose what the index holds."""
        if policy := self._index.evicts():
            logger.warning(
                "the index's Redis has the maxmemory-policy %s: when its memory is full it silently drops"
                " what is scheduled; set it to noeviction",
                policy,
            )

    def _report(self, problems: Mapping[str, Exception]) -> None:
        """Log each problem once, however often it is met, and once when it is over."""
        # A shard that is away must be so twice: much passes at once, and of an index that is away as a whole
        # the next survey tells.
        away = [
            where
            for where, error in problems.items()
            if isinstance(error, IndexUnavailable) and where in self.problems
        ]
        if not self._reported.keys() >= set(away):
            logger.warning("the sweeper waits for the index of %s: %s", ", ".join(away), problems[away[0]])
        failed = [where for where, error in problems.items() if not isinstance(error, IndexUnavailable)]
        for where in failed:
            error = problems[where]
            if isinstance(error, NotPublished):  # whatever the words: they may name what is sent
                if where not in self._reported:
                    _report_not_published(where, error)
            elif self._reported.get(where) != repr(error):
                logger.error("the sweep of %s failed; it is tried again", where, exc_info=error)
        if working := [where for where in self._reported if where not in problems]:
            logger.info("the sweeper works again for %s", ", ".join(working))
        self.problems = problems
        reported = {*away, *failed, *self._reported}
        self._reported = {where: repr(error) for where, error in problems.items() if where in reported}

    # What takes no broker ----------------------------------------------------------------------

    def _end_all(self, problems: _Problems) -> tuple[Sequence[_Work], bool]:
        """What there is to do, and whether there is probably more of what was ended and forgotten."""
        works = {name: _Work(kind) for name, kind in self._kinds().items()}
        more = False
        for survey in self._survey(works):
            work = works[survey.kind]
            if survey.error is not None:
                problems.found[_where(survey)] = survey.error
                work.is_away |= isinstance(survey.error, IndexUnavailable)
            elif survey:
                work.surveys.append(survey)
                more |= problems.attempt(_where(survey), partial(self._end, work, survey))
        return list(works.values()), more

    def _survey(self, kinds: Iterable[str]) -> list[Survey]:
        """Leases grow older by the time that has passed since the last survey, by no other clock."""
        kinds, hold = list(kinds), max(HOLD_INTERVALS * self._settings.sweep_every, HOLD_SECONDS)
        held = self._holds.of_others(kinds, hold)
        began = self._clock()
        surveys = self._index.survey(
            kinds,
            sweeper=self._name,
            hold=milliseconds(hold),
            limit=LIMIT,
            watched={shard: last.watch(began) for shard, last in self._watched.items()},
            leave_out=held,
        )
        self._holds.mine = {(survey.kind, survey.shard) for survey in surveys if survey.error is None}
        now = self._clock()
        for survey in surveys:
            if survey.error is None:
                last = self._watched.setdefault((survey.kind, survey.shard), _Watched())
                last.note(survey, now, search_again=now + self._settings.resend_after)
        return surveys

    def _end(self, work: _Work, survey: Survey) -> bool:
        """Whether a full batch was found and some of it was ended: then there is probably more."""
        kind, more = work.kind, False
        if survey.expired:
            more |= self._index.forget(kind.name, survey.expired) > 0 and len(survey.expired) == LIMIT
        if survey.lost:
            more |= self._end_lost(work, dict(survey.lost)) and len(survey.lost) == LIMIT
        return more

    def _end_lost(self, work: _Work, ends: Mapping[str, int]) -> bool:
        """End evaluations whose lease ran out, unless it was renewed since. Whether one was ended."""
        kind, reports = work.kind, []
        for running in self._index.running(kind.name, list(ends)):
            outcome = failed(WorkerLost(), running.failures, kind.options, random=self._random)
            run = Run(running.id, running.lease)
            # No task id: the lost one may have been revoked, which is how a stuck evaluation is ended.
            reports.append(report(run, outcome, kind, task_id="", retries=0, lost_at=ends[run.id]))
        replies = self._index.finish(kind.name, reports)
        for ended, finished in zip(reports, replies, strict=True):
            if finished.result is Finish.ACCEPTED:
                logger.warning(
                    "%s/%s was being evaluated by a worker that fell silent", kind.name, printable(ended.id)
                )
                send_lease_lost(self._engine, self._index, kind.name, ended)
                send_if_quarantined(self._engine, self._index, kind.name, ended, finished)
        work.wakeups += [finished.wakeup for finished in replies if finished.wakeup]
        return any(finished.result is Finish.ACCEPTED for finished in replies)

    def _schedule_standing(self, works: Sequence[_Work], problems: _Problems) -> None:
        now = self._clock()
        if now >= self._noted_at:  # again and again, for the index may have lost it
            self._noted_at = now + self._settings.resend_after
            problems.attempt("the kinds", partial(self._note, works))
            error = problems.found.get("the kinds")
            if error and not isinstance(error, IndexUnavailable):  # which takes its time
                self._noted_at = now
        for work in works:
            name, standing = work.kind.name, work.kind.standing
            if standing and now >= self._standing_at.get(name, 0.0):
                where, schedule = f"the resync of {name}", partial(self._schedule, work, standing)
                if problems.attempt(where, schedule):
                    self._standing_at[name] = now + self._settings.resend_after

    def _note(self, works: Iterable[_Work]) -> bool:
        self._index.note([work.kind.name for work in works])
        return True

    def _schedule(self, work: _Work, id: str) -> bool:
        request = Request(id, delay=0, task_id=random_id())
        [scheduled] = self._index.enqueue(work.kind.name, [request], policy=Policy.REVIVE)
        if scheduled.wakeup:
            work.wakeups.append(scheduled.wakeup)
        return True

    # Publishing --------------------------------------------------------------------------------

    def _publish(self, works: Iterable[_Work], problems: _Problems) -> bool:
        """Whether there is probably more of what was published."""
        self._rests.begin_sweep()
        more = False
        for work in sorted(works, key=lambda work: self._rests.turn(work.kind.name)):
            kind, messages = work.kind, f"the messages of {work.kind.name}"
            if not work.is_to_publish and not work.is_away:
                self._rests.end(kind.name)
            if work.wakeups:
                send, asks_index = partial(self._send, kind, work.wakeups), not self._rests.allow(kind.name)
                problems.attempt(messages, send, asks_index=asks_index)
            for survey in work.surveys:
                if survey.due or survey.suspect:
                    more |= problems.attempt(_where(survey), partial(self._send_found, kind, survey))
            if error := self._rests.error(kind.name):
                of_broker = isinstance(error, BrokerUnavailable)
                problems.found["the broker" if of_broker else messages] = error
        return more

    def _send_found(self, kind: Kind, survey: Survey) -> bool:
        """Whether a full batch was found and some of it was sent: then there is probably more."""
        more = False
        if survey.due and self._rests.allow(kind.name):
            wakeups = self._index.promote(kind.name, {id: random_id() for id in survey.due})
            more |= self._send(kind, wakeups) and len(survey.due) >= LIMIT
            more |= survey.cursor is not None
        if survey.suspect and self._rests.allow(kind.name):
            more |= self._send(kind, self._resend(kind, survey)) and len(survey.suspect) == LIMIT
        return more

    def _send(self, kind: Kind, wakeups: Sequence[Wakeup]) -> bool:
        """Whether there was something, and all of it was published. If not, it is parked."""
        if not wakeups:
            return False  # the broker was not asked
        if not self._rests.allow(kind.name):
            self._index.put_back(kind.name, wakeups)
            return False
        try:
            self._publisher.publish_at_once(kind, wakeups)
        except NotPublished as error:
            self._rests.failed(kind.name, error)
            return False
        self._rests.succeeded(kind.name)
        return True

    def _resend(self, kind: Kind, survey: Survey) -> list[Wakeup]:
        """Send lost messages again; where it is unknown how far a queue is, send one message to find out."""
        first, last = (part * self._settings.resend_after for part in (FIRST_PROBE, LAST_PROBE))
        now = self._clock()
        probes = self._probes.get((kind.name, survey.shard))
        if probes is None or probes.has_arrived(survey.newest_arrival) or now > probes.next_at + last:
            # None is under way, or one that was sent long ago, for something else.
            probes = self._probes[kind.name, survey.shard] = _Probes(first)
        probe = survey.suspect[0] if now >= probes.next_at else None
        wakeups = self._index.resend(kind.name, {id: random_id() for id in survey.suspect}, probe=probe)
        for wakeup in wakeups:
            if wakeup.id == probe and wakeup.resent_at is not None:
                probes.sent_at, probes.next_at = wakeup.resent_at, now + probes.interval
                probes.interval = min(2 * probes.interval, last)
        return wakeups


class _Holds:
    """Which shards other sweepers hold: those that were surveyed anew within the time of a hold.

    To look at that costs the index a fraction of a survey, which matters with many kinds and workers.
    """

    def __init__(self, name: str, index: Index, shards: int, clock: Callable[[], float]) -> None:
        self._name = name
        self.mine: set[tuple[str, int]] = set()  #: the shards that this sweeper holds
        self._index = index
        self._shards = shards
        self._clock = clock
        self._seen: dict[tuple[str, int], tuple[str, float]] = {}  # what was last seen, and since when

    def of_others(self, kinds: Iterable[str], hold: float) -> set[tuple[str, int]]:
        """The shards that need no survey. `hold` is in seconds."""
        asked = [kind for kind in kinds if any((kind, n) not in self.mine for n in range(self._shards))]
        if not asked:
            return set()
        held, found = set(), self._index.holds(asked, sweeper=self._name)
        now = self._clock()
        for shard, sign in found.items():
            last, since = self._seen.get(shard, ("", now))
            if sign != last:
                since = now
            self._seen[shard] = sign, since
            if sign and shard not in self.mine and now - since < hold:
                held.add(shard)
        return held


@dataclass(slots=True)
class _Watched:
    """What the last survey of a shard left. Times in seconds."""

    count: int = -1
    at: float = 0.0  #: when the reply was there
    cursor: str | None = None  #: where the search for what a clock that was set back has put off goes on
    search_at: float = 0.0  #: when the next search begins

    def watch(self, now: float) -> Watch:
        cursor = "" if self.cursor is None and now >= self.search_at else self.cursor
        return Watch(self.count, milliseconds(now - self.at), cursor)

    def note(self, survey: Survey, now: float, *, search_again: float) -> None:
        self.count, self.at, self.cursor = survey.count, now, survey.cursor
        if survey.set_back and survey.cursor is None:
            self.search_at = search_again


@dataclass(slots=True)
class _Work:
    """What one sweep found of one kind."""

    kind: Kind
    surveys: list[Survey] = field(default_factory=list)
    wakeups: list[Wakeup] = field(default_factory=list)  #: from the index already, to be published
    is_away: bool = False  #: Was a shard of it out of reach?

    @property
    def is_to_publish(self) -> bool:
        return bool(self.wakeups) or any(survey.due or survey.suspect for survey in self.surveys)


class _Problems:
    """What fails in one sweep, and where. It delays nothing else, unless the index falls silent.

    Silent is an index that was waited for until `timeout` was over, in seconds: each shard would wait anew.
    """

    def __init__(self, clock: Callable[[], float], timeout: float) -> None:
        self.found: dict[str, Exception] = {}
        self._clock = clock
        self._timeout = timeout
        self._silence: IndexUnavailable | None = None

    def attempt(self, where: str, work: Callable[[], bool], *, asks_index: bool = True) -> bool:
        """What `work` returns; False if it fails."""
        if asks_index and self._silence is not None:  # the next survey tells whose it is
            self.found[where] = self._silence
            return False
        began = self._clock()
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - logged by `_report`
            self.found[where] = error
            if isinstance(error, IndexUnavailable) and self._clock() - began >= self._timeout:
                self._silence = error
            return False


@dataclass(slots=True)
class _Rest:
    """Times in seconds."""

    since: float = 0.0
    length: float = 0.0
    error: NotPublished | None = None  #: why

    @property
    def until(self) -> float:
        return self.since + self.length

    def grow(self, now: float) -> None:
        self.since, self.length = now, min(LONGEST_REST, 2 * self.length or FIRST_REST)


class _Rests:
    """Who may publish, if not all that was published before has passed.

    * A kind whose messages are refused, or time out, rests for longer and longer, until they pass.
    * A time-out may be the broker's own. It ends a sweep's publishing, and the third in a row, while nothing
      passes, lets all kinds rest, for longer and longer, until something passes.
    * Whoever failed comes after all others, the longest ago first. Those others come in random order, or the
      first three could all be such that time out.
    """

    def __init__(self, clock: Callable[[], float], random: Callable[[], float]) -> None:
        self._clock, self._random = clock, random
        self._of_kinds: dict[str, _Rest] = {}
        self._of_all = _Rest()
        self._time_outs = 0  # in a row
        self._ended = False  # is this sweep's publishing over?

    def begin_sweep(self) -> None:
        self._ended = False

    def turn(self, kind: str) -> tuple[bool, float]:
        """The lower, the earlier it tries."""
        rest = self._of_kinds.get(kind)
        return (True, rest.since) if rest else (False, self._random())

    def allow(self, kind: str) -> bool:
        """Whether this kind may publish now."""
        rest, now = self._of_kinds.get(kind), self._clock()
        return not self._ended and now >= self._of_all.until and (rest is None or now >= rest.until)

    def error(self, kind: str) -> NotPublished | None:
        """Why the kind could not publish when it last tried; None: it could."""
        rest = self._of_kinds.get(kind)
        return rest.error if rest else None

    def end(self, kind: str) -> None:
        """The kind has nothing more to publish: when it has again, it tries at once."""
        self._of_kinds.pop(kind, None)

    def succeeded(self, kind: str) -> None:
        self._of_kinds.pop(kind, None)
        self._of_all, self._time_outs = _Rest(), 0

    def failed(self, kind: str, error: NotPublished) -> None:
        rest = self._of_kinds.setdefault(kind, _Rest())
        rest.error = error
        rest.grow(self._clock())
        if isinstance(error, BrokerUnavailable):
            self._timed_out()

    def _timed_out(self) -> None:
        self._ended = True
        self._time_outs += 1
        if self._time_outs >= TIME_OUTS:
            self._of_all.grow(self._clock())


@dataclass(slots=True)
class _Probes:
    """When the next probe of a shard may be sent: when the last one has arrived, or after an interval.

    Seconds, but for `sent_at`.
    """

    interval: float
    next_at: float = 0.0
    sent_at: float = math.inf  #: the last one; in milliseconds of the index's clock

    def has_arrived(self, newest_arrival: int) -> bool:
        """The last one, or what was sent after it. `newest_arrival` as in `Survey`."""
        return newest_arrival >= self.sent_at


def _where(survey: Survey) -> str:
    return f"{survey.kind} (shard {survey.shard})"


def _report_not_published(where: str, error: NotPublished) -> None:
    if isinstance(error, MessagesRefused):
        logger.error(
            "%s cannot be published: what is due of this kind waits, and nothing else does. Mend the"
            " configuration of the app or of the broker (task_routes, task_queues, a queue's arguments): %s",
            where, error.reason, exc_info=error.__cause__,
        )  # fmt: skip
    else:
        logger.warning("the sweeper waits for the broker: %s", error.reason)
