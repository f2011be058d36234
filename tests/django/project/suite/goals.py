"""Goals are written, and the rows enqueued when that is committed."""

from datetime import timedelta
from unittest import mock

from django.db import transaction
from orders.entities import OrderEntity, ParcelEntity
from orders.models import Order, Parcel, Status
from shop.celery import engine

from celery_goalstate import Rules
from celery_goalstate.contrib.django import (
    ModelEntity,
    aenqueue,
    aenqueue_on_commit,
    aset_goal,
    enqueue_many_on_commit,
    enqueue_on_commit,
    not_enqueued,
    set_goal,
)
from celery_goalstate.exceptions import IndexUnavailable, UnknownKind

from .base import Case, TransactionCase, described, index_away


class Abort(Exception):
    pass


class SetGoal(TransactionCase):
    def test_on_commit_and_never_without(self):
        order = Order.objects.create()
        with transaction.atomic():
            order.set_goal(Status.CANCELLED)
            self.assertIsNone(described(order))
        order.refresh_from_db()
        self.assertEqual(order.status, Status.CANCELLED)
        other = Order.objects.create()
        with self.assertRaises(Abort), transaction.atomic():
            other.set_goal(Status.CANCELLED)
            raise Abort
        self.assertIsNone(described(other))

    def test_without_a_transaction_at_once(self):
        order = Order.objects.create()
        before = order.changed
        with self.assertNumQueries(
            2 + 2 + 3
        ):  # savepoints apart: update, refresh; then select, update, select
            order.set_goal(Status.CANCELLED, note="too late")
        order.refresh_from_db()
        self.assertEqual((order.status, order.note), (Status.CANCELLED, "too late"))
        self.assertGreater(order.changed, before)

    def test_of_a_queryset(self):
        Order.objects.bulk_create([Order() for _ in range(12)])
        Order.objects.bulk_create([Order(status=Status.SHIPPED) for _ in range(3)])
        with mock.patch("celery_goalstate.contrib.django.scheduling.ROWS", 5):
            count = Order.objects.filter(status=Status.PAID).set_goal(Status.CANCELLED, spread=60)
        self.assertEqual(count, 12)
        self.assertEqual(Order.objects.filter(wanted=Status.CANCELLED).count(), 12)
        self.assertEqual(sum(engine.counts("order")["order"].values()), 12)
        self.assertEqual(Order.objects.none().set_goal(Status.SHIPPED), 0)
        self.assertEqual(Order.objects.order_by("-pk")[:2].set_goal(Status.SHIPPED), 2)
        self.assertEqual(set_goal(Parcel.objects.all(), "hub"), 0)

    def test_what_cannot_be_a_goal_is_refused_before_anything_is_written(self):
        order = Order.objects.create()
        for goal, named in [
            ("shiped", "'shiped'. Did you mean shipped"),
            (Status.PAID, "Accepted: shipped, c"),
        ]:
            with self.assertRaisesRegex(ValueError, named):
                order.set_goal(goal)
            with self.assertRaisesRegex(ValueError, named):
                Order.objects.all().set_goal(goal)
        with self.assertRaisesRegex(ValueError, "deadline"):
            order.set_goal(Status.CANCELLED, deadline=-1)
        with self.assertRaisesRegex(ValueError, "wanted of orders.Order is None"):
            order.set_goal(None)
        order.refresh_from_db()
        self.assertEqual(order.wanted, Status.SHIPPED)
        self.assertIsNone(described(order))

    def test_no_goal(self):
        parcel = Parcel.objects.create(state="hub", goal="depot")
        self.assertEqual(set_goal(parcel, None), 1)
        parcel.refresh_from_db()
        self.assertEqual((parcel.state, parcel.goal), ("hub", None))

    def test_a_row_that_is_gone(self):
        order = Order.objects.create()
        Order.objects.all().delete()
        with self.assertRaisesRegex(Order.DoesNotExist, "there is no order"):
            order.set_goal(Status.CANCELLED)

    def test_a_deadline_counts_from_the_commit(self):
        order = Order.objects.create()
        order.set_goal(Status.CANCELLED, deadline=timedelta(hours=1))
        self.assertTrue(engine.is_scheduled(order.entity))
        order.refresh_from_db()
        self.assertEqual((order.status, order.wanted), (Status.PAID, Status.CANCELLED))

    async def test_asynchronously(self):
        order = await Order.objects.acreate()
        await order.aset_goal(Status.CANCELLED)
        await order.arefresh_from_db()
        self.assertEqual(order.status, Status.CANCELLED)
        self.assertEqual(await aset_goal(Order.objects.all(), Status.CANCELLED), 1)
        self.assertEqual(await Order.objects.aset_goal(Status.CANCELLED), 1)
        await aenqueue_on_commit(order, 60)
        await order.aenqueue_on_commit(60)
        self.assertFalse((await aenqueue(order, 60)).changed)


