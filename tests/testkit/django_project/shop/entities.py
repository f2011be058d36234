"""The shop's entities, as the engine sees them: imported by `celery_goalstate.contrib.django`."""

from contextlib import contextmanager

from django.db import transaction

from celery_goalstate import Entity
from celery_goalstate.contrib.django import enqueue_on_commit
from celery_goalstate.exceptions import PermanentError
from shop import engine, models


class RowEntity(Entity):
    model = None

    def row(self):
        found = self.model.objects.filter(pk=self.id).first()
        if found is None:
            raise PermanentError(f"there is no {self.kind} {self.id}")
        return found

    def get_state(self):
        return self.row().state


@contextmanager
def locked(ctx, order):
    """The order's row, for one transaction that saves it, unless a newer evaluation has written it."""
    with transaction.atomic():
        row = models.Order.objects.select_for_update().get(pk=order.id)
        if ctx.fencing_token < row.fence:
            raise RuntimeError("a newer evaluation has written to this order")
        row.fence = ctx.fencing_token
        yield row
        row.save(update_fields=["state", "fence"])


@engine.register
class Order(RowEntity):
    model = models.Order

    def get_goal_state(self):
        return self.row().goal

    def get_action_list(self, state, goal_state):
        if goal_state == "cancelled":
            return ["cancel"] if state != "cancelled" else []
        return {"placed": ["pay", "ship"], "paid": ["ship"]}.get(state)

    def pay(self, ctx):
        with locked(ctx, self) as row:
            if row.state == "placed":
                row.payments.create(amount=100)
                row.state = "paid"

    def ship(self, ctx):
        """What was enqueued by a worker that died between commit and enqueue is enqueued again."""
        with transaction.atomic():
            models.Parcel.objects.get_or_create(order_id=self.id)
            enqueue_on_commit(Parcel(self.id))
        with locked(ctx, self) as row:
            row.state = "shipped"

    def cancel(self, ctx):
        with locked(ctx, self) as row:
            row.payments.all().delete()
            models.Parcel.objects.filter(order=row).delete()
            row.state = "cancelled"


@engine.register
class Parcel(RowEntity):
    model = models.Parcel

    def get_goal_state(self):
        return "sent"

    def get_action_list(self, state, goal_state):
        return ["send"] if state != goal_state else []

    def send(self, ctx):
        models.Parcel.objects.filter(pk=self.id).update(state="sent")
