"""The checker, on ledgers written by hand: a faithful one is clean, and each broken guarantee is seen."""

from __future__ import annotations

from typing import Any

import pytest

from tests.acceptance.ledger import Line
from tests.chaos.app import HELD_UP, LEASE, RETRY_DELAY
from tests.chaos.checker import AFTERMATH, LONGEST_CALL, STANDSTILL, Final, check

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

    def word(self, at: float, by: int) -> Story:
        """What an evaluation enqueues of its own entity."""
        return self.enqueue(at, by=by)

    def delete_kind(self, at: float, *, first: float, done: float) -> Story:
        call: dict[str, Any] = {"of": "", "kind": self.entity.partition("/")[0], "call": f"k{at}"}
        self.line("delete-kind", at, **call).line("deleting-kind", first, **call)
        return self.line("deleted-kind", done, **call)

    def step(self, at: float, before: int, after: int) -> Story:
        """Of the index's clock."""
        self.line("index-step", at, of="", before=before, after=after)
        return self.line("index-stepped", at + 0.001, of="")

    def fault(self, name: str, began: float, ended: float) -> Story:
        self.line("fault", began, of="", name=name, call=f"f{began}")
        return self.line("over", ended, of="", call=f"f{began}")

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

    def broken(self, final: Final = AT_GOAL, **options: float) -> list[str]:
        lines = sorted(self.lines, key=lambda line: line.at)
        found = check(lines, {self.entity: final}, **options)
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


# Words of evaluations about their own entity ------------------------------------------------------


def test_what_an_evaluation_enqueues_of_its_own_entity_is_looked_at() -> None:
    def story() -> Story:
        return Story("restless/1").enqueue(1).claim(10, 1.1).act(10, 1.2).word(1.3, by=10).finish(10, 1.4)

    assert story().run(11, 1.5).broken() == []
    assert story().broken() == ["lost"]
    assert story().delete(1.45).broken(UNKNOWN) == []
    assert story().delete(1.45).run(11, 1.5).broken(UNKNOWN) == ["posthumous"]


def test_it_never_outlives_a_delete_not_even_one_before_it() -> None:
    story = Story("restless/1").enqueue(1).claim(10, 1.1).delete(1.2).word(1.3, by=10).finish(10, 1.4)
    assert story.broken(UNKNOWN) == []
    assert "posthumous" in story.run(11, 1.5).broken(UNKNOWN)


def test_a_deadline_that_replaces_all_others_does_not_replace_it() -> None:
    story = Story("restless/1").enqueue(1).claim(10, 1.1).word(1.2, by=10)
    story.enqueue(1.3, 3, replaces=True, told=1.2).finish(10, 1.4)
    assert story.run(11, 1.5).broken() == []


def test_in_a_new_life_it_leads_to_a_look() -> None:
    story = Story("restless/1").enqueue(1).claim(10, 1.1).delete(1.2).enqueue(1.25)
    assert story.word(1.6, by=10).finish(10, 1.5).run(11, 1.55).run(12, 1.8).broken() == []


def test_it_never_comes_before_the_back_off() -> None:
    def story(again: float) -> Story:
        told = Story("restless/1").enqueue(1).claim(10, 1.1).word(1.15, by=10)
        return told.finish(10, 1.2, "failed", RETRY_DELAY).run(11, again, failures=1)

    assert story(1.31).broken() == []
    assert story(1.25).broken() == ["early"]


def test_from_outside_it_may() -> None:
    story = Story("outsider/1").enqueue(1).claim(10, 1.1).delete(1.12).enqueue(1.15)
    assert story.finish(10, 1.2, "failed", RETRY_DELAY).run(11, 1.25).broken() == []


# Late writes and refused reports ------------------------------------------------------------------


def stalled(kind: str, *, heard: bool = True) -> Story:
    """An action stood still while another evaluation did everything, and wrote then."""
    told = lost_worker(Story(f"{kind}/1").enqueue(1), 10, 1.1)
    told.line("start", 1.2, token=10, action="stall+overwrite").line("freeze", 1.21, of="", pids=[1])
    told.claim(11, 3, failures=1, pid=2).line("overwrite", 3.1, pid=2, token=11, version=2)
    told.finish(11, 3.2).line("thaw", 4, of="", pids=[1]).line("overwrite", 4.01, token=10, version=1)
    return told.finish(10, 4.1, result="fenced") if heard else told


