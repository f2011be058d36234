"""The host's rules, and what its actions do to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from celery_goalstate import Requeue
from celery_goalstate.exceptions import PermanentError
from example_project.celery import engine
from example_project.fleet.actions import (
    DrainError,
    StaleWrite,
    change_pool,
    drain,
    power_off,
    power_on,
    refusal,
)
from example_project.fleet.entities import HostEntity
from example_project.fleet.models import Event, Goal, Host, State

pytestmark = pytest.mark.usefixtures("fleet")

CTX = SimpleNamespace(fencing_token=1)


def names(state: State, goal: Goal) -> list[str]:
    return [action.name for action in HostEntity.rules.actions(state, goal).actions]


def test_the_rules_cover_every_state_and_goal() -> None:
    assert HostEntity.rules.missing(State, Goal) == []


@pytest.mark.parametrize(
    ("state", "goal", "actions"),
    [
        (State.UP, Goal.DOWN, ["drain"]),
        (State.DRAINING, Goal.DOWN, ["drain"]),
        (State.DRAINED, Goal.DOWN, ["power_off"]),
        (State.DOWN, Goal.DOWN, ["change_pool"]),
        (State.UP, Goal.UP, ["change_pool"]),
        (State.DRAINING, Goal.UP, ["change_pool", "power_on"]),
        (State.DRAINED, Goal.UP, ["change_pool", "power_on"]),
        (State.DOWN, Goal.UP, ["change_pool", "power_on"]),
    ],
)
def test_the_rules(state: State, goal: Goal, actions: list[str]) -> None:
    assert names(state, goal) == actions


def test_a_state_equals_the_goal_of_its_name() -> None:
    assert State.UP == Goal.UP
    assert State.DOWN != Goal.UP


def drained(host: Host) -> Host:
    """Drain it, look by look, as the engine would."""
    while host.state != State.DRAINED:
        try:
            said = drain(CTX, HostEntity(host.name))
        except DrainError:
            failures = host.drain_failures + 1
        else:
            failures = host.drain_failures
        looks = host.drain_looks + 1
        host.refresh_from_db()
        assert (host.drain_looks, host.drain_failures) == (looks, failures)
        if not host.trouble:
            assert isinstance(said, Requeue) == (host.state == State.DRAINING)
        assert looks < 50
    assert host.workloads == 0
    return host


@pytest.mark.parametrize("rack", [f"r{number:02}" for number in range(1, 11)])
def test_every_rack_has_a_drain_that_fails_and_one_of_several_looks(rack: str) -> None:
    hosts = [drained(host) for host in Host.objects.filter(rack=rack)]
    assert any(host.drain_failures for host in hosts)
    assert any(host.drain_looks - host.drain_failures > 1 for host in hosts)


def test_a_failed_look_is_remembered_and_moves_nothing() -> None:
    before = next(host for host in Host.objects.all() if refusal(host, look=1))
    with pytest.raises(DrainError) as raised:
        drain(CTX, HostEntity(before.name))
    after = Host.objects.get(pk=before.name)
    assert str(raised.value) == f"{after.name}: {after.trouble}"
    assert after.workloads == before.workloads
    assert after.events.get().kind == Event.Kind.FAILURE


def test_down_and_up_again() -> None:
    host = drained(Host.objects.get(pk="web-017"))
    power_off(CTX, HostEntity("web-017"))
    host.refresh_from_db()
    assert host.state == State.DOWN
    power_on(CTX, HostEntity("web-017"))
    host.refresh_from_db()
    assert (host.state, host.workloads) == (State.UP, host.slots)


def test_a_stalled_worker_that_wakes_up_writes_nothing() -> None:
    """Another has switched the host on again meanwhile."""
    power_off(CTX, HostEntity("web-017"))
    power_on(SimpleNamespace(fencing_token=2), HostEntity("web-017"))
    before = Host.objects.filter(pk="web-017").values().get()
    for late in (drain, power_off, power_on, change_pool):
        with pytest.raises(StaleWrite, match="a newer evaluation has written to web-017"):
            late(CTX, HostEntity("web-017"))
    host = Host.objects.get(pk="web-017")
    assert Host.objects.filter(pk="web-017").values().get() == before
    assert [event.text for event in host.events.all()] == ["powered on", "powered off"]


def test_a_change_of_pool_happens_once() -> None:
    Host.objects.filter(pk="web-017").update(goal_pool="api")
    for _ in range(2):
        change_pool(CTX, HostEntity("web-017"))
    host = Host.objects.get(pk="web-017")
    assert host.pool == "api"
    assert [event.text for event in host.events.all()] == ["moved from pool web to api"]


def test_the_engine_is_told_who_is_not_at_goal() -> None:
    Host.objects.filter(pk="web-017").update(goal=Goal.DOWN)
    Host.objects.filter(pk="api-001").update(goal_pool="web")
    assert set(HostEntity.iter_unconverged()) == {"web-017", "api-001"}


def test_a_resync_finds_what_the_engine_was_not_told() -> None:
    Host.objects.filter(pk="web-017").update(goal=Goal.DOWN)
    assert engine.resync("host") == 1
    assert engine.is_scheduled(HostEntity("web-017"))


def test_a_host_that_left_the_inventory_is_given_up() -> None:
    with pytest.raises(PermanentError, match="no host web-999"):
        HostEntity("web-999").get_state()
