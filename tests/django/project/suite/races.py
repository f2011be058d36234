"""Many at the same time, each in a thread and with a connection of its own."""

import threading

from django.db import connection
from orders.models import Order, Status

from celery_goalstate.contrib.django import StateChanged

from .base import TransactionCase


def at_once(*calls):
    """Run the calls in threads that begin together; what each returned or raised."""
    barrier, results = threading.Barrier(len(calls)), [None] * len(calls)

    def run(number, call):
        try:
            barrier.wait()
            results[number] = call()
        except Exception as error:  # noqa: BLE001 - the test asserts which
            results[number] = error
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class Races(TransactionCase):
    def test_stale_saves_beside_transitions_lose_nothing(self):
        orders = Order.objects.bulk_create([Order(status=Status.PACKED) for _ in range(100)])
        stale = list(Order.objects.order_by("pk"))

        def save():
            for order in stale:
                order.note = "gift"
                order.save()

        def ship():
            for order in orders:
                order.entity.transition(Status.PACKED, Status.SHIPPED)

        self.assertEqual(at_once(save, ship), [None, None])
        rows = list(Order.objects.values_list("status", "note"))
        self.assertEqual(rows, [(Status.SHIPPED, "gift")] * 100)

    def test_increments_of_locked_rows_are_all_there(self):
        entity = Order.objects.create().entity

        def increment():
            for _ in range(25):
                with type(entity)(entity.id).locked() as order:
                    order.packed += 1

        self.assertEqual(at_once(*[increment] * 8), [None] * 8)
        self.assertEqual(Order.objects.get().packed, 200)

    def test_of_equal_transitions_one_wins(self):
        entity = Order.objects.create().entity
        results = at_once(*[lambda: type(entity)(entity.id).transition(Status.PAID, Status.PACKED)] * 8)
        self.assertEqual(results.count(None), 1)
        self.assertEqual(sum(isinstance(result, StateChanged) for result in results), 7)
