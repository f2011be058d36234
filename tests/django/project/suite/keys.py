"""One row, one entity: however its primary key is given."""

import uuid

from django.db import transaction
from orders.entities import OrderEntity, ParcelEntity, SeatEntity
from orders.models import Order, Parcel, Seat
from shop.celery import engine

from celery_goalstate.contrib.django import enqueue_on_commit
from celery_goalstate.exceptions import PermanentError

from .base import Case


class Keys(Case):
    def test_an_integer(self):
        order = Order.objects.create(pk=42)
        entities = [OrderEntity(given) for given in (order, 42, "42", "0042", " 42 ", "4_2")]
        self.assertEqual({entity.id for entity in entities}, {"42"})
        self.assertEqual({entity.pk for entity in entities}, {42})
        self.assertEqual(entities[0].obj, order)

    def test_a_uuid(self):
        key = uuid.UUID("0C9A5F2E-0000-4000-8000-00000000AAAA")
        parcel = Parcel.objects.create(id=key)
        spellings = [parcel, key, str(key), str(key).upper(), key.hex, f"{{{key}}}", key.urn]
        self.assertEqual({ParcelEntity(given).id for given in spellings}, {str(key)})
        self.assertEqual(ParcelEntity(key.hex).obj, parcel)

    def test_a_composite_one(self):
        seat = Seat.objects.create(train='IC "7"', number=1)
        entities = [
            SeatEntity(given)
            for given in (seat, seat.pk, ['IC "7"', "01"], '["IC \\"7\\"", "1"]', SeatEntity(seat).id)
        ]
        self.assertEqual({entity.id for entity in entities}, {'["IC \\"7\\"",1]'})
        self.assertEqual(SeatEntity.from_id(entities[0].id).obj, seat)

    def test_id_of(self):
        self.assertEqual(OrderEntity.id_of("0042"), "42")
        self.assertEqual(SeatEntity.id_of(("a", "1")), '["a",1]')

    def test_what_is_no_key_is_refused_by_its_value(self):
        for cls, given, error, named in [
            (OrderEntity, "forty-two", ValueError, "orders.Order.id is 'forty-two'"),
            (OrderEntity, None, TypeError, "orders.Order.id is None"),
            (OrderEntity, 1.7, TypeError, "orders.Order.id is 1.7"),
            (OrderEntity, True, TypeError, "orders.Order.id is True"),
            (OrderEntity, Order(), TypeError, "give the primary key of a row that is saved"),
            (OrderEntity, Parcel(), TypeError, "is no orders.Order, whose rows are of kind order"),
            (ParcelEntity, "7", ValueError, "orders.Parcel.id is '7'"),
            (SeatEntity, "a-1", ValueError, r"orders.Seat is 'a-1'; give \(train, number\)"),
            (SeatEntity, '["a"]', ValueError, r"orders.Seat is \['a'\]"),
            (SeatEntity, ("a", None), TypeError, "orders.Seat.number is None"),
            (SeatEntity, 7, ValueError, "orders.Seat is 7"),
        ]:
            with self.subTest(given=given), self.assertRaisesRegex(error, named):
                cls(given)

    def test_a_worker_evaluates_no_second_entity_of_a_row(self):
        Order.objects.create(pk=42)
        for id in ("0042", "forty-two"):
            with self.subTest(id), self.assertRaises(PermanentError):
                OrderEntity.from_id(id)
        engine.enqueue(engine.ref("order", "0042"))  # evaluated at once
        found = engine.describe(engine.ref("order", "0042"))
        self.assertEqual(found.status, "failed")
        self.assertIn("its entity is order/42: enqueue that", found.error)
        self.assertEqual(Order.objects.get().status, "paid")

    def test_a_reference_that_is_enqueued_on_commit_gets_the_one_id(self):
        Order.objects.create(pk=42)
        with self.captureOnCommitCallbacks(execute=True), transaction.atomic():
            enqueue_on_commit(engine.ref("order", "0042"))
        self.assertTrue(engine.describe(OrderEntity(42)).converged)
        self.assertIsNone(engine.describe(engine.ref("order", "0042")))
