"""Rules, each broken: those of the index in Python and in Lua alike, some of what is around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from celery_goalstate.index.base import Policy, Scheduled, Status, Verdict
from celery_goalstate.index.transitions import Entity, earliest
from celery_goalstate.messages.errors import BrokerUnavailable
from tests.mutants.seams import Lua, Python, Seam

#: The state machine comes last: it is needed for what the contract's examples do not show.
CONTRACT = tuple(
    f"tests/contract/test_{name}.py"
    for name in (
        *("claim", "batch", "enqueue", "finish", "clock", "delete", "delete_all", "sweep", "lists", "notes"),
        "move",
        *("lost_replies", "redis", "state_machine"),
    )
)


@dataclass(frozen=True)
class Mutant:
    """One rule broken in one place."""

    rule: str
    seam: Seam
    suite: Sequence[str] = CONTRACT  #: the tests that are to notice

    @property
    def lane(self) -> str:
        """The index that the place belongs to."""
        return "valkey" if isinstance(self.seam, Lua) else "memory"

    def __str__(self) -> str:
        return f"{self.rule} ({self.seam})"


def always(value: Any) -> Any:
    return lambda _: lambda *args: value


def no_token_is_consumed(original: Any) -> Any:
    def lease(self: Any, entity: Entity, batch: bool) -> Any:
        token = entity.token
        claim = original(self, entity, batch)
        entity.token = token
        return claim

    return lease


def counted_by_everybody(_: Any) -> Any:
    def counted(self: Any) -> int:
        passed = self.watch.passed if self.watch else 0
        return int(self.shard.count + min(passed, self.limits.margin))

    return counted


def counted_at_once(_: Any) -> Any:
    def counted(self: Any) -> int:
        known = self.watch is not None and self.watch.count == self.shard.count
        return int(self.shard.count + (self.watch.passed if known else 0))

    return counted


def a_hold_is_believed(_: Any) -> Any:
    def held_by_another(self: Any) -> bool:
        return bool(self.shard.swept_until > self.now and self.shard.sweeper != self.sweeper)

    return held_by_another


def only_in_force(original: Any) -> Any:
    return lambda self, entity: original(self, entity) and self.inside.lease == entity.lease


def before_the_back_off(original: Any) -> Any:
    def again(self: Any, entity: Entity, deadline: int, task_id: str, note: str = "") -> Any:
        if entity.status in {Status.PARKED, Status.SENT}:
            self.forget_message(entity)
            return Scheduled(True, deadline, self.place(entity, deadline, task_id))
        return original(self, entity, deadline, task_id, note)

    return again


def a_record_is_made(original: Any) -> Any:
    def again(self: Any, entity: Entity, deadline: int, task_id: str, note: str = "") -> Any:
        if entity.status is None:
            return Scheduled(True, deadline, self.place(entity, deadline, task_id))
        return original(self, entity, deadline, task_id, note)

    return again


def failures_are_reset(original: Any) -> Any:
    def lease(self: Any, entity: Entity, batch: bool) -> Any:
        entity.failures = 0
        return original(self, entity, batch)

    return lease


def the_mark_is_cleared(original: Any) -> Any:
    def enqueue_running(self: Any, entity: Entity, *args: Any) -> Any:
        scheduled = original(self, entity, *args)
        entity.deleted = False
        return scheduled

    return enqueue_running


def the_later_deadline(original: Any) -> Any:
    def finish_done(self: Any, entity: Entity, report: Any, run: Any) -> Any:
        asked = report.delay is not None and self.now + report.delay
        deadline = max(asked or 0, run.own or 0, run.outside or 0)
        return self.schedule(entity, report, run, deadline) if deadline else self.rest(entity, report)

    return finish_done


def what_it_enqueued_itself(original: Any) -> Any:
    def finish_failed(self: Any, entity: Entity, report: Any, run: Any) -> Any:
        run = dataclasses.replace(run, outside=earliest(run.outside, run.own))
        return original(self, entity, report, run)

    return finish_failed


def nothing_from_outside(original: Any) -> Any:
    return lambda self, entity, report, run: original(
        self, entity, report, dataclasses.replace(run, outside=None)
    )


def no_floor(original: Any) -> Any:
    return lambda self, entity, report, run: original(
        self, entity, report._replace(respect_backoff=False), run
    )


def given_back(choose: Any) -> Any:
    def instead(_: Any) -> Any:
        def finish_unstarted(self: Any, entity: Entity, report: Any, run: Any) -> Any:
            entity.alone = entity.alone or report.lost_at is not None
            return self.schedule(entity, report, run, choose(self, run))

        return finish_unstarted

    return instead


def the_old_life_goes_on(_: Any) -> Any:
    def finish_deleted(self: Any, entity: Entity, report: Any, run: Any) -> Any:
        if run.outside is None:
            return self.rest(entity, report)
        return self.schedule(entity, report, run, run.outside)

    return finish_deleted


def max_wait_comes_first(original: Any) -> Any:
    def choose(self: Any, current: Any, wanted: int, entity: Entity) -> Any:
        if self.policy is Policy.REPLACE and self.max_wait is not None:
            entity.floor = None
        return original(self, current, wanted, entity)

    return choose


def the_latest(original: Any) -> Any:
    def choose(self: Any, current: Any, wanted: int, entity: Entity) -> Any:
        if self.policy is Policy.REPLACE or current is None:
            return original(self, current, wanted, entity)
        return max(current, wanted, entity.floor or 0)

    return choose


def overdue_is_moved(original: Any) -> Any:
    def choose(self: Any, current: Any, wanted: int, entity: Entity) -> Any:
        return original(self, None if self.policy is Policy.REPLACE else current, wanted, entity)

    return choose


def the_message_s_word(_: Any) -> Any:
    def note_arrival(self: Any, entity: Entity, token: str) -> None:
        sent = min(int(token) // 1000, self.now)
        self.shard.newest_arrival = max(self.shard.newest_arrival, sent, self.resent_at or 0)

    return note_arrival


def removed_at_once(_: Any) -> Any:
    def delete_running(self: Any, entity: Entity) -> bool:
        self.remove(entity)
        return True

    return delete_running


def a_retry_s_task_id_goes(_: Any) -> Any:
    def forget_message(self: Any, entity: Entity) -> None:
        entity.token, entity.resends, entity.resent, entity.task_id = "", 0, None, ""

    return forget_message


def unless_it_is_new(original: Any) -> Any:
    """Whoever notes nothing leaves an older note in place."""
    return lambda self, entity, note: original(self, entity, note or entity.note)


def the_first_stays(original: Any) -> Any:
    return lambda self, entity, note: original(self, entity, note and (entity.note or note))


def after_the_first_success(original: Any) -> Any:
    def failed(error: Exception, failures: int, options: Any, **more: Any) -> Any:
        return original(error, 0 if len(more.get("actions", ())) > 1 else failures, options, **more)

    return failed


def refusals_count_as_time_outs(original: Any) -> Any:
    return lambda self, kind, error: original(self, kind, BrokerUnavailable(str(error)))


def at_the_first_one(original: Any) -> Any:
    def timed_out(self: Any) -> None:
        self._time_outs = max(self._time_outs, 2)
        original(self)

    return timed_out


def within(suite: str) -> tuple[str, ...]:
    return (f"tests/{suite}.py",)


AROUND_THE_INDEX = [
    Mutant(
        "a first successful action resets the back-off",
        Python("failed", after_the_first_success, "evaluation"),
        within("unit/test_evaluation"),
    ),
    Mutant(
        "a process believes in its lease for ever",
        Python("_Renewer.held", always(True), "worker.lease"),
        within("integration/test_lease"),
    ),
    Mutant(
        "an entity of a batch starts however late",
        Python(
            "Batch.next",
            lambda _: lambda self: self._waiting.popleft() if self._waiting else None,
            "worker.batch",
        ),
        within("integration/test_batch"),
    ),
    Mutant(
        "the evaluation of a lost worker is not ended",
        Python("Sweeper._end_lost", always(False), "worker.sweeper"),
        within("integration/test_sweeper"),
    ),
    *(
        Mutant(rule, Python(where, instead, "worker.sweeper"), within(suite))
        for rule, where, instead, suite in [
            (
                "a refusal lets all kinds rest",
                "_Rests.failed",
                refusals_count_as_time_outs,
                "integration/test_rests",
            ),
            (
                "a time-out lets the next kind try",
                "_Rests._timed_out",
                lambda _: lambda self: None,
                "integration/test_rests",
            ),
            (
                "the first time-out lets all kinds rest",
                "_Rests._timed_out",
                at_the_first_one,
                "integration/test_rests",
            ),
            (
                "a broker that is away is asked in each sweep",
                "_Rests._timed_out",
                lambda _: lambda self: setattr(self, "_ended", True),
                "integration/test_rests",
            ),
            (
                "a success ends no rest",
                "_Rests.succeeded",
                lambda _: lambda self, kind: None,
                "integration/test_rests",
            ),
            (
                "kinds try in the order in which they were registered",
                "_Rests.turn",
                lambda _: lambda self, kind: (False, 0.0),
                "integration/test_rests",
            ),
            (
                "a probe that has arrived lets the next one wait",
                "_Probes.has_arrived",
                always(False),
                "backlog/test_simulated",
            ),
        ]
    ),
    Mutant(
        "a lost message is not sent again",
        Python("Sweeper._resend", always(()), "worker.sweeper"),
        within("integration/test_sweeper"),
    ),
]

OF_THE_INDEX = [
    Mutant(rule, seam)
    for rule, *seams in [
        (
            "claim does not consume the token",
            Python("Leasing.lease", no_token_is_consumed),
            Lua(
                "common",
                "lease",
                """function(entity, batch)
                  local token = entity.fields.token
                  local reply = original(entity, batch)
                  redis.call('HSET', entity.key, 'token', token)
                  return reply
                end""",
            ),
        ),
        (
            "a parked entry keeps its token",
            Python("Transition.park", lambda _: lambda self, e: self.save(e, Status.PARKED, e.deadline)),
            Lua("common", "park", "function(entity) save(entity, PARKED, entity.fields.deadline) end"),
        ),
        (
            "a batch takes the first of its tokens from the counter",
            Lua(
                "common",
                "next_token",
                """function()
                  local reserved = last_reserved
                  local token = original()
                  if last_reserved ~= reserved then
                    redis.call('SET', TOKEN, token)
                  end
                  return token
                end""",
            ),
        ),
        (
            "a token is a float",
            Python("Transition.next_token", lambda original: lambda self: f"{float(original(self)):.14g}"),
            Lua("common", "next_token", "function() return tostring(tonumber(original())) end"),
        ),
        (
            "put-back is unconditional",
            Python("PuttingBack.is_expected", lambda _: lambda self, e, token: e.status is Status.SENT),
            Lua("put_back", "is_expected", "function(entity) return entity.status == SENT end"),
        ),
        (
            "a worker is given up though it has renewed its lease",
            Python("Finishing.was_renewed", always(False)),
            Lua("finish", "was_renewed", "function() return false end"),
        ),
        (
            "two sweepers count the same time",
            Python("Surveying.counted", counted_by_everybody),
            Lua(
                "survey",
                "counted",
                "function() return count + math.min(watch.passed or 0, limits.margin) end",
            ),
        ),
        (
            "a sweeper that was away counts all the time at once",
            Python("Surveying.counted", counted_at_once),
            Lua(
                "survey",
                "counted",
                "function() return watch.count == count and count + watch.passed or count end",
            ),
        ),
        (
            "a lease lasts no longer than its length",
            Python("Transition.lease_end", lambda original: lambda self: original(self) - self.limits.margin),
            Lua("common", "lease_end", "function() return original() - limits.margin end"),
        ),
        (
            "a hold of the future is believed",
            Python("Surveying.held_by_another", a_hold_is_believed),
            Lua(
                "survey",
                "held_by_another",
                "function() return till > now and holder ~= header.sweeper end",
            ),
        ),
        (
            "a delay is not set afresh when the clock was set back",
            Python("Transition.set_afresh", always(False)),
            Lua("common", "set_afresh", "function() end"),
        ),
        (
            "a point in time is set afresh, too",
            Python("Enqueuing.asked", lambda _: lambda self, request: self.now),
            Lua("enqueue", "asked", "function() return now end"),
        ),
        (
            "arrivals of the future tell",
            Python("Transition.newest_arrival", lambda _: lambda self: self.shard.newest_arrival),
            Lua(
                "common",
                "newest_arrival",
                "function() return number(shard.claimed, NUMBER_DIGITS) or 0 end",
            ),
        ),
        (
            "what is missed later than any can be stays so",
            Python("Resending.is_too_far", always(False)),
            Lua("resend", "is_too_far", "function() return false end"),
        ),
        (
            "what a run that lost its lease enqueues of itself comes from outside",
            Python("Enqueuing.asked_by_itself", only_in_force),
            Lua(
                "enqueue",
                "asked_by_itself",
                "function(entity) return original(entity) and inside.lease == entity.fields.lease end",
            ),
        ),
        (
            "a refused report leads to nothing",
            Python("Finishing.asks_again", always(False)),
            Lua("finish", "asks_again", "function() return false end"),
        ),
        (
            "a refused report comes before the back-off",
            Python("Transition.again", before_the_back_off),
            Lua(
                "common",
                "again",
                """function(entity, deadline, task_id, note)
                  if entity.status == PARKED or entity.status == SENT then
                    forget_message(entity)
                    return scheduled(true, deadline, place(entity, deadline, task_id))
                  end
                  return original(entity, deadline, task_id, note)
                end""",
            ),
        ),
        (
            "a word of an evaluation that lost its lease makes a record",
            Python("Transition.again", a_record_is_made),
            Lua(
                "common",
                "again",
                """function(entity, deadline, task_id, note)
                  if not entity.status then
                    return scheduled(true, deadline, place(entity, deadline, task_id))
                  end
                  return original(entity, deadline, task_id, note)
                end""",
            ),
        ),
        (
            "whoever reports holds the lease",
            Python("Finishing.holds_lease", lambda _: lambda self, e, report: e.status is Status.RUNNING),
            Lua("finish", "holds_lease", "function(entity) return entity.status == RUNNING end"),
        ),
        (
            "a lease is renewed for whoever asks",
            Python("Renewing.holds_lease", lambda _: lambda self, e, run: e.status is Status.RUNNING),
            Lua("renew", "holds_lease", "function(entity) return entity.status == RUNNING end"),
        ),
        (
            "enqueue clears the deleted mark",
            Python("Enqueuing.enqueue_running", the_mark_is_cleared),
            Lua(
                "enqueue",
                "enqueue_running",
                """function(entity, request, wanted)
                  local reply = original(entity, request, wanted)
                  redis.call('HDEL', entity.key, 'deleted')
                  return reply
                end""",
            ),
        ),
        (
            "a running entity that is deleted is gone at once",
            Python("Transition.delete_running", removed_at_once),
            Lua("common", "delete_running", "function(entity) remove(entity) return true end"),
        ),
        (
            "a life that began before all were deleted goes on",
            Python("Transition.alive", lambda _: lambda self, entity: entity),
            Lua("common", "alive", "function(entity) return entity end"),
        ),
        (
            "a life that begins while all are deleted ends with them",
            Python("Transition.begin_life", always(None)),
            Lua("common", "begin_life", "function() end"),
        ),
        (
            "a kind is forgotten though something of it is there",
            Python("ForgettingKind.is_empty", always(True)),
            Lua("forget_kind", "is_empty", "function() return true end"),
        ),
        (
            "an entity is enqueued into a kind that was forgotten",
            Lua("common", "is_kept", "function() return true end"),
        ),
        (
            "a page leaves out those of the last one's score",
            Python("Paging.is_after", lambda _: lambda self, entity, last: entity.score > last.score),
            Lua("page", "is_after", "function() return false end"),
        ),
        (
            "of a deleted entity the old life goes on",
            Python("Finishing.finish_deleted", the_old_life_goes_on),
            Lua(
                "finish",
                "finish_deleted",
                """function(entity, report, run)
                  if not run.outside then
                    return rest(entity, report)
                  end
                  return schedule(entity, report, run, run.outside)
                end""",
            ),
        ),
        (
            "the sweep ignores the pause",
            Python("Promoting.is_waiting", lambda _: lambda self, e: e.status is Status.PARKED),
            Lua("promote", "is_waiting", "function(entity) return entity.status == PARKED end"),
        ),
        (
            "what is far is sent at once",
            Python("Transition.is_near", always(True)),
            Lua("common", "is_near", "function() return true end"),
        ),
        (
            "those who enqueue take the whole window",
            Python("Transition.has_room", lambda _: lambda self, e: self.under_way() < self.limits.window),
            Lua("common", "has_room", "function() return under_way() < limits.window end"),
        ),
        (
            "a message is believed before its time",
            Python("Claiming.is_early", always(False)),
            Lua("claim", "is_early", "function() return false end"),
        ),
        (
            "any message of a sent entity claims it",
            Python("Claiming.is_expected", lambda _: lambda self, e, token: e.status is Status.SENT),
            Lua("claim", "is_expected", "function(entity) return entity.status == SENT end"),
        ),
        (
            "a later deadline that is near costs a message",
            Python("Enqueuing.message_may_stay", always(False)),
            Lua("enqueue", "message_may_stay", "function() return false end"),
        ),
        (
            "the latest deadline wins",
            Python("Enqueuing.choose", the_latest),
            Lua(
                "enqueue",
                "choose",
                """function(current, wanted, entity)
                  if policy == 'replace' or not current then
                    return original(current, wanted, entity)
                  end
                  return math.max(current, wanted, entity.fields.floor or 0)
                end""",
            ),
        ),
        (
            "what is overdue is moved back in the queue",
            Python("Enqueuing.choose", overdue_is_moved),
            Lua(
                "enqueue",
                "choose",
                """function(current, wanted, entity)
                  return original(policy ~= 'replace' and current or nil, wanted, entity)
                end""",
            ),
        ),
        (
            "max_wait comes before the back-off's floor",
            Python("Enqueuing.choose", max_wait_comes_first),
            Lua(
                "enqueue",
                "choose",
                """function(current, wanted, entity)
                  if policy == 'replace' and max_wait then
                    entity.fields.floor = nil
                  end
                  return original(current, wanted, entity)
                end""",
            ),
        ),
        (
            "what a run enqueues of its own entity counts as from outside",
            Python("Enqueuing.asked_by_its_run", always(False)),
            Lua("enqueue", "asked_by_its_run", "function() return false end"),
        ),
        (
            "a fenced run brings its own entity forward",
            Python("Enqueuing.asked_by_itself", always(False)),
            Lua("enqueue", "asked_by_itself", "function() return false end"),
        ),
        (
            "an enqueue whose reply was lost is not recognised",
            Python("Enqueuing.is_repeated", always(False)),
            Lua("enqueue", "is_repeated", "function() return false end"),
        ),
        (
            "a claim whose reply was lost is not recognised",
            Python("Claiming.is_repeated", always(False)),
            Lua("claim", "is_repeated", "function() return false end"),
        ),
        (
            "a report whose reply was lost is not recognised",
            Python("Finishing.is_repeated", always(False)),
            Lua("finish", "is_repeated", "function() return false end"),
        ),
        (
            "a promotion whose reply was lost is not recognised",
            Python("Promoting.is_repeated", always(False)),
            Lua("promote", "is_repeated", "function() return false end"),
        ),
        (
            "a message is sent again though it may still arrive",
            Python("Resending.is_lost", always(True)),
            Lua("resend", "is_lost", "function() return true end"),
        ),
        (
            "how far a queue is, the message alone decides",
            Python("Claiming.note_arrival", the_message_s_word),
            Lua(
                "claim",
                "note_arrival",
                """function(entity, token)
                  original(entity, token)
                  reached = math.max(reached, header.resent_at or 0)
                end""",
            ),
        ),
        (
            "two sweepers at a time",
            Python("Surveying.held_by_another", always(False)),
            Lua("survey", "held_by_another", "function() return false end"),
        ),
        (
            "an idle record is forgotten before its time",
            Python("Forgetting.is_past_its_time", always(True)),
            Lua("forget", "is_past_its_time", "function() return true end"),
        ),
        (
            "finish takes the later deadline",
            Python("Finishing.finish_done", the_later_deadline),
            Lua(
                "finish",
                "finish_done",
                """function(entity, report, run)
                  local asked = report.delay and now + report.delay
                  local deadline = math.max(asked or 0, run.own or 0, run.outside or 0)
                  return deadline > 0 and schedule(entity, report, run, deadline) or rest(entity, report)
                end""",
            ),
        ),
        (
            "a failure keeps what its own evaluation enqueued",
            Python("Finishing.finish_failed", what_it_enqueued_itself),
            Lua(
                "finish",
                "finish_failed",
                """function(entity, report, run)
                  run.outside = earliest(run.outside, run.own)
                  return original(entity, report, run)
                end""",
            ),
        ),
        (
            "the back-off is no floor",
            Python("Finishing.finish_failed", no_floor),
            Lua(
                "finish",
                "finish_failed",
                """function(entity, report, run)
                  report.respect_backoff = nil
                  return original(entity, report, run)
                end""",
            ),
        ),
        (
            "a quarantine swallows what was enqueued meanwhile",
            Python("Finishing.finish_quarantined", nothing_from_outside),
            Lua(
                "finish",
                "finish_quarantined",
                """function(entity, report, run)
                  run.outside = nil
                  return original(entity, report, run)
                end""",
            ),
        ),
        (
            "a claim resets the back-off",
            Python("Leasing.lease", failures_are_reset),
            Lua(
                "common",
                "lease",
                """function(entity, batch)
                  entity.fields.failures = nil
                  return original(entity, batch)
                end""",
            ),
        ),
        (
            "a retry gets another task id",
            Python("Transition.forget_message", a_retry_s_task_id_goes),
            Lua(
                "common",
                "forget_message",
                """function(entity)
                  original(entity)
                  entity.fields.task_id = nil
                end""",
            ),
        ),
        (
            "a batch that is lost counts failures",
            Python(
                "Finishing.is_unstarted",
                lambda _: lambda self, e, report: report.verdict is Verdict.UNSTARTED,
            ),
            Lua("finish", "is_unstarted", "function(_, report) return report.verdict == 'unstarted' end"),
        ),
        (
            "an entity that was lost with a batch is taken with another",
            Python("Taking.may_be_taken", lambda _: lambda self, e: e.status is Status.PARKED),
            Lua(
                "take", "may_be_taken", "function(entity) return entity.status == PARKED and not paused() end"
            ),
        ),
        (
            "an entity that is given back forgets since when it was due",
            Python(
                "Finishing.finish_unstarted",
                given_back(lambda self, run: self.now if run.outside is None else run.outside),
            ),
            Lua(
                "finish",
                "finish_unstarted",
                """function(entity, report, run)
                  run.due = run.outside or now
                  return original(entity, report, run)
                end""",
            ),
        ),
        (
            "a move overlooks an enqueue that came meanwhile",
            Python("Retiring.is_as_described", always(True)),
            Lua("retire", "is_as_described", "function() return true end"),
        ),
        (
            "a move puts old news over what is known already",
            Python("Adopting.is_known", lambda _: lambda self, e: e.status is Status.RUNNING),
            Lua("adopt", "is_known", "function(entity) return entity.status == RUNNING end"),
        ),
        (
            "a deleted entity is claimed by a repeated nonce",
            Python("Claiming.is_missing", lambda _: lambda self, e: e.status is None),
            Lua("claim", "is_missing", "function(entity) return not entity.status end"),
        ),
        (
            "a deleted entity is taken by a repeated nonce",
            Lua(
                "take",
                "is_repeated",
                """function(entity)
                  return entity.status == RUNNING and entity.fields.nonce == header.nonce
                end""",
            ),
        ),
        (
            "whoever notes nothing leaves an older note in place",
            Python("Transition.keep_note", unless_it_is_new),
            Lua(
                "common",
                "keep_note",
                "function(entity, note) if note then original(entity, note) end end",
            ),
        ),
        (
            "the first note stays",
            Python("Transition.keep_note", the_first_stays),
            Lua(
                "common",
                "keep_note",
                """function(entity, note)
                  if not (note and entity.fields.noted) then
                    original(entity, note)
                  end
                end""",
            ),
        ),
        (
            "a wake-up carries no note",
            Python("Transition.with_note", lambda _: lambda self, e, wakeup: wakeup),
            Lua("common", "with_note", "function(_, message) return message end"),
        ),
    ]
    for seam in seams
]

MUTANTS = [*AROUND_THE_INDEX, *OF_THE_INDEX]
