"""The Celery task of one kind: claim -> evaluate -> finish -> publish what follows.

wake-up ──► claim ──► refused: superseded, deleted, paused, early: nothing to do
              │
            lease ──► evaluate ──► finish ──► fenced: the lease was lost, the outcome is dropped
                                      │
                                   accepted ──► next wake-up, if there is one
                                      │
                            done: SUCCESS · failed: RETRY · quarantined: FAILURE
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from contextvars import copy_context
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery, Task
from celery.app.task import Context as TaskRequest
from celery.exceptions import Reject, Retry, TaskPredicate
from celery.utils.serialization import get_pickleable_exception

from celery_goalstate.deadlines import milliseconds
from celery_goalstate.display import printable, state_text
from celery_goalstate.entity import EntityRef
from celery_goalstate.evaluation import ActionRun, Evaluation, Outcome, error_text, evaluate
from celery_goalstate.exceptions import GoalStateError, IndexUnavailable, LeaseLost
from celery_goalstate.index.base import (
    LONGEST_WORD,
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
    cut,
    random_id,
)
from celery_goalstate.index.counters import ActionTime
from celery_goalstate.messages.envelope import strategy
from celery_goalstate.messages.notes import adds_headers
from celery_goalstate.messages.wakeup import read_message, rejection
from celery_goalstate.registry import Kind
from celery_goalstate.signals import (
    entity_quarantined,
    evaluation_finished,
    evaluation_started,
    lease_lost,
    wakeup_refused,
)
from celery_goalstate.worker.batch import NOTHING_TO_DO, SLICE, Batch, Tally, ending
from celery_goalstate.worker.caller import call_until_postrun, calling
from celery_goalstate.worker.databases import usable_afterwards
from celery_goalstate.worker.lease import Lease
from celery_goalstate.worker.parts import Parts
from celery_goalstate.worker.shutdown import claiming, given_back, is_ending, leave_to_others

if TYPE_CHECKING:
    from celery_goalstate.engine import Engine

logger = logging.getLogger(__name__)

#: Seconds between two attempts to reach an index that did not answer.
TRY_AGAIN_AFTER = 0.2
#: Seconds that a claim tries for, or that the index has been away: others want this place in the pool. A
#: wake-up that is given up is found and sent again by the sweeper.
CLAIM_PATIENCE = 2.0

#: How long a task with batches takes more entities, in seconds: other tasks want their turn.
TAKE_FOR = 1.0

#: Characters of a state in the index: it is stored with each entity.
LONGEST_STATE = 20

#: Errors of an entity that Celery would take for its own: for what becomes of this task, or (any MemoryError)
#: for the end of the whole worker.
TO_CELERY = (TaskPredicate, MemoryError)

REFUSALS = {
    Refused.MISSING: "nothing to do: the index does not know the entity (deleted?)",
    Refused.STALE: "nothing to do: superseded by another wake-up",
    Refused.PAUSED: "nothing to do: the kind is paused",
    Refused.EARLY: "nothing to do yet: sent again",
    Refused.AWAY: "not evaluated, since the index did not answer: the sweeper sends it again",
}


class Ended(NamedTuple):
    """How the work that one message asked for has ended."""

    summary: str  #: for people
    error: Exception | None = None  #: why the evaluation failed; None: it did not, or its outcome was dropped
    retry_at: datetime | None = None  #: when the failed entity is evaluated again; None: it is quarantined


class Evaluator:
    """What a worker does with the wake-ups of one kind."""

    def __init__(self, kind: Kind, *, engine: Engine, parts: Parts) -> None:
        assert kind.entity_class is not None  # noqa: S101 - only those of this process are evaluated
        self._kind = kind
        self._entity_class = kind.entity_class
        self._engine = engine
        self._parts = parts
        self._index = parts.index
        self._publisher = parts.publisher
        self._keeper = parts.keeper

    def handle(self, task: Task[Any, Any], args: Any, kwargs: Any) -> str:
        """`run` for Celery: what it returns or raises is the result of the task."""
        try:
            pairs, resent_at = read_message(args, kwargs)
        except ValueError as error:
            logger.error("%s", rejection(task.name, self._kind.name, error))  # noqa: TRY400 - no traceback
            raise Reject(str(error), requeue=False) from None
        request = task.request  # searches a stack
        ended = self.run(
            pairs, resent_at, task_id=str(request.id), retries=request.retries or 0, request=request
        )
        return _result(ended)

    def run(
        self,
        pairs: list[tuple[str, str]],
        resent_at: int | None,
        *,
        task_id: str,
        retries: int,
        request: TaskRequest,
    ) -> Ended:
        """Evaluate the entities of one message, (id, token) pairs; with batches, some more that are due.

        Raises `IndexUnavailable`: the sweeper makes up for what is not evaluated then.
        """
        with claiming() as nonce:
            return self._run(pairs, resent_at, nonce, task_id=task_id, retries=retries, request=request)

    def _run(
        self,
        pairs: list[tuple[str, str]],
        resent_at: int | None,
        nonce: str,
        *,
        task_id: str,
        retries: int,
        request: TaskRequest,
    ) -> Ended:
        claims, claimed_at = self._claim(pairs, nonce, task_id, resent_at)
        refusals = [claim for claim in claims if isinstance(claim, Refusal)]
        for refusal in refusals:
            kind, reason = self._kind.name, refusal.reason.value
            wakeup_refused.send(kind, engine=self._engine, kind=kind, id=refusal.id, reason=reason)
        self._dispatch([refusal.wakeup for refusal in refusals if refusal.wakeup])
        if len(claims) == 1:
            ended = self._evaluate_one(claims[0], claimed_at, task_id, retries, request)
        else:
            held = [claim for claim in claims if isinstance(claim, Claim)]
            tally = self._evaluate_batch(request, held, claimed_at)
            if refusals:
                tally[NOTHING_TO_DO] += len(refusals)
            ended = Ended(str(tally))
        # What is taken has no message of its own, whose headers would say for whom it is.
        takes = self._kind.options.batch_size > 1 and not adds_headers(self._engine.app, self._kind)
        if takes and ended.error is None:
            ended = Ended(self._take_more(request, task_id, ended.summary))
        return ended

    # -- one entity

    def _evaluate_one(
        self, claim: Claim | Refusal, claimed_at: float, task_id: str, retries: int, request: TaskRequest
    ) -> Ended:
        entity = f"{self._kind.name}/{printable(claim.id)}"
        if isinstance(claim, Refusal):
            return Ended(f"{entity}: {REFUSALS[claim.reason]}")
        run = Run(claim.id, claim.lease)
        with self._keep(run, claimed_at) as lease:
            outcome = self._evaluate(request, claim, lease)
            to_report = self._report(claim, lease, outcome, task_id=task_id, retries=retries)
            [finished] = self._finish([to_report], held=lambda: self._keeper.held(lease))

        if finished.wakeup:
            self._dispatch([finished.wakeup])
        self._send_what_followed(to_report, finished)
        if to_report.verdict is Verdict.UNSTARTED:
            return Ended(f"{entity}: {outcome}; given back, since the worker ends")
        if outcome.error is not None:
            call_until_postrun(self._index, self._kind.name, run, task_id)
        return _ended(entity, outcome, finished)

    # -- several

    def _evaluate_batch(self, request: TaskRequest, claims: list[Claim], claimed_at: float) -> Tally:
        """Evaluate entities one after the other, and report them together."""
        clock = self._keeper.clock
        ends = claimed_at + min(SLICE, self._keeper.length / 3)
        batch = Batch(
            claims, ends=ends, clock=clock, give_back=lambda claim: given_back(Run(claim.id, claim.lease))
        )
        settled: list[tuple[Report, Finished]] = []
        expires = claimed_at + self._keeper.length

        settling = threading.Lock()

        def settle() -> None:
            # Not counted yet, and nothing is sent: the alarm's thread may be here at the same time.
            settled.extend(self._settle(batch.settle(), held=lambda: clock() < expires))

        def settle_early() -> None:
            with settling:
                try:
                    settle()
                except IndexUnavailable as error:  # in a thread it reaches no caller
                    logger.warning(
                        "outcomes of kind %s are lost, its entities are evaluated again: %s",
                        self._kind.name,
                        error,
                    )

        try:
            with self._keeper.alarm(ends, settle_early):
                while not is_ending() and (claim := batch.next()) is not None:
                    run = Run(claim.id, claim.lease)
                    with self._keep(run, claimed_at) as lease:
                        outcome = self._evaluate(request, claim, lease)
                    expires = max(expires, lease.expires)  # a slow one's was renewed
                    self._log(claim.id, outcome)
                    batch.end(self._report(claim, lease, outcome, task_id="", retries=0))
        finally:
            try:
                settle()
            finally:
                with settling:  # the alarm's thread may be in the midst of its reports
                    pass
                for reported, finished in settled:
                    self._send_what_followed(reported, finished)
        return Tally(ending(reported) for reported, _ in settled)

    def _settle(self, reports: list[Report], held: Callable[[], bool]) -> Sequence[tuple[Report, Finished]]:
        settled, wakeups = list(zip(reports, self._finish(reports, held), strict=True)), []
        for reported, finished in settled:
            if finished.result is Finish.FENCED:
                logger.warning(
                    "%s/%s: dropped, since its lease was lost", self._kind.name, printable(reported.id)
                )
            if finished.wakeup:
                wakeups.append(finished.wakeup)
        self._dispatch(wakeups)
        return settled

    def _take_more(self, request: TaskRequest, task_id: str, summary: str) -> str:
        """Under load, evaluate what is due and parked instead of waiting for its messages."""
        clock, taken = self._keeper.clock, Tally()
        ends = clock() + TAKE_FOR
        while clock() < ends and not request.is_eager and not is_ending():
            with claiming() as nonce:
                claimed_at = clock()
                try:
                    claims = self._index.take(
                        self._kind.name, self._kind.options.batch_size, nonce=nonce, task_id=task_id
                    )
                except IndexUnavailable:
                    break  # what this message was about is done
                if not claims:
                    break
                taken.update(self._evaluate_batch(request, claims, claimed_at))
        return f"{summary}; taken as well, {taken}" if taken else summary

    # -- what both do

    def _claim(
        self, pairs: list[tuple[str, str]], nonce: str, task_id: str, resent_at: int | None
    ) -> tuple[list[Claim | Refusal], float]:
        """The index's replies, and a time by this process's clock from which their leases last at least.

        The nonce tells this claim, made again, from a second message of the same task id.
        """
        gives_up_at = self._parts.clock() + CLAIM_PATIENCE
        while True:
            claimed_at = self._keeper.clock()
            try:
                claims = self._index.claim(
                    self._kind.name, pairs, nonce=nonce, task_id=task_id, resent_at=resent_at
                )
                return claims, claimed_at
            except IndexUnavailable as error:
                if error.away_for >= CLAIM_PATIENCE or self._parts.clock() >= gives_up_at:
                    return [Refusal(id, Refused.AWAY) for id, _ in pairs], claimed_at
                self._parts.sleep(TRY_AGAIN_AFTER)  # this evaluation has nothing else to do

    def _keep(self, run: Run, claimed_at: float) -> AbstractContextManager[Lease]:
        max_run = self._kind.options.max_run
        return self._keeper.keep(self._kind.name, run, claimed_at=claimed_at, max_run=max_run)

    def _evaluate(self, request: TaskRequest, claim: Claim, lease: Lease) -> Outcome:
        evaluation = Evaluation(
            ref=EntityRef(self._kind.name, claim.id),
            load=self._entity_class.from_id,
            failures=claim.failures,
            rounds=claim.rounds,
            deadline=datetime.fromtimestamp(claim.deadline / 1000, UTC),
            lateness=claim.lateness / 1000,
            fencing_token=int(claim.lease),
            held=lambda: self._keeper.held(lease) and not is_ending(),
            calling=partial(calling, self._index, self._kind.name, lease.run),
            engine=self._engine,
            task=request,
            observe=partial(lease.observe, request.hostname or ""),
        )
        # In a context of its own: nothing of it reaches the next entity, or what Celery does afterwards.
        with usable_afterwards():
            return copy_context().run(self._evaluate_here, evaluation, lease)

    def _evaluate_here(self, evaluation: Evaluation, lease: Lease) -> Outcome:
        kind, id, engine, clock = self._kind.name, lease.run.id, self._engine, self._parts.clock
        with calling(self._index, kind, lease.run):
            began = clock()
            evaluation_started.send(kind, engine=engine, kind=kind, id=id)
            outcome = evaluate(
                evaluation,
                self._kind.options,
                engine.hooks,
                retry_after=partial(_celery_retry_after, now=self._parts.now),
                clock=clock,
                random=self._parts.random,
            )
            if not self._is_cut_off(lease, outcome):
                evaluation_finished.send(
                    kind,
                    engine=engine,
                    kind=kind,
                    id=id,
                    outcome=outcome,
                    lateness=evaluation.lateness,
                    seconds=clock() - began,
                )
            return outcome

    def _send_what_followed(self, reported: Report, finished: Finished) -> None:
        """Send what the index made of a report, if that is worth a signal."""
        if finished.result is Finish.FENCED:
            send_lease_lost(self._engine, self._index, self._kind.name, reported)
        else:
            send_if_quarantined(self._engine, self._index, self._kind.name, reported, finished)

    def _is_cut_off(self, lease: Lease, outcome: Outcome) -> bool:
        """Whether the worker's end cut the evaluation off, which is no failure of it."""
        if outcome.error is None or not is_ending() or not self._keeper.held(lease):
            return False
        # The signal's handler raised its error in the main thread, and an action may have put another one
        # in its place. In other threads the next action was held back.
        in_main_thread = threading.current_thread() is threading.main_thread()
        return in_main_thread or isinstance(outcome.error, LeaseLost)

    def _report(self, claim: Claim, lease: Lease, outcome: Outcome, *, task_id: str, retries: int) -> Report:
        if self._is_cut_off(lease, outcome):
            return given_back(lease.run)
        return report(
            lease.run, outcome, self._kind, task_id=task_id, retries=retries, lateness=claim.lateness
        )

    def _finish(self, reports: list[Report], held: Callable[[], bool]) -> list[Finished]:
        """Report to the index, again and again while the lease lasts: the actions have been executed.

        Of one that had begun an action the index wants to know also when its lease is over, for as long as a
        claim tries: its late write may have undone what another evaluation did.
        """
        patience = CLAIM_PATIENCE if any(report.began for report in reports) else 0.0
        gives_up_at = None
        while True:
            try:
                try:
                    return self._index.finish(self._kind.name, reports)
                except IndexUnavailable:
                    now = self._parts.clock()
                    if gives_up_at is None and not held():
                        gives_up_at = now + patience
                    if gives_up_at is not None and now >= gives_up_at:
                        raise
                    self._parts.sleep(TRY_AGAIN_AFTER)  # this evaluation has nothing else to do
            except SoftTimeLimitExceeded:
                pass  # it struck after the actions; a report is safe to repeat

    def _log(self, id: str, outcome: Outcome) -> None:
        """Of an entity in a batch: Celery's own lines name the task only."""
        level = logging.INFO
        if outcome.error is not None:
            level = logging.ERROR if outcome.quarantined else logging.WARNING
        if logger.isEnabledFor(level):
            entity = f"{self._kind.name}/{printable(id)}"
            logger.log(level, "%s: %s", entity, outcome, exc_info=outcome.error)

    def _dispatch(self, wakeups: list[Wakeup]) -> None:
        # The evaluation has ended whatever becomes of its wake-up: one that is lost is sent again.
        with suppress(IndexUnavailable, SoftTimeLimitExceeded):
            if is_ending():
                leave_to_others(self._index, self._kind.name, wakeups)
            else:
                self._publisher.dispatch(self._kind, wakeups)