class Enqueue(TransactionCase):
    def test_rows_entities_and_references(self):
        order, parcel = Order.objects.create(), Parcel.objects.create()
        with transaction.atomic():
            enqueue_on_commit(order, 60)
            enqueue_on_commit(ParcelEntity(parcel), 60)
        with transaction.atomic():
            enqueue_many_on_commit([order, ParcelEntity(parcel), engine.ref("order", "0099")], 30, spread=5)
            self.assertIsNone(engine.describe(OrderEntity(99)))
        for entity in (order.entity, ParcelEntity(parcel), OrderEntity(99)):
            self.assertTrue(engine.is_scheduled(entity))

    def test_a_queryset(self):
        orders = Order.objects.bulk_create([Order() for _ in range(5)])
        with transaction.atomic():
            Order.objects.order_by("pk")[:3].enqueue_on_commit(60)
            enqueue_many_on_commit(Order.objects.filter(pk=orders[4].pk), 60)
        scheduled = [engine.is_scheduled(order.entity) for order in orders]
        self.assertEqual(scheduled, [True, True, True, False, True])

    def test_bad_input_is_refused_before_the_commit(self):
        order = Order.objects.create()
        for call in (
            lambda: enqueue_on_commit(order, -1),
            lambda: enqueue_on_commit(order, no_such_option=1),
            lambda: enqueue_on_commit("order/1"),
            lambda: enqueue_on_commit(order.entity, kind="order"),
            lambda: enqueue_on_commit(Order()),
            lambda: enqueue_many_on_commit([order], spread=-1),
            lambda: enqueue_many_on_commit([order, 7]),
        ):
            with transaction.atomic(), self.assertRaises((ValueError, TypeError)):
                call()
        self.assertIsNone(described(order))

    def test_kinds_that_are_not_known(self):
        class Stray(ModelEntity):
            model, kind, rules = Parcel, "stray", Rules({})

        for named, call in [
            ("'ordr'.* Did you mean order?", lambda: enqueue_on_commit(engine.ref("ordr", 1))),
            ("no kind 'ordr' is of rows of orders.Order. Did you mean order", lambda: _ship(kind="ordr")),
            ("no entity class for auth.Group is registered", lambda: enqueue_on_commit(_group())),
            ("Stray is not registered", lambda: enqueue_on_commit(Stray(Parcel.objects.create()))),
        ]:
            with self.assertRaisesRegex(UnknownKind, named):
                call()

    def test_a_row_of_several_kinds(self):
        label = type(
            "LabelEntity",
            (ModelEntity,),
            {"model": Parcel, "kind": "label", "get_action_list": lambda *_: []},
        )
        parcel = Parcel.objects.create(goal="hub")
        engine.register(label)
        self.addCleanup(_forget, "label")
        with self.assertRaisesRegex(UnknownKind, r"several kinds \(parcel, label\): give kind="):
            enqueue_on_commit(parcel)
        enqueue_on_commit(parcel, 60, kind="label")
        self.assertTrue(engine.is_scheduled(label(parcel)))
        self.assertFalse(engine.is_scheduled(ParcelEntity(parcel)))