def test_after_a_refused_report_there_is_one_more_look() -> None:
    undone = Final("idle", "", 2, 1, gone=False)
    assert stalled("careless").run(12, 4.2).broken() == []
    assert sorted(stalled("careless").broken(undone)) == ["lost", "unsettled"]
    assert stalled("guarded").broken() == ["lost"]
    assert stalled("careless").run(12, 4.2).run(13, 4.5).broken() == ["early"], "one"
    assert stalled("careless").delete(4.05).broken(UNKNOWN) == []


def test_nobody_can_know_of_the_late_write_of_a_process_that_died_then() -> None:
    undone = Final("idle", "", 2, 1, gone=False)
    assert stalled("careless", heard=False).broken(undone) == []


def test_an_evaluation_that_had_not_begun_to_act_is_not_looked_after() -> None:
    story = lost_worker(Story().enqueue(1), 10, 1.1).run(11, 3, failures=1)
    assert story.finish(10, 4, result="fenced").broken() == []
    assert story.run(12, 4.1).broken() == ["early"]


def test_a_retry_and_a_requeue_are_looked_at() -> None:
    story = Story("polling/1").enqueue(1).run(10, 1.1).enqueue(2).claim(11, 2.1).finish(11, 2.2, delay=2.0)
    assert story.broken() == ["lost"]
    assert story.run(12, 4.21).broken() == []


# Deletes of whole kinds ---------------------------------------------------------------------------


def test_nothing_of_a_deleted_kind_is_evaluated_any_more() -> None:
    story = Story("polling/1").enqueue(1).claim(10, 1.1).finish(10, 1.2, delay=2.0)
    story.delete_kind(2, first=2.1, done=2.5)
    assert story.broken(UNKNOWN) == []
    assert story.broken() == ["unsettled"]
    assert story.run(11, 3.21).broken(UNKNOWN) == ["posthumous"]


def test_what_is_enqueued_meanwhile_lives() -> None:
    def story(enqueued: float) -> Story:
        return Story("polling/1").enqueue(1).run(10, 1.1).delete_kind(2, first=2.1, done=9).enqueue(enqueued)

    assert story(2.2).run(11, 2.3).broken() == []
    assert sorted(story(2.2).broken(UNKNOWN)) == ["lost", "unsettled"]
    assert story(2.05).broken(UNKNOWN) == []


# Clocks -------------------------------------------------------------------------------------------


def test_a_step_of_the_indexs_clock_ends_no_lease() -> None:
    story = Story().enqueue(1).claim(10, 1.1).step(1.2, 0, 3600)
    story.finish(10, 1.3, "failed", RETRY_DELAY, sweeper=True)
    assert "overlap" in story.run(11, 1.5, failures=1, pid=2).broken()


def test_a_step_ahead_brings_what_waits_forward_and_nothing_else() -> None:
    def story(*step: int) -> Story:
        told = Story().enqueue(1, 100)
        return told.step(2, *step) if step else told

    assert story(0, 3600).run(10, 2.1).broken() == []
    assert story(0, -3600).run(10, 2.1).broken() == ["early"]
    assert story(0, 3600).run(10, 2.1).run(11, 2.5).broken() == ["early"], "without any cause"


def test_what_an_enqueue_is_told_is_by_the_indexs_clock() -> None:
    def story(told: float, *, replaces: bool = True) -> Story:
        return Story().step(0.5, 0, 60).enqueue(1, 2, told=told, replaces=replaces).run(10, 3.1)

    assert story(63).broken() == []
    assert story(3).broken() == ["untold"]
    assert story(3, replaces=False).broken() == []
    assert story(65, replaces=False).broken() == ["untold"]


def test_the_time_of_what_is_far_away_may_be_off_by_the_steps() -> None:
    def broken(deadline: float) -> list[str]:
        return Story("distant/1").enqueue(1, FAR).step(2, 0, -60).enqueue(3, 2 * FAR).broken(far(deadline))

    assert broken(FAR - 59) == broken(FAR + 1) == []
    assert broken(FAR - 62) == broken(FAR + 9) == ["unsettled"]


