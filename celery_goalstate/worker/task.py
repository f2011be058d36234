"""The Celery task of one kind: claim -> evaluate -> finish -> publish what follows.

wake-up ──► claim ──► refused: superseded, deleted, paused, early: nothing to do
              │
            lease ──► evaluate ──► finish ──► fenced: another look is under way, the outcome is dropped
                                      │
                                   accepted ──► next wake-up, if there is one
                                      │
                            done: SUCCESS with a line · failed: RETRY · quarantined: FAILURE
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery, Task
from celery.app.task import Context as TaskRequest
from celery.exceptions import Reject, Retry, TaskPredicate
from celery.signals import task_postrun
from celery.utils.serialization import get_pickleable_exception

from celery_goalstate.actions import Scheduler
from celery_goalstate.deadlines import milliseconds
from celery_goalstate.display import printable
from celery_goalstate.entity import EntityRef
from celery_goalstate.evaluation import Evaluation, Outcome, error_text, evaluate
from celery_goalstate.exceptions import GoalStateError, IndexUnavailable
from celery_goalstate.index.base import (
    Claim,
    Finish,
    Finished,
    Index,
    Refusal,
    Refused,
    Report,
    Run,
    Verdict,
    Wakeup,
    random_id,
)
from celery_goalstate.messages.envelope import strategy
from celery_goalstate.messages.wakeup import read_message
from celery_goalstate.registry import Kind
from celery_goalstate.worker.batch import NOTHING_TO_DO, SLICE, Batch, Tally, ending
from celery_goalstate.worker.lease import Lease
from celery_goalstate.worker.parts import Parts

logger = logging.getLogger(__name__)

#: Seconds between two attempts to reach an index that did not answer ...
TRY_AGAIN_AFTER = 0.2
#: ... and how many a claim makes. A wake-up that is given up is found and sent again by the sweeper.
CLAIM_ATTEMPTS = 10

#: How long a task with batches takes more entities, in seconds: other tasks want their turn.
TAKE_FOR = 1.0

#: Errors of an entity that Celery would take for its own: as a word about this task, or (any MemoryError) as
#: the end of the whole worker.
TO_CELERY = (TaskPredicate, MemoryError)

REFUSALS = {
    Refused.MISSING: "nothing to do: the index does not know the entity (deleted?)",
    Refused.STALE: "nothing to do: superseded by another wake-up",
    Refused.PAUSED: "nothing to do: the kind is paused",
    Refused.EARLY: "nothing to do yet: sent again",
}


@dataclass(slots=True)
class Speaker:
    """The evaluation under way in this thread or greenlet."""

    index: Index  #: tells engines apart: each may have a kind of this name
    kind: str
    run: Run
    ended: bool = False  #: work that an action leaves behind, in a copy of its context, speaks from outside
    until: str = ""  #: the Celery task that failed with it: handlers of that failure still speak for it


#: Who speaks when an entity is enqueued: an evaluation, or (None) somebody from outside.
speaker: ContextVar[Speaker | None] = ContextVar("goalstate_speaker", default=None)


class Evaluator:
    """What a worker does with the wake-ups of one kind."""

    def __init__(self, kind: Kind, *, engine: Scheduler, parts: Parts) -> None:
        assert kind.entity_class is not None  # noqa: S101 - only those of this process are evaluated
        self._kind = kind
        self._entity_class = kind.entity_class
        self._engine = engine
        self._index = parts.index
        self._publisher = parts.publisher
        self._keeper = parts.keeper

    def handle(self, task: Task[Any, Any], args: Any, kwargs: Any) -> str:
        """Evaluate the entity of one message; the line that Flower shows.

        Raises what tells Celery how the evaluation ended: `Retry` or the error that quarantined the entity.
        """
        try:
            pairs, resent_at = read_message(args, kwargs)
        except ValueError as error:
            logger.error("%s rejected a malformed message: %s", task.name, error)  # noqa: TRY400 - no traceback
            raise Reject(str(error), requeue=False) from error

        request = task.request  # searches a stack
        claims, claimed_at = self._claim(pairs, str(request.id), resent_at)
        self._dispatch([claim.wakeup for claim in claims if isinstance(claim, Refusal) and claim.wakeup])
        if len(claims) == 1:
            line = self._evaluate_one(request, claims[0], claimed_at)
        else:
            held = [claim for claim in claims if isinstance(claim, Claim)]
            tally = self._evaluate_batch(request, held, claimed_at)
            if refused := len(claims) - len(held):
                tally[NOTHING_TO_DO] += refused
            line = str(tally)
        return self._take_more(request, line) if self._kind.options.batch_size > 1 else line

    # -- one entity

    def _evaluate_one(self, request: TaskRequest, claim: Claim | Refusal, claimed_at: float) -> str:
        if isinstance(claim, Refusal):
            return REFUSALS[claim.reason]
        run = Run(claim.id, claim.lease)
        with self._keep(run, claimed_at) as lease:
            outcome = self._evaluate(request, claim, lease)
            task_id, retries = str(request.id), request.retries or 0
            told = report(run, outcome, self._kind, task_id=task_id, retries=retries)
            [finished] = self._finish([told], held=lambda: self._keeper.held(lease))

        if finished.wakeup:
            self._dispatch([finished.wakeup])
        if outcome.error is not None:
            speaker.set(Speaker(self._index, self._kind.name, run, until=task_id))
        return self._tell(f"{self._kind.name}/{printable(claim.id)}", outcome, finished)

    # -- several

    def _evaluate_batch(self, request: TaskRequest, claims: list[Claim], claimed_at: float) -> Tally:
        """Evaluate entities one after the other, and report them together."""
        clock = self._keeper.clock
        ends = claimed_at + min(SLICE, self._keeper.length / 3)
        batch = Batch(claims, ends=ends, clock=clock, give_back=self._give_back)
        settled: list[Report] = []
        expires = claimed_at + self._keeper.length

        telling = threading.Lock()

        def settle() -> None:
            reports = batch.settle()
            self._settle(reports, held=lambda: clock() < expires)
            settled.extend(reports)  # not counted yet: the alarm's thread may be here at the same time

        def settle_early() -> None:
            with telling:
                try:
                    settle()
                except IndexUnavailable as error:  # a thread has nobody to tell
                    logger.warning(
                        "outcomes of kind %s are lost, its entities are looked at again: %s",
                        self._kind.name,
                        error,
                    )

        try:
            with self._keeper.alarm(ends, settle_early):
                while (claim := batch.next()) is not None:
                    run = Run(claim.id, claim.lease)
                    with self._keep(run, claimed_at) as lease:
                        outcome = self._evaluate(request, claim, lease)
                    expires = max(expires, lease.expires)  # a slow one's was renewed
                    self._log(claim.id, outcome)
                    batch.end(report(run, outcome, self._kind, task_id="", retries=0))
        finally:
            try:
                settle()
            finally:
                with telling:  # the alarm's thread may be in the midst of its reports
                    pass
        return Tally(map(ending, settled))

    def _settle(self, reports: list[Report], held: Callable[[], bool]) -> None:
        wakeups = []
        for told, finished in zip(reports, self._finish(reports, held), strict=True):
            if finished.result is Finish.FENCED:
                logger.warning(
                    "%s/%s: dropped, since its lease was lost", self._kind.name, printable(told.id)
                )
            elif finished.wakeup:
                wakeups.append(finished.wakeup)
        self._dispatch(wakeups)

    @staticmethod
    def _give_back(claim: Claim) -> Report:
        return Report(claim.id, claim.lease, Verdict.UNSTARTED, delay=None, fresh_task_id=random_id())

    def _take_more(self, request: TaskRequest, line: str) -> str:
        """Under load, evaluate what is due and parked instead of waiting for its messages."""
        clock, taken = self._keeper.clock, Tally()
        ends = clock() + TAKE_FOR
        while clock() < ends and not request.is_eager:
            claimed_at = clock()
            try:
                claims = self._index.take(
                    self._kind.name,
                    self._kind.options.batch_size,
                    nonce=random_id(),
                    task_id=str(request.id),
                )
            except IndexUnavailable:
                break  # what this message was about is done
            if not claims:
                break
            taken.update(self._evaluate_batch(request, claims, claimed_at))
        return f"{line}; taken as well, {taken}" if taken else line

    # -- what both do

    def _claim(
        self, pairs: list[tuple[str, str]], task_id: str, resent_at: int | None
    ) -> tuple[list[Claim | Refusal], float]:
        """The index's replies, and a time by this process's clock from which their leases last at least."""
        nonce = random_id()  # tells this claim, said again, from a second message of the same task id
        for attempt in range(1, CLAIM_ATTEMPTS + 1):
            claimed_at = self._keeper.clock()
            try:
                claims = self._index.claim(
                    self._kind.name, pairs, nonce=nonce, task_id=task_id, resent_at=resent_at
                )
                return claims, claimed_at
            except IndexUnavailable:
                if attempt == CLAIM_ATTEMPTS:
                    raise
                time.sleep(TRY_AGAIN_AFTER)  # this evaluation has nothing else to do
        raise AssertionError("unreachable")

    def _keep(self, run: Run, claimed_at: float) -> AbstractContextManager[Lease]:
        max_run = self._kind.options.max_run
        return self._keeper.keep(self._kind.name, run, claimed_at=claimed_at, max_run=max_run)

    def _evaluate(self, request: TaskRequest, claim: Claim, lease: Lease) -> Outcome:
        evaluation = Evaluation(
            ref=EntityRef(self._kind.name, claim.id),
            load=self._entity_class.from_id,
            failures=claim.failures,
            looks=claim.looks,
            deadline=datetime.fromtimestamp(claim.deadline / 1000, UTC),
            lateness=claim.lateness / 1000,
            fencing_token=int(claim.lease),
            held=lambda: self._keeper.held(lease),
            engine=self._engine,
            task=request,
        )
        who = Speaker(self._index, self._kind.name, lease.run)
        before = speaker.set(who)
        try:
            return evaluate(evaluation, self._kind.options, retry_after=_celery_retry_after)
        finally:
            who.ended = True
            speaker.reset(before)

    def _finish(self, reports: list[Report], held: Callable[[], bool]) -> list[Finished]:
        """Tell the index, again and again while the lease lasts: the actions have been executed."""
        while True:
            try:
                try:
                    return self._index.finish(self._kind.name, reports)
                except IndexUnavailable:
                    if not held():
                        raise
                    time.sleep(TRY_AGAIN_AFTER)  # this evaluation has nothing else to do
            except SoftTimeLimitExceeded:
                pass  # it struck after the actions; a report is safe to repeat

    def _log(self, id: str, outcome: Outcome) -> None:
        """Celery's own lines name the task only, and a retry's shows no traceback."""
        level = logging.INFO
        if outcome.error is not None:
            level = logging.ERROR if outcome.quarantined else logging.WARNING
        if logger.isEnabledFor(level):
            entity = f"{self._kind.name}/{printable(id)}"
            logger.log(level, "%s: %s", entity, outcome, exc_info=outcome.error)

    def _dispatch(self, wakeups: list[Wakeup]) -> None:
        # The evaluation has ended whatever becomes of its wake-up: one that is lost is sent again.
        with suppress(IndexUnavailable, SoftTimeLimitExceeded):
            self._publisher.dispatch(self._kind, wakeups)

    @staticmethod
    def _tell(entity: str, outcome: Outcome, finished: Finished) -> str:
        """Tell Celery; and the log, since Celery's own lines name no entity and show no error of a retry."""
        line, error = str(outcome), outcome.error
        if finished.result is Finish.FENCED:
            line += "; dropped, since its lease was lost"
            logger.warning("%s: %s", entity, line, exc_info=error)
            return line
        if error is None:
            logger.info("%s: %s", entity, line)
            return line
        if outcome.quarantined:
            logger.error("%s: %s", entity, line)  # Celery shows the traceback
            if isinstance(error, TO_CELERY):
                raise GoalStateError(error_text(error)) from error
            raise error
        if finished.deadline is None:  # a failure has a next look, unless the entity is gone
            line += "; dropped, since the entity was deleted"
            logger.warning("%s: %s", entity, line, exc_info=error)
            return line
        logger.warning("%s: %s", entity, line, exc_info=error)
        when = datetime.fromtimestamp(finished.deadline / 1000, UTC)
        # It crosses to the pool's parent process.
        raise Retry(line, exc=get_pickleable_exception(error), when=when) from error