class IndexAway(TransactionCase):
    def test_the_row_is_saved_and_what_comes_later_on_commit_is_done(self):
        told, order, done = [], Order.objects.create(), []

        def receive(sender, refs, error, **more):
            told.append((sender, refs, str(error)))

        not_enqueued.connect(receive)
        self.addCleanup(not_enqueued.disconnect, receive)
        with index_away(), self.assertLogs("celery_goalstate", "ERROR") as logs, transaction.atomic():
            order.set_goal(Status.CANCELLED)
            transaction.on_commit(lambda: done.append("later"))
        self.assertEqual(done, ["later"])
        self.assertEqual(Order.objects.get().wanted, Status.CANCELLED)
        [line] = logs.output
        self.assertIn(f"order/{order.pk} is saved, but not enqueued: the index redis://", line)
        self.assertIn("The resync of its kind, every 600 s, finds it", line)
        self.assertEqual(told, [(engine, [order.entity.ref], "the index redis://localhost does not answer")])

    def test_many(self):
        Order.objects.bulk_create([Order() for _ in range(3)])
        with index_away(), self.assertLogs("celery_goalstate", "ERROR") as logs:
            Order.objects.all().set_goal(Status.CANCELLED)
        self.assertIn("and 2 others are saved, but not enqueued", logs.output[0])

    def test_a_kind_without_a_resync(self):
        with (
            mock.patch.dict(engine._kinds._registered, {"order": (OrderEntity, {})}),
            mock.patch.dict(engine._kinds._resolved),
            index_away(),
            self.assertLogs("celery_goalstate", "ERROR") as logs,
        ):
            engine._kinds._resolved.pop("order", None)
            Order.objects.create().set_goal(Status.CANCELLED)
        self.assertIn("Its kind has no resync_every, so nothing enqueues it by itself", logs.output[0])

    def test_whoever_wants_the_error_gets_it(self):
        order = Order.objects.create()
        for call in (
            lambda: order.set_goal(Status.CANCELLED, robust=False),
            lambda: order.enqueue_on_commit(robust=False),
            lambda: Order.objects.enqueue_on_commit(robust=False),
        ):
            with index_away(), self.assertRaises(IndexUnavailable):
                call()

    def test_other_errors_are_raised(self):
        order = Order.objects.create()
        with (
            mock.patch.object(type(engine.parts.index), "enqueue", side_effect=ZeroDivisionError),
            self.assertRaises(ZeroDivisionError),
        ):
            order.set_goal(Status.CANCELLED)

    def test_a_view_answers(self):
        order = Order.objects.create()
        with index_away(), self.assertLogs("celery_goalstate", "ERROR"):
            answer = self.client.get(f"/orders/{order.pk}/ship/")
        self.assertEqual(answer.status_code, 200)


class InTests(Case):
    """A project's own tests: nothing is committed there, unless they say so."""

    def test_on_commit_callbacks_are_captured_and_run(self):
        order = Order.objects.create()
        with self.captureOnCommitCallbacks() as callbacks:
            order.set_goal(Status.CANCELLED)
        self.assertIsNone(described(order))
        self.assertEqual(len(callbacks), 1)
        with self.captureOnCommitCallbacks(execute=True):
            order.set_goal(Status.CANCELLED)
        self.assertTrue(described(order).converged)


def _ship(**options):
    Order.objects.create().set_goal(Status.SHIPPED, **options)


def _group():
    from django.contrib.auth.models import Group

    return Group.objects.create(name="couriers")


def _forget(kind):
    for kinds in (engine._kinds._registered, engine._kinds._resolved):
        kinds.pop(kind, None)
        kinds.pop(f"{kind}.resync", None)
