"""Several databases: a replica that lags behind for ever, and a kind whose rows are elsewhere."""

from unittest import mock

from django.db import transaction
from django.test import override_settings
from orders.entities import OrderEntity
from orders.models import Order, Status
from shop.celery import engine

from celery_goalstate.contrib.django import enqueue_many_on_commit, enqueue_on_commit, set_goal

from .base import TransactionCase, described


class Replica:
    def db_for_read(self, model, **hints):
        return "other"

    def db_for_write(self, model, **hints):
        return "default"


@override_settings(DATABASE_ROUTERS=["suite.databases.Replica"])
class BehindAReplica(TransactionCase):
    databases = {"default", "other"}

    def setUp(self):
        super().setUp()
        self.order = Order.objects.create()
        self.assertFalse(Order.objects.exists(), "the replica has heard of nothing")

    def row(self):
        return Order.objects.using("default").get()

    def test_an_entity_reads_what_was_written(self):
        self.assertEqual(OrderEntity(self.order.pk).obj, self.order)
        self.assertEqual(list(OrderEntity.iter_unconverged()), [str(self.order.pk)])
        with OrderEntity(self.order.pk).locked() as row:
            row.note = "gift"
        self.assertEqual(self.row().note, "gift")

    def test_goals_are_set_and_waited_for_where_they_are_written(self):
        stale = Order.objects.using("default").get()
        stale._state.db = "other"  # as if it came from there
        for rows in (stale, Order.objects.all()):
            with transaction.atomic():
                self.assertEqual(set_goal(rows, Status.CANCELLED, note="too late"), 1)
                self.assertIsNone(described(self.order))
            self.assertEqual((self.row().status, self.row().note), (Status.CANCELLED, "too late"))
            Order.objects.using("default").update(status=Status.PAID, wanted=Status.SHIPPED)
            engine.delete_kind("order")

    def test_rows_are_enqueued_that_the_replica_has_not_yet(self):
        with transaction.atomic():
            enqueue_many_on_commit(Order.objects.all())
            enqueue_on_commit(self.order)
            self.assertIsNone(described(self.order))
        self.assertEqual(self.row().status, Status.SHIPPED)


class Elsewhere(TransactionCase):
    databases = {"default", "other"}

    def test_a_kind_has_its_own_database(self):
        with mock.patch.object(OrderEntity, "using", "other"):
            order = Order.objects.using("other").create()
            with transaction.atomic(using="other"):
                enqueue_on_commit(OrderEntity(order.pk), 60)
                enqueue_many_on_commit(Order.objects.all(), 60)
                self.assertEqual(set_goal(Order.objects.all(), Status.CANCELLED), 1)
                self.assertIsNone(described(order))
            order.refresh_from_db()
            self.assertEqual(order.status, Status.CANCELLED)
        self.assertFalse(Order.objects.using("default").exists())
