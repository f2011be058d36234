"""The example's actions under kills at every commit, stalled workers, and goals that change meanwhile."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from celery_goalstate.testing import (
    NotCrashSafe,
    check_concurrent,
    check_crash_safe,
    check_rules,
    simulate,
)
from example_project.celery import engine
from example_project.fleet import actions
from example_project.fleet.entities import HostEntity
from example_project.fleet.maintenance import set_goal, set_pool
from example_project.fleet.models import Event, Goal, Host, State

pytestmark = pytest.mark.usefixtures("fleet")

NAME = "web-017"


def world(workloads: int = 4) -> HostEntity:
    """A host that goes into maintenance, and to another pool; its drain takes several looks."""
    hosts = Host.objects.filter(pk=NAME)
    hosts.update(workloads=workloads, goal=Goal.DOWN, goal_pool="api")
    return HostEntity(NAME)


def seen(entity: HostEntity) -> dict[str, Any]:
    """The host's row, but for who wrote it last, and everything that was ever noted of it."""
    [row] = Host.objects.filter(pk=entity.id).values()
    del row["fence"]
    return {**row, "events": [str(event) for event in Event.objects.filter(host=entity.id)]}


def rows() -> list[Any]:
    return [list(Host.objects.order_by("pk").values()), list(Event.objects.order_by("pk").values())]


def test_the_rules_have_no_holes() -> None:
    check_rules(HostEntity.rules, State, Goal)


def test_killed_at_any_two_points_of_a_maintenance() -> None:
    before = rows()
    checked = check_crash_safe(world, snapshot=seen, depth=2, engine=engine)
    assert checked.exhausted
    assert checked.schedules > 100
    assert rows() == before


def test_a_stalled_worker_writes_nothing() -> None:
    """The fence in `locked` refuses it: without, a host would be drained that is off already."""
    checked = check_crash_safe(world, snapshot=seen, faults=["lose_lease"], engine=engine)
    assert checked.exhausted


def test_the_goal_changes_at_any_moment() -> None:
    def back_to_work(entity: HostEntity) -> None:
        set_goal(Host.objects.filter(pk=entity.id), Goal.UP)

    def end(entity: HostEntity) -> tuple[Any, ...]:
        host = Host.objects.get(pk=entity.id)
        return host.state, host.goal, host.pool, host.workloads == host.slots

    check_concurrent(world, back_to_work, snapshot=end, engine=engine)


def test_the_page_s_buttons_enqueue_on_commit() -> None:
    with simulate(engine) as simulation:
        set_pool(Host.objects.filter(pk=NAME), "api")
        simulation.assert_scheduled(HostEntity(NAME))
        simulation.run_until_idle()
        assert simulation.actions() == ["change_pool"]


def test_a_resync_finds_what_a_killed_site_left() -> None:
    """It has committed the goal, and never told the engine."""
    with simulate(engine) as simulation:
        entity = world()
        assert engine.resync("host") == 1
        simulation.run_until_idle()
        assert simulation.problem_of(entity) == ""


def test_without_its_fence_a_late_write_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newest:
        fencing_token = 2**62

    locked = actions.locked
    monkeypatch.setattr(actions, "locked", lambda ctx, entity: locked(Newest, entity))
    with pytest.raises(NotCrashSafe):
        check_crash_safe(partial(world, 1), snapshot=seen, faults=["lose_lease"], engine=engine)
