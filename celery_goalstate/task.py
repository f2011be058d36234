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
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery, Task
from celery.exceptions import Reject, Retry, TaskPredicate
from celery.utils.serialization import get_pickleable_exception
from kombu.utils.uuid import uuid

from celery_goalstate.entity import EntityRef, Scheduler
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
)
from celery_goalstate.kind import Kind, milliseconds, task_name
from celery_goalstate.lease import Lease, LeaseKeeper
from celery_goalstate.wakeup import Publisher, read_message

logger = logging.getLogger(__name__)

#: Seconds between two attempts to reach an index that did not answer ...
TRY_AGAIN_AFTER = 0.2
#: ... and how many a claim makes. A wake-up that is given up is found and sent again by the sweeper.
CLAIM_ATTEMPTS = 10

REFUSALS = {
    Refused.MISSING: "nothing to do: the entity was deleted",
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


#: Who speaks when an entity is enqueued: an evaluation, or (None) somebody from outside.
speaker: ContextVar[Speaker | None] = ContextVar("goalstate_speaker", default=None)


class Evaluator:
    """What a worker does with the wake-ups of one kind."""

    def __init__(
        self, kind: Kind, *, engine: Scheduler, index: Index, publisher: Publisher, keeper: LeaseKeeper
    ) -> None:
        self._kind = kind
        self._engine = engine
        self._index = index
        self._publisher = publisher
        self._keeper = keeper

    def handle(self, task: Task[Any, Any], args: Any, kwargs: Any) -> str:
        """Evaluate the entity of one message; the line that Flower shows.

        Raises what tells Celery how the evaluation ended: `Retry` or the error that quarantined the entity.
        """
        try:
            id, token, resent_at = read_message(args, kwargs)
        except ValueError as error:
            logger.error("%s rejected a malformed message: %s", task.name, error)  # noqa: TRY400 - no traceback
            raise Reject(str(error), requeue=False) from error

        claim, claimed_at = self._claim(id, token, str(task.request.id), resent_at)
        if isinstance(claim, Refusal):
            if claim.wakeup:
                self._dispatch([claim.wakeup])
            return REFUSALS[claim.reason]

        run = Run(id, claim.lease)
        with self._keeper.keep(
            self._kind.name, run, claimed_at=claimed_at, max_run=self._kind.options.max_run
        ) as lease:
            outcome = self._evaluate(task, claim, lease)
            finished = self._finish(self._report(task, run, outcome), lease)

        if finished.wakeup:
            self._dispatch([finished.wakeup])
        return self._tell(f"{self._kind.name}/{id}", outcome, finished)

    def _claim(
        self, id: str, token: str, task_id: str, resent_at: int | None
    ) -> tuple[Claim | Refusal, float]:
        """The index's reply, and the keeper's time before it was asked for it."""
        nonce = uuid()  # tells this claim, said again, from a second message of the same task id
        for attempt in range(1, CLAIM_ATTEMPTS + 1):
            asked_at = self._keeper.clock()
            try:
                [claim] = self._index.claim(
                    self._kind.name, [(id, token)], nonce=nonce, task_id=task_id, resent_at=resent_at
                )
            except IndexUnavailable:
                if attempt == CLAIM_ATTEMPTS:
                    raise
                time.sleep(TRY_AGAIN_AFTER)
            else:
                return claim, asked_at
        raise AssertionError("unreachable")

    def _evaluate(self, task: Task[Any, Any], claim: Claim, lease: Lease) -> Outcome:
        evaluation = Evaluation(
            ref=EntityRef(self._kind.name, claim.id),
            load=self._kind.entity_class.from_id,
            failures=claim.failures,
            looks=claim.looks,
            deadline=datetime.fromtimestamp(claim.deadline / 1000, UTC),
            lateness=claim.lateness / 1000,
            fencing_token=int(claim.lease),
            held=lambda: self._keeper.held(lease),
            engine=self._engine,
            task=task.request,
        )
        with _speaking(Speaker(self._index, self._kind.name, lease.run)):
            return evaluate(evaluation, self._kind.options, retry_after=_celery_retry_after)

    def _report(self, task: Task[Any, Any], run: Run, outcome: Outcome) -> Report:
        return report(
            run, outcome, self._kind, task_id=str(task.request.id), retries=task.request.retries or 0
        )

    def _finish(self, report: Report, lease: Lease) -> Finished:
        """Tell the index, again and again while the lease lasts: the actions have been executed."""
        while True:
            try:
                try:
                    [finished] = self._index.finish(self._kind.name, [report])
                    return finished
                except IndexUnavailable:
                    if not self._keeper.held(lease):
                        raise
                    time.sleep(TRY_AGAIN_AFTER)
            except SoftTimeLimitExceeded:
                pass  # it struck after the actions; a report is safe to repeat

    def _dispatch(self, wakeups: list[Wakeup]) -> None:
        # The evaluation has ended whatever becomes of its wake-up: one that is lost is sent again.
        with suppress(IndexUnavailable, SoftTimeLimitExceeded):
            self._publisher.dispatch(self._kind.name, wakeups, self._kind.options.routing)

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
            if isinstance(error, TaskPredicate):  # what it says to Celery is not meant for this task
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
        fresh_task_id=uuid(),
        respect_backoff=kind.options.respect_backoff,
        idle_ttl=None if ttl is None else milliseconds(ttl),
        expired_only=expired_only,
    )


def create_task(
    app: Celery, namespace: str, kind: str, task_options: dict[str, Any], evaluator: Callable[[], Evaluator]
) -> Any:
    """Create the Celery task of a kind; `evaluator` is asked for when the first message comes."""

    def evaluate_entity(self: Task[Any, Any], *args: Any, **kwargs: Any) -> str:
        return evaluator().handle(self, args, kwargs)

    evaluate_entity.__doc__ = f"Evaluate an entity of kind {kind}."
    options = {"ignore_result": True, **task_options}
    create: Any = app.task  # its stubs know no options by name
    return create(
        evaluate_entity,
        bind=True,
        name=task_name(kind, namespace),
        serializer="json",
        typing=False,
        shared=False,  # or every other app of the process got it too, with this app's engine
        **options,
    )


@contextmanager
def _speaking(who: Speaker) -> Iterator[None]:
    before = speaker.set(who)
    try:
        yield
    finally:
        who.ended = True
        speaker.reset(before)


def _celery_retry_after(error: Exception) -> float | None:
    """The delay that Celery's own `Retry` asks for, as `RetryAfter` does; None for any other error."""
    if not isinstance(error, Retry) or error.when is None:
        return None
    if isinstance(error.when, datetime):
        when = error.when if error.when.tzinfo else error.when.replace(tzinfo=UTC)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    return max(0.0, float(error.when))