def report(
    run: Run, outcome: Outcome, kind: Kind, *, task_id: str, retries: int, expired_only: bool = False
) -> Report:
    """What the index is told of an outcome."""
    if outcome.error is None:
        verdict = Verdict.DONE
    else:
        verdict = Verdict.QUARANTINED if outcome.quarantined else Verdict.FAILED
    ttl = kind.options.idle_ttl
    return Report(
        id=run.id,
        lease=run.lease,
        verdict=verdict,
        delay=None if outcome.delay is None else milliseconds(outcome.delay),
        failures=outcome.failures,
        looks=outcome.looks,
        error="" if outcome.error is None else error_text(outcome.error),
        converged=outcome.converged,
        task_id=task_id,
        retries=retries,
        fresh_task_id=random_id(),
        respect_backoff=kind.options.respect_backoff,
        idle_ttl=None if ttl is None else milliseconds(ttl),
        expired_only=expired_only,
    )


def create_task(
    app: Celery,
    name: str,
    kind: str,
    task_options: Mapping[str, Any],
    *,
    evaluator: Callable[[], Evaluator],
    eta_horizon: Callable[[], float],
) -> Any:
    """Create the Celery task of a kind.

    `evaluator` is asked for when the first message comes, `eta_horizon` (seconds) when a worker starts.
    """

    def evaluate_entity(self: Task[Any, Any], *args: Any, **kwargs: Any) -> str:
        return evaluator().handle(self, args, kwargs)

    evaluate_entity.__doc__ = f"Evaluate an entity of kind {kind}."
    options = {"ignore_result": True, **task_options}
    create: Any = app.task  # its stubs know no options by name
    return create(
        evaluate_entity,
        bind=True,
        name=name,
        serializer="json",
        Strategy=staticmethod(partial(strategy, eta_horizon=eta_horizon)),
        typing=False,
        shared=False,  # or every other app of the process got it too, with this app's engine
        **options,
    )


@task_postrun.connect
def _fall_silent(task_id: str | None = None, **_: Any) -> None:
    """Celery's handlers of a failure or retry have run."""
    who = speaker.get()
    if who is not None and who.until == task_id:
        speaker.set(None)


def _celery_retry_after(error: Exception) -> float | None:
    """The delay that Celery's own `Retry` asks for, as `RetryAfter` does; None for any other error."""
    if not isinstance(error, Retry) or error.when is None:
        return None
    if isinstance(error.when, datetime):
        when = error.when if error.when.tzinfo else error.when.replace(tzinfo=UTC)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    return max(0.0, float(error.when))
