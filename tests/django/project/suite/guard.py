"""The transaction guard."""

import dataclasses
import linecache
import warnings
from contextlib import contextmanager

from django.db import transaction
from django.http import HttpResponse
from django.test import override_settings
from django.urls import path
from orders.models import Order
from shop.celery import engine

from celery_goalstate.contrib.django import EnqueuedInTransaction, enqueue_on_commit

from .base import Case, TransactionCase, described


def impatient(request, pk):
    engine.enqueue(Order.objects.get(pk=pk).entity, 60)
    return HttpResponse()


urlpatterns = [path("<int:pk>/", impatient)]


@contextmanager
def reaction(value):
    settings = dataclasses.replace(engine.settings, enqueue_in_transaction=value)
    with engine.opened_with(engine.parts, settings):
        yield


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Guard(TransactionCase):
    def setUp(self):
        super().setUp()
        self.order = Order.objects.create()

    def test_points_at_the_line_that_enqueues(self):
        with transaction.atomic(), self.assertWarns(EnqueuedInTransaction) as caught:
            engine.enqueue(self.order.entity, 60)  # this line
        self.assertEqual(caught.filename, __file__)
        self.assertIn("# this line", linecache.getline(__file__, caught.lineno))
        self.assertRegex(
            str(caught.warning),
            f"^order/{self.order.pk} enqueued inside a transaction on the database default: .* Use enqueue",
        )

    def test_of_many(self):
        with transaction.atomic(), self.assertWarnsRegex(EnqueuedInTransaction, "^2 entities of kind order"):
            engine.enqueue_many([engine.ref("order", 1), engine.ref("order", 2)], 60)

    def test_may_be_an_error(self):
        with reaction("error"), transaction.atomic(), self.assertRaises(EnqueuedInTransaction):
            engine.enqueue(self.order.entity, 60)
        self.assertIsNone(described(self.order))

    def test_may_be_allowed(self):
        with reaction("allow"), transaction.atomic(), no_warnings():
            engine.enqueue(self.order.entity, 60)

    def test_is_silent_without_a_transaction_and_on_commit(self):
        with no_warnings():
            engine.enqueue(self.order.entity, 60)
            with transaction.atomic():
                enqueue_on_commit(self.order, 30)
                transaction.on_commit(lambda: engine.enqueue(self.order.entity, 10))

    def test_under_atomic_requests(self):
        connection = transaction.get_connection()
        connection.settings_dict["ATOMIC_REQUESTS"] = True
        self.addCleanup(connection.settings_dict.__setitem__, "ATOMIC_REQUESTS", False)
        with override_settings(ROOT_URLCONF=__name__), self.assertWarns(EnqueuedInTransaction) as caught:
            self.client.get(f"/{self.order.pk}/")
        self.assertEqual(caught.filename, __file__)


class GuardInTestCases(Case):
    """Each is inside a transaction of Django's, which is not the project's."""

    def test_is_silent(self):
        order = Order.objects.create()
        with no_warnings():
            engine.enqueue(order.entity, 60)
            with self.captureOnCommitCallbacks(execute=True), transaction.atomic():
                order.enqueue_on_commit(30)

    def test_but_not_inside_a_transaction_of_the_project(self):
        with transaction.atomic(), self.assertWarns(EnqueuedInTransaction):
            engine.enqueue(Order.objects.create().entity, 60)


class Installed(Case):
    def test_once(self):
        from django.apps import apps

        apps.get_app_config("goalstate").ready()
        self.assertEqual(len(engine.hooks.before_enqueue), 1)
