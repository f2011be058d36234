"""A Django app with the project's Celery app and its engine."""

from celery import Celery

from celery_goalstate import Engine

app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
engine = Engine(app)
