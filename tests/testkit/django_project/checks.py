"""The tests of this project, as a user has them. Run by `test_django.py`, once for each database."""

import unittest
from contextlib import suppress

import pytest
from django.db import connection, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.test import TestCase, TransactionTestCase
from shop import engine, entities, models

from celery_goalstate.contrib.django import enqueue_on_commit
from celery_goalstate.testing import (
    NotCrashSafe,
    Simulation,
    check_concurrent,
    check_crash_safe,
    check_idempotent,
    fail,
    kill,
    lose_lease,
)

both = pytest.mark.parametrize(
    "database",
    [
        pytest.param("db", marks=pytest.mark.django_db),
        pytest.param("transactional_db", marks=pytest.mark.django_db(transaction=True)),
    ],
)


def world(**fields):
    models.Order.objects.create(number="42", **fields)
    return entities.Order("42")


def rows():
    return [list(model.objects.values()) for model in (models.Order, models.Payment, models.Parcel)]


def seen(order):
    row = models.Order.objects.get(pk=order.id)
    return {
        "order": row.state,
        "payments": [payment.amount for payment in row.payments.all()],
        "parcels": list(models.Parcel.objects.values_list("state", flat=True)),
    }


def points(order, *, fault=None, at=None):
    with Simulation(engine) as simulation:
        if at:
            simulation.at(at, fault)
        simulation.assert_converges(order)
        return [point.name for point in simulation.points if point.name.endswith("commit")], simulation


@both
def test_each_commit_is_a_point(database):
    names, simulation = points(world())
    # One of the payment, two of the shipment, and the parcel's update, which commits by itself.
    assert names == ["before commit", "after commit"] * 4
    assert "commit" in simulation.story()


@both
def test_killed_at_every_commit(database):
    checked = check_crash_safe(world, snapshot=seen, depth=2, faults=["kill"])
    assert checked.exhausted
    assert checked.schedules > 100
    assert rows() == [[], [], []]


@both
def test_stalled_outside_of_transactions(database):
    checked = check_crash_safe(world, snapshot=seen, faults=["lose_lease"])
    assert checked.exhausted
    assert rows() == [[], [], []]


@both
def test_a_goal_changes_meanwhile(database):
    def cancel(order):
        models.Order.objects.filter(pk=order.id).update(goal="cancelled")
        engine.enqueue(order)

    check_concurrent(world, cancel, snapshot=lambda order: seen(order)["order"])


@both
def test_a_soft_kill_passes_the_same_points_and_ends_the_same(database):
    """An exception that ends a process, where nothing has a `finally`."""
    ends = {}
    for fault in (kill, fail(SystemExit())):
        found = ends[str(fault)] = []
        for n in range(1, 5):
            for where in ("before commit", "after commit"):
                order = world()
                with Simulation(engine) as simulation:
                    simulation.at(where, fault, nth=n)
                    engine.enqueue(order)
                    try:
                        simulation.run_until_idle()
                    except SystemExit:
                        simulation.run_until_idle()
                    found.append(([point[:2] for point in simulation.points], seen(order)))
                models.Order.objects.all().delete()
    one, other = ends.values()
    assert one == other


@both
def test_a_kill_before_a_commit_undoes_it_and_after_keeps_it(database):
    for where, payments in (("before commit", 0), ("after commit", 1)):
        order = world()
        with Simulation(engine) as simulation:
            simulation.at(where, kill)
            engine.enqueue(order)
            simulation.advance(seconds=1)
            assert models.Payment.objects.count() == payments
            assert not connection.needs_rollback
            simulation.run_until_idle()
        models.Order.objects.all().delete()


@both
def test_a_kill_within_a_transaction_undoes_it(database):
    order = world()
    with Simulation(engine) as simulation:
        simulation.watch("shop.models.Parcel.save")
        simulation.at("after shop.models.Parcel.save", kill)
        engine.enqueue(order)
        simulation.advance(seconds=1)
        assert models.Parcel.objects.count() == 0
        simulation.run_until_idle()
    assert seen(order) == {"order": "shipped", "payments": [100], "parcels": ["sent"]}


@both
def test_what_waits_for_a_commit(database, goalstate):
    order = world()
    with suppress(ZeroDivisionError), transaction.atomic():
        enqueue_on_commit(order, engine=engine)
        raise ZeroDivisionError
    goalstate.assert_not_scheduled(order)
    with transaction.atomic():
        inner = transaction.atomic()
        with inner:
            enqueue_on_commit(order, engine=engine)
        goalstate.assert_not_scheduled(order)
    goalstate.assert_scheduled(order)
    other = entities.Order("43")
    enqueue_on_commit(other, engine=engine)  # in no transaction but the test's
    goalstate.assert_scheduled(other)


