"""The reader's own app."""

from celery import Celery

from celery_goalstate import Engine, Entity, Rules

app = Celery("shop", broker="redis://localhost:6379/0")
engine = Engine(app)


@engine.register
class Order(Entity):
    rules = Rules({})
