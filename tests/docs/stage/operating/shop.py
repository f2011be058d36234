"""The reader's own app."""

from datetime import timedelta

import warehouse
from celery import Celery

from celery_goalstate import ANY, Engine, Entity, Rules
from celery_goalstate.exceptions import PermanentError

app = Celery("shop", broker="redis://localhost:6379/0")
app.conf.goalstate_jitter = False
engine = Engine(app)


def pack(ctx, order):
    if order.id == "44":
        raise PermanentError("there is no such address")
    if order.id != "45":
        warehouse.pack(order.id)


def ship(ctx, order):
    warehouse.ship(order.id)


@engine.register(failure_retry_delay=600)
class Order(Entity):
    rules = Rules({"shipped": {"paid": [pack], "packed": [ship], ANY: []}})

    def get_state(self):
        return warehouse.status(self.id)

    def get_goal_state(self):
        return warehouse.wanted(self.id)

    @classmethod
    def iter_unconverged(cls):
        return warehouse.unfinished()


def open_shop():
    for id in ("42", "lost-7", "44", "45", "46"):
        warehouse.place(id)
        engine.enqueue(Order(id), timedelta(hours=9) if id == "46" else None)
