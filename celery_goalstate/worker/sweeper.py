"""The sweeper: makes good what messages and workers fail to do. One worker at a time sweeps a shard.

* parked entities whose deadline is near get their message;
* overdue messages that are probably lost are sent again;
* evaluations whose worker fell silent are ended as a failure, `WorkerLost`;
* idle records past their time are forgotten;
* entities that are always scheduled (resyncs) are scheduled, whatever became of the index.

It runs none of the user's code, does little at a time, and waits for no broker: a batch that could not be
published is parked again, and the next ones wait for longer and longer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from celery_goalstate.deadlines import milliseconds
from celery_goalstate.display import printable
from celery_goalstate.evaluation import failed
from celery_goalstate.exceptions import IndexUnavailable, WorkerLost
from celery_goalstate.index.base import (
    Finish,
    Index,
    Policy,
    Report,
    Request,
    Run,
    Running,
    Survey,
    Verdict,
    Wakeup,
    random_id,
)
from celery_goalstate.registry import Kind
from celery_goalstate.settings import Settings
from celery_goalstate.worker.parts import Parts
from celery_goalstate.worker.task import report

logger = logging.getLogger(__name__)

#: Entities of each sort that one sweep handles per shard: some 50 ms of publishing.
LIMIT = 100
#: A shard is another sweeper's after so many intervals without a sweep, and at least so many seconds.
HOLD_INTERVALS, HOLD_SECONDS = 5, 1.0
#: An index that falls silent amid a sweep, for so many seconds, ends it: each shard would wait anew.
LONG_WAIT = 1.0
#: The longest that publishing rests after errors of the broker, in seconds.
LONGEST_REST = 30.0
#: The next probe is sent after this part of `resend_after`, then at doubling intervals up to so many of it.
FIRST_PROBE, LAST_PROBE = 0.5, 8.0


@dataclass(slots=True)
class _Probes:
    """When the next probe of a shard may be sent. Times in seconds."""

    interval: float
    next_at: float = 0.0


class Sweeper:
    """Sweeps the kinds of one engine."""

    def __init__(
        self,
        name: str,
        *,
        parts: Parts,
        settings: Settings,
        kinds: Callable[[], Mapping[str, Kind]],
    ) -> None:
        self._name = name
        self._index = parts.index
        self._publisher = parts.publisher
        self._settings = settings
        self._kinds = kinds
        self._clock = parts.clock
        self._random = parts.random
        self._probes: dict[tuple[str, int], _Probes] = {}
        self._rest = 0.0  # how long publishing rests after the last error
        self._rests_until = 0.0
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
        kinds = self._kinds()
        hold = max(HOLD_INTERVALS * self._settings.sweep_interval, HOLD_SECONDS)
        surveys = self._index.survey(kinds, sweeper=self._name, hold=milliseconds(hold), limit=LIMIT)
        problems: dict[str, Exception] = {}
        # A node that is away would let each of these wait.
        away = {survey.kind for survey in surveys if isinstance(survey.error, IndexUnavailable)}
        self._schedule_standing({name: kind for name, kind in kinds.items() if name not in away}, problems)
        more = False
        silence: Exception | None = None
        for survey in surveys:
            where, began = f"{survey.kind} (shard {survey.shard})", self._clock()
            if trouble := survey.error or silence:
                problems[where] = trouble
            elif survey:
                try:
                    more |= self._sweep(kinds[survey.kind], survey)
                except Exception as error:  # noqa: BLE001 - logged by `_report`
                    problems[where] = error
                    if isinstance(error, IndexUnavailable) and self._clock() - began >= LONG_WAIT:
                        silence = error  # the next survey tells whose it is
        self._report(problems)
        return more

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
            if self._reported.get(where) != repr(problems[where]):
                logger.error("the sweep of %s failed; it is tried again", where, exc_info=problems[where])
        if working := [where for where in self._reported if where not in problems]:
            logger.info("the sweeper works again for %s", ", ".join(working))
        self.problems = problems
        reported = {*away, *failed, *self._reported}
        self._reported = {where: repr(error) for where, error in problems.items() if where in reported}

    def _sweep(self, kind: Kind, survey: Survey) -> bool:
        """Whether a full batch was found and some of it was moved: then there is probably more."""
        more = False
        if survey.expired:
            more |= self._index.forget(kind.name, survey.expired) > 0 and len(survey.expired) == LIMIT
        if survey.lost:
            more |= self._end_lost(kind, survey.lost) and len(survey.lost) == LIMIT
        if self._clock() < self._rests_until:
            return False
        if survey.due:
            wakeups = self._index.promote(kind.name, {id: random_id() for id in survey.due})
            if not self._dispatch(kind, wakeups):
                return False
            more |= bool(wakeups) and len(survey.due) == LIMIT
        if survey.suspect:
            wakeups = self._resend(kind, survey)
            if not self._dispatch(kind, wakeups):
                return False
            more |= bool(wakeups) and len(survey.suspect) == LIMIT
        return more

    def _end_lost(self, kind: Kind, ids: Sequence[str]) -> bool:
        """End evaluations whose lease ran out; the index checks again that it did. Whether one was ended."""
        reports = []
        for running in self._index.running(kind.name, ids):
            outcome = failed(WorkerLost(), running.failures, kind.options, random=self._random)
            run = Run(running.id, running.lease)
            # No task id: the lost one may have been revoked, which is how a stuck evaluation is ended.
            reports.append(report(run, outcome, kind, task_id="", retries=0, expired_only=True))
        replies = self._index.finish(kind.name, reports)
        for ended, finished in zip(reports, replies, strict=True):
            if finished.result is Finish.ACCEPTED:
                logger.warning(
                    "%s/%s was being evaluated by a worker that fell silent", kind.name, printable(ended.id)
                )
        self._dispatch(kind, [finished.wakeup for finished in replies if finished.wakeup])
        return any(finished.result is Finish.ACCEPTED for finished in replies)

    def _resend(self, kind: Kind, survey: Survey) -> list[Wakeup]:
        """Send lost messages again; where it is unknown how far a queue is, send one message to find out."""
        now, after = self._clock(), self._settings.resend_after
        probes = self._probes.setdefault((kind.name, survey.shard), _Probes(FIRST_PROBE * after))
        if now > probes.next_at + LAST_PROBE * after:
            probes.interval = FIRST_PROBE * after  # the last one was sent long ago, for something else
        probe = survey.suspect[0] if now >= probes.next_at else None
        wakeups = self._index.resend(kind.name, {id: random_id() for id in survey.suspect}, probe=probe)
        if any(wakeup.id != probe for wakeup in wakeups):
            probes.interval, probes.next_at = FIRST_PROBE * after, now
        elif wakeups:
            probes.next_at = now + probes.interval
            probes.interval = min(2 * probes.interval, LAST_PROBE * after)
        return wakeups

    def _schedule_standing(self, kinds: Mapping[str, Kind], problems: dict[str, Exception]) -> None:
        now = self._clock()
        if now >= self._noted_at:  # again and again, for the index may have lost it
            self._noted_at = now + self._settings.resend_after
            try:
                self._index.note(kinds)
            except Exception as error:  # noqa: BLE001 - logged by `_report`
                problems["the kinds"] = error
                if not isinstance(error, IndexUnavailable):  # which takes its time
                    self._noted_at = now
        for kind in kinds.values():
            if kind.standing and now >= self._standing_at.get(kind.name, 0.0):
                request = Request(kind.standing, delay=0, task_id=random_id())
                try:
                    [scheduled] = self._index.enqueue(kind.name, [request], policy=Policy.REVIVE)
                    if scheduled.wakeup:
                        self._dispatch(kind, [scheduled.wakeup])
                except Exception as error:  # noqa: BLE001 - logged by `_report`
                    problems[f"the resync of {kind.name}"] = error
                else:
                    self._standing_at[kind.name] = now + self._settings.resend_after

    def _dispatch(self, kind: Kind, wakeups: Sequence[Wakeup]) -> bool:
        if not wakeups:
            return True  # the broker was not asked
        if self._clock() < self._rests_until:
            self._index.put_back(kind.name, wakeups)
            return False
        published = self._publisher.dispatch(kind, wakeups, wait=False)
        if published:
            self._rest = 0.0
        else:
            self._rest = min(LONGEST_REST, self._rest * 2 or self._settings.sweep_interval)
            self._rests_until = self._clock() + self._rest
        return published


def end_lost(index: Index, kind: str, runs: Iterable[Running]) -> None:
    """End evaluations whose worker is lost, of a kind that no worker sweeps any more."""
    index.finish(
        kind, [Report(run.id, run.lease, Verdict.FAILED, delay=0, expired_only=True) for run in runs]
    )
