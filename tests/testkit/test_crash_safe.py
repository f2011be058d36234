"""`check_crash_safe`: what it finds, what it lets pass, and how it says so."""

from __future__ import annotations

import gc
import logging
import re
import socket
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from celery_goalstate.entity import Entity
from celery_goalstate.testing import NotCrashSafe, NotRepeatable, Simulation, check_crash_safe, fail
from tests.testkit.shop import Shop

LINES = 40

TWICE = """\
not crash-safe: 3 of 6 schedules end in another world. The shortest:

      0.0 s  order/42: placed, goal shipped
                 charge_twice
                 Provider.charge('42', 100)
                 ☠ worker killed after Provider.charge
     33.0 s    order/42: worker lost, its lease is over; failure 1; again in 10 s
     43.0 s  order/42: placed, goal shipped
                 charge_twice
                 Provider.charge('42', 100)
                 ship
               converged

Ends differently from an undisturbed run:
    charges: expected [('42', 100)]
             got      [('42', 100), ('42', 100)]

Likewise: 'kill after charge_twice', 'kill before ship'

Repeat it: check_crash_safe(..., schedule='kill after Provider.charge')"""


def check(shop: Shop, cls: type[Entity], **options: Any) -> Any:
    usual = {"snapshot": shop.seen, "effects": [(shop.provider, "charge")], "engine": shop.engine}
    return check_crash_safe(shop.world(cls), **(usual | options))


def story(report: str) -> str:
    return report.split("\n\n")[1]


def test_a_charge_without_a_key_is_not_crash_safe(shop: Shop) -> None:
    twice = shop.order(charge_twice=shop.charge_twice, ship=shop.ship)
    with pytest.raises(NotCrashSafe) as raised:
        check(shop, twice)
    assert str(raised.value) == TWICE
    assert raised.value.schedule == "kill after Provider.charge"


def test_a_charge_with_a_key_is_crash_safe_at_any_two_points(shop: Shop) -> None:
    once = shop.order(charge_once=shop.charge_once, ship=shop.ship)
    checked = check(shop, once, depth=2)
    assert checked.exhausted
    assert checked.points == 7  # between looks; before and after two actions and a call
    assert checked.schedules > 6 + 6 * 2  # each of the six, and pairs of them


def test_a_cleanup_in_a_finally_is_not_crash_safe(shop: Shop) -> None:
    """An exception as the kill would run the `finally`, and see nothing."""
    cleanup = shop.order(charge_with_cleanup=shop.charge_with_cleanup)
    with pytest.raises(NotCrashSafe, match=r"kill after Provider\.charge"):
        check(shop, cleanup)


def test_by_an_exception_the_cleanup_looks_crash_safe(shop: Shop) -> None:
    cleanup = shop.order(charge_with_cleanup=shop.charge_with_cleanup)
    with Simulation(shop.engine) as simulation:
        simulation.watch((shop.provider, "charge"))
        simulation.at("after Provider.charge", fail(SystemExit()))
        order = shop.world(cleanup)()
        with pytest.raises(SystemExit):
            simulation.assert_converges(order)
        simulation.assert_converges(order)
        assert shop.seen(order) == {"status": "shipped", "charges": [("42", 100)]}


def test_a_killed_worker_stays_dead(shop: Shop) -> None:
    """Also when the garbage collector comes by, which ends a greenlet by an exception."""
    order = shop.order(charge_with_cleanup=shop.charge_with_cleanup)
    with pytest.raises(NotCrashSafe):
        check(shop, order)
    charged = list(shop.provider.charges)
    gc.collect()
    assert shop.provider.charges == charged


