"""The lease keeper: a long evaluation keeps its lease, and one that lost it stops."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from celery_goalstate.exceptions import IndexUnavailable, LeaseLost
from celery_goalstate.index.base import Claim, Limits, Request, Run
from celery_goalstate.index.memory import MemoryIndex
from celery_goalstate.worker.lease import THREAD_NAME, EagerKeeper, Keeper, LeaseKeeper
from celery_goalstate.worker.task import CLAIM_PATIENCE
from tests.integration.conftest import Clock, Truth, World, untimed
from tests.servers import Valkey, poll

LEASE = 0.3  # seconds, of real time


class Index(MemoryIndex):
    """Notes which leases were renewed."""

    def __init__(self) -> None:
        super().__init__(Limits(lease=round(LEASE * 1000)))
        self.renewals: Counter[str] = Counter()

    def renew(self, kind: str, runs: Sequence[Run], **where: Any) -> list[bool]:
        held = super().renew(kind, runs, **where)
        self.renewals.update(run.id for run, is_held in zip(runs, held, strict=True) if is_held)
        return held


@pytest.fixture
def index() -> Index:
    return Index()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keeper(index: Index) -> LeaseKeeper:
    return LeaseKeeper(index, LEASE)


def claim(index: Any, id: str = "1", kind: str = "order") -> Run:
    [scheduled] = index.enqueue(kind, [Request(id, delay=0, task_id=id)])
    [claimed] = index.claim(kind, [(id, scheduled.wakeup.token)], nonce=id, task_id=id)
    assert isinstance(claimed, Claim)
    return Run(id, claimed.lease)


def keep(keeper: Keeper, run: Run, max_run: float = 60, kind: str = "order") -> Any:
    return keeper.keep(kind, run, claimed_at=keeper.clock(), max_run=max_run)


def keeper_threads(keeper: LeaseKeeper) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread is keeper._thread]


def test_a_lease_is_renewed_while_the_evaluation_runs(index: Index, keeper: LeaseKeeper) -> None:
    run, began = claim(index), keeper.clock()
    with keep(keeper, run) as lease:
        poll("renewed beyond its first length twice", lambda: keeper.clock() > began + 3 * LEASE)
        assert keeper.held(lease)
    renewed, ended = index.renewals["1"], keeper.clock()
    assert renewed >= 3
    poll("it runs out, since nobody renews it", lambda: keeper.clock() > ended + LEASE)
    assert index.renewals["1"] == renewed


def test_several_leases_at_once(index: Index, keeper: LeaseKeeper) -> None:
    runs = [claim(index, str(id)) for id in range(5)]
    with keep(keeper, runs[0]), keep(keeper, runs[1]), keep(keeper, runs[2]), keep(keeper, runs[3]):
        poll("all renewed", lambda: all(index.renewals[run.id] for run in runs[:4]))
        assert len(keeper_threads(keeper)) == 1
    assert not index.renewals["4"]


def test_no_longer_than_max_run(index: Index, keeper: LeaseKeeper, caplog: pytest.LogCaptureFixture) -> None:
    with keep(keeper, claim(index), max_run=LEASE) as lease:
        poll("given up", lambda: not keeper.held(lease))
    [record] = caplog.records
    assert record.getMessage() == "order/1 runs for longer than its max_run: its lease ends"


def test_a_lease_that_the_index_denies_is_lost(index: Index, keeper: LeaseKeeper) -> None:
    with keep(keeper, claim(index)) as lease:
        index._kinds.clear()
        poll("noticed before it would run out by itself", lambda: lease.lost)
        assert not keeper.held(lease)


def test_an_index_that_does_not_answer_for_a_while(
    index: Index, keeper: LeaseKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told of once, and once when it is over, however many leases and attempts that takes."""
    caplog.set_level(logging.INFO)
    renew, away, asked = index.renew, True, []

    def unavailable(kind: str, runs: Any, **where: Any) -> list[bool]:
        asked.append(kind)
        if away:
            raise IndexUnavailable("no route")
        return renew(kind, runs, **where)

    index.renew = unavailable
    for ids in (("1", "2"), ("3", "4")):
        away, before = True, len(asked)
        with contextlib.ExitStack() as stack:
            leases = [stack.enter_context(keep(keeper, claim(index, id))) for id in ids]
            poll("asked again", lambda before=before: len(asked) > before + 2)
            away = False
            poll("renewed at last", lambda ids=ids: all(index.renewals[id] for id in ids))
            assert all(keeper.held(lease) for lease in leases)
    told = [record.getMessage() for record in caplog.records]
    assert told == 2 * [
        (
            "leases could not be renewed, trying again; an evaluation whose lease runs out, after 0.3 s,"
            " starts no further action: no route"
        ),
        "leases are renewed again",
    ]