def _ended(entity: str, outcome: Outcome, finished: Finished) -> Ended:
    """What is known of one entity, and its line in the log: Celery's own shows no traceback of a retry.

    Celery itself logs a success, with this summary.
    """
    summary, error = f"{entity}: {outcome}", outcome.error
    if finished.result is Finish.FENCED:
        summary += "; dropped, since its lease was lost"
        logger.warning("%s", summary, exc_info=error)
        return Ended(summary)
    if error is None:
        logger.debug("%s", summary)
        return Ended(summary)
    if outcome.quarantined:
        logger.error("%s", summary)  # Celery shows the traceback
        return Ended(summary, error)
    if finished.deadline is None:  # a failure is tried again, unless the entity is gone
        summary += "; dropped, since the entity was deleted"
        logger.warning("%s", summary, exc_info=error)
        return Ended(summary)
    logger.warning("%s", summary, exc_info=error)
    return Ended(summary, error, retry_at=datetime.fromtimestamp(finished.deadline / 1000, UTC))


def _result(ended: Ended) -> str:
    """What Celery's task returns or raises."""
    error = ended.error
    if error is None:
        return ended.summary
    if ended.retry_at is not None:
        # It crosses to the pool's parent process.
        raise Retry(ended.summary, exc=get_pickleable_exception(error), when=ended.retry_at) from error
    if isinstance(error, TO_CELERY):
        raise GoalStateError(error_text(error)) from error
    raise error


