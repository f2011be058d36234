"""Any interleaving of everything that can happen, on the reference and on Redis.

Producers enqueue, workers claim, renew and finish or stall beyond their lease, operators delete and pause,
the sweeper sweeps, messages are lost, duplicated and reordered, commands are repeated, time passes. The
model (`model.Entity`) says what may be expected; after every step everything that is stored is checked,
and at the end all that is owed must have been evaluated.

On Redis the reference runs beside it with the same clock: both must give the same replies, tokens included,
and store the same fields.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from celery_goalstate.index.base import (
    Claim,
    Finish,
    Finished,
    Limits,
    Policy,
    Record,
    Refused,
    Report,
    Request,
    Run,
    Status,
    Survey,
    Verdict,
    Wakeup,
    Watch,
)
from celery_goalstate.index.counters import ActionTime
from tests.contract.bench import KIND
from tests.contract.conftest import LANES
from tests.contract.lanes import Clock, Lane, MemoryLane, RedisLane, check
from tests.contract.model import Ask, Entity, Evaluation

LIMITS = Limits(eta_horizon=100, lease=100, resend_after=200, window=2)
IDS = ("a", "b", "c")

ids = st.sampled_from(IDS)
delays = st.sampled_from([0, 0, 1, 20, 50, 99, 100, 101, 150, 300, 1_000, 86_400_000])
errors = st.sampled_from(["boom", "boom: " + "ü" * 100, "x" * 500])
notes = st.sampled_from(["", "", '{"tenant": "a"}', "ü"])
times = st.sampled_from([1, 20, 49, 50, 99, 100, 101, 200])
clock_steps = st.sampled_from([-86_400_000, -2_000, -500, -101, -20, 20, 101, 500, 2_000])
action_times = st.lists(
    st.builds(ActionTime, st.sampled_from(["charge", "ship: ü"]), times, st.booleans()), max_size=2
)
numbers = st.integers(0, 1_000)  # which of those there are
rarely = st.sampled_from([False, False, False, True])


class Twins:
    """The index under test and the reference, given the same: any difference fails."""

    def __init__(self, lane: Lane, twin: Lane) -> None:
        self._lane = lane
        self._twin = twin

    def __getattr__(self, name: str) -> Any:
        def both(*args: Any, **kwargs: Any) -> Any:
            reply = getattr(self._lane.index, name)(*args, **kwargs)
            expected = getattr(self._twin.index, name)(*args, **kwargs)
            if name == "survey":  # each searches in its own order
                reply, expected = (
                    [dataclasses.replace(survey, due=tuple(sorted(survey.due))) for survey in surveys]
                    for surveys in (reply, expected)
                )
            assert reply == expected, f"{name}{args}{kwargs}"
            return reply

        return both


class Machine(RuleBasedStateMachine):
    """Three entities of one kind, any number of workers, a channel that cannot be trusted."""

    steps = 0  #: of all machines of a test

    def __init__(self, lane: Lane, twin: Lane | None) -> None:
        super().__init__()
        self.lane, self.twin = lane, twin
        self.clock = lane.clock
        self.index: Any = Twins(lane, twin) if twin else lane.index
        self.entities: defaultdict[str, Entity] = defaultdict(Entity)
        self.channel: list[Wakeup] = []
        # The latest ones; those that are over may not know it.
        self.evaluations: list[Evaluation] = []
        self.reported: dict[str, Report] = {}  # by lease
        self.last_claim: tuple[list[tuple[str, str]], str, list[Any]] | None = None
        self.paused = False
        self.sweeper, self.swept_until = "", 0
        self.watching: dict[str, tuple[Survey, int]] = {}  # by sweeper: its last survey, and when
        self.elapsed = 0  # milliseconds, on a clock that never steps
        self.seen: dict[str, Record | None] = {}  # what a mover knew of each entity
        self.finished = 0  #: reports that were accepted
        self.happened = 0  # numbers all that happens, since much can happen within a millisecond

    def _next(self) -> int:
        self.happened += 1
        return self.happened

    def _name(self) -> str:
        return f"task-{self._next()}"

    def _publish(self, wakeup: Wakeup | None, *, again: bool = False, enqueued: bool = False) -> None:
        if wakeup is None:
            return
        entity = self.entities[wakeup.id]
        assert wakeup.note == ("" if enqueued else entity.note), "a message carries what was noted last"
        assert again or not self.paused, "nothing new is sent while the kind is paused"
        assert entity.due is not None, "a message is sent for a pending evaluation only"
        assert wakeup.delay >= entity.due - self.clock.now, "a message never asks for an early evaluation"
        self.channel.append(wakeup)

    def _pass(self, ms: int) -> None:
        self.clock.advance(ms)
        self.elapsed += ms

    # -- producers

    @rule(id=ids, delay=delays, past=rarely, note=notes)
    def enqueue(self, id: str, delay: int, past: bool, note: str) -> None:
        at = self.clock.now + (-10 if past else delay)
        request = Request(id, at=at, task_id=self._name(), note=note)
        self._enqueue(request, Policy.EARLIEST, None, None)

    @rule(
        id=ids,
        delay=delays,
        policy=st.sampled_from(Policy),
        max_wait=st.none() | delays,
        note=notes,
        repeat=rarely,
    )
    def enqueue_somehow(
        self, id: str, delay: int, policy: Policy, max_wait: int | None, note: str, repeat: bool
    ) -> None:
        request = Request(id, delay, task_id=self._name(), note=note)
        self._enqueue(request, policy, max_wait, None)
        if repeat:
            self._enqueue(request, policy, max_wait, None, again=True)

    @precondition(lambda self: self.evaluations)
    @rule(
        number=numbers,
        stalled=rarely,
        other=st.none() | st.none() | ids,
        delay=delays,
        policy=st.sampled_from([Policy.EARLIEST, Policy.EARLIEST, *Policy]),
        max_wait=st.none() | delays,
        note=notes,
    )
    def enqueue_from_inside(
        self,
        number: int,
        stalled: bool,
        other: str | None,
        delay: int,
        policy: Policy,
        max_wait: int | None,
        note: str,
    ) -> None:
        caller = self._evaluation(number, stalled)
        request = Request(other or caller.id, delay, None, self._name(), note)
        self._enqueue(request, policy, max_wait, caller)

    def _enqueue(
        self,
        request: Request,
        policy: Policy,
        max_wait: int | None,
        caller: Evaluation | None,
        *,
        again: bool = False,
    ) -> None:
        inside = Run(caller.id, caller.lease) if caller else None
        (reply,) = self.index.enqueue(KIND, [request], policy=policy, max_wait=max_wait, inside=inside)
        entity, now = self.entities[request.id], self.clock.now
        wanted = now + request.delay if request.delay is not None else request.at or 0
        itself = caller.lease if caller and caller.id == request.id else None
        relative = request.at is None
        changed, deadline = entity.enqueue(now, wanted, policy, max_wait, itself, request.note, relative)
        assert reply.deadline == deadline
        assert reply.changed == changed or again
        assert changed or reply.wakeup is None or again, "a message for a schedule that did not change"
        self._publish(reply.wakeup, again=again, enqueued=True)
        if deadline is not None and (changed or policy in {Policy.EARLIEST, Policy.REPLACE}):
            entity.owed.append(Ask(self._next(), own=itself is not None))

    # -- the channel

    @precondition(lambda self: self.channel)
    @rule(number=numbers, fate=st.sampled_from(["lost", "duplicated", "not published", "put back"]))
    def disturb_message(self, number: int, fate: str) -> None:
        """A publish that failed is put back; its message may have arrived all the same."""
        wakeup = self.channel[number % len(self.channel)]
        if fate in {"lost", "not published"}:
            self.channel.remove(wakeup)
        if fate == "duplicated":
            self.channel.append(wakeup)
        elif fate != "lost":
            self.index.put_back(KIND, [wakeup])

    # -- workers

    @precondition(lambda self: self.channel)
    @rule(number=numbers, repeat=rarely)
    def deliver(self, number: int, repeat: bool) -> None:
        self._claim([self.channel.pop(number % len(self.channel))], repeat=repeat)

    @precondition(lambda self: self.channel)
    @rule(number=numbers)
    def deliver_in_time(self, number: int) -> None:
        message = self.channel.pop(number % len(self.channel))
        due = self.entities[message.id].due or 0
        self._pass(max(0, due - self.clock.now))
        self._claim([message])

    @precondition(lambda self: self.channel)
    @rule(repeat=rarely)
    def deliver_all_at_once(self, repeat: bool) -> None:
        wakeups, self.channel = self.channel, []
        self._claim(wakeups, repeat=repeat)

    def _claim(self, wakeups: list[Wakeup], *, repeat: bool = False) -> None:
        nonce = self._name()
        pairs = [(wakeup.id, wakeup.token) for wakeup in wakeups]
        resent_at = max((wakeup.resent_at or 0 for wakeup in wakeups), default=0) or None
        began = self._next()
        replies = self.index.claim(KIND, pairs, nonce=nonce, task_id=nonce, resent_at=resent_at)
        for reply in replies:
            entity = self.entities[reply.id]
            if isinstance(reply, Claim):
                self._started(entity, reply, began, batch=len(pairs) > 1)
            elif reply.reason is Refused.MISSING:
                assert not entity.known or (entity.evaluation and entity.evaluation.deleted)
            elif reply.reason is Refused.PAUSED:
                assert self.paused
            elif reply.reason is Refused.EARLY:
                assert not self.paused
                assert entity.due is not None
                assert entity.due > self.clock.now
                assert reply.wakeup or entity.due > self.clock.now + LIMITS.eta_horizon
                self._publish(reply.wakeup)
        self.last_claim = (pairs, nonce, replies)
        if repeat:
            self._claim_again()

    @rule(limit=st.integers(1, 3))
    def take(self, limit: int) -> None:
        """A worker that has time left takes what is due and parked, without any message."""
        nonce, began = self._name(), self._next()
        for claim in self.index.take(KIND, limit, nonce=nonce, task_id=nonce):
            assert not self.entities[claim.id].alone, "taken, though its worker was lost with a batch"
            assert not self.entities[claim.id].note, "taken, though a message is to carry its note"
            self._started(self.entities[claim.id], claim, began, batch=True)

    def _started(self, entity: Entity, claim: Claim, began: int, *, batch: bool) -> None:
        now = self.clock.now
        if entity.evaluation and entity.evaluation.lease == claim.lease and entity.evaluation.began == began:
            return  # twice in this very batch
        assert not self.paused, "an evaluation started while the kind is paused"
        assert entity.known, "a posthumous evaluation"
        assert entity.evaluation is None, "two evaluations at a time"
        others = [each for each in self.evaluations if each.id == claim.id and not each.over]
        live = [each for each in others if self.elapsed - each.renewed < LIMITS.lease]
        assert not live, "two live leases"
        assert entity.due is not None, "an evaluation that was not asked for"
        assert entity.due <= now, "an early evaluation"
        assert int(claim.lease) > entity.fence, "a fencing token that does not rise"
        assert claim == Claim(
            claim.id, claim.lease, entity.failures, entity.rounds, entity.due, now - entity.due
        )
        evaluation = Evaluation(claim.id, claim.lease, began, self.elapsed, batch=batch)
        self.evaluations = [*self.evaluations, evaluation][-8:]
        entity.start(evaluation)

    def _claim_again(self) -> None:
        """The reply to a claim was lost: repeated, it gets its leases again, renewed."""
        if self.last_claim is None:
            return
        pairs, nonce, replies = self.last_claim
        again = self.index.claim(KIND, pairs, nonce=nonce, task_id=nonce)
        for first, second in zip(replies, again, strict=True):
            if isinstance(first, Claim) and self._held(first):
                assert isinstance(second, Claim)
                assert second.lease == first.lease
                self._renewed(first)
            elif isinstance(second, Claim):
                # The first time it was early or the kind was paused: a claim like any other.
                evaluation = self.entities[second.id].evaluation
                if evaluation is None or evaluation.lease != second.lease:
                    self._started(self.entities[second.id], second, self._next(), batch=len(pairs) > 1)
                else:
                    self._renewed(second)
            elif second.wakeup:
                self._publish(second.wakeup)

    def _renewed(self, claim: Claim) -> None:
        evaluation = self.entities[claim.id].evaluation
        assert evaluation
        evaluation.renewed, evaluation.judged = self.elapsed, None

    def _held(self, claim: Claim) -> bool:
        evaluation = self.entities[claim.id].evaluation
        return evaluation is not None and evaluation.lease == claim.lease and not evaluation.deleted

    def _evaluation(self, number: int, stalled: bool) -> Evaluation:
        """One that holds its lease, if there is any; or any of the latest, for a worker may have stalled."""
        holding = [evaluation for evaluation in self.evaluations if not evaluation.over]
        among = self.evaluations if stalled or not holding else holding
        return among[number % len(among)]

    @precondition(lambda self: self.evaluations)
    @rule(number=numbers, stalled=rarely, where=st.sampled_from(["", "in charge", "in ship, ü"]))
    def renew(self, number: int, stalled: bool, where: str) -> None:
        evaluation = self._evaluation(number, stalled)
        run = Run(evaluation.id, evaluation.lease)
        (held,) = self.index.renew(KIND, [run], where={run: where} if where else {})
        assert held == (self.entities[evaluation.id].evaluation is evaluation)
        if held:
            evaluation.renewed, evaluation.judged = self.elapsed, None

    @precondition(lambda self: self.evaluations)
    @rule(
        number=numbers,
        stalled=rarely,
        verdict=st.sampled_from([Verdict.DONE, Verdict.DONE, *Verdict]),
        delay=delays,
        another_look=st.booleans(),
        rounds=st.integers(0, 3),
        respect_backoff=st.booleans(),
        idle_ttl=st.none() | delays,
        began=st.booleans(),
        lateness=st.none() | times,
        actions=action_times,
        error=errors,
        repeat=rarely,
    )
    def finish(
        self,
        number: int,
        stalled: bool,
        verdict: Verdict,
        delay: int,
        another_look: bool,
        rounds: int,
        respect_backoff: bool,
        idle_ttl: int | None,
        began: bool,
        lateness: int | None,
        actions: list[ActionTime],
        error: str,
        repeat: bool,
    ) -> None:
        evaluation = self._evaluation(number, stalled)
        entity = self.entities[evaluation.id]
        done = verdict is Verdict.DONE
        look_again = verdict is Verdict.FAILED or (done and another_look)
        report = Report(
            evaluation.id,
            evaluation.lease,
            verdict,
            delay if look_again else None,
            failures=0 if done else entity.failures + 1,
            rounds=rounds if done else 0,
            error="" if done else error,
            state=f"state {rounds}",
            goal="there",
            step="" if done else "charge",
            took=None if rounds == 0 else rounds,
            converged=another_look if done else None,
            task_id=f"task-{evaluation.began}",
            retries=rounds,
            fresh_task_id=self._name(),
            respect_backoff=respect_backoff,
            idle_ttl=idle_ttl,
            began=began,
            lateness=lateness,
            actions=tuple(actions),
        )
        self._finish(evaluation, report)
        if repeat:
            self._finish_again(evaluation)

    def _finish(self, evaluation: Evaluation, report: Report) -> None:
        entity, now = self.entities[evaluation.id], self.clock.now
        held, lost = entity.evaluation is evaluation, report.lost_at is not None
        repeated = not held and entity.last == (evaluation.lease, lost)
        (reply,) = self.index.finish(KIND, [report])
        if held and (not lost or evaluation.judged == report.lost_at):
            entity.finish(
                now,
                report.verdict,
                report.delay,
                report.failures,
                report.rounds,
                report.respect_backoff,
                report.idle_ttl,
                lost,
            )
            self.reported[evaluation.lease] = report
            self.finished += 1
            assert (reply.result, reply.deadline) == (Finish.ACCEPTED, entity.due)
        elif not repeated:
            assert reply.result is Finish.FENCED
            self._fenced(entity, report, reply, now, asks_again=report.began and not lost and not held)
        self._publish(reply.wakeup, again=not held)

    def _fenced(self, entity: Entity, report: Report, reply: Finished, now: int, *, asks_again: bool) -> None:
        if not asks_again:
            assert (reply.deadline, reply.wakeup) == (None, None)
            return
        changed, deadline = entity.again(now, now)
        assert reply.deadline == deadline
        again = reply.wakeup and reply.wakeup.task_id == report.fresh_task_id  # said once more
        assert changed or reply.wakeup is None or again
        if deadline is not None:
            entity.owed.append(Ask(self._next(), own=True))

    def _finish_again(self, evaluation: Evaluation) -> None:
        """The reply to a report was lost: repeated, it changes nothing."""
        report = self.reported.get(evaluation.lease)
        if report:
            self._finish(evaluation, report)

    # -- operators

    @rule(what=st.sampled_from(["delete", "delete", "pause"]), id=ids)
    def operate(self, what: str, id: str) -> None:
        if what == "delete":
            assert self.index.delete(KIND, [id]) == [self.entities[id].delete()]
        elif self.paused:
            self._resume()
        else:
            self.index.pause(KIND, by="ann")
            self.paused = True

    @rule(really=rarely)
    def delete_all(self, really: bool) -> None:
        if really:
            runs = {id for id, entity in self.entities.items() if entity.evaluation}
            known = [entity.delete() for entity in self.entities.values()]
            done = self.index.delete_all(KIND)
            assert (done.count, {run.id for run in done.runs}, done.away) == (sum(known), runs, {})
            assert self.index.forget_kind(KIND) == (not runs and not self.paused)
            if not runs and not self.paused:
                self.sweeper, self.swept_until, self.finished = "", 0, 0

    @precondition(lambda self: self.paused)
    @rule()
    def resume(self) -> None:
        self._resume()

    def _resume(self) -> None:
        self.index.resume(KIND)
        self.paused = False

    @rule(id=ids, old_news=rarely)
    def move_away_and_back(self, id: str, old_news: bool) -> None:
        """To another index, in effect. With old news, nothing that came since is overlooked."""
        [now] = self.index.describe(KIND, [id])
        then = self.seen.get(id) if old_news else now
        self.seen[id] = now
        if then is None or then.status is Status.RUNNING:
            return
        entity = self.entities[id]
        [gone] = self.index.retire(KIND, [then])
        unchanged = now is None or (now.deadline, now.finished) == (then.deadline, then.finished)
        assert gone == (entity.evaluation is None and unchanged)
        if gone and now is not None:
            assert self.index.describe(KIND, [id]) == [None]
            self.index.adopt(KIND, [now])
            entity.move()
        self.index.adopt(KIND, [Record(id, Status.FAILED, finished=1, since=1)] if entity.known else [])

    # -- the sweeper

    @rule(sweeper=st.sampled_from(["s1", "s1", "s2"]), limit=st.sampled_from([1, 10]), probing=st.booleans())
    def sweep(self, sweeper: str, limit: int, probing: bool) -> None:
        surveys = self._survey(sweeper, limit)
        if surveys is None:
            return
        (survey,) = surveys
        assert not (self.paused and (survey.due or survey.suspect))
        for id, end in survey.lost:
            self._give_up(id, end)
        self._promote(survey.due)
        self._resend(survey.suspect, survey.suspect[0] if survey.suspect and probing else None)
        for id in survey.expired:
            entity = self.entities[id]
            assert entity.forgotten_at is not None
            assert entity.forgotten_at <= self.clock.now
            entity.forget()
        assert self.index.forget(KIND, survey.expired) == len(survey.expired)

    def _survey(self, sweeper: str, limit: int) -> list[Survey] | None:
        """What there is to do; None: another one sweeps."""
        now, watched = self.clock.now, {}
        if sweeper in self.watching:
            last, at = self.watching[sweeper]
            cursor = (last.cursor or "") if limit > len(IDS) else None
            watched = {(KIND, 0): Watch(last.count, self.elapsed - at, cursor)}
        surveys = self.index.survey([KIND], sweeper=sweeper, hold=120, limit=limit, watched=watched)
        if sweeper != self.sweeper and 0 < self.swept_until - now <= 240:
            assert surveys == [], "one sweeper at a time"
            return None
        self.sweeper, self.swept_until = sweeper, now + 120
        (survey,) = surveys
        self.watching[sweeper] = survey, self.elapsed
        for id, end in survey.lost:
            evaluation = self.entities[id].evaluation
            assert evaluation is not None
            assert self.elapsed - evaluation.renewed >= LIMITS.lease, "whatever the clock does, it is lost"
            evaluation.judged = end
        return [survey]

    @rule(sweeper=st.sampled_from(["s1", "s1", "s2"]))
    def sweep_and_stall(self, sweeper: str) -> None:
        """It judges by what it has seen, later."""
        self._survey(sweeper, 10)

    @rule()
    def sweep_until_all_are_found(self) -> None:
        """A lost worker is found within its lease, a fifth, and a hold."""
        for _ in range((LIMITS.lease * 12 // 10 + 240) // LIMITS.margin + 2):
            self.sweep("s1", 10, False)
            self._pass(LIMITS.margin)
        assert all(entity.evaluation is None for entity in self.entities.values())

    def _give_up(self, id: str, end: int) -> None:
        """What the sweeper does with a lease that ran out."""
        entity = self.entities[id]
        evaluation = entity.evaluation
        assert evaluation is not None
        report = Report(
            id,
            evaluation.lease,
            Verdict.FAILED,
            delay=20,
            failures=entity.failures + 1,
            error="WorkerLost",
            fresh_task_id=self._name(),
            lost_at=end,
        )
        self._finish(evaluation, report)

    def _promote(self, ids: Iterable[str], *, repeat: bool = False) -> None:
        asked = {id: self._name() for id in ids}
        wakeups = self.index.promote(KIND, asked)
        if repeat:
            again = self.index.promote(KIND, asked)
            assert again == [wakeup for wakeup in wakeups if not wakeup.retries]
        for wakeup in wakeups:
            self._publish(wakeup)

    def _resend(self, ids: Iterable[str], probe: str | None, *, repeat: bool = False) -> None:
        asked = {id: self._name() for id in ids}
        wakeups = self.index.resend(KIND, asked, probe=probe)
        if repeat:
            assert self.index.resend(KIND, asked, probe=probe) == wakeups
        for wakeup in wakeups:
            self._publish(wakeup)

    def _sweep_with_old_news(self, evaluation: Evaluation) -> None:
        """A sweeper that stalled acts on what it saw long ago."""
        failures = self.entities[evaluation.id].failures + 1
        end = evaluation.judged or 0
        lost = Report(evaluation.id, evaluation.lease, Verdict.FAILED, 20, failures, lost_at=end)
        self._finish(evaluation, lost)
        self._promote(IDS, repeat=True)
        self._resend(IDS, None, repeat=True)

    # -- whoever got no reply, or stalled

    @precondition(lambda self: self.evaluations)
    @rule(number=numbers, who=st.sampled_from(["claimant", "worker", "sweeper"]))
    def repeat(self, number: int, who: str) -> None:
        evaluation = self._evaluation(number, stalled=True)
        if who == "claimant":
            self._claim_again()
        elif who == "worker":
            self._finish_again(evaluation)
        else:
            self._sweep_with_old_news(evaluation)

    # -- time

    @rule(ms=times)
    def time_passes(self, ms: int) -> None:
        self._pass(ms)

    @rule(ms=clock_steps)
    def clock_is_set(self, ms: int) -> None:
        """The index's own; what is looked at next, by the invariants, is set afresh."""
        now = self.clock.step(ms)
        for entity in self.entities.values():
            entity.set_back(now)

    # -- after every step

    @invariant()
    def all_is_well(self) -> None:
        Machine.steps += 1
        self.what_is_stored_is_sound()
        self.what_is_described_may_be_expected()
        self.the_overview_counts_what_is_stored()
        self.each_evaluation_counts_once()

    def each_evaluation_counts_once(self) -> None:
        assert self.index.metrics([KIND])[KIND].evaluations.total() == self.finished

    def the_overview_counts_what_is_stored(self) -> None:
        overview = self.index.overviews([KIND])[KIND]
        rows = self.lane.stored().values()
        due = [int(row.fields["deadline"]) for row in rows if row.status in {Status.PARKED, Status.SENT}]
        assert overview.overdue == sum(deadline <= self.clock.now for deadline in due)
        assert overview.failing == sum("failing" in row.fields for row in rows)
        assert (overview.paused is not None) == self.paused

    def what_is_stored_is_sound(self) -> None:
        stored = self.lane.stored()
        check(stored)
        if self.twin:
            assert stored == self.twin.stored()
        assert sum(row.status is Status.SENT for row in stored.values()) <= LIMITS.window

    def what_is_described_may_be_expected(self) -> None:
        for id, record in zip(IDS, self.index.describe(KIND, IDS), strict=True):
            entity = self.entities[id]
            if not entity.visible:
                assert record is None
                continue
            assert record is not None
            assert (record.deadline, record.failures) == (entity.pending, self._failures(entity))
            assert record.note == (entity.note if self._shows_note(entity) else "")
            assert record.status in self._statuses(entity)
            assert (record.failing is not None) == (record.failures > 0 and not entity.quarantined)
            if record.status is Status.RUNNING:
                assert entity.evaluation
                assert record.lease == entity.evaluation.lease

    @staticmethod
    def _failures(entity: Entity) -> int:
        return 0 if entity.evaluation and entity.evaluation.deleted else entity.failures

    @staticmethod
    def _shows_note(entity: Entity) -> bool:
        return not (entity.evaluation and entity.evaluation.deleted)

    @staticmethod
    def _statuses(entity: Entity) -> set[Status]:
        if entity.evaluation:
            return {Status.PARKED} if entity.evaluation.deleted else {Status.RUNNING}
        if entity.due is not None:
            return {Status.PARKED, Status.SENT}
        return {Status.FAILED if entity.quarantined else Status.IDLE}

    # -- at the end

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self.drain()
        finally:
            self.lane.wipe()

    def drain(self) -> None:
        """Whatever happened: with a sweeper and a worker that works, all that is owed is evaluated."""
        if self.paused:
            self._resume()
        self._pass(120)  # an old sweeper's hold ends
        for _ in range(100):
            messages, self.channel = self.channel, []
            for message in messages:
                self._claim([message])
            for entity in self.entities.values():
                if evaluation := entity.evaluation:
                    self._finish(evaluation, Report(evaluation.id, evaluation.lease, Verdict.DONE, None))
            self.sweep("s1", 10, True)
            self.what_is_stored_is_sound()
            self.what_is_described_may_be_expected()
            pending = [entity.due for entity in self.entities.values() if entity.due is not None]
            if not pending:
                break
            shortest = LIMITS.shortest_delay if self.channel else LIMITS.resend_after
            self._pass(max(shortest, min(pending) - self.clock.now))
        owed = {id: entity.owed for id, entity in self.entities.items() if entity.owed}
        assert not owed, f"enqueued and never evaluated: {owed}"
        counts = self.index.counts(KIND)
        assert not any(counts[status] for status in (Status.PARKED, Status.SENT, Status.RUNNING)), counts


