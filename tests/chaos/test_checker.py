"""The checker, on ledgers written by hand: a faithful one is clean, and each broken guarantee is seen."""

from __future__ import annotations

from typing import Any

import pytest

from tests.acceptance.ledger import Line
from tests.chaos.app import LEASE, RETRY_DELAY
from tests.chaos.checker import LONGEST_CALL, STANDSTILL, Final, check

AT_GOAL = Final("idle", "", 1, 1, gone=False)
UNKNOWN = Final(None, "", 1, 1, gone=True)


class Story:
    """Writes lines of one entity; times in seconds."""

    def __init__(self, entity: str = "steady/1") -> None:
        self.entity = entity
        self.lines: list[Line] = []

    def line(self, event: str, at: float, *, pid: int = 1, of: str | None = None, **fields: Any) -> Story:
        self.lines.append(Line(event, self.entity if of is None else of, at, pid, fields))
        return self

    def enqueue(self, at: float, delay: float = 0.0, *, done: float | None = None, **fields: Any) -> Story:
        answer = {"deadline": fields.pop("told")} if "told" in fields else {}
        self.line("enqueue", at, call=f"e{at}", delay=delay, **fields)
        return self.line("enqueued", done or at + 0.001, call=f"e{at}", **answer)

    def delete(self, at: float) -> Story:
        return self.line("delete", at, call=f"d{at}").line("deleted", at + 0.001, call=f"d{at}")

    def claim(
        self,
        token: int,
        at: float,
        *,
        failures: int = 0,
        lateness: float = 10.0,
        pid: int = 1,
        batch: bool = False,
        wakeup: int | None = None,
    ) -> Story:
        fields = {"token": token, "asked": at - 0.001, "failures": failures, "lateness": lateness * 1000}
        self.line("claim", at, pid=pid, batch=batch, wakeup=wakeup, **fields)
        return self.line("look", at, pid=pid, token=token)

    def cut_off(self, event: str, at: float, *, error: str = "IndexUnavailable", **fields: Any) -> Story:
        """A call that gave up at once, and may have had its effect or not."""
        return self.line(event, at, call=f"c{at}", **fields).line("gave-up", at, call=f"c{at}", error=error)

    def act(self, token: int, at: float, *, pid: int = 1) -> Story:
        self.line("start", at, pid=pid, token=token, action="work")
        return self.line("write", at, pid=pid, token=token, version=1)

    def finish(
        self,
        token: int,
        at: float,
        verdict: str = "done",
        delay: float | None = None,
        *,
        result: str = "accepted",
        sweeper: bool = False,
    ) -> Story:
        said = {"verdict": verdict, "delay": delay and delay * 1000, "error": ""}
        self.line("report", at, token=token, sweeper=sweeper, **said)
        return self.line("reply", at + 0.001, token=token, sweeper=sweeper, result=result)

    def run(self, token: int, at: float, **claim: Any) -> Story:
        """An evaluation that succeeds within a tenth of a second."""
        return self.claim(token, at, **claim).act(token, at + 0.05).finish(token, at + 0.1)

    def broken(self, final: Final = AT_GOAL) -> list[str]:
        found = check(self.lines, {self.entity: final})
        return [violation.rule for violation in found.violations]


def lost_worker(story: Story, token: int, at: float) -> Story:
    """An evaluation whose worker died, and was given up when its lease ended."""
    return story.claim(token, at).finish(token, at + LEASE, "failed", RETRY_DELAY, sweeper=True)