# Announced shutdowns ------------------------------------------------------------------------------


def cut_off(*, failures: int, stop: str = "soft shutdown of a worker") -> Story:
    told = Story("delicate/1").fault(stop, 99, 102).enqueue(100).claim(10, 100.1)
    told.line("stop", 100.2, of="", pids=[1]).finish(10, 100.2 + LEASE, "failed", RETRY_DELAY, sweeper=True)
    return told.run(11, 100.4 + LEASE, failures=failures, pid=2)


def test_an_evaluation_that_only_a_shutdown_cut_off_counts_no_failure() -> None:
    assert cut_off(failures=0).broken() == []
    assert cut_off(failures=1).broken() == ["back-off"]
    assert cut_off(failures=1, stop="SIGKILL of a worker").broken() == []
    assert cut_off(failures=1).fault("SIGKILL of a worker", 101, 101.1).broken() == []
    assert cut_off(failures=1).fault("SIGKILL of a worker", 99 - AFTERMATH, 89).broken() == ["back-off"]


def test_nor_does_it_lead_to_quarantine() -> None:
    failed = Final("failed", "WorkerLost", 1, 0, gone=False)

    def story(name: str) -> Story:
        told = Story("delicate/1").fault(name, 99, 110).enqueue(100)
        for n, at in enumerate((100.1, 103)):
            told.claim(10 + n, at, pid=n, failures=n).line("stop", at + 0.1, of="", pids=[n])
            told.finish(10 + n, at + 0.1 + LEASE, "failed", RETRY_DELAY, sweeper=True)
        return told

    assert story("cold shutdown of a worker").broken(failed) == ["back-off", "unsettled"]
    assert story("SIGKILL of a worker").broken(failed) == []


# Servers that do not answer, and kinds that cannot be published -----------------------------------


def test_an_enqueue_does_not_wait_for_a_broker_that_does_not_answer() -> None:
    def story(seconds: float, **fields: Any) -> Story:
        told = Story().line("enqueue", 1, call="e", delay=0.0)
        return told.line("enqueued", 1 + seconds, call="e", **fields).run(10, 1.1 + seconds)

    assert story(HELD_UP - 0.1, in_index=0.0).broken() == []
    assert story(HELD_UP + 0.1, in_index=0.0).broken() == ["held up"]
    assert story(HELD_UP + 0.1, in_index=0.2).broken() == []
    frozen = story(HELD_UP + 0.1, in_index=0.0).line("freeze", 1.1, of="", pids=[1])
    assert frozen.line("thaw", 1.2, of="", pids=[1]).broken() == []


def test_the_delay_beside_a_kind_that_cannot_be_published_is_bounded() -> None:
    def story(kind: str) -> Story:
        return Story(f"{kind}/1").enqueue(1, 1).run(10, 9)

    assert story("steady").broken() == []
    assert story("steady").broken(latest=7.1) == []
    assert story("steady").broken(latest=6.9) == ["delayed"]
    assert story("refused").broken(latest=6.9) == []
    assert Story().enqueue(1, 1).delete(3).enqueue(8).run(10, 9).broken(latest=2) == []


# Entities that are gone ---------------------------------------------------------------------------


def test_an_entity_that_is_gone_is_forgotten_as_by_a_delete() -> None:
    def story() -> Story:
        return Story("vanishing/1").enqueue(1).claim(10, 1.1, failures=0).finish(10, 1.2, "gone")

    gone = Final(None, "", 1, 0, gone=True)
    assert story().broken(gone) == []
    assert story().broken(Final("idle", "", 1, 0, gone=True)) == ["unsettled"]
    assert story().run(11, 1.3).broken(gone) == ["early"]
    assert story().enqueue(2).run(11, 2.1).broken() == []
    assert story().enqueue(2).run(11, 2.1, failures=1).broken() == ["back-off"]
    meanwhile = Story("vanishing/1").enqueue(1).claim(10, 1.1).enqueue(1.15).finish(10, 1.2, "gone")
    assert sorted(meanwhile.broken(gone)) == ["lost", "unsettled"]
    assert meanwhile.run(11, 1.3).broken() == []