# -- running it


@dataclass(frozen=True)
class Profile:
    """How thorough it is: examples in memory and on Redis, and how many steps each has at most."""

    memory: int
    redis: int
    steps: int
    phases: tuple[Phase, ...] = tuple(Phase)


PROFILES = {
    "short": Profile(300, 120, 50),
    "long": Profile(6_000, 1_200, 100),
    "mutants": Profile(300, 120, 50, (Phase.generate,)),
}


def explore(lanes: Iterator[tuple[Lane, Lane | None]], examples: int, profile: Profile) -> str:
    """Run many machines; what was done, in words."""
    machines = 0

    def factory() -> Machine:
        nonlocal machines
        machines += 1
        return Machine(*next(lanes))

    Machine.steps = 0
    run_state_machine_as_test(
        factory,
        settings=settings(
            max_examples=examples,
            stateful_step_count=profile.steps,
            deadline=None,
            derandomize=profile.steps < 100,
            database=None,
            print_blob=True,
            report_multiple_bugs=False,
            phases=profile.phases,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return f"{machines} examples, {Machine.steps} steps"


NAME = os.environ.get("GOALSTATE_TEST_PROFILE", "short")


@pytest.mark.timeout(7_200)
@pytest.mark.skipif("memory" not in LANES, reason="not asked for")
def test_in_memory(record_property: Any) -> None:
    def lanes() -> Iterator[tuple[Lane, None]]:
        while True:
            yield MemoryLane(LIMITS, Clock()), None

    profile = PROFILES[NAME]
    record_property("summary", f"state machine in memory: {explore(lanes(), profile.memory, profile)}")


@pytest.mark.timeout(7_200)
@pytest.mark.skipif("valkey" not in LANES, reason="not asked for")
def test_on_redis(valkey: Any, record_property: Any) -> None:
    def lanes() -> Iterator[tuple[Lane, Lane]]:
        while True:
            clock = Clock()
            yield RedisLane("valkey", valkey, LIMITS, clock), MemoryLane(LIMITS, clock)

    profile = PROFILES[NAME]
    record_property("summary", f"state machine on Redis: {explore(lanes(), profile.redis, profile)}")