FAITHFUL = {
    "an evaluation": Story().enqueue(1).run(10, 1.1),
    "one at its deadline": Story().enqueue(1, 2).run(10, 3.01),
    "an enqueue during the evaluation": Story()
    .enqueue(1)
    .claim(10, 1.1)
    .enqueue(1.15)
    .finish(10, 1.2)
    .run(11, 1.3),
    "a failure and its back-off": (
        Story().enqueue(1).claim(10, 1.1).finish(10, 1.2, "failed", RETRY_DELAY).run(11, 1.31, failures=1)
    ),
    "a lost worker": lost_worker(Story().enqueue(1), 10, 1.1).run(11, 1.21 + LEASE, failures=1),
    "a batch lost, each looked at again without a failure": (
        Story().enqueue(1).claim(10, 1.1, batch=True).run(11, 1.11 + LEASE)
    ),
    "a batch lost by a worker that tells it too late": (
        Story()
        .enqueue(1)
        .claim(10, 1.1, batch=True)
        .claim(11, 1.11 + LEASE, pid=2)
        .line("report", 4, token=10, sweeper=False, verdict="failed", delay=100, error="LeaseLost")
        .finish(11, 4.1)
    ),
    "an entity given back by its batch": (
        Story().enqueue(1).claim(10, 1.1, batch=True).finish(10, 1.2, "unstarted").run(11, 1.21)
    ),
    "a deleted and enqueued entity": Story().enqueue(1, 2).delete(1.5).enqueue(1.6).run(10, 1.7),
    "an entity deleted while it is claimed": (
        Story()
        .enqueue(1)
        .line("delete", 1.0995, call="d")
        .line("deleted", 1.0999, call="d")
        .claim(10, 1.1)
        .finish(10, 1.2, "failed", RETRY_DELAY)
        .enqueue(5)
        .run(11, 5.1, lateness=0.1)
    ),
    "a later deadline by a replacing enqueue": Story()
    .enqueue(1, 1)
    .enqueue(1.1, 3, replaces=True)
    .run(10, 4.2),
    "a back-off beside a replacing enqueue": (
        Story()
        .enqueue(1)
        .claim(10, 1.1)
        .enqueue(1.15, 3, replaces=True)
        .finish(10, 1.2, "failed", RETRY_DELAY)
        .run(11, 1.31, failures=1)
    ),
    "a quarantine that the index did not hear of": (
        Story()
        .enqueue(1)
        .claim(10, 1.1)
        .line(
            "report", 1.2, token=10, sweeper=False, verdict="quarantined", delay=None, error="PermanentError"
        )
        .finish(10, 1.2 + LEASE, "failed", RETRY_DELAY, sweeper=True)
        .run(11, 1.31 + LEASE, failures=1)
    ),
    "a worker that died before it could note its claim": (
        Story()
        .enqueue(1)
        .finish(9, 1.1 + LEASE, "failed", RETRY_DELAY, sweeper=True)
        .run(10, 1.21 + LEASE, failures=1)
    ),
    "an enqueue that was cut off and takes effect once the index goes on": (
        Story().cut_off("enqueue", 1, delay=0.0).enqueue(1.1).run(10, 1.2).run(11, 1 + STANDSTILL)
    ),
    "what an enqueue is told": Story().enqueue(1, 2, told=3.0005).enqueue(1.5, 9, told=3.0005).run(10, 3.1),
}


@pytest.mark.parametrize("story", FAITHFUL.values(), ids=FAITHFUL.keys())
def test_a_faithful_engine_is_not_accused(story: Story) -> None:
    assert story.broken() == []


