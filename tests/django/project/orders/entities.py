from shop.celery import engine

from celery_goalstate import Rules
from celery_goalstate.contrib.django import ModelEntity

from .models import Order, Parcel, Seat, Status


@engine.register(resync_every=600)
class OrderEntity(ModelEntity):
    model, state_field, goal_field = Order, "status", "wanted"
    goals = [Status.SHIPPED, Status.CANCELLED]
    rules = Rules(
        {
            Status.SHIPPED: {
                Status.PAID: ["pack", "ship"],
                Status.PACKED: ["ship"],
                Status.SHIPPED: [],
                Status.CANCELLED: [],
            },
            Status.CANCELLED: {
                Status.PAID: ["cancel"],
                Status.PACKED: ["cancel"],
                Status.SHIPPED: [],
                Status.CANCELLED: [],
            },
        }
    )

    def pack(self, ctx):
        with self.locked() as order:
            if "no box" in order.note:
                raise RuntimeError("there is no box of that size")
            order.packed += 1
            order.status = Status.PACKED

    def ship(self, ctx):
        self.transition([Status.PAID, Status.PACKED], Status.SHIPPED)

    def cancel(self, ctx):
        self.transition([Status.PAID, Status.PACKED], Status.CANCELLED)


@engine.register(queue="parcels", batch_size=50, resync_every=600)
class ParcelEntity(ModelEntity):
    model = Parcel

    def get_action_list(self, state, goal_state):
        return [] if goal_state is None or state == goal_state else ["move"]

    def move(self, ctx):
        self.transition(ctx.state, ctx.goal_state)


@engine.register(resync_every=600)
class SeatEntity(ModelEntity):
    model = Seat

    def get_action_list(self, state, goal_state):
        return [] if state == goal_state else ["move"]

    def move(self, ctx):
        self.transition(ctx.state, ctx.goal_state)