def report(
    run: Run,
    outcome: Outcome,
    kind: Kind,
    *,
    task_id: str,
    retries: int,
    lateness: int | None = None,
    lost_at: int | None = None,
) -> Report:
    """What is reported to the index of an outcome."""
    if outcome.gone:
        verdict = Verdict.GONE
    elif outcome.error is None:
        verdict = Verdict.DONE
    else:
        verdict = Verdict.QUARANTINED if outcome.quarantined else Verdict.FAILED
    ttl = kind.options.idle_ttl
    last = outcome.actions[-1] if outcome.actions else None
    return Report(
        id=run.id,
        lease=run.lease,
        verdict=verdict,
        delay=None if outcome.delay is None else milliseconds(outcome.delay),
        failures=outcome.failures,
        rounds=outcome.rounds,
        error="" if outcome.error is None else error_text(outcome.error),
        state=state_word(outcome.final_state),
        goal=state_word(outcome.goal_state),
        step=cut(outcome.step, LONGEST_WORD),
        took=milliseconds(last.seconds) if last is not None and last.failed else None,
        converged=outcome.converged,
        task_id=task_id,
        retries=retries,
        fresh_task_id=random_id(),
        respect_backoff=kind.options.respect_backoff,
        idle_ttl=None if ttl is None else milliseconds(ttl),
        began=bool(outcome.actions),
        lateness=lateness,
        actions=tuple(map(_action_time, outcome.actions)),
        lost_at=lost_at,
    )