def test_a_dead_worker_does_not_wake_when_the_process_ends() -> None:
    script = """
        from tests.testkit.test_crash_safe import Shop, check_crash_safe

        shop = Shop()

        def stay(ctx, order):
            try:
                shop.provider.charge(order.id, 100)
            finally:
                print("undone")
            shop.ship(ctx, order)

        check_crash_safe(
            shop.world(shop.order(stay=stay)), engine=shop.engine,
            effects=[(shop.provider, "charge")], schedule="kill after Provider.charge",
        )
        print("once, in the run that goes on; and twice in those without a fault")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.splitlines() == [
        *["undone"] * 3,
        "once, in the run that goes on; and twice in those without a fault",
    ]
    assert not done.stderr


@pytest.mark.parametrize("name", ["round", "polls"])
def test_what_never_rests_is_told_soon_and_shortly(shop: Shop, name: str) -> None:
    if name == "round":
        order, cycle = shop.order(pay=shop.pay), "placed –[pay] → paid –[ship] → placed …"
        order.ship = order.unship = lambda self, ctx: shop.unship(ctx, self)  # type: ignore[attr-defined]
    else:
        order, cycle = shop.order(poll=shop.poll), "placed –[poll] → placed …"
    with pytest.raises(AssertionError) as raised:
        check(shop, order, effects=[])
    report = str(raised.value)
    assert re.search(r"it goes round and round \(\d+ looks\): " + re.escape(cycle), report)
    assert "… and so on: " in report
    assert len(report.splitlines()) < LINES


def test_a_story_of_many_lines_is_cut_to_what_matters(shop: Shop) -> None:
    steps = {f"step_{n}": lambda ctx, order: None for n in range(60)}
    order = shop.order(**steps, charge=shop.charge_twice, ship=shop.ship)
    with pytest.raises(NotCrashSafe) as raised:
        check(shop, order)
    report = str(raised.value)
    assert len(report.splitlines()) < LINES
    assert "☠ worker killed after Provider.charge" in report
    assert "more lines" in report
    assert "Repeat it: " in report


def test_two_runs_that_differ_are_refused_before_anything_happens(shop: Shop) -> None:
    order = shop.order(ship=shop.ship)
    taken = []

    def snapshot(_: Entity) -> uuid.UUID:
        taken.append(uuid.uuid4())
        return taken[-1]

    with pytest.raises(NotRepeatable, match="two runs without a fault differ") as raised:
        check_crash_safe(shop.world(order), snapshot=snapshot, engine=shop.engine)
    assert len(taken) == 2
    assert repr(taken[0]) in str(raised.value)


def test_a_snapshot_is_what_was_there_then_not_what_is_there_now(shop: Shop) -> None:
    """A snapshot that returns the ledger itself would be equal to that of any later run."""
    twice = shop.order(charge_twice=shop.charge_twice, ship=shop.ship)
    with pytest.raises(NotCrashSafe):
        check_crash_safe(shop.world(twice), snapshot=lambda _: shop.provider.charges, engine=shop.engine)


def test_what_does_not_converge_by_itself_is_no_crash(shop: Shop) -> None:
    def explode(ctx: Any, order: Entity) -> None:
        raise ValueError("no stock")

    order = shop.engine.register(shop.order(explode=explode))
    with pytest.raises(AssertionError, match="without any fault it does not converge: it is not at rest"):
        check(shop, order, effects=[])


def test_a_schedule_repeats_one_run_with_the_same_story(shop: Shop) -> None:
    twice = shop.order(charge_twice=shop.charge_twice, ship=shop.ship)
    with pytest.raises(NotCrashSafe) as raised:
        check(shop, twice)
    with pytest.raises(NotCrashSafe) as again:
        check(shop, twice, schedule=raised.value.schedule)
    assert story(str(again.value)) == story(str(raised.value))
    assert "1 of 1 schedules end" in str(again.value)


def test_a_schedule_tells_the_same_story_in_another_process() -> None:
    script = """
        from tests.testkit.test_crash_safe import NotCrashSafe, Shop, check_crash_safe, story

        class Client:
            def __init__(self, shop):
                self.shop = shop
            def charge(self, client, id, fence):
                self.shop.provider.charge(id, 100)

        shop = Shop()
        client = Client(shop)
        order = shop.order(charge=lambda ctx, order: client.charge(client, order.id, ctx.fencing_token))
        try:
            check_crash_safe(
                shop.world(order), snapshot=shop.seen, effects=[(client, "charge")], engine=shop.engine,
                schedule="kill after Client.charge",
            )
        except NotCrashSafe as error:
            print(story(str(error)))
    """
    script = script.replace("order.id, ctx.fencing_token))", "order.id, ctx.fencing_token), ship=shop.ship)")
    stories = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            capture_output=True,
            timeout=60,
            check=True,
            cwd=Path(__file__).parents[2],
        ).stdout.decode()
        for _ in range(2)
    }
    assert len(stories) == 1
    assert "Client.charge(<tests" not in stories.pop()  # an address, or the time, would differ


def test_a_schedule_that_leads_nowhere_is_refused(shop: Shop) -> None:
    order = shop.order(ship=shop.ship)
    with pytest.raises(NotRepeatable, match='never came to "after pack" of the schedule'):
        check(shop, order, effects=[], schedule="kill after pack")
    with pytest.raises(ValueError, match="schedule has 'explode after ship'"):
        check(shop, order, effects=[], schedule="explode after ship")


def test_an_effect_that_is_never_called_is_refused(shop: Shop) -> None:
    order = shop.order(ship=shop.ship)
    with pytest.raises(AssertionError, match=r"Provider\.charge is among the effects, and no action"):
        check(shop, order)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"faults": ["explode"]}, "faults is "),
        ({"faults": []}, "faults is "),
        ({"faults": ["timeout"], "effects": []}, "name the functions that may time out"),
        ({"depth": 0}, "depth is 0"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_bad_input_is_refused(shop: Shop, options: dict[str, Any], message: str) -> None:
    order = shop.order(ship=shop.ship)
    with pytest.raises(ValueError, match=message):
        check_crash_safe(shop.world(order), engine=shop.engine, **options)


def test_a_limit_is_told(shop: Shop) -> None:
    once = shop.order(charge_once=shop.charge_once, ship=shop.ship)
    checked = check(shop, once, limit=3)
    assert (checked.schedules, checked.exhausted) == (3, False)
    assert "the limit was reached" in str(checked)


def ship_late(shop: Shop, *, guarded: bool) -> Any:
    """Pays, then writes. Guarded: not if a newer evaluation has written."""
    fences = {"42": 0}

    def ship_late(ctx: Any, order: Entity) -> None:
        shop.provider.charge(order.id, 100, "once")
        if guarded and ctx.fencing_token < fences[order.id]:
            raise RuntimeError("a newer evaluation has written to this order")
        fences[order.id] = ctx.fencing_token
        shop.ship(ctx, order)
        shop.provider.charges.append(("a parcel", 1))

    return ship_late


def test_a_late_write_of_a_stalled_worker_is_found(shop: Shop) -> None:
    order = shop.order(ship_late=ship_late(shop, guarded=False))
    with pytest.raises(NotCrashSafe) as raised:
        check(shop, order, faults=["lose_lease"])
    report = str(raised.value)
    assert raised.value.schedule == "lose_lease before ship_late"
    assert "⏸ worker stalls before ship_late; its lease runs out, and another takes over:" in report
    assert "▶ the stalled worker goes on" in report
    assert "its lease was lost: the outcome is dropped" in report
    assert len(report.splitlines()) < LINES


def test_a_guarded_write_is_safe_from_stalled_workers(shop: Shop) -> None:
    order = shop.order(ship_late=ship_late(shop, guarded=True))
    assert check(shop, order, faults=["lose_lease"]).schedules == 4


def test_a_timeout_leaves_open_whether_it_happened(shop: Shop) -> None:
    twice = shop.order(charge_twice=shop.charge_twice, ship=shop.ship)
    with pytest.raises(NotCrashSafe, match=r"timeout after Provider\.charge"):
        check(shop, twice, faults=["timeout"])


def test_a_key_makes_a_timeout_harmless(shop: Shop) -> None:
    once = shop.order(charge_once=shop.charge_once, ship=shop.ship)
    assert check(shop, once, faults=["timeout"]).schedules == 2  # before the call, and after it


def test_no_thread_and_no_socket(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a check opened a socket, or began a thread")

    monkeypatch.setattr(socket.socket, "__init__", refuse)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    once = shop.order(charge_once=shop.charge_once, ship=shop.ship)
    check(shop, once, faults=["kill", "lose_lease", "timeout"])


def test_logs_are_off_meanwhile_and_on_again(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    once = shop.order(charge_once=shop.charge_once, ship=shop.ship)
    check(shop, once)
    assert not caplog.records
    logging.getLogger("celery_goalstate").warning("on again")
    assert caplog.messages == ["on again"]


def test_a_world_may_be_a_context_manager(shop: Shop) -> None:
    order = shop.order(ship=shop.ship)
    closed = []

    @contextmanager
    def world() -> Iterator[Entity]:
        yield shop.world(order)()
        closed.append(1)

    checked = check_crash_safe(world, engine=shop.engine)
    assert len(closed) == checked.schedules + 2


def test_a_world_without_an_entity_is_refused(shop: Shop) -> None:
    with pytest.raises(TypeError, match="the world has None"):
        check_crash_safe(lambda: None, engine=shop.engine)  # type: ignore[arg-type,return-value]
