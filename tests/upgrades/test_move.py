"""A kind gets another name, namespace, key prefix, number of shards or server: nothing is lost on the way."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_goalstate import Description, Engine, Entity, Rules
from celery_goalstate.exceptions import ImproperlyConfigured
from celery_goalstate.index import open_index
from celery_goalstate.index.base import Claim, Report, Request, Run, Verdict
from celery_goalstate.move import Moved, move
from celery_goalstate.settings import Settings
from celery_goalstate.worker.lease import LeaseKeeper
from tests.servers import Cluster, Valkey, poll
from tests.upgrades.conftest import Site

LEASE = 1.0


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="module")
def other_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("other")) as server:
        yield server


class Thing(Entity):
    """What it is called in the code does not matter: its kind is what the index knows."""

    rules = Rules({})


def engine_on(valkey: Valkey, kind: str = "thing", **settings: Any) -> Engine:
    app = Celery("upgrades", broker=valkey.url, set_as_current=False)
    app.conf.update({f"goalstate_{name}": value for name, value in settings.items()})
    engine = Engine(app)
    engine.register(type("Thing", (Thing,), {"kind": kind}))
    return engine


class Place:
    """Entities of one kind, before they move."""

    def __init__(self, engine: Engine, kind: str = "thing") -> None:
        self.engine, self.kind = engine, kind
        self.index = engine.parts.index

    def evaluate(self, id: str, verdict: Verdict | None, **report: Any) -> None:
        """As a worker would; without a verdict the evaluation does not end."""
        self.engine.enqueue(self.engine.ref(self.kind, id))
        [record] = self.index.describe(self.kind, [id])
        assert record is not None
        [claim] = self.index.claim(self.kind, [(id, record.token)], nonce="nonce", task_id="task")
        assert isinstance(claim, Claim)
        if verdict is not None:
            self.index.finish(self.kind, [Report(id, claim.lease, verdict, **{"delay": None, **report})])

    def fill(self) -> None:
        """One entity of each sort."""
        enqueue, ref = self.engine.enqueue, self.engine.ref
        enqueue(ref(self.kind, "now"))
        enqueue(ref(self.kind, "soon"), 5)
        enqueue(ref(self.kind, "next year"), timedelta(days=365))
        self.evaluate("retried", Verdict.FAILED, delay=600_000, failures=4, error="OSError: no")
        self.evaluate("quarantined", Verdict.QUARANTINED, failures=2, error="ValueError: never")
        self.evaluate("idle", Verdict.DONE, converged=False, idle_ttl=600_000)

    def contents(self, kind: str = "") -> dict[str, Description]:
        """What there is, without what is only about messages."""
        found = self.engine.list(kind or self.kind, limit=1000)
        same = {"kind": "", "sent": False, "task_id": None, "cursor": ""}
        return {each.id: dataclasses.replace(each, **same) for each in found}


@pytest.fixture
def old(valkey: Valkey) -> Iterator[Place]:
    yield Place(engine_on(valkey, lease=LEASE))
    with valkey.client() as client:
        client.flushall()


@pytest.fixture
def new(valkey: Valkey, old: Place) -> Place:
    """The same, with another key prefix and in another number of shards."""
    return Place(engine_on(valkey, key_prefix="new", shards=4))


def settings_of(place: Place) -> Settings:
    return place.engine.settings


def move_all(old: Place, new: Place) -> Moved:
    return move(new.engine, new.kind, old_kind=old.kind, old=settings_of(old))


@pytest.mark.parametrize("what", ["name", "namespace", "prefix and shards", "server", "everything"])
def test_everything_survives(old: Place, valkey: Valkey, other_server: Valkey, what: str) -> None:
    old.fill()
    before = old.contents()
    assert len(before) == 6
    kind = "renamed" if what in {"name", "everything"} else "thing"
    settings: dict[str, dict[str, Any]] = {
        "name": {},
        "namespace": {"namespace": "billing"},
        "prefix and shards": {"key_prefix": "new", "shards": 4},
        "server": {"index_url": other_server.url},
        "everything": {"key_prefix": "x", "namespace": "y", "shards": 3, "index_url": other_server.url},
    }
    new = Place(engine_on(valkey, kind, **settings[what]), kind)
    assert move_all(old, new) == Moved(6, running=0)
    assert new.contents() == before
    assert old.contents() == {}
    assert move_all(old, new) == Moved(0, running=0)
    assert new.contents() == before
    with other_server.client() as client:
        client.flushall()


def test_a_cluster_can_take_over(old: Place, valkey: Valkey, tmp_path: Path) -> None:
    old.fill()
    before = old.contents()
    with Cluster(tmp_path / "cluster") as cluster:
        new = Place(engine_on(valkey, index_url=cluster.url, shards=8))
        assert move_all(old, new) == Moved(6, running=0)
        assert new.contents() == before
        old.engine.resume("thing")
        assert move_all(new, old) == Moved(6, running=0)
        assert new.contents() == {}
    assert old.contents() == before


def test_of_two_deadlines_the_earliest_wins(old: Place, new: Place) -> None:
    for id, here, there in (("a", 100, 200), ("b", 200, 100), ("c", 100, None)):
        old.engine.enqueue(old.engine.ref("thing", id), here)
        if there is not None:
            new.engine.enqueue(new.engine.ref("thing", id), there)
    new.evaluate("c", Verdict.QUARANTINED, failures=1, error="boom")
    expected = {"a": old.contents()["a"], "b": new.contents()["b"], "c": old.contents()["c"]}
    assert move_all(old, new).entities == 3
    found = new.contents()
    assert {id: each.deadline for id, each in found.items()} == {
        id: each.deadline for id, each in expected.items()
    }
    assert not any(each.quarantined for each in found.values())


def test_what_is_running_is_left_until_it_has_ended(valkey: Valkey, old: Place, new: Place) -> None:
    old.evaluate("a", None)
    [running] = old.index.running("thing", ["a"])
    run, keeper = Run("a", running.lease), LeaseKeeper(old.index, LEASE)
    with keeper.keep("thing", run, claimed_at=keeper.clock(), max_run=60):  # its worker is alive
        assert move_all(old, new) == Moved(0, running=1)
    assert new.contents() == {}
    [finished] = old.index.finish("thing", [Report("a", running.lease, Verdict.DONE, 0)])
    assert finished.deadline
    assert finished.wakeup is None, "nothing starts there any more"
    assert move_all(old, new) == Moved(1, running=0)


def test_what_a_killed_worker_was_about_is_a_failure_as_ever(old: Place, new: Place) -> None:
    old.evaluate("a", None)
    poll("its lease ends, and it is moved", lambda: move_all(old, new).entities)
    found = new.contents()["a"]
    assert found.failures == 1
    assert found.error is not None
    assert found.error.startswith("WorkerLost")
    assert found.deadline is not None
    assert found.finished is not None
    assert timedelta(seconds=4) < found.deadline - found.finished < timedelta(seconds=11)


def test_a_resync_of_the_old_kind_is_not_left_behind(old: Place, new: Place) -> None:
    old.engine.declare("thing.resync")
    old.engine.enqueue(old.engine.ref("thing.resync", "all"), 60)
    old.engine.enqueue(old.engine.ref("thing", "a"), 60)
    move_all(old, new)
    assert old.engine.orphans() == {}


def test_back_again(old: Place, new: Place) -> None:
    """The old kind is still paused, so that nothing starts there before somebody says so."""
    old.fill()
    before = old.contents()
    move_all(old, new)
    assert move_all(new, old) == Moved(6, running=0)
    assert old.contents() == before
    assert old.engine.paused("thing")
    assert new.engine.paused("thing")
    with pytest.raises(ImproperlyConfigured, match="kept there already"):
        move_all(old, old)


def test_many(old: Place, new: Place) -> None:
    old.engine.enqueue_many((old.engine.ref("thing", id) for id in range(2500)), 60, spread=60)
    before = old.contents()
    assert move_all(old, new).entities == 2500
    assert new.contents() == before


# -- at every moment

Hook = Callable[[str], None]


class Watched:
    """An index that tells when it is asked to change something."""

    def __init__(self, index: Any, before: Hook, after: Hook = lambda name: None) -> None:
        self._index, self._before, self._after = index, before, after

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._index, name)
        if name == "as_kept":
            return lambda kind: Watched(found(kind), self._before, self._after)
        if name not in {"adopt", "enqueue", "retire"}:
            return found

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._before(name)
            reply = found(*args, **kwargs)
            self._after(name)
            return reply

        return watched


def watch(monkeypatch: pytest.MonkeyPatch, new: Place, before: Hook, after: Hook = lambda name: None) -> None:
    """Both sides of the next moves."""
    parts = new.engine.parts
    monkeypatch.setattr(
        "celery_goalstate.move.open_index", lambda settings: Watched(open_index(settings), before, after)
    )
    new.engine._opened = dataclasses.replace(parts, index=Watched(parts.index, before, after))


class Cut(Exception):
    """The mover is killed."""


def test_it_may_be_cut_off_at_any_moment(old: Place, new: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    old.fill()
    before = old.contents()
    deadlines = {id: each.deadline for id, each in before.items()}
    steps = itertools.count()
    with monkeypatch.context() as patch:
        for cut in itertools.count():
            calls = itertools.count()

            def cut_off(name: str, cut: int = cut, calls: Iterator[int] = calls) -> None:
                next(steps)
                if next(calls) == cut:
                    raise Cut(name)

            watch(patch, new, cut_off)
            try:
                move_all(old, new)
            except Cut:
                there, here = old.contents(), new.contents()
                assert there.keys() | here.keys() == before.keys()
                for id, deadline in deadlines.items():
                    assert {each[id].deadline for each in (there, here) if id in each} == {deadline}
            else:
                break
            patch.undo()
            new.engine._opened = None
    assert cut > 4
    assert new.contents() == before


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("delay", [0, 3600])
def test_an_enqueue_at_the_old_place_is_never_overlooked(
    old: Place, new: Place, monkeypatch: pytest.MonkeyPatch, moment: int, delay: int
) -> None:
    """Not even one that changes nothing there, when the entity has just been evaluated here."""
    old.engine.enqueue(old.engine.ref("thing", "a"))
    calls = itertools.count()

    def evaluate_here_and_enqueue_there(name: str) -> None:
        if next(calls) == moment:
            [wakeup] = here.promote("thing", {"a": "task"})
            [claim] = here.claim("thing", [("a", wakeup.token)], nonce="n", task_id="task")
            assert isinstance(claim, Claim)
            here.finish("thing", [Report("a", claim.lease, Verdict.DONE, None)])
            old.index.enqueue("thing", [Request("a", delay * 1000, task_id="late")])

    here = new.index
    watch(monkeypatch, new, lambda name: None, evaluate_here_and_enqueue_there)
    move_all(old, new)
    move_all(old, new)
    found = new.contents()["a"]
    assert found.deadline is not None, "enqueued, and evaluated only before that"
    assert old.contents() == {}


# -- for real


@pytest.mark.timeout(400)
def test_a_move_under_load(site: Site) -> None:
    """As the how-to says: workers are stopped, here the hard way; producers are replaced one by one."""
    old = site.deploy("old")
    worker = site.worker("old")
    producers = [site.producer("old", f"p{number}-") for number in range(2)]
    poll("the old place is in use", lambda: site.packages().total() > 30, timeout=120)

    site.kill(worker)
    new = site.deploy("new", kind="item", goalstate_key_prefix="new", goalstate_shards=4)

    def move_it() -> Moved:
        return move(new.engine, "item", old_kind="thing", old=old.engine.settings)

    poll("nothing runs at the old place", lambda: not move_it().running, timeout=60)
    site.worker("new")
    old.world.open("p0-")
    assert producers[0].wait() == 0
    new_producer = site.producer("new", "p2-")
    counted = site.packages().total()
    poll("the new place is in use", lambda: site.packages().total() > counted + 30, timeout=120)
    moved = move_it().entities
    for prefix in ("p1-", "p2-"):
        old.world.open(prefix)
    assert (producers[1].wait(), new_producer.wait()) == (0, 0)
    moved += move_it().entities
    assert moved, "an old producer went on meanwhile"
    site.settle(new)
    assert site.violations("new") == []
    assert new.engine.orphans() == old.engine.orphans() == {}
    assert old.engine.counts("thing") == {"thing": dict.fromkeys(old.engine.counts("thing")["thing"], 0)}