def _action_time(run: ActionRun) -> ActionTime:
    return ActionTime(cut(run.name, LONGEST_WORD), round(run.seconds * 1000), run.failed)


def state_word(state: Any) -> str:
    """What the index keeps of a state: at most 20 characters; empty if it was not read."""
    return "" if state is None else cut(state_text(state, LONGEST_STATE), LONGEST_WORD)


def send_lease_lost(engine: Engine, index: Index, kind: str, reported: Report) -> None:
    """Send `lease_lost`; its receivers' words count as the evaluation's."""
    with calling(index, kind, Run(reported.id, reported.lease)):
        lease_lost.send(kind, engine=engine, kind=kind, id=reported.id)


def send_if_quarantined(
    engine: Engine, index: Index, kind: str, reported: Report, finished: Finished
) -> None:
    """Send `entity_quarantined` of a report that was accepted, unless an enqueue from outside came first."""
    if reported.verdict is Verdict.QUARANTINED and finished.deadline is None:
        with calling(index, kind, Run(reported.id, reported.lease)):
            entity_quarantined.send(kind, engine=engine, kind=kind, id=reported.id, error=reported.error)


#: What a base class, or `task_cls`, may set for all tasks and what would undo an outcome here, or spoil a
#: wake-up. Given to the task itself, these win over any class. All of it is refused as an option, too.
OWN_OPTIONS: Mapping[str, Any] = {
    "autoretry_for": (),
    "dont_autoretry_for": (),
    "retry_kwargs": {},
    "retry_backoff": False,
    "retry_backoff_max": 600,
    "retry_jitter": True,
    "retry_on_worker_lost": False,
    "max_retries": None,
    "default_retry_delay": 180,
    "expires": None,
    "serializer": "json",
    "compression": None,
    "typing": False,
}


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
        Strategy=staticmethod(partial(strategy, kind=kind, eta_horizon=eta_horizon)),
        shared=False,  # or every other app of the process got it too, with this app's engine
        **OWN_OPTIONS,
        **options,
    )


def _celery_retry_after(error: Exception, now: Callable[[], datetime]) -> float | None:
    """The delay that Celery's own `Retry` asks for, as `RetryAfter` does; None for any other error."""
    if not isinstance(error, Retry) or error.when is None:
        return None
    if isinstance(error.when, datetime):
        when = error.when if error.when.tzinfo else error.when.replace(tzinfo=UTC)
        return max(0.0, (when - now()).total_seconds())
    return max(0.0, float(error.when))