BROKEN = {
    "nobody looks": ("lost", Story().enqueue(1).run(10, 1.1).enqueue(2)),
    "only the evaluation under way looked": (
        "lost",
        Story().enqueue(1).claim(10, 1.1).enqueue(1.15).finish(10, 1.2),
    ),
    "a live lease is taken over": ("overlap", Story().enqueue(1).claim(10, 1.1).enqueue(1.2).run(11, 1.3)),
    "a renewed lease is taken over": (
        "overlap",
        lost_worker(Story().enqueue(1), 10, 1.1)
        .line("renewal", 2.0, token=10, asked=2.0)
        .run(11, 1.21 + LEASE, failures=1),
    ),
    "a zombie begins another action": (
        "zombie",
        lost_worker(Story().enqueue(1), 10, 1.1)
        .claim(11, 3, failures=1, pid=2)
        .finish(11, 5)
        .line("start", 4, token=10, action="more"),
    ),
    "a zombie begins another action before the other one begins": (
        "zombie",
        lost_worker(Story().enqueue(1), 10, 1.1)
        .line("start", 4, token=10, action="more")
        .run(11, 5, failures=1, pid=2),
    ),
    "a zombie writes after the other": (
        "zombie",
        lost_worker(Story().enqueue(1), 10, 1.1)
        .claim(11, 3, failures=1, pid=2)
        .act(11, 3.1, pid=2)
        .finish(11, 3.2)
        .line("write", 3.3, token=10, version=1),
    ),
    "a zombie's outcome is accepted": (
        "zombie",
        lost_worker(Story().enqueue(1), 10, 1.1)
        .claim(11, 3, failures=1, pid=2)
        .finish(10, 3.1)
        .finish(11, 3.2),
    ),
    "an evaluation before its deadline": ("early", Story().enqueue(1, 2).run(10, 2.9)),
    "an evaluation within the back-off": (
        "early",
        Story().enqueue(1).claim(10, 1.1).finish(10, 1.2, "failed", RETRY_DELAY).run(11, 1.25, failures=1),
    ),
    "an evaluation without a cause": ("early", Story().enqueue(1).run(10, 1.1).run(11, 2)),
    "the later of two deadlines": ("later", Story().enqueue(1, 1).enqueue(1.1, 3).run(10, 4.2, lateness=0.1)),
    "a later deadline than a requeue's": (
        "later",
        Story()
        .enqueue(1)
        .claim(10, 1.1)
        .enqueue(1.15, 3)
        .finish(10, 1.2, delay=0.4)
        .run(11, 4.2, lateness=0.05),
    ),
    "an evaluation after a delete": ("posthumous", Story().enqueue(1).delete(1.05).run(10, 1.2)),
    "a failure count that survives a delete": (
        "posthumous",
        Story()
        .enqueue(1)
        .claim(10, 1.1)
        .finish(10, 1.2, "failed", RETRY_DELAY)
        .delete(1.25)
        .enqueue(1.3)
        .run(11, 1.35, failures=1),
    ),
    "a message evaluates twice": (
        "doubled",
        Story().enqueue(1).run(10, 1.1, wakeup=9).enqueue(1.15).run(12, 1.3, wakeup=9),
    ),
    "a superseded message evaluates": (
        "doubled",
        Story().enqueue(1).run(10, 1.1, wakeup=9).enqueue(1.15).run(12, 1.3, wakeup=8),
    ),
    "two claims get one lease": ("overlap", Story().enqueue(1).claim(10, 1.1).claim(10, 1.2, pid=2)),
    "a live lease is given up": (
        "overlap",
        Story().enqueue(1).claim(10, 1.1).finish(10, 1 + LEASE, "failed", RETRY_DELAY, sweeper=True),
    ),
    "an action after the lease, though nobody has seen that it ended": (
        "zombie",
        Story().enqueue(1).claim(10, 1.1).act(10, 1.9 + LEASE),
    ),
    "the outcome of one that was given up is accepted": (
        "zombie",
        lost_worker(Story().enqueue(1), 10, 1.1).finish(10, 1.2 + LEASE).run(11, 4, failures=1),
    ),
    "an evaluation without a cause, long after an enqueue that was cut off": (
        "early",
        Story()
        .cut_off("enqueue", 1, delay=0.0)
        .enqueue(1.1)
        .run(10, 1.2)
        .enqueue(50)
        .run(11, 50.1)
        .run(12, 60),
    ),
    "an evaluation without a cause, long after a caller's death": (
        "early",
        Story()
        .line("enqueue", 1, call="e", delay=0.0)
        .run(10, 1.2)
        .enqueue(2 + LONGEST_CALL)
        .run(11, 2.1 + LONGEST_CALL)
        .run(12, 3 + LONGEST_CALL),
    ),
    "an evaluation for the deadline that was replaced": (
        "early",
        Story().enqueue(1, 1).enqueue(1.1, 3, replaces=True).run(10, 2.1),
    ),
    "an evaluation for the deadline of a life that was deleted": (
        "early",
        Story().enqueue(1, 1).delete(1.1).enqueue(1.2, 3).run(10, 2.1),
    ),
    "a back-off that survives a delete": (
        "early",
        Story()
        .enqueue(1)
        .claim(10, 1.1)
        .finish(10, 1.2, "failed", RETRY_DELAY)
        .delete(1.21)
        .enqueue(1.22, 3)
        .run(11, 1.31),
    ),
    "the later of two deadlines after a delete": (
        "later",
        Story().enqueue(1).delete(1.1).enqueue(1.2, 1).enqueue(1.3, 3).run(10, 4.4, lateness=0.1),
    ),
    "a later deadline than the one that replaced the others": (
        "later",
        Story().enqueue(1, 1).enqueue(1.2, 2, replaces=True).run(10, 4.4, lateness=0.1),
    ),
    "a later deadline long after an enqueue that was cut off": (
        "later",
        Story()
        .cut_off("delete", 1)
        .enqueue(1.1)
        .run(10, 1.2)
        .enqueue(50, 1)
        .enqueue(50.1, 3)
        .run(11, 53.2, lateness=0.1),
    ),
    "an evaluation after a delete, long after an enqueue that was cut off": (
        "posthumous",
        Story()
        .cut_off("enqueue", 1, delay=0.0)
        .enqueue(1.1)
        .run(10, 1.2)
        .enqueue(50)
        .delete(50.1)
        .run(11, 51),
    ),
    "a failure that was none": (
        "back-off",
        Story().enqueue(1).run(10, 1.1).enqueue(2).run(11, 2.1, failures=1),
    ),
    "failures that a success does not end": (
        "back-off",
        Story()
        .enqueue(1)
        .claim(10, 1.1)
        .finish(10, 1.2, "failed", RETRY_DELAY)
        .run(11, 1.31, failures=1)
        .enqueue(2)
        .run(12, 2.1, failures=1),
    ),
    "an enqueue that raises what nobody expects": (
        "untold",
        Story().cut_off("enqueue", 1, delay=0.0, error="OperationalError"),
    ),
    "an enqueue that tells a later deadline": ("untold", Story().enqueue(1, 2, told=3.1).run(10, 3.2)),
    "an enqueue that tells of nothing": ("untold", Story().enqueue(1, told=None).run(10, 1.1)),
    "an enqueue that tells another deadline than it sets": (
        "untold",
        Story().enqueue(1, 1).enqueue(1.1, 3, replaces=True, told=2.0).run(10, 4.2),
    ),
    "a failure that is not counted": (
        "back-off",
        Story().enqueue(1).claim(10, 1.1).finish(10, 1.2, "failed", RETRY_DELAY).run(11, 1.31),
    ),
}


