"""`ModelEntity`: what it reads and writes, and with how many statements."""

import uuid
from unittest import mock, skipUnless

from django.db import OperationalError, connection, models
from django.test.utils import CaptureQueriesContext
from orders.entities import OrderEntity, ParcelEntity, SeatEntity
from orders.models import Order, Parcel, Seat, Status
from shop.celery import engine

from celery_goalstate import Rules
from celery_goalstate.contrib.django import ModelEntity, StateChanged
from celery_goalstate.contrib.django.models import unconverged_index
from celery_goalstate.exceptions import EntityGone

from .base import Case, described


class Rows(Case):
    def test_a_kind_is_named_after_its_model(self):
        self.assertEqual(OrderEntity.kind, "order")
        named = type("Named", (ModelEntity,), {"model": Order, "kind": "order.archive", "rules": Rules({})})
        self.assertEqual(named.kind, "order.archive")

    def test_an_order_is_shipped(self):
        order = Order.objects.create()
        before = order.changed
        engine.enqueue(OrderEntity(order))
        order.refresh_from_db()
        self.assertEqual((order.status, order.packed), (Status.SHIPPED, 1))
        self.assertGreater(order.changed, before, "auto_now")
        self.assertTrue(described(order).converged)

    def test_a_row_that_is_gone_is_forgotten(self):
        order = Order.objects.create()
        entity = order.entity
        engine.enqueue(entity, 3600)
        order.delete()
        engine.enqueue(entity)
        self.assertIsNone(engine.describe(entity))
        for ask in (lambda: entity.obj, entity.get_state, entity.get_goal_state, entity.locked().__enter__):
            with self.assertRaisesRegex(EntityGone, f"there is no order {entity.id}"):
                ask()

    def test_a_row_without_a_goal_has_nothing_to_do(self):
        for state in (None, "hub"):
            parcel = ParcelEntity(Parcel.objects.create(state=state))
            engine.enqueue(parcel)
            self.assertTrue(engine.describe(parcel).converged)
            self.assertEqual(list(ParcelEntity.iter_unconverged()), [])

    def test_a_row_whose_state_is_not_known_is_off_its_goal(self):
        parcel = Parcel.objects.create(goal="hub")
        self.assertEqual(list(ParcelEntity.iter_unconverged()), [str(parcel.pk)])
        self.assertEqual(engine.resync("parcel"), 1)
        parcel.refresh_from_db()
        self.assertEqual(parcel.state, "hub")

    def test_a_broken_connection_is_replaced_only_outside_a_transaction(self):
        """A `TestCase` is inside one: a new connection would not know what was written before."""
        entity = OrderEntity(Order.objects.create())
        with (
            mock.patch.object(models.QuerySet, "get", side_effect=OperationalError("closed")) as get,
            mock.patch.object(connection, "is_usable", return_value=False),
            self.assertRaises(OperationalError),
        ):
            _ = entity.obj
        self.assertEqual(get.call_count, 1)


class Statements(Case):
    """Each is one round trip to the database."""

    def evaluate(self, row, expected):
        with self.assertNumQueries(expected) as captured:
            engine.enqueue(row if isinstance(row, ModelEntity) else row.entity)
        return [query["sql"].split()[0] for query in captured.captured_queries]

    def test_nothing_to_do_is_one_select(self):
        self.assertEqual(self.evaluate(Order.objects.create(status=Status.SHIPPED), 1), ["SELECT"])

    def test_a_transition_is_one_update_between_two_selects(self):
        order = Order.objects.create(status=Status.PACKED)
        self.assertEqual(self.evaluate(order, 3), ["SELECT", "UPDATE", "SELECT"])

    def test_also_for_each_entity_of_a_batch(self):
        parcels = Parcel.objects.bulk_create([Parcel(state="hub", goal="depot") for _ in range(10)])
        with self.assertNumQueries(30) as captured:
            engine.enqueue_many(map(ParcelEntity, parcels))
        words = [query["sql"].split()[0] for query in captured.captured_queries]
        self.assertEqual(words, ["SELECT", "UPDATE", "SELECT"] * 10)

    def test_an_action_that_uses_the_row_reads_it_no_second_time(self):
        used = []

        def ship(entity, ctx):
            used.append(entity.obj.note)
            entity.transition(Status.PACKED, Status.SHIPPED)

        order = Order.objects.create(status=Status.PACKED, note="gift")
        with mock.patch.object(OrderEntity, "ship", ship):
            self.assertEqual(self.evaluate(order, 3), ["SELECT", "UPDATE", "SELECT"])
        self.assertEqual(used, ["gift"])


