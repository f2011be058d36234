"""Every transition of the index in plain Python: the executable specification of the scripts in `lua/`.

One class a script, with the same functions in the same order; `Transition` is `common.lua`. What the scripts
have besides is what only Redis needs: keys, digits, and data that were damaged or evicted.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from celery_goalstate.index.base import (
    BYTES_OF_ERROR,
    BYTES_OF_PAST_ERROR,
    Claim,
    Failure,
    Finish,
    Finished,
    Limits,
    Listing,
    Longest,
    Overview,
    Pause,
    Policy,
    Position,
    Record,
    Refusal,
    Refused,
    Report,
    Request,
    Run,
    Running,
    Scheduled,
    Status,
    Survey,
    Verdict,
    Wakeup,
    Watch,
    Whereabouts,
    cut,
)
from celery_goalstate.index.counters import (
    FAILED,
    MOST_ACTIONS,
    OK,
    OTHER,
    UNKNOWN,
    Outcome,
    Result,
    bound_of,
)

T = TypeVar("T")

NEVER = math.inf
PENDING = (Status.PARKED, Status.SENT)
#: The clock was set back if a survey was made later than so long from now (ms).
SET_BACK = 1_000


@dataclass(slots=True)
class Entity:
    """One entity, as its hash holds it. `status` and `score` are what the five sorted sets have."""

    id: str
    status: Status | None = None  # None: not known
    score: float = 0  # parked and sent: deadline; running: the count at which its lease ends;
    #                   idle: expiry, or NEVER; failed: since when
    suspect_at: int | None = None  # sent: when its message is missed
    deadline: int | None = None  # of the pending evaluation
    asked: int | None = None  # when that was asked for, if as a delay
    since: int | None = None  # first enqueue from outside that is still pending
    own: int | None = None  # deadline asked for by the entity's own evaluation under way
    own_asked: int | None = None  # when that was asked for
    floor: int | None = None  # no enqueue may come before this
    token: str = ""
    task_id: str = ""
    retries: int = 0  # of task_id; above 0 the pending evaluation is a retry and keeps its task id
    resends: int = 0
    resent: int | None = None
    lease: str = ""
    nonce: str = ""  # of the claim that holds the lease
    batch: bool = False  # claimed together with others
    alone: bool = False  # lost with a batch: not to be claimed with others until it was evaluated
    due: int | None = None  # the deadline of the evaluation under way
    deleted: bool = False  # while it was running
    failures: int = 0
    rounds: int = 0
    error: str = ""
    failing: int | None = None  # since when there is an error, and no quarantine
    history: tuple[Failure, ...] = ()  # newest first
    state: str = ""
    goal: str = ""
    step: str = ""
    long: bool = False  # the lease of the evaluation under way was renewed
    whereabouts: Whereabouts | None = None
    converged: bool | None = None
    finished: int | None = None
    last: str = ""  # the last report that was accepted
    note: str = ""  # of the last enqueue that changed the deadline
    born: int = 0  # the token of the `delete_all` under way when this life began; 0: none was


@dataclass(slots=True)
class Shard:
    """What one kind has: in Redis, the keys of a shard."""

    entities: dict[str, Entity] = field(default_factory=dict)
    last_token: int = 0
    paused: Pause | None = None
    newest_arrival: int = 0  # when the newest message that has arrived at a worker was sent
    sweeper: str = ""
    swept_until: int = 0
    count: int = 0  # by which leases end
    newest_survey: int = 0  # the time of it, by the index's clock
    all_deleted: int = 0  # the token of a `delete_all` that goes on: every life that began before it is over
    met: int = 0  # how many of them were deleted since
    counters: Counter[str] = field(default_factory=Counter)  # as `counters.py` names them

    def with_status(self, status: Status) -> list[Entity]:
        """The entities in one status, lowest score first."""
        found = [entity for entity in self.entities.values() if entity.status is status]
        return sorted(found, key=lambda entity: (entity.score, entity.id.encode()))


@dataclass(slots=True)
class Transition:
    """What the transitions share. One instance is one call, as of a script: it is always the same time."""

    shard: Shard
    limits: Limits
    now: int

    def next_token(self) -> str:
        """Tokens only grow."""
        self.shard.last_token = max(self.shard.last_token + 1, self.now * 1000)
        return str(self.shard.last_token)

    def newest_arrival(self) -> int:
        """Not known if it lies in the future: the clock was set back."""
        return self.shard.newest_arrival if self.shard.newest_arrival <= self.now else 0

    def lease_end(self) -> int:
        """The count at which a lease ends that is given now."""
        return self.shard.count + self.limits.lease + self.limits.margin

    def began(self, lease: str) -> int:
        """When a run began: its lease is the time in microseconds."""
        return int(lease) // 1000

    def save(self, entity: Entity, status: Status, score: float | None = None) -> None:
        """Without a score the entity stays where it is in its status."""
        if status is not Status.SENT:
            entity.suspect_at = None
        is_failing = entity.error != "" and status is not Status.FAILED
        entity.failing = (entity.failing or self.now) if is_failing else None
        entity.status = status
        entity.score = entity.score if score is None else score
        self.shard.entities[entity.id] = entity

    def since_now(self, time: int | None, asked: int | None) -> tuple[int | None, int | None]:
        if asked is None or asked <= self.now:
            return time, asked
        return None if time is None else self.now + max(0, time - asked), self.now

    def set_afresh(self, entity: Entity) -> bool:
        """A delay is a delay: if the clock was set back behind it, it begins anew. What was due is due.

        Whether anything changed.
        """
        before = copy.copy(entity)
        entity.deadline, entity.asked = self.since_now(entity.deadline, entity.asked)
        entity.own, entity.own_asked = self.since_now(entity.own, entity.own_asked)
        entity.floor, entity.finished = self.since_now(entity.floor, entity.finished)
        entity.since = earliest(entity.since, self.now) if entity.since else None
        entity.due = earliest(entity.due, self.now) if entity.due else None
        return entity != before

    def open(self, id: str) -> Entity:
        """What is known of an entity; a change counts once it is saved."""
        known = self.shard.entities.get(id)
        entity = copy.copy(known) if known else Entity(id)
        if entity.status and self.set_afresh(entity):
            # At once: set afresh by whoever looks next, a retry would never come.
            pending = entity.status in {Status.PARKED, Status.SENT}
            self.save(entity, entity.status, entity.deadline if pending else None)
            entity = copy.copy(entity)
        return self.alive(entity)

    def keep_note(self, entity: Entity, note: str) -> None:
        """What the last enqueue that changed the deadline noted is kept while anything is pending or runs."""
        entity.note = note

    def with_note(self, entity: Entity, wakeup: Wakeup | None) -> Wakeup | None:
        return wakeup and wakeup._replace(note=entity.note)

    def forget_history(self, entity: Entity) -> None:
        entity.history = ()

    def remove(self, entity: Entity) -> None:
        del self.shard.entities[entity.id]

    def deleted_before(self) -> int:
        return self.shard.all_deleted

    def begin_life(self, entity: Entity) -> None:
        """A life begins, which no `delete_all` that goes on already is about."""
        entity.born = self.deleted_before()

    def delete_running(self, entity: Entity) -> bool:
        known = not entity.deleted or entity.deadline is not None
        entity.deleted = True
        entity.deadline = entity.asked = entity.since = entity.own = entity.own_asked = None
        entity.error, entity.long, entity.whereabouts = "", False, None
        self.begin_life(entity)
        self.keep_note(entity, "")
        self.forget_history(entity)
        self.save(entity, Status.RUNNING)
        return known

    def delete(self, entity: Entity) -> bool:
        """Whether it was known."""
        if entity.status is None:
            return False
        if entity.status is Status.RUNNING:
            return self.delete_running(entity)
        self.remove(entity)
        return True

    def alive(self, entity: Entity) -> Entity:
        """The entity, but nothing of a life that `delete_all` has ended: that is deleted where it is met."""
        if entity.status and entity.born < self.deleted_before():
            self.shard.met += self.delete(entity)
            entity = copy.copy(self.shard.entities.get(entity.id) or Entity(entity.id))
        if entity.status is None:
            self.begin_life(entity)
        return entity

    def is_named(self, action: str) -> bool:
        """Whether an action is counted by its name: the first ones are.

        One that is named anew each time would fill the index.
        """
        counters = self.shard.counters
        if f"named:{action}" not in counters and counters["named"] < MOST_ACTIONS:
            counters[f"named:{action}"] = 1
            counters["named"] += 1
        return f"named:{action}" in counters

    def count(self, counter: str, n: int = 1, action: str = "") -> None:
        """The name of a counter of an action ends with that of the action."""
        if not self.limits.metrics or n == 0:
            return
        is_new = counter + action not in self.shard.counters
        if is_new and action and not self.is_named(action):
            action = OTHER
        self.shard.counters[counter + action] += n

    def under_way(self) -> int:
        return len(self.shard.with_status(Status.SENT))

    def is_near(self, deadline: int) -> bool:
        return deadline <= self.now + self.limits.eta_horizon

    def forget_message(self, entity: Entity) -> None:
        """There is no wake-up under way any more, or none that counts; a retry keeps its task id."""
        entity.token, entity.resends, entity.resent = "", 0, None
        if not entity.retries:
            entity.task_id = ""

    def forget_pending(self, entity: Entity) -> None:
        entity.retries = 0
        self.forget_message(entity)
        entity.deadline = entity.asked = entity.since = entity.floor = None

    def wakeup(self, entity: Entity, shortest: int = 0) -> Wakeup:
        """Reply: the message to publish."""
        return Wakeup(
            entity.id,
            entity.token,
            max(shortest, _known(entity.deadline) - self.now),
            entity.task_id,
            entity.retries,
            entity.resent,
            entity.alone,
        )

    def send(self, entity: Entity, task_id: str) -> Wakeup:
        entity.token = self.next_token()
        if not entity.retries:
            entity.task_id = task_id
        entity.suspect_at = max(_known(entity.deadline), self.now) + self.limits.resend_after
        self.save(entity, Status.SENT, entity.deadline)
        return self.wakeup(entity)

    def park(self, entity: Entity) -> None:
        self.forget_message(entity)
        self.save(entity, Status.PARKED, entity.deadline)

    def has_room(self, entity: Entity) -> bool:
        """Half of the window is kept for the sweeper's promotions.

        So that those who enqueue now never starve those who have waited for long.
        """
        others = self.under_way() - (entity.status is Status.SENT)
        return others < (self.limits.window + 1) // 2

    def place(self, entity: Entity, deadline: int, task_id: str) -> Wakeup | None:
        """Put a pending evaluation where it belongs: sent, with a new token, or parked."""
        entity.deadline = deadline
        if self.is_near(deadline) and not self.shard.paused and self.has_room(entity):
            return self.send(entity, task_id)
        self.save(entity, Status.PARKED, deadline)
        return None

    def note_own(self, entity: Entity, deadline: int, note: str) -> Scheduled:
        """The entity's own evaluation is asked for by itself: only noted; `Finishing` acts on it."""
        before = earliest(entity.deadline, entity.own)
        if entity.own != deadline:
            entity.own, entity.own_asked = deadline, self.now
        after = earliest(entity.deadline, entity.own)
        if after != before:
            self.keep_note(entity, note)
        self.save(entity, Status.RUNNING)
        return Scheduled(after != before, after, None)

    def again(self, entity: Entity, deadline: int, task_id: str, note: str = "") -> Scheduled:
        """The word of an evaluation that is not the one in force (any more).

        One more evaluation follows, unless one that starts after this word is pending already.
        """
        match entity.status:
            case Status.RUNNING if not entity.deleted:
                return self.note_own(entity, _known(earliest(entity.own, deadline)), note)
            case Status.IDLE:
                entity.rounds, entity.task_id, entity.asked = 0, "", self.now
                self.keep_note(entity, note)
                return Scheduled(True, deadline, self.place(entity, deadline, task_id))
            case Status.SENT if entity.task_id == task_id:
                return Scheduled(True, entity.deadline, self.wakeup(entity))  # the first reply was lost
            case Status.PARKED | Status.SENT:
                return Scheduled(False, entity.deadline, None)
        return Scheduled(False, None, None)