@pytest.mark.parametrize(("rule", "story"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_guarantee_is_seen(rule: str, story: Story) -> None:
    assert rule in story.broken()


@pytest.mark.parametrize(
    "final",
    [
        Final(None, "", 1, 1, gone=False),
        Final("scheduled", "", 1, 1, gone=False),
        Final("running", "", 1, 1, gone=False),
        Final("idle", "", 2, 1, gone=False),
        Final("failed", "WorkerLost: ", 1, 1, gone=False),
    ],
    ids=str,
)
def test_an_entity_must_end_idle_and_at_its_goal(final: Final) -> None:
    assert Story().enqueue(1).run(10, 1.1).broken(final) == ["unsettled"]


def test_a_deleted_entity_must_be_unknown() -> None:
    story = Story().enqueue(1, 2).delete(1.5)
    assert story.broken(UNKNOWN) == []
    assert story.broken() == ["unsettled"]


def test_a_poisonous_entity_must_be_quarantined() -> None:
    story = Story("poison-kill/1").enqueue(1)
    for failures, at in enumerate((1.1, 4, 7)):
        story.claim(10 + failures, at, failures=failures)
        story.finish(10 + failures, at + LEASE, "failed" if failures < 2 else "quarantined", sweeper=True)
    assert story.broken(Final("failed", "WorkerLost: the worker ...", 1, 0, gone=False)) == []
    assert story.broken(Final("failed", "PlannedError", 1, 0, gone=False)) == ["unsettled"]
    assert story.run(13, 10).broken(Final("failed", "WorkerLost: ", 1, 0, gone=False)) == ["early"]


FAR = 1e6


def far(deadline: float | None, *, status: str | None = "scheduled", sent: bool = False) -> Final:
    return Final(status, "", 0, 0, gone=False, deadline=deadline, sent=sent)


def test_an_entity_whose_deadline_is_far_away_waits_for_it_without_a_message() -> None:
    def story() -> Story:
        return Story("distant/1").enqueue(1, 2 * FAR).enqueue(2, FAR).enqueue(3, 3 * FAR)

    assert story().broken(far(2 + FAR)) == []
    assert story().broken(far(1 + 2 * FAR)) == ["unsettled"], "the earliest wins"
    assert story().broken(far(1 + FAR)) == ["unsettled"], "nobody asked for that"
    assert story().broken(far(2 + FAR, sent=True)) == ["unsettled"]
    assert story().broken(far(None, status="idle")) == ["unsettled"]
    assert story().broken(far(None, status=None)) == ["unsettled"]
    assert story().line("message", 4).broken(far(2 + FAR)) == ["far"]
    assert story().run(10, 4).broken(far(2 + FAR)) == ["early"]
    later = story().enqueue(4, 4 * FAR, replaces=True)
    assert later.broken(far(4 + 4 * FAR)) == []
    assert later.broken(far(2 + FAR)) == ["unsettled"]
    deleted = story().delete(4)
    assert deleted.broken(UNKNOWN) == []
    assert deleted.broken(far(2 + FAR)) == ["unsettled"]


def test_a_process_that_stood_still_after_its_check_is_a_zombie_for_one_action_only() -> None:
    def story() -> Story:
        story = lost_worker(Story().enqueue(1), 10, 1.1)
        story.line("freeze", 1.2, of="", pids=[1]).claim(11, 3, failures=1, pid=2).finish(11, 5)
        story.line("thaw", 4, of="", pids=[1])
        return story.line("start", 4.01, token=10, action="one")

    assert story().broken() == []
    assert story().line("start", 4.02, token=10, action="more").broken() == ["zombie"]


def test_what_an_index_forgot_is_excused() -> None:
    story = Story().enqueue(1).claim(10, 1.1).enqueue(1.2)
    story.line("index-loss", 1.3, of="").line("index-lost", 1.31, of="").line(
        "resync", 1.32, of="", kind="steady"
    )
    assert story.run(11, 1.4).broken() == []


def test_a_delete_that_an_index_forgot_is_excused() -> None:
    known = Final("idle", "", 2, 1, gone=True)
    story = Story().enqueue(1).run(10, 1.1).delete(2)
    assert story.broken(known) == ["unsettled"]
    story.line("index-loss", 1.9, of="").line("index-lost", 2.5, of="")
    assert story.broken(known) == []


def test_one_that_is_gone_but_enqueued_by_another_is_not_resynced() -> None:
    def story() -> Story:
        return Story().enqueue(1).run(10, 1.1).delete(2).enqueue(2.1)

    lost = ("index-loss", 2.2), ("index-lost", 2.3)
    for gone, broken in ((True, []), (False, ["unsettled"])):
        told = story()
        for event, at in lost:
            told.line(event, at, of="")
        assert told.broken(Final(None, "", 2, 1, gone=gone)) == broken
    assert set(story().broken(Final(None, "", 2, 1, gone=True))) == {"lost", "unsettled"}


def test_a_deputy_of_a_forgotten_lease_may_begin_at_once() -> None:
    def story(lost: float) -> Story:
        told = Story().enqueue(1).claim(10, 1.1, pid=1)
        told.line("index-loss", lost, of="").line("index-lost", lost + 0.1, of="").enqueue(1.3)
        return told.claim(11, 1.4, pid=2).act(10, 2.1, pid=1).finish(10, 2.2, result="fenced")

    assert "zombie" in story(0.5).finish(11, 2.3).broken()
    assert "zombie" not in story(1.2).finish(11, 2.3).broken()


def test_a_call_of_unknown_effect_may_have_had_it_or_not() -> None:
    story = Story().line("enqueue", 1, call="e", delay=0.0)
    assert story.broken(Final(None, "", 1, 0, gone=False)) == []
    assert story.run(10, 1.1).broken() == []
