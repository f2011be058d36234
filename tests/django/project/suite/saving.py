"""An ordinary `save` undoes nothing that the engine did meanwhile."""

import copy
import pickle

from django.db import models
from django.db.models import F
from django.db.transaction import atomic
from django.test.utils import isolate_apps
from orders.entities import OrderEntity
from orders.models import Order, Status

from celery_goalstate.contrib.django import ModelEntity, StateChanged, set_goal
from celery_goalstate.contrib.django.entity import columns_of

from .base import Case


class Columns(Case):
    @isolate_apps("orders")
    def test_are_named_as_a_row_has_them(self):
        """A foreign key, say: Django knows it by two names."""

        class Ticket(models.Model):
            stage = models.ForeignKey(Order, models.CASCADE)

            class Meta:
                app_label = "orders"

        type("TicketEntity", (ModelEntity,), {"model": Ticket, "state_field": "stage", "goal_field": "no"})
        self.assertEqual(columns_of(Ticket), {"stage_id"})


class Saving(Case):
    def setUp(self):
        super().setUp()
        self.pk = Order.objects.create(status=Status.PACKED).pk

    def order(self):
        return Order.objects.get(pk=self.pk)

    def moved(self, **columns):
        """A row that a view has loaded, before the engine moves it on."""
        loaded = self.order()
        Order.objects.filter(pk=self.pk).update(**(columns or {"status": Status.SHIPPED}))
        return loaded

    def test_a_stale_row_writes_neither_state_nor_goal(self):
        stale = self.moved(status=Status.SHIPPED, wanted=Status.CANCELLED)
        stale.note = "gift"
        stale.save()
        self.assertEqual(
            (self.order().status, self.order().wanted, self.order().note),
            (Status.SHIPPED, Status.CANCELLED, "gift"),
        )

    def test_also_one_that_was_not_loaded_whole(self):
        for rows in (Order.objects.defer("packed"), Order.objects.only("status", "note")):
            stale = rows.get(pk=self.pk)
            Order.objects.filter(pk=self.pk).update(status=Status.SHIPPED)
            stale.note = "gift"
            stale.save()
            self.assertEqual((self.order().status, self.order().note), (Status.SHIPPED, "gift"))
            Order.objects.filter(pk=self.pk).update(status=Status.PACKED)

    def test_a_state_that_was_changed_is_compared(self):
        stale = self.moved()
        stale.status = Status.CANCELLED
        stale.note = "gift"
        with self.assertRaisesRegex(StateChanged, "was loaded with status packed, and has changed"), atomic():
            stale.save()
        self.assertEqual((self.order().status, self.order().note), (Status.SHIPPED, ""))

    def test_in_one_statement(self):
        order = self.order()
        order.status = Status.SHIPPED
        with self.assertNumQueries(1):
            order.save()
        self.assertEqual(self.order().status, Status.SHIPPED)
        order.status = Status.CANCELLED  # what was written is what is compared from now on
        order.save()
        self.assertEqual(self.order().status, Status.CANCELLED)

    def test_a_column_that_is_named_is_written(self):
        stale = self.moved()
        stale.save(update_fields=["status"])
        self.assertEqual(self.order().status, Status.PACKED)

    def test_and_compared_if_it_was_changed(self):
        stale = self.moved()
        stale.status = Status.CANCELLED
        with self.assertRaises(StateChanged), atomic():
            stale.save(update_fields=["status"])
        stale.save(update_fields=["note"])
        with self.assertRaises(StateChanged), atomic():
            stale.save()

    def test_after_a_refresh_it_is_fresh(self):
        for options in ({}, {"fields": ["status"]}):
            Order.objects.filter(pk=self.pk).update(status=Status.PACKED)
            stale = self.moved()
            stale.refresh_from_db(**options)
            stale.status = Status.CANCELLED
            stale.save()
            self.assertEqual(self.order().status, Status.CANCELLED)

    def test_after_its_goal_was_set_it_is_fresh(self):
        order = self.order()
        set_goal(order, Status.CANCELLED, packed=F("packed") + 1)
        self.assertEqual((order.wanted, order.packed), (Status.CANCELLED, 1))
        order.wanted = Status.SHIPPED
        order.save()
        self.assertEqual((self.order().wanted, self.order().packed), (Status.SHIPPED, 1))

    def test_a_new_row_is_written_whole(self):
        order = Order(status=Status.CANCELLED, wanted=Status.CANCELLED)
        order.save()
        order.status = Status.PAID
        order.save()
        self.assertEqual(Order.objects.get(pk=order.pk).status, Status.PAID)

    def test_a_copy_is_a_row_of_its_own(self):
        order = self.order()
        order.pk, order._state.adding = None, True
        order.save()
        self.assertEqual(Order.objects.get(pk=order.pk).status, Status.PACKED)

    def test_copies_of_the_instance_know_what_was_loaded(self):
        for duplicate in (copy.copy, pickle.dumps):
            Order.objects.filter(pk=self.pk).update(status=Status.PACKED)
            stale = self.moved()
            twin = pickle.loads(pickle.dumps(stale)) if duplicate is pickle.dumps else duplicate(stale)
            twin.save()
            self.assertEqual(self.order().status, Status.SHIPPED)

    def test_an_expression(self):
        order = self.order()
        order.status = F("wanted")
        order.save()
        self.assertEqual(self.order().status, Status.SHIPPED)

    def test_a_row_that_was_deleted_is_created_again_as_ever(self):
        order = self.order()
        Order.objects.all().delete()
        order.status = Status.PAID
        order.save()
        self.assertEqual(self.order().status, Status.PAID)

    async def test_asynchronously(self):
        stale = await Order.objects.aget(pk=self.pk)
        await Order.objects.filter(pk=self.pk).aupdate(status=Status.SHIPPED)
        stale.note = "gift"
        await stale.asave()
        self.assertEqual((await Order.objects.aget(pk=self.pk)).status, Status.SHIPPED)

    def test_the_entity(self):
        self.assertEqual(self.order().entity, OrderEntity(self.pk))