class Transitions(Case):
    def test_only_from_the_states_that_are_named(self):
        order = Order.objects.create()
        entity = order.entity
        with self.assertRaisesRegex(StateChanged, f"order/{order.pk} is not in state 'packed'") as raised:
            entity.transition(Status.PACKED, Status.SHIPPED)
        self.assertEqual(raised.exception.seconds, 0)
        entity.transition({Status.PAID, Status.PACKED}, Status.SHIPPED, note="by train")
        order.refresh_from_db()
        self.assertEqual((order.status, order.note), (Status.SHIPPED, "by train"))

    def test_what_was_read_before_is_read_again(self):
        entity = Order.objects.create().entity
        self.assertEqual(entity.get_state(), Status.PAID)
        entity.transition(Status.PAID, Status.PACKED)
        self.assertEqual(entity.get_state(), Status.PACKED)

    def test_from_null(self):
        parcel = ParcelEntity(Parcel.objects.create())
        parcel.transition([None, "hub"], "depot")
        parcel.transition([None, "depot"], "hub")
        self.assertEqual(parcel.get_state(), "hub")
        with self.assertRaises(StateChanged):
            parcel.transition(None, "depot")

    def test_a_state_that_is_none_is_refused(self):
        entity = Order.objects.create().entity
        with self.assertRaisesRegex(ValueError, "'shiped'. Did you mean shipped"):
            entity.transition(Status.PAID, "shiped")
        self.assertEqual(entity.get_state(), Status.PAID)

    def test_a_row_that_has_changed_meanwhile_is_no_failure(self):
        """A customer cancels while the order is being shipped."""
        order = Order.objects.create(status=Status.PACKED)

        def ship(entity, ctx):
            Order.objects.filter(pk=entity.pk).update(status=Status.CANCELLED)
            entity.transition(Status.PACKED, Status.SHIPPED)

        with mock.patch.object(OrderEntity, "ship", ship):
            engine.enqueue(order.entity)
        found = described(order)
        self.assertEqual((found.failures, found.status, found.converged), (0, "idle", False))
        order.refresh_from_db()
        self.assertEqual(order.status, Status.CANCELLED)


class Locked(Case):
    def test_saves_the_columns_that_changed_and_no_others(self):
        order = Order.objects.create(note="gift")
        entity, before = order.entity, order.changed
        self.assertEqual(entity.get_state(), Status.PAID)
        with entity.locked() as row, self.assertNumQueries(0):
            row.status = Status.PACKED
            row.packed += 1
        self.assertEqual(entity.get_state(), Status.PACKED)
        order.refresh_from_db()
        self.assertEqual((order.packed, order.note), (1, "gift"))
        self.assertGreater(order.changed, before)

    def test_nothing_changed_is_nothing_written(self):
        order = Order.objects.create()
        before = order.changed
        with order.entity.locked():
            pass
        order.refresh_from_db()
        self.assertEqual(order.changed, before)

    def test_an_exception_undoes_it(self):
        order = Order.objects.create()
        with self.assertRaises(ZeroDivisionError), order.entity.locked() as row:
            row.status = Status.PACKED
            row.save()
            raise ZeroDivisionError
        order.refresh_from_db()
        self.assertEqual(order.status, Status.PAID)


class Unconverged(Case):
    def test_page_by_page(self):
        orders = Order.objects.bulk_create([Order(status=Status.PAID) for _ in range(7)])
        Order.objects.bulk_create([Order(status=Status.SHIPPED) for _ in range(7)])
        with mock.patch("celery_goalstate.contrib.django.entity.PAGE", 3), self.assertNumQueries(3):
            found = list(OrderEntity.iter_unconverged())
        self.assertEqual(found, [str(order.pk) for order in orders])
        self.assertEqual(list(Order.objects.unconverged()), orders)

    def test_over_uuids_and_composite_keys(self):
        keys = sorted((uuid.uuid4() for _ in range(5)), key=str)
        Parcel.objects.bulk_create([Parcel(id=key, state="a", goal="b") for key in keys])
        Seat.objects.bulk_create(
            [Seat(train=train, number=n, goal="sold") for train in "ab" for n in range(4)]
        )
        with mock.patch("celery_goalstate.contrib.django.entity.PAGE", 3):
            self.assertEqual(list(ParcelEntity.iter_unconverged()), [str(key) for key in keys])
            self.assertEqual(
                list(SeatEntity.iter_unconverged()), [f'["{train}",{n}]' for train in "ab" for n in range(4)]
            )
        self.assertEqual(engine.resync("seat"), 8)
        self.assertFalse(Seat.objects.exclude(state="sold"))

    @skipUnless(connection.vendor == "sqlite", "of SQLite; that of PostgreSQL is asked with many rows")
    def test_the_partial_index_is_read(self):
        with CaptureQueriesContext(connection) as queries:
            list(OrderEntity.iter_unconverged())
        [query] = queries.captured_queries
        with connection.cursor() as cursor:
            [plan] = cursor.execute(f"EXPLAIN QUERY PLAN {query['sql']}").fetchall()
        self.assertIn("USING INDEX order_unconverged", plan[-1])

    def test_an_index_needs_one_field_that_is_the_key(self):
        index = unconverged_index("state", "goal", name="x", key="number")
        self.assertIs(type(index), models.Index)
        self.assertEqual(index.fields, ["number"])
        for key in ("pk", ("train", "number")):
            with self.assertRaisesRegex(ValueError, "give the name of the one field"):
                unconverged_index("state", "goal", name="x", key=key)