@dataclass(slots=True)
class Enqueuing(Transition):
    """As `enqueue.lua`."""

    policy: Policy
    max_wait: int | None
    inside: Run | None

    @property
    def resync(self) -> bool:
        return self.policy in {Policy.RESYNC, Policy.REVIVE}

    def asked_by_itself(self, entity: Entity) -> bool:
        return self.inside is not None and self.inside.id == entity.id

    def asked_by_its_run(self, entity: Entity) -> bool:
        """Whether the evaluation that enqueues its own entity is the one in force."""
        return self.inside == Run(entity.id, entity.lease) and not entity.deleted

    def is_resynced(self, entity: Entity) -> bool:
        """A resync has nothing to add to an evaluation under way."""
        return self.resync and entity.status is Status.RUNNING and not entity.deleted

    def asked(self, request: Request) -> int | None:
        """When a delay was asked for; None: it is a point in time."""
        return self.now if request.at is None else None

    def is_repeated(self, entity: Entity, request: Request) -> bool:
        """The same request again, since the first reply was lost: its wake-up is still to be published."""
        return entity.token != "" and entity.task_id == request.task_id

    def choose(self, current: int | None, wanted: int, entity: Entity) -> int:
        """Which of the deadline in force and the one asked for is to be in force."""
        if self.policy is Policy.REPLACE and self.max_wait is not None:
            wanted = min(wanted, max(self.now, (entity.since or self.now) + self.max_wait))
        wanted = max(wanted, entity.floor or 0)
        if self.policy is Policy.REPLACE:
            if current is not None and current <= self.now and wanted <= self.now:
                return current  # overdue already: nothing moves it back in the queue
            return wanted
        return wanted if current is None else min(current, wanted)

    def enqueue_running(self, entity: Entity, request: Request, wanted: int) -> Scheduled:
        """A deadline is only noted; `Finishing` acts on it."""
        before = earliest(entity.deadline, entity.own)
        if self.is_resynced(entity) or (self.resync and before is not None):
            return Scheduled(False, before, None)
        deadline = self.choose(entity.deadline, wanted, entity)
        if deadline != entity.deadline:
            entity.deadline, entity.asked = deadline, self.asked(request)
        entity.since = entity.since or self.now
        after = earliest(entity.deadline, entity.own)
        if after != before:
            self.keep_note(entity, request.note)
        self.save(entity, Status.RUNNING)
        return Scheduled(after != before, after, None)

    def message_may_stay(self, entity: Entity, deadline: int) -> bool:
        """Its message arrives early and is sent again then: a burst of calls sends one message."""
        later = entity.status is Status.SENT and deadline > _known(entity.deadline)
        return later and self.is_near(deadline) and not self.shard.paused

    def enqueue_pending(self, entity: Entity, request: Request, wanted: int) -> Scheduled:
        if self.resync:
            return Scheduled(False, entity.deadline, None)
        deadline = self.choose(entity.deadline, wanted, entity)
        entity.since = entity.since or self.now
        if deadline == entity.deadline:
            self.save(entity, _known(entity.status))
            if self.is_repeated(entity, request):
                return Scheduled(True, deadline, self.wakeup(entity))
            return Scheduled(False, deadline, None)
        self.keep_note(entity, request.note)
        entity.asked = self.asked(request)
        if self.message_may_stay(entity, deadline):
            repeated = self.is_repeated(entity, request)
            entity.deadline, entity.resends, entity.resent = deadline, 0, None
            entity.suspect_at = deadline + self.limits.resend_after
            self.save(entity, Status.SENT, deadline)
            return Scheduled(True, deadline, self.wakeup(entity) if repeated else None)
        entity.retries = 0
        self.forget_message(entity)
        return Scheduled(True, deadline, self.place(entity, deadline, request.task_id))

    def enqueue_idle(self, entity: Entity, request: Request, wanted: int) -> Scheduled:
        entity.failures, entity.error, entity.rounds, entity.task_id = 0, "", 0, ""
        deadline = self.choose(None, wanted, entity)
        entity.since, entity.asked = self.now, self.asked(request)
        self.keep_note(entity, request.note)
        return Scheduled(True, deadline, self.place(entity, deadline, request.task_id))

    def enqueue_failed(self, entity: Entity, request: Request, wanted: int) -> Scheduled:
        if self.policy is Policy.RESYNC:
            return Scheduled(False, None, None)
        return self.enqueue_idle(entity, request, wanted)

    def enqueue_itself(self, entity: Entity, request: Request, wanted: int) -> Scheduled:
        if self.asked_by_its_run(entity):
            return self.note_own(entity, self.choose(entity.own, wanted, entity), request.note)
        return self.again(entity, wanted, request.task_id, request.note)

    def enqueue_by_status(self, entity: Entity, request: Request) -> Scheduled:
        asked = self.now + (request.delay or 0) if request.at is None else request.at
        wanted = max(self.now, asked)
        if self.asked_by_itself(entity) and not self.is_resynced(entity):
            return self.enqueue_itself(entity, request, wanted)
        match entity.status:
            case Status.RUNNING:
                return self.enqueue_running(entity, request, wanted)
            case Status.PARKED | Status.SENT:
                return self.enqueue_pending(entity, request, wanted)
            case Status.FAILED:
                return self.enqueue_failed(entity, request, wanted)
        return self.enqueue_idle(entity, request, wanted)  # or not known at all

    def result_of(
        self, status: Status | None, deadline: int | None, entity: Entity, reply: Scheduled
    ) -> Result:
        """What it came to, as it is counted. A message that is published once more changes no deadline."""
        if not reply.changed:
            return Result.UNCHANGED
        if status is Status.RUNNING:
            return Result.NOTED
        if status in PENDING:
            return Result.UNCHANGED if entity.deadline == deadline else Result.EARLIER
        return Result.NEW

    def enqueue(self, entity: Entity, request: Request) -> Scheduled:
        status, deadline = entity.status, entity.deadline
        pending = earliest(entity.deadline, entity.own) is not None
        noted = entity.note if pending and request.note not in {"", entity.note} else None
        reply = self.enqueue_by_status(entity, request)
        self.count(f"enqueues:{self.result_of(status, deadline, entity, reply)}")
        return reply._replace(noted=noted)