@both
def test_a_durable_transaction_is_one(database, goalstate):
    with transaction.atomic(durable=True):
        order = world()
        enqueue_on_commit(order, engine=engine)
    goalstate.assert_converges(order)


@both
def test_an_enqueue_before_the_commit_is_an_error(database, goalstate):
    """The mutant "enqueue outside of on_commit"."""
    order = world()
    message = "order/42 is enqueued inside a transaction: a worker may look"
    with pytest.raises(AssertionError, match=message), transaction.atomic():
        engine.enqueue(order)
    with transaction.atomic():
        engine.enqueue(order, 60)  # later: by then it is committed


@both
def test_an_action_that_enqueues_before_its_commit_fails(database, monkeypatch):
    def ship(self, ctx):
        with transaction.atomic():
            models.Parcel.objects.get_or_create(order_id=self.id)
            ctx.enqueue(entities.Parcel(self.id))
            models.Order.objects.filter(pk=self.id).update(state="shipped")

    monkeypatch.setattr(entities.Order, "ship", ship)
    with pytest.raises(AssertionError, match="parcel/42 is enqueued inside a transaction"):
        check_crash_safe(world, snapshot=seen)


@both
def test_an_effect_before_its_commit_is_found(database, monkeypatch):
    """Two transactions where one was needed."""

    def pay(self, ctx):
        models.Order.objects.get(pk=self.id).payments.create(amount=100)
        models.Order.objects.filter(pk=self.id).update(state="paid")

    monkeypatch.setattr(entities.Order, "pay", pay)
    with pytest.raises(NotCrashSafe) as raised:
        check_crash_safe(world, snapshot=seen)
    assert raised.value.schedule == "kill after commit"
    assert "☠ worker killed after commit" in str(raised.value)
    assert rows() == [[], [], []]


@both
def test_no_worker_stalls_within_a_transaction(database, goalstate):
    goalstate.at("before commit", lose_lease)
    with pytest.raises(RuntimeError, match="the worker cannot stall before commit, in a transaction"):
        goalstate.assert_converges(world())


@both
def test_an_action_twice(database):
    check_idempotent("pay", world, snapshot=seen)
    assert rows() == [[], [], []]


@both
def test_a_failing_commit_is_a_failure(database):
    order = world()
    names, _ = points(order, fault=fail(OSError("disk full")), at="before commit")
    assert names == ["before commit", *["before commit", "after commit"] * 4]
    assert seen(order) == {"order": "shipped", "payments": [100], "parcels": ["sent"]}


@both
def test_django_is_as_it_was(database):
    methods = [
        transaction.Atomic.__enter__,
        transaction.Atomic.__exit__,
        BaseDatabaseWrapper.on_commit,
    ]
    before = len(connection.execute_wrappers), connection.in_atomic_block, list(connection.savepoint_ids)
    check_crash_safe(world, snapshot=seen)
    assert methods == [
        transaction.Atomic.__enter__,
        transaction.Atomic.__exit__,
        BaseDatabaseWrapper.on_commit,
    ]
    assert before == (
        *(len(connection.execute_wrappers), connection.in_atomic_block),
        list(connection.savepoint_ids),
    )


def test_without_a_database_it_works_too(goalstate):
    """pytest-django lets this test use none."""
    goalstate.advance(seconds=1)
    calls = []

    def made():
        calls.append(1)
        return entities.Order("42")

    with pytest.raises(RuntimeError, match="Database access not allowed"):
        check_crash_safe(made)
    assert calls


class DjangosOwn(TestCase):
    def test_it(self):
        assert check_crash_safe(world, snapshot=seen).exhausted
        with Simulation(engine) as simulation:
            order = world()
            enqueue_on_commit(order, engine=engine)
            simulation.run_until_idle()
        assert seen(order)["order"] == "shipped"


class DjangosOwnWithTransactions(TransactionTestCase):
    def test_it(self):
        assert check_crash_safe(world, snapshot=seen).exhausted
        assert rows() == [[], [], []]


class Plain(unittest.TestCase):
    def test_the_fixture_is_for_functions_only(self):
        with Simulation(engine) as simulation:
            assert not simulation.looks