def test_an_outage_of_a_part_is_one_outage(
    index: Index, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """One server of a cluster is away: the others' answers do not end that."""
    caplog.set_level(logging.INFO)
    renew, away = index.renew, {"order"}

    def partly_away(kind: str, runs: Any, **where: Any) -> list[bool]:
        if kind in away:
            raise IndexUnavailable("no route")
        return renew(kind, runs, **where)

    index.renew = partly_away
    keeper = EagerKeeper(index, LEASE, clock)
    with keep(keeper, claim(index)) as order, keep(keeper, claim(index, kind="host"), kind="host") as host:
        for _ in range(8):
            clock.advance(LEASE / 3)
            keeper.held(order)
            keeper.held(host)
        assert not keeper.held(order)
        assert len(caplog.records) == 1
        away.clear()
        clock.advance(LEASE / 3)
        keeper.held(order)
    assert [record.getMessage() for record in caplog.records][1:] == ["leases are renewed again"]


def test_an_outage_that_outlives_the_evaluations_hides_no_later_one(
    index: Index, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def unavailable(kind: str, runs: Any, **where: Any) -> list[bool]:
        raise IndexUnavailable("no route")

    index.renew = unavailable
    keeper = EagerKeeper(index, LEASE, clock)
    for id in ("1", "2"):
        with keep(keeper, claim(index, id)) as lease:
            clock.advance(LEASE / 2)
            assert keeper.held(lease)
    assert len(caplog.records) == 2


def test_an_index_that_does_not_answer_for_too_long(index: Index, keeper: LeaseKeeper) -> None:
    def unavailable(kind: str, runs: Any, **where: Any) -> list[bool]:
        raise IndexUnavailable

    index.renew = unavailable
    run = claim(index)
    with keep(keeper, run) as lease:
        poll("by this process's own clock it may be another's now", lambda: not keeper.held(lease))
        assert not lease.lost


def test_any_error_leaves_the_thread_alive(
    index: Index, keeper: LeaseKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    renew, asked = index.renew, []

    def broken(kind: str, runs: Any, **where: Any) -> list[bool]:
        asked.append(runs)
        if len(asked) <= 2:
            raise RuntimeError("a bug")
        return renew(kind, runs, **where)

    index.renew = broken
    run = claim(index)
    with keep(keeper, run):
        poll("renewed all the same", lambda: index.renewals["1"] > 0)
    assert caplog.text.count("RuntimeError: a bug") == 1


def test_no_thread_until_something_is_evaluated(world: World) -> None:
    before = set(threading.enumerate())
    world.engine.enqueue(world.entity("1"))
    world.engine.describe(world.entity("1"))
    world.sweeper().sweep()
    assert set(threading.enumerate()) == before
    for _ in range(10):
        world.run()
        world.engine.enqueue(world.entity("1"))
    [thread] = set(threading.enumerate()) - before
    assert thread.name == THREAD_NAME
    assert thread.daemon, "it dies with its process"


def test_at_rest_the_thread_sleeps_for_ever(index: Index, keeper: LeaseKeeper) -> None:
    with keep(keeper, claim(index)):
        pass
    poll("nothing to wake up for", lambda: keeper._wakes_at == float("inf"))
    with keep(keeper, claim(index, "2")):
        poll("and it wakes up for a new lease", lambda: index.renewals["2"] > 0)


def test_a_lost_lease_stops_the_actions_that_follow(world: World, truth: Truth) -> None:
    done: list[str] = []

    def stall(ctx: Any, entity: Any) -> None:
        done.append("stall")
        world.clock.advance(31)
        with pytest.raises(LeaseLost):
            ctx.check()

    def never(ctx: Any, entity: Any) -> None:
        done.append("never")

    truth.set("1", stall, never)
    world.engine.enqueue(world.entity("1"))
    world.run()
    assert done == ["stall"]


def test_the_first_action_is_not_begun_without_a_lease(
    world: World, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was suspended between its claim and its first action."""
    states = truth.states
    truth.set("1", truth.reach)

    def slow(entity: Any) -> Any:
        world.clock.advance(31)
        return states[entity.id]

    monkeypatch.setattr(world.entity, "get_state", slow)
    world.engine.enqueue(world.entity("1"))
    world.run()
    assert states["1"] == "old"


def test_a_failed_evaluation_gives_its_lease_back(world: World, truth: Truth) -> None:
    def fail(ctx: Any, entity: Any) -> None:
        raise SystemExit

    truth.set("1", fail)
    world.engine.enqueue(world.entity("1"))
    with pytest.raises(SystemExit):
        world.run()
    assert not world.keeper._leases, "or the keeper would renew for an evaluation that has ended"


def test_the_outcome_is_told_again_while_the_lease_lasts(
    world: World, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    from billiard.exceptions import SoftTimeLimitExceeded

    monkeypatch.setattr("celery_goalstate.worker.task.TRY_AGAIN_AFTER", 0)
    errors: list[Exception] = [IndexUnavailable(), SoftTimeLimitExceeded(), IndexUnavailable()]
    finish = world.index.finish

    def fails_thrice(kind: str, reports: Any) -> Any:
        if errors:
            raise errors.pop()
        return finish(kind, reports)

    world.index.finish = fails_thrice
    truth.set("1", truth.reach)
    world.engine.enqueue(world.entity("1"))
    [result] = world.run()
    assert untimed(result.result) == "order/1: old → new: reach 0 ms; converged"
    assert truth.looks("1") == 1


def test_an_outcome_that_cannot_be_told_is_given_up_with_the_lease(
    world: World, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_goalstate.worker.task.TRY_AGAIN_AFTER", 0)

    def never(kind: str, reports: Any) -> Any:
        world.clock.advance(10)
        raise IndexUnavailable

    world.index.finish = never
    world.engine.enqueue(world.entity("1"))
    [result] = world.run()
    assert isinstance(result.result, IndexUnavailable)


def test_a_claim_is_made_again_and_then_left_to_the_sweeper(
    world: World, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_goalstate.worker.task.TRY_AGAIN_AFTER", 0)
    claim, asked = world.index.claim, []

    def unavailable(until: int, away_for: float = 0.0) -> Callable[..., Any]:
        def claim_or_not(*args: Any, **kwargs: Any) -> Any:
            asked.append(kwargs["nonce"])
            world.clock.advance(0.5)
            if len(asked) < until:
                raise IndexUnavailable(away_for=away_for)
            return claim(*args, **kwargs)

        return claim_or_not

    world.index.claim = unavailable(3)
    world.engine.enqueue(world.entity("1"))
    world.run()
    assert truth.looks("1") == 1
    assert len(set(asked)) == 1, "the same nonce, or it would be superseded by itself"

    for id, away_for, attempts in (("2", 0.0, CLAIM_PATIENCE / 0.5), ("3", CLAIM_PATIENCE, 1)):
        asked.clear()
        world.index.claim = unavailable(1000, away_for)
        world.engine.enqueue(world.entity(id))
        [result] = world.run()
        assert result.result == (
            f"order/{id}: not evaluated, since the index did not answer: the sweeper sends it again"
        )
        assert len(asked) == attempts, "others want the place in the pool"
    world.index.claim = claim
    world.clock.advance(61)
    world.sweeper().sweep()
    world.run()
    assert truth.looks("2") == 1


FORKED = """
import logging, os, sys, time
from celery_goalstate.index import open_index
from celery_goalstate.settings import Settings
from celery_goalstate.worker.lease import LeaseKeeper
from celery_goalstate.index.base import Request, Run

index = open_index(Settings(index_url=sys.argv[1], lease=0.3))
keeper = LeaseKeeper(index, 0.3)

def is_renewed(id):
    [scheduled] = index.enqueue("order", [Request(id, delay=0, task_id=id)])
    [claim] = index.claim("order", [(id, scheduled.wakeup.token)], nonce=id, task_id=id)
    first, deadline = index.describe("order", [id])[0].lease_expires, time.monotonic() + 10
    with keeper.keep("order", Run(id, claim.lease), claimed_at=keeper.clock(), max_run=60):
        while time.monotonic() < deadline:
            if index.describe("order", [id])[0].lease_expires > first + 300:
                return True
            time.sleep(0.01)  # polls, for ten seconds

assert is_renewed("before")
children = []
with keeper._changed:  # the fork takes the lock along, held
    for n in range(2):
        if not (child := os.fork()):
            os._exit(0 if is_renewed(f"child-{n}") else 1)
        children.append(child)
assert is_renewed("after")
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


def test_a_fork_has_a_keeper_of_its_own(valkey: Valkey) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED, valkey.url], check=True, timeout=30)


def test_an_alarm_rings_in_time_and_once(keeper: LeaseKeeper) -> None:
    rings: list[float] = []
    at = keeper.clock() + 0.05
    with keeper.alarm(at, lambda: rings.append(keeper.clock())):
        poll("it rings", lambda: rings)
        assert rings[0] >= at
        with keeper._changed:  # it looks once more
            keeper._changed.notify()
        poll("the keeper sleeps", lambda: keeper._wakes_at == float("inf"))
    assert len(rings) == 1


def test_no_alarm_rings_when_its_time_comes_too_late(world: World) -> None:
    rings: list[str] = []
    now = world.clock()
    with world.keeper.alarm(now + 10, lambda: rings.append("first")):
        pass
    with world.keeper.alarm(now + 20, lambda: rings.append("second")):
        world.keeper_wakes_in(20)
        poll("it rings", lambda: rings)
    assert rings == ["second"]


def test_without_a_thread_for_an_alarm_leases_are_renewed(
    index: Index, keeper: LeaseKeeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with keep(keeper, claim(index)):
        monkeypatch.setattr(threading.Thread, "start", cannot)
        with keeper.alarm(keeper.clock(), lambda: None):
            poll("renewed all the same", lambda: index.renewals["1"] > 2)
    assert "no thread can be started" in caplog.text


def test_what_an_alarm_does_holds_up_no_renewal(index: Index, keeper: LeaseKeeper) -> None:
    run, over = claim(index), threading.Event()
    with keep(keeper, run), keeper.alarm(keeper.clock(), lambda: over.wait() and None):
        poll("renewed all the same", lambda: index.renewals["1"] > 2)
        over.set()