class PuttingBack(Transition):
    """As `put_back.lua`."""

    def is_expected(self, entity: Entity, token: str) -> bool:
        return entity.status is Status.SENT and entity.token == token

    def put_back(self, entity: Entity, wakeup: Wakeup) -> None:
        if self.is_expected(entity, wakeup.token):
            self.park(entity)


@dataclass(slots=True)
class Leasing(Transition):
    """What gives leases, as `common.lua` has it."""

    nonce: str
    task_id: str

    def claimed(self, entity: Entity) -> Claim:
        """Reply: the lease that a claim holds. If the claim is repeated it lasts from then."""
        due = _known(entity.due)
        self.save(entity, Status.RUNNING, self.lease_end())
        lateness = max(0, self.now - due)
        return Claim(entity.id, entity.lease, entity.failures, entity.rounds, due, lateness)

    def lease(self, entity: Entity, batch: bool) -> Claim:
        due = entity.deadline
        self.forget_pending(entity)
        entity.lease, entity.nonce, entity.due = self.next_token(), self.nonce, due
        entity.task_id = self.task_id
        entity.batch = batch and not entity.alone
        return self.claimed(entity)


@dataclass(slots=True)
class Claiming(Leasing):
    """As `claim.lua`."""

    resent_at: int | None
    batch: bool

    def refused(self, entity: Entity, reason: Refused, wakeup: Wakeup | None = None) -> Refusal:
        self.count(f"refusals:{reason}")
        return Refusal(entity.id, reason, wakeup)

    def is_missing(self, entity: Entity) -> bool:
        return entity.status is None or entity.deleted

    def is_repeated(self, entity: Entity) -> bool:
        """The same claim again, since the reply to the first was lost."""
        return entity.status is Status.RUNNING and entity.nonce == self.nonce

    def is_expected(self, entity: Entity, token: str) -> bool:
        return entity.status is Status.SENT and entity.token == token

    def note_arrival(self, entity: Entity, token: str) -> None:
        """A token is the time at which it was sent; one in the future tells nothing.

        That it was sent again counts if the index knows it, too, not by the message alone.
        """
        for sent in (int(token) // 1000, min(self.resent_at or 0, entity.resent or 0)):
            if self.newest_arrival() < sent <= self.now:
                self.shard.newest_arrival = sent

    def is_early(self, entity: Entity) -> bool:
        return _known(entity.deadline) > self.now

    def claim(self, entity: Entity, token: str) -> Claim | Refusal:
        if self.is_missing(entity):
            return self.refused(entity, Refused.MISSING)
        if self.is_repeated(entity):
            return self.claimed(entity)
        if not self.is_expected(entity, token):
            return self.refused(entity, Refused.STALE)
        self.note_arrival(entity, token)
        if self.shard.paused:
            self.park(entity)
            return self.refused(entity, Refused.PAUSED)
        if not self.is_near(_known(entity.deadline)):
            # Sent by who had a longer horizon, or before the clock was set back: no worker waits so long.
            self.park(entity)
            return self.refused(entity, Refused.EARLY)
        if self.is_early(entity):
            again = self.wakeup(entity, self.limits.shortest_delay)
            return self.refused(entity, Refused.EARLY, self.with_note(entity, again))
        return self.lease(entity, self.batch)


class Taking(Leasing):
    """As `overdue.lua` and `take.lua`."""

    def overdue(self, limit: int) -> list[str]:
        if self.shard.paused:
            return []
        parked = self.shard.with_status(Status.PARKED)
        return [entity.id for entity in parked if entity.score <= self.now][:limit]

    def may_be_taken(self, entity: Entity) -> bool:
        free = not entity.alone and not entity.note  # which is for a message to carry
        return entity.status is Status.PARKED and not self.shard.paused and free

    def take(self, entity: Entity) -> Claim | None:
        return self.lease(entity, batch=True) if self.may_be_taken(entity) else None


class Renewing(Transition):
    """As `renew.lua`."""

    def holds_lease(self, entity: Entity, run: Run) -> bool:
        return entity.status is Status.RUNNING and entity.lease == run.lease

    def keep_whereabouts(self, entity: Entity, where: str) -> None:
        if where:
            entity.whereabouts = Whereabouts(self.now, where)

    def renew(self, entity: Entity, run: Run, where: str) -> bool:
        if not self.holds_lease(entity, run):
            return False
        if not entity.deleted:
            entity.long = True
            self.keep_whereabouts(entity, where)
        self.save(entity, Status.RUNNING, self.lease_end())
        return True


@dataclass(frozen=True, slots=True)
class Ended:
    """What a run leaves behind."""

    unstarted: bool
    deleted: bool
    since: int | None
    due: int | None
    own: int | None
    outside: int | None
    asked: int | None  # when the one from outside was asked for, if as a delay


class Finishing(Transition):
    """As `finish.lua`."""

    def holds_lease(self, entity: Entity, report: Report) -> bool:
        return entity.status is Status.RUNNING and entity.lease == report.lease

    def was_renewed(self, entity: Entity, report: Report) -> bool:
        """Since the sweeper judged by its end; the count has passed that, and only rises."""
        return report.lost_at is not None and entity.score != report.lost_at

    def name_of(self, report: Report) -> str:
        """How the last report that was accepted is remembered."""
        return report.lease if report.lost_at is None else f"{report.lease} lost"

    def is_repeated(self, entity: Entity, report: Report) -> bool:
        """The same report again, since the reply to the first was lost."""
        return entity.last == self.name_of(report)

    def is_unstarted(self, entity: Entity, report: Report) -> bool:
        """Given back, or lost with a batch, for which any of it may be to blame."""
        return report.verdict is Verdict.UNSTARTED or (report.lost_at is not None and entity.batch)

    def outcome_of(self, report: Report) -> Outcome:
        if report.lost_at is not None:
            return Outcome.LOST
        match report.verdict:
            case Verdict.UNSTARTED:
                return Outcome.RETURNED
            case Verdict.DONE if report.converged:
                return Outcome.CONVERGED
            case Verdict.DONE:
                return Outcome.UNCONVERGED if report.delay is None else Outcome.REQUEUED
        return Outcome(report.verdict)

    def count_evaluation(self, report: Report) -> None:
        bound = UNKNOWN if report.lateness is None else bound_of(report.lateness)
        self.count(f"evaluations:{self.outcome_of(report)}:{bound}")
        self.count("lateness", report.lateness or 0)
        for name, took, failed in report.actions:
            outcome = FAILED if failed else OK
            self.count(f"actions:{outcome}:{bound_of(took)}:", 1, name)
            self.count(f"took:{outcome}:", took, name)

    def end_run(self, entity: Entity, report: Report) -> Ended:
        """Take the run's fields away, and return those that decide what follows."""
        run = Ended(
            self.is_unstarted(entity, report),
            entity.deleted,
            entity.since,
            entity.due,
            entity.own,
            entity.deadline,
            entity.asked,
        )
        self.forget_pending(entity)
        entity.lease, entity.nonce = "", ""
        entity.due = entity.own = entity.own_asked = None
        entity.deleted = entity.batch = entity.long = False
        entity.whereabouts = None
        entity.task_id = report.task_id or entity.task_id
        entity.last = self.name_of(report)
        return run

    def shorten_newest(self, entity: Entity) -> None:
        """Only the newest failure keeps its whole error."""
        if entity.history:
            newest, *older = entity.history
            entity.history = (newest._replace(error=cut(newest.error, BYTES_OF_PAST_ERROR)), *older)

    def keep_failure(self, entity: Entity, report: Report) -> None:
        self.shorten_newest(entity)
        failure = Failure(self.now, report.state, report.step, report.took, report.error, entity.task_id)
        entity.history = (failure, *entity.history)[: max(1, self.limits.history)]

    def keep_outcome(self, entity: Entity, report: Report) -> None:
        entity.alone = report.lost_at is not None and entity.alone
        if report.error:
            self.keep_failure(entity, report)
        entity.failures, entity.rounds = report.failures, report.rounds
        entity.error = cut(report.error, BYTES_OF_ERROR)
        if report.lost_at is None:  # the sweeper has seen nothing
            entity.state, entity.goal = report.state, report.goal
        entity.step = report.step
        entity.converged = report.converged
        entity.finished = self.now

    def rest(self, entity: Entity, report: Report) -> Finished:
        self.keep_note(entity, "")
        self.save(entity, Status.IDLE, NEVER if report.idle_ttl is None else self.now + report.idle_ttl)
        return Finished(Finish.ACCEPTED)

    def schedule(self, entity: Entity, report: Report, run: Ended, deadline: int) -> Finished:
        entity.since = run.since
        entity.asked = run.asked if deadline == run.outside else self.now
        if not entity.retries:
            entity.task_id = ""
        wakeup = self.with_note(entity, self.place(entity, deadline, report.fresh_task_id))
        return Finished(Finish.ACCEPTED, deadline, wakeup)

    def asks_again(self, report: Report) -> bool:
        """Its late write may have undone what another evaluation did. The sweeper writes nothing."""
        given = report.lease.isdecimal() and int(report.lease) <= self.shard.last_token
        return report.began and report.lost_at is None and given

    def count_fenced(self, report: Report) -> None:
        """Neither the sweeper nor who gives a run back has an outcome to be dropped."""
        if report.lost_at is None and report.verdict is not Verdict.UNSTARTED:
            self.count("fenced")

    def finish_fenced(self, entity: Entity, report: Report) -> Finished:
        if not self.is_repeated(entity, report):
            self.count_fenced(report)
            if not self.asks_again(report):
                return Finished(Finish.FENCED)
            reply = self.again(entity, self.now, report.fresh_task_id)
            return Finished(Finish.FENCED, reply.deadline, self.with_note(entity, reply.wakeup))
        wakeup = self.with_note(entity, self.wakeup(entity)) if entity.status is Status.SENT else None
        return Finished(Finish.ACCEPTED, entity.deadline, wakeup)

    def finish_deleted(self, entity: Entity, report: Report, run: Ended) -> Finished:
        """Of the old life nothing is left but the name."""
        if run.outside is None:
            self.remove(entity)
            return Finished(Finish.ACCEPTED)
        entity.failures, entity.rounds, entity.error = 0, 0, ""
        entity.converged = entity.finished = None
        entity.state = entity.goal = entity.step = ""
        entity.alone = False
        self.forget_history(entity)
        return self.schedule(entity, report, run, run.outside)

    def finish_unstarted(self, entity: Entity, report: Report, run: Ended) -> Finished:
        entity.alone = entity.alone or report.lost_at is not None
        return self.schedule(entity, report, run, _known(run.due))  # what was noted meanwhile is not earlier

    def finish_done(self, entity: Entity, report: Report, run: Ended) -> Finished:
        again = None if report.delay is None else self.now + report.delay
        deadline = earliest(again, run.own, run.outside)
        if deadline is None:
            return self.rest(entity, report)
        return self.schedule(entity, report, run, deadline)

    def finish_failed(self, entity: Entity, report: Report, run: Ended) -> Finished:
        """What the evaluation enqueued of its own entity is dropped.

        Only what is from outside comes before the back-off.
        """
        retry = self.now + _known(report.delay)
        deadline = retry if report.respect_backoff else _known(earliest(retry, run.outside))
        entity.floor = retry if report.respect_backoff else None
        if deadline == retry and report.task_id:
            entity.retries = report.retries + 1
        return self.schedule(entity, report, run, deadline)

    def finish_quarantined(self, entity: Entity, report: Report, run: Ended) -> Finished:
        if run.outside is None:
            self.keep_note(entity, "")
            self.save(entity, Status.FAILED, self.now)
            return Finished(Finish.ACCEPTED)
        entity.failures, entity.error = 0, ""
        return self.schedule(entity, report, run, run.outside)

    def finish(self, entity: Entity, report: Report) -> Finished:
        if not self.holds_lease(entity, report):
            return self.finish_fenced(entity, report)
        if self.was_renewed(entity, report):
            return Finished(Finish.FENCED)
        self.count_evaluation(report)
        run = self.end_run(entity, report)
        if run.deleted or report.verdict is Verdict.GONE:
            return self.finish_deleted(entity, report, run)
        if run.unstarted:
            return self.finish_unstarted(entity, report, run)
        self.keep_outcome(entity, report)
        match report.verdict:
            case Verdict.DONE:
                return self.finish_done(entity, report, run)
            case Verdict.FAILED:
                return self.finish_failed(entity, report, run)
        return self.finish_quarantined(entity, report, run)


class Deleting(Transition):
    """As `delete.lua`."""


class DeletingAll(Transition):
    """As `delete_all.lua`."""

    def begin(self) -> int:
        self.shard.all_deleted, self.shard.met = int(self.next_token()), 0
        return self.shard.all_deleted

    def over(self, token: int) -> int:
        """Not over as long as a later call goes on, which is about the same entities."""
        if self.deleted_before() == token:
            self.shard.all_deleted = 0
        return self.shard.met


@dataclass(slots=True)
class Pausing(Transition):
    """As `pause.lua`."""

    by: str

    def pause(self) -> bool:
        """Who was first stays known."""
        if self.shard.paused:
            return False
        self.shard.paused = Pause(self.now, self.by)
        return True


class Overviewing(Transition):
    """As `overview.lua`."""

    def up_to_now(self, status: Status) -> int:
        return sum(entity.score <= self.now for entity in self.shard.with_status(status))

    def oldest(self, since: list[int]) -> int | None:
        """How old the oldest is."""
        first = min(since, default=None)
        return None if first is None or first > self.now else self.now - first

    def longest(self) -> Longest | None:
        running = {
            entity.id: self.began(entity.lease)
            for entity in self.shard.with_status(Status.RUNNING)
            if entity.long
        }
        age = self.oldest(list(running.values()))
        return None if age is None else Longest(min(running, key=lambda id: (running[id], id.encode())), age)

    def unswept(self) -> int | None:
        if self.shard.swept_until > self.now:
            return None
        newest = self.shard.newest_survey
        return max(0, self.now - newest) if newest else -1

    def overview(self) -> Overview:
        pending = [e for status in PENDING for e in self.shard.with_status(status)]
        failing = [entity.failing for entity in self.shard.entities.values() if entity.failing is not None]
        return Overview(
            counts={status: len(self.shard.with_status(status)) for status in Status},
            overdue=sum(self.up_to_now(status) for status in PENDING),
            oldest=self.oldest([_known(entity.deadline) for entity in pending]),
            failing=len(failing),
            failing_for=self.oldest(failing),
            longest=self.longest(),
            paused=self.shard.paused,
            unswept=self.unswept(),
        )


class ForgettingKind(Transition):
    """As `forget_kind.lua`."""

    def is_empty(self) -> bool:
        return not (self.shard.entities or self.shard.paused or self.shard.all_deleted)

    def forget_kind(self) -> bool:
        """The last token stays."""
        if not self.is_empty():
            return False
        self.shard.newest_arrival = self.shard.count = self.shard.newest_survey = 0
        self.shard.sweeper, self.shard.swept_until = "", 0
        self.shard.counters.clear()
        return True


@dataclass(slots=True)
class Describing(Transition):
    """As `describe.lua`."""

    whole: bool

    def failing(self, entity: Entity) -> int | None:
        return entity.failing

    def history(self, entity: Entity) -> tuple[Failure, ...]:
        return entity.history if self.whole else entity.history[:1]

    def whereabouts(self, entity: Entity) -> Whereabouts | None:
        return entity.whereabouts

    def describe(self, entity: Entity) -> Record | None:
        if entity.status is None:
            return None
        if entity.deleted:
            again = entity.deadline is not None
            return Record(entity.id, Status.PARKED, deadline=entity.deadline) if again else None
        running = entity.status is Status.RUNNING
        score = int(entity.score) if entity.score != NEVER else None
        left = max(0, entity.score - self.shard.count)
        return Record(
            entity.id,
            entity.status,
            deadline=earliest(entity.deadline, entity.own),
            token=entity.token,
            task_id=entity.task_id,
            lease=entity.lease,
            nonce=entity.nonce,
            lease_expires=self.now + int(left) if running else None,
            failures=entity.failures,
            rounds=entity.rounds,
            error=whole_error(entity.error, entity.history),
            failing=self.failing(entity),
            history=self.history(entity),
            state=entity.state,
            goal=entity.goal,
            step=entity.step,
            whereabouts=self.whereabouts(entity),
            converged=entity.converged,
            finished=entity.finished,
            started=self.began(entity.lease) if running else None,
            since=score if entity.status is Status.FAILED else None,
            expires=score if entity.status is Status.IDLE else None,
            floor=entity.floor,
            alone=entity.alone,
            note=entity.note,
            score=entity.score,
        )


class Paging(Transition):
    """As `page.lua`."""

    def positions(self, listing: Status | Listing) -> list[Position]:
        entities = self.shard.entities.values()
        if listing is Listing.FAILING:
            found = [Position(each.failing, each.id) for each in entities if each.failing is not None]
        elif listing is Listing.LONG:
            found = [Position(self.began(each.lease), each.id) for each in entities if each.long]
        else:
            found = [Position(each.score, each.id) for each in entities if each.status is listing]
        return sorted(found, key=_order)

    def is_after(self, position: Position, other: Position) -> bool:
        return _order(position) > _order(other)

    def page(self, listing: Status | Listing, limit: int, after: Position | None) -> list[Position]:
        found = [each for each in self.positions(listing) if after is None or self.is_after(each, after)]
        return found[:limit]


@dataclass(slots=True)
class Surveying(Transition):
    """As `survey.lua`."""

    sweeper: str
    hold: int
    limit: int
    watch: Watch | None

    def held_by_another(self) -> bool:
        """What lasts for longer than a hold can was written before the clock was set back."""
        lasts = self.shard.swept_until - self.now
        return 0 < lasts <= 2 * self.hold and self.shard.sweeper != self.sweeper

    def counted(self) -> int:
        """The count, with the time that has passed since this sweeper's last survey.

        If another sweeper has counted since, that time may be in it already.
        """
        if self.watch is None or self.watch.count != self.shard.count:
            return self.shard.count
        return self.shard.count + min(self.watch.passed, self.limits.margin)

    def up_to(self, time: int, status: Status, most: int) -> tuple[str, ...]:
        return tuple([entity.id for entity in self.shard.with_status(status) if entity.score <= time][:most])

    def due(self) -> tuple[str, ...]:
        room = max(0, min(self.limit, self.limits.window - self.under_way()))
        return self.up_to(self.now + self.limits.eta_horizon, Status.PARKED, room)

    def is_set_back(self) -> bool:
        return self.shard.newest_survey > self.now + SET_BACK

    def put_off(self) -> tuple[tuple[str, ...], str | None]:
        """Parked entities beyond the horizon, which may wait for a delay, and where to go on."""
        if self.watch is None or self.watch.cursor is None or not self.is_set_back():
            return (), None
        horizon = self.now + self.limits.eta_horizon
        beyond = sorted(
            entity.id for entity in self.shard.with_status(Status.PARKED) if entity.score > horizon
        )
        left = [id for id in beyond if id > self.watch.cursor]
        found = tuple(left[: self.limit])
        return found, found[-1] if len(left) > self.limit else None

    def by_suspicion(self) -> list[Entity]:
        sent = self.shard.with_status(Status.SENT)
        return sorted(sent, key=lambda entity: (_known(entity.suspect_at), entity.id))

    def missed(self, time: int, most: int) -> list[str]:
        return [entity.id for entity in self.by_suspicion() if _known(entity.suspect_at) <= time][:most]

    def too_far(self) -> list[str]:
        """Those that would be missed later than any can be: the clock was set back."""
        latest = latest_suspicion(self.now, self.limits)
        return [entity.id for entity in self.by_suspicion() if _known(entity.suspect_at) > latest]

    def suspect(self) -> tuple[str, ...]:
        found = self.missed(self.newest_arrival(), self.limit)
        found = found or self.missed(self.now, 1)  # for a probe
        return tuple([*found, *self.too_far()][: self.limit])

    def lost(self) -> tuple[tuple[str, int], ...]:
        running = [(entity.id, int(entity.score)) for entity in self.shard.with_status(Status.RUNNING)]
        return tuple([(id, end) for id, end in running if end <= self.shard.count][: self.limit])

    def expired(self) -> tuple[str, ...]:
        return self.up_to(self.now, Status.IDLE, self.limit)

    def survey(self, kind: str) -> Survey | None:
        if self.held_by_another():
            return None
        self.shard.sweeper, self.shard.swept_until = self.sweeper, self.now + self.hold
        self.shard.count = self.counted()
        self.shard.newest_survey = max(self.shard.newest_survey, self.now)
        found = Survey(
            kind,
            shard=0,
            lost=self.lost(),
            expired=self.expired(),
            count=self.shard.count,
            newest_arrival=self.newest_arrival(),
        )
        if self.shard.paused:
            return found
        put_off, cursor = self.put_off()
        return dataclasses.replace(
            found,
            due=self.due() + put_off,
            suspect=self.suspect(),
            set_back=self.is_set_back(),
            cursor=cursor,
        )


class Promoting(Transition):
    """As `promote.lua`."""

    def is_repeated(self, entity: Entity, task_id: str) -> bool:
        """The same request again, since the reply to the first was lost."""
        return entity.status is Status.SENT and entity.task_id == task_id

    def is_waiting(self, entity: Entity) -> bool:
        return entity.status is Status.PARKED and not self.shard.paused

    def promote(self, entity: Entity, task_id: str) -> Wakeup | None:
        if self.is_repeated(entity, task_id):
            return self.with_note(entity, self.wakeup(entity))
        if not self.is_waiting(entity) or not self.is_near(_known(entity.deadline)):
            return None
        if self.under_way() >= self.limits.window:
            return None
        return self.with_note(entity, self.send(entity, task_id))


@dataclass(slots=True)
class Resending(Transition):
    """As `resend.lua`."""

    probe: str | None

    def is_repeated(self, entity: Entity, task_id: str) -> bool:
        """The same request again, since the reply to the first was lost."""
        return entity.task_id == task_id

    def is_lost(self, entity: Entity) -> bool:
        return _known(entity.suspect_at) <= (self.now if entity.id == self.probe else self.newest_arrival())

    def is_too_far(self, entity: Entity) -> bool:
        """It would be missed later than any can be: the clock was set back."""
        return _known(entity.suspect_at) > latest_suspicion(self.now, self.limits)

    def resend(self, entity: Entity, task_id: str) -> Wakeup | None:
        if entity.status is not Status.SENT or self.shard.paused:
            return None
        if self.is_repeated(entity, task_id):
            return self.with_note(entity, self.wakeup(entity))
        if self.is_too_far(entity):
            # Not sent again at once: all that were sent before the step would be.
            entity.suspect_at = self.now + self.limits.resend_after
            self.save(entity, Status.SENT)
        if not self.is_lost(entity):
            return None
        entity.resends += 1
        entity.resent, entity.task_id, entity.retries = self.now, task_id, 0
        intervals = min(2**entity.resends, self.limits.resend_intervals)
        entity.suspect_at = self.now + self.limits.resend_after * intervals
        self.save(entity, Status.SENT)
        self.count("resends")
        return self.with_note(entity, self.wakeup(entity))


class ListingRuns(Transition):
    """As `running.lua`."""

    def running(self, entity: Entity) -> Running | None:
        if entity.status is not Status.RUNNING:
            return None
        return Running(entity.id, entity.lease, entity.failures)


class Forgetting(Transition):
    """As `forget.lua`."""

    def is_past_its_time(self, entity: Entity) -> bool:
        return entity.score <= self.now

    def forget(self, entity: Entity) -> bool:
        if entity.status is not Status.IDLE or not self.is_past_its_time(entity):
            return False
        self.remove(entity)
        return True


class Adopting(Transition):
    """As `adopt.lua`."""

    def is_known(self, entity: Entity) -> bool:
        return entity.status is not None

    def adopt_history(self, entity: Entity, record: Record) -> None:
        entity.history = record.history

    def adopt(self, entity: Entity, record: Record) -> None:
        if self.is_known(entity):
            return
        entity.failures, entity.rounds = record.failures, record.rounds
        entity.error, entity.failing = cut(record.error, BYTES_OF_ERROR), record.failing
        entity.state, entity.goal, entity.step = record.state, record.goal, record.step
        self.adopt_history(entity, record)
        entity.converged, entity.finished, entity.alone = record.converged, record.finished, record.alone
        self.keep_note(entity, record.note)
        if record.deadline is not None:
            entity.deadline, entity.floor = record.deadline, record.floor
            self.save(entity, Status.PARKED, record.deadline)
            return
        entity.task_id = record.task_id
        score = record.since if record.status is Status.FAILED else record.expires
        self.save(entity, record.status, NEVER if score is None else score)


class Retiring(Transition):
    """As `retire.lua`."""

    def is_as_described(self, entity: Entity, record: Record) -> bool:
        return (entity.deadline, entity.finished) == (record.deadline, record.finished)

    def retire(self, entity: Entity, record: Record) -> bool:
        if entity.status is None:
            return True
        if entity.status is Status.RUNNING or not self.is_as_described(entity, record):
            return False
        self.remove(entity)
        return True


def latest_suspicion(now: int, limits: Limits) -> int:
    """No message that was sent by now is missed later than that."""
    return now + limits.eta_horizon + limits.resend_after * limits.resend_intervals


def whole_error(error: str, history: Sequence[Failure]) -> str:
    """The error of a record as its newest failure has it, unless that is about another one."""
    newest = history[0].error if history else ""
    return newest if error and newest.startswith(error) else error


def _order(position: Position) -> tuple[float, bytes]:
    return position.score, position.id.encode()


def earliest(*deadlines: int | None) -> int | None:
    """The earliest of those that are given."""
    return min((deadline for deadline in deadlines if deadline is not None), default=None)


def _known(value: T | None) -> T:
    """What is known in this status."""
    assert value is not None  # noqa: S101 - for mypy: the callers have asked
    return value
