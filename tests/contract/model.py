"""What a user may expect of an entity, and nothing of how an index does it.

The model knows enqueues, deadlines, deletes, evaluations and time. It has no statuses, no tokens and no
messages: whether a message is the right one is the index's business; that an evaluation may start is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from celery_goalstate.index.base import Policy, Verdict


@dataclass(eq=False)
class Evaluation:
    """One evaluation, from its claim on. `over` once its end was accepted, or once it was given up."""

    id: str
    lease: str
    began: int  #: when in the order of all that happened
    renewed: int  #: the lease, on a clock that never steps
    judged: int | None = None  #: the count by which the sweeper found it lost; None: not since it was renewed
    deleted: bool = False  #: its entity was deleted meanwhile
    over: bool = False
    batch: bool = False  #: claimed together with others: not to be blamed when its worker is lost
    due: int | None = None  #: since when it was due
    served: list[Ask] = field(default_factory=list)  #: the enqueues that it answers, if it comes to that


@dataclass
class Ask:
    """An enqueue that is owed an evaluation, one that begins after it."""

    when: int  #: in the order of all that happened
    own: bool = False  #: from inside the entity's own evaluation, whose failure discards it


@dataclass
class Entity:
    """One entity, in the eyes of those who enqueue it."""

    known: bool = False
    due: int | None = None  #: not before this it is evaluated next; None while it is being evaluated
    since: int | None = None  #: the first enqueue from outside that waits
    floor: int = 0  #: no enqueue brings it before this
    failures: int = 0
    rounds: int = 0
    quarantined: bool = False
    alone: bool = False  #: its worker was lost with a batch: not to be evaluated with others
    forgotten_at: int | None = None
    evaluation: Evaluation | None = None
    noted: int | None = None  #: deadline asked for during the evaluation
    own: int | None = None  #: likewise, from inside
    #: When what is pending was asked for as a delay, by the name of its field.
    asked: dict[str, int] = field(default_factory=dict)
    last: tuple[str, bool] | None = None  #: of the report accepted last: lease, whether the sweeper's
    fence: int = 0  #: the highest fencing token seen
    owed: list[Ask] = field(default_factory=list)
    note: str = ""  #: of the last enqueue that changed the deadline, until nothing is pending any more

    @property
    def pending(self) -> int | None:
        """When it is evaluated next, as far as is known now."""
        return earliest(self.noted, self.own) if self.evaluation else self.due

    @property
    def visible(self) -> bool:
        """Whether it exists in the eyes of those who ask."""
        return self.known and not (self.evaluation and self.evaluation.deleted and self.noted is None)

    def enqueue(
        self,
        now: int,
        wanted: int,
        policy: Policy,
        max_wait: int | None,
        inside: str | None,
        note: str,
        relative: bool,
    ) -> tuple[bool, int | None]:
        """Whether the schedule changes, and the deadline in force. `inside`: the lease of its own run."""
        resync = policy in {Policy.RESYNC, Policy.REVIVE}
        wanted = max(wanted, now)
        evaluation, before = self.evaluation, self.pending
        if inside and not (resync and evaluation and not evaluation.deleted):
            if not evaluation or evaluation.lease != inside or evaluation.deleted:
                return self.again(now, wanted, note)
            self._set("own", self._agreed(self.own, wanted, now, policy, max_wait), now, relative=True)
        elif resync and self.visible and (evaluation or self.due is not None):
            return False, before
        elif self.quarantined and policy is Policy.RESYNC:
            return False, None
        elif evaluation:
            self._set("noted", self._agreed(self.noted, wanted, now, policy, max_wait), now, relative)
            self.since = self.since or now
        else:
            if self.due is None:
                self.known, self.quarantined, self.failures, self.rounds = True, False, 0, 0
                self.since = self.forgotten_at = None
            self._set("due", self._agreed(self.due, wanted, now, policy, max_wait), now, relative)
            self.since = self.since or now
        changed = self.pending != before
        if changed:
            self.note = note
        return changed, self.pending

    def again(self, now: int, wanted: int, note: str = "") -> tuple[bool, int | None]:
        """A run that has lost its lease speaks: one more evaluation, unless one is pending."""
        before = self.pending
        if self.evaluation and not self.evaluation.deleted:
            self._set("own", earliest(self.own, wanted), now, relative=True)
        elif self.known and not self.evaluation and self.due is None and not self.quarantined:
            self._set("due", wanted, now, relative=True)
            self.rounds, self.forgotten_at = 0, None
        elif self.evaluation or self.due is None:
            return False, None
        changed = self.pending != before
        if changed:
            self.note = note
        return changed, self.pending

    def _set(self, name: str, deadline: int | None, now: int, relative: bool) -> None:
        if deadline != getattr(self, name):
            self.asked.pop(name, None)
            if relative:
                self.asked[name] = now
        setattr(self, name, deadline)

    def set_back(self, now: int) -> None:
        """The clock was: a delay begins anew, what was due is due, a point in time stays."""
        for name, asked in self.asked.items():
            if asked > now:
                deadline = getattr(self, name)
                setattr(self, name, deadline and now + max(0, deadline - asked))
                self.asked[name] = now
        self.since = self.since and min(self.since, now)
        if self.evaluation and self.evaluation.due is not None:
            self.evaluation.due = min(self.evaluation.due, now)

    def _agreed(
        self, current: int | None, wanted: int, now: int, policy: Policy, max_wait: int | None
    ) -> int | None:
        if policy is not Policy.REPLACE:
            return earliest(current, max(wanted, self.floor))
        if max_wait is not None:
            wanted = min(wanted, max(now, (self.since or now) + max_wait))
        wanted = max(wanted, self.floor)
        return current if current is not None and max(current, wanted) <= now else wanted

    def start(self, evaluation: Evaluation) -> None:
        self.evaluation, self.fence = evaluation, int(evaluation.lease)
        evaluation.due, evaluation.batch = self.due, evaluation.batch and not self.alone
        evaluation.served = [ask for ask in self.owed if ask.when <= evaluation.began]
        self.due = self.since = None
        self.floor = 0
        self.asked = {}
        self.owed = [ask for ask in self.owed if ask.when > evaluation.began]

    def finish(
        self,
        now: int,
        verdict: Verdict,
        delay: int | None,
        failures: int,
        rounds: int,
        respect_backoff: bool,
        idle_ttl: int | None,
        lost: bool,
    ) -> None:
        """Its evaluation ends; `lost`: in the eyes of the sweeper, whose report it is."""
        assert self.evaluation
        evaluation, noted, own = self.evaluation, self.noted, self.own
        self.evaluation = self.noted = self.own = None
        noted_asked = self.asked.get("noted")
        self._finish(evaluation, noted, own, now, verdict, delay, failures, rounds, respect_backoff, lost)
        if self.due is None:
            self.since, self.note = None, ""
            if verdict is Verdict.DONE and idle_ttl is not None and self.known:
                self.forgotten_at = now + idle_ttl
        self.asked = {"floor": now} if self.floor else {}
        if self.due is not None and (self.due != noted or noted_asked is not None):
            self.asked["due"] = noted_asked if self.due == noted and noted_asked is not None else now

    def _finish(
        self,
        evaluation: Evaluation,
        noted: int | None,
        own: int | None,
        now: int,
        verdict: Verdict,
        delay: int | None,
        failures: int,
        rounds: int,
        respect_backoff: bool,
        lost: bool,
    ) -> None:
        evaluation.over = True
        self.last = (evaluation.lease, lost)
        asked = None if delay is None else now + delay
        if evaluation.deleted or verdict is Verdict.GONE:
            self.due, self.known, self.failures, self.rounds = noted, noted is not None, 0, 0
            self.alone = False
            self.note = self.note if self.known else ""
            self.last = self.last if self.known else None
            self.owed = self.owed if self.known else []
            return
        if verdict is Verdict.UNSTARTED or (lost and evaluation.batch):
            self.alone, self.due = self.alone or lost, earliest(evaluation.due, noted)
            self.owed = evaluation.served + self.owed
            return
        self.alone = self.alone and lost
        self.failures, self.rounds = failures, rounds
        if verdict is Verdict.DONE:
            self.due = earliest(asked, noted, own)
        else:
            self.owed = [ask for ask in self.owed if not ask.own]
            self.due = noted
            if verdict is Verdict.FAILED:
                self.due = asked if respect_backoff else earliest(asked, noted)
                self.floor = asked or 0 if respect_backoff else 0
            elif noted is not None:
                self.failures = 0
            else:
                self.quarantined = True

    def delete(self) -> bool:
        """Whether there was something to delete."""
        was_there = self.visible
        self.owed = []
        if self.evaluation:
            self.evaluation.deleted = True
            self.noted = self.own = self.since = None
            self.asked, self.note = {}, ""
        else:
            self.forget()
        return was_there

    def move(self) -> None:
        """It moves away and comes back: since when it waits is forgotten, and for whom."""
        self.since = self.last = None
        self.asked = {}

    def forget(self) -> None:
        """Begin again as if it had never been known; fencing tokens go on rising."""
        self.__dict__.update(Entity(fence=self.fence).__dict__)


def earliest(*deadlines: int | None) -> int | None:
    """The earliest of those that are given."""
    return min((deadline for deadline in deadlines if deadline is not None), default=None)
